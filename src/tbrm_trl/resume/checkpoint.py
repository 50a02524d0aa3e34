"""What a checkpoint needs beyond the Trainer's own files, so that a resumed run ends where an uninterrupted one would.

Layout, inside `checkpoint-<step>/tbrm/`:

    process-<rank>/state.json              unlogged metrics, the soft value's state, the window's trajectories
    process-<rank>/trajectories.parquet    the trajectories, each once
    process-<rank>/vision.safetensors      their vision inputs, if any
    process-<rank>/arrays.safetensors      the replay buffer, if any
    process-<rank>/soft_value.pt           trained parameters of the soft value and their optimizer, if any
    process-<rank>/reference.safetensors   the reference, where it is synced: a shard each, or on process 0 the whole
    complete.json                          written last, once every process has written: without it nothing resumes
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..files import write_json
from ..sources.parquet import read_trajectories, write_trajectories
from ..trajectory import Trajectory

_FOLDER, _MARKER = "tbrm", "complete.json"


def process_folder(checkpoint: str | Path, process: int) -> Path:
    return Path(checkpoint) / _FOLDER / f"process-{process}"


def save_state(
    folder: Path,
    state: dict[str, Any],
    lists: Mapping[str, Sequence[Trajectory]],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write one process's state: JSON-able values, lists of trajectories, and arrays.

    A trajectory that stands in several lists is written once, and is one object again after `load_state`: what is
    learned about it in one place (reference scores) holds in the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = list({id(one): one for trajectories in lists.values() for one in trajectories}.values())
    place = {id(one): index for index, one in enumerate(pool)}
    write_trajectories(folder / "trajectories.parquet", pool)
    vision = {f"{index}/{name}": value for index, one in enumerate(pool) for name, value in one.vision.items()}
    save_file({name: value.contiguous() for name, value in vision.items()}, folder / "vision.safetensors")
    save_arrays(dict(arrays or {}), folder / "arrays.safetensors")
    indices = {name: [place[id(one)] for one in trajectories] for name, trajectories in lists.items()}
    write_json(folder / "state.json", {"state": state, "lists": indices})


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, list[Trajectory]], dict[str, np.ndarray]]:
    """The inverse of `save_state`."""
    pool = read_trajectories(folder / "trajectories.parquet")
    for key, value in load_file(folder / "vision.safetensors").items():
        index, name = key.split("/", 1)
        pool[int(index)].vision[name] = value
    saved = json.loads((folder / "state.json").read_text())
    lists = {name: [pool[i] for i in indices] for name, indices in saved["lists"].items()}
    return saved["state"], lists, load_arrays(folder / "arrays.safetensors")


def mark_incomplete(checkpoint: str | Path) -> None:
    """Before anything is written over a checkpoint that was complete."""
    (Path(checkpoint) / _FOLDER / _MARKER).unlink(missing_ok=True)


def mark_complete(checkpoint: str | Path, identity: dict[str, Any]) -> None:
    """After every process has written. `identity` is what a run must share to resume from here."""
    write_json(Path(checkpoint) / _FOLDER / _MARKER, identity)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of an output directory that may be resumed, oldest first."""
    found = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdigit() and (folder / _FOLDER / _MARKER).is_file()
    }
    return [found[step] for step in sorted(found)]


def checkpoint_to_resume(resume_from: str | Path | Literal[True], output_dir: str, identity: dict[str, Any]) -> str:
    """The folder to resume from: the one named, or with True the last complete one.

    Raises:
        ValueError: if there is none, if it is not complete, or if it belongs to a run whose processes, data set or
            batch arithmetic differ; says what differs.
    """
    complete = complete_checkpoints(output_dir if resume_from is True else Path(resume_from).parent)
    last = f"The last complete one is {complete[-1]}." if complete else "There is no complete one beside it."
    if resume_from is True:
        if not complete:
            raise ValueError(f"No complete checkpoint in {output_dir}. Start without `resume_from_checkpoint`.")
        resume_from = complete[-1]
    marker = Path(resume_from) / _FOLDER / _MARKER
    if not marker.is_file():
        raise ValueError(
            f"{resume_from} is not a complete TBRM checkpoint: it was cut short while being written, saved with "
            f"`save_only_model`, or comes from another trainer. {last}"
        )
    saved = json.loads(marker.read_text())
    # A checkpoint of an earlier version says less of its run.
    differing = [name for name in identity if name in saved and saved[name] != identity[name]]
    if differing:
        raise ValueError(
            f"{resume_from} belongs to another run: "
            + "; ".join(f"{name} was {saved.get(name)!r} and is {identity[name]!r}" for name in differing)
            + ". Resume with the same settings, or start a new run from its weights."
        )
    return str(resume_from)


def remove_old_checkpoints(written: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: the one just written, the best one, and the newest others.

    Each loses its mark before it loses its files. What an interrupted run left behind may seem newer than `written`.
    """
    if limit is None or limit <= 0:
        return
    kept = {str(written), str(Path(best or written))}
    others = [folder for folder in sort_checkpoints(str(written.parent), use_mtime=True) if folder not in kept]
    for folder in others[: max(len(others) - max(limit - len(kept), 0), 0)]:
        mark_incomplete(folder)
        shutil.rmtree(folder, ignore_errors=True)
