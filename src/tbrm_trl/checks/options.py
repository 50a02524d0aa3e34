"""Checks of options, which refuse those without a meaning here, and numbers that do not fit together.

Each check yields its refusals one by one, so that `TBRMConfig` can name all of them in one error.
"""

import math
from collections.abc import Collection, Iterator
from threading import TIMEOUT_MAX
from typing import Any

from transformers import GenerationConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..field_types import fits, in_words
from ..loss.soft_value import SoftValue
from ..loss.soft_value.sampled import SampledValue
from ..options import BASELINES, HARMLESS, TBRMOptions
from ..sources.bounds import Bounds
from ..trajectory import largest_return
from .trl_options import REFUSED

CHOICES = {
    "long_prompts": ("refuse", "drop", "cut"),
    "loss_units": ("reward", "logits"),
    "reference": ("initial", "previous"),
    "replay_sampling": ("uniform", "prioritized"),
    "rollouts": ("sync", "async"),
    "residual": ("trajectory", "token"),
    "soft_value_tracks": ("reward", "value"),
    "token_selection": ("scatter", "cut"),
    "truncation": ("terminal", "mask", "bootstrap"),
}

COUNTS = (
    "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "max_completion_length",
    "generation_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size",
    "per_device_eval_batch_size",
)  # fmt: skip
_LENGTHS = ("max_new_tokens", "max_length", "max_tokens", "max_completion_tokens", "max_time")

# Generation options that both transformers and vLLM's server know.
_OF_BOTH = frozenset(("length_penalty", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"))


def check_types(args: TBRMOptions) -> Iterator[str]:
    """Refuse values that are not of their option's type. A recipe may hold anything, and its parser lets it pass.

    All other checks may then compare numbers.
    """
    for name, declared in (TBRMOptions.__annotations__ | TBRMOptions.wider_types).items():
        if not fits(value := getattr(args, name), declared):
            yield f"`{name}={value!r}` is refused: it must be {in_words(declared)}."
    by_name = TBRMOptions.__annotations__.keys() | {"beta", "learning_rate"}  # other checks know them
    for name, value in vars(args).items():
        if name not in by_name and isinstance(value, float) and math.isnan(value):
            yield f"`{name}=nan` is refused: it is no number."


def check_meaning(args: TBRMOptions) -> Iterator[str]:
    for name, reason in REFUSED.items():
        if not args.is_default(name):
            default = type(args).__dataclass_fields__[name].default
            yield (f"`{name}={getattr(args, name)!r}` has no meaning for TBRM: {reason}. Leave it at {default!r}.")
    if not args.disable_dropout:
        yield (
            "`disable_dropout=False` is refused: a log-probability with noise ε gives E(δ+ε)² = δ² + Var ε, so "
            "dropout biases the squared residual. Leave it at True."
        )
    if args.neftune_noise_alpha:
        yield (
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` is refused: a log-probability with noise ε gives "
            "E(δ+ε)² = δ² + Var ε, so noisy embeddings bias the squared residual. Leave it at None."
        )

    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            yield (
                f"`{name}=True` is refused: an evaluation would leave the weights in half precision, and small updates "
                "are lost in it. Leave it out; `bf16=True` evaluates in bfloat16 too."
            )
    if args.dataloader_persistent_workers:
        yield (
            "`dataloader_persistent_workers=True` is refused: transformers keeps the loader of a first evaluation for "
            "later ones, of whatever set. Leave it out; loading rows takes no time beside rollouts."
        )
    if not args.dataloader_in_order:
        yield (
            "`dataloader_in_order=False` is refused: the sampler names the rows of windows one after the other, and "
            "another order would repeat some windows and lose others. Leave it at True."
        )
    if args.dataloader_drop_last:
        yield (
            "`dataloader_drop_last=True` is refused: evaluations would leave out the rows of the last batch. Leave it "
            "at False; windows are always full."
        )
    if args.label_smoothing_factor:
        yield (
            f"`label_smoothing_factor={args.label_smoothing_factor}` is refused: there are no labels to smooth. Leave "
            "it at 0."
        )
    if args.train_sampling_strategy != "random":
        yield (
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` is refused: windows have a sampler of their "
            "own. For the order of the data set use `shuffle_dataset=False`."
        )


def check_report_to(args: TBRMOptions) -> Iterator[str]:
    """Refuse trackers that are not installed. A configuration may name them where no run is made."""
    named = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    not_installed = INTEGRATION_TO_CALLBACK.keys() - {"flyte", *get_available_reporting_integrations()}
    if absent := [name for name in named if name in not_installed]:
        yield f"`report_to` names {', '.join(absent)}, which is not installed. Install it, or leave it out."


def check_model_kwargs(args: TBRMOptions) -> Iterator[str]:
    """Refuse a spelling that TRL ignores, since it adds a `dtype` of its own."""
    if isinstance(args.model_init_kwargs, dict) and "torch_dtype" in args.model_init_kwargs:
        dtype = args.model_init_kwargs["torch_dtype"]
        yield f"`model_init_kwargs` with torch_dtype={dtype!r} is refused: TRL would ignore it. Write it as `dtype`."


def too_small(args: TBRMOptions) -> dict[str, int]:
    """The counts below 1, by option."""
    return {name: count for name in COUNTS if (count := getattr(args, name)) is not None and count < 1}


def check_residual_options(args: TBRMOptions) -> Iterator[str]:
    if not 0 < args.beta < math.inf:
        yield (
            f"`beta={args.beta}` is refused: the residual V + log-ratio − R/β divides by it. Use about 0.02 for "
            "responses of some hundred tokens and 0.002 near 5,000, times the range of the rewards."
        )
    if not 0 <= args.learning_rate < math.inf:
        yield f"`learning_rate={args.learning_rate}` must be 0 or positive, and finite."
    if not 0 < args.temperature < math.inf:
        yield (f"`temperature={args.temperature}` is refused: the policy is softmax(logits / temperature).")
    for name, allowed in {**CHOICES, "soft_value": tuple(SoftValue.registry)}.items():
        if getattr(args, name) not in allowed:
            yield (f"`{name}={getattr(args, name)!r}` is unknown. Choose one of {', '.join(allowed)}.")
    if not _is_among(BASELINES, args.reward_baseline):
        yield (
            f"`reward_baseline={args.reward_baseline!r}` is unknown. Choose one of {', '.join(BASELINES)}, or a finite "
            "number."
        )
    for name, count in too_small(args).items():
        yield f"`{name}={count}` is refused: it must be at least 1."


def check_generation(args: TBRMOptions) -> Iterator[str]:
    """Refuse generation options that change what an action is, or that a backend would ignore."""
    if args.max_completion_length is None:
        yield "`max_completion_length=None` is refused: completions are cut somewhere. Set the tokens of the longest."
    given = args.generation_kwargs or {}
    ends = [n for n in given if n.startswith("stop") or n in ("pad_token_id", "ignore_eos") or "eos_token_id" in n]
    if ends:
        yield (
            f"`generation_kwargs` with {', '.join(ends)} is refused: completions would end where trajectories, "
            "truncation and logs do not know of an end. Set the end tokens in the model's `generation_config` "
            "(model.generation_config.eos_token_id, or the file beside the weights)."
        )
    if lengths := [name for name in given if name in _LENGTHS]:
        yield (
            f"`generation_kwargs` with {', '.join(lengths)} is refused: where completions end, and the room that they "
            "leave for prompts, follow from `max_completion_length`. Set that one."
        )
    if returned := [n for n in given if n.startswith(("return_", "output_")) or n in ("num_return_sequences", "n")]:
        yield (
            f"`generation_kwargs` with {', '.join(returned)} is refused: each prompt of a window gets one completion. "
            "Use `num_generations` for several, and leave these out."
        )
    if args.publishes_policy:
        if foreign := [name for name in given if hasattr(GenerationConfig(), name) and name not in _OF_BOTH]:
            yield (
                f"`generation_kwargs` with {', '.join(foreign)} is refused: rollouts are drawn by a server, which does "
                "not know transformers' names and would ignore them. Give its own (vLLM: `min_tokens` for "
                "`min_new_tokens`), or leave them out."
            )
    elif not args.use_vllm and (unknown := [name for name in given if not hasattr(GenerationConfig(), name)]):
        yield (
            f"`generation_kwargs` with {', '.join(unknown)} is refused: transformers' GenerationConfig has no such "
            "field, and would ignore it. Correct the name, or leave it out."
        )
    if args.use_transformers_continuous_batching:
        ignored = {name: value for name, value in given.items() if name not in HARMLESS}
        if args.repetition_penalty != 1.0:
            ignored["repetition_penalty"] = args.repetition_penalty
        if ignored:
            yield (
                f"{ignored} with `use_transformers_continuous_batching=True` is refused: transformers ignores these "
                "there, or fails in the middle of a generation. Leave them out, or generate without it."
            )


def broken_groups(args: TBRMOptions) -> str:
    rows, batch, group = (
        args.per_device_train_batch_size * args.world_size,
        args.generation_batch_size,
        args.num_generations,
    )
    unit = math.lcm(rows, group) if batch % rows == 0 and batch != rows else group
    fits = [size for size in (batch - batch % unit, batch - batch % unit + unit) if size]
    return (
        f"A generation of {batch} rollouts (generation_batch_size, or per_device_train_batch_size "
        f"{args.per_device_train_batch_size} × {args.world_size} processes × steps_per_generation "
        f"{args.steps_per_generation}) does not hold whole groups of num_generations={group}. Make it "
        f"{' or '.join(map(str, fits))}, or use num_generations=1."
    )


def check_batch_arithmetic(args: TBRMOptions) -> Iterator[str]:
    if args.accelerator_config.split_batches:
        yield (
            "`accelerator_config` with `split_batches=True` is refused: each process would get a part of the rows that "
            "the sampler names for it, and other rows would never be drawn. Leave it out."
        )
    if not args.accelerator_config.even_batches and args.world_size > 1:
        yield (
            "`accelerator_config` with `even_batches=False` is refused: a process with fewer rows would leave an "
            "evaluation early, and the others would wait for it. Leave it out; rows that fill up count once."
        )
    steps = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1)
    if steps != 1:  # transformers itself writes 1
        yield (
            f"`accelerator_config` with `gradient_accumulation_kwargs={{'num_steps': {steps}}}` is refused: "
            f"transformers would take it in place of gradient_accumulation_steps={args.gradient_accumulation_steps} "
            f"when windows are planned already. Set gradient_accumulation_steps={steps}."
        )
    if (parallelism := args.parallelism_config) is not None and parallelism.tp_size > 1:
        yield (
            f"`parallelism_config` with tp_size={parallelism.tp_size} is refused: windows are divided among all "
            "processes, and those that share tensors would need the same rows. Use FSDP2 or ZeRO-3."
        )
    generation, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
    if generation % accumulation:
        down, up = generation - generation % accumulation, generation + accumulation - generation % accumulation
        choices = " or ".join(str(steps) for steps in (down, up) if steps)
        yield (
            f"steps_per_generation={generation} is not a multiple of gradient_accumulation_steps={accumulation}: "
            f"an optimizer step would mix two generations. Set steps_per_generation to {choices} (or "
            f"generation_batch_size to {choices} × {args.per_device_train_batch_size * args.world_size}), or "
            f"gradient_accumulation_steps to a divisor of {generation}."
        )


def _is_among(words: Collection[str], value: Any) -> bool:
    """Whether a value is one of the words, or a finite number, which may be written as text."""
    try:
        return value in words or math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def check_reward_calls(args: TBRMOptions) -> Iterator[str]:
    if not _is_among(("raise", "skip"), args.reward_on_error):
        yield (
            f"`reward_on_error={args.reward_on_error!r}` is unknown. Choose 'raise', 'skip', or a finite number, the "
            "reward of what failed."
        )
    limit = args.reward_timeout
    if limit is not None and not 0 < limit <= TIMEOUT_MAX:
        yield f"`reward_timeout={limit}` must be positive and at most {TIMEOUT_MAX:.0f}, or None to wait for ever."
    if limit is not None and args.world_size > 1 and limit >= args.ddp_timeout:
        yield (
            f"`reward_timeout={limit}` is not below `ddp_timeout={args.ddp_timeout}`: the other processes would give "
            "up waiting before it is reached. Raise ddp_timeout, or lower reward_timeout."
        )


def check_prompt_options(args: TBRMOptions) -> Iterator[str]:
    if args.logged_fraction is not None and not 0 <= args.logged_fraction <= 1:
        yield f"`logged_fraction={args.logged_fraction}` must lie between 0 and 1, or be None."
    if args.max_prompt_length is not None and args.max_prompt_length < 1:
        yield f"`max_prompt_length={args.max_prompt_length}` must be at least 1, or None for the model's context."


def check_skipping(args: TBRMOptions) -> Iterator[str]:
    if args.max_skipped_updates < 1:
        yield f"`max_skipped_updates={args.max_skipped_updates}` must be at least 1."
    if args.optim.endswith("layerwise") or args.optim in ("lomo", "adalomo"):
        yield (
            f"`optim={args.optim.value!r}` is refused: it steps in every backward, so that an update that turns out "
            "not to be finite has reached the weights, and an update of several micro-batches is several. Use another "
            "optimizer."
        )


def check_microbatches(args: TBRMOptions) -> Iterator[str]:
    tokens = args.max_tokens_per_microbatch
    if tokens is None:
        return
    if tokens < 1:
        yield (f"`max_tokens_per_microbatch={tokens}` must be at least 1, or None for a number of rows.")
    if args.gradient_accumulation_steps > 1:
        yield (
            f"`max_tokens_per_microbatch={tokens}` divides an update into micro-batches itself: set "
            f"gradient_accumulation_steps=1 and per_device_train_batch_size={args.rows_per_device}, the rows of an "
            "update on each device. (steps_per_generation then counts updates.)"
        )


def check_soft_value(args: TBRMOptions) -> Iterator[str]:
    estimator = SoftValue.registry[args.soft_value]
    for other in SoftValue.registry.values():
        for name in other.options - estimator.options:
            if hasattr(args, name) and not args.is_default(name):  # a user's estimator may have options elsewhere
                yield (
                    f"`{name}={getattr(args, name)!r}` has no effect with `soft_value={args.soft_value!r}`; it "
                    f"belongs to {', '.join(n for n, one in SoftValue.registry.items() if name in one.options)}."
                )
    if absent := sorted(name for name in estimator.options if not hasattr(args, name)):
        yield (
            f"`soft_value={args.soft_value!r}` reads {', '.join(absent)}, which {type(args).__name__} does not have. "
            "Add the field to a dataclass that subclasses TBRMConfig."
        )
        return
    if args.reward_baseline != "none" and not estimator.takes_baseline:
        yield (
            f"`reward_baseline={args.reward_baseline!r}` with `soft_value={args.soft_value!r}` is refused: it takes no "
            "baseline (`takes_baseline`). From a value made of rewards, a baseline would be taken off twice. Use "
            "'none'."
        )
    yield from _check_trained_value(args, estimator)
    yield from _check_normalization(args, estimator)
    if args.truncation == "bootstrap" and not estimator.bootstraps:
        able = [name for name, one in SoftValue.registry.items() if one.bootstraps]
        yield (
            f'`truncation="bootstrap"` with `soft_value={args.soft_value!r}` is refused: it gives no value of the '
            f"state after the cut (`bootstraps`). Use {' or '.join(able)}, or truncation='mask'."
        )
    try:
        estimator.check(args)
    except ValueError as refusal:
        yield str(refusal)


def _check_trained_value(args: TBRMOptions, estimator: type[SoftValue]) -> Iterator[str]:
    if not (args.soft_value_offset or args.soft_value == "learned"):
        if not args.is_default("soft_value_learning_rate"):
            yield (
                f"`soft_value_learning_rate={args.soft_value_learning_rate}` has no effect with "
                f'`soft_value={args.soft_value!r}`: nothing of V is trained beside the policy. Use "learned", or set '
                "`soft_value_offset=True`."
            )
        return
    if not 0 < args.soft_value_learning_rate < math.inf:
        yield f"`soft_value_learning_rate={args.soft_value_learning_rate}` must be positive and finite."
    if args.fp16:
        trained = "soft_value_offset=True" if args.soft_value_offset else 'soft_value="learned"'
        yield (
            f"`fp16=True` with `{trained}` is refused: the loss scale would reach the gradient of V. Use bf16=True, or "
            "full precision."
        )
    if args.soft_value_offset and estimator.compares == "ratios":
        yield (
            f"`soft_value_offset=True` with `soft_value={args.soft_value!r}` is refused: a group's residuals sum to 0, "
            "and so does the gradient of a constant. Leave it at False."
        )
    if args.soft_value_offset and args.residual == "token":
        yield (
            '`soft_value_offset=True` with `residual="token"` is refused: a constant cancels between two states. Leave '
            "it at False."
        )


def _check_normalization(args: TBRMOptions, estimator: type[SoftValue]) -> Iterator[str]:
    if not args.length_normalized:
        return
    if estimator.gives_constants or args.soft_value == "zero":
        yield (
            f"`length_normalized=True` with `soft_value={args.soft_value!r}` is refused: that is a constant made for "
            'the sum of a trajectory\'s log-ratios, and another V belongs to their mean. Use "learned", "policy", '
            '"calibrated" or "group".'
        )
    for name, beside in (
        ("residual", args.residual == "token"),
        ("truncation", args.truncation == "bootstrap"),
        ("token_fraction", args.token_fraction < 1),
    ):
        if beside:
            yield (
                f"`length_normalized=True` with `{name}={getattr(args, name)!r}` is refused: that needs the sum of a "
                "trajectory's log-ratios. Use one of the two."
            )


def check_groups(args: TBRMOptions, window_group_size: int, update_group_size: int) -> Iterator[str]:
    group = args.num_generations
    if args.reward_baseline == "batch_mean" and args.generation_batch_size == 1:
        yield (
            "`reward_baseline='batch_mean'` with one trajectory in a generation window is refused: its own reward "
            "would be its baseline, and no reward could be learned from. Raise per_device_train_batch_size or "
            "steps_per_generation, or use 'none'."
        )
    if SoftValue.registry[args.soft_value].compares:
        who = f"soft_value={args.soft_value!r}"
    elif args.reward_baseline == "group_mean":
        who = "reward_baseline='group_mean'"
    else:
        return
    if group == 1:
        yield (
            f"`{who}` compares the trajectories of a prompt: with num_generations=1 each would be compared with "
            "itself, and no reward could be learned from. Use 2 or more."
        )
    if args.num_generations_eval == 1:
        yield (
            f"`num_generations_eval=1` with `{who}` is refused: the trajectories of a prompt are compared in "
            "evaluation too, and one alone would be compared with itself. Use 2 or more, or leave it at None."
        )
    for group_size, steps, name in (
        (window_group_size, args.steps_per_generation, "steps_per_generation"),
        (update_group_size, args.gradient_accumulation_steps, "gradient_accumulation_steps"),
    ):
        rows = args.per_device_train_batch_size * steps
        if rows % group_size:
            yield (
                f"`{who}` needs the {group} trajectories of a prompt on one process, but {rows} rows "
                f"(per_device_train_batch_size {args.per_device_train_batch_size} × {name} {steps}) are not whole "
                f"groups of num_generations={group}. Make that product a multiple of {group}."
            )


def check_terms(args: TBRMOptions) -> Iterator[str]:
    for name in ("sft_coef", "entropy_advantage_coef", "reward_pessimism"):
        if not 0 <= getattr(args, name) < math.inf:
            yield (f"`{name}={getattr(args, name)}` must be 0 (off) or positive, and finite.")
    largest = largest_return(args.beta) if 0 < args.beta < math.inf else math.inf
    if not (math.isfinite(args.truncated_reward) and abs(args.truncated_reward) <= largest):
        yield f"`truncated_reward={args.truncated_reward}` must be a finite number, at most {largest:g} with this beta."
    if _is_among(BASELINES, args.reward_baseline) and isinstance(b := args.baseline, float) and not abs(b) <= largest:
        yield f"`reward_baseline={args.reward_baseline}` is refused: with this beta, numbers go up to {largest:g}."
    if not math.isfinite(args.sft_threshold):
        yield f"`sft_threshold={args.sft_threshold}` must be a finite number."
    if not 0 < args.token_fraction <= 1:
        yield (f"`token_fraction={args.token_fraction}` must lie in (0, 1].")
    if args.residual == "token" and (args.soft_value != "policy" or args.truncation == "bootstrap"):
        yield ('`residual="token"` takes V_θ of every state: it needs `soft_value="policy"`, and no bootstrap.')
    if args.token_fraction < 1:
        for name, beside in (
            ("residual", args.residual == "token"),
            ("sft_coef", args.sft_coef),
            ("entropy_advantage_coef", args.entropy_advantage_coef),
            ("truncation", args.truncation == "bootstrap" and args.token_selection == "cut"),
        ):
            if beside:
                yield (
                    f"`token_fraction={args.token_fraction}` with `{name}={getattr(args, name)!r}` is refused: "
                    "that needs the gradient of every token. Use one of the two."
                )
    for name, beside in (("sft_threshold", args.sft_coef), ("token_selection", args.token_fraction < 1)):
        if not (beside or args.is_default(name)):
            needed = {"sft_threshold": "sft_coef", "token_selection": "token_fraction"}[name]
            yield (f"`{name}={getattr(args, name)!r}` has no effect without `{needed}`. Set that too.")
    if args.reward_weights is not None and not all(map(math.isfinite, args.reward_weights)):
        yield f"`reward_weights={args.reward_weights}` must be finite numbers."
    if args.reward_weights is not None and not any(args.reward_weights):
        yield (
            f"`reward_weights={args.reward_weights}` is refused: every reward would be 0, and none could be learned "
            "from. Give one function a weight, or None for 1.0 each."
        )
    if args.reward_pessimism and args.reward_weights and min(args.reward_weights) <= 0:
        yield (
            "`reward_pessimism` reads the reward functions as verdicts on one thing, so `reward_weights` must be "
            "positive."
        )


def check_stop(args: TBRMOptions) -> Iterator[str]:
    if not 0 < args.stop_timeout <= TIMEOUT_MAX:
        yield (f"`stop_timeout={args.stop_timeout}` must be a positive number of seconds, at most {TIMEOUT_MAX:.0f}.")
    if not (args.enable_jit_checkpoint or args.is_default("stop_timeout")):
        yield (f"`stop_timeout={args.stop_timeout}` has no effect without `enable_jit_checkpoint=True`. Set that too.")
    if args.enable_jit_checkpoint and args.dataloader_num_workers:
        yield (
            f"`enable_jit_checkpoint=True` with `dataloader_num_workers={args.dataloader_num_workers}` is refused: "
            "Ctrl-C, and a scheduler's SIGTERM, also end the data loader's processes, and the run would fail before "
            "its checkpoint. Leave dataloader_num_workers at 0; loading rows takes no time beside rollouts."
        )


def check_reference(args: TBRMOptions) -> Iterator[str]:
    if not args.sync_ref_model:
        return
    if args.reference == "previous":
        yield (
            '`sync_ref_model=True` with `reference="previous"` is refused: the previous policy is the reference '
            "already. Use one of the two."
        )
    if args.precompute_ref_log_probs:
        yield (
            "`precompute_ref_log_probs=True` with `sync_ref_model=True` is refused: scores that were computed once "
            "would go stale at the first sync. Use one of the two."
        )
    if args.save_on_each_node:
        yield (
            "`save_on_each_node=True` with `sync_ref_model=True` is refused: the moved reference is saved on the first "
            "machine alone, and the others could not resume. Write to a shared folder, and leave it at False."
        )
    if not (0 < args.ref_model_mixup_alpha <= 1 and args.ref_model_sync_steps >= 1):
        yield (
            f"`ref_model_mixup_alpha={args.ref_model_mixup_alpha}` must lie in (0, 1], and "
            f"`ref_model_sync_steps={args.ref_model_sync_steps}` must be at least 1."
        )


def check_padding(args: TBRMOptions) -> Iterator[str]:
    if args.padding_free and args.pad_to_multiple_of is not None:
        yield (
            f"`pad_to_multiple_of={args.pad_to_multiple_of}` has no meaning with `padding_free=True`, where nothing is "
            "padded. Leave it at None, or padding_free at False."
        )


def check_rollout_pool(args: TBRMOptions) -> Iterator[str]:
    size = args.rollout_pool
    if size < 0 or size % args.world_size:
        yield (
            f"`rollout_pool={size}` must be 0 or a positive multiple of the {args.world_size} process(es): each runs "
            "equally far ahead."
        )
    if not size:
        return
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            yield (
                f"`rollout_pool={size}` with `{name}=True` is refused: the pool decodes with the policy's own forward. "
                f"Use {name}=False, or no pool."
            )


def check_drawing_ahead(args: TBRMOptions) -> Iterator[str]:
    """Refuse options that need the one policy that drew a rollout, if several may have drawn it."""
    given = drawn_ahead(args)
    if given is None:
        return
    for name, wanted, reason in (
        ("reference", "initial", "a rollout that several policies have drawn has no previous one"),
        ("replay_max_age", None, "rollouts enter the buffer out of the order of their ages"),
    ):
        if getattr(args, name) != wanted:
            yield (
                f"`{given}` with `{name}={getattr(args, name)!r}` is refused: {reason}. Use {name}={wanted!r}, or "
                f"leave {given.partition('=')[0]} at its default."
            )


def check_following(args: TBRMOptions) -> Iterator[str]:
    given = _following(args)
    if given is None:
        for name in ("follow_timeout", "max_staleness", "async_server"):
            if not args.is_default(name):
                yield (
                    f"`{name}={getattr(args, name)!r}` has no effect where a run draws its own rollouts. Set "
                    "rollouts='async' or follow_rollouts, or leave it at its default."
                )
        return
    try:
        Bounds(
            args.generation_batch_size, args.fresh_updates, args.fresh_updates * args.num_iterations, args.max_staleness
        )
    except ValueError as refusal:
        yield str(refusal)
    if not 0 < args.follow_timeout <= TIMEOUT_MAX:
        yield f"`follow_timeout={args.follow_timeout}` must be a positive number of seconds, at most {TIMEOUT_MAX:.0f}."
    if args.max_steps <= 0:
        yield (
            f"`{given}` needs `max_steps`: rollouts come as long as others draw them, so that an epoch has no "
            "end. Set max_steps to the number of updates; the schedule of the learning rate runs over them."
        )
    if args.rollouts == "async" and args.follow_rollouts is not None:
        yield (
            f"`rollouts='async'` with `{given}` is refused: the run's actor writes to a folder of its own, "
            "OUTPUT_DIR/records. Leave out follow_rollouts, or set rollouts='sync' to take the rollouts of that folder."
        )
    if args.rollouts == "async" and args.publish_policy is False:
        yield (
            "`rollouts='async'` with `publish_policy=False` is refused: the actor draws from the policy's published "
            "versions. Leave publish_policy at its default."
        )
    if args.rollouts == "async" and args.async_server is None:
        yield (
            "`rollouts='async'` needs `async_server`, the address of the server that rollouts are drawn from, such as "
            "http://localhost:8000. docs/asynchronous.md says how it is started."
        )
    if args.async_server is not None and not args.async_server.startswith(("http://", "https://")):
        yield f"`async_server={args.async_server!r}` must begin with http:// or https://."
    if args.rollouts == "async" and args.use_vllm:
        yield (
            "`rollouts='async'` with `use_vllm=True` is refused: the actor asks the server of `async_server`, and TRL "
            "would set up another. Set use_vllm=False."
        )
    if args.rollout_pool:
        yield (
            f"`{given}` with `rollout_pool={args.rollout_pool}` is refused: either this run draws rollouts "
            "ahead, or others do. Use one of the two."
        )
    if issubclass(SoftValue.registry[args.soft_value], SampledValue):
        yield (
            f"`{given}` with `soft_value={args.soft_value!r}` is refused: its constant belongs to a row of the "
            "training set, and a followed rollout does not name one. Use calibrated or group."
        )
    if args.world_size > 1 and args.follow_timeout >= args.ddp_timeout:
        yield (
            f"`follow_timeout={args.follow_timeout}` is not below `ddp_timeout={args.ddp_timeout}`: the other "
            "processes would give up waiting before it is reached. Raise ddp_timeout, or lower follow_timeout."
        )


def drawn_ahead(args: TBRMOptions) -> str | None:
    """The option, as given, that lets earlier policies draw rollouts; None if the current policy draws all."""
    return f"rollout_pool={args.rollout_pool}" if args.rollout_pool else _following(args)


def _following(args: TBRMOptions) -> str | None:
    """The option, as given, that lets others draw the rollouts; None if the run draws its own."""
    if args.follow_rollouts is not None:
        return f"follow_rollouts={args.follow_rollouts!r}"
    return "rollouts='async'" if args.rollouts == "async" else None


def check_replay(args: TBRMOptions, update_group_size: int) -> Iterator[str]:
    size, rows = args.replay_buffer_size, args.rows_per_update
    if size == 0:
        for name in (
            "replay_max_age",
            "replay_sampling",
            "replay_priority_exponent",
            "replay_priority_correction",
        ):
            if not args.is_default(name):
                yield (f"`{name}={getattr(args, name)!r}` needs a buffer: set `replay_buffer_size`.")
        return
    if size < rows:
        yield (
            f"`replay_buffer_size={size}` is smaller than one update of {rows} trajectories "
            f"({args.per_device_train_batch_size} per device × {args.world_size} process(es) × "
            f"{args.gradient_accumulation_steps} accumulation): no replay update could ever be filled. Set it to "
            f"{rows} or more, or to 0 for no buffer."
        )
    if size % args.world_size:
        yield (
            f"`replay_buffer_size={size}` does not divide over {args.world_size} processes: each holds a shard of "
            f"one size. Use {size - size % args.world_size + args.world_size}."
        )
    if update_group_size > 1:
        if args.replay_sampling == "prioritized":
            yield (
                f'`replay_sampling="prioritized"` draws single trajectories, and `soft_value={args.soft_value!r}` '
                'needs whole groups. Use "uniform".'
            )
        if size // args.world_size % args.num_generations:
            yield (
                f"`replay_buffer_size={size}` over {args.world_size} process(es) does not hold whole groups of "
                f"num_generations={args.num_generations}. Make it a multiple of "
                f"{args.num_generations * args.world_size}."
            )
    if args.residual == "token":
        yield (
            '`replay_buffer_size` with `residual="token"` is refused: the buffer keeps the sum of the reference\'s '
            "log-probabilities, and this residual takes each of them. Use one of the two."
        )
    if args.num_iterations == 1:
        yield (
            "`replay_buffer_size` has no effect with `num_iterations=1`, whose only update takes the fresh "
            "trajectories. Use 2 or more, or no buffer."
        )
    if args.replay_max_age is not None and args.replay_max_age < 1:
        yield (f"`replay_max_age={args.replay_max_age}` must be at least 1 update.")
    for name in ("replay_priority_exponent", "replay_priority_correction"):
        if args.replay_sampling == "uniform" and not args.is_default(name):
            yield (
                f'`{name}={getattr(args, name)!r}` has no effect without `replay_sampling="prioritized"`. Set that too.'
            )
        if not 0 <= getattr(args, name) <= 1:
            yield (f"`{name}={getattr(args, name)}` must lie between 0 and 1.")
