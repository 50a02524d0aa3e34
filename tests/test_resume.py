"""A run killed with SIGKILL, at any point and several times, ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import numpy as np
import pytest
from common.launch import launch
from helpers.resume import CASES, OPTIONS, PROMPTS, build
from helpers.resume_processes import differing, printed, train

from tbrm_trl.resume.checkpoint import (
    checkpoint_to_resume,
    complete_checkpoints,
    load_state,
    mark_complete,
    process_folder,
    remove_old_checkpoints,
    save_state,
)

# Points at which the checkpoint of that step is not yet complete, and points at which it is.
WRITING = (
    "nothing written", "model written", "optimizer written", "random state written", "trajectories half-written",
    "state half-written", "own state written", "reference written", "all written", "mark half-written",
)  # fmt: skip
WRITTEN = ("marked", "old one unmarked", "old one half-removed", "old one removed", "ending")

# By case, the kills of one run in order: the point, the updates made by then, and the process.
KILLS: dict[str, list[tuple]] = {
    "fresh": [
        ("generating", 0), ("model written", 3), ("between micro-batches", 4), ("generating", 5),
        ("optimizer written", 6), ("update made", 8), ("marked", 12), ("ending", 14),
    ],
    "replay": [
        ("weights stepped", 4), ("random state written", 6), ("between micro-batches", 7),
        ("trajectories half-written", 9), ("old one unmarked", 12),
    ],
    "prioritized": [
        ("state half-written", 6), ("between micro-batches", 10), ("own state written", 12), ("all written", 14),
    ],
    "logged": [
        ("nothing written", 3), ("between micro-batches", 4), ("mark half-written", 9), ("old one half-removed", 12),
    ],
    "mixed": [("rollouts half-written", 4), ("all written", 6), ("weights stepped", 9), ("generating", 12)],
    "pool": [("random state written", 6), ("between micro-batches", 8), ("marked", 12)],
    "followed": [("between micro-batches", 2), ("state half-written", 6), ("weights stepped", 8), ("marked", 12)],
    "lora": [("model written", 6), ("between micro-batches", 10), ("old one half-removed", 12)],
    "lora, reset": [("reference synced", 4), ("reference written", 6), ("reference synced", 8), ("marked", 12)],
    "reset": [("reference synced", 4), ("random state written", 9), ("reference synced", 12)],
    "moving average": [("reference synced", 4), ("reference written", 9), ("reference synced", 12)],
    "unlogged": [
        ("weights stepped", 4), ("between micro-batches", 9), ("own state written", 12), ("old one removed", 16),
    ],
    "two, prioritized": [
        ("own state written", 6, 0), ("random state written", 9, 1), ("between micro-batches", 10, 1),
        ("all written", 12, 0),
    ],
    "two, pool": [("random state written", 6, 1), ("between micro-batches", 8, 0)],
    "two, followed": [("random state written", 6, 1), ("between micro-batches", 10, 0)],
}  # fmt: skip


@pytest.mark.parametrize("case", KILLS)
def test_a_killed_run_ends_as_an_uninterrupted_one(case, qwen2, uninterrupted, tmp_path):
    """Weights, optimizer, reference, trajectories, random state, logs and files; and always a checkpoint to go on from.

    Each kill leaves the checkpoints that it should, and the one being written is refused. Then the run is started again
    with "auto": from the last complete one, or anew while there is none.
    """
    every = {**OPTIONS, **CASES[case]}["save_steps"]
    out = tmp_path / "out"
    for kill in KILLS[case]:
        point, step = kill[:2]
        codes = train(tmp_path, case, qwen2, kill, resume="auto")
        assert codes[kill[2] if len(kill) > 2 else 0] == -signal.SIGKILL and all(codes), printed(tmp_path)
        assert (tmp_path / "killed").read_text() == f"{point} {step}"
        (tmp_path / "killed").unlink()

        before, at = (step - 1) // every * every, out / f"checkpoint-{step}"
        complete = [folder.name for folder in complete_checkpoints(out)]
        if point in WRITTEN:
            assert complete == [f"checkpoint-{last}" for last in ([before, step] if point == "marked" else [step])]
            assert (out / f"checkpoint-{before}").exists() == (point not in ("old one removed", "ending"))
            continue
        last = before if point in (*WRITING, "reference synced", "update made") else step // every * every
        assert complete == [f"checkpoint-{last}"] * (last > 0)
        if len(kill) > 2:  # the other process has written, or waits before it goes on
            states = [(at / "tbrm" / f"process-{process}" / "state.json").exists() for process in range(2)]
            if point != "between micro-batches":
                assert states == ([1, 0] if point == "random state written" else [1, 1])
        if point in WRITING:
            assert at.exists() == (point != "nothing written")
            fault = (
                "does not exist"
                if point == "nothing written"
                else "is not a complete TBRM checkpoint: it was cut short"
            )
            with pytest.raises(ValueError, match=rf"{at.name} {fault}"):
                checkpoint_to_resume(at, str(out), {})

    assert not any(train(tmp_path, case, qwen2, resume=True)), printed(tmp_path)
    assert differing(tmp_path, uninterrupted(case)) == []
    files = [{file.relative_to(run) for file in run.glob("out/**/*")} for run in (tmp_path, uninterrupted(case))]
    assert files[0] == files[1]
    own = [file for file in out.glob("checkpoint-*/tbrm/**/*") if file.is_file()]
    assert own and {file.suffix for file in own} <= {".json", ".safetensors", ".parquet"}


def test_under_a_launcher(qwen2, uninterrupted, tmp_path):
    """One of two processes dies before it has written its part; the launcher ends the other, and starts both again."""
    job = {"case": "two, mixed", "model": qwen2, "output_dir": str(tmp_path / "out")}
    function = "helpers.resume:run_of_rank"
    with pytest.raises(AssertionError, match=r"Signal 9 \(SIGKILL\)"):
        launch(function, jobs=[job, {**job, "kill": ["random state written", 6]}])
    assert (tmp_path / "killed").read_text() == "random state written 6"
    assert [folder.name for folder in complete_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    launch(function, jobs=[{**job, "resume": True}] * 2)
    assert differing(tmp_path, uninterrupted("two, mixed")) == []


def test_an_interrupted_call_of_train_resumes_in_its_process(qwen2, uninterrupted, tmp_path):
    """As in a notebook. The state of the interrupted update is discarded."""
    assert not any(train(tmp_path, "unlogged", qwen2, interrupt=True)), printed(tmp_path)
    assert differing(tmp_path, uninterrupted("unlogged")) == []


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("two, prioritized", {}, "processes was 2 and is 1"),
        ("prioritized", {"data": PROMPTS[::-1]}, "data set was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"),
        ("prioritized", {"gradient_accumulation_steps": 1}, "trajectories per update was 4 and is 2; updates per"),
        ("prioritized", {"num_iterations": 3}, "num_iterations was 2 and is 3"),
        ("prioritized", {"num_generations": 1}, "num_generations was 2 and is 1"),
        ("prioritized", {"replay_buffer_size": 8}, "replay_buffer_size was 20 and is 8"),
        ("prioritized", {"seed": 7}, "seed of the data order was 42 and is 7"),
        ("prioritized", {"sync_ref_model": True}, "reference was 'initial' and is 'synced'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(source, changes, message, qwen2, uninterrupted, tmp_path):
    [checkpoint] = complete_checkpoints(uninterrupted(source) / "out")
    trainer = build("prioritized", qwen2, tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=rf"{checkpoint.name} belongs to another run: {message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0


def test_a_pool_does_not_go_on_with_another_length(qwen2, uninterrupted, tmp_path):
    """It holds completions begun under the old limit, which may be longer than the new one."""
    checkpoint = complete_checkpoints(uninterrupted("pool") / "out")[0]
    trainer = build("pool", qwen2, tmp_path / "out", max_completion_length=4)
    with pytest.raises(ValueError, match=r"what the pool cuts was \['refuse', None, 16\] and is \['refuse', None, 4\]"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_data_cannot_be_started_anew(qwen2, tmp_path):
    with pytest.raises(ValueError, match="restores no position to go on at"):
        build("fresh", qwen2, tmp_path, ignore_data_skip=True).train(resume_from_checkpoint=True)


def test_no_complete_checkpoint(qwen2, uninterrupted, tmp_path):
    """There is none, or it holds only the model, or it does not exist."""
    out = tmp_path / "out"
    trainer = build("replay", qwen2, out, save_only_model=True, max_steps=3)
    with pytest.raises(ValueError, match=rf"No complete checkpoint in {out}. Start without `resume_from_checkpoint`"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert (out / "checkpoint-3" / "model.safetensors").exists()
    alone = r"checkpoint-3 holds the model alone, as `save_only_model=True` asks: no run can go on from it"
    for name, message in (("checkpoint-3", alone), ("checkpoint-5", "checkpoint-5 does not exist")):
        with pytest.raises(ValueError, match=rf"{message}.* There is no complete one beside it"):
            trainer.train(resume_from_checkpoint=str(out / name))
    with pytest.raises(ValueError, match=rf"No complete checkpoint in {out}. .*{alone}"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="out holds checkpoint-3 of another run"):
        trainer.train(resume_from_checkpoint="auto")
    [complete] = complete_checkpoints(uninterrupted("replay") / "out")
    with pytest.raises(ValueError, match=rf"checkpoint-9 does not exist. The last sound one is {complete}: `resume"):
        trainer.train(resume_from_checkpoint=complete.parent / "checkpoint-9")


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_what_an_interrupted_run_left_behind_displaces_no_new_checkpoint(limit, tmp_path):
    """Checkpoint 6 was never finished and checkpoint 4 is new, after `save_steps` changed: 4 stays, and 3 before 6."""
    for step in (2, 3, 6, 4):
        process_folder(tmp_path / f"checkpoint-{step}", 0).mkdir(parents=True)
        if step != 6:
            mark_complete(tmp_path / f"checkpoint-{step}", {})
    remove_old_checkpoints(tmp_path / "checkpoint-4", limit, None)
    kept = {None: {2, 3, 6, 4}, 1: {4}, 2: {3, 4}}[limit]
    assert {int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.iterdir()} == kept


def test_any_state_can_be_saved(tmp_path):
    """A diverged run has infinite metrics, and users log what they like: neither may stop a run at its checkpoint."""
    state = {"kl": [math.inf, -math.inf, 0.1], "rms": math.nan, "extra": [np.float32(0.5), np.arange(2), Path("x")]}
    save_state(tmp_path, state, {})
    loaded, _, _ = load_state(tmp_path)
    assert repr(loaded) == repr({**state, "extra": [0.5, [0, 1], "x"]})
