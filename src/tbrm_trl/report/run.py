"""What a run's folder holds, read for its report."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..resume.checkpoint import complete_checkpoints, read_mark
from ..run_log import LOG, UPDATES, read_lines
from ..skipped_updates import FOLDER as SKIPPED
from ..sources.saved_rollouts import load_rollouts, rollout_files


@dataclass
class Updates:
    """Trajectories of updates, one entry each: N in all. NaN where there is no value.

    Attributes:
        step: `(N,)` number of the update, from 1.
        id: `(N,)` digest of its tokens.
        prompt: `(N,)` digest of its prompt's tokens.
        origin: `(N,)` one of `loss.metrics.ORIGINS`.
        reward: `(N,)` R.
        residual: `(N,)` β δ.
        soft_value: `(N,)` β V.
        length: `(N,)` tokens of the completion.
        age: `(N,)` updates since it was drawn.
        beta: of the last update; NaN if there is none.
    """

    step: np.ndarray
    id: np.ndarray
    prompt: np.ndarray
    origin: np.ndarray
    reward: np.ndarray
    residual: np.ndarray
    soft_value: np.ndarray
    length: np.ndarray
    age: np.ndarray
    beta: float

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        name: what the page calls it.
        log: one dictionary of metrics for each logged step, in order.
        updates: the trajectories of its updates; none without `save_rollouts`.
        rollouts: those that it saved, if it did.
        settings: its options, if it has a complete checkpoint.
        skipped: the numbers of the updates that were not taken.
    """

    name: str
    log: list[dict[str, Any]]
    updates: Updates
    rollouts: Dataset | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Read a run's output directory. The run may be under way.

    Raises:
        FileNotFoundError: if the folder holds no log of a run.
    """
    checkpoints = complete_checkpoints(folder) if folder.is_dir() else []
    return RunFolder(
        str(folder),
        _log(folder, checkpoints),
        _updates(folder / UPDATES),
        load_rollouts(folder, unrewarded=True) if rollout_files(folder / "rollouts") else None,
        read_mark(checkpoints[-1]).get("settings", {}) if checkpoints else {},
        _skipped(folder / SKIPPED),
    )


def _log(folder: Path, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """The run's own log, or the one that transformers keeps in its last checkpoint, of a run by an older version."""
    if (folder / LOG).is_file():
        return read_lines(folder / LOG)
    states = [one / "trainer_state.json" for one in (folder, *reversed(checkpoints))]
    for state in filter(Path.is_file, states):
        by_step: dict[int, dict[str, Any]] = {}
        for entry in json.loads(state.read_text())["log_history"]:
            by_step.setdefault(entry["step"], {}).update(entry)
        return list(by_step.values())
    raise FileNotFoundError(
        f"{folder} holds no log of a run: neither {LOG} nor a complete checkpoint. Name the `output_dir` of a run."
    )


def _updates(folder: Path) -> Updates:
    lines = [line for file in sorted(folder.glob("process-*.jsonl")) for line in read_lines(file)]
    lines.sort(key=lambda line: line["step"])

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([value for line in lines for value in line[name]], dtype)

    numbers = ("reward", "residual", "soft_value", "length", "age")
    return Updates(
        step=np.repeat([line["step"] for line in lines], [len(line["id"]) for line in lines]).astype(int),
        **{name: column(name, str) for name in ("id", "prompt", "origin")},
        **{name: column(name, float) for name in numbers},
        beta=lines[-1]["beta"] if lines else np.nan,
    )


def _skipped(folder: Path) -> list[int]:
    """Numbers of the updates that were skipped, without those that a resumed run has gone back behind."""
    skipped: set[int] = set()
    for file in folder.glob("process-*.jsonl"):
        of_process: list[int] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # cut by a kill, or under way
                values = json.loads(line)
                if "update" in values:
                    of_process.append(values["update"])
                else:
                    of_process = [one for one in of_process if one <= values["step"]]
        skipped.update(of_process)
    return sorted(skipped)
