"""`ExactResume`: a trainer whose resumed run ends, bit for bit on CPU, where an uninterrupted one would."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer

from ..context import temporarily
from ..trajectory import Trajectory
from .checkpoint import (
    checkpoint_to_resume,
    load_state,
    mark_complete,
    mark_incomplete,
    process_folder,
    remove_old_checkpoints,
    save_state,
)

# JSON-able values in two parts ("trainer" is the Trainer's own, "own" the subclass's), lists of trajectories, arrays.
RunState = tuple[dict[str, dict[str, Any]], dict[str, list[Trajectory]], dict[str, np.ndarray]]


class ExactResume(Trainer):
    """What transformers leaves out of a checkpoint, and when a checkpoint counts as one.

    The Trainer saves weights, optimizer, schedule, its own state, and each process's random state. Here each process
    adds what a subclass says decides how it goes on. A subclass answers to `run_identity`, `forget`, `before_training`,
    `run_state` and `restore_run_state`. The overridden methods are

    - `train`: resumes only from a checkpoint that every process has finished, and that belongs to this run;
    - `_save_checkpoint`: marks a checkpoint as complete, and removes old ones only after that;
    - `_save_rng_state`, `_load_rng_state`: called on every process where its own part is due;
    - `save_model`: writes the weights of a model that FSDP shards, also where its checkpoints stay sharded;
    - `_run_epoch`, `_finalize_training`: from the checkpoint of its last update, a run ends without another one.
    """

    _resumed_from: str | None
    _has_trained: bool

    def run_identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to resume from it, as JSON-able values by a name for errors."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what an earlier call of `train` left behind."""
        raise NotImplementedError

    def before_training(self) -> None:
        """Do what a run needs before its first row is drawn."""

    def run_state(self, folder: Path) -> RunState:
        """What decides how this process goes on. What does not fit the return value goes into files of `folder`."""
        raise NotImplementedError

    def restore_run_state(self, state: RunState, folder: Path, main_folder: Path) -> None:
        """Go on from what `run_state` returned, and wrote into `folder`; on the main process into `main_folder`."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: for a checkpoint that is not complete, or of a run with other processes, data or batches.
        """
        self.forget()
        if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
            resume_from_checkpoint = resume_from_checkpoint.lower() == "true"  # as a command line gives it
        if resume_from_checkpoint:
            if self.args.ignore_data_skip:
                raise ValueError(
                    "`ignore_data_skip=True` starts the data anew, and transformers then restores no position to go on "
                    "at. Leave it at False."
                )
            resume_from_checkpoint = checkpoint_to_resume(
                resume_from_checkpoint, self.args.output_dir, self.run_identity()
            )
        self._resumed_from, self._has_trained = resume_from_checkpoint or None, False
        self.before_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            self._has_trained = True
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_trained:
            self._load_rng_state(self._resumed_from)
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # With FSDP2's default, a sharded state dict, the Trainer would write no weights and say nothing.
        with temporarily(self.accelerator.state.fsdp_plugin, state_dict_type=StateDictType.FULL_STATE_DICT):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        self.accelerator.wait_for_everyone()
        # The Trainer would remove old checkpoints, and push this one, before every process has written its part.
        with temporarily(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")  # again, with these two as they were given
            if not self.args.save_only_model:
                mark_complete(folder, {**self.run_identity(), "step": self.state.global_step})
            remove_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = process_folder(output_dir, self.accelerator.process_index)
        folder.mkdir(parents=True, exist_ok=True)
        values, trajectories, arrays = self.run_state(folder)
        values["trainer"] |= {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        save_state(folder, values, trajectories, arrays)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        folder = process_folder(checkpoint, self.accelerator.process_index)
        state = load_state(folder)
        self._tr_loss.fill_(state[0]["trainer"]["loss"])
        self._globalstep_last_logged = state[0]["trainer"]["last_logged"]
        self.restore_run_state(state, folder, process_folder(checkpoint, 0))
