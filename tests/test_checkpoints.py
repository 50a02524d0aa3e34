"""Checkpoints: damage is found, signals end a run cleanly, a folder has one run, and a full disk loses none."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common.launch import PROCESSES, ROOT, import_once
from datasets import Dataset, load_from_disk
from helpers.resume import LOGGED, build
from helpers.resume_processes import differing, printed, train
from helpers.runs import config
from transformers import GenerationConfig

from tbrm_trl import TBRMConfig, load_rollouts, processes
from tbrm_trl.files import require_writable, write_json
from tbrm_trl.resume import exact_resume
from tbrm_trl.resume.checkpoint import checkpoint_to_resume, complete_checkpoints, damage, read_mark
from tbrm_trl.resume.exact_resume import ExactResume
from tbrm_trl.resume.finite import not_finite
from tbrm_trl.resume.folder_lock import NAME, FolderLock
from tbrm_trl.resume.stop import StopRequest
from tbrm_trl.sources import saved_rollouts
from tbrm_trl.trajectory import End, Source, Trajectory


def removed(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def three(qwen2, tmp_path_factory) -> Path:
    """A run's output directory with checkpoints 6, 12 and 14, the last at its end."""
    out = tmp_path_factory.mktemp("three") / "out"
    build("replay", qwen2, out, save_steps=6, save_total_limit=None).train()
    return out


@pytest.fixture
def out(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "out"))


def again(qwen2: str, out: Path, **changes):
    return build("replay", qwen2, out, **dict(save_steps=6, save_total_limit=None) | changes)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_fault_of_every_file_is_found(out):
    """This includes faults of the mark itself. Nothing else counts as damage."""
    checkpoint = out / "checkpoint-14"
    whole = {file: file.read_bytes() for file in files_of(checkpoint)}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} <= {file.name for file in whole}
    found = 0
    for file, content in whole.items():
        name = file.relative_to(checkpoint).as_posix()
        assert damage(checkpoint) is None
        for fault in (removed, truncated, flipped):
            fault(file)
            if fault is removed and file.name == "complete.json":
                assert checkpoint not in complete_checkpoints(out)
            else:
                assert damage(checkpoint).startswith(f"file {name} of checkpoint-14 is damaged (")
            file.write_bytes(content)
            found += 1
    assert damage(checkpoint) is None and found == 3 * len(whole)
    (checkpoint / "notes of mine.txt").write_text("no part of it")
    assert damage(checkpoint) is None


@pytest.mark.parametrize(("fault", "how"), [(removed, "it is missing"), (truncated, r"it has \d+ bytes, and \d+ were"),
                                            (flipped, "its digest differs")])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_last_sound_one_taken(fault, how, qwen2, out, three):
    for step in (12, 14):
        fault(out / f"checkpoint-{step}/optimizer.pt")
    trainer = again(qwen2, out)
    message = rf"ile optimizer.pt of checkpoint-{{}} is damaged \(.*{how}.*The last sound one is .*checkpoint-6"
    with pytest.raises(ValueError, match=message.format(12)):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-12"))
    with pytest.warns(UserWarning) as said:
        trainer.train(resume_from_checkpoint=True)
    texts = "\n".join(str(one.message) for one in said)
    assert all(f"File optimizer.pt of checkpoint-{step} is damaged" in texts for step in (12, 14))
    assert "The last sound one is checkpoint-6: the run goes on from it." in texts
    ends = [torch.load(one / "checkpoint-14/optimizer.pt") for one in (out, three)]
    assert [(out / "checkpoint-14" / name).read_bytes() == (three / "checkpoint-14" / name).read_bytes()
            for name in ("model.safetensors", "rng_state.pth")] == [True, True]  # fmt: skip
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(e["state"].values() for e in ends), strict=True)
    )
    assert damage(out / "checkpoint-12") is None  # written anew


@pytest.mark.parametrize("given", [True, "auto", "last-checkpoint", "kept-2024"])
def test_a_checkpoint_of_another_name_in_the_folder(given, qwen2, out):
    """The Hub's copy of the last checkpoint, or one that a user has renamed: its mark says its step."""
    searched = given in (True, "auto")
    other = out / ("last-checkpoint" if searched else given)
    shutil.copytree(out / "checkpoint-6", other)
    if searched:
        for step in (6, 12, 14):
            shutil.rmtree(out / f"checkpoint-{step}")
    trainer = again(qwen2, out, max_steps=8)
    trainer.train(resume_from_checkpoint=given if searched else str(other))
    assert trainer.state.global_step == 8
    assert out / "checkpoint-14" not in complete_checkpoints(out)
    with pytest.raises(ValueError, match="checkpoint-3 does not exist"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-3"))


@pytest.mark.parametrize("resumed", [True, False])
def test_an_evaluation_at_the_start_comes_once(resumed, qwen2, out, monkeypatch):
    """Of a resumed run, state of the reference and of the soft value is read after it would come."""
    if not resumed:
        shutil.rmtree(out)
    trainer, evaluated = again(qwen2, out, max_steps=16, eval_on_start=True), []
    monkeypatch.setattr(trainer, "_evaluate", lambda *args, **kwargs: evaluated.append(trainer.state.global_step))
    trainer.train(resume_from_checkpoint=resumed)
    assert evaluated == ([] if resumed else [0]) and trainer.args.eval_on_start


def test_no_sound_checkpoint(qwen2, out):
    """True refuses and says why; "auto" starts anew and says so."""
    for step in (6, 12, 14):
        truncated(out / f"checkpoint-{step}/scheduler.pt")
    trainer = again(qwen2, out, max_steps=2)
    with pytest.raises(ValueError, match=r"No sound checkpoint in .*scheduler.pt of checkpoint-14 is damaged"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.warns(
        UserWarning, match=r"checkpoint-14 is damaged .* The run starts anew, since no checkpoint is sound"
    ):
        trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 2


def test_a_checkpoint_that_was_cut_short_is_said_to_be_passed_over(out):
    (out / "checkpoint-14/tbrm/complete.json").unlink()
    found, [said] = checkpoint_to_resume("auto", str(out), {})
    assert found == str(out / "checkpoint-12") and said.startswith("Checkpoint-14 is not complete: it was cut short")
    for step in (6, 12):
        (out / f"checkpoint-{step}/tbrm/complete.json").unlink()
    found, [said] = checkpoint_to_resume("auto", str(out), {})
    assert found is None and said.endswith("The run starts anew, since no checkpoint is sound.")


def test_a_mark_of_a_later_version_is_refused(out):
    mark = out / "checkpoint-14/tbrm/complete.json"
    write_json(mark, json.loads(mark.read_text()) | {"version": 3})
    with pytest.raises(ValueError, match="written by a later version of tbrm-trl"):
        checkpoint_to_resume(str(out / "checkpoint-14"), str(out), {})


def test_the_mark_says_what_the_run_is(out):
    said = read_mark(out / "checkpoint-14")
    assert said["step"] == 14 and said["identity"]["processes"] == 1
    settings = said["settings"]
    assert (settings["beta"], settings["temperature"], settings["loss_units"]) == (0.1, 1.0, "reward")
    assert settings["max_completion_length"] == 6 and set(settings["reward functions"]) == {"letters", "digits"}
    assert set(settings["versions"]) == {"tbrm-trl", "trl", "transformers", "accelerate", "torch"}
    assert len(settings["reference key"]) == 32


# ---- another run -----------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(qwen2, out, tmp_path):
    other = Path(shutil.copytree(qwen2, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if len(word) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="belongs to another run: the tokenizer was"):
        again(str(other), out).train(resume_from_checkpoint=True)


def test_other_end_tokens_are_said(qwen2, out, tmp_path):
    """`optimal` samples the reference anew with them, since they are among the settings of rollouts."""
    other = Path(shutil.copytree(qwen2, tmp_path / "other"))
    (end,) = again(qwen2, out).rollout_settings["end tokens"]
    GenerationConfig(eos_token_id=[end, 5]).save_pretrained(other)
    trainer = again(str(other), out)
    assert trainer.rollout_settings["end tokens"] == sorted([end, 5])
    with pytest.warns(UserWarning, match=rf"end tokens was \[{end}\] and is \[{min(end, 5)}, {max(end, 5)}\]"):
        trainer.train(resume_from_checkpoint=True)


def test_another_adapter_on_the_same_weights_is_refused(qwen2, tmp_path):
    """PEFT would load the weights and scale them by the new numbers."""
    build("lora", qwen2, tmp_path / "out", max_steps=2, save_steps=2).train()
    with pytest.raises(ValueError, match="belongs to another run: the adapter's lora_alpha was 8 and is 16"):
        build("lora", qwen2, tmp_path / "out", lora=dict(lora_alpha=16)).train(resume_from_checkpoint=True)


def test_a_full_model_and_an_adapter_are_two_runs(qwen2, tmp_path):
    for kind, other, was in (("unlogged", "lora", "None and is 'LORA'"), ("lora", "unlogged", "'LORA' and is None")):
        build(kind, qwen2, tmp_path / kind / "out", max_steps=1, save_steps=1).train()
        with pytest.raises(ValueError, match=f"belongs to another run: .*the adapter was {was}; the reference's"):
            build(other, qwen2, tmp_path / kind / "out").train(resume_from_checkpoint=True)


def test_an_optimizer_with_other_state_is_refused(qwen2, tmp_path):
    """transformers would end with a KeyError. A fused variant has the same state."""
    run: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, save_steps=1)
    build("fresh", qwen2, tmp_path / "out", max_steps=1, optim="adamw_torch", **run).train()
    for option, was in (
        ({"optim": "sgd"}, "optim was 'adamw_torch' and is 'sgd'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type was 'a function of the update' and is 're"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: {was}"):
            build("fresh", qwen2, tmp_path / "out", **run, **option).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="optim was 'adamw_torch' and is 'adamw_torch_fused'"):
        fused = build("fresh", qwen2, tmp_path / "out", max_steps=2, optim="adamw_torch_fused", **run)
        fused.train(resume_from_checkpoint=True)


def test_other_settings_are_said_once(qwen2, out):
    """New β, temperature, units, lengths and rewards apply. New numbers of the optimizer do not."""

    def letters(completions, **kwargs):
        return [0.5] * len(completions)

    trainer = again(
        qwen2, out, beta=0.2, temperature=0.9, loss_units="logits", max_completion_length=5, learning_rate=0.5,
        weight_decay=0.3,
    )  # fmt: skip
    trainer.reward_funcs[0] = letters
    trainer.processing_class.chat_template = "{{ messages }}"
    with pytest.warns(UserWarning) as said:
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-12"))
    [text] = [str(one.message) for one in said if "settings have changed" in str(one.message)]
    applies, without = text.split("This applies from here on")
    for part in ("beta was 0.1 and is 0.2", "temperature was 1.0 and is 0.9", "loss_units was 'reward' and is 'logits'",
                 "max_completion_length was 6 and is 5", "reward functions/letters was", "template was"):  # fmt: skip
        assert part in applies
    assert "learning_rate was 0.01 and is 0.5; weight_decay was 0.0 and is 0.3. This has no effect" in without
    assert "digits" not in text and "versions" not in text


def test_what_is_said_to_have_no_effect_has_none(qwen2, out, three):
    """Learning rate, weight decay and Adam's numbers come from the checkpoint, so the end has the same bits."""
    changed = dict(learning_rate=0.5, weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.1)
    with pytest.warns(UserWarning, match="This has no effect"):
        again(qwen2, out, **changed).train(resume_from_checkpoint=str(out / "checkpoint-6"))
    weights = [(one / "checkpoint-14/model.safetensors").read_bytes() for one in (out, three)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("given", ["argument", "configuration"])
def test_the_same_settings_say_nothing(given, qwen2, out, recwarn):
    """Resumed from the checkpoint of its last update, a run ends at once, with the same buffer and draws as before."""
    if given == "argument":
        trainer = again(qwen2, out)
        trainer.train(resume_from_checkpoint="True")
    else:
        trainer = again(qwen2, out, resume_from_checkpoint="auto")
        trainer.train()
    assert not [one for one in recwarn if "settings have changed" in str(one.message)]
    assert trainer.state.global_step == 14 and len(trainer._replay) == 12
    assert torch.equal(
        torch.get_rng_state(), torch.load(out / "checkpoint-14/rng_state.pth", weights_only=False)["cpu"]
    )


# ---- a folder belongs to one run -------------------------------------------------------------------------------------


def test_a_new_run_does_not_take_a_folder_with_checkpoints(qwen2, out):
    before = {file: file.read_bytes() for file in files_of(out)}
    for resume in (None, False, "false"):
        with pytest.raises(ValueError, match=r"out holds checkpoint-6, checkpoint-12, checkpoint-14 of another run"):
            again(qwen2, out).train(resume_from_checkpoint=resume)
    (out / "checkpoint-12").rename(out.parent / "checkpoint-12")
    with pytest.raises(ValueError, match="of another run"):  # nor with a checkpoint from elsewhere
        again(qwen2, out).train(resume_from_checkpoint=str(out.parent / "checkpoint-12"))
    assert all(file.read_bytes() == content for file, content in before.items() if file.exists())


def test_a_folder_has_several_paths(qwen2, out, tmp_path):
    """A checkpoint given by another path of the output directory still belongs to the run."""
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "link" / "out", out / ".." / "out"):
        trainer = again(qwen2, path)
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-12"))
        assert trainer.state.global_step == 14


def test_auto_is_not_advised_where_it_finds_nothing_to_go_on_from(qwen2, tmp_path):
    options = dict(max_steps=1, save_steps=1, save_only_model=True, save_rollouts=False)
    build("fresh", qwen2, tmp_path / "out", **options).train()
    with pytest.raises(
        ValueError, match=r"holds checkpoint-1 of another run.* No run can go on from there: it holds a"
    ):
        build("fresh", qwen2, tmp_path / "out", **options).train(resume_from_checkpoint="auto")


def test_a_checkpoint_of_another_trainer_is_kept(qwen2, tmp_path):
    foreign = tmp_path / "out/checkpoint-2"
    foreign.mkdir(parents=True)
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
        build("fresh", qwen2, tmp_path / "out").train()
    assert foreign.exists()


def hold(folder: str, started: str, fork: bool = False) -> None:
    FolderLock(folder).acquire()
    if fork and os.fork() == 0:
        time.sleep(60)  # the child of a killed process lives on
        os._exit(0)
    Path(started).touch()
    time.sleep(60)


@pytest.mark.parametrize("fork", [False, True])
def test_a_second_run_in_a_folder_is_told_who_holds_it(fork, qwen2, tmp_path):
    """The lock ends with the process that holds it, even if a forked child lives on."""
    folder, started = tmp_path / "out", tmp_path / "started"
    import_once("helpers.resume")
    holder = PROCESSES.Process(target=hold, args=(str(folder), str(started), fork))
    holder.start()
    while not started.exists():
        time.sleep(0.05)
    trainer = build("fresh", qwen2, folder, max_steps=1)
    with pytest.raises(
        RuntimeError, match=rf"belongs to a run that is under way: process {holder.pid} on .*, since 20"
    ):
        trainer.train()
    holder.kill()
    holder.join()
    assert (folder / NAME).exists()
    trainer.train()
    assert trainer.state.global_step == 1 and not (folder / NAME).exists()


def test_a_lock_is_released_by_a_run_that_fails(qwen2, tmp_path):
    def broken(completions, **kwargs):
        raise ZeroDivisionError

    trainer = build("fresh", qwen2, tmp_path / "out", max_steps=1)
    functions, trainer.reward_funcs = trainer.reward_funcs, [broken, broken]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.reward_funcs = functions
    trainer.train(resume_from_checkpoint="auto")


def answers(monkeypatch, writes: bool, *others: tuple) -> Any:
    """A trainer beside processes with given answers: whether they write, what they found, and their error."""
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, *(error for *_, error in others)])
    monkeypatch.setattr(exact_resume, "gather_object", lambda mine: [*mine, *(found for *found, _ in others)])
    trainer = object.__new__(ExactResume)
    trainer.args = SimpleNamespace(should_save=writes)
    return trainer


def test_what_writers_find_holds_for_all(monkeypatch):
    """One process looks at the folder for all that share its disk, and an error of one is raised in each."""
    asked: list[int] = []
    for writes, others, expected in (
        (False, [(True, "there", None)], "there"),
        (True, [(False, None, None), (True, "here", None)], "here"),
    ):
        assert answers(monkeypatch, writes, *others)._on_writers(lambda: asked.append(1) or "here") == expected
    assert asked == [1]
    with pytest.raises(OSError, match="theirs"):
        answers(monkeypatch, False, (True, None, OSError("theirs")))._on_writers(lambda: "here")
    with pytest.raises(ZeroDivisionError):  # its own, though another one has failed too
        answers(monkeypatch, True, (True, None, OSError("theirs")))._on_writers(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match=r"found different things in output_dir: \['here', 'there'\]"):
        answers(monkeypatch, True, (True, "there", None))._on_writers(lambda: "here")


# ---- signals ---------------------------------------------------------------------------------------------------------

# Case, point, updates made by then, and the process that hears the signal.
STOPS = [
    ("fresh", "generating", 4, 0, signal.SIGTERM),
    ("fresh", "between micro-batches", 9, 0, signal.SIGINT),
    ("replay", "weights stepped", 7, 0, signal.SIGTERM),  # the last update of an epoch
    ("logged", "optimizer written", 3, 0, signal.SIGTERM),
    ("lora", "between micro-batches", 5, 0, signal.SIGTERM),
    ("two, prioritized", "between micro-batches", 4, 1, signal.SIGTERM),
]


@pytest.mark.parametrize(("case", "point", "step", "process", "signum"), STOPS)
def test_a_run_stops_on_a_signal_with_a_checkpoint(case, point, step, process, signum, qwen2, uninterrupted, tmp_path):
    """All processes stop after the same update, with the documented code; resumed, it ends as an uninterrupted run."""
    kill = (point, step, process)
    codes = train(tmp_path, case, qwen2, kill, resume="auto", signum=signum, enable_jit_checkpoint=True)
    assert set(codes) == {128 + signum}, printed(tmp_path)
    last = step if point == "optimizer written" else step + 1
    assert [damage(one) for one in complete_checkpoints(tmp_path / "out")] == [None]
    assert complete_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{last}"
    assert f"Stopped after update {last}" in printed(tmp_path)
    assert not (tmp_path / "out" / NAME).exists()
    assert not any(train(tmp_path, case, qwen2, resume="auto")), printed(tmp_path)
    assert differing(tmp_path, uninterrupted(case)) == []


def test_an_update_that_takes_too_long_is_dropped(qwen2, tmp_path):
    """The run ends within the limit, with the same code, and with the checkpoint that it had."""
    kill = ("between micro-batches", 7)
    begun = time.monotonic()
    codes = train(
        tmp_path, "fresh", qwen2, kill, signum=signal.SIGTERM, enable_jit_checkpoint=True, stop_timeout=0.5,
        then_sleep=100,
    )  # fmt: skip
    assert codes == [143] and time.monotonic() - begun < 90
    assert [one.name for one in complete_checkpoints(tmp_path / "out")] == ["checkpoint-6"]
    assert "The update did not end within 0.5 s of SIGTERM and is dropped" in printed(tmp_path)


def test_a_second_interrupt_is_impatience():
    """The first is a request; the second is an ordinary Ctrl-C. After the block the earlier handlers are back."""
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    request = StopRequest(timeout=60)
    with pytest.raises(KeyboardInterrupt), request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher may repeat itself
        assert request.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


def test_signals_are_heard_in_the_main_thread_alone():
    with (
        ThreadPoolExecutor() as pool,
        pytest.raises(RuntimeError, match="needs `train` to be called in the main thread"),
    ):
        pool.submit(StopRequest(60).listening().__enter__).result()


def test_without_the_option_a_signal_ends_the_process(qwen2, tmp_path):
    assert train(tmp_path, "fresh", qwen2, ("generating", 4), signum=signal.SIGTERM) == [-signal.SIGTERM]
    assert [one.name for one in complete_checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def test_a_time_limit_needs_signals():
    with pytest.raises(ValueError, match="has no effect without `enable_jit_checkpoint=True`"):
        config(stop_timeout=3)
    with pytest.raises(ValueError, match="must be a positive number of seconds"):
        config(stop_timeout=0, enable_jit_checkpoint=True)


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system, or the same folder again, and unmounts them at the end."""
    mounts: list[Path] = []

    def mount(*arguments: str) -> Path:
        place = tmp_path / f"mount-{len(mounts)}"
        place.mkdir()
        if subprocess.run(["mount", *arguments, str(place)], capture_output=True).returncode:
            pytest.skip("mounting needs root")
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_last_sound_checkpoint(qwen2, mounted):
    """It fills up after checkpoint 3. The error says where, and what to do. The run goes on when there is room."""
    disk = mounted("-t", "tmpfs", "-o", "size=12m", "tmpfs")
    out, ballast = disk / "out", disk / "ballast"

    trainer = build("replay", qwen2, out)
    original = trainer.save_model

    def fill(*args, **kwargs):
        if trainer.state.global_step == 6:
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 18)))
        original(*args, **kwargs)

    trainer.save_model = fill
    with pytest.raises(
        OSError, match=r"Cannot write to .*checkpoint-6.*: No space left on device\. 0 MB are free there"
    ):
        trainer.train()
    assert [one.name for one in complete_checkpoints(out)] == ["checkpoint-3"] and damage(out / "checkpoint-3") is None
    with pytest.raises(OSError, match=r"Cannot write to `output_dir`, .*out: No space left"):
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free + ballast.stat().st_size))
        build("replay", qwen2, out)
    ballast.unlink()
    build("replay", qwen2, out, max_steps=7).train(resume_from_checkpoint="auto")
    assert [one.name for one in complete_checkpoints(out)] == ["checkpoint-7"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(mounted, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    place = mounted("--bind", "-o", "ro", str(source))
    if not subprocess.run(["touch", str(place / "x")], capture_output=True).returncode:
        pytest.skip("a bind mount is not read-only here")
    with pytest.raises(
        OSError, match=r"Cannot write to `output_dir`, .*: Read-only file system\. Make the folder writable"
    ):
        build("fresh", "no/such/model", place / "out")


def test_a_cache_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(mounted, tmp_path):
    """Logged rows are tokenized into the folder of the data set's files."""
    source = tmp_path / "source"
    Dataset.from_list(LOGGED).save_to_disk(source)
    rows = load_from_disk(mounted("--bind", "-o", "ro", str(source)))
    with pytest.raises(
        OSError, match=r"Cannot write to the training set's cache .*HF_DATASETS_CACHE.*Read-only file sys"
    ):
        build("logged", "no/such/model", tmp_path / "out", data=rows)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write to `output_dir`, .*Not a directory"):
        require_writable(tmp_path / "file/out", "`output_dir`")


# ---- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "hf_not_for_any_file"


@dataclass(repr=False)
class WithSecrets(TBRMConfig):
    my_api_key: str | None = None
    database_password: str | None = None
    client_secret: str | None = None


def test_secrets_are_known_by_their_names():
    """They are hidden in a configuration's text, in trackers and in pickles, but not in copies in memory."""
    secrets = dict(hub_token=SECRET, my_api_key=SECRET, database_password=SECRET, client_secret=SECRET)
    given = WithSecrets(
        "unused", use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"token": SECRET, "revision": "main"},
        **secrets,
    )  # fmt: skip
    for text in (
        repr(given),
        str(given),
        given.to_json_string(),
        str(given.to_sanitized_dict()),
        str(given.settings()),
    ):
        assert SECRET not in text
    assert "<MY_API_KEY>" in repr(given) and "'revision': 'main'" in repr(given) and "num_generations=1" in repr(given)
    pickled = pickle.dumps(given)
    assert SECRET.encode() not in pickled
    read = pickle.loads(pickled)
    assert read.hub_token is None and read.beta == given.beta and read.model_init_kwargs["revision"] == "main"
    for one in (copy.copy(given), copy.deepcopy(given)):
        assert type(one) is WithSecrets and all(getattr(one, name) == SECRET for name in secrets)


def test_a_run_writes_its_token_nowhere(qwen2, tmp_path, capfd):
    build("fresh", qwen2, tmp_path / "out", hub_token=SECRET, max_steps=3).train()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 10 and (tmp_path / "out/checkpoint-3/training_args.bin") in files
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_named():
    """Numbers are finite even if their sum overflows. Whole numbers and empty tensors are skipped."""
    fine = torch.full((10,), torch.finfo(torch.float32).max)
    bad = {"nan": torch.tensor([0.0, torch.nan]), "inf": torch.tensor([[torch.inf]]), "low": torch.tensor([-torch.inf])}
    others = {
        "fine": fine,
        "whole": torch.arange(3),
        "empty": torch.empty(0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "quarter": torch.ones(2).to(torch.float8_e4m3fn),
    }
    assert not_finite({**others, **bad}.items()) == list(bad)


@pytest.mark.parametrize("where", ["weight", "optimizer state", "reference weight"])
def test_a_checkpoint_with_what_is_not_finite_is_not_written(where, qwen2, tmp_path):
    out = tmp_path / "out"
    trainer = build("replay", qwen2, out)
    write = trainer._save_checkpoint

    def spoiled(*args):
        if trainer.state.global_step == 6:
            tensor = {
                "weight": lambda: next(trainer.model.parameters()),
                "optimizer state": lambda: next(iter(trainer.optimizer.state.values()))["exp_avg"],
                "reference weight": lambda: next(trainer.ref_model.parameters()),
            }[where]()
            tensor.data.view(-1)[0] = torch.nan
        write(*args)

    trainer._save_checkpoint = spoiled
    with pytest.raises(
        RuntimeError, match=rf"checkpoint-6 is not written: 1 tensors hold NaN .*\({where} .*checkpoint-3"
    ):
        trainer.train()
    assert [one.name for one in complete_checkpoints(out)] == ["checkpoint-3"] and not (out / "checkpoint-6").exists()


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_rollouts_are_few_files_with_the_same_rows(processes, monkeypatch, tmp_path):
    """They are written by window, merged by threes and sometimes rewound, and have the rows of one file per window."""
    monkeypatch.setattr(saved_rollouts, "MERGED", 3)

    def write(folder: Path, step: int, merged: bool) -> None:
        if merged:
            saved_rollouts.merge_rollouts(folder, step)
        for process in range(processes):
            made = [
                Trajectory(
                    prompt_ids=torch.tensor([2, step]), completion_ids=torch.tensor([process, row]),
                    loss_mask=torch.ones(2, dtype=torch.bool), reward=float(step), end=End.EOS, source=Source.ROLLOUT,
                    rewards={f"r{step % 2}": 1.0}, group_id=row, policy_step=step,
                )
                for row in range(1 + step % 3)
            ]  # fmt: skip
            # A column of one type in one window and of another in the next, as JSON then.
            rows = [{"answer": step if step % 5 else {"deep": step}} for _ in made]
            file = saved_rollouts.rollouts_file(folder, step, process)
            saved_rollouts.save_rollouts(file, made, rows, ["p"] * len(made), ["c"] * len(made))

    plain, merged = tmp_path / "plain", tmp_path / "merged"
    begin = 0
    for end, back in ((20, 17), (40, 12), (60, 59), (65, 27), (82, 0), (82, None)):
        for step in range(begin, end):
            write(plain, step, merged=False)
            write(merged, step, merged=True)
        assert load_rollouts(merged).to_list() == load_rollouts(plain).to_list()
        if back is not None:
            saved_rollouts.rewind_rollouts(merged, back)
            for file in plain.glob("step-*"):
                if int(file.name.split("-")[1]) >= back:
                    file.unlink()
            begin = back
            if back:
                assert load_rollouts(merged).to_list() == load_rollouts(plain).to_list()
            else:
                assert not list(merged.iterdir())
    assert len(list(plain.iterdir())) == 82 * processes
    # 82 windows: one file of 81, and one window as it was written.
    assert sorted(file.name for file in merged.iterdir())[-1] == f"step-00000081-process-{processes - 1}.parquet"
    assert len(list(merged.iterdir())) <= 3 * processes + 2 * 3

    # A kill after the merged file is written and before its parts are removed leaves both.
    files = saved_rollouts.rollout_files(merged)
    rows = load_rollouts(merged).to_list()
    shutil.copy(plain / "step-00000004-process-0.parquet", merged)
    assert saved_rollouts.rollout_files(merged) == files and load_rollouts(merged).to_list() == rows
    saved_rollouts.rewind_rollouts(merged, 82)
    assert sorted(merged.iterdir()) == files


def test_rollouts_of_a_branch_that_was_left_go_also_if_no_more_are_saved(qwen2, tmp_path):
    folder = tmp_path / "out"
    options = dict(save_steps=1, save_total_limit=None)
    build("fresh", qwen2, folder, max_steps=6, save_rollouts=True, **options).train()
    before = saved_rollouts.rollout_files(folder / "rollouts")
    resumed = build("fresh", qwen2, folder, max_steps=6, save_rollouts=False, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert saved_rollouts.rollout_files(folder / "rollouts") == before[:1] != before


def write_window(folder: Path, step: int, answer: Any) -> None:
    one = Trajectory(
        prompt_ids=torch.tensor([2, step]), completion_ids=torch.tensor([5, 1]), loss_mask=torch.tensor([True, True]),
        reward=float(step), end=End.EOS, source=Source.ROLLOUT, policy_step=step,
    )  # fmt: skip
    saved_rollouts.save_rollouts(
        saved_rollouts.rollouts_file(folder, step, 0), [one], [{"answer": answer}], ["p"], ["c"]
    )


@pytest.mark.parametrize("merged", [False, True])
def test_rollouts_of_a_stream_without_types(merged, monkeypatch, tmp_path):
    """A stream may give a number in one window, and text or a list in the next. Merging them raises no error."""
    monkeypatch.setattr(saved_rollouts, "MERGED", 4 if merged else 32)
    answers = [4, "x", [1, 2], None, 2.5]
    for step, answer in enumerate(answers):
        saved_rollouts.merge_rollouts(tmp_path, step)
        write_window(tmp_path, step, answer)
    assert len(list(tmp_path.iterdir())) == (2 if merged else 5)
    assert load_rollouts(tmp_path)["answer"][:] == answers


def test_rollouts_are_read_while_a_run_merges_them(monkeypatch, tmp_path):
    monkeypatch.setattr(saved_rollouts, "MERGED", 2)
    for step in range(2):
        write_window(tmp_path, step, step)
    read = saved_rollouts.read_rollouts

    def merged_meanwhile(file):
        saved_rollouts.merge_rollouts(tmp_path, 2)
        return read(file)

    monkeypatch.setattr(saved_rollouts, "read_rollouts", merged_meanwhile)
    assert load_rollouts(tmp_path)["answer"][:] == [0, 1] and len(list(tmp_path.iterdir())) == 1


def test_rollouts_of_a_resumed_run_are_those_of_one_run(qwen2, tmp_path, monkeypatch):
    """Windows of four updates are merged by twos. The run is resumed from within a file of four windows."""
    monkeypatch.setattr(saved_rollouts, "MERGED", 2)
    options = dict(save_steps=10, save_total_limit=None, max_steps=30)
    build("replay", qwen2, tmp_path / "whole", **options).train()
    for resume in (None, str(tmp_path / "out/checkpoint-10")):
        build("replay", qwen2, tmp_path / "out", **options).train(resume_from_checkpoint=resume)
    names, rows = [], []
    for one in ("whole", "out"):
        names.append(sorted(file.name for file in (tmp_path / one / "rollouts").iterdir()))
        rows.append(load_rollouts(tmp_path / one).to_list())
    assert names[0] == names[1] == [
        "step-00000000-to-00000012.parquet", "step-00000016-to-00000020.parquet", "step-00000024-process-0.parquet",
        "step-00000028-process-0.parquet",
    ]  # fmt: skip
    assert repr(rows[0]) == repr(rows[1]) and len(rows[0]) == 8 * 8  # NaN is equal to itself in writing


# ---- command lines ---------------------------------------------------------------------------------------------------


def test_the_documented_words_resume(train_script, qwen2, tmp_path, monkeypatch):
    """The example takes each `--resume_from_checkpoint` value as the documents write it."""
    pages = [ROOT / "docs/launching.md", ROOT / "docs/long-runs.md", *(ROOT / "examples").rglob("*.sh")]
    words = {
        line.split("--resume_from_checkpoint ", 1)[1].split("`")[0].split()[0]
        for page in pages
        for line in page.read_text().splitlines()
        if "--resume_from_checkpoint " in line
    }
    assert words >= {"auto", "true"}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]))
    line = [
        "--model_name_or_path", qwen2, "--dataset_name", str(rows), "--per_device_train_batch_size", "2",
        "--max_completion_length", "4", "--max_steps", "2", "--use_cpu", "true", "--bf16", "false",
        "--report_to", "none", "--save_strategy", "steps", "--save_steps", "1",
    ]  # fmt: skip
    for word in sorted(words):
        out = tmp_path / f"out-{word}"
        first = "auto" if word == "auto" else "false"
        for resume in (first, word):  # the same line again, as a queue gives it
            train_script.run(*train_script.parse([*line, "--output_dir", str(out), "--resume_from_checkpoint", resume]))
        assert [one.name for one in complete_checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
