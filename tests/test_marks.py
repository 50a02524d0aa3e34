"""Checkpoints before anything is loaded, on hand-made folders: marks, which to resume, messages, removals."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tbrm_trl.resume.checkpoint import (
    checkpoint_to_resume,
    checkpoints_of_others,
    complete_checkpoints,
    damage,
    digests,
    load_state,
    mark_complete,
    mark_incomplete,
    numbered_checkpoints,
    process_folder,
    read_mark,
    remove_old_checkpoints,
    save_state,
)
from tbrm_trl.trajectory import End, Trajectory

IDENTITY = {"processes": 1, "the data": "abc"}
SETTINGS = {"beta": 0.1, "learning_rate": 1e-3, "versions": {"torch": "2"}, "reference key": "r"}


def write(out: Path, step: int, marked: bool = True, model_only: bool = False, **settings) -> Path:
    """Write a checkpoint of two files and one process's state."""
    folder = out / f"checkpoint-{step}"
    process_folder(folder, 0).mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"moments of %d" % step)
    (folder / "trainer_state.json").write_text("{}")
    (process_folder(folder, 0) / "state.json").write_text("{}")
    if marked:
        run = {"identity": IDENTITY, "settings": SETTINGS | settings, "step": step}
        mark_complete(folder, run, model_only=model_only)
    return folder


def resume(given, out: Path, identity=IDENTITY, **settings) -> tuple[str | None, list[str]]:
    return checkpoint_to_resume(given, str(out), identity, SETTINGS | settings, no_effect=("learning_rate",))


def names(folders) -> list[str]:
    return [Path(folder).name for folder in folders]


def test_the_newest_sound_one_is_taken_in_the_order_of_steps(tmp_path):
    written = [write(tmp_path, step) for step in (2, 10, 9)]
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert names(numbered_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert numbered_checkpoints(tmp_path) == complete_checkpoints(tmp_path)
    for given in (True, "auto", written[1]):
        assert resume(given, tmp_path) == (str(written[1]), [])
    assert resume(written[2], tmp_path) == (str(written[2]), [])


def test_what_is_passed_over_is_said(tmp_path):
    write(tmp_path, 1, marked=False)  # older than the checkpoint taken, so not mentioned
    second, _, sixth, _ = (
        write(tmp_path, 2),
        write(tmp_path, 4, marked=False),
        write(tmp_path, 6),
        write(tmp_path, 8, False),
    )
    (sixth / "optimizer.pt").write_bytes(b"moments of 7")
    ends = " The last sound one is checkpoint-2: the run goes on from it."
    cut = " is not complete: it was cut short while being written, or has lost its mark."
    said = [
        "File optimizer.pt of checkpoint-6 is damaged (it is not what was written: its digest differs)." + ends,
        "Checkpoint-4" + cut + ends,
        "Checkpoint-8" + cut + ends,
    ]
    for given in (True, "auto"):
        assert resume(given, tmp_path) == (str(second), said)
    taken = f"The last sound one is {second}: `resume_from_checkpoint=True` takes it."
    with pytest.raises(ValueError, match=r"^File optimizer.pt of checkpoint-6 is damaged .* differs\)\. ") as error:
        resume(sixth, tmp_path)
    assert str(error.value).endswith(taken)
    with pytest.raises(ValueError, match="checkpoint-4 is not a complete TBRM checkpoint") as error:
        resume(tmp_path / "checkpoint-4", tmp_path)
    assert str(error.value).endswith(taken)


def test_what_a_mark_does_not_name_had_its_default(tmp_path):
    """A run without a pool does not go on with one, or the other way round."""
    write(tmp_path, 2)
    assert resume(True, tmp_path, IDENTITY | {"rollout_pool": 0, "rollouts": "drawn"})[1] == []
    for name, value, was in (("rollout_pool", 6, "0"), ("rollouts", "followed", "'drawn'")):
        with pytest.raises(ValueError, match=f"belongs to another run: {name} was {was} and is {value!r}"):
            resume(True, tmp_path, IDENTITY | {name: value})


def test_where_none_is_sound(tmp_path):
    anew = "The run starts anew, since no checkpoint is sound."
    assert resume("auto", tmp_path) == (None, [])
    with pytest.raises(ValueError, match=r"No complete checkpoint in .* Start without"):
        resume(True, tmp_path)
    only = write(tmp_path, 2, model_only=True)
    with pytest.raises(ValueError, match=r"No complete checkpoint in .*checkpoint-2 holds the model alone"):
        resume(True, tmp_path)
    with pytest.raises(ValueError, match=r"holds the model alone.*There is no complete one beside it"):
        resume(only, tmp_path)
    last = write(tmp_path, 3, marked=False)
    write(tmp_path, 1, marked=False)
    said = f"Checkpoint-3 is not complete: it was cut short while being written, or has lost its mark. {anew}"
    assert resume("auto", tmp_path) == (None, [said])
    for step in (4, 5):
        (write(tmp_path, step) / "optimizer.pt").unlink()
    (said,) = resume("auto", tmp_path)[1]
    assert said == f"File optimizer.pt of checkpoint-5 is damaged (it is missing). {anew}"
    with pytest.raises(
        ValueError, match=r"No sound checkpoint in .*of checkpoint-5.*; file optimizer.pt of checkpoint-4"
    ):
        resume(True, tmp_path)
    with pytest.raises(ValueError, match="No other one beside it is sound"):
        resume(last, tmp_path)
    (write(tmp_path / "alone", 1) / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"is missing\)\. There is no complete one beside it"):
        resume(tmp_path / "alone/checkpoint-1", tmp_path)


def test_another_run_and_other_settings(tmp_path):
    folder = write(tmp_path, 2, gone=3)
    with pytest.raises(
        ValueError, match="belongs to another run: processes was 1 and is 2; the data was 'abc' and is 'x'"
    ):
        resume(True, tmp_path, {"processes": 2, "the data": "x", "new": 1})
    start = "Since checkpoint-2 was written, settings have changed. "
    effect = (
        "This has no effect: optimizer and schedule are the checkpoint's, with its numbers. Start a new run from its "
        "weights to change them."
    )
    changed = dict(beta=np.float64(0.2), versions={"torch": "3", "trl": "1"}, learning_rate=1.0)
    changed |= {"reference key": "other"}  # another identity has its own error
    _, [said] = checkpoint_to_resume(True, str(tmp_path), IDENTITY, SETTINGS | changed, no_effect=("learning_rate",))
    assert said == (
        start
        + "beta was 0.1 and is 0.2; versions/torch was '2' and is '3'; gone was 3 and is no more; versions/trl is "
        "new: '1'. This applies from here on: the run will not end where it would have ended before. "
        "learning_rate was 0.001 and is 1.0. " + effect
    )
    _, [said] = resume(folder, tmp_path, gone=3, learning_rate=1.0)
    assert said == start + "learning_rate was 0.001 and is 1.0. " + effect
    assert checkpoint_to_resume(folder, str(tmp_path), IDENTITY) == (str(folder), [])  # without settings


def test_a_run_is_described_by_arrays_too(tmp_path):
    """Arrays are written as lists, and compared as lists."""
    (tmp_path / "checkpoint-1").mkdir()
    identity = {"sizes": np.arange(3)}
    mark_complete(tmp_path / "checkpoint-1", {"identity": identity, "settings": {"scale": np.ones(2)}})
    assert damage(tmp_path / "checkpoint-1") is None
    found = checkpoint_to_resume(True, str(tmp_path), identity, {"scale": np.ones(2)})
    assert found == (str(tmp_path / "checkpoint-1"), [])
    with pytest.raises(ValueError, match=r"sizes was \[0, 1, 2\] and is \[0, 1\]"):
        checkpoint_to_resume(True, str(tmp_path), {"sizes": np.arange(2)})


def test_the_mark_lists_every_other_file(tmp_path):
    folder = write(tmp_path, 2)
    (folder / "tbrm/complete.json").unlink()
    written = {"optimizer.pt": 12, "tbrm/process-0/state.json": 2, "trainer_state.json": 2}
    assert {name: size for name, (size, _) in digests(folder).items()} == written
    mark_complete(folder, {"step": 2})
    said = read_mark(folder)
    assert said == {"version": 2, "step": 2, "files": digests(folder)} and damage(folder) is None
    (folder / "optimizer.pt").write_bytes(b"moment")
    assert damage(folder) == "file optimizer.pt of checkpoint-2 is damaged (it has 6 bytes, and 12 were written)"
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").mkdir()
    assert damage(folder) == "file optimizer.pt of checkpoint-2 is damaged (it is missing)"
    mark_incomplete(folder)
    mark_incomplete(folder)  # there is none
    shutil.rmtree(folder / "tbrm")
    mark_complete(folder, {"step": 2})  # where no process had anything to add
    assert read_mark(folder)["step"] == 2
    mark_incomplete(folder)
    assert complete_checkpoints(tmp_path) == []


def test_large_files_are_read_whole(tmp_path):
    """A change in the second of two pieces that are read one after the other."""
    folder = write(tmp_path, 2, marked=False)
    (folder / "optimizer.pt").write_bytes(bytes(3 << 19))
    mark_complete(folder, {"step": 2})
    assert digests(folder)["optimizer.pt"][0] == 3 << 19
    (folder / "optimizer.pt").write_bytes(bytes((3 << 19) - 1) + b"x")
    assert "its digest differs" in damage(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mark_of_the_first_version(processes, tmp_path):
    folder = write(tmp_path, 2, marked=False)
    needed = ["optimizer.pt", "scheduler.pt", "trainer_state.json"]
    needed += ["rng_state.pth"] if processes == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    for name in needed:
        (folder / name).write_text("{}")
    (folder / "tbrm/complete.json").write_text(json.dumps({"processes": processes, "the data": "abc"}))
    assert damage(folder) is None
    for name in needed:
        (folder / name).rename(folder / "away")
        assert damage(folder) == f"file {name} of checkpoint-2 is damaged (it is missing)"
        (folder / "away").rename(folder / name)
    (folder / "optimizer.pt").unlink()
    (folder / "scheduler.pt").unlink()
    (folder / "global_step2").mkdir()  # DeepSpeed keeps both there
    assert damage(folder) is None
    assert resume(folder, tmp_path, {"processes": processes})[0] == str(folder)
    key = "the reference's weights, tokenizer, temperature and precision"
    (folder / "tbrm/complete.json").write_text(json.dumps({"processes": processes, key: "s"}))
    with pytest.raises(ValueError, match=f"belongs to another run: {key} was 's' and is 'r'"):
        resume(folder, tmp_path, {"processes": processes})


@pytest.mark.parametrize(
    "mark",
    [
        "{}",
        '{"processes": 0}',
        '{"processes": "2"}',
        '{"processes": true}',
        "[]",
        "[" * 9**5,
        '{"processes": 1, "files": {}}',
    ],
)
def test_a_mark_that_says_nothing_is_damaged(mark, tmp_path):
    (write(tmp_path, 2) / "tbrm/complete.json").write_text(mark)
    assert damage(tmp_path / "checkpoint-2").startswith("file tbrm/complete.json of checkpoint-2 is damaged (it ")


def test_checkpoints_that_a_new_run_would_displace(tmp_path):
    """These are all complete ones: those with a mark, and whole ones of another trainer."""
    write(tmp_path, 1), write(tmp_path, 2, model_only=True)
    write(tmp_path, 3, marked=False)
    for step, name in ((4, "trainer_state.json"), (5, "optimizer.pt")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).touch()
    assert names(checkpoints_of_others(tmp_path)) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(("limit", "best", "left"), [
    (None, None, [1, 2, 3, 4, 9]), (0, None, [1, 2, 3, 4, 9]), (-1, None, [1, 2, 3, 4, 9]), (1, None, [4]),
    (2, None, [3, 4]), (2, 1, [1, 4]), (3, 1, [1, 3, 4]), (1, 1, [1, 4]), (9, None, [1, 2, 3, 4, 9]), (2, 4, [3, 4]),
])  # fmt: skip
def test_so_many_are_kept(limit, best, left, tmp_path):
    """4 was just written. 9 is left from an interrupted run, and was written before 3."""
    for age, step in enumerate((1, 2, 9, 3, 4)):
        folder = write(tmp_path, step)
        os.utime(folder, (age, age))
    (tmp_path / "checkpoint-2-kept").mkdir()  # a user's copy
    remove_old_checkpoints(tmp_path / "checkpoint-4", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert (tmp_path / "checkpoint-2-kept").exists()
    assert names(numbered_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in left]


def test_the_best_is_kept_however_its_folder_is_spelled(tmp_path, monkeypatch):
    """A run that began with `output_dir="out"` may go on with the whole path."""
    for age, step in enumerate((1, 2, 3)):
        folder = write(tmp_path, step)
        os.utime(folder, (age, age))
    monkeypatch.chdir(tmp_path)
    remove_old_checkpoints(tmp_path / "checkpoint-3", 2, "checkpoint-1")
    assert names(numbered_checkpoints(tmp_path)) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_loses_its_mark_before_its_files(tmp_path, monkeypatch):
    """An interrupted removal leaves no checkpoint that seems complete."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    for step in (1, 2):
        write(tmp_path, step)
    remove_old_checkpoints(tmp_path / "checkpoint-2", 1, None)
    assert names(complete_checkpoints(tmp_path)) == ["checkpoint-2"]


def test_a_trajectory_in_two_lists_is_one_again(tmp_path):
    def one(reward: float, **vision: torch.Tensor) -> Trajectory:
        return Trajectory(torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([True]), reward, End.EOS, vision=vision)

    first, second = one(0.5), one(1.5, pixels=torch.arange(6.0).view(2, 3).T, grid=torch.tensor([[1, 2, 3]]))
    state = {"loss": float("inf"), "number": np.int64(3), "tensor": torch.tensor([1.5])}
    lists = {"window": [first, second], "queue": [second, first, second], "none": []}
    save_state(tmp_path / "new/process-0", state, lists, {"buffer": np.arange(3)})
    loaded, found, arrays = load_state(tmp_path / "new/process-0")
    assert loaded == {"loss": float("inf"), "number": 3, "tensor": [1.5]}
    assert [[t.reward for t in found[name]] for name in lists] == [[0.5, 1.5], [1.5, 0.5, 1.5], []]
    assert found["queue"][0] is found["window"][1] is found["queue"][2] and found["queue"][1] is found["window"][0]
    assert found["window"][0].vision == {} and set(found["window"][1].vision) == {"pixels", "grid"}
    assert torch.equal(found["window"][1].vision["pixels"], second.vision["pixels"])
    assert arrays["buffer"].tolist() == [0, 1, 2]
    save_state(tmp_path, {}, {})
    assert load_state(tmp_path) == ({}, {}, {})
