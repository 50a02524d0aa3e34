"""`TBRMTrainer`: collect trajectories, score them, take a step on their squared Bellman residual."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.grpo_trainer import RolloutFunc
from trl.trainer.utils import get_config_model_id

from .config import TBRMConfig
from .metrics import Totals, step_totals
from .objective import bellman_residual, squared_residual_loss, trajectory_log_ratio
from .reference import reference_policy, require_equal_weights, score_reference
from .rollout import trajectories_from_trl
from .scoring import TrajectoryScores, accepts_position_ids, add_trajectory_head, disable_randomness, score
from .startup import check_adapters, check_dataset, check_vision, startup_line, warn_of_beta, warn_of_soft_value
from .trajectory import Batch, End, Trajectory, by_length, collate


class TBRMTrainer(GRPOTrainer):
    """
    Trainer for Trajectory Bellman Residual Minimization (TBRM, arXiv 2505.15311).

    The model's logits are Q-values, `V_θ(s) = logsumexp(logits)`, and each trajectory gives one residual

        δ = V_θ(s_1) + Σ_h m_h (log π_θ − log π_ref) − R/β,        loss = mean of (β δ)².

    There is no critic, importance ratio, clipping or group; one rollout per prompt suffices. Everything that
    `GRPOTrainer` gives (models, reward functions, prompts, tools, environments, vision, vLLM, logging, evaluation) is
    inherited. The overridden methods are

    - `_calculate_rewards`: keeps the raw rewards, of which TRL only returns normalised advantages;
    - `_get_per_token_logps_and_entropies`: returns nothing, so that TRL runs no old-policy or reference pass;
    - `_generate_and_score_completions`: turns TRL's tensors into trajectories and scores the reference, once each;
    - `_prepare_inputs`: counts the trajectories of an optimizer step before its first backward;
    - `_compute_loss`: the residual;
    - `log`: adds the residual's metrics to TRL's.

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
        reward_funcs: as in `GRPOTrainer`; R is the weighted sum of the raw rewards.
        args: [`TBRMConfig`]; its defaults when omitted.
        train_dataset: as in `GRPOTrainer`, with a column `prompt`.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config,
            peft_config, tools, rollout_func, environment_factory: as in `GRPOTrainer`.

    Raises:
        TypeError: if `args` is not a `TBRMConfig`.
        ValueError: before anything is loaded, for a data set smaller than one generation or an adapter with dropout.
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
        check_dataset(train_dataset, args)
        check_adapters(model, peft_config)

        super().__init__(
            model,
            reward_funcs,
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

        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        check_vision(policy, self._is_vlm)
        if isinstance(model, PreTrainedModel) and self.ref_model is not None:
            require_equal_weights(policy, self.accelerator.unwrap_model(self.ref_model))
        disable_randomness(self.model)
        for scored in (policy, self.ref_model):
            if scored is not None:
                add_trajectory_head(self.accelerator.unwrap_model(scored), self.temperature, args.cast_lm_head_to_fp32)
        self._positions_from_mask = not self._is_vlm and accepts_position_ids(policy)
        # TRL would hide truncated completions from attention as well; here they only leave the loss.
        self.mask_truncated_completions = False
        self._counted_in_step = 0  # trajectories that count in the current optimizer step, over all processes
        self._step_totals = Totals()  # of this process, in the current optimizer step
        self._totals = {"train": Totals(), "eval": Totals()}  # of all processes, since the last log
        self._beta_checked = False
        self.accelerator.print(startup_line(train_dataset, args))

    # ---- collect -----------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, F)
        if torch.isinf(rewards_per_func).any():
            row, column = torch.isinf(rewards_per_func).nonzero()[0].tolist()
            raise ValueError(
                f"Reward function {self.reward_func_names[column]!r} returned {rewards_per_func[row, column].item()} "
                f"for rollout {row} of {len(rewards_per_func)}. Return a finite number, or None to leave it out."
            )
        mine = slice(self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts))
        local = rewards_per_func[mine]  # (B, F) NaN where a function did not apply
        unscored = local.isnan().all(dim=1)
        self._raw_rewards = (
            (local * self.reward_weights.to(local.device)).nansum(dim=1).masked_fill(unscored, torch.nan)
        )
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return None, None, None  # TBRM has no old policy, and scores the reference on trajectories

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        end_token_ids = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        trajectories = trajectories_from_trl(output, self._raw_rewards, end_token_ids)
        self._mean_length = sum(len(t.completion_ids) for t in trajectories) / len(trajectories)
        training, args = self.model.training, self.args
        batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        with reference_policy(self.model, self.ref_model, self.accelerator) as reference:
            score_reference(
                by_length(trajectories, batch_size),
                self._collate,
                lambda batch: self._score(reference, batch),
            )
        # TRL splits and shuffles a dictionary of columns whose first one is a tensor.
        return {"row": torch.arange(len(trajectories)), "trajectory": trajectories}

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        accumulation = self.args.gradient_accumulation_steps
        if not self.model.training:
            self._counted_in_step = self._count(inputs["trajectory"])
        elif self._step % accumulation == 0:
            first = self._step % self.args.steps_per_generation
            step = self._buffered_inputs[first : first + accumulation]
            self._counted_in_step = self._count(t for micro_batch in step for t in micro_batch["trajectory"])
        return inputs

    # ---- score -------------------------------------------------------------------------------------------------

    def _collate(self, trajectories: Sequence[Trajectory]) -> Batch:
        return collate(
            trajectories, self._tokenizer.pad_token_id, self.accelerator.device, self.args.pad_to_multiple_of
        )

    def _score(self, model: nn.Module, batch: Batch, router_logits: bool = False) -> TrajectoryScores:
        with self.accelerator.autocast():
            return score(model, batch, positions_from_mask=self._positions_from_mask, router_logits=router_logits)

    # ---- update ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        beta, processes = self.args.beta, self.accelerator.num_processes
        trajectories = inputs["trajectory"]
        left_out = [self._left_out(trajectory) for trajectory in trajectories]
        counted = torch.tensor([reason is None for reason in left_out], device=self.accelerator.device)  # (B,)

        batch = self._collate(trajectories)
        scores = self._score(model, batch, router_logits=self.aux_loss_enabled)

        soft_value = scores.soft_value  # (B,)
        if self.args.soft_value == "calibrated":
            soft_value = soft_value - batch.ref_soft_value
        log_ratio = trajectory_log_ratio(scores.log_probs, batch.ref_log_probs, batch.action_mask)  # (B,)
        residual = bellman_residual(soft_value, log_ratio, batch.reward, beta)  # (B,)

        unit = beta if self.args.loss_units == "reward" else 1.0
        # Gradients are averaged over processes; the factor makes that the sum over them, as the denominator expects.
        loss = processes * squared_residual_loss(unit * residual, counted, self._counted_in_step)
        if self.aux_loss_enabled:
            accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / accumulation

        window = self.args.steps_per_generation * self.num_iterations
        fresh = not self.model.training or self._step % window < self.args.steps_per_generation
        self._record(step_totals(batch, scores, counted, left_out, soft_value, log_ratio, residual, beta, fresh))
        return loss

    def _left_out(self, trajectory: Trajectory) -> str | None:
        """Why a trajectory does not count in the loss, or None if it does."""
        if math.isnan(trajectory.reward):
            return "unscored"
        if self.args.mask_truncated_completions and trajectory.end is End.LENGTH:
            return "truncated"
        if not trajectory.loss_mask.any():
            return "no_action"
        return None

    def _count(self, trajectories: Iterable[Trajectory]) -> int:
        counted = sum(self._left_out(trajectory) is None for trajectory in trajectories)
        return int(self.accelerator.reduce(torch.tensor(counted, device=self.accelerator.device), reduction="sum"))

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
