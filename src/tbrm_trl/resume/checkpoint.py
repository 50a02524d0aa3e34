"""The files a checkpoint needs beyond the Trainer's, so that a resumed run ends where an uninterrupted one would.

Layout, inside `checkpoint-<step>/tbrm/`:

    process-<rank>/state.json              unlogged metrics, the soft value's state, the window's trajectories
    process-<rank>/trajectories.parquet    the trajectories, each once
    process-<rank>/vision.safetensors      their vision inputs, if any
    process-<rank>/arrays.safetensors      the replay buffer, if any
    process-<rank>/soft_value.pt           trained parameters of the soft value and their optimizer, if any
    process-<rank>/reference.safetensors   the reference, if it is synced: a shard each, or all of it on process 0
    complete.json                          written last, after every process has written; no run resumes without it
    model_only.json                        in its place if `save_only_model` left out what a run needs to resume

`complete.json` lists every other file of the checkpoint with its size and digest, and describes the run. It ends with a
digest of itself.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..files import plain, plain_value, sizes_and_digests, write_json
from ..sources.parquet import read_trajectories, write_trajectories
from ..trajectory import Trajectory

AUTO = "auto"  # `resume_from_checkpoint`: the last sound checkpoint, or a fresh start

_FOLDER, _MARKER, _MODEL_ONLY = "tbrm", "complete.json", "model_only.json"
_VERSION = 2  # version 1 holds only what a run must share
# Version 1's name for what it checked of the reference. The key is now among the settings.
_OLD_REFERENCE = "the reference's weights, tokenizer, temperature and precision"
_REFERENCE = "reference key"
# A mark that lacks one of these means the value given here.
_IF_GIVEN = {"soft_value_offset": False, "rollout_pool": 0, "rollouts": "drawn"}


def process_folder(checkpoint: str | Path, process: int) -> Path:
    return Path(checkpoint) / _FOLDER / f"process-{process}"


def save_state(
    folder: Path,
    state: dict[str, Any],
    lists: Mapping[str, Sequence[Trajectory]],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write one process's state: JSON-able values, lists of trajectories, and arrays.

    A trajectory in several lists is written once, and is one object again after `load_state`. So reference scores that
    it gets through one list are there in the others.
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
    saved = _read_state(folder)
    lists = {name: [pool[i] for i in indices] for name, indices in saved["lists"].items()}
    return saved["state"], lists, load_arrays(folder / "arrays.safetensors")


def load_values(folder: Path) -> dict[str, Any]:
    """The JSON-able values that `save_state` wrote, alone."""
    return _read_state(folder)["state"]


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


# ---- the mark --------------------------------------------------------------------------------------------------------


def mark_incomplete(checkpoint: str | Path) -> None:
    """Remove a checkpoint's mark, before any of its files is overwritten or deleted."""
    for name in (_MARKER, _MODEL_ONLY):
        (Path(checkpoint) / _FOLDER / name).unlink(missing_ok=True)


def mark_complete(checkpoint: str | Path, run: Mapping[str, Any], model_only: bool = False) -> None:
    """Write a checkpoint's mark, after every process has written.

    Args:
        checkpoint: its folder.
        run: JSON-able values. `identity` holds what a run must share to resume from here, by a name for errors;
            `settings` holds what is reported if it differs; other entries describe the run.
        model_only: whether it holds only the model, so that no run can resume from it.
    """
    folder = Path(checkpoint)
    said = {"version": _VERSION, **run, "files": digests(folder)}
    (folder / _FOLDER).mkdir(exist_ok=True)
    said["digest"] = _digest_of_mark(said)
    write_json(folder / _FOLDER / (_MODEL_ONLY if model_only else _MARKER), said, durably=True)


def _digest_of_mark(said: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(said, default=plain_value).encode())


def digests(folder: Path) -> dict[str, list[Any]]:
    """Size and digest of every file of a checkpoint except its mark, by name."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.parent != folder / _FOLDER
    )
    return {name: [size, digest] for name, (size, digest) in zip(names, sizes_and_digests(folder, names), strict=True)}


def damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a complete checkpoint, in a sentence without full stop; None if it is sound."""
    try:
        said = read_mark(checkpoint)
    except ValueError as error:
        return str(error)
    if "files" not in said:  # version 1 lists none
        missing = _missing(checkpoint, said)
        return f"file {missing} of {checkpoint.name} is damaged (it is missing)" if missing else None
    files: dict[str, list[Any]] = said["files"]
    for name, (size, _) in files.items():  # first the checks that read no content
        file = checkpoint / name
        if not file.is_file():
            return f"file {name} of {checkpoint.name} is damaged (it is missing)"
        if file.stat().st_size != size:
            return (
                f"file {name} of {checkpoint.name} is damaged (it has {file.stat().st_size} bytes, and {size} were "
                "written)"
            )
    try:
        read = sizes_and_digests(checkpoint, list(files))
        for (name, (_, written)), (_, found) in zip(files.items(), read, strict=True):
            if found != written:
                return f"file {name} of {checkpoint.name} is damaged (it is not what was written: its digest differs)"
    except OSError as error:
        return f"{checkpoint.name} cannot be read ({error})"
    return None


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """Read what `mark_complete` wrote.

    Raises:
        ValueError: if the file is damaged, or was written by a later version of this library.
    """
    file = checkpoint / _FOLDER / _MARKER
    damaged = f"file {_FOLDER}/{_MARKER} of {checkpoint.name} is damaged"
    try:
        said = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{damaged} (it cannot be read: {error})") from error
    if not isinstance(said, dict):
        raise ValueError(f"{damaged} (it holds no object)")
    if isinstance(version := said.get("version"), int) and version > _VERSION:
        raise ValueError(
            f"{checkpoint.name} was written by a later version of tbrm-trl (checkpoints of version {version}, known up "
            f"to {_VERSION}); update tbrm-trl to go on from it"
        )
    if "files" in said or "version" in said or "digest" in said:
        digest = said.pop("digest", None)
        if digest != _digest_of_mark(said) or not isinstance(said.get("files"), dict):
            raise ValueError(f"{damaged} (it is not what was written: its digest differs)")
    elif not (type(processes := said.get("processes")) is int and processes > 0):  # version 1 always has it
        raise ValueError(f"{damaged} (it says neither its digest nor the number of processes)")
    return said


def _missing(checkpoint: Path, said: Mapping[str, Any]) -> str | None:
    """The name of a file that a run needs to resume and that a checkpoint of version 1 lacks; None if it has all."""
    optimizer = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]  # DeepSpeed's is a folder
    processes = said["processes"]
    states = [f"rng_state_{process}.pth" for process in range(processes)] if processes > 1 else ["rng_state.pth"]
    needed = {
        "trainer_state.json": (checkpoint / "trainer_state.json").is_file(),
        "optimizer.pt": bool(optimizer),
        "scheduler.pt": (checkpoint / "scheduler.pt").is_file() or any(checkpoint.glob("global_step*")),
        **{name: (checkpoint / name).is_file() for name in states},
    }
    return next((name for name, found in needed.items() if not found), None)


# ---- the choice of a checkpoint --------------------------------------------------------------------------------------


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders of an output directory that are named like a checkpoint, oldest first."""
    found = {
        step_of(folder): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdigit() and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of an output directory that are marked as complete, oldest first."""
    return list(filter(_is_marked, numbered_checkpoints(output_dir)))


def _from_hub(output_dir: str | Path) -> list[Path]:
    """The checkpoint that `hub_strategy="checkpoint"` pushes, in a clone of its repository."""
    folder = Path(output_dir) / "last-checkpoint"
    return [folder] if _is_marked(folder) else []


def _is_marked(checkpoint: Path) -> bool:
    return (checkpoint / _FOLDER / _MARKER).is_file()


def step_of(checkpoint: str | Path) -> int:
    """The number of updates before a checkpoint, from its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def updates_before(checkpoint: Path) -> int:
    """The number of updates before a marked checkpoint, whatever its folder is called."""
    step = read_mark(checkpoint).get("step")  # version 1 has none
    return step_of(checkpoint) if step is None else step


def _cut_short(checkpoint: Path) -> str:
    return f"{checkpoint.name} is not complete: it was cut short while being written, or has lost its mark"


def _last_sound(checkpoints: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is not damaged, and what is wrong with each later one."""
    wrong: list[str] = []
    for checkpoint in reversed(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, wrong
        wrong.append(problem)
    return None, wrong


def checkpoint_to_resume(
    resume_from: str | Path | bool,
    output_dir: str,
    identity: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    no_effect: Sequence[str] = (),
) -> tuple[str | None, list[str]]:
    """The folder to resume from, or None for a fresh start, and notes for the user.

    Args:
        resume_from: a folder; True for the last sound checkpoint of `output_dir`; `AUTO` for that one, or a fresh start
            if there is none.
        output_dir: the run's.
        identity: what a run must share with the checkpoint, by a name for errors.
        settings: what is reported if it differs.
        no_effect: names of settings that a checkpoint overrides.

    Raises:
        ValueError: if there is none, if the named one is incomplete or damaged, or if it belongs to a run with other
            processes, data set, reference, tokenizer or batch arithmetic. The message names what differs.
    """
    notes: list[str] = []
    if resume_from is True or resume_from == AUTO:
        sound, wrong = _last_sound(complete_checkpoints(output_dir) or _from_hub(output_dir))
        if sound is None:
            if resume_from is True:
                raise ValueError(_no_checkpoint(Path(output_dir), wrong))
            passed = wrong[:1] or [_cut_short(one) for one in numbered_checkpoints(output_dir)[-1:]]
            return None, [f"{_sentence(one)} The run starts anew, since no checkpoint is sound." for one in passed]
        newer = [one for one in numbered_checkpoints(output_dir) if step_of(one) > updates_before(sound)]
        wrong += [_cut_short(one) for one in newer if not _is_marked(one)]
        notes += [f"{_sentence(one)} The last sound one is {sound.name}: the run goes on from it." for one in wrong]
        checkpoint = sound
    else:
        checkpoint = Path(str(resume_from))
        others = [one for one in complete_checkpoints(checkpoint.parent) if one != checkpoint]
        if not _is_marked(checkpoint):
            raise ValueError(f"{_why_incomplete(checkpoint)} {_instead(others)}")
        if problem := damage(checkpoint):
            raise ValueError(f"{_sentence(problem)} {_instead(others)}")

    said = read_mark(checkpoint)
    if "identity" in said:
        shared, before = said["identity"], said.get("settings", {})
        now: Mapping[str, Any] = identity
    else:  # version 1 holds less
        shared, before = said, {}
        now = {**identity, _OLD_REFERENCE: (settings or {}).get(_REFERENCE)}
    shared, now = {**_IF_GIVEN, **plain(shared)}, plain(now)
    differing = [name for name in now if name in shared and shared[name] != now[name]]
    if differing:
        raise ValueError(
            f"{checkpoint} belongs to another run: "
            + "; ".join(f"{name} was {shared.get(name)!r} and is {now[name]!r}" for name in differing)
            + ". Resume with the same settings, or start a new run from its weights."
        )
    changes = [] if settings is None else _changes(checkpoint, before, settings, no_effect)
    return str(checkpoint), notes + changes


def leave_later(checkpoint: str | None, output_dir: str) -> list[str]:
    """Unmark the checkpoints after the one that a user names, since their updates will be redone; return a note."""
    if checkpoint is None or Path(checkpoint).resolve().parent != Path(output_dir).resolve():
        return []
    step = updates_before(Path(checkpoint))
    later = [one for one in complete_checkpoints(output_dir) if step_of(one) > step]
    for one in later:
        mark_incomplete(one)
    if not later:
        return []
    return [
        f"{', '.join(one.name for one in later)} came after {Path(checkpoint).name}, from which the run goes on, and "
        "count no more as checkpoints to resume from. Their weights stay until others take their place."
    ]


def _changes(checkpoint: Path, before: Any, now: Mapping[str, Any], no_effect: Sequence[str]) -> list[str]:
    """A note on the settings that differ from the checkpoint's, if any."""
    old, new = (dict(flattened({n: v for n, v in one.items() if n != _REFERENCE})) for one in map(plain, (before, now)))
    changed = {n: f"{n} was {old[n]!r} and is {new[n]!r}" for n in new if n in old and old[n] != new[n]}
    changed |= {n: f"{n} was {old[n]!r} and is no more" for n in old if n not in new}
    changed |= {n: f"{n} is new: {new[n]!r}" for n in new if before and n not in old}
    applied = [text for name, text in changed.items() if name not in no_effect]
    without = [text for name, text in changed.items() if name in no_effect]
    parts = []
    if applied:
        parts.append(
            f"{'; '.join(applied)}. This applies from here on: the run will not end where it would have ended before"
        )
    if without:
        parts.append(
            f"{'; '.join(without)}. This has no effect: optimizer and schedule are the checkpoint's, with its numbers. "
            "Start a new run from its weights to change them"
        )
    return [f"Since {checkpoint.name} was written, settings have changed. {'. '.join(parts)}."] if parts else []


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their path: `lr_scheduler_kwargs/min_lr`."""
    for name, one in value.items():
        if isinstance(one, dict) and one:
            yield from flattened(one, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", one


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _instead(others: Sequence[Path]) -> str:
    if not others:
        return "There is no complete one beside it."
    sound, _ = _last_sound(others)
    if sound is None:
        return "No other one beside it is sound."
    return f"The last sound one is {sound}: `resume_from_checkpoint=True` takes it."


def _why_incomplete(checkpoint: Path) -> str:
    if (checkpoint / _FOLDER / _MODEL_ONLY).is_file():
        return (
            f"{checkpoint} holds the model alone, as `save_only_model=True` asks: no run can go on from it. Start a "
            "new run with it as `model`, and with `reference_model` to keep the reference."
        )
    if not checkpoint.is_dir():
        return f"{checkpoint} does not exist."
    return (
        f"{checkpoint} is not a complete TBRM checkpoint: it was cut short while being written, or comes from another "
        "trainer."
    )


def _no_checkpoint(output_dir: Path, wrong: Sequence[str]) -> str:
    if wrong:
        return f"No sound checkpoint in {output_dir}: {'; '.join(wrong)}."
    if only := [one for one in numbered_checkpoints(output_dir) if (one / _FOLDER / _MODEL_ONLY).is_file()]:
        return f"No complete checkpoint in {output_dir}. {_why_incomplete(only[-1])}"
    return (
        f'No complete checkpoint in {output_dir}. Start without `resume_from_checkpoint`, or with "auto", which starts '
        "anew where there is none."
    )


def checkpoints_of_others(output_dir: str | Path) -> list[Path]:
    """The checkpoints that a new run would displace: all but those that were cut short while being written.

    This library writes its own part before transformers writes `trainer_state.json`.
    """
    return [
        folder
        for folder in numbered_checkpoints(output_dir)
        if _counts(folder) or ((folder / "trainer_state.json").is_file() and not (folder / _FOLDER).is_dir())
    ]


def _counts(folder: str | Path) -> bool:
    return any((Path(folder) / _FOLDER / name).is_file() for name in (_MARKER, _MODEL_ONLY))


def remove_old_checkpoints(written: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: the one just written, the best one, and the newest others.

    Each loses its mark before its files. Leftovers of an interrupted run may seem newer than `written`.
    """
    if limit is None or limit <= 0:
        return
    kept = {written.resolve(), Path(best or written).resolve()}  # an earlier run may have spelled its folder otherwise
    numbered = set(map(str, numbered_checkpoints(written.parent)))  # a user's own copies have other names
    others = [
        folder
        for folder in sort_checkpoints(str(written.parent), use_mtime=True)
        if folder in numbered and Path(folder).resolve() not in kept
    ]
    others.sort(key=_counts)  # unmarked ones go first
    for folder in others[: max(len(others) - max(limit - len(kept), 0), 0)]:
        mark_incomplete(folder)
        shutil.rmtree(folder, ignore_errors=True)
