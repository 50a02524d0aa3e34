"""Read a run's folder for its report."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..files import first_line
from ..resume.checkpoint import complete_checkpoints, read_mark
from ..run_log import LOG, SKIPPED, UPDATES, read_lines, whole_lines
from ..sources.saved_rollouts import read_files, read_rollouts


@dataclass
class Updates:
    """The N trajectories of a run's updates, one entry for each use. A missing value is NaN.

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
        beta: `(N,)` β of the update. A run may be resumed with another β.
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
    beta: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class Rollouts:
    """The M rollouts that a run saved, in the order of its files. They may exceed memory, so rows are read on demand.

    Attributes:
        folder: holds the files.
        reward: `(M,)` R; NaN where there is none.
        policy_step: `(M,)` updates the policy had made when it drew the rollout; NaN where unknown.
    """

    folder: Path
    reward: np.ndarray
    policy_step: np.ndarray

    def __len__(self) -> int:
        return len(self.reward)

    def rows(self, places: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read columns of the rows at these places, in the order of `places`. A file may lack columns.

        A row that a resumed run has dropped in the meantime is left out.
        """
        found = dict(read_files(self.folder, lambda files: list(_rows_at(np.unique(places), files, list(columns)))))
        return [found[place] for place in places.tolist() if place in found]


@dataclass
class RunFolder:
    """The content of a run's folder.

    Attributes:
        name: the folder's path.
        log: one dictionary of metrics for each logged step, in order.
        updates: the trajectories of its updates; none without `save_rollouts`.
        rollouts: its saved rollouts; None if it saved none.
        settings: its options, if it has a complete checkpoint.
        skipped: the numbers of the skipped updates.
    """

    name: str
    log: list[dict[str, Any]]
    updates: Updates
    rollouts: Rollouts | None = None
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
        _rollouts(folder / "rollouts"),
        _settings(checkpoints),
        _skipped(folder / SKIPPED),
    )


def _settings(checkpoints: list[Path]) -> dict[str, Any]:
    """The run's settings, from its newest checkpoint that can be read."""
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(ValueError):
            return read_mark(checkpoint).get("settings", {})
    return {}


def _log(folder: Path, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """The run's own log; for a run by an older version, the log that transformers keeps in its last checkpoint."""
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
    rows = [len(line["id"]) for line in lines]
    return Updates(
        step=np.repeat([line["step"] for line in lines], rows).astype(int),
        **{name: column(name, str) for name in ("id", "prompt", "origin")},
        **{name: column(name, float) for name in numbers},
        beta=np.repeat([line["beta"] for line in lines], rows).astype(float),
    )


def _rollouts(folder: Path) -> Rollouts | None:
    names = ["reward", "policy_step"]  # completions are chosen by these; only these columns are read for all rows
    tables = read_files(folder, lambda files: [read_rollouts(file, names) for file in files])
    if not tables:
        return None
    numbers = [[table[name].cast(pa.float64()).to_numpy() for table in tables] for name in names]
    return Rollouts(folder, *map(np.concatenate, numbers))


def _rows_at(places: np.ndarray, files: Sequence[Path], columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows at these places over all files, with their places.

    One row group, a window on one process, is read at a time.

    Args:
        places: `(C,)` in ascending order.
        files: files of saved rollouts.
        columns: columns to read; a file may lack some.

    Raises:
        ValueError: if a file is damaged.
    """
    first = 0  # place of a row group's first row
    for file in files:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                for group in range(opened.num_row_groups):
                    end = first + opened.metadata.row_group(group).num_rows
                    here = places[(places >= first) & (places < end)]
                    if len(here):
                        table = opened.read_row_group(group, columns).take(here - first).replace_schema_metadata(None)
                        yield from zip(here.tolist(), Dataset(table), strict=True)
                    first = end
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}). Remove it, or restore it.") from error


def _skipped(folder: Path) -> list[int]:
    """Numbers of the skipped updates, without those after the step to which a resumed run went back."""
    skipped: set[int] = set()
    for file in folder.glob("process-*.jsonl"):
        of_process: list[int] = []
        for values in whole_lines(file):
            if "update" in values:
                of_process.append(values["update"])
            else:
                of_process = [one for one in of_process if one <= values["step"]]
        skipped.update(of_process)
    return sorted(skipped)
