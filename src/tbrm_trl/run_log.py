"""The files a run appends to line by line: its metrics, and the trajectories of every update.

A resumed run goes back to its checkpoint and writes the lines of some steps again. The old lines stay in the file:
`read_lines` merges the lines of a step, later values win, and a line of an earlier step drops later steps above it.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .files import plain, writing
from .trajectory import UpdateRow

LOG = "log.jsonl"  # in the output directory
UPDATES = "updates"  # folder in the output directory, with one file per process
SKIPPED = "skipped_updates"  # the same for skipped updates
DIGITS = 6  # significant digits of a number in these files, by default
# The metrics that measure the policy on an evaluation set or a benchmark, with the set's name if it has one.
EVALUATED = re.compile(r"eval_(?:(?P<set>.+)[_/])?(?P<metric>reward|rewards/[^/]+/mean|(?:mean|avg|pass|maj)@\d+)")
Scored = tuple[UpdateRow, float, float]  # a row of an update with β δ and β V


def append_line(file: Path, values: dict[str, Any], digits: int | None = DIGITS) -> None:
    """Append one line of JSON with numbers rounded to `digits` significant digits, or unrounded if None.

    NaN becomes null. The line break is written first, so that a line cut short by a kill does not spoil the next one.

    Raises:
        OSError: if the file cannot be written. The message names it and says what to do.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps(plain(values, digits)))


def go_back(output_dir: Path, process: int, processes: int, step: int | None) -> None:
    """Before training, append a line which discards the lines of an earlier run: those after this step, or all if None.

    Each process does this for its own files. The main process also does it for the log, and for the files of processes
    that this run does not have.
    """
    files = [file for folder in (UPDATES, SKIPPED) for file in (output_dir / folder).glob("process-*.jsonl")]
    numbers = [int(file.stem.removeprefix("process-")) for file in files]
    mine = [f for f, number in zip(files, numbers, strict=True) if (number if number < processes else 0) == process]
    log = output_dir / LOG
    for file in [log, *mine] if process == 0 and log.exists() else mine:
        append_line(file, {"step": -1 if step is None else step})


def whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The dictionary of each line, as written. A line cut short by a kill, or still being written, is left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        yield values


def read_lines(file: Path) -> list[dict[str, Any]]:
    """One dictionary for each `step`, in order, without the steps that resumed runs discarded."""
    by_step: dict[int, dict[str, Any]] = {}
    for values in whole_lines(file):
        while by_step and next(reversed(by_step)) > values["step"]:
            by_step.popitem()
        by_step[values["step"]] = by_step.get(values["step"], {}) | values
    return [values for values in by_step.values() if len(values) > 1]


def append_update(folder: Path, process: int, step: int, beta: float, scored: Iterable[Scored]) -> None:
    """Append one line with the rows of an update on one process. Each column is a list with one entry per trajectory.

    `id` and `prompt` are digests of tokens (`trajectory_ids`), which saved rollouts have too. `age` counts the updates
    since the policy drew the trajectory. It is 0 if the trajectory is of a later step, which a resumed run has yet to
    reach. A row that does not count has null for its residual and its soft value.
    """
    rows, residuals, soft_values = zip(*scored, strict=True)
    counts = [row.left_out is None for row in rows]
    ids, prompts = trajectory_ids([(row.trajectory.prompt_ids, row.trajectory.completion_ids) for row in rows])
    drawn = [row.trajectory.policy_step for row in rows]
    values = {
        "step": step,
        "beta": beta,
        "id": ids,
        "prompt": prompts,
        "origin": [row.origin for row in rows],
        "reward": [row.trajectory.reward for row in rows],
        "residual": [value if counted else None for value, counted in zip(residuals, counts, strict=True)],
        "soft_value": [value if counted else None for value, counted in zip(soft_values, counts, strict=True)],
        "length": [len(row.trajectory.completion_ids) for row in rows],
        "age": [None if at is None else max(step - 1 - at, 0) for at in drawn],
    }
    append_line(folder / UPDATES / f"process-{process}.jsonl", values)


def trajectory_ids(tokens: Sequence[tuple[Any, Any]]) -> tuple[list[str], list[str]]:
    """Digests of trajectories and of their prompts, from the token ids of each prompt and completion."""
    ids, prompts = [], []
    for prompt, completion in tokens:
        digest = xxhash.xxh3_64(np.asarray(prompt, np.int64).tobytes())
        prompts.append(digest.hexdigest())
        digest.update(b"/" + np.asarray(completion, np.int64).tobytes())
        ids.append(digest.hexdigest())
    return ids, prompts


class Stopwatch:
    """Seconds by name. Time inside a nested block counts for the nested name only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._stop()
        self._running.append(name)
        try:
            yield
        finally:
            self._stop()
            self._running.pop()

    def _stop(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def taken(self) -> dict[str, float]:
        """Return the seconds by name since the last call, and start again from 0."""
        seconds, self.seconds = self.seconds, {}
        return seconds
