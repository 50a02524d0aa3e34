"""Training processes that take turns, one update at a time, so that their costs can be compared in pairs.

A process reads a line from stdin before each update and answers with one line of JSON. `Turns` is the callback that
does this in the process, and `Process` is the other end.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from transformers import TrainerCallback

Counter = Callable[[], AbstractContextManager[Any]]


class Turns(TrainerCallback):
    """Waits for its turn before an update, and reports the update's cost afterwards.

    Args:
        counter: gives a context that counts what is dispatched inside it, for updates that are requested with `count`.
        counted: returns the counts of that context as plain values, when it is over.
    """

    def __init__(self, counter: Counter = nullcontext, counted: Callable[[Any], Any] = lambda context: None):
        self.counter, self.counted = counter, counted
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the trainer prints stays out of the answers

    def on_step_begin(self, args, state, control, **kwargs):
        counts = sys.stdin.readline().strip() == "count"
        self.context = self.counter() if counts else nullcontext()
        self.inside = self.context.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.began
        self.context.__exit__(None, None, None)
        counts = None if isinstance(self.context, nullcontext) else self.counted(self.inside)
        print(json.dumps({"seconds": seconds, "counts": counts}), file=self.answers, flush=True)


class Process:
    """A training process on the given cores. Its program trains with `Turns`."""

    def __init__(self, command: Sequence[str], cores: set[int], searched: str | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "TRL_EXPERIMENTAL_SILENCE": "1"}
        if searched is not None:
            environment["PYTHONPATH"] = searched
        pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))]
        self.command = list(command)
        self.process = subprocess.Popen(
            [*pinned, sys.executable, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def update(self, line: str = "go") -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"The process {' '.join(self.command)} has ended.")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def take_turns(
    processes: Mapping[str, Process], warm_up: int, updates: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each update by process, in random order within a turn, and one update's counts. Ends the processes."""
    rng, seconds = random.Random(0), {name: list[float]() for name in processes}
    try:
        for process in processes.values():
            for _ in range(warm_up):
                process.update()
        counts = {name: process.update("count")["counts"] for name, process in processes.items()}
        for number in range(updates):
            for name in rng.sample(list(processes), len(processes)):
                seconds[name].append(processes[name].update()["seconds"])
            last = ", ".join(f"{name} {took[-1]:.3g} s" for name, took in seconds.items())
            print(f"{number + 1} of {updates}: {last}", file=sys.stderr)
        return seconds, counts
    finally:
        for process in processes.values():
            process.end()


def interval(mine: Sequence[float], theirs: Sequence[float], totals: bool = False) -> tuple[float, float, float]:
    """Median ratio of the pairs, or with `totals` the ratio of the sums, and its 95% interval over resampled pairs."""
    ours, others = np.array(mine), np.array(theirs)
    places = np.random.default_rng(0).integers(len(ours), size=(10_000, len(ours)))

    def ratio(a: np.ndarray, b: np.ndarray) -> Any:
        return a.sum(axis=-1) / b.sum(axis=-1) if totals else np.median(a / b, axis=-1)

    low, high = np.quantile(ratio(ours[places], others[places]), [0.025, 0.975])
    return float(ratio(ours, others)), float(low), float(high)
