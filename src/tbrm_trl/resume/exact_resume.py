"""`ExactResume`: a trainer whose resumed run ends, bit for bit on CPU, where an uninterrupted one would."""

import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..context import temporarily
from ..files import first_line, require_writable, writing
from ..processes import failing_together
from ..trajectory import Trajectory
from .checkpoint import (
    AUTO,
    checkpoint_to_resume,
    checkpoints_of_others,
    complete_checkpoints,
    leave_later,
    load_state,
    mark_complete,
    mark_incomplete,
    process_folder,
    read_mark,
    remove_old_checkpoints,
    save_state,
)
from .finite import not_finite, tensors_of_model, tensors_of_optimizer
from .folder_lock import FolderLock
from .stop import StopRequest, exit_code

Result = TypeVar("Result")

# JSON-able values in two parts ("trainer" is the Trainer's own, "own" the subclass's), lists of trajectories, arrays.
RunState = tuple[dict[str, dict[str, Any]], dict[str, list[Trajectory]], dict[str, np.ndarray]]
# Options that a checkpoint overrides: its optimizer's groups and its schedule hold their values.
_NO_EFFECT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def require_agreement(identity: dict[str, Any]) -> None:
    """Refuse a run whose processes have different data or settings."""
    first, *others = gather_object([identity])
    differing = [name for name in first if any(other[name] != first[name] for other in others)]
    if differing:
        raise ValueError(
            f"The processes differ in {', '.join(differing)}. They share the rows of every window, so each must make "
            "the same: shuffle or split a data set with a `seed`."
        )


class ExactResume(Trainer):
    """Saves what transformers leaves out of a checkpoint, resumes only from sound ones, and locks the output folder.

    The Trainer saves weights, optimizer, schedule, its own state, and each process's random state. Here each process
    adds the state that a subclass gives it. A subclass implements `run_identity`, `run_settings`, `forget`,
    `before_training`, `run_state`, `restore_run_state` and `tensors`. The overridden methods are

    - `train`: resumes only from a sound checkpoint of this run, and locks its folder;
    - `_save_checkpoint`: marks a checkpoint as complete, and removes old ones only after that;
    - `_save_rng_state`, `_load_rng_state`: the Trainer calls them on every process; here they also write and read each
      process's own part;
    - `_init_training_state`: a resumed run's own options set how often it saves, evaluates and logs; it goes on where
      the checkpoint's pass was, also in a stream or after a pass that a callback has ended;
    - `_load_callback_state`: what callbacks have counted, such as early stopping's patience, is restored;
    - `_maybe_log_save_evaluate`: called after every update, and once more at an epoch's end. It stops a run that was
      told to stop. What is due at an epoch's last update, a checkpoint or the stop, waits for the second call;
    - `_determine_best_metric`: in the first of these calls, a best checkpoint is noted and not yet saved;
    - `save_model`: writes the weights of a model that FSDP shards, even if its checkpoints stay sharded;
    - `_load_best_model`: an adapter that is not named "default" is found, too;
    - `_run_epoch`, `_finalize_training`: a run resumed from the checkpoint of its last update makes no further one. The
      first also notes where a pass over the data begins.
    """

    _resumed_from: str | None
    _has_trained: bool
    _described: dict[str, Any]  # identity and settings, as they were when the run started
    _stop: StopRequest | None = None
    _last_saved: int | None = None  # the update after which the last checkpoint was written
    _last_update: int | None = None  # the update of the last call of `_maybe_log_save_evaluate`
    _pass: tuple[int, int] = (0, 0)  # the number of this pass over the data, and of the updates before it
    _pass_has_ended = False
    _saves_later = _best_is_due = False  # in that call: whether a second one follows; whether that must save the best

    def run_identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to resume from it, as JSON-able values by a name for errors."""
        raise NotImplementedError

    def run_settings(self) -> dict[str, Any]:
        """What else decides how a run goes on; a resumed run reports what has changed."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what an earlier call of `train` left behind."""
        raise NotImplementedError

    def before_training(self) -> None:
        """Do what a run needs before its first row is drawn."""

    def after_training(self) -> None:
        """End what must not outlast the run, however it ends."""

    def run_state(self, folder: Path) -> RunState:
        """Return the state from which this process goes on. What does not fit in it goes into files of `folder`."""
        raise NotImplementedError

    def restore_run_state(self, state: RunState, folder: Path, main_folder: Path) -> None:
        """Restore what `run_state` returned, and wrote into `folder`. `main_folder` is the main process's folder."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this process's tensors that must be finite in a checkpoint, each with a name for errors."""
        yield from tensors_of_model(self.model, "weight")
        yield from tensors_of_optimizer(self.optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the last sound one in `output_dir`; "auto" for that
                one, or a fresh start if there is none. The words "true" and "false" count as True and False. None
                takes what the arguments say.

        Raises:
            ValueError: for a checkpoint that is incomplete, damaged, or of a run with another reference, tokenizer,
                data, batches or number of processes; for a fresh start in a folder with checkpoints of another run; if
                processes have different data or settings.
            RuntimeError: if another run is under way in `output_dir`.
            OSError: if `output_dir` cannot be written to.
            SystemExit: with `enable_jit_checkpoint`, after SIGTERM (code 143) or SIGINT (code 130).
        """
        self.forget()
        said = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume_from = _as_said(said)
        if resume_from and self.args.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` starts the data anew, and transformers then restores no position to go on "
                "at. Leave it at False."
            )
        output_dir = self._get_output_dir(args[0] if args else kwargs.get("trial"))
        self._described = {"identity": self.run_identity(), "settings": self.run_settings()}
        require_agreement(self._described["identity"])
        with ExitStack() as held:
            held.enter_context(self._folder_held(output_dir))
            self._resumed_from = self._found(resume_from, output_dir)
            self._has_trained, self._last_update = False, None
            if self.args.enable_jit_checkpoint:
                self._stop = StopRequest(self.args.stop_timeout)
                held.enter_context(self._stop.listening())
            held.callback(self.after_training)
            self.before_training()
            # The state of this run is read after the evaluation at the start, which the run has had before.
            with temporarily(self.args, eval_on_start=self.args.eval_on_start and self._resumed_from is None):
                output = super().train(self._resumed_from, *args, **kwargs)
            self._tell_of_failed_pushes()
            return output

    @contextmanager
    def _folder_held(self, output_dir: str) -> Iterator[None]:
        """Lock the output folder against other runs inside the block."""
        lock = FolderLock(output_dir)

        def take() -> None:
            require_writable(Path(output_dir), "`output_dir`")
            lock.acquire()

        try:
            self._on_writers(take)
            yield
        finally:
            lock.release()

    def _found(self, resume_from: Any, output_dir: str) -> str | None:
        """Return the checkpoint to go on from, the same on every process, and warn of what the user should know."""

        def find() -> tuple[str | None, list[str]]:
            found: str | None = None
            notes: list[str] = []
            if resume_from:
                found, notes = checkpoint_to_resume(resume_from, output_dir, **self._described, no_effect=_NO_EFFECT)
                if resume_from is not True and resume_from != AUTO:  # after the last sound one come only damaged ones
                    notes += leave_later(found, output_dir)
            damaged = set(complete_checkpoints(output_dir)) if resume_from == AUTO and found is None else set()
            if found is None or Path(found).resolve().parent != Path(output_dir).resolve():
                self.require_own_folder(
                    Path(output_dir),
                    [one for one in checkpoints_of_others(output_dir) if one not in damaged],
                    anew=resume_from == AUTO,
                )
            return found, notes

        found, notes = self._on_writers(find)
        if self.accelerator.is_main_process:
            for note in notes:
                warnings.warn(note, stacklevel=3)
        return found

    def require_own_folder(self, output_dir: Path, others: list[Path], anew: bool) -> None:
        """Refuse to start a run in the folder of another one.

        Args:
            output_dir: the folder.
            others: checkpoints in it that this run would displace.
            anew: whether the user expects the run to start again if it ended before its first checkpoint.
        """
        if others:
            goes_on = bool(complete_checkpoints(output_dir))
            advice = (
                'Go on with that run by `resume_from_checkpoint=True` (or "auto"), or give'
                if goes_on
                else "No run can go on from there: it holds a model alone (`save_only_model=True`), or is another "
                "trainer's. Move it, or give"
            )
            raise ValueError(
                f"{output_dir} holds {', '.join(one.name for one in others[-3:])} of another run, which a new one "
                f"would displace. {advice} the new one another output_dir."
            )

    def _on_writers(self, work: Callable[[], Result]) -> Result:
        """Call `work` where files are written, and return its result, or raise its error, on every process."""
        result: Any = None
        with failing_together():
            if self.args.should_save:
                result = work()
        everywhere = gather_object([(self.args.should_save, result)])
        results = [one for writes, one in everywhere if writes]
        if any(one != results[0] for one in results):
            raise RuntimeError(
                f"The machines found different things in output_dir: {results}. Give them the same files."
            )
        return results[0]

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self._pass[0] != epoch:
            self._pass = epoch, self.state.global_step
        if self.state.global_step < self.state.max_steps:
            self._has_trained = True
            super()._run_epoch(model, epoch, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_trained:
            self._load_rng_state(self._resumed_from)
        return super()._finalize_training(*args, **kwargs)

    def _init_training_state(self, max_steps: int, updates_of_pass: int, *args: Any) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, updates_of_pass, *args)
        self.state.compute_steps(self.args, max_steps)  # this run's intervals, not the checkpoint's
        self._pass = 0, 0
        if self._resumed_from is None:
            return begun
        # transformers takes all updates of a stream for one pass, and every pass over other sets for a whole one.
        self._last_update = self.state.global_step
        number, place = begun
        counted = [number, self.state.global_step - place // self.args.gradient_accumulation_steps, False]
        # Checkpoints of earlier versions do not name their pass.
        number, before, has_ended = read_mark(Path(self._resumed_from)).get("pass", counted)
        made = self.state.global_step - before
        if has_ended or made == updates_of_pass:
            return number + 1, 0
        self._pass = number, before
        return number, made * self.args.gradient_accumulation_steps

    def _load_callback_state(self) -> None:
        if self.args.restore_callback_states_from_checkpoint:  # makes them anew, with the options that they had
            super()._load_callback_state()
            return
        by_class: dict[str, list[Any]] = {}
        for one in self.callback_handler.callbacks:
            if isinstance(one, ExportableState):
                by_class.setdefault(type(one).__name__, []).append(one)
        for name, callbacks in by_class.items():
            saved: Any = (self.state.stateful_callbacks or {}).get(name, [])
            # Those of one class are a list, to which transformers adds with each checkpoint.
            states = saved[-len(callbacks) :] if isinstance(saved, list) else [saved]
            for callback, state in zip(callbacks, states, strict=False):
                for attribute, value in state["attributes"].items():
                    setattr(callback, attribute, value)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any):
        # After the last update of an epoch comes the epoch's end, which may evaluate, log and save once more. A
        # checkpoint saved before the end would be resumed after it.
        ends = self.control.should_training_stop or self.control.should_epoch_stop
        ends = ends or float(self.state.epoch or 0.5).is_integer()
        second_call = self._last_update == self.state.global_step
        before_epochs_end = ends and not second_call
        # Where training ends, a run with more updates goes on in the pass. Nobody knows whether a stream's has ended.
        within = self.control.should_training_stop and not self.control.should_epoch_stop
        self._pass_has_ended = second_call and not (within and isinstance(self.train_dataset, Sized))
        self._last_update, self._last_saved = self.state.global_step, None
        self._saves_later, self._best_is_due = before_epochs_end, False
        saves_at_the_end = before_epochs_end and self.control.should_save
        if saves_at_the_end:
            self.control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if saves_at_the_end or self._best_is_due:
            self.control.should_save = True
        if self._stop is None or self.state.global_step >= self.state.max_steps:
            return
        requested = torch.tensor([self._stop.signum], device=self.accelerator.device)
        signum = int(self.accelerator.gather(requested).max())  # all processes stop at the same update
        if not signum or before_epochs_end:
            return
        if self._last_saved != self.state.global_step:
            self._save_checkpoint(model, trial)
        self.accelerator.print(
            f"Stopped after update {self.state.global_step}. Its checkpoint is complete: "
            '`resume_from_checkpoint="auto"` goes on from it.'
        )
        self.end()
        raise SystemExit(exit_code(signum))

    def _load_best_model(self) -> None:
        # PEFT saves an adapter with a name of its own in a folder of that name, where transformers does not look.
        best, name = self.state.best_model_checkpoint, getattr(self.model, "active_adapter", None)
        if isinstance(name, str) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            own = Path(str(best), name)
            best = str(own) if (own / ADAPTER_CONFIG_NAME).exists() else best
        with temporarily(self.state, best_model_checkpoint=best):
            super()._load_best_model()

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best = super()._determine_best_metric(*args, **kwargs)
        if self._saves_later and self.args.save_strategy == "best":
            self._best_is_due = is_best
            return False  # "best" saves at once what is best
        return is_best

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # With FSDP2's default, a sharded state dict, the Trainer would silently write no weights.
        with temporarily(self.accelerator.state.fsdp_plugin, state_dict_type=StateDictType.FULL_STATE_DICT):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._require_finite(folder)
        with writing(folder):
            self._write_checkpoint(folder, model, trial)
        self._last_saved = self.state.global_step
        if self.args.push_to_hub:
            self._tell_of_failed_pushes()
            self._push_from_checkpoint(str(folder))

    def _tell_of_failed_pushes(self) -> None:
        """Warn of pushes in the background that have failed. transformers looks at none of their errors."""
        pushes = getattr(self, "push_in_progress", None)
        jobs = [] if pushes is None else pushes.jobs
        for job in [job for job in jobs if job.done() and not job.cancelled()]:
            jobs.remove(job)
            if (error := job.exception()) is not None:
                warnings.warn(
                    f"A push to the Hub failed ({first_line(error)}). What it was to push is in "
                    f"{self.args.output_dir}. After training, `trainer.push_to_hub()` pushes it.",
                    stacklevel=2,
                )

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            mark_incomplete(folder)
        self.accelerator.wait_for_everyone()
        # The Trainer would remove old checkpoints, and push this one, before every process has written its part.
        with temporarily(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        with failing_together():
            if self.args.should_save:
                torch.save(self.args, folder / "training_args.bin")  # again, with both options as given
                run = {**self._described, "step": self.state.global_step, "pass": [*self._pass, self._pass_has_ended]}
                mark_complete(folder, run, model_only=self.args.save_only_model)
                remove_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _require_finite(self, folder: Path) -> None:
        """Refuse to write a checkpoint with NaN or infinity: it would take the place of a sound one."""
        everywhere = gather_object([not_finite(self.tensors())])
        names = sorted({name for here in everywhere for name in here})
        if names:
            complete = complete_checkpoints(folder.parent)
            last = f"The last sound checkpoint is {complete[-1]}." if complete else "There is no checkpoint yet."
            raise RuntimeError(
                f"{folder.name} is not written: {len(names)} tensors hold NaN or infinity after update "
                f"{self.state.global_step} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}). {last} Go on "
                "from there with a lower learning rate, or look at the rewards of the last window."
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = process_folder(output_dir, self.accelerator.process_index)
        folder.mkdir(parents=True, exist_ok=True)
        values, trajectories, arrays = self.run_state(folder)
        values["trainer"] |= {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        with failing_together():
            save_state(folder, values, trajectories, arrays)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        folder = process_folder(checkpoint, self.accelerator.process_index)
        state = load_state(folder)
        self._tr_loss.fill_(state[0]["trainer"]["loss"])
        before = self.accelerator.gather(self._tr_loss).mean() if self._has_trained else self._tr_loss
        self._total_loss_scalar = -before.item()  # the summary covers only the updates after the checkpoint
        self._globalstep_last_logged = state[0]["trainer"]["last_logged"]
        self.restore_run_state(state, folder, process_folder(checkpoint, 0))


def _as_said(resume_from: Any) -> Any:
    """Convert the words "true", "false" and "auto" of a command line; other values stay as they are."""
    words = {"true": True, "false": False, AUTO: AUTO}
    return words.get(resume_from.lower(), resume_from) if isinstance(resume_from, str) else resume_from
