"""A worker process of `workers.py`: it is started by path, and scores rows until its parent closes the connection.

It imports only the modules that the function needs. Importing all of `tbrm_trl` would load torch into every worker.
"""

import contextlib
import fcntl
import functools
import math
import mmap
import os
import pickle
import resource
import runpy
import select
import signal
import sys
import time
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STARTED, DONE, VALUES = 0, 1, 2  # in the shared page of doubles: start time of the row, rows done, one value per row
FAILED, UNKNOWN, LEFT_OUT = math.inf, -math.inf, math.nan
RAISED, WRONG = "raised", "wrong"  # what ended a call: an exception, or a return value that is no reward


def main() -> None:
    connection, shared, parent = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    page = memoryview(mmap.mmap(shared, 0)).cast("d")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and closes the connection
    _end_with(parent)
    try:
        job = connection.recv()
        function, name, stops = _prepare(job), job["name"], job["raises"]
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)  # ready
    with contextlib.suppress(EOFError, OSError):
        while True:
            completions, columns = connection.recv()
            connection.send(_score(function, name, completions, columns, page, stops))


def _prepare(job: dict):
    sys.path[:] = job["path"]
    if job["memory_limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit"], job["memory_limit"]))
    if job["main"]:  # the function is defined in the user's script
        module = types.ModuleType("__mp_main__")
        how, name = job["main"]
        run: Any = runpy.run_module if how == "module" else runpy.run_path
        module.__dict__.update(run(name, run_name="__mp_main__"))
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    elif job["ours"]:
        package = types.ModuleType("tbrm_trl")
        package.__path__ = [str(Path(__file__).resolve().parent.parent)]
        sys.modules["tbrm_trl"] = package
    function = pickle.loads(job["function"])
    warm_up = getattr(sys.modules.get(getattr(function, "__module__", "") or ""), "warm_up", None)
    if warm_up is not None:  # slow setup, such as building a parser, must not count as the first row's time
        warm_up()
    return function


def _score(
    function, name: str, completions: list, columns: dict[str, list], page: Any, stops: bool
) -> tuple[dict, dict, tuple[str, str] | None]:
    """Score rows one at a time. End at the first row whose return value is no reward, and with `stops` if one raises.

    Returns:
        The logged columns, with None for rows that logged nothing; the logged metrics; and what ended the scoring
        (`RAISED` or `WRONG`, with a description), else None.
    """
    page[DONE] = 0
    rewards_of, not_rewards = _of_returned()
    extra: dict[str, list] = {}
    metrics: dict[str, list] = {}
    for at, completion in enumerate(completions):
        page[STARTED] = time.monotonic()

        def log_extra(column, values, at=at):  # the arguments have TRL's names
            extra.setdefault(column, [None] * len(completions))[at] = values[0]

        def log_metric(name, value):
            metrics.setdefault(name, []).append(value)

        row = {name: [values[at]] for name, values in columns.items()}
        try:
            given = function([completion], **row, log_extra=log_extra, log_metric=log_metric)
            (value,) = rewards_of(given, 1, name)
            number = LEFT_OUT if value is None else value
            if math.isinf(number):
                raise ValueError(f"the reward is {value}, not a finite number")
            page[VALUES + at] = UNKNOWN if value is not None and math.isnan(number) else number
        except BaseException as error:
            page[VALUES + at] = FAILED
            wrong = isinstance(error, not_rewards)
            if wrong or stops:
                page[DONE] = at + 1
                return extra, metrics, (WRONG, str(error)) if wrong else (RAISED, _described(error, completion))
        page[DONE] = at + 1
    return extra, metrics, None


@functools.cache
def _of_returned() -> tuple[Any, Any]:
    """`rewards_of` and `NotRewardsError`, without importing the package."""
    names = runpy.run_path(str(Path(__file__).with_name("returned.py")))
    return names["rewards_of"], names["NotRewardsError"]


def _described(error: BaseException, completion: Any) -> str:
    """The error, the line that raised it, and the completion."""
    places = traceback.extract_tb(error.__traceback__)[1:]  # without the call in `_score`
    where = f", {places[-1].filename}:{places[-1].lineno}" if places else ""
    return f"{type(error).__name__}: {error}{where}. The completion: {str(completion)[:400]!r}"


def _end_with(pipe: int) -> None:
    """Have the system end this process's group when the pipe's other end is closed, as it is when the parent ends.

    The signal's default action works also during a long call into C, in which no thread of Python runs.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it was closed before
        os._exit(1)


if __name__ == "__main__":
    main()
