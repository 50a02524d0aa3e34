"""The options of a run, documented once, and the sizes that follow from them."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from trl import GRPOConfig

from .batch import MicrobatchSize
from .trajectory import End, Trajectory

Options = TypeVar("Options", bound=type)

BASELINES = ("none", "group_mean", "batch_mean")  # `reward_baseline` may also be a number
_SAMPLING_FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty")
# Names in `generation_kwargs` that do not change the sampled distribution.
HARMLESS = (
    "cache_implementation",
    "cache_config",
    "use_cache",
    "seed",
    "disable_compile",
)
# Names of secrets, which must not reach a log or a file.
_SECRET = re.compile(r"(token|api_key|secret|password)$", flags=re.I)
# Options of this library and of TRL that only control how a run is executed, logged or stored.
_NOT_OF_THE_RUN = re.compile(
    r"(log_|vllm_server_|vllm_mode|vllm_gpu_|vllm_tensor_|num_completions_to_print|save_rollouts|follow_timeout|async_server|stop_timeout|reward_timeout|max_skipped_updates|ds3_gather)"
)
# Options of transformers that decide how training goes on.
_OF_THE_RUN = (
    """
    max_steps num_train_epochs lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2
    adam_epsilon optim optim_args max_grad_norm per_device_train_batch_size gradient_accumulation_steps
    """
).split()
_OPTION = re.compile(r"^    (\w+) \((.+)\):\n((?:        .+\n?|\n(?=        ))+)", flags=re.M)


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError that names all problems, if there are any."""
    problems = list(dict.fromkeys(problems))
    if len(problems) > 1:
        raise ValueError("\n- ".join([f"{len(problems)} options are refused:", *problems]))
    if problems:
        raise ValueError(*problems)


def option_texts(options: type) -> dict[str, str]:
    """Map each option to its text in the docstring of `options`, on one line."""
    return {name: " ".join(text.split()) for name, _, text in _OPTION.findall(inspect.cleandoc(options.__doc__ or ""))}


def helped_by_docstring(options: Options) -> Options:
    """Use the option texts in a dataclass's docstring as its `--help`. A percent sign needs no escape."""
    texts = option_texts(options)
    for field in fields(options):
        if field.name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name].replace("%", "%%")})
    return options


def without_secrets(value: Any, placeholder: Callable[[str], Any] = lambda name: f"<{name.upper()}>") -> Any:
    """Replace each text that a nested mapping has under the name of a secret with a placeholder."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: placeholder(name)
        if isinstance(one, str) and _SECRET.search(str(name))
        else without_secrets(one, placeholder)
        for name, one in value.items()
    }


@helped_by_docstring
@dataclass(repr=False)
class TBRMOptions(GRPOConfig):
    r"""
    Options of [`TBRMTrainer`]. Those of `transformers.TrainingArguments` and `trl.GRPOConfig` are inherited.
    `docs/configuration.md` lists which options of `trl.GRPOConfig` are kept, given a meaning, or refused.

    Parameters:
        > Parameters that control the residual

        beta (`float`, *optional*, defaults to `0.002`):
            KL coefficient β of the objective `E[R] − β KL(π‖π_ref)`, in reward units per nat. It must be positive.
        soft_value (`str`, *optional*, defaults to `"policy"`):
            Name of the estimator that computes the value term V of the residual. `"policy"` is TBRM's `V_θ(s_1)`
            (arXiv 2505.15311). `"calibrated"` is `V_θ(s_1) − V_ref(s_1)` (ReVal, arXiv 2603.23355): the residual of the
            untrained model is then `−R/β` instead of `V − R/β`, so choose it unless `1/β` dwarfs V. The others are
            `"group"` (VarGrad, REBEL, CoPG, GVPO), `"log_mean_exp"` (OAPL, Kimi k1.5), `"optimal"` (A*-PO),
            `"quantile"` (QRPO), `"learned"` (DRO-V), `"tracked"` (SPO), `"partition"` (reward partitioning), `"model"`
            (a frozen value model), `"zero"`, and every subclass of [`SoftValue`]. `docs/theory.md` derives the target
            of each.
        soft_value_beta (`float` or `None`, *optional*):
            β₁ of the estimators `"optimal"` and `"log_mean_exp"`. Their value is `β₁ log mean exp(r/β₁)`, in reward
            units. None uses β. `inf` gives the mean of the rewards.
        soft_value_samples (`int`, *optional*, defaults to `8`):
            The estimators `"optimal"` and `"quantile"` draw this many samples of the reference per prompt. It must be a
            multiple of `num_generations`.
        soft_value_drop_unsolved (`bool`, *optional*, defaults to `False`):
            The estimator `"optimal"` drops the prompts for which no sample has a positive reward.
        soft_value_self_normalized (`bool`, *optional*, defaults to `False`):
            The estimator `"partition"` divides its partition function by the reference's mass on the logged
            completions.
        soft_value_offset (`bool`, *optional*, defaults to `False`):
            Add a trained constant to V. It is the same for all states and starts at 0. The squared residual trains it,
            at `soft_value_learning_rate`. It changes no logit. It cannot be combined with `"group"`, whose residuals
            sum to 0, with `"learned"`, which has such a constant, with `residual="token"` or with `fp16`.
        soft_value_learning_rate (`float`, *optional*, defaults to `0.01`):
            Learning rate of the trained part of V outside the policy: the head of the estimator `"learned"`, or the
            constant of `soft_value_offset`. It stays constant and is in reward units: one Adam update moves the
            constant by about this much at most, and the head's value by about twice as much.
        soft_value_half_life (`float`, *optional*, defaults to `0.06`):
            The estimator `"tracked"` halves a prompt's counts when the policy has moved by this KL, in nats per token,
            since the prompt's last window. It keeps at least 0.875 of the counts from one window to the next, or
            `soft_value_kept` if that is less. A new prompt starts from the mean of all prompts, counted as one reward.
            That mean itself begins with one reward of 0.
        soft_value_kept (`float`, *optional*, defaults to `0.96`):
            The estimator `"tracked"` keeps at most this share of a prompt's counts from one window to the next. With a
            smaller share, V follows the policy sooner and is noisier.
        soft_value_tracks (`"reward"` or `"value"`, *optional*, defaults to `"reward"`):
            Quantity that the estimator `"tracked"` averages. `"reward"` is the reward of the policy's own rollouts, as
            in SPO: a baseline that is right only on fresh rollouts. `"value"` is `R − β log π_θ/π_ref` of every
            trajectory that is trained on. V is then a trained number for each prompt and is right on replayed and
            logged trajectories too.
        soft_value_model (`str` or `None`, *optional*):
            Id or folder of the value model that the estimator `"model"` uses: a sequence classifier with one label and
            the policy's vocabulary.
        residual (`"trajectory"` or `"token"`, *optional*, defaults to `"trajectory"`):
            `"trajectory"` takes one residual per trajectory. `"token"` takes the classical Bellman residual of every
            token, which collapses on language models (arXiv 2505.15311, App. H.3). It is meant for ablations and needs
            `soft_value="policy"`.
        length_normalized (`bool`, *optional*, defaults to `False`):
            Divide a trajectory's log-ratio by the number of its actions, as FlowRL does (arXiv 2509.15207, with
            `soft_value="learned"`). β is then in reward units per nat and token, and the target differs: see
            `docs/theory.md`. Only the estimators `"policy"`, `"calibrated"`, `"learned"` and `"group"` allow it.
            It cannot be combined with `residual="token"`, `token_fraction` or `truncation="bootstrap"`.
        truncation (`"terminal"`, `"mask"` or `"bootstrap"`, *optional*, defaults to `"terminal"`):
            How to treat a completion that was cut at the length limit. `"terminal"` treats the cut as any other end,
            with the completion's reward. `"mask"` leaves the completion out of the loss. `"bootstrap"` subtracts the
            soft value of the state after its last token, and takes `truncated_reward` as its reward, whatever the
            reward functions return. Only the estimators `"policy"` and `"calibrated"` allow `"bootstrap"`.
        truncated_reward (`float`, *optional*, defaults to `0.0`):
            Reward of a cut completion under `truncation="bootstrap"`: what it has earned before the cut.
        loss_units (`"reward"` or `"logits"`, *optional*, defaults to `"reward"`):
            `"reward"` squares `β δ`. `"logits"` squares `δ`, the paper's scale: the loss and its gradients are larger
            by `1/β²`, so that `max_grad_norm=1` clips every step. Both have the same minimiser.

        > Parameters that shape the reward

        reward_baseline (`str` or `float`, *optional*, defaults to `"none"`):
            What is subtracted from R when a trajectory is trained on: `"none"`, `"batch_mean"`, the mean reward of the
            generation window, `"group_mean"`, that of its prompt in the window, or a number. A replayed trajectory
            takes the latest mean. A number b with `soft_value="zero"` makes V the constant b/β. Only the estimators
            `"policy"`, `"calibrated"`, `"learned"` and `"zero"` allow a baseline.
        reward_pessimism (`float`, *optional*, defaults to `0.0`):
            Subtract this many standard errors from the sum of the reward functions, where several functions (or one
            listed several times) judge the same thing. R is then a lower confidence bound (after MICRO, arXiv
            2312.03991).

        > Parameters that add terms to the loss

        sft_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `−log π_θ(τ)` on trajectories whose reward reaches `sft_threshold` (arXiv 2405.16436). The term is
            added to `(β δ)²`.
        sft_threshold (`float`, *optional*, defaults to `1.0`):
            Lowest reward, before any baseline, at which `sft_coef` applies.
        entropy_advantage_coef (`float`, *optional*, defaults to `0.0`):
            Weight of an entropy bonus: each trajectory's summed token entropy times its advantage `A = −β δ` (IBRO,
            arXiv 2507.18391). The term is maximised.
        token_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the tokens that the backward pass covers. They are drawn at random and weighted so that the
            gradient is right on average (after arXiv 2504.20834). A share below 1 costs a second forward pass without
            gradient. It cannot be combined with `residual="token"`, `sft_coef`, `entropy_advantage_coef` or
            `length_normalized`.
        token_selection (`"scatter"` or `"cut"`, *optional*, defaults to `"scatter"`):
            How the tokens of `token_fraction` are drawn. `"scatter"` takes a random subset. `"cut"` takes all tokens
            before a random cut and keeps no activation after it; it cannot be combined with `truncation="bootstrap"`.

        > Parameters that control micro-batches

        max_tokens_per_microbatch (`int` or `None`, *optional*):
            Largest number of tokens in a micro-batch, padding included. One update is then
            `per_device_train_batch_size` rows. They are divided into as few micro-batches as hold them. Each has rows
            of similar length, and every process has the same number of micro-batches. A row that is longer than this
            gets a micro-batch of its own. `gradient_accumulation_steps` must be 1. None makes each micro-batch
            `per_device_train_batch_size` rows, and each update `gradient_accumulation_steps` micro-batches.
        padding_free (`bool`, *optional*, defaults to `False`):
            Run the policy and the reference on the real tokens of a micro-batch as one row, without padding. This pays
            with flash attention; with SDPA a row of N tokens has an N × N mask. It cannot be combined with
            `pad_to_multiple_of`.

        > Parameters that control replay

        replay_buffer_size (`int`, *optional*, defaults to `0`):
            Number of trajectories that the first-in-first-out buffer holds, over all processes; 0 means no buffer. A
            window has S fresh updates and `(num_iterations − 1) · S` others. With a buffer, the others train on samples
            of it. Without one, they train on the window's trajectories again. ReVal uses 5120 with `num_iterations=2`.
        replay_max_age (`int` or `None`, *optional*):
            Number of updates after which a trajectory leaves the buffer. None keeps it until its place is needed.
        replay_sampling (`"uniform"` or `"prioritized"`, *optional*, defaults to `"uniform"`):
            `"prioritized"` draws by |residual| (Schaul et al. 2016, arXiv 1511.05952). It cannot be combined with
            `soft_value="group"`.
        replay_priority_exponent (`float`, *optional*, defaults to `0.6`):
            Exponent of |residual| in the probability of being drawn. 0 is uniform.
        replay_priority_correction (`float`, *optional*, defaults to `0.4`):
            Exponent c of the weight `(N P)^-c` on a trajectory's loss, which corrects for drawing some trajectories
            more often.

        > Parameters that control logged trajectories

        logged_fraction (`float` or `None`, *optional*):
            Share of logged trajectories in every generation window, if the training set has both prompts and rows with
            a completion. None takes the share of logged rows in the data set, counting each prompt `num_generations`
            times.
        precompute_ref_log_probs (`bool` or `None`, *optional*):
            If every training row is logged, score them all with the reference before training, keep the scores in
            `output_dir` for the next run, and free the reference. None does so where it is possible.

        > Parameters that control rollouts ahead of training, or beside it

        rollout_pool (`int`, *optional*, defaults to `0`):
            Number of rollouts of coming windows that may be under way or done, over all processes. They take the places
            of rows of a generation that have ended, in the order of the data, so that a window waits only for its own
            rows. A rollout that is under way when the policy is updated continues under the new policy. 0 draws each
            window by itself.
        rollouts (`"sync"` or `"async"`, *optional*, defaults to `"sync"`):
            `"sync"` draws a window, then trains on it. `"async"` starts an actor as a child process. The actor draws
            coming windows from a server while the run trains: see `docs/asynchronous.md`. `"async"` needs `max_steps`.
        follow_rollouts (`str` or `None`, *optional*):
            Folder of rollouts that another program writes, in the format of `docs/asynchronous.md`. The run takes them
            in order as they come and draws none of its own. It needs `max_steps`. None follows no folder, or
            `output_dir/records` with `rollouts="async"`.
        follow_timeout (`float`, *optional*, defaults to `1200.0`):
            Seconds that the run waits for the rollouts of a window before it stops with an error that says what is
            missing.
        max_staleness (`int`, *optional*, defaults to `4`):
            Largest number of updates between the first token of a trajectory and the update that takes it for the first
            time. The actor starts no trajectory that might exceed it. 0 lets the actor draw only the present window. If
            a window has S fresh updates, it must be at least S − 1, which its last update needs.
            Another program that writes rollouts must keep the bound itself. The metric `staleness/max` reports the
            largest value since the last log.
        async_server (`str` or `None`, *optional*):
            Address of the OpenAI-compatible server that the actor draws from, such as `http://localhost:8000`.
        publish_policy (`bool` or `None`, *optional*):
            Write the policy to `output_dir/policy` before training and after every update, for the programs that draw
            from it. None does so with `rollouts="async"`.

        > Parameters that control what is saved

        save_rollouts (`bool`, *optional*, defaults to `False`):
            Write every rollout to `output_dir/rollouts` as Parquet. `load_rollouts` reads them back as a training set.
            Also write the residual and the soft value of each trajectory in each update to `output_dir/updates`.

        > Parameters that control prompts

        max_prompt_length (`int` or `None`, *optional*):
            Largest number of tokens in a prompt, with its chat template. None allows what `max_completion_length`
            leaves of the model's context.
        long_prompts (`"refuse"`, `"drop"` or `"cut"`, *optional*, defaults to `"refuse"`):
            How to treat prompts to roll out that are longer than `max_prompt_length`, or too long for the model's
            context beside `max_completion_length`. `"refuse"` stops with an error that names the first of them, before
            the model is loaded. `"drop"` leaves their rows out of the data sets, and counts them. `"cut"` keeps the
            last tokens of each. A logged row is never dropped or cut, and must only fit the context. Prompts that are
            only known when they are drawn cannot be dropped; of them only those of streams can be cut.

        > Parameters that keep a run alive

        reward_timeout (`float` or `None`, *optional*):
            Seconds that one call of a reward function, with a batch of completions, may take. None waits for ever. With
            a limit, a synchronous function runs in a thread, and a late call is left behind in that thread. An
            asynchronous one is cancelled where it awaits. `tbrm_trl.rewards.InWorkers` runs the function in processes
            that can be ended, with a limit for each completion. A reward model has no limit.
        reward_on_error (`str` or `float`, *optional*, defaults to `"raise"`):
            How to treat the completions of a reward call that raised or was late. `"raise"` ends the run, on every
            process alike. `"skip"` leaves them out of the loss, whatever other functions say of them, and a number
            gives them that reward. Both are counted as `rewards/<function>/raised` and `/late`. A function that returns
            anything but rewards always ends the run, and so does an error in a reward model.

        max_skipped_updates (`int`, *optional*, defaults to `3`):
            Number of skipped updates in a row after which training stops with an error. An update with a loss or a
            gradient that is not finite is skipped: it changes neither the weights nor the optimizer's moments.

        > Parameters that control the reference

        reference (`"initial"` or `"previous"`, *optional*, defaults to `"initial"`):
            `"initial"` uses the model that training starts from. `"previous"` uses the policy that produced the
            trajectory as its reference, as REBEL, Kimi k1.5 and GVPO do.

        > Parameters that control stopping

        stop_timeout (`float`, *optional*, defaults to `300.0`):
            With `enable_jit_checkpoint=True`, SIGTERM and SIGINT stop the run after the update that is under way, with
            a complete checkpoint and exit code 143 or 130. If the update, an evaluation due after it and the checkpoint
            take more than this many seconds after the signal, the update is dropped: the process ends with the same
            code and keeps its last complete checkpoint.

        > Parameters whose defaults differ from GRPOConfig

        num_generations (`int`, *optional*, defaults to `1`):
            Rollouts per prompt. One is enough: nothing is normalised over a group.
        learning_rate (`float`, *optional*, defaults to `2.5e-6`):
            Initial learning rate of the optimizer, as published for Qwen2.5-Math-1.5B.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Dropout is always off, since it biases a squared residual. This option cannot be switched off.
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            TBRM uses no log-probabilities of the sampler, so there is nothing to correct. This option cannot be
            switched on.

    Raises:
        ValueError: for an option that has no meaning here, or for numbers that do not fit together. The error says
            what to change.
    """

    # Wider than the annotation, from which the command line's parser can take one type alone.
    wider_types = MappingProxyType({"reward_baseline": str | float, "reward_on_error": str | float})

    beta: float = 0.002
    soft_value: str = "policy"
    soft_value_beta: float | None = None
    soft_value_samples: int = 8
    soft_value_drop_unsolved: bool = False
    soft_value_self_normalized: bool = False
    soft_value_offset: bool = False
    soft_value_learning_rate: float = 0.01
    soft_value_half_life: float = 0.06
    soft_value_kept: float = 0.96
    soft_value_tracks: str = "reward"
    soft_value_model: str | None = None
    residual: str = "trajectory"
    length_normalized: bool = False
    truncation: str | None = None  # becomes "terminal", or "mask" if TRL's older option sets it
    truncated_reward: float = 0.0
    loss_units: str = "reward"
    reward_baseline: str = "none"
    reward_pessimism: float = 0.0
    sft_coef: float = 0.0
    sft_threshold: float = 1.0
    entropy_advantage_coef: float = 0.0
    token_fraction: float = 1.0
    token_selection: str = "scatter"
    max_tokens_per_microbatch: int | None = None
    padding_free: bool = False
    replay_buffer_size: int = 0
    replay_max_age: int | None = None
    replay_sampling: str = "uniform"
    replay_priority_exponent: float = 0.6
    replay_priority_correction: float = 0.4
    logged_fraction: float | None = None
    precompute_ref_log_probs: bool | None = None
    rollout_pool: int = 0
    rollouts: str = "sync"
    follow_rollouts: str | None = None
    follow_timeout: float = 1200.0
    max_staleness: int = 4
    async_server: str | None = None
    publish_policy: bool | None = None
    save_rollouts: bool = False
    max_prompt_length: int | None = None
    long_prompts: str = "refuse"
    reward_timeout: float | None = None
    reward_on_error: str = "raise"
    max_skipped_updates: int = 3
    reference: str = "initial"
    stop_timeout: float = 300.0
    num_generations: int = 1
    learning_rate: float = 2.5e-6
    disable_dropout: bool = True
    vllm_importance_sampling_correction: bool = False

    @property
    def rows_per_device(self) -> int:
        """Trajectories of one optimizer step, on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def data_order_seed(self) -> int:
        """Seed of the order of prompts and logged rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def rows_per_update(self) -> int:
        """Trajectories of one optimizer step, over all processes."""
        return self.rows_per_device * self.world_size

    @property
    def microbatch_size(self) -> MicrobatchSize:
        """The largest batch of one forward pass of training."""
        return MicrobatchSize(
            self.per_device_train_batch_size,
            self.max_tokens_per_microbatch,
            self.padding_free,
            self.pad_to_multiple_of,
        )

    @property
    def fresh_updates(self) -> int:
        """Number of updates of a generation window that take its trajectories for the first time."""
        return self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def followed_folder(self) -> Path | None:
        """The folder of rollouts that other processes draw; None if this run draws its own."""
        if self.follow_rollouts is not None:
            return Path(self.follow_rollouts)
        return Path(self.output_dir) / "records" if self.rollouts == "async" else None

    @property
    def draws_prompts(self) -> bool:
        """Whether this run or its actor draws rollouts of the training set's prompts."""
        return self.follow_rollouts is None

    @property
    def publishes_policy(self) -> bool:
        """Whether the run writes the policy for the programs that draw from it."""
        return self.rollouts == "async" if self.publish_policy is None else self.publish_policy

    @property
    def hub_options(self) -> dict[str, Any]:
        """Which files and code a model, named by its id or folder, is loaded from."""
        revision = (self.model_init_kwargs or {}).get("revision")
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}

    @property
    def draws_from_server(self) -> bool:
        """Whether a vLLM server generates, for all processes together."""
        return self.use_vllm and self.vllm_mode == "server"

    @property
    def draws_from_own_engine(self) -> bool:
        """Whether vLLM generates inside the training processes."""
        return self.use_vllm and self.vllm_mode == "colocate"

    def reward_of(self, trajectory: Trajectory) -> float:
        """R(τ) before a baseline. `truncation="bootstrap"` ignores the reward functions' score of a cut completion."""
        return self.truncated_reward if self.is_bootstrapped(trajectory) else trajectory.reward

    def left_out(self, trajectory: Trajectory) -> str | None:
        """Why a trajectory counts neither in the loss nor for V or a baseline; None if it counts there."""
        if math.isnan(self.reward_of(trajectory)):
            return "unscored"
        if self.truncation == "mask" and trajectory.end is End.LENGTH:
            return "truncated"
        return None if trajectory.loss_mask.any() else "no_action"

    def rewards_that_count(self, trajectories: Iterable[Trajectory]) -> list[float]:
        """R(τ) of the trajectories that are not left out."""
        return [self.reward_of(one) for one in trajectories if self.left_out(one) is None]

    def is_bootstrapped(self, trajectory: Trajectory) -> bool:
        """Whether V of the state at the cut replaces what a cut trajectory would have earned after it."""
        return self.truncation == "bootstrap" and trajectory.end is End.LENGTH

    @property
    def baseline(self) -> str | float:
        """`reward_baseline`, as a number if it is one: a command line gives text."""
        return self.reward_baseline if self.reward_baseline in BASELINES else float(self.reward_baseline)

    @property
    def reward_of_failure(self) -> float:
        """The reward of a completion from a reward function that failed; NaN if its verdict is unknown."""
        return math.nan if self.reward_on_error in ("raise", "skip") else float(self.reward_on_error)

    def sampling_filters(self) -> dict[str, Any]:
        """The options that make the sampler's distribution differ from softmax(logits / temperature)."""
        chosen = {name: getattr(self, name) for name in _SAMPLING_FILTERS}
        chosen |= {name: value for name, value in (self.generation_kwargs or {}).items() if name not in HARMLESS}
        off = {name: type(self).__dataclass_fields__[name].default for name in _SAMPLING_FILTERS}
        off |= {"temperature": self.temperature, "do_sample": True}
        if self.vllm_structured_outputs_regex:
            chosen["vllm_structured_outputs_regex"] = self.vllm_structured_outputs_regex
        return {name: value for name, value in chosen.items() if value is not None and value != off.get(name)}

    def settings(self) -> dict[str, Any]:
        """The options that decide how a run goes on, without secrets, as a checkpoint stores them."""
        declared = [*TBRMOptions.__annotations__, *GRPOConfig.__annotations__, *_OF_THE_RUN]
        names = [name for name in dict.fromkeys(declared) if not _NOT_OF_THE_RUN.match(name)]
        return without_secrets({name: getattr(self, name) for name in names if name in type(self).__dataclass_fields__})

    def __repr__(self) -> str:
        shown = without_secrets({one.name: getattr(self, one.name) for one in fields(self) if one.repr})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        return without_secrets(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        """The pickled state, also that of `training_args.bin`, without secrets."""
        return without_secrets(self.__dict__, lambda name: None)

    def __copy__(self) -> Any:
        return self._with(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, attributes: dict[str, Any]) -> Any:
        """Make a copy in memory with these attributes. It keeps its secrets."""
        made = object.__new__(type(self))
        made.__dict__.update(attributes)
        return made

    def is_default(self, name: str) -> bool:
        """Whether an option has its default value."""
        return getattr(self, name) == type(self).__dataclass_fields__[name].default
