"""Make many runs in worker processes, and store each one when it is finished."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from common.report import Store


def carry_out(
    wanted: Callable[[], Mapping[str, tuple]],
    work: Callable[..., Any],
    store: Store,
    processes: int,
    until: float,
    say: Callable[[str], str],
) -> None:
    """Make every wanted run that the store does not have.

    Args:
        wanted: returns the arguments of the wanted runs by name, in order. Called again after each finished run.
        work: makes a run.
        processes: runs at a time.
        until: the value of `time.monotonic` after which no further run begins.
        say: returns the text to print about a finished run.
    """
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        pending: dict[Future, str] = {}
        while True:
            for name, given in wanted().items() if time.monotonic() < until else ():
                if len(pending) < processes and name not in store and name not in pending.values():
                    pending[pool.submit(work, *given)] = name
            if not pending:
                return
            done = next(as_completed(pending))
            name = pending.pop(done)
            store[name] = done.result()
            print(f"{name}: {say(name)}", flush=True)
