"""`ExactResume` on a minimal trainer that fits a line: what it adds to `transformers.Trainer`."""

from __future__ import annotations

import json
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from tbrm_trl.resume.checkpoint import complete_checkpoints, damage, read_mark
from tbrm_trl.resume.exact_resume import ExactResume, _as_said
from tbrm_trl.resume.folder_lock import NAME

ROWS = [{"x": torch.tensor([i / 8, 1.0]), "y": torch.tensor(i / 4)} for i in range(8)]  # 4 updates are an epoch


@dataclass
class Arguments(TrainingArguments):
    stop_timeout: float = 60.0


class Line(nn.Module):
    """A line with noise, so that training depends on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.weight + torch.randn(len(x)) - y).square().mean()}


class Fit(ExactResume):
    """A trainer with a state of its own, the number of rows it has seen."""

    def run_identity(self) -> dict[str, Any]:
        return {"the data": len(self.train_dataset)}

    def run_settings(self) -> dict[str, Any]:
        return {"learning_rate": self.args.learning_rate, "warm-up": self.args.warmup_steps}

    def forget(self) -> None:
        self.seen, self.began = 0, False
        self.losses: list[float] = []

    def before_training(self) -> None:
        self.began = True
        assert (Path(self.args.output_dir) / NAME).exists()

    def training_step(self, model, inputs, *args, **kwargs):
        assert self.began
        self.seen += len(inputs["y"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def run_state(self, folder):
        (folder / "beside.txt").write_text(str(self.seen))
        return {"trainer": {}, "own": {"seen": self.seen}}, {}, {}

    def restore_run_state(self, state, folder, main_folder):
        self.seen = state[0]["own"]["seen"]
        assert (folder / "beside.txt").read_text() == (main_folder / "beside.txt").read_text() == str(self.seen)


class Act(TrainerCallback):
    """Does something at the end of one update."""

    def __init__(self, update: int, action) -> None:
        self.update, self.action = update, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            self.action()


def fit(out: Path, *callbacks: TrainerCallback, rows=ROWS, **options: Any) -> Fit:
    options = dict(
        max_steps=10, per_device_train_batch_size=2, learning_rate=0.1, save_steps=3, logging_steps=4, use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=False, save_total_limit=None,
    ) | options  # fmt: skip
    stops = options.pop("enable_jit_checkpoint", False)  # else transformers' own callback would catch signals too
    sets = dict(train_dataset=rows, eval_dataset=options.pop("eval_dataset", None))
    trainer = Fit(Line(), Arguments(str(out), **options), callbacks=list(callbacks), **sets)
    trainer.args.enable_jit_checkpoint = stops
    return trainer


def weight_of(out: Path, step: int) -> list[float]:
    return load_file(out / f"checkpoint-{step}/model.safetensors")["weight"].tolist()


def steps(out: Path) -> list[int]:
    return [int(one.name.rpartition("-")[2]) for one in complete_checkpoints(out)]


def losses(trainer: Fit) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in trainer.state.log_history if "loss" in one]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Fit:
    """An undisturbed run."""
    trainer = fit(tmp_path_factory.mktemp("whole") / "out")
    trainer.train()
    return trainer


def same(out: Path, trainer: Fit, whole: Fit) -> bool:
    """Whether weights (to the bit), logs and the trainer's own state are equal."""
    return (
        weight_of(out, 10) == weight_of(Path(whole.args.output_dir), 10)
        and losses(trainer) == losses(whole)
        and trainer.seen == whole.seen == 20
    )


def test_what_is_logged(whole):
    """The mean loss of the updates since the last log, and the norm of the last gradient."""
    logged = [one for one in whole.state.log_history if "loss" in one]
    assert [one["step"] for one in logged] == [4, 8]
    assert [one["loss"] for one in logged] == pytest.approx(
        [sum(whole.losses[i : i + 4]) / 4 for i in (0, 4)], abs=1e-4
    )
    assert all(0 < one["grad_norm"] != one["loss"] for one in logged)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stopped", "resume"), [(4, True), (5, "auto"), (7, "True"), (9, "checkpoint-6"), (10, "AUTO")]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(stopped, resume, whole, tmp_path):
    """Runs resume from logged updates and from others, in the first epoch, at its end and after it."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Act(stopped, interrupt)).train()
    if resume == "checkpoint-6":
        resume = str(tmp_path / resume)
    trainer = fit(tmp_path)
    trainer.train(resume, None)  # no trial of a hyperparameter search
    assert same(tmp_path, trainer, whole)
    assert not (tmp_path / NAME).exists()


class EndPass(TrainerCallback):
    """Ends a pass over the data after the second update."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2


def test_a_pass_that_a_callback_ends_is_followed_by_the_next_one(tmp_path):
    """The next pass has its own order, also in a run that is resumed in it: 2 + 4 + 4 of the 12 updates are made."""
    whole = fit(tmp_path / "whole", EndPass(), max_steps=12)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", EndPass(), Act(4, interrupt), max_steps=12).train()
    resumed = fit(tmp_path / "out", EndPass(), max_steps=12)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 10
    assert resumed.losses == whole.losses[3:]


@pytest.mark.parametrize("before", [2, 4, 5])
def test_a_run_with_more_updates_goes_on_in_the_pass(before, tmp_path):
    """The first run ended within its first pass, at its end, or within the second."""
    fit(tmp_path, max_steps=before, save_steps=before, lr_scheduler_type="constant").train()
    longer = fit(tmp_path, lr_scheduler_type="constant")
    longer.train(resume_from_checkpoint=True)
    unbroken = fit(tmp_path / "unbroken", lr_scheduler_type="constant")
    unbroken.train()
    assert longer.losses == unbroken.losses[before:] and len(longer.losses) == 10 - before


def test_a_checkpoint_of_an_earlier_version_names_no_pass(tmp_path):
    """Its pass follows from the updates. The checkpoint that the resumed run writes in the same pass names it."""
    fit(tmp_path, max_steps=6).train()
    marker = tmp_path / "checkpoint-6/tbrm/complete.json"
    written = json.loads(marker.read_text())
    assert written.pop("pass") == [1, 4, False]
    marker.write_text(json.dumps(written))
    fit(tmp_path, max_steps=7, save_steps=1).train(resume_from_checkpoint=True)
    assert read_mark(tmp_path / "checkpoint-7")["pass"] == [1, 4, False]


def test_from_its_last_update_a_run_ends_at_once(whole, tmp_path):
    """It has the random state of its end, whatever was drawn before."""
    fit(tmp_path).train()
    expected = torch.randn(3)
    again = fit(tmp_path, Act(10, interrupt), Act(11, interrupt))
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10 and again.seen == 20 and torch.equal(torch.randn(3), expected)
    assert same(tmp_path, again, whole)


def test_the_summary_is_of_the_updates_after_the_checkpoint(tmp_path):
    """The next log, however, includes earlier updates that were not logged yet."""
    fit(tmp_path, max_steps=3).train()
    resumed = fit(tmp_path)
    summary = resumed.train(resume_from_checkpoint=True).metrics
    assert len(resumed.losses) == 7 and summary["train_loss"] == pytest.approx(sum(resumed.losses) / 7)
    assert fit(tmp_path).train(resume_from_checkpoint=True).metrics["train_loss"] == 0


def test_what_the_end_of_an_epoch_does_is_in_its_checkpoint(tmp_path):
    """An epoch has four updates. At its end the checkpoint is saved after logging."""
    options: dict[str, Any] = dict(logging_strategy="epoch", save_steps=4)
    whole = fit(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", Act(5, interrupt), **options).train()
    resumed = fit(tmp_path / "out", **options)
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in losses(whole)] == [4, 8, 10] and losses(resumed) == losses(whole)
    assert steps(tmp_path / "whole") == steps(tmp_path / "out") == [4, 8, 10]


def test_the_best_checkpoint_of_an_epochs_end_comes_after_its_log(tmp_path):
    """`save_strategy="best"` decides in the evaluation, which comes before the end of the epoch logs."""
    options: dict[str, Any] = dict(
        logging_strategy="epoch", save_strategy="best", eval_strategy="steps", eval_steps=4, eval_dataset=ROWS,
        metric_for_best_model="loss", label_names=["y"],
    )  # fmt: skip
    whole = fit(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", Act(5, interrupt), **options).train()
    assert steps(tmp_path / "out") == [4]
    resumed = fit(tmp_path / "out", **options)
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in losses(whole)] == [4, 8, 10] and losses(resumed) == losses(whole)
    assert resumed.state.best_metric == whole.state.best_metric


class Patience(EarlyStoppingCallback):
    """Counts evaluations, of which none is better than another."""

    def on_evaluate(self, args, state, control, **kwargs):
        self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter == self.early_stopping_patience:
            control.should_training_stop = True


@pytest.mark.parametrize("number", [1, 2])
def test_what_callbacks_count_goes_on(number, tmp_path):
    """They are the run's own objects, with the options that they have now."""
    options: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, save_steps=1, eval_dataset=ROWS) | dict(
        load_best_model_at_end=True, metric_for_best_model="loss", label_names=["y"]
    )
    fit(tmp_path, *(Patience(7 + i) for i in range(number)), max_steps=3, **options).train()
    callbacks = [Patience(5 + i) for i in range(number)]
    resumed = fit(tmp_path, *callbacks, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert [one.early_stopping_patience_counter for one in callbacks] == [5] * number


def test_how_often_a_resumed_run_saves_and_logs_is_its_own(tmp_path):
    fit(tmp_path, max_steps=3).train()
    resumed = fit(tmp_path, save_steps=2, logging_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [3, 4, 6, 8, 10] and [step for step, _ in losses(resumed)] == [5, 10]


def test_checkpoints_of_a_branch_that_was_left_count_no_more(tmp_path):
    """A run that goes on from an earlier checkpoint says so. A restart goes on from its own checkpoints."""
    fit(tmp_path).train()
    assert steps(tmp_path) == [3, 6, 9, 10]
    with (
        pytest.warns(UserWarning, match="checkpoint-6, checkpoint-9, checkpoint-10 came after checkpoint-3, from"),
        pytest.raises(KeyboardInterrupt),
    ):
        fit(tmp_path, Act(4, interrupt)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps(tmp_path) == [3] and (tmp_path / "checkpoint-9/model.safetensors").exists()


def test_one_trainer_trains_twice(whole, tmp_path):
    """The second call forgets the state of the first."""
    trainer = fit(tmp_path, Act(4, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.callback_handler.callbacks = [one for one in trainer.callback_handler.callbacks if not isinstance(one, Act)]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.seen == 20 and weight_of(tmp_path, 10) == weight_of(Path(whole.args.output_dir), 10)


def test_words_of_a_command_line():
    assert [_as_said(one) for one in ("true", "True", "FALSE", "auto", "AUTO")] == [True, True, False, "auto", "auto"]
    assert [_as_said(one) for one in ("Out/Checkpoint-3", None, True, False)] == ["Out/Checkpoint-3", None, True, False]


def test_data_that_begin_anew_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`ignore_data_skip=True` starts the data anew"):
        fit(tmp_path, ignore_data_skip=True).train(resume_from_checkpoint="auto")
    fit(tmp_path, ignore_data_skip=True, max_steps=1).train()  # without a resume it says nothing


def test_what_has_changed_is_said(tmp_path):
    """Other data are another run. Settings are noted, those of the optimizer as without effect."""
    fit(tmp_path, max_steps=3).train()
    with pytest.raises(ValueError, match="belongs to another run: the data was 8 and is 6"):
        fit(tmp_path, rows=ROWS[:6]).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="settings have changed") as said:
        fit(tmp_path, learning_rate=0.2, warmup_steps=1).train(resume_from_checkpoint=True)
    [text] = [str(one.message) for one in said if "settings have changed" in str(one.message)]
    assert "warm-up was 0 and is 1. This applies" in text and "learning_rate was 0.1 and is 0.2. This has no" in text


# ---- whose folder it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [None, False, "false", "elsewhere"])
def test_a_run_does_not_displace_another(resume, tmp_path):
    fit(tmp_path / "out", max_steps=3).train()
    if resume == "elsewhere":
        resume = str(tmp_path / "elsewhere/checkpoint-3")
        fit(tmp_path / "elsewhere", max_steps=3).train()
    with pytest.raises(ValueError, match=r"holds checkpoint-3 of another run.* Go on with that run by"):
        fit(tmp_path / "out").train(resume_from_checkpoint=resume)
    assert steps(tmp_path / "out") == [3] and not (tmp_path / "out" / NAME).exists()


def test_auto_starts_anew_over_what_is_damaged(tmp_path):
    """But it does not over the files of another trainer, about which it knows nothing."""
    fit(tmp_path / "out", max_steps=3).train()
    (tmp_path / "out/checkpoint-3/optimizer.pt").unlink()
    with pytest.raises(ValueError, match="No sound checkpoint"):
        fit(tmp_path / "out").train(resume_from_checkpoint=True)
    trainer = fit(tmp_path / "out", max_steps=4)
    with pytest.warns(UserWarning, match="The run starts anew, since no checkpoint is sound"):
        trainer.train(resume_from_checkpoint="auto")
    assert trainer.seen == 8 and damage(tmp_path / "out/checkpoint-3") is None
    (tmp_path / "theirs/checkpoint-1").mkdir(parents=True)
    (tmp_path / "theirs/checkpoint-1/trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"No run can go on from there"):
        fit(tmp_path / "theirs").train(resume_from_checkpoint="auto")


def test_another_folder_may_be_gone_on_from(whole, tmp_path):
    """A run in a folder without checkpoints goes on from a checkpoint of another folder."""
    trainer = fit(tmp_path)
    trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-6"))
    assert same(tmp_path, trainer, whole) and steps(tmp_path) == [9, 10]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    trainer = fit(tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file of this name")
    with pytest.raises(OSError, match="`output_dir`"):
        trainer.train()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_the_run_is_and_as_it_was_asked_for(tmp_path):
    """It does so also with a limited number of checkpoints. The limit counts complete ones."""
    trainer = fit(tmp_path, save_total_limit=2, max_steps=9)
    trainer.train()
    assert steps(tmp_path) == [6, 9] and not (tmp_path / "checkpoint-3").exists()
    said = read_mark(tmp_path / "checkpoint-6")
    assert (said["identity"], said["settings"], said["step"]) == (trainer.run_identity(), trainer.run_settings(), 6)
    assert torch.load(tmp_path / "checkpoint-9/training_args.bin", weights_only=False).save_total_limit == 2
    assert trainer.args.save_total_limit == 2


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(tmp_path):
    """If writing is killed in the middle, it is not taken for the old checkpoint."""
    fit(tmp_path, max_steps=3).train()
    trainer = fit(tmp_path, save_steps=1)
    seen = []
    write = trainer._save_optimizer_and_scheduler
    trainer._save_optimizer_and_scheduler = lambda folder: (seen.append(steps(tmp_path)), write(folder))
    (tmp_path / "checkpoint-3/scheduler.pt").unlink()
    with warnings.catch_warnings(action="ignore"):
        trainer.train(resume_from_checkpoint="auto")
    assert seen[:4] == [[3], [1, 3], [1, 2], [1, 2, 3]]


def test_a_checkpoint_is_pushed_once_it_is_complete(tmp_path, monkeypatch):
    pushed = []
    trainer = fit(tmp_path, max_steps=6)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda folder: pushed.append((folder, steps(tmp_path))))
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-3"), [3]), (str(tmp_path / "checkpoint-6"), [3, 6])]


def test_only_the_model(tmp_path):
    """No run can go on from the model alone, which is no complete checkpoint."""
    fit(tmp_path, max_steps=3, save_only_model=True).train()
    assert steps(tmp_path) == [] and (tmp_path / "checkpoint-3/model.safetensors").exists()
    with pytest.raises(ValueError, match="holds the model alone"):
        fit(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("what", ["weight", "optimizer state"])
def test_what_is_not_finite_is_not_written(what, tmp_path):
    def spoil() -> None:
        tensor = trainer.model.weight if what == "weight" else trainer.optimizer.state[trainer.model.weight]["exp_avg"]
        tensor.data[0] = torch.inf

    trainer = fit(tmp_path, Act(6, spoil))
    last = rf"after update 6 \({what} .*\)\. The last sound checkpoint is .*checkpoint-3\. Go on"
    with pytest.raises(RuntimeError, match=rf"checkpoint-6 is not written: 1 tensors hold NaN or infinity {last}"):
        trainer.train()
    assert steps(tmp_path) == [3]
    trainer = fit(tmp_path / "first", Act(2, spoil))
    with pytest.raises(RuntimeError, match=r"checkpoint-3 is not written: .* There is no checkpoint yet"):
        trainer.train()


# ---- told to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "signum"), [(1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM), (8, signal.SIGINT)]
)
def test_a_run_that_is_told_to_stop_goes_on_later(update, signum, whole, tmp_path, capsys):
    """It stops after this update with one checkpoint, also at the end of an epoch or where one is due anyway."""
    saved, before = [], signal.getsignal(signum)
    trainer = fit(tmp_path, Act(update, lambda: os.kill(os.getpid(), signum)), enable_jit_checkpoint=True)
    write = trainer._write_checkpoint
    trainer._write_checkpoint = lambda folder, *args: (saved.append(folder.name), write(folder, *args))
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signum and saved.count(f"checkpoint-{update}") == 1
    assert trainer.state.global_step == update == steps(tmp_path)[-1] and not (tmp_path / NAME).exists()
    assert f"Stopped after update {update}. Its checkpoint is complete" in capsys.readouterr().out
    assert signal.getsignal(signum) == before
    resumed = fit(tmp_path, enable_jit_checkpoint=True)
    resumed.train(resume_from_checkpoint="auto")
    assert same(tmp_path, resumed, whole)


def test_what_the_end_of_an_epoch_logs_comes_before_the_stop(tmp_path):
    """A run that is told to stop in an epoch's last update ends the epoch first."""
    stopped = fit(tmp_path / "out", Act(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), enable_jit_checkpoint=True,
                  logging_strategy="epoch")  # fmt: skip
    with pytest.raises(SystemExit):
        stopped.train()
    assert [step for step, _ in losses(stopped)] == [4]


def test_told_after_its_last_update_a_run_ends_as_ever(whole, tmp_path):
    trainer = fit(tmp_path, Act(10, lambda: os.kill(os.getpid(), signal.SIGTERM)), enable_jit_checkpoint=True)
    trainer.train()
    assert same(tmp_path, trainer, whole)
