"""Options of `TBRMTrainer`, and what becomes of each option of TRL's `GRPOConfig`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import GRPOConfig

from .soft_value import SoftValue
from .trajectory import End, Trajectory

LossUnits = Literal["reward", "logits"]
ReferencePolicy = Literal["initial", "previous"]
ReplaySampling = Literal["uniform", "prioritized"]
RewardBaseline = Literal["none", "group_mean", "batch_mean"]
Truncation = Literal["terminal", "mask", "bootstrap"]
Residual = Literal["trajectory", "token"]
TokenSelection = Literal["scatter", "cut"]

# Every option that GRPOConfig declares stands in exactly one of these three; a test fails on one that does not.

KEPT = frozenset(
    """
    model_init_kwargs trust_remote_code router_aux_loss_coef cast_lm_head_to_fp32 remove_unused_columns
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
    generation_batch_size generation_kwargs chat_template_kwargs cache_implementation
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_max_model_length vllm_tensor_parallel_size
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    reward_weights max_tool_calling_iterations
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    """.split()
)

GIVEN_A_MEANING = {
    "learning_rate": "2.5e-6 by default, as published",
    "beta": "the temperature of the Bellman residual, 0.002 by default; must be positive",
    "num_generations": "rollouts per prompt, 1 by default; the group of soft values and baselines that compare rewards",
    "num_iterations": "updates per fresh one: the others take replayed trajectories, or the same again; no ratio",
    "steps_per_generation": "must be a multiple of gradient_accumulation_steps, so that a window holds whole updates",
    "temperature": "of sampling and of the soft value alike: the policy is softmax(logits / temperature)",
    "sync_ref_model": "with adapters too, where only a hard reset (ref_model_mixup_alpha=1) has a meaning",
    "ref_model_mixup_alpha": "share of the policy in the new reference; 1 is a hard reset",
    "ref_model_sync_steps": "updates between two syncs",
    "disable_dropout": "always on: a noisy log-probability biases the squared residual",
    "mask_truncated_completions": "the same as truncation='mask'",
    "top_p": "allowed with a warning: the scored policy is no longer the sampled one",
    "top_k": "allowed with a warning: the scored policy is no longer the sampled one",
    "min_p": "allowed with a warning: the scored policy is no longer the sampled one",
    "repetition_penalty": "allowed with a warning: the scored policy is no longer the sampled one",
}

_NO_RATIO = "TBRM has no importance ratio, so there is nothing to clip or weight"
_NO_ADVANTAGE = "TBRM uses the raw reward; there is no advantage to scale or normalise"
_NO_POLICY_LOSS = "TBRM has one loss, the squared trajectory Bellman residual"
_NO_SAMPLER_LOGPS = "TBRM uses no log-probabilities of the sampler, so there is no mismatch to correct"
_NO_ENTROPY_BONUS = "the residual is already entropy-regularised through its soft value, and carries no entropy bonus"

REFUSED = {
    **dict.fromkeys(("epsilon", "delta", "epsilon_high", "importance_sampling_level"), _NO_RATIO),
    **dict.fromkeys(
        ("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
        _NO_POLICY_LOSS,
    ),
    **dict.fromkeys(("vespo_lambda_neg", "loss_type"), _NO_POLICY_LOSS),
    **dict.fromkeys(("multi_objective_aggregation", "scale_rewards"), _NO_ADVANTAGE),
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        _NO_ENTROPY_BONUS,
    ),
    "entropy_target": _NO_ENTROPY_BONUS,
    "top_entropy_quantile": "a residual over part of the tokens is not the trajectory's Bellman residual",
    **dict.fromkeys(
        (
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ),
        _NO_SAMPLER_LOGPS,
    ),
    "off_policy_mask_threshold": "off-policy trajectories are valid data for TBRM and are not masked",
    "use_bias_correction_kl": "the KL term is part of the residual and needs no estimator",
}

_SAMPLING_FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty")
# What `generation_kwargs` may set without changing the sampled distribution.
_HARMLESS = (
    "max_new_tokens",
    "max_length",
    "cache_implementation",
    "cache_config",
    "use_cache",
    "seed",
    "disable_compile",
)


@dataclass
class TBRMConfig(GRPOConfig):
    r"""
    Options of [`TBRMTrainer`]. Those of `transformers.TrainingArguments` and of `trl.GRPOConfig` are inherited; which
    of the latter are kept, given a meaning, or refused is listed in `docs/configuration.md`.

    Parameters:
        > Parameters that control the residual

        beta (`float`, *optional*, defaults to `0.002`):
            KL coefficient β of the objective `E[R] − β KL(π‖π_ref)`, in reward units per nat. Must be positive.
        soft_value (`str`, *optional*, defaults to `"policy"`):
            The value term V of the residual, by name. `"policy"` is TBRM's `V_θ(s_1)` (arXiv 2505.15311).
            `"calibrated"` is `V_θ(s_1) − V_ref(s_1)` (ReVal, arXiv 2603.23355): the residual of the untrained model is
            then `−R/β`, not `V − R/β`; use it wherever `1/β` does not dwarf V. The others are `"group"` (VarGrad,
            REBEL, CoPG, GVPO), `"log_mean_exp"` (OAPL, Kimi k1.5), `"optimal"` (A*-PO), `"partition"` (reward
            partitioning), `"model"` (a frozen value model), `"zero"`, and every subclass of [`SoftValue`]: see
            `docs/theory.md`.
        soft_value_beta (`float` or `None`, *optional*):
            β₁ of `"optimal"` and `"log_mean_exp"`: `V̂ = β₁ log mean exp(r/β₁)`, in reward units. β where None; `inf`
            is the mean of the rewards.
        soft_value_samples (`int`, *optional*, defaults to `8`):
            Samples of the reference per prompt, from which `"optimal"` estimates V̂.
        soft_value_drop_unsolved (`bool`, *optional*, defaults to `False`):
            With `"optimal"`, drop the prompts none of whose samples has a positive reward.
        soft_value_self_normalized (`bool`, *optional*, defaults to `False`):
            With `"partition"`, divide the partition function by the reference's mass on the logged completions.
        soft_value_model (`str` or `None`, *optional*):
            With `"model"`, id or folder of the value model: a sequence classifier with one label.
        residual (`"trajectory"` or `"token"`, *optional*, defaults to `"trajectory"`):
            `"token"` is the classical Bellman residual of every token, which collapses on language models
            (arXiv 2505.15311, App. H.3). For ablations.
        truncation (`"terminal"`, `"mask"` or `"bootstrap"`, *optional*, defaults to `"terminal"`):
            What a completion cut at the length limit is. `"terminal"`: an end like any other, with its reward.
            `"mask"`: it leaves the loss. `"bootstrap"`: not an end; the soft value of the state after its last token is
            subtracted, and its reward is `truncated_reward`, whatever the verdict on the fragment.
        truncated_reward (`float`, *optional*, defaults to `0.0`):
            With `truncation="bootstrap"`, what a cut completion has earned before the cut.
        loss_units (`"reward"` or `"logits"`, *optional*, defaults to `"reward"`):
            `"reward"`: mean of `(β δ)²`. `"logits"`: mean of `δ²`, the paper's scale, larger by `1/β²` and so are its
            gradients: `max_grad_norm=1` then clips every step. Both have the same minimiser.

        > Parameters that shape the reward

        reward_baseline (`"none"`, `"group_mean"` or `"batch_mean"`, *optional*, defaults to `"none"`):
            Subtracted from R: the mean reward of the prompt's group, or of the generation window.
        reward_pessimism (`float`, *optional*, defaults to `0.0`):
            R is the reward functions' sum less this many standard errors of it, where several functions (or one listed
            several times) give verdicts on the same thing: a lower confidence bound (after MICRO, arXiv 2312.03991).

        > Parameters that add terms to the loss

        sft_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `−log π_θ(τ)` on trajectories whose reward reaches `sft_threshold` (arXiv 2405.16436), beside
            `(β δ)²`.
        sft_threshold (`float`, *optional*, defaults to `1.0`):
            That reward.
        entropy_advantage_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `A Σ_h H(π_θ(·|s_h))`, to be large, with the advantage `A = −β δ` (IBRO, arXiv 2507.18391).
        token_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the tokens that are back-propagated through, drawn at random and weighted so that the gradient is
            right on average (after arXiv 2504.20834). It costs a second forward without gradient.
        token_selection (`"scatter"` or `"cut"`, *optional*, defaults to `"scatter"`):
            Which: a random subset, or all tokens before a random cut, after which no activation is kept.

        > Parameters that control replay

        replay_buffer_size (`int`, *optional*, defaults to `0`):
            Trajectories that the first-in-first-out buffer holds, over all processes; 0 is no buffer. A window has S
            fresh updates and then (`num_iterations` − 1)·S others: with a buffer these take samples of it, without one
            the window's trajectories again. ReVal uses 5120 with `num_iterations=2`.
        replay_max_age (`int` or `None`, *optional*):
            Updates after which a trajectory leaves the buffer.
        replay_sampling (`"uniform"` or `"prioritized"`, *optional*, defaults to `"uniform"`):
            `"prioritized"` draws by |residual| (Schaul et al. 2016, arXiv 1511.05952).
        replay_priority_exponent (`float`, *optional*, defaults to `0.6`):
            Of |residual| in the probability to be drawn; 0 is uniform.
        replay_priority_correction (`float`, *optional*, defaults to `0.4`):
            Exponent of the weight `(N P)^-c` on the squared residual that makes up for being drawn more often.

        > Parameters that control logged trajectories

        logged_fraction (`float` or `None`, *optional*):
            Share of logged trajectories in every generation window, where the training set has both prompts and rows
            with a completion. By default their share in the data set, counting each prompt `num_generations` times.
        precompute_ref_log_probs (`bool` or `None`, *optional*):
            Score the reference on all logged trajectories before training, keep the scores in `output_dir` for the next
            run, and free the reference. Only for a training set of logs alone, where it is the default unless the
            reference changes.
        save_rollouts (`bool`, *optional*, defaults to `False`):
            Write every rollout to `output_dir/rollouts` as Parquet; `load_rollouts` makes a training set of them.

        > Parameters that control the reference

        reference (`"initial"` or `"previous"`, *optional*, defaults to `"initial"`):
            `"previous"` is the policy that produced the trajectory, as in REBEL, Kimi k1.5 and GVPO.

        > Parameters whose defaults differ from GRPOConfig

        num_generations (`int`, *optional*, defaults to `1`):
            Rollouts per prompt. One suffices.
        learning_rate (`float`, *optional*, defaults to `2.5e-6`):
            As published for Qwen2.5-Math-1.5B.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Cannot be switched off.
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            Cannot be switched on.

    Raises:
        ValueError: for an option without a meaning here, or numbers that do not fit together; it says what to change.
    """

    beta: float = field(
        default=0.002,
        metadata={"help": "KL coefficient beta of the objective, in reward units per nat. Must be positive."},
    )
    soft_value: str = field(
        default="policy",
        metadata={
            "help": "Value term of the residual, by name: 'policy' is TBRM's V(s_1), 'calibrated' subtracts the "
            "reference's; 'group', 'log_mean_exp', 'optimal', 'partition', 'model', 'zero'."
        },
    )
    soft_value_beta: float | None = field(
        default=None,
        metadata={"help": "beta_1 of 'optimal' and 'log_mean_exp'; beta where None, inf for the mean of the rewards."},
    )
    soft_value_samples: int = field(default=8, metadata={"help": "Samples of the reference per prompt for 'optimal'."})
    soft_value_drop_unsolved: bool = field(
        default=False, metadata={"help": "With 'optimal', drop prompts without a rewarded reference sample."}
    )
    soft_value_self_normalized: bool = field(
        default=False, metadata={"help": "With 'partition', divide by the reference's mass on the logged completions."}
    )
    soft_value_model: str | None = field(
        default=None, metadata={"help": "With 'model', id or folder of a sequence classifier with one label."}
    )
    residual: str = field(
        default="trajectory", metadata={"help": "'trajectory', or 'token': the classical one, for ablations."}
    )
    truncation: str | None = field(
        default=None,
        metadata={
            "help": "A completion cut at the length limit is 'terminal' (the default), leaves the loss ('mask'), or "
            "goes on with the soft value of its last state ('bootstrap')."
        },
    )
    truncated_reward: float = field(
        default=0.0, metadata={"help": "With 'bootstrap', the reward that a cut completion has earned before the cut."}
    )
    reward_baseline: str = field(
        default="none", metadata={"help": "Subtracted from the reward: 'none', 'group_mean' or 'batch_mean'."}
    )
    reward_pessimism: float = field(
        default=0.0, metadata={"help": "Standard errors subtracted where reward functions disagree."}
    )
    sft_coef: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of trajectories that were rewarded."}
    )
    sft_threshold: float = field(default=1.0, metadata={"help": "The reward from which sft_coef applies."})
    entropy_advantage_coef: float = field(
        default=0.0, metadata={"help": "Weight of the entropy of a trajectory's tokens times its advantage."}
    )
    token_fraction: float = field(
        default=1.0, metadata={"help": "Share of the tokens that are back-propagated through, unbiased."}
    )
    token_selection: str = field(
        default="scatter", metadata={"help": "'scatter': a random subset; 'cut': all before a random cut."}
    )
    loss_units: str = field(
        default="reward",
        metadata={"help": "'reward': mean of (beta*residual)^2; 'logits': mean of residual^2, the paper's scale."},
    )
    replay_buffer_size: int = field(
        default=0, metadata={"help": "Trajectories in the replay buffer, over all processes; 0 is no buffer."}
    )
    replay_max_age: int | None = field(
        default=None, metadata={"help": "Updates after which a trajectory leaves the replay buffer."}
    )
    replay_sampling: str = field(
        default="uniform", metadata={"help": "'uniform', or 'prioritized': by the absolute residual."}
    )
    replay_priority_exponent: float = field(
        default=0.6, metadata={"help": "Exponent of the absolute residual in the probability to be drawn."}
    )
    replay_priority_correction: float = field(
        default=0.4, metadata={"help": "Exponent of the weight that makes up for being drawn more often."}
    )
    logged_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of logged trajectories in every window; by default their share in the data set."},
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={"help": "Score the reference on a data set of logs once, before training, and free it."},
    )
    save_rollouts: bool = field(
        default=False, metadata={"help": "Write every rollout to output_dir/rollouts as Parquet."}
    )
    reference: str = field(
        default="initial",
        metadata={"help": "'initial', or 'previous': the policy that produced the trajectory."},
    )
    num_generations: int = field(
        default=1, metadata={"help": "Rollouts per prompt. One suffices: nothing is normalised over a group."}
    )
    learning_rate: float = field(default=2.5e-6, metadata={"help": "Initial learning rate of the optimizer."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout is always off: it biases a squared residual."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Cannot be switched on: TBRM uses no log-probabilities of the sampler."}
    )

    def __post_init__(self):
        self._refuse_options_without_meaning()
        self._check_residual_options()
        self._settle_truncation()
        try:
            super().__post_init__()
        except ValueError as error:
            if self.generation_batch_size and self.generation_batch_size % self.num_generations:
                raise self._broken_groups() from error
            # GRPO's last word on batches, after it has derived all their sizes. Here one rollout is enough.
            if not (self.num_generations == 1 and str(error).startswith("GRPO requires at least 2 generations")):
                raise
        self._check_batch_arithmetic()
        self._check_soft_value()
        self._check_terms()
        self._check_reference()
        self._check_replay()
        self._warn_of_sampling_filters()

    def _refuse_options_without_meaning(self) -> None:
        for name, reason in REFUSED.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no meaning for TBRM: {reason}. Leave it at {default!r}."
                )
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout=False` is refused: a log-probability with noise ε gives E(δ+ε)² = δ² + Var ε, so "
                "dropout biases the squared residual. Leave it at True."
            )
        if self.neftune_noise_alpha:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` is refused: a log-probability with noise ε gives "
                "E(δ+ε)² = δ² + Var ε, so noisy embeddings bias the squared residual. Leave it at None."
            )

    def _check_residual_options(self) -> None:
        if not self.beta > 0:
            raise ValueError(
                f"`beta={self.beta}` is refused: the residual V + log-ratio − R/β divides by it. The paper uses 0.002 "
                "near 2,000 to 5,000 tokens; use about 0.02 for responses of some hundred tokens."
            )
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature={self.temperature}` is refused: the policy is softmax(logits / temperature)."
            )
        for name, literal in (
            ("loss_units", LossUnits),
            ("reference", ReferencePolicy),
            ("replay_sampling", ReplaySampling),
            ("reward_baseline", RewardBaseline),
            ("residual", Residual),
            ("token_selection", TokenSelection),
            ("truncation", Truncation),
            ("soft_value", None),
        ):
            allowed = get_args(literal) or tuple(SoftValue.registry)
            if getattr(self, name) not in (allowed if name != "truncation" else (None, *allowed)):
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown. Choose one of {', '.join(allowed)}.")
        if self.num_generations < 1:
            raise ValueError(f"`num_generations={self.num_generations}` is refused: at least 1 rollout per prompt.")

    def _broken_groups(self) -> ValueError:
        rows, batch, group = (
            self.per_device_train_batch_size * self.world_size,
            self.generation_batch_size,
            self.num_generations,
        )
        unit = math.lcm(rows, group) if batch % rows == 0 and batch != rows else group
        fits = [size for size in (batch - batch % unit, batch - batch % unit + unit) if size]
        return ValueError(
            f"A generation of {batch} rollouts (generation_batch_size, or per_device_train_batch_size "
            f"{self.per_device_train_batch_size} × {self.world_size} processes × steps_per_generation "
            f"{self.steps_per_generation}) does not hold whole groups of num_generations={group}. Make it "
            f"{' or '.join(map(str, fits))}, or use num_generations=1."
        )

    def _check_batch_arithmetic(self) -> None:
        generation, accumulation = self.steps_per_generation, self.gradient_accumulation_steps
        if generation % accumulation:
            down, up = generation - generation % accumulation, generation + accumulation - generation % accumulation
            choices = " or ".join(str(steps) for steps in (down, up) if steps)
            raise ValueError(
                f"steps_per_generation={generation} is not a multiple of gradient_accumulation_steps={accumulation}: "
                f"an optimizer step would mix two generations. Set steps_per_generation to {choices} (or "
                f"generation_batch_size to {choices} × {self.per_device_train_batch_size * self.world_size}), or "
                f"gradient_accumulation_steps to a divisor of {generation}."
            )

    @property
    def rows_per_update(self) -> int:
        """Trajectories of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def fresh_updates(self) -> int:
        """Updates of a generation window that take its trajectories for the first time."""
        return self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def drawn_together(self) -> int:
        """Trajectories of one prompt that stand in one window of one process: 1 where no group is compared."""
        compared = SoftValue.registry[self.soft_value].group or self.reward_baseline == "group_mean"
        return self.num_generations if compared else 1

    @property
    def updated_together(self) -> int:
        """Trajectories of one prompt that stand in one update of one process."""
        return self.num_generations if SoftValue.registry[self.soft_value].group == "ratios" else 1

    def reward_of(self, trajectory: Trajectory) -> float:
        """R(τ) before a baseline: what was earned, and under `truncation="bootstrap"` no verdict on a fragment."""
        if self.truncation == "bootstrap" and trajectory.end is End.LENGTH:
            return self.truncated_reward
        return trajectory.reward

    def _settle_truncation(self) -> None:
        if self.mask_truncated_completions and self.truncation not in (None, "mask"):
            raise ValueError(
                f"`mask_truncated_completions=True` is truncation='mask', but `truncation={self.truncation!r}`. Use "
                "one of the two."
            )
        if self.truncation is None:
            self.truncation = "mask" if self.mask_truncated_completions else "terminal"
        self.mask_truncated_completions: bool = self.truncation == "mask"
        if self.truncated_reward and self.truncation != "bootstrap":
            raise ValueError(
                f"`truncated_reward={self.truncated_reward}` has no effect with `truncation={self.truncation!r}`: only "
                "with 'bootstrap' is a cut completion's own reward ignored."
            )

    def _check_soft_value(self) -> None:
        estimator = SoftValue.registry[self.soft_value]
        for other in SoftValue.registry.values():
            for name in other.options - estimator.options:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` has no effect with `soft_value={self.soft_value!r}`; it "
                        f"belongs to {', '.join(n for n, one in SoftValue.registry.items() if name in one.options)}."
                    )
        if self.reward_baseline != "none" and not estimator.takes_baseline:
            raise ValueError(
                f"`reward_baseline={self.reward_baseline!r}` with `soft_value={self.soft_value!r}` is refused: that "
                "value is made of the rewards already, and a baseline would be taken off twice. Use 'none'."
            )
        if self.truncation == "bootstrap" and not estimator.bootstraps:
            able = [name for name, one in SoftValue.registry.items() if one.bootstraps]
            raise ValueError(
                f'`truncation="bootstrap"` with `soft_value={self.soft_value!r}` is refused: it needs a value of the '
                "state "
                f"after the cut, and this one is a constant of the prompt. Use {' or '.join(able)}, or mask."
            )
        estimator.check(self)
        self._check_groups()

    def _check_groups(self) -> None:
        group = self.num_generations
        if SoftValue.registry[self.soft_value].group:
            who = f"soft_value={self.soft_value!r}"
        elif self.reward_baseline == "group_mean":
            who = "reward_baseline='group_mean'"
        else:
            return
        if group == 1:
            raise ValueError(
                f"`{who}` compares the trajectories of a prompt: with num_generations=1 each would be compared with "
                "itself, and no reward could be learned from. Use 2 or more."
            )
        for together, steps, name in (
            (self.drawn_together, self.steps_per_generation, "steps_per_generation"),
            (self.updated_together, self.gradient_accumulation_steps, "gradient_accumulation_steps"),
        ):
            rows = self.per_device_train_batch_size * steps
            if rows % together:
                raise ValueError(
                    f"`{who}` needs the {group} trajectories of a prompt on one process, but {rows} rows "
                    f"(per_device_train_batch_size {self.per_device_train_batch_size} × {name} {steps}) are not whole "
                    f"groups of num_generations={group}. Make that product a multiple of {group}."
                )

    def _check_terms(self) -> None:
        for name in ("sft_coef", "entropy_advantage_coef", "reward_pessimism"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}={getattr(self, name)}` must be 0 (off) or positive.")
        if not 0 < self.token_fraction <= 1:
            raise ValueError(f"`token_fraction={self.token_fraction}` must lie in (0, 1].")
        if self.residual == "token" and (self.soft_value != "policy" or self.truncation == "bootstrap"):
            raise ValueError(
                '`residual="token"` takes V_θ of every state: it needs `soft_value="policy"`, and no bootstrap.'
            )
        if self.token_fraction < 1:
            for name, beside in (
                ("residual", self.residual == "token"),
                ("sft_coef", self.sft_coef),
                ("entropy_advantage_coef", self.entropy_advantage_coef),
                ("truncation", self.truncation == "bootstrap" and self.token_selection == "cut"),
            ):
                if beside:
                    raise ValueError(
                        f"`token_fraction={self.token_fraction}` with `{name}={getattr(self, name)!r}` is refused: "
                        "that needs the gradient of every token. Use one of the two."
                    )
        if self.reward_pessimism and self.reward_weights and min(self.reward_weights) <= 0:
            raise ValueError(
                "`reward_pessimism` reads the reward functions as verdicts on one thing, so `reward_weights` must be "
                "positive."
            )

    def _check_reference(self) -> None:
        if not self.sync_ref_model:
            return
        if self.reference == "previous":
            raise ValueError(
                '`sync_ref_model=True` with `reference="previous"` is refused: the previous policy is the reference '
                "already. Use one of the two."
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs=True` with `sync_ref_model=True` is refused: scores that were computed once "
                "would go stale at the first sync. Use one of the two."
            )
        if not (0 < self.ref_model_mixup_alpha <= 1 and self.ref_model_sync_steps >= 1):
            raise ValueError(
                f"`ref_model_mixup_alpha={self.ref_model_mixup_alpha}` must lie in (0, 1], and "
                f"`ref_model_sync_steps={self.ref_model_sync_steps}` must be at least 1."
            )

    def _check_replay(self) -> None:
        size, rows = self.replay_buffer_size, self.rows_per_update
        if size == 0:
            for name in ("replay_max_age", "replay_sampling"):
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(f"`{name}={getattr(self, name)!r}` needs a buffer: set `replay_buffer_size`.")
            return
        if size < rows:
            raise ValueError(
                f"`replay_buffer_size={size}` is smaller than one update of {rows} trajectories "
                f"({self.per_device_train_batch_size} per device × {self.world_size} process(es) × "
                f"{self.gradient_accumulation_steps} accumulation): no replay update could ever be filled. Set it to "
                f"{rows} or more, or to 0 for no buffer."
            )
        if size % self.world_size:
            raise ValueError(
                f"`replay_buffer_size={size}` does not divide over {self.world_size} processes: each holds a shard of "
                f"one size. Use {size - size % self.world_size + self.world_size}."
            )
        if self.updated_together > 1:
            if self.replay_sampling == "prioritized":
                raise ValueError(
                    f'`replay_sampling="prioritized"` draws single trajectories, and `soft_value={self.soft_value!r}` '
                    'needs whole groups. Use "uniform".'
                )
            if size // self.world_size % self.num_generations:
                raise ValueError(
                    f"`replay_buffer_size={size}` over {self.world_size} process(es) does not hold whole groups of "
                    f"num_generations={self.num_generations}. Make it a multiple of "
                    f"{self.num_generations * self.world_size}."
                )
        if self.num_iterations == 1:
            raise ValueError(
                "`replay_buffer_size` has no effect with `num_iterations=1`, whose only update takes the fresh "
                "trajectories. Use 2 or more, or no buffer."
            )
        if self.replay_max_age is not None and self.replay_max_age < 1:
            raise ValueError(f"`replay_max_age={self.replay_max_age}` must be at least 1 update.")
        for name in ("replay_priority_exponent", "replay_priority_correction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must lie between 0 and 1.")

    def sampling_filters(self) -> dict[str, Any]:
        """The options that make the sampler another policy than softmax(logits / temperature)."""
        chosen = {name: getattr(self, name) for name in _SAMPLING_FILTERS}
        chosen |= {name: value for name, value in (self.generation_kwargs or {}).items() if name not in _HARMLESS}
        off = {name: type(self).__dataclass_fields__[name].default for name in _SAMPLING_FILTERS}
        off |= {"temperature": self.temperature, "do_sample": True}
        return {name: value for name, value in chosen.items() if value is not None and value != off.get(name)}

    def _warn_of_sampling_filters(self) -> None:
        if active := self.sampling_filters():
            warnings.warn(
                f"{active} makes the sampler another policy than softmax(logits / temperature), which is the one "
                "scored. The residual stays valid (any data is), but the metrics `kl` and `entropy` no longer "
                "describe the sampled policy, and tokens that the filter removes are never corrected.",
                stacklevel=4,
            )
