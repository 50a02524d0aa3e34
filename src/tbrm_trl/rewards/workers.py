"""Run reward functions in worker processes: kill those that hang, replace those that crash, count exceptions.

math-verify stops itself by SIGALRM. That works only in the main thread, and not during a long C call or a computation
with big integers. A process can always be killed.
"""

import contextlib
import inspect
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

import dill

from .returned import NotRewardsError
from .worker_process import DONE, FAILED, STARTED, UNKNOWN, VALUES, WRONG

ROWS_AT_ONCE = 2048  # most rows in one message to a worker
SMALLEST = 4  # rows; smaller messages cost more time than they save by balancing workers
STARTUP_LIMIT = 300.0  # seconds for a worker's imports
PROGRAM = Path(__file__).with_name("worker_process.py")
_Logged = tuple[dict[str, list], dict[str, list], tuple[str, str] | None]  # columns, metrics, and what ended the call


class RewardError(RuntimeError):
    """A reward function raised an exception for a completion, or could not judge."""


class WorkerError(RuntimeError):
    """A reward function cannot run in workers at all: it cannot be sent to one, or a worker cannot start."""


class InWorkers:
    """A reward function that scores each row in a worker process under a time limit.

    Several threads may call it at once. They share the workers: each call has at least one, or waits for one.

    The function is called with one completion at a time, and with the columns that are lists with a value for each
    completion. It must be defined at the top level of a module or of the user's script, or in a notebook. It gets
    `log_extra` and `log_metric` as from TRL. It gets no `trainer_state` and no `environments`, since these are objects
    of this process.

    `counts` counts the rows that were `late`, that `crashed` their worker and that `raised`. Their shares are logged as
    metrics.

    Args:
        function: takes `(completions, **columns)` and returns one number for each completion, None where it does not
            apply, or NaN where its verdict is unknown.
        time_limit: seconds that one row may take; infinite for no limit. Starting a worker does not count.
        workers: number of processes; by default this process's share of the cores, at most eight.
        failed: reward of a row that was late, crashed or raised. NaN leaves it out of the loss, whatever other
            functions say of it, since an unknown verdict is not a wrong one.
        memory_limit: bytes that a worker may allocate; 0 for no limit.
        raises: whether an exception of the function ends the call with `RewardError`. If not, that row gets `failed`.

    Raises:
        TypeError: if the function is a coroutine function.
        ValueError: if `time_limit` is not positive, or `workers` is less than 1.
        WorkerError: at `start`, or else at the first call, if the function cannot run in a worker.
        NotRewardsError: at a call, if the function returned something other than a list of one reward.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        time_limit: float = 5.0,
        workers: int | None = None,
        failed: float | None = math.nan,
        memory_limit: int = 8 << 30,
        raises: bool = False,
    ) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError("A coroutine function does not run in workers: pass it to the trainer as it is.")
        if not time_limit > 0:  # as NaN is not
            raise ValueError(f"time_limit must be positive, not {time_limit}.")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}.")
        self.function = function
        self._take_signature()
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.time_limit = time_limit
        self.workers = workers or _cores()
        self.failed = failed
        self.memory_limit = memory_limit
        self.raises = raises
        self.counts: Counter[str] = Counter()
        self._returned = threading.Condition()
        self._idle: list[_Worker] = []
        self._lent = 0  # number of workers that calls hold
        self._process = os.getpid()

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        log_extra, log_metric = columns.get("log_extra"), columns.get("log_metric")
        rows = {
            name: list(values)
            for name, values in columns.items()
            if name != "environments" and _is_column(values, len(completions))  # TRL passes one for each completion
        }
        batch = _Batch(list(completions), rows)
        if completions:
            with self._borrowed(len(completions)) as pool:
                try:
                    self._score(batch, pool)
                finally:
                    with self._returned:
                        self.counts.update(batch.counts)
        if log_extra is not None:
            for name, values in batch.extra.items():
                log_extra(name, values)
        if log_metric is not None and completions:
            for name, values in batch.metrics.items():
                log_metric(name, sum(values) / len(values))
            for kind in ("late", "crashed", "raised"):  # also if 0, so that all processes log the same metrics
                log_metric(f"{self.__name__}/{kind}", batch.counts[kind] / len(completions))
        return batch.rewards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": [], "_lent": 0, "_returned": None, "__signature__": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _returned=threading.Condition(), _process=os.getpid())
        self._take_signature()

    def _take_signature(self) -> None:
        """Show the function's own signature, so that a missing argument is found before training."""
        self.__signature__: inspect.Signature | None = None
        with contextlib.suppress(TypeError, ValueError):  # a built-in may have none
            self.__signature__ = inspect.signature(self.function)

    def source_parts(self) -> list[Any]:
        """What decides a verdict, for `files.source_of`: no process ids, counts or sizes of a machine."""
        return [self.function, self.time_limit, self.failed, self.memory_limit, self.raises]

    def start(self) -> None:
        """Start a worker, unless one is there, and wait until it can score. Raises WorkerError if none can."""
        with self._borrowed(1) as pool:
            while not pool[0].ready:
                pool[0].start(bool(wait([pool[0].connection], timeout=_patience(pool, self.time_limit))))

    def close(self) -> None:
        """End the idle workers. A later call starts new ones."""
        with self._returned:
            _end(self._idle)

    @contextlib.contextmanager
    def _borrowed(self, rows: int) -> Iterator["list[_Worker]"]:
        """Workers for this many rows: all that are free, but no more than rows; waits until one is free."""
        with self._returned:
            if os.getpid() != self._process:  # after a fork, the workers belong to the parent
                self._idle, self._lent, self._process = [], 0, os.getpid()
            self._returned.wait_for(lambda: self._lent < self.workers)
            count = min(rows, self.workers - self._lent)
            self._lent += count
            pool = [self._idle.pop() for _ in range(min(count, len(self._idle)))]
        try:
            pool[:] = [worker for worker in pool if worker.process.poll() is None]
            pool += [self._new_worker() for _ in range(count - len(pool))]
            yield pool
        except BaseException:  # no worker may answer the next call with rows of this one
            _end(pool)
            raise
        finally:
            with self._returned:
                self._lent -= count
                self._idle += pool
                self._returned.notify_all()

    def _score(self, batch: "_Batch", pool: "list[_Worker]") -> None:
        """Score all rows: free workers get the next ones, and a row that crashes or blocks its worker fails."""
        while True:
            for worker in pool:
                if worker.ready and not worker.rows and (rows := batch.next_rows(len(pool))):
                    worker.send(rows, batch)
            if not batch.waiting and not any(worker.rows for worker in pool):
                return
            active = [worker for worker in pool if worker.rows or not worker.ready]
            answered = wait([worker.connection for worker in active], timeout=_patience(active, self.time_limit))
            for at, worker in enumerate(pool):
                if worker in active and self._has_ended(worker, worker.connection in answered, batch):
                    worker.end()
                    pool[at] = self._new_worker()

    def _has_ended(self, worker: "_Worker", answered: bool, batch: "_Batch") -> bool:
        """Record the results of a worker that has answered, crashed or is late, and return whether to replace it.

        Raises:
            NotRewardsError: if the function returned something other than a reward.
            RewardError: if it raised and `raises` is set.
        """
        if not worker.ready:
            worker.start(answered)
            return False
        if not answered and worker.time_left(self.time_limit) > 0:
            return False
        logged = worker.answer() if answered else None
        if logged is not None and logged[2] is not None:
            kind, said = logged[2]
            if kind == WRONG:
                raise NotRewardsError(said)
            batch.counts["raised"] += 1
            raise RewardError(f"The reward {self.__name__} raised {said}")
        done = int(worker.page[DONE])
        values = list(map(float, worker.page[VALUES : VALUES + done]))
        raised = batch.write(worker.rows[:done], values, self.failed, logged)
        rest, worker.rows = worker.rows[done:], []
        batch.counts.update({"raised": raised} if raised else {})
        if logged is None and rest:
            batch.counts["crashed" if answered else "late"] += 1
            batch.rewards[rest.pop(0)] = self.failed
        batch.waiting = rest + batch.waiting
        return logged is None

    def _new_worker(self) -> "_Worker":
        module = getattr(self.function, "__module__", None) or type(self.function).__module__
        main = _program() if module == "__main__" else None
        try:
            if module == "__main__" and not _is_in_script(self.function):
                function, main = dill.dumps(self.function, recurse=True), None
            else:
                function = pickle.dumps(self.function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise WorkerError(
                f"{self.__name__} cannot be sent to a worker ({error}). Define it at the top level of a module, or "
                "pass it to the trainer without workers."
            ) from None
        ours = module.startswith(__package__ or "tbrm_trl.rewards")
        return _Worker(
            dict(
                function=function,
                name=self.__name__,
                main=main,
                ours=ours,
                path=sys.path,
                memory_limit=self.memory_limit,
                raises=self.raises,
            )
        )


def _program() -> tuple[str, str] | None:
    """How this program was started: ("module", its name) by `python -m`, or ("path", its file); None if neither."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return "module", spec.name
    file = getattr(main, "__file__", None)
    return None if file is None else ("path", file)


def _is_in_script(function: Any) -> bool:
    """Whether a worker that runs the script finds the function there. It does not in a notebook or an actor."""
    main, named = sys.modules["__main__"], function if hasattr(function, "__qualname__") else type(function)
    return hasattr(main, "__file__") and getattr(main, named.__qualname__, None) is named


class _Batch:
    """The rows of one call: those waiting for a worker, and the results of the others."""

    def __init__(self, completions: list[Any], columns: dict[str, list[Any]]) -> None:
        self.completions, self.columns = completions, columns
        self.waiting = list(range(len(completions)))
        self.rewards: list[float | None] = [None] * len(completions)
        self.extra: dict[str, list] = {}
        self.metrics: dict[str, list] = {}
        self.counts: Counter[str] = Counter()

    def next_rows(self, workers: int) -> list[int]:
        """Rows for one worker: half of its share of the waiting rows, so that all workers end together.

        The rows are neighbours, so that rollouts of one prompt share the worker's cache for the gold.
        """
        share = len(self.waiting) / workers
        count = min(ROWS_AT_ONCE, math.ceil(max(share / 2, min(share, SMALLEST))))
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        return rows

    def write(self, rows: list[int], values: list[float], failed: float | None, logged: _Logged | None) -> int:
        """Record values and logged columns and metrics. Returns the number of rows for which the function raised."""
        for row, value in zip(rows, values, strict=True):
            self.rewards[row] = {FAILED: failed, UNKNOWN: math.nan}.get(value, None if math.isnan(value) else value)
        extra, metrics, _ = logged or ({}, {}, None)
        for name, column in extra.items():
            for row, one in zip(rows, column, strict=True):
                self.extra.setdefault(name, [None] * len(self.rewards))[row] = one
        for name, numbers in metrics.items():
            self.metrics.setdefault(name, []).extend(numbers)
        return values.count(FAILED)


class _Worker:
    """One process, the connection to it, and the shared page of memory to which it writes its progress."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.connection, theirs = Pipe()
        self.rows: list[int] = []  # rows it is scoring
        self.ready = False  # whether it has imported its function
        read, write = os.pipe()
        self._life = os.fdopen(write, "wb")  # the worker ends when this end of the pipe is closed
        with tempfile.TemporaryFile() as file:
            file.truncate(8 * (VALUES + ROWS_AT_ONCE))
            self.page = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
            given = (theirs.fileno(), file.fileno(), read)
            # Started by path, not forked: this is safe with threads and CUDA.
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *map(str, given)],
                pass_fds=given,
                process_group=0,  # with the processes that the function starts
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        theirs.close()
        os.close(read)
        self.page[STARTED] = time.monotonic()
        self.connection.send(job)

    def start(self, answered: bool) -> None:
        """Mark the worker as ready once it has imported its function.

        Raises:
            WorkerError: if the worker could not import the function, or not in time.
        """
        if not answered and self.time_left(STARTUP_LIMIT) > 0:
            return
        error: Any = f"it was not ready after {STARTUP_LIMIT:.0f} s"
        if answered:
            try:
                error = self.connection.recv()
            except (EOFError, OSError):
                error = f"it ended with code {self.process.wait()}"
        if error is not None:
            raise WorkerError(f"A reward worker could not start: {error}.")
        self.ready = True

    def send(self, rows: list[int], batch: _Batch) -> None:
        self.rows = rows
        self.page[DONE] = 0
        self.page[STARTED] = time.monotonic()
        columns = {name: [values[row] for row in rows] for name, values in batch.columns.items()}
        with contextlib.suppress(BrokenPipeError):  # it has died, which reading from the connection will show
            self.connection.send(([batch.completions[row] for row in rows], columns))

    def answer(self) -> _Logged | None:
        """The logged columns and metrics for the rows it was sent; None if it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def time_left(self, limit: float) -> float:
        """Seconds until its current row is late, or until its start has taken too long."""
        return self.page[STARTED] + (limit if self.ready else STARTUP_LIMIT) - time.monotonic()

    def end(self) -> None:
        self.connection.close()
        if self.process.returncode is None:  # later, its number may be another process's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._life.close()

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the interpreter's exit `contextlib` may be gone
            self.end()
        except Exception:
            pass


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def _patience(workers: list[_Worker], time_limit: float) -> float:
    """Seconds until the first of these may be late, at most an hour, since the system refuses to wait for years."""
    return min(max(0.0, min(worker.time_left(time_limit) for worker in workers)), 3600.0)


def _is_column(values: Any, rows: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str | Mapping) and len(values) == rows


def _cores() -> int:
    """This process's share of the available cores, from 1 to 8."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes))
