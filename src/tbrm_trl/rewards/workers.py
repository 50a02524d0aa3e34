"""Reward functions in worker processes: what hangs is killed, what crashes is replaced, what raises is counted.

math-verify stops itself by SIGALRM, which works in the main thread only, and which neither a long C call nor a big
integer lets through. A process can always be killed.
"""

import contextlib
import inspect
import math
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from .worker_process import DONE, FAILED, STARTED, VALUES

ROWS_AT_ONCE = 2048  # rows that a worker is given in one message, at most
STARTUP_LIMIT = 300.0  # seconds for a worker's imports
PROGRAM = Path(__file__).with_name("worker_process.py")


class InWorkers:
    """A reward function, with each row scored in a worker process under a time limit. It can be called from any thread.

    The function is called with one completion at a time, and with the columns that are lists with a value for each
    completion. It must be importable: at the top level of a module, or of the script that is run. It gets `log_extra`
    and `log_metric` as from TRL, but no `trainer_state`.

    `counts` has the rows that were `late`, that `crashed` their worker and that `raised`; their shares are logged as
    metrics.

    Args:
        function: takes `(completions, **columns)` and gives one number, or None, for each completion.
        time_limit: seconds that one row may take. Starting a worker does not count.
        workers: number of processes; by default as many as this process has cores for, at most eight.
        failed: reward of a row that was late, crashed or raised. None leaves it out of the loss: a verdict that is not
            known is not a wrong one.
        memory_limit: bytes that a worker may allocate; 0 for no limit.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        time_limit: float = 5.0,
        workers: int | None = None,
        failed: float | None = None,
        memory_limit: int = 8 << 30,
    ) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError("A coroutine function does not run in workers: pass it to the trainer as it is.")
        if time_limit <= 0:
            raise ValueError(f"time_limit must be positive, not {time_limit}.")
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.time_limit = time_limit
        self.workers = workers or _cores()
        self.failed = failed
        self.memory_limit = memory_limit
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._process = os.getpid()

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        log_extra, log_metric = columns.get("log_extra"), columns.get("log_metric")
        rows = {name: list(values) for name, values in columns.items() if _is_column(values, len(completions))}
        with self._lock:
            before = self.counts.copy()
            rewards, extra, metrics = self._score(list(completions), rows)
            new = self.counts - before
        if log_extra is not None:
            for name, values in extra.items():
                log_extra(name, values)
        if log_metric is not None and completions:
            for name, values in metrics.items():
                log_metric(name, sum(values) / len(values))
            for kind in ("late", "crashed", "raised"):  # each time, so that all processes log the same metrics
                log_metric(f"{self.__name__}/{kind}", new[kind] / len(completions))
        return rewards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _process=os.getpid())

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        with self._lock:
            for worker in self._pool:
                worker.end()
            self._pool = []

    def _score(
        self, completions: list[Any], columns: dict[str, list[Any]]
    ) -> tuple[list[float | None], dict[str, list], dict[str, list]]:
        """Rewards of all rows, and what the function logged: columns and metrics."""
        if os.getpid() != self._process:  # forked: the workers are the parent's
            self._pool, self._process = [], os.getpid()
        count = min(self.workers, len(completions))
        self._pool += [self._new_worker() for _ in range(count - len(self._pool))]
        rewards: list[float | None] = [None] * len(completions)
        extra: dict[str, list] = {}
        metrics: dict[str, list] = {}
        # Worker k gets every count-th row from k on: neighbours are often alike, and slow together.
        waiting = {k: list(range(k, len(completions), count)) for k in range(count)}
        for k in waiting:
            self._pool[k].ready()
            self._send(k, waiting[k], completions, columns)
        while waiting:
            limits = {k: self._pool[k].time_left(self.time_limit) for k in waiting}
            answered = wait([self._pool[k].connection for k in waiting], timeout=max(0.0, min(limits.values())))
            for k in list(waiting):
                worker = self._pool[k]
                if worker.connection in answered:
                    logged = worker.answer()
                    kind = None if logged is not None else "crashed"
                    for name, values in logged[0].items() if logged else ():
                        column = extra.setdefault(name, [None] * len(completions))
                        for row, one in zip(waiting[k], values, strict=False):
                            column[row] = one
                    for name, values in logged[1].items() if logged else ():
                        metrics.setdefault(name, []).extend(values)
                elif worker.time_left(self.time_limit) <= 0:
                    kind = "late"
                else:
                    continue
                rest = self._take(worker, waiting[k], rewards, kind)
                if kind is not None:
                    worker.end()
                    self._pool[k] = self._new_worker()
                if rest:
                    waiting[k] = rest
                    self._pool[k].ready()
                    self._send(k, rest, completions, columns)
                else:
                    del waiting[k]
        return rewards, extra, metrics

    def _send(self, k: int, rows: list[int], completions: list[Any], columns: dict[str, list[Any]]) -> None:
        now = rows[:ROWS_AT_ONCE]
        self._pool[k].send([completions[row] for row in now], {n: [v[row] for row in now] for n, v in columns.items()})

    def _take(self, worker: "_Worker", rows: list[int], rewards: list[float | None], kind: str | None) -> list[int]:
        """Write down what the worker has done; the rows that are left, without the one that ended it."""
        done = int(worker.page[DONE])
        for row, value in zip(rows[:done], worker.page[VALUES : VALUES + done], strict=True):
            if value == FAILED:
                self.counts["raised"] += 1
                rewards[row] = self.failed
            else:
                rewards[row] = None if math.isnan(value) else value
        if kind is None or done == len(rows[:ROWS_AT_ONCE]):
            return rows[done:]
        self.counts[kind] += 1
        rewards[rows[done]] = self.failed
        return rows[done + 1 :]

    def _new_worker(self) -> "_Worker":
        module = getattr(self.function, "__module__", None) or type(self.function).__module__
        try:
            function = pickle.dumps(self.function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{self.__name__} cannot be sent to a worker ({error}). Define it at the top level of a module, or "
                "pass it to the trainer without workers."
            ) from None
        main = getattr(sys.modules["__main__"], "__file__", None) if module == "__main__" else None
        ours = module.startswith(__package__ or "tbrm_trl.rewards")
        return _Worker(dict(function=function, main=main, ours=ours, path=sys.path, memory_limit=self.memory_limit))


class _Worker:
    """One process, the connection to it, and the page of memory in which it says how far it is."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.connection, theirs = Pipe()
        with tempfile.TemporaryFile() as file:
            file.truncate(8 * (VALUES + ROWS_AT_ONCE))
            self.page = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
            # Started by its path, not forked: safe beside threads and CUDA, and the user's script needs no guard.
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(theirs.fileno()), str(file.fileno())],
                pass_fds=(theirs.fileno(), file.fileno()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        theirs.close()
        self._ready = False
        self.connection.send(job)

    def ready(self) -> None:
        """Wait until the worker has imported its function."""
        if self._ready:
            return
        if not self.connection.poll(STARTUP_LIMIT):
            self.end()
            raise RuntimeError(f"A reward worker was not ready after {STARTUP_LIMIT:.0f} s.")
        try:
            error = self.connection.recv()
        except EOFError:
            error = f"it ended with code {self.process.wait()}"
        if error is not None:
            self.end()
            raise RuntimeError(f"A reward worker could not start: {error}")
        self._ready = True

    def send(self, completions: list[Any], columns: dict[str, list[Any]]) -> None:
        self.page[DONE] = 0
        self.page[STARTED] = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died; the connection says so when it is read
            self.connection.send((completions, columns))

    def answer(self) -> tuple[dict[str, list], dict[str, list]] | None:
        """What was logged for all the rows it was sent; None if it died instead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def time_left(self, limit: float) -> float:
        return self.page[STARTED] + limit - time.monotonic()

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.end()


def _is_column(values: Any, rows: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str | Mapping) and len(values) == rows


def _cores() -> int:
    """This process's share of the cores it may use."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes))
