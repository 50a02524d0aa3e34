"""`TBRMTrainer`: collect trajectories, score them, take a step on their squared Bellman residual."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.grpo_trainer import RolloutFunc
from trl.trainer.utils import get_config_model_id

from .checkpoint import dataset_digest
from .checks import check_sharding
from .config import TBRMConfig
from .logged import PREVIOUS, check_logged_rows
from .loss import TrajectoryLoss
from .metrics import Totals, step_totals
from .objective import mean_over_counted
from .reference import (
    ADAPTER,
    Reference,
    SyncReference,
    add_reference_adapter,
    precompute_scores,
    require_equal_weights,
    score_reference,
    tokenizer_digest,
)
from .replay import ReplayBuffer
from .resume import ExactResume, OwnState
from .rewards import mean_reward
from .scoring import TrajectoryScores, add_trajectory_head, disable_randomness, score
from .soft_value import SoftValue
from .sources import no_reward
from .startup import (
    check_adapters,
    check_dataset,
    check_logged_groups,
    check_packing,
    check_quantization,
    check_sources,
    check_sources_of_vision,
    check_vision,
    startup_line,
    warn_of_beta,
    warn_of_merging,
    warn_of_soft_value,
    without,
)
from .trajectory import Batch, MicrobatchSize, Source, Trajectory, Use, chunks, collate, numbers, random_order


class TBRMTrainer(ExactResume):
    """
    Trainer for Trajectory Bellman Residual Minimization (TBRM, arXiv 2505.15311).

    The model's logits are Q-values, `V_θ(s) = logsumexp(logits)`, and each trajectory gives one residual

        δ = V_θ(s_1) + Σ_h m_h (log π_θ − log π_ref) − R/β,        loss = mean of (β δ)².

    Another `soft_value` in place of V_θ(s_1) makes another published method of it. There is no critic, importance
    ratio, clipping or group; one rollout per prompt suffices, and trajectories may come from anywhere: rollouts of this
    policy, a replay buffer of them, rows of the data set that have a completion. Everything that `GRPOTrainer` gives
    (models, reward functions, prompts, tools, environments, vision, vLLM, logging, evaluation) is inherited. The
    overridden methods are

    - `_prepare_inputs`: collects the trajectories of an optimizer step, and scores the reference where it has not;
    - `_compute_loss`: the residual, one micro-batch after the other;
    - `log`: adds the residual's metrics to TRL's;
    - those of [`~sources.TrajectorySources`], which makes trajectories of rows, and of [`~resume.ExactResume`].

    Example:

    ```python
    from datasets import Dataset
    from tbrm_trl import TBRMConfig, TBRMTrainer

    def reward(completions, answer, **kwargs):
        return [float(a in c) for c, a in zip(completions, answer)]

    trainer = TBRMTrainer(
        model="Qwen/Qwen2.5-0.5B",
        reward_funcs=reward,
        args=TBRMConfig(output_dir="out"),
        train_dataset=Dataset.from_list([{"prompt": "2 + 2 =", "answer": "4"}] * 64),
    )
    trainer.train()
    ```

    Args:
        model: id, folder, `PreTrainedModel` or `PeftModel` of the policy. The reference is the model as it stands.
        reward_funcs: as in `GRPOTrainer`; R is the weighted sum of the raw rewards. May be omitted where every row of
            the training set has a completion and a reward.
        args: [`TBRMConfig`]; its defaults when omitted.
        train_dataset: as in `GRPOTrainer`, with a column `prompt`. A row with a `completion` (text or messages), or
            with `prompt_ids` and `completion_ids` (and `loss_mask`), is a logged trajectory and trained on as it is,
            with its `reward`, or where that is None with what the reward functions say.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config,
            peft_config, tools, rollout_func, environment_factory: as in `GRPOTrainer`.

    Raises:
        TypeError: if `args` is not a `TBRMConfig`.
        ValueError: for a data set smaller than one generation, a logged row that cannot be trained on, an adapter with
            dropout, and options that do not go together.
    """

    _tag_names: ClassVar = ["trl", "tbrm"]
    _name = "TBRM"
    _paper: ClassVar = {
        "title": "Trajectory Bellman Residual Minimization: A Simple Value-Based Method for LLM Reasoning",
        "id": "2505.15311",
        "citation": textwrap.dedent("""\
            @inproceedings{yuan2025trajectory,
                title        = {{Trajectory Bellman Residual Minimization}: A Simple Value-Based Method for {LLM}
                                Reasoning},
                author       = {Yurun Yuan and Fan Chen and Zeyu Jia and Alexander Rakhlin and Tengyang Xie},
                booktitle    = {Advances in Neural Information Processing Systems},
                year         = 2025,
                eprint       = {arXiv:2505.15311},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        reward_funcs: Any = None,
        args: TBRMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TBRMConfig(f"{name.split('/')[-1]}-TBRM")
        if not isinstance(args, TBRMConfig):
            raise TypeError(f"`args` must be a TBRMConfig, got {type(args).__name__}.")
        self._logged, self._window_parts = check_dataset(train_dataset, args)
        check_sources(self._window_parts, args, bool(reward_funcs or environment_factory), eval_dataset is not None)
        if self._window_parts.logged:
            check_logged_rows(train_dataset, self._logged, bool(reward_funcs), args.reference == "previous")
        self._prompt_numbers = check_logged_groups(train_dataset, self._logged, self._window_parts, args)
        self._soft_value = SoftValue.registry[args.soft_value](args)
        self._soft_value.check_data(train_dataset, self._logged)
        check_adapters(model, peft_config, args)
        check_quantization(model, peft_config, quantization_config, args)

        # TRL would sync no adapter, and load a reference that the previous policy makes superfluous.
        with without(args, sync_ref_model=False, **({"beta": 0.0} if args.reference == "previous" else {})):
            super().__init__(
                model,
                reward_funcs if self._window_parts.rollouts else reward_funcs or no_reward,
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                reward_processing_classes,
                callbacks,
                optimizers,
                quantization_config,
                peft_config,
                tools,
                rollout_func,
                environment_factory,
            )
        self.args: TBRMConfig
        self.ref_model: nn.Module | None
        self.train_dataset: Any
        self.beta = 0.0  # TRL's own reference pass stays off
        if args.reward_pessimism and len(self.reward_funcs) == 1:
            raise ValueError(
                f"`reward_pessimism={args.reward_pessimism}` has no effect with one reward function: nothing can "
                "disagree. Pass several, or list one several times."
            )

        check_sharding(args, self.accelerator)
        check_quantization(self.model, None, None, args)  # a checkpoint may be quantized itself, which shows here
        warn_of_merging(self.model, args)
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        check_vision(policy, self._is_vlm)
        if self._is_vlm:
            check_sources_of_vision(args, self._window_parts)
        if args.padding_free:
            check_packing(policy)
        if isinstance(model, PreTrainedModel) and self.ref_model is not None:
            require_equal_weights(policy, self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False))
        disable_randomness(self.model)
        for scored in (policy, self.ref_model):
            if scored is not None:
                bare = self.accelerator.unwrap_model(scored, keep_torch_compile=False)
                add_trajectory_head(bare, self.temperature, args.cast_lm_head_to_fp32)
        self._loss = TrajectoryLoss(args, self._soft_value, router_loss=self.aux_loss_enabled)
        # TRL would hide truncated completions from attention as well; here they only leave the loss.
        self.mask_truncated_completions = False

        self._window: list[Trajectory] = []  # of the current generation window, on this process
        self._microbatches: list[list[Use]] = []  # of the current update, on this process
        self._counted_in_step = 0  # trajectories that count in the current update, over all processes
        self._rows_drawn = self._rows_trained = 0  # by this process: into windows, and over all updates
        self._replay: ReplayBuffer | None = None
        if args.replay_buffer_size:
            self._replay = ReplayBuffer(
                args.replay_buffer_size // args.world_size,
                args.replay_max_age,
                args.replay_sampling == "prioritized",
                args.replay_priority_exponent,
                args.replay_priority_correction,
                args.updated_together,
            )
        self._step_totals = Totals()  # of this process, in the current optimizer step
        self._totals = {"train": Totals(), "eval": Totals()}  # of all processes, since the last log
        self._mean_length = 0.0
        self._beta_checked = False

        self._given_dataset = train_dataset
        self._logged_by_row: dict[int, Trajectory] = {}
        self._logged_bring_scores = args.reference == "previous"
        self._reference = self._make_reference()
        if self._window_parts.logged:
            self._tokenize_logged_rows(policy)
            self._precompute_reference()
        self._soft_value.attach(self)
        sampler = self._get_train_sampler() if isinstance(train_dataset, Sized) else None
        self.accelerator.print(startup_line(self._window_parts, args, sampler))

    # ---- collect -----------------------------------------------------------------------------------------------

    def _make_reference(self) -> Reference | None:
        """π_ref as a policy of its own; None where each trajectory is scored by the policy that produced it."""
        args = self.args
        if args.reference == "previous":
            return None
        if self.ref_model is None and (args.sync_ref_model or ADAPTER in self.model.peft_config):
            add_reference_adapter(self.model)
        settings = {
            "temperature": self.temperature,
            "precision": self.accelerator.mixed_precision,
            "tokenizer": tokenizer_digest(self._tokenizer),
            **({"end_value": True} if args.truncation == "bootstrap" else {}),
        }
        reference = Reference(lambda: self.model, self.ref_model, self.accelerator, settings)
        if args.sync_ref_model:
            self.add_callback(SyncReference(reference))
        return reference

    def _precompute_reference(self) -> None:
        """Of a training set of logs alone, have the reference score all of it now, and let the reference go."""
        # A policy with adapters is its own reference, and is not yet wrapped here.
        wrapped_later = self.ref_model is None and (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        wanted = self.args.precompute_ref_log_probs
        if wanted and wrapped_later:
            raise ValueError(
                "`precompute_ref_log_probs=True` with adapters under DeepSpeed or FSDP is refused: the policy, whose "
                "base is the reference, is only sharded when training starts. Leave it at None."
            )
        if wanted is None:
            wanted = not (self._window_parts.rollouts or self.args.sync_ref_model or wrapped_later)
        if wanted and self._reference is not None:
            self.train_dataset = precompute_scores(
                self.train_dataset, Path(self.args.output_dir), self._reference, self._score_stale
            )
            self._logged_bring_scores = True
            if self.eval_dataset is None and self.ref_model is not None:
                self._reference = self.ref_model = None
                self.accelerator.free_memory()  # it keeps a list of what it prepared

    def _before_training(self) -> None:
        self._soft_value.prepare(self)

    def replace_prompts(self, dataset: Dataset) -> None:
        """Go on with another training set of prompts, before anything was drawn."""
        self._logged, self._window_parts = check_dataset(dataset, self.args)
        self.train_dataset = dataset

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, list[list[Use]]]:
        if not self.model.training:
            trajectories = self._roll_out(generation_batch)
            self._score_stale(trajectories)
            self._value(trajectories, generation_batch, self.num_generations_eval)
            together = self.num_generations_eval if self._soft_value.group == "ratios" else 1
            uses = _in_groups([Use(t, "fresh") for t in trajectories], together)
            self._counted_in_step = int(self._gather([self._loss.settle(uses)]).sum())
            return {"microbatches": [uses]}
        micro_step = self._step % self.args.gradient_accumulation_steps
        if micro_step == 0:
            self._microbatches = self._microbatches_of(self._collect(generation_batch))
        # The Trainer's micro-steps are micro-batches of so many rows. Sized by tokens, there are as many as there are.
        by_tokens = self.args.max_tokens_per_microbatch is not None
        return {"microbatches": self._microbatches if by_tokens else [self._microbatches[micro_step]]}

    def _collect(self, rows: list[dict[str, Any]]) -> list[Use]:
        """The trajectories of one update on this process: the next part of the window, or replayed ones."""
        args, metrics = self.args, self._metrics["train"]
        rows_here = args.rows_per_device
        update = self._step // args.gradient_accumulation_steps % (args.fresh_updates * args.num_iterations)
        if update == 0:
            self._window = self._new_window(rows)

        sample = None
        if update >= args.fresh_updates and self._replay is not None:
            sample = self._replay.sample(rows_here, self.state.global_step, self._gather)
        if sample is None:
            first = update % args.fresh_updates * rows_here
            origin = "fresh" if update < args.fresh_updates else "reused"
            part = self._window[first : first + rows_here]
            uses = [Use(t, "logged" if t.source is Source.LOGGED else origin) for t in part]
        else:
            drawn = zip(sample.trajectories, sample.weights, sample.ages, sample.numbers, strict=True)
            uses = [Use(trajectory, "replayed", weight, age, number) for trajectory, weight, age, number in drawn]
        uses = _in_groups(uses, args.updated_together)
        stale = {use.number: use.trajectory for use in uses if self._is_stale(use.trajectory)}
        self._score_stale([use.trajectory for use in uses])
        for number, trajectory in stale.items():
            if self._replay is not None and number is not None:
                self._replay.stored.keep_scores(number, trajectory)

        oldest = max((use.age for use in uses if use.age is not None), default=0)
        numbers_of_all = self._gather([self._loss.settle(uses), oldest, len(self._replay or ())])  # (P, 3)
        self._counted_in_step = int(numbers_of_all[:, 0].sum())
        self._rows_trained += rows_here
        if sample is not None:
            metrics["replay/age_max"].append(numbers_of_all[:, 1].max().item())
        if self._replay is not None:
            metrics["replay/fill"].append(numbers_of_all[:, 2].sum().item())
            metrics["replay/updates_per_trajectory"].append(self._rows_trained / self._rows_drawn)
        return uses

    def _new_window(self, rows: list[dict[str, Any]]) -> list[Trajectory]:
        logged = [row for row in rows if self._window_parts.logged and row["completion_ids"] is not None]
        fresh = [row for row in rows if not self._window_parts.logged or row["completion_ids"] is None]
        rollouts = self._roll_out(fresh) if fresh else []
        window = rollouts + (self._take_logged(logged) if logged else [])
        self._mean_length = sum(len(t.completion_ids) for t in window) / len(window)
        self._rows_drawn += len(window)
        self._score_stale(window)
        self._value(window, fresh + logged, self.num_generations)
        if self.args.save_rollouts and rollouts:
            self._save_rollouts(rollouts)
        together = self.args.updated_together
        if self._replay is not None:
            for group in chunks(rollouts, together):
                if all(self._loss.left_out(trajectory) is None for trajectory in group):
                    self._replay.add(group)
        return [window[i] for i in random_order(len(window), together)]

    def _value(self, trajectories: Sequence[Trajectory], rows: Sequence[dict[str, Any]], group_size: int) -> None:
        """What is known of a trajectory's reward and soft value when it is drawn."""
        baseline, reward_of = self.args.reward_baseline, self.args.reward_of
        if baseline == "batch_mean":
            given = [reward for t in trajectories if not math.isnan(reward := reward_of(t))]
            total, count = self._gather([sum(given), len(given)]).sum(dim=0).tolist()
            for trajectory in trajectories:
                trajectory.baseline = total / max(count, 1)
        elif baseline == "group_mean":
            for group in chunks(trajectories, group_size):
                rewards = [reward_of(trajectory) for trajectory in group]
                alone = sum(not math.isnan(reward) for reward in rewards) < 2  # its own reward would be its baseline
                for trajectory in group:
                    trajectory.baseline = math.nan if alone else mean_reward(rewards)
        self._soft_value.on_window(trajectories, rows, group_size)

    def _microbatches_of(self, uses: list[Use]) -> list[list[Use]]:
        """The update's micro-batches, equally many on every process; a sharded model's forward needs all of them.

        Groups stay whole where micro-batches can hold them. Where not, their soft value takes a pass of its own.
        """
        size, together = self.args.microbatch_size, self.args.updated_together
        whole = size.keeps_whole(uses, together)
        if size.tokens is not None and together > 1:
            whole = bool(self._gather([whole]).all())
        if not whole:
            together = 1
        microbatches = size.split(uses, together)
        if size.tokens is not None:
            microbatches = size.spread(microbatches, int(self._gather([len(microbatches)]).max()), together)
        if not whole:
            batches = ((part, self._collate([use.trajectory for use in part])) for part in microbatches)
            self._loss.value_beforehand(batches, partial(self._score, self.model))
        return microbatches

    # ---- score -------------------------------------------------------------------------------------------------

    def _collate(self, trajectories: Sequence[Trajectory]) -> Batch:
        return collate(
            trajectories,
            self._tokenizer.pad_token_id,
            self.accelerator.device,
            self.args.pad_to_multiple_of,
            self.args.padding_free,
        )

    def _score(self, model: nn.Module, batch: Batch, **wanted: Any) -> TrajectoryScores:
        wanted["end_value"] = self.args.truncation == "bootstrap"
        with self.accelerator.autocast():
            return score(model, batch, masked=self._is_vlm or self.aux_loss_enabled, **wanted)

    def _is_stale(self, trajectory: Trajectory) -> bool:
        key = trajectory.ref_key
        return key is None or (self._reference is not None and key != self._reference.key)

    @torch.no_grad()
    def _score_stale(self, trajectories: Sequence[Trajectory], filler: Trajectory | None = None) -> None:
        """Have π_ref score those of the trajectories that do not carry its scores; every process calls this."""
        stale = [t for t in {id(t): t for t in trajectories}.values() if self._is_stale(t)]
        args = self.args
        size = args.microbatch_size if self.model.training else MicrobatchSize(args.per_device_eval_batch_size)
        batches = size.split(stale)
        forwards = int(self._gather([len(batches)]).max())
        if not forwards:
            return
        policy: AbstractContextManager[nn.Module]
        if self._reference is not None:
            key, policy = self._reference.key, self._reference.module()
        elif args.reference == "previous":
            key, policy = f"{PREVIOUS}{self.state.global_step}", nullcontext(self.model)
        else:
            raise ValueError(
                "The reference was freed after it had scored the logged trajectories, so nothing new can be scored. "
                "Give the trainer its `eval_dataset` at construction, or set `precompute_ref_log_probs=False`."
            )
        with policy as reference:
            score_reference(
                batches,
                forwards,
                key,
                self._collate,
                partial(self._score, reference),
                filler or trajectories[0],
            )

    # ---- update ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of this step's micro-batches, of which all but the last are back-propagated here.

        The last one's backward is the Trainer's. In it, and under ZeRO-2 and -3 in every one, gradients are reduced.
        """
        *earlier, last = inputs["microbatches"]
        done = torch.zeros((), device=self.accelerator.device)
        for uses in earlier:
            with self._reduction_deferred(model):
                loss = self._loss_of(model, uses)
                self.accelerator.backward(loss)
            done += loss.detach()
        return self._loss_of(model, last) + done

    @contextmanager
    def _reduction_deferred(self, model: nn.Module) -> Iterator[None]:
        """As in the Trainer's own accumulation: gradients stay on their process, unless `sync_each_batch` is set."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            with nullcontext() if state.plugin_kwargs.get("sync_each_batch") else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _loss_of(self, model: nn.Module, uses: list[Use]) -> Tensor:
        args = self.args
        batch = self._collate([use.trajectory for use in uses])
        seen = self._loss(
            uses, batch, partial(self._score, model), in_part=self.model.training and args.token_fraction < 1
        )
        weight = numbers([use.weight for use in uses], seen.loss.device)  # (B,)
        # Gradients are averaged over processes; the factor makes that the sum over them, as the denominator expects.
        processes = self.accelerator.num_processes
        loss = processes * mean_over_counted(seen.loss, seen.rows.counted, self._counted_in_step, weight)
        if seen.aux_loss is not None:
            share = len(uses) / args.rows_per_device if self.model.training else 1.0  # of the update
            loss = loss + self.router_aux_loss_coef * seen.aux_loss * share

        self._record(step_totals(uses, batch, seen.scores, seen.rows, seen.soft_value, seen.residual))
        if self._replay is not None and self._replay.prioritized:
            for use, priority in zip(uses, (args.beta * seen.residual).detach().abs().tolist(), strict=True):
                if use.number is not None:
                    self._replay.set_priority(use.number, priority)
        return loss

    def _gather(self, values: Sequence[float]) -> Tensor:
        """This process's numbers beside those of the others. `(n,)` → `(P, n)`, on the CPU."""
        return self.accelerator.gather(
            torch.tensor([values], dtype=torch.float32, device=self.accelerator.device)
        ).cpu()

    # ---- report ------------------------------------------------------------------------------------------------

    def _record(self, totals: Totals) -> None:
        """Add a micro-batch's totals; at the end of an optimizer step, those of all processes."""
        mode = "train" if self.model.training else "eval"
        self._step_totals += totals
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        summed = self._step_totals.over_processes(self.accelerator)
        self._step_totals = Totals()
        self._totals[mode] += summed
        if mode == "train" and not self._beta_checked:
            means = summed.means()
            if "soft_value" in means:  # the first step in which a trajectory counts
                self._beta_checked = True
                self._check_beta(means["soft_value"])

    def _check_beta(self, soft_value: float) -> None:
        if not self.accelerator.is_main_process:
            return
        warn_of_beta(self.args.beta, self._mean_length)
        if self.args.soft_value == "policy":
            warn_of_soft_value(self.args.beta, soft_value / self.args.beta)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._totals[mode]:
            self._metrics[mode].update({name: [mean] for name, mean in self._totals[mode].means().items()})
            self._totals[mode] = Totals()
        super().log(logs, start_time)

    # ---- resume ------------------------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> dict[str, Any]:
        args = self.args
        return {
            "processes": args.world_size,
            "data set": dataset_digest(self._given_dataset),
            "trajectories per update": args.rows_per_update,
            "updates per window": args.fresh_updates,
            "num_iterations": args.num_iterations,
            "num_generations": args.num_generations,
            "replay_buffer_size": args.replay_buffer_size,
            "logged trajectories per window": self._window_parts.logged,
            "seed of the data order": args.seed if self.shuffle_dataset else None,
            "reference": "synced" if args.sync_ref_model else args.reference,
            "soft_value": [args.soft_value, *(getattr(args, name) for name in sorted(self._soft_value.options))],
            "truncation": args.truncation,
        }

    def _fresh_start(self) -> None:
        self._window, self._rows_drawn, self._rows_trained = [], 0, 0
        self._step_totals, self._totals["train"] = Totals(), Totals()
        if self._replay is not None:
            self._replay.clear()

    def _own_state(self) -> OwnState:
        state = {
            "totals": self._totals["train"].state(),
            "rows_drawn": self._rows_drawn,
            "rows_trained": self._rows_trained,
            "mean_length": self._mean_length,
            "beta_checked": self._beta_checked,
            "logged_rows": list(self._logged_by_row),
        }
        arrays: dict[str, np.ndarray] = {}
        if self._replay is not None:
            state["replay"], arrays = self._replay.stored.state()
        return state, {"window": self._window, "logged": list(self._logged_by_row.values())}, arrays

    def _restore(
        self, state: dict[str, Any], lists: dict[str, list[Trajectory]], arrays: dict[str, np.ndarray]
    ) -> None:
        self._totals["train"] = Totals.from_state(state["totals"], self.accelerator.device)
        self._rows_drawn, self._rows_trained = state["rows_drawn"], state["rows_trained"]
        self._mean_length, self._beta_checked = state["mean_length"], state["beta_checked"]
        self._window = lists["window"]
        self._logged_by_row = dict(zip(state["logged_rows"], lists["logged"], strict=True))
        if self._replay is not None:
            self._replay.restore(state["replay"], arrays)


def _in_groups(uses: list[Use], size: int) -> list[Use]:
    """Number the groups that stand together."""
    for place, use in enumerate(uses):
        use.group = place // size
    return uses
