"""Options of `TBRMTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from . import checks
from .soft_value import SoftValue
from .trajectory import End, MicrobatchSize, Trajectory

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

        > Parameters that control micro-batches

        max_tokens_per_microbatch (`int` or `None`, *optional*):
            Tokens of one forward and backward, padding included. An update's `per_device_train_batch_size` rows are
            then divided into micro-batches of rows of similar length, as few as hold them, equally many on every
            process; a longer row is one by itself. `gradient_accumulation_steps` must be 1. By default each micro-batch
            has `per_device_train_batch_size` rows, and an update takes `gradient_accumulation_steps` of them.
        padding_free (`bool`, *optional*, defaults to `False`):
            Run the policy and the reference on the real tokens of a micro-batch as one row, without padding. Pays with
            flash attention; with SDPA the row of N tokens has an N × N mask (`docs/configuration.md`).

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
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of one forward and backward, padding included; per_device_train_batch_size rows are then "
            "one update, divided by length."
        },
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Run models on a micro-batch's real tokens as one row, without padding."}
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
        checks.refuse_options_without_meaning(self)
        self._settle_truncation()
        checks.check_residual_options(self)
        try:
            super().__post_init__()
        except ValueError as error:
            if self.generation_batch_size and self.generation_batch_size % self.num_generations:
                raise checks.broken_groups(self) from error
            # GRPO's last word on batches, after it has derived all their sizes. Here one rollout is enough.
            if not (self.num_generations == 1 and str(error).startswith("GRPO requires at least 2 generations")):
                raise
        checks.check_batch_arithmetic(self)
        checks.check_microbatches(self)
        checks.check_soft_value(self)
        checks.check_terms(self)
        checks.check_padding(self)
        checks.check_reference(self)
        checks.check_replay(self)
        checks.check_launch(self)
        checks.warn_of_sampling_filters(self)

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

    @property
    def rows_per_device(self) -> int:
        """Trajectories of one optimizer step, on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_per_update(self) -> int:
        """Trajectories of one optimizer step, over all processes."""
        return self.rows_per_device * self.world_size

    @property
    def microbatch_size(self) -> MicrobatchSize:
        """What one forward of training takes."""
        return MicrobatchSize(
            self.per_device_train_batch_size,
            self.max_tokens_per_microbatch,
            self.padding_free,
            self.pad_to_multiple_of,
        )

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

    def sampling_filters(self) -> dict[str, Any]:
        """The options that make the sampler another policy than softmax(logits / temperature)."""
        chosen = {name: getattr(self, name) for name in _SAMPLING_FILTERS}
        chosen |= {name: value for name, value in (self.generation_kwargs or {}).items() if name not in _HARMLESS}
        off = {name: type(self).__dataclass_fields__[name].default for name in _SAMPLING_FILTERS}
        off |= {"temperature": self.temperature, "do_sample": True}
        return {name: value for name, value in chosen.items() if value is not None and value != off.get(name)}
