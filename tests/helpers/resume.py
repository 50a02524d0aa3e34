"""Training runs in processes of their own, which may kill themselves at a named point, and their outcomes."""

import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.launch import become, end_process
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import tbrm_trl.resume.exact_resume
from helpers.runs import digits
from helpers.scripted import QUIET
from helpers.writers import made_rows, write_slowly
from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.model.reference import Reference
from tbrm_trl.sources.parquet import to_row

WORDS = ["1+1=", "Say: ab", "c", "What is it? ", "longer than the others", "x y", "z", "0:", "tail"]
PROMPTS = [{"prompt": word} for word in WORDS]
LOGGED = [{"prompt": word, "completion": f"{i}abc"[: i % 5 + 1], "reward": i / 7} for i, word in enumerate(WORDS * 2)]
MIXED = [{"prompt": word, "completion": None, "reward": None} for word in WORDS[:5]] + [
    {**row, "reward": row["reward"] if i % 3 else None} for i, row in enumerate(LOGGED[:11])
]

# Updates 1 to 4 are on the first window, twice two; 8 updates are an epoch; 14 end in the middle of a window.
OPTIONS: dict[str, Any] = QUIET | dict(
    beta=0.1, learning_rate=0.01, max_steps=14, max_completion_length=6, num_generations=2,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2,
    save_strategy="steps", save_steps=3, save_total_limit=1, save_rollouts=True,
)  # fmt: skip
SYNC = dict(sync_ref_model=True, ref_model_sync_steps=4)
CASES: dict[str, dict[str, Any]] = {
    "fresh": dict(eval_strategy="steps", eval_steps=5, log_completions=True),
    "replay": dict(replay_buffer_size=12, replay_max_age=5),
    "prioritized": dict(replay_buffer_size=20, replay_max_age=9, replay_sampling="prioritized"),
    "logged": dict(data=LOGGED[:17], save_rollouts=False),
    "mixed": dict(data=MIXED, logged_fraction=0.5, replay_buffer_size=8),
    "lora": dict(lora=dict()),
    "lora, reset": dict(lora=dict(), ref_model_mixup_alpha=1.0, replay_buffer_size=16, **SYNC),
    "reset": dict(ref_model_mixup_alpha=1.0, replay_buffer_size=16, **SYNC),
    "moving average": dict(ref_model_mixup_alpha=0.6, data=MIXED, **SYNC),
    "pool": dict(rollout_pool=6, num_iterations=1, steps_per_generation=2, max_completion_length=16, logging_steps=2),
    "followed": dict(records=7, data=None, num_generations=1, replay_buffer_size=16, num_iterations=3),
    # Checkpoints at steps that are not logged, at the end of a window, and at the end of an epoch.
    "unlogged": dict(
        reference="previous", max_steps=16, logging_steps=3, save_steps=4, replay_buffer_size=16,
        replay_sampling="prioritized",
    ),
    # The sizes of a case above, split over two processes.
    "two, prioritized": dict(
        replay_buffer_size=20, replay_max_age=9, replay_sampling="prioritized", per_device_train_batch_size=1
    ),
    "two, pool": dict(
        rollout_pool=6, num_iterations=1, steps_per_generation=2, max_completion_length=16,
        per_device_train_batch_size=1,
    ),
    "two, followed": dict(records=7, data=MIXED, num_generations=1, per_device_train_batch_size=1, num_iterations=1),
    "two, mixed": dict(
        data=MIXED, logged_fraction=0.5, ref_model_mixup_alpha=0.6, per_device_train_batch_size=1, **SYNC
    ),
}  # fmt: skip


def letters(completions, log_metric, log_extra, **kwargs) -> list[float]:
    shares = [sum(map(str.islower, text)) / 8 for text in completions]
    log_metric("length", sum(map(len, completions)) / len(completions))
    log_extra("letters", shares)
    return shares


def build(case: str, model: str, output_dir: Path, **changes: Any) -> TBRMTrainer:
    options = {**OPTIONS, **CASES[case], **changes}
    data, lora = options.pop("data", PROMPTS), options.pop("lora", None)
    functions: list[Any] | None = [letters, digits]
    if largest := options.pop("records", None):  # most rows of a file
        options["follow_rollouts"] = str(output_dir.parent / "records")
        write_slowly(output_dir.parent / "records", made_rows(120), largest, seed=1)
        functions = functions if data else None  # some of the logged rows have no reward
    return TBRMTrainer(
        model,
        functions,
        TBRMConfig(output_dir=str(output_dir), **options),
        data if data is None or isinstance(data, Dataset) else Dataset.from_list(data),
        Dataset.from_list(PROMPTS[:2]) if "eval_steps" in options else None,
        peft_config=None if lora is None else LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, **lora),
    )


def kill_at(
    trainer: TBRMTrainer,
    point: str,
    step: int,
    evidence: Path,
    signum: signal.Signals = signal.SIGKILL,
    then_sleep: float = 0,
) -> None:
    """Make this process send itself a signal at a point of the run, once `step` updates have been made."""
    policy = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    before, after = True, False
    owner, name, when, file = {
        "generating": (policy, "_update_model_kwargs_for_generation", after, None),  # after the first token
        "between micro-batches": (trainer, "training_step", after, None),
        "weights stepped": (trainer.callback_handler, "on_optimizer_step", before, None),
        "update made": (trainer, "_maybe_log_save_evaluate", before, None),
        "reference synced": (Reference, "sync", after, None),
        # Writing a checkpoint, in order.
        "nothing written": (trainer, "save_model", before, None),
        "model written": (trainer, "_save_optimizer_and_scheduler", before, None),
        "optimizer written": (trainer, "_save_optimizer_and_scheduler", after, None),
        "random state written": (tbrm_trl.resume.exact_resume, "save_state", before, None),
        "rollouts half-written": (os, "replace", before, f"step-{step:08d}-process-0.partial"),
        "trajectories half-written": (os, "replace", before, "trajectories.partial"),
        "state half-written": (os, "replace", before, "state.partial"),
        "own state written": (tbrm_trl.resume.exact_resume, "save_state", after, None),
        "reference written": (Reference, "save", after, None),
        "all written": (tbrm_trl.resume.exact_resume, "mark_complete", before, None),
        "mark half-written": (os, "replace", before, "complete.partial"),
        "marked": (tbrm_trl.resume.exact_resume, "mark_complete", after, None),
        # Removing the previous checkpoint.
        "old one unmarked": (shutil, "rmtree", before, None),
        "old one half-removed": (os, "unlink", after, "scheduler.pt"),
        "old one removed": (tbrm_trl.resume.exact_resume, "remove_old_checkpoints", after, None),
        "ending": (trainer, "_finalize_training", before, None),
    }[point]  # fmt: skip
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        due = (
            not evidence.exists() and trainer.state.global_step == step and (file is None or Path(args[0]).name == file)
        )
        if not (due and when is before):
            result = original(*args, **kwargs)
        if due:
            evidence.write_text(f"{point} {step}")
            os.kill(os.getpid(), signum)
            time.sleep(then_sleep)
            if when is before:
                result = original(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


class ControlC(TrainerCallback):
    """Interrupts an update between its micro-batches, once."""

    done = False

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def outcome(trainer: TBRMTrainer) -> dict[str, Any]:
    """Everything that training has produced in this process."""
    logs = [
        {
            name: value
            for name, value in entry.items()
            if not (name.endswith(("_time", "_runtime", "_per_second")) or name in ("train_loss", "total_flos"))
        }
        for entry in trainer.state.log_history
    ]
    unwrap = trainer.accelerator.unwrap_model
    with tempfile.TemporaryDirectory() as folder:
        values, lists, arrays = trainer.run_state(Path(folder))
    return {
        "log": logs,
        "model": dict(unwrap(trainer.model).state_dict()),
        "reference": {} if trainer.ref_model is None else dict(unwrap(trainer.ref_model).state_dict()),
        "reference key": trainer._reference and trainer._reference.key,
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "own": values["own"],
        **{name: [to_row(trajectory) for trajectory in trajectories] for name, trajectories in lists.items()},
        "arrays": arrays,
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
    }


def run(
    case: str,
    model: str,
    output_dir: str,
    kill: tuple[str, int] | None = None,
    resume: bool | str = False,
    interrupt: bool = False,
    signum: int = signal.SIGKILL,
    then_sleep: float = 0,
    **changes: Any,
) -> None:
    """One training run, from the start or from the last complete checkpoint.

    Args:
        case: a key of `CASES`, which has its settings.
        model: folder of the policy.
        output_dir: output folder of the run. Its outcome is written beside it.
        kill: point of `kill_at`, and the updates made by then; None to reach the end.
        resume: whether to resume from the last complete checkpoint, or "auto".
        signum: the signal of the kill.
        then_sleep: seconds to sleep after the signal.
        interrupt: leave `train` in the middle, and call it again.
        changes: changed settings.
    """
    out = Path(output_dir)
    trainer = build(case, model, out, **changes)
    if kill is not None:
        kill_at(trainer, *kill, out.parent / "killed", signal.Signals(signum), then_sleep)
    if interrupt:
        trainer.add_callback(ControlC())
        with suppress(KeyboardInterrupt):
            trainer.train()
        resume = True
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(outcome(trainer), out.parent / f"outcome-{trainer.accelerator.process_index}.pt")


def child(log: str, process: int, processes: int, port: int, **job: Any) -> None:
    """`run` in a forked process, which prints into a file."""
    become(log, process, processes, port)
    run(**job)
    end_process()


def run_of_rank(jobs: list[dict[str, Any]]) -> None:
    """Under a launcher: `run` with the arguments of this process."""
    run(**jobs[int(os.environ["RANK"])])
