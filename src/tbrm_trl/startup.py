"""What is checked and said before and at the first step: data set size, adapters, vision layout, β."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sized
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .config import TBRMConfig

# Architectures whose image inputs are tested to survive unpadding and re-batching.
VISION_MODEL_TYPES = frozenset(
    ("gemma3", "idefics3", "internvl", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")
)

# (response length, β) as published, arXiv 2603.23355: in between, β follows the power law through both.
BETA_BY_LENGTH = ((600, 0.02), (5000, 0.002))


def prompts_per_generation(args: TBRMConfig) -> int:
    return args.generation_batch_size // args.num_generations


def check_dataset(dataset: Any, args: TBRMConfig) -> None:
    """Refuse a data set on which not a single generation could be filled: TRL would train on nothing, silently."""
    if not isinstance(dataset, Sized):
        return
    prompts, needed = len(dataset), prompts_per_generation(args)
    if prompts >= needed:
        return
    unit = args.world_size * args.steps_per_generation  # rollouts per row of per_device_train_batch_size
    fitting = range(prompts * args.num_generations // unit, 0, -1)
    rows = next((rows for rows in fitting if rows * unit % args.num_generations == 0), None)
    advice = (
        f"The largest generation batch that fits is {rows * unit} rollouts: set per_device_train_batch_size={rows} "
        f"(and generation_batch_size={rows * unit}, if you set that), or add prompts."
        if rows
        else f"Not even per_device_train_batch_size=1 fits {args.steps_per_generation} steps per generation: lower "
        "steps_per_generation and gradient_accumulation_steps, or add prompts."
    )
    raise ValueError(
        f"The training set has {prompts} prompts, fewer than the {needed} of one generation batch "
        f"({args.generation_batch_size} rollouts, {args.num_generations} per prompt): no batch would ever be full. "
        f"{advice}"
    )


def startup_line(dataset: Any, args: TBRMConfig) -> str:
    """Prompts, rollouts, updates, and what each epoch drops, in one line."""
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    rollouts_per_update = args.per_device_train_batch_size * processes * accumulation
    updates = args.steps_per_generation // accumulation * args.num_iterations
    line = (
        f"TBRM: each generation takes {prompts_per_generation(args)} prompts × {args.num_generations} rollouts = "
        f"{args.generation_batch_size} trajectories, for {updates} update(s) on {rollouts_per_update} each "
        f"({args.per_device_train_batch_size} per device × {processes} process(es) × {accumulation} accumulation)"
    )
    if not isinstance(dataset, Sized):
        return f"{line}; {args.max_steps} updates in all."
    windows, tail = divmod(len(dataset), prompts_per_generation(args))
    per_epoch = windows * updates
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return (
        f"{line}; {len(dataset)} prompts give {per_epoch} updates per epoch, dropping {tail} tail prompts; "
        f"{total} updates in all."
    )


def check_adapters(model: Any, peft_config: Any) -> None:
    """Refuse adapters that would bias or misplace the residual: dropout, and prompt learning."""
    configs = list(model.peft_config.values()) if not isinstance(model, str) and is_peft_model(model) else []
    for config in [*configs, *([peft_config] if peft_config is not None else [])]:
        for name, rate in vars(config).items():
            if name.endswith("dropout") and isinstance(rate, (int, float)) and rate > 0:
                raise ValueError(
                    f"`{name}={rate}` is refused: a log-probability with noise ε gives E(δ+ε)² = δ² + Var ε, so "
                    f"dropout biases the squared residual. Set {name}=0.0."
                )
        if config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__name__} is refused: prompt learning puts virtual tokens before the prompt, which "
                "moves the state whose soft value the residual needs. Use a LoRA adapter."
            )


def check_vision(model: PreTrainedModel, is_vision: bool) -> None:
    """Refuse vision-language architectures whose image inputs are not known to be carried correctly."""
    if is_vision and model.config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"Vision-language models of type {model.config.model_type!r} are not supported: their layout of image "
            f"inputs is not tested. Supported: {', '.join(sorted(VISION_MODEL_TYPES))}. For text-only training pass "
            "the tokenizer as `processing_class`."
        )


def beta_for_length(length: float) -> float:
    """β as published for responses of this many tokens; outside the published range, that of its nearer end."""
    (short, high), (long, low) = BETA_BY_LENGTH
    slope = math.log(low / high) / math.log(long / short)
    return high * (min(max(length, short), long) / short) ** slope


def warn_of_beta(beta: float, mean_length: float) -> None:
    """Warn when β is more than a factor of 5 from what was published for responses this long."""
    suggestion = beta_for_length(mean_length)
    if not 1 / 5 < beta / suggestion < 5:
        warnings.warn(
            f"beta={beta:g} is far from what was published for completions of {mean_length:.0f} tokens: 0.002 near "
            f"5,000 tokens and 0.02 near 600. Too small collapses in the end, too large is stiff. Consider "
            f"beta={suggestion:.2g}.",
            stacklevel=2,
        )


def warn_of_soft_value(beta: float, soft_value: float) -> None:
    """Warn when V_θ(s_1) is more than a tenth of 1/β: training would first pull V down, whatever the reward says."""
    if abs(soft_value) > 0.1 / beta:
        warnings.warn(
            f"The soft value V(s_1) is {soft_value:.1f} nats on average, not small against 1/beta = {1 / beta:.1f}: "
            "the residual of the untrained model is mostly V, and the first updates move the policy without any "
            'reward. Use soft_value="calibrated", or a smaller beta '
            f"(below {0.1 / abs(soft_value):.2g}).",
            stacklevel=2,
        )
