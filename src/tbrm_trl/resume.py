"""`ExactResume`: a trainer whose resumed run ends, bit for bit on CPU, where an uninterrupted one would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import StateDictType

from .checkpoint import (
    checkpoint_to_resume,
    load_state,
    mark_complete,
    mark_incomplete,
    process_folder,
    remove_old_checkpoints,
    save_state,
)
from .reference import Reference
from .sources import TrajectorySources
from .startup import warn_of_rollouts, without
from .trajectory import Trajectory

# Of what TRL keeps to log as completions; images are not kept.
_COMPLETIONS = ("prompt", "completion", "rewards", "advantages", "extra")

OwnState = tuple[dict[str, Any], dict[str, list[Trajectory]], dict[str, np.ndarray]]


class ExactResume(TrajectorySources):
    """What TRL and transformers leave out of a checkpoint, and when a checkpoint counts as one.

    The Trainer saves weights, optimizer, schedule, its own state, and each process's random state. Here each process
    adds its trajectories, its place in the generation window, its unlogged metrics, and the reference where that moves.
    The overridden methods are

    - `train`: resumes only from a checkpoint that every process has finished, and that belongs to this run;
    - `_save_checkpoint`: marks a checkpoint as complete, and removes old ones only after that;
    - `_save_rng_state`, `_load_rng_state`: called on every process where its own part is due;
    - `save_model`: writes the weights of a model that FSDP shards, also where its checkpoints stay sharded;
    - `_run_epoch`, `_finalize_training`: from the checkpoint of its last update, a run ends without another one.
    """

    _reference: Reference | None
    _resumed_from: str | None

    @property
    def _identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to resume from it."""
        raise NotImplementedError

    def _fresh_start(self) -> None:
        """Forget what an earlier call of `train` left behind."""
        raise NotImplementedError

    def _before_training(self) -> None:
        """What a run needs before its first row is drawn."""

    def _own_state(self) -> OwnState:
        """JSON-able values, lists of trajectories, and arrays, that decide how this process goes on."""
        raise NotImplementedError

    def _restore(
        self, state: dict[str, Any], lists: dict[str, list[Trajectory]], arrays: dict[str, np.ndarray]
    ) -> None:
        """The inverse of `_own_state`."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: for a checkpoint that is not complete, or of a run with other processes, data or batches.
        """
        self._step = 0
        self._fresh_start()
        if resume_from_checkpoint and self.args.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` starts the data anew, and transformers then restores no position to go on at. "
                "Leave it at False."
            )
        if self.args.save_rollouts and not resume_from_checkpoint and self.accelerator.is_main_process:
            warn_of_rollouts(Path(self.args.output_dir))
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self._identity)
        self._resumed_from = resume_from_checkpoint or None
        self._before_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._step == 0:  # there was nothing left to train
            self._load_rng_state(self._resumed_from)
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # With FSDP2's default, a sharded state dict, the Trainer would write no weights and say nothing.
        with without(self.accelerator.state.fsdp_plugin, state_dict_type=StateDictType.FULL_STATE_DICT):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        self.accelerator.wait_for_everyone()
        # The Trainer would remove old checkpoints, and push this one, before every process has written its part.
        with without(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")  # again, with these two as they were given
            if not self.args.save_only_model:
                mark_complete(folder, {**self._identity, "step": self.state.global_step})
            remove_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = process_folder(output_dir, self.accelerator.process_index)
        own, lists, arrays = self._own_state()
        trainers = {
            "metrics": dict(self._metrics["train"]),
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "training": self.model.training,  # what is logged at the end depends on it
            "completions": {name: self._logs[name] for name in _COMPLETIONS} if self.log_completions else {},
        }
        save_state(folder, {"trainer": trainers, "own": own}, lists, arrays)
        if self.args.sync_ref_model and self._reference is not None:
            self._reference.save(folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        folder = process_folder(checkpoint, self.accelerator.process_index)
        state, lists, arrays = load_state(folder)
        trainers = state["trainer"]
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._metrics["train"].clear()
        self._metrics["train"].update(trainers["metrics"])
        self._tr_loss.fill_(trainers["loss"])
        self._globalstep_last_logged = trainers["last_logged"]
        self.model.train(trainers["training"])
        for name, saved in trainers["completions"].items():
            if isinstance(saved, list):
                self._logs[name].extend(saved)
                continue
            for column, values in saved.items():
                self._logs[name][column].extend(values)
        self._restore(state["own"], lists, arrays)
        if self.args.sync_ref_model and self._reference is not None:
            self._reference.load(folder, process_folder(checkpoint, 0))
