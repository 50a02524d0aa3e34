"""Checks of models: adapters, quantization, architectures, and a reference that is not the policy."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.generic import is_flash_attention_requested

from ..batch import TrajectoryScores, at_least_float32
from ..model.caches import can_select_rows, empty_cache
from ..model.decoding import draws_one_token
from ..model.reference import ADAPTER as REFERENCE_ADAPTER
from ..options import TBRMOptions
from ..sources.sampler import WindowMix
from ..trajectory import End, Trajectory
from .data import problem_of_coming_windows

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name for it
# Architectures whose image inputs are tested to survive unpadding and re-batching.
VISION_MODEL_TYPES = frozenset(
    ("gemma3", "idefics3", "internvl", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")
)

# Architectures that keep the trajectories of a packed row apart, tested with eager, SDPA and varlen flash attention. No
# attribute of a class or configuration shows this. Architectures with a state (Mamba, linear attention, convolutions)
# mix trajectories, and so do some that take `position_ids`: gpt_oss with eager attention, gpt_bigcode with flash.
PACKED_MODEL_TYPES = frozenset(
    """
    apertus arcee cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_neox granite granitemoe
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax llama minimax_m2 ministral mistral mixtral
    nanochat nemotron olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm
    starcoder2 vaultgemma
    """.split()
)


def check_adapters(model: Any, peft_config: Any, args: TBRMOptions) -> None:
    """Refuse adapters that would bias or misplace the residual, or that no sync could follow."""
    if isinstance(model, str) and Path(model, ADAPTER_CONFIG).is_file() and not Path(model, "config.json").is_file():
        raise ValueError(
            f"`model={model!r}` is the folder of an adapter. Put it on its base and pass the object: "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )
    given = not isinstance(model, str) and is_peft_model(model)
    if given:
        _check_given_adapter(model)
    if args.cast_lm_head_to_fp32 and (given or peft_config is not None):
        _check_head_of_adapted(model, args)
    configs = list(model.peft_config.values()) if given else []
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


def _check_head_of_adapted(model: Any, args: TBRMOptions) -> None:
    """Refuse `cast_lm_head_to_fp32` if the head is also the embedding, which TRL looks for in the bare model."""
    config = AutoConfig.from_pretrained(model, **args.hub_options) if isinstance(model, str) else model.config
    if config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "`cast_lm_head_to_fp32=True` with an adapter is refused for a model whose head shares the weights of its "
            "embeddings: TRL cannot set it up. Leave the option out; sums and losses are in float32 anyway."
        )


def check_float32_head(model: Any, args: TBRMOptions) -> None:
    """Refuse `cast_lm_head_to_fp32` for a model whose head or embeddings TRL does not find under their names."""
    if not args.cast_lm_head_to_fp32:
        return
    bare = model
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, **args.hub_options)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return  # a vision-language model, or code of its own
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config)
    elif is_peft_model(model):
        bare = model.get_base_model()
    tied = bare.config.get_text_config().tie_word_embeddings
    missing = "lm_head" if not hasattr(bare, "lm_head") else "model.embed_tokens"
    if missing == "lm_head" or (tied and not hasattr(getattr(bare, "model", None), "embed_tokens")):
        raise ValueError(
            f"`cast_lm_head_to_fp32=True` is refused for {type(bare).__name__}: TRL casts `lm_head`, and embeddings "
            f"that share its weight as `model.embed_tokens`, and this model has no `{missing}`. Leave the option out; "
            "sums and losses are in float32 anyway."
        )


def _check_given_adapter(model: Any) -> None:
    """Refuse a PeftModel unless one adapter is trained, and its parameters can be told by the adapter's name."""
    if REFERENCE_ADAPTER in model.peft_config:
        raise ValueError(
            f"The model has an adapter named {REFERENCE_ADAPTER!r}, as the reference's will be. Load it under another "
            "name, or not at all if it is not trained."
        )
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"{len(model.active_adapters)} adapters are active ({', '.join(map(repr, model.active_adapters))}), and "
            "one is trained. Choose it: `model.set_adapter(name)`; merge another one into the base first."
        )
    (name,) = model.active_adapters
    base = [one for one, _ in model.named_parameters() if ".base_layer." in one]
    if (clash := next((one for one in base if name in one.split(".")), None)) is not None:
        raise ValueError(
            f"The adapter is named {name!r}, as a part of the model is ({clash}): its parameters could not be told by "
            "their names. Give it another name."
        )
    outside = [one for one, weight in model.named_parameters() if weight.requires_grad and f".{name}." not in f"{one}."]
    if outside:
        raise ValueError(
            f"{len(outside)} trainable parameters are not the adapter's ({outside[0]}, …). The reference shares them, "
            "so it would move with the policy, and checkpoints of the adapter would lack them. Freeze them, or name "
            "their modules in the adapter's `modules_to_save`."
        )


def check_head(model: PreTrainedModel) -> None:
    """Refuse a head that is more than a weight and a bias: TRL's kernel computes log-probabilities from these two.

    And refuse a model without a backbone of its own, whose states nothing could give to the kernel.
    """
    if model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} does not name the part of it that computes hidden states "
            f"(base_model_prefix={model.base_model_prefix!r}), so trajectories cannot be scored. Load the checkpoint "
            "with another class of its family, or train another model."
        )
    head = model.get_output_embeddings()
    if not (hasattr(head, "weight") and hasattr(head, "bias")):
        raise ValueError(
            f"The model's head is a {type(head).__name__}, of which log-probabilities cannot be computed without its "
            "logits. (`trainable_token_indices` makes one of a head that is tied to the embeddings.) Untie them "
            "(tie_word_embeddings=False), or train whole modules: modules_to_save=['embed_tokens']."
        )


def rows_of_text(token_ids: Sequence[int]) -> list[Trajectory]:
    """Two rows of different lengths for `check_logits`, from the token ids of a text, at least two."""
    texts = [list(token_ids), list(token_ids)[::-1][: max(len(token_ids) // 2, 2)]]
    return [
        Trajectory(torch.tensor(ids[:1]), torch.tensor(ids[1:]), torch.ones(len(ids) - 1).bool(), 0.0, End.LENGTH)
        for ids in texts
    ]


@torch.no_grad()
def check_logits(
    model: nn.Module, rows: Sequence[Trajectory], scores: TrajectoryScores, temperature: float, dtype_is_half: bool
) -> None:
    """Refuse a model whose scores are not those of its own logits.

    The scores come from hidden states and the head, with what the configuration says of scales and soft caps
    (`logit_transform`). A model's code may do more than its configuration says. And a model that is not causal, or that
    mixes the rows of a batch, has other logits for a row on its own.

    Args:
        model: returns logits, `model(input_ids=ids).logits` of shape (1, T, vocabulary).
        rows: B trajectories without padding.
        scores: the model's scores of them as one batch, as in training.
        temperature: of the policy.
        dtype_is_half: whether anything is computed in half precision or quantized.
    """
    differences, largest = [], 0.0
    for i, row in enumerate(rows):
        given = torch.cat([row.prompt_ids, row.completion_ids]).to(scores.log_probs.device)  # (T,)
        logits = at_least_float32(model(input_ids=given[None]).logits[0, :-1]) / temperature  # (T − 1, vocabulary)
        own = logits.log_softmax(dim=-1).gather(1, given[1:, None])[:, 0]  # (T − 1,)
        differences.append((scores.log_probs[i, 1 : len(given)] - own).abs())
        differences.append((scores.soft_value[i] - logits[0].logsumexp(dim=-1)).abs()[None])
        largest = max(largest, float(logits.abs().max()))
    difference = float(torch.cat(differences).mean())
    # Here a row is alone and there in a batch, so sums are rounded in another order. In bfloat16 that moves SmolLM2's
    # logits of up to 39 by 0.02 on average.
    tolerance = 0.01 + 2**-8 * largest if dtype_is_half else 1e-3 + 2**-20 * largest
    if difference > tolerance:
        raise ValueError(
            f"The scores of {type(model).__name__} are not those of its own logits: log-probabilities and soft values "
            f"of a short text differ by {difference:.3g} nats (allowed: {tolerance:.2g}). Its forward does more "
            "between hidden states and logits than its configuration says, or it is not causal, or a row depends on "
            "the rows beside it. Train another model, or a class of this family whose logits are the head's output."
        )


def check_quantization(model: Any, peft_config: Any, quantization_config: Any, args: TBRMOptions) -> None:
    """Refuse to train a base model in 4 or 8 bits (bitsandbytes) itself, and to send its weights to vLLM."""
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
            "`peft_config=LoraConfig(lora_dropout=0.0)` (tbrm train: --use_peft true), or do not quantize."
        )
    if args.draws_from_own_engine:
        raise ValueError(
            f"`{name}` with `use_vllm=True` is refused: for every sync TRL merges the adapter into the quantized "
            "weights and takes it out again, and rounds both times, so base model and reference drift; and vLLM gets "
            'the packed weights without their new scales. Use vllm_mode="server", which is sent the adapter alone, or '
            "no vLLM."
        )
    if "8bit" in name and (args.use_vllm or args.publishes_policy):
        raise ValueError(
            f"`{name}` with rollouts by a server is refused: the server is to have the weights that the policy "
            "computes with, and those of 8 bits depend on the inputs. Use load_in_4bit."
        )


def warn_of_merging(model: nn.Module, args: TBRMOptions) -> None:
    """Warn if every sync of vLLM would round an adapter's base, which is also the reference."""
    if not args.draws_from_own_engine or not is_peft_model(model):
        return
    half = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize < 4 and not p.requires_grad}
    cast = args.deepspeed_plugin is not None and (args.bf16 or args.fp16)  # DeepSpeed casts frozen weights too
    if half or cast:
        warnings.warn(
            "An adapter on a base in half precision with `use_vllm=True`: for every sync TRL merges the adapter into "
            "the base and takes it out again, and rounds both times, so the base drifts, which is also the reference. "
            'Load it in float32 (model_init_kwargs={"dtype": "float32"})'
            + (", and launch with DDP or FSDP2: under mixed precision DeepSpeed casts it." if cast else "."),
            stacklevel=3,
        )


def check_vision(model: PreTrainedModel, is_vision: bool) -> None:
    """Refuse vision-language architectures for which no test shows that image inputs survive re-batching."""
    if is_vision and model.config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"Vision-language models of type {model.config.model_type!r} are not supported: their layout of image "
            f"inputs is not tested. Supported: {', '.join(sorted(VISION_MODEL_TYPES))}. For text-only training pass "
            "the tokenizer as `processing_class`."
        )


def check_packing(model: PreTrainedModel) -> None:
    """Refuse models that could mix the trajectories of a packed row, and models that read images."""
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


def require_equal_weights(policy: nn.Module, reference: nn.Module) -> None:
    """Refuse a reference that was loaded with weights other than those the policy starts from.

    TRL loads the reference from the folder or id in the model's configuration. A model that was changed after loading,
    or never saved, would silently get another reference.
    """
    weights = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        loaded = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        start = weights.get(name)
        if start is None or start.is_meta or hasattr(start, "ds_id"):
            continue  # partitioned or renamed by a wrapper: not comparable here
        equal = start.shape == loaded.shape and torch.equal(start.to(loaded.device, loaded.dtype), loaded)
        if not equal:
            raise ValueError(
                f"The reference policy is not the model you passed: parameter {name!r} of shape {tuple(start.shape)} "
                f"differs between the model object and what was loaded from "
                f"{getattr(policy.config, '_name_or_path', '')!r}, of shape {tuple(loaded.shape)}. Save the model with "
                "`save_pretrained(folder)` and its tokenizer beside it, and pass `model=folder`; or name the reference "
                "that you want: `reference_model=`."
            )


def check_reference_model(
    reference_model: Any, model: Any, peft_config: Any, args: TBRMOptions, samples_reference: bool
) -> None:
    """Refuse a `reference_model` if another policy is the reference, or is sampled in its place."""
    if reference_model is None:
        return
    if reference_model is model and not isinstance(model, str):
        raise ValueError(
            "`reference_model` is the policy itself, which moves. Leave it out (the reference is then the policy as it "
            "starts), or pass a model of its own."
        )
    if peft_config is not None or (not isinstance(model, str) and is_peft_model(model)):
        raise ValueError(
            "`reference_model` with adapters is refused: their reference is the base model, or the adapter that the "
            "model came with. Merge the adapter into the model, or leave `reference_model` out."
        )
    if args.reference == "previous":
        raise ValueError(
            '`reference_model` with `reference="previous"` is refused: each trajectory has the policy that produced it '
            'as its reference. Use `reference="initial"`, or leave `reference_model` out.'
        )
    if samples_reference:
        raise ValueError(
            f"`reference_model` with `soft_value={args.soft_value!r}` is refused: samples before training are drawn "
            "from the model that is trained, and would be taken for the reference's. Let the training set bring them "
            "as a column (docs/theory.md), or leave `reference_model` out."
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a model in which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model is trainable: training would change nothing. Load an adapter with "
            "`PeftModel.from_pretrained(base, adapter, is_trainable=True)`, or unfreeze the model."
        )


def warn_of_half_precision(model: nn.Module, learning_rate: float, samples: int = 1_000_000) -> None:
    """Warn if rounding would swallow most updates of weights that are trained in half precision.

    An Adam step moves a weight by about the learning rate. A weight stays the same if that is less than half the
    distance to its neighbour in its dtype.
    """
    stuck = total = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.itemsize < 4:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            weights = local.detach().flatten()[: max(samples // 100, 1)]
            stuck += int((weights + learning_rate == weights).sum())
            total += weights.numel()
    if total and stuck > total / 2:
        warnings.warn(
            f"{stuck / total:.0%} of the trained weights are kept in half precision and are too large for a step of "
            f"learning_rate={learning_rate:g}: rounding would leave them as they are. Load the model in float32 "
            '(model_init_kwargs={"dtype": "float32"}, with bf16=True for the speed), train an adapter, or raise the '
            "learning rate.",
            stacklevel=3,
        )


def check_backend(model: Any, args: TBRMOptions, has_reference_adapter: bool) -> None:
    """Refuse rollouts for which TRL would change the trained model, or that could not be drawn from its weights."""
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    held = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if args.use_transformers_continuous_batching and wanted is not None and held != {wanted}:
        raise ValueError(
            f"`use_transformers_continuous_batching=True` with {'bf16' if args.bf16 else 'fp16'}=True is refused: TRL "
            f"casts the trained weights to {wanted} for good, and most updates are then lost to rounding. Turn mixed "
            "precision off, or generate without continuous batching."
        )
    if is_peft_model(model) and (args.publishes_policy or args.draws_from_server):
        _check_served_adapter(model)
        return
    if not (args.use_vllm and is_peft_model(model)):
        return
    # TRL merges the adapter for a sync, and sends what is not the tuner's own. It knows only one name of saved modules.
    beside = [n for n, p in model.named_parameters() if p.requires_grad and model.base_model.prefix not in n]
    unknown = [n for n in beside if ".modules_to_save.default." not in n]
    if beside and has_reference_adapter:
        raise ValueError(
            f"An adapter with weights beside its layers ({beside[0]}, of `modules_to_save` or "
            "`trainable_token_indices`) with `use_vllm=True` and a reference that is an adapter too (`sync_ref_model`, "
            "or a model that came with its adapter) is refused: TRL would send vLLM the reference's copy of these "
            "weights too. Leave them out, or generate without vLLM."
        )
    if unknown:
        raise ValueError(
            f"An adapter that trains {unknown[0]} with `use_vllm=True` is refused: TRL would send vLLM this weight "
            "under a name that it does not know. Use `modules_to_save` in an adapter named 'default', or generate "
            "without vLLM."
        )
    check_tied_layers(model)


# Options of a LoraConfig that say where an adapter is, how large, and how it begins. With these alone a server that
# knows rank, alpha and weights computes the same: it adds α/r B A to each weight, or α/√r B A.
_PLAIN_LORA = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    r lora_alpha use_rslora target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out
    lora_dropout bias init_lora_weights loftq_config eva_config corda_config lora_ga_config qalora_group_size
    megatron_core ensure_weight_tying
    """.split()
)


def _beyond_lora(config: Any) -> list[str]:
    """The options of a LoRA adapter that change more than plain LoRA has, or that are not known to be harmless."""
    defaults = vars(type(config)(r=config.r))
    options = {name: value for name, value in vars(config).items() if name in defaults and name not in _PLAIN_LORA}
    return [name for name, value in options.items() if value and value != defaults[name]]


def _check_served_adapter(model: Any) -> None:
    """Refuse an adapter that a server could not load beside others."""
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    problems = [f"it is of type {kind}"] if kind != "LORA" else [f"it sets `{name}`" for name in _beyond_lora(config)]
    if problems:
        raise ValueError(
            f"The adapter cannot be served: {problems[0]}, and a server loads plain LoRA weights by their name. Use a "
            "LoraConfig without that, train the full model, or generate without a server."
        )


def check_shipped_ends(shipped: GenerationConfig) -> None:
    """Refuse stop strings in the model's own generation_config.json: only tokens are known to end completions."""
    if shipped.stop_strings:
        raise ValueError(
            f"The model's own generation_config has stop_strings={shipped.stop_strings!r}: completions would end where "
            "trajectories, truncation and logs do not know of an end. Set `model.generation_config.stop_strings` (or "
            "that of the file beside the weights) to None, and `eos_token_id` to the tokens that end a completion."
        )


def check_tied_layers(model: Any) -> None:
    """Refuse an adapter on a weight that another module uses without the adapter: merging it would change both."""
    weights: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights.setdefault(id(parameter), []).append(name)
    for names in weights.values():
        adapted = [name for name in names if ".base_layer." in name]
        if adapted and len(adapted) < len(names):
            raise ValueError(
                f"The adapter is on {adapted[0]}, which is one tensor with "
                f"{next(name for name in names if name not in adapted)}. With `use_vllm=True` TRL merges the adapter "
                "into it, and vLLM would sample from another policy. Untie them (tie_word_embeddings=False), or leave "
                "that module out of `target_modules`."
            )


def check_length(length: int, limit: int | None) -> None:
    """Refuse a trajectory whose log-probabilities would depend on the rows beside it."""
    if limit is not None and length > limit:
        raise ValueError(
            f"A trajectory of {length} tokens is longer than {limit}, from where on the model's rotary embedding is "
            "rescaled for the whole batch: log-probabilities would depend on the rows beside it. Lower "
            f"max_completion_length, drop longer prompts and logged rows, or train within {limit} tokens."
        )


def computes_in_half(model: nn.Module, mixed_precision: str) -> bool:
    """Whether anything of a model is computed in half precision or TF32, or quantized.

    Args:
        model: its parameters count, also frozen ones.
        mixed_precision: accelerate's "no", "fp16" or "bf16".
    """
    # TF32 may be on by `tf32=True`, or by any of PyTorch's own switches.
    rounded = mixed_precision != "no" or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return rounded or any(parameter.itemsize < 4 for parameter in model.parameters())


def check_start(difference: float, dtype_is_half: bool, of_adapter: bool) -> None:
    """Refuse to train a policy that does not start as its reference, or as the model its new adapter was put on.

    Args:
        difference: mean over actions of |log π_θ − log π|, in nats, before the first update, over all processes. π is
            the reference, or for `of_adapter` the model that the adapter was put on.
        dtype_is_half: whether anything is computed in half precision or quantized. The tolerance is then 0.1 nats per
            token, else 0.001.
        of_adapter: whether π is the model that the adapter was put on.
    """
    tolerance = 0.1 if dtype_is_half else 1e-3
    if not difference > tolerance:  # NaN has another cause
        return
    if of_adapter:
        raise ValueError(
            f"The new adapter changes the model before anything is trained: log-probabilities differ by "
            f"{difference:.3g} nats per token (allowed: {tolerance:g}). Some initialisations rewrite the base or begin "
            "with a product BA that is not 0. Use init_lora_weights=True (the default) or 'gaussian', or save the "
            "model with the adapter merged and pass it as `model`."
        )
    raise ValueError(
        f"The policy is not its reference before anything is trained: log-probabilities differ by {difference:.3g} "
        f"nats per token (allowed: {tolerance:g}). With a new adapter, its initialisation rewrites the base "
        "(init_lora_weights='pissa', 'olora', …) or does not begin at 0: use init_lora_weights=True or 'gaussian'. "
        "With a full model, the reference was loaded from elsewhere: save the model and pass its folder, or name the "
        "reference that you want (`reference_model=`)."
    )


def check_pool(
    policy: PreTrainedModel,
    config: GenerationConfig,
    has_vision: bool,
    dataset: Any,
    mix: WindowMix,
    generators: Mapping[str, Any],
) -> None:
    """Refuse a `rollout_pool` if completions are not rows of one batch that can take each other's places.

    Args:
        policy: the model, without adapters around it.
        config: the generation config.
        has_vision: whether the policy reads images.
        dataset: the training set.
        mix: what its windows are made of.
        generators: arguments of the trainer that take part in a generation, by name; None if not given.
    """
    given = [name for name, one in generators.items() if one]
    problem = problem_of_coming_windows(dataset, mix)
    problem = problem or _problem_of_places(policy, policy._prepare_generation_config(config)[0])
    if given:
        problem = f"a completion with `{given[0]}` is not drawn in one go"
    elif has_vision:
        problem = "images belong to the rows that a batch began with"
    if problem is not None:
        raise ValueError(f"`rollout_pool` is refused: {problem}. Set rollout_pool=0.")


def _problem_of_places(policy: PreTrainedModel, config: GenerationConfig) -> str | None:
    """Why a row cannot take the place of another one; None if it can."""
    if not policy._supports_default_dynamic_cache() or not can_select_rows(empty_cache(policy)):
        return "the cache of this model keeps state that cannot be selected by row"
    if config.cache_implementation not in (None, "dynamic"):
        return f"rows of a cache with cache_implementation={config.cache_implementation!r} cannot be selected"
    if not draws_one_token(policy, config):
        return "the generation follows several candidates for a row"
    for name in ("guidance_scale", "watermarking_config", "stop_strings", "max_time", "prefill_chunk_size"):
        if getattr(config, name, None) not in (None, 1):
            return f"`{name}` of the generation keeps state from token to token, or counts for the batch as a whole"
    return None
