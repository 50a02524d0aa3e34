"""What is checked and said before and at the first step: data set, sources, adapters, vision layout, β."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from .config import TBRMConfig
from .logged import logged_rows, prompt_numbers
from .sampler import Window, WindowSampler, window_of

# Architectures whose image inputs are tested to survive unpadding and re-batching.
VISION_MODEL_TYPES = frozenset(
    ("gemma3", "idefics3", "internvl", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")
)

# Architectures that keep the trajectories of a packed row apart, tested with eager, SDPA and varlen flash attention. No
# attribute of class or configuration tells: besides those with a state (Mamba, linear attention, convolutions), others
# take `position_ids` and still mix trajectories, as gpt_oss does with eager attention or gpt_bigcode with flash.
PACKED_MODEL_TYPES = frozenset(
    """
    apertus arcee cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_neox granite granitemoe
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax llama minimax_m2 ministral mistral mixtral
    nanochat nemotron olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm
    starcoder2 vaultgemma
    """.split()
)

# (response length, β) as published, arXiv 2603.23355: in between, β follows the power law through both.
BETA_BY_LENGTH = ((600, 0.02), (5000, 0.002))


@contextmanager
def without(args: Any, **changes: Any) -> Iterator[None]:
    """Change options for as long as code that would act on them runs."""
    before = {name: getattr(args, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def check_dataset(dataset: Any, args: TBRMConfig) -> tuple[np.ndarray, Window]:
    """Which rows are logged, and how a generation window is made up.

    Raises:
        ValueError: for a data set on which not a single generation window could be filled: TRL would train on nothing,
            silently. Also for a stream with completions, which cannot be divided into its two kinds of rows.
    """
    if not isinstance(dataset, Sized):
        if dataset is not None and {"completion", "completion_ids"} & set(dataset.column_names or ()):
            raise ValueError(
                "A streamed training set has a column of completions. Logged trajectories need a data set whose rows "
                "can be counted: load it without streaming, or drop the column to have the prompts rolled out."
            )
        return np.zeros(0, dtype=bool), Window(args.generation_batch_size, 0)
    logged = logged_rows(dataset)
    prompts, logs = int((~logged).sum()), int(logged.sum())
    window = window_of(prompts, logs, args)
    if logs and logs < window.logged:
        raise ValueError(
            f"The training set has {logs} logged trajectories, fewer than the {window.logged} of one generation window "
            f"of {args.generation_batch_size}. Lower per_device_train_batch_size, steps_per_generation"
            f"{' or logged_fraction' if window.rollouts else ''}, or add rows."
        )
    needed = window.rollouts // args.num_generations
    if prompts >= needed:
        return logged, window
    if logs:
        raise ValueError(
            f"The training set has {prompts} prompts without a completion, fewer than the {needed} of one generation "
            f"window ({window.rollouts} rollouts, {args.num_generations} per prompt). Raise logged_fraction, lower "
            "per_device_train_batch_size or steps_per_generation, or add prompts."
        )
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


def check_logged_groups(dataset: Any, logged: np.ndarray, window: Window, args: TBRMConfig) -> np.ndarray | None:
    """Where logged rows of a prompt are compared, which belong to one prompt: `(N,)`, or None where none are.

    Raises:
        ValueError: for a prompt with fewer logged rows than a group; a group would never be full.
    """
    if args.drawn_together == 1 or not window.logged:
        return None
    prompts = prompt_numbers(dataset, logged)
    sizes = np.bincount(prompts[logged])
    if sizes.min() < args.num_generations:
        row = int(np.flatnonzero(prompts == sizes.argmin())[0])
        raise ValueError(
            f"Row {row} of the training set: its prompt has {sizes.min()} logged completions, fewer than a group of "
            f"num_generations={args.num_generations} that are to be compared. Drop it, or lower num_generations."
        )
    usable = int((sizes // args.num_generations).sum()) * args.num_generations
    if usable < window.logged:
        raise ValueError(
            f"The training set has {usable} logged trajectories in whole groups of num_generations="
            f"{args.num_generations}, fewer than the {window.logged} of one generation window. Lower "
            "per_device_train_batch_size or steps_per_generation, or add rows."
        )
    return prompts


def check_sources(window: Window, args: TBRMConfig, rewarded: bool, evaluated: bool) -> None:
    """Refuse options that ask for trajectories of a kind that the data set does not give."""
    if window.logged and args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns=True` would drop the columns of the logged trajectories. Leave it at False."
        )
    if (window.rollouts or evaluated) and not rewarded:
        rows = "Prompts" if window.rollouts else "The prompts of `eval_dataset`"
        raise ValueError(f"{rows} are to be rolled out, but no `reward_funcs` are given to reward the completions.")
    if not window.rollouts and args.replay_buffer_size:
        raise ValueError(
            "`replay_buffer_size` keeps rollouts, but every row of the training set has a completion: nothing is "
            "rolled out. Set it to 0; logged trajectories come again in every epoch."
        )
    if not window.rollouts and args.save_rollouts:
        raise ValueError("`save_rollouts=True`, but every row of the training set has a completion. Leave it False.")
    per_prompt = args.num_generations_eval or args.num_generations
    if evaluated and args.drawn_together > 1 and args.per_device_eval_batch_size % per_prompt:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} does not hold whole groups of "
            f"{per_prompt} (num_generations_eval), whose trajectories are compared. Make it a multiple of {per_prompt}."
        )
    if window.logged and args.truncation == "bootstrap" and args.reference == "previous":
        raise ValueError(
            '`truncation="bootstrap"` with `reference="previous"` is refused for logged trajectories: they do not '
            'bring the value of their last state under the policy that produced them. Use `reference="initial"`.'
        )
    if args.precompute_ref_log_probs and (window.rollouts or args.reference == "previous"):
        raise ValueError(
            "`precompute_ref_log_probs=True` is for a training set in which every row has a completion, with "
            '`reference="initial"`: rollouts cannot be scored before they exist. Leave it at None.'
        )


def startup_line(window: Window, args: TBRMConfig, sampler: WindowSampler | None) -> str:
    """Prompts, rollouts, logged trajectories, updates, and what each epoch drops, in one line; no epoch of a stream."""
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    fresh = args.fresh_updates
    updates = fresh * args.num_iterations
    parts = []
    if window.rollouts:
        parts.append(
            f"{window.rollouts // args.num_generations} prompts × {args.num_generations} rollouts = "
            f"{window.rollouts} trajectories"
        )
    if window.logged:
        parts.append(f"{window.logged} logged trajectories")
    replayed = f", {updates - fresh} of them on replayed trajectories" if args.replay_buffer_size else ""
    line = (
        f"TBRM: each generation takes {' and '.join(parts)}, for {updates} update(s) on {args.rows_per_update} each"
        f"{replayed} ({args.per_device_train_batch_size} per device × {processes} process(es) × {accumulation} "
        "accumulation)"
    )
    if sampler is None:
        return f"{line}; {args.max_steps} updates in all."
    prompts, logs, windows = len(sampler.prompts), len(sampler.logged), sampler.windows
    if window.rollouts:
        tail = prompts - windows * window.rollouts // args.num_generations
        epoch = f"{prompts} prompts give {windows * updates} updates per epoch, dropping {tail} tail prompts"
        epoch += f", beside {logs} logged trajectories in turn" if logs else ""
    else:
        epoch = f"{logs} logged trajectories give {windows * updates} updates per epoch; the tail opens the next"
        if left := logs - sampler.logged_per_pass:
            epoch += f"; {left} of them fill no group of {args.num_generations}, others in each epoch"
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * windows * updates)
    return f"{line}; {epoch}; {total} updates in all."


def check_adapters(model: Any, peft_config: Any, args: TBRMConfig) -> None:
    """Refuse adapters that would bias or misplace the residual, or that no sync could follow."""
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
        if (bias := vars(config).get("bias", "none")) != "none":
            raise ValueError(
                f"`bias={bias!r}` is refused: it trains biases of the base model, which the reference shares, so the "
                "reference would move with the policy. Set bias='none'."
            )
        if args.sync_ref_model and args.ref_model_mixup_alpha != 1:
            raise ValueError(
                f"`ref_model_mixup_alpha={args.ref_model_mixup_alpha}` is refused with adapters: mixing the factors A "
                "and B of two adapters does not mix their products BA. Use ref_model_mixup_alpha=1.0, a hard reset."
            )


def check_quantization(model: Any, peft_config: Any, quantization_config: Any, args: TBRMConfig) -> None:
    """Refuse what a base model in 4 or 8 bits (bitsandbytes) cannot do: be trained itself, feed vLLM."""
    given = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    if isinstance(given, dict):
        given = SimpleNamespace(**given)
    loaded = given if isinstance(model, str) else model
    names = ("load_in_4bit", "load_in_8bit") if isinstance(model, str) else ("is_loaded_in_4bit", "is_loaded_in_8bit")
    name = next((name for name in names if getattr(loaded, name, False)), None)  # other quantizers have neither
    if name is None:
        return
    if peft_config is None and (isinstance(model, str) or not is_peft_model(model)):
        raise ValueError(
            f"`{name}` without an adapter is refused: quantized weights cannot be trained. Pass "
            "`peft_config=LoraConfig(lora_dropout=0.0)` (examples/train.py: --use_peft true), or do not quantize."
        )
    if args.use_vllm:
        raise ValueError(
            f"`{name}` with `use_vllm=True` is refused: for every sync TRL merges the adapter into the quantized "
            "weights and takes it out again, and rounds both times, so base model and reference drift; and vLLM gets "
            "the packed weights without their new scales. Use LoRA on a base that is not quantized, or no vLLM."
        )


def warn_of_merging(model: nn.Module, args: TBRMConfig) -> None:
    """Warn when the base of an adapter, which is the reference, would be rounded at every sync of vLLM."""
    if not args.use_vllm or not is_peft_model(model):
        return
    half = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize < 4 and not p.requires_grad}
    cast = args.deepspeed_plugin is not None and (args.bf16 or args.fp16)  # by DeepSpeed, frozen weights as well
    if half or cast:
        warnings.warn(
            "An adapter on a base in half precision with `use_vllm=True`: for every sync TRL merges the adapter into "
            "the base and takes it out again, and rounds both times, so the base drifts, which is also the reference. "
            'Load it in float32 (model_init_kwargs={"dtype": "float32"})'
            + (", and launch with DDP or FSDP2: under mixed precision DeepSpeed casts it." if cast else "."),
            stacklevel=3,
        )


def check_sources_of_vision(args: TBRMConfig, window: Window) -> None:
    """With a model that reads images, refuse every source of trajectories that cannot carry them."""
    for name, asked in (("replay_buffer_size", args.replay_buffer_size), ("save_rollouts", args.save_rollouts)):
        if asked:
            raise ValueError(f"`{name}` stores text alone, and this model reads images. Leave it at its default.")
    if args.soft_value == "model":
        raise ValueError('`soft_value="model"` scores text alone, and this model reads images. Use another.')
    if args.token_selection == "cut":
        raise ValueError('`token_selection="cut"` could cut images off, and this model reads them. Use "scatter".')
    if window.logged:
        raise ValueError(
            "Logged trajectories hold text alone, and this model reads images. For text-only training pass the "
            "tokenizer as `processing_class`; else drop the column of completions."
        )


def check_vision(model: PreTrainedModel, is_vision: bool) -> None:
    """Refuse vision-language architectures whose image inputs are not known to be carried correctly."""
    if is_vision and model.config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"Vision-language models of type {model.config.model_type!r} are not supported: their layout of image "
            f"inputs is not tested. Supported: {', '.join(sorted(VISION_MODEL_TYPES))}. For text-only training pass "
            "the tokenizer as `processing_class`."
        )


def check_packing(model: PreTrainedModel) -> None:
    """Refuse models in whose layers the trajectories of a packed row could see each other, or that read images."""
    kind, attention = model.config.model_type, model.config._attn_implementation
    # Code from a model's own repository may carry the name of an architecture that transformers has too.
    of_transformers = type(model).__module__.startswith("transformers.")
    if kind not in PACKED_MODEL_TYPES or not of_transformers:
        raise ValueError(
            f"`padding_free=True` is refused for {type(model).__name__} of type {kind!r}: only text models of "
            "transformers that are tested to keep the trajectories of a packed row apart can run without padding. "
            "Models that read images, or whose layers carry a state from position to position, do not. Leave it "
            f"False. Supported: {', '.join(sorted(PACKED_MODEL_TYPES))}."
        )
    if attention not in ("eager", "sdpa") and not is_flash_attention_requested(model.config):
        raise ValueError(
            f"`padding_free=True` is refused with attn_implementation={attention!r}, which is not tested to keep the "
            "trajectories of a packed row apart. Use flash attention, 'sdpa' or 'eager' (in `model_init_kwargs`), or "
            "leave padding_free False."
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


def warn_of_rollouts(output_dir: Path) -> None:
    """Warn when rollouts of another run lie where this one will save its own: `load_rollouts` reads all of them."""
    if any((output_dir / "rollouts").glob("step-*.parquet")):
        warnings.warn(
            f"{output_dir / 'rollouts'} holds rollouts of another run. Those of the same update are overwritten, the "
            "others stay, and `load_rollouts` would mix both. Move them, or use another output_dir.",
            stacklevel=3,
        )
