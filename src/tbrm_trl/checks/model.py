"""What is refused or warned of in models: adapters, quantization, architectures, a reference that is not the policy."""

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from ..options import TBRMOptions

# Architectures whose image inputs are tested to survive unpadding and re-batching.
VISION_MODEL_TYPES = frozenset(
    ("gemma3", "idefics3", "internvl", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")
)

# Architectures that keep the trajectories of a packed row apart, tested with eager, SDPA and varlen flash attention. No
# attribute of a class or configuration tells. Architectures with a state (Mamba, linear attention, convolutions) mix
# trajectories, and so do some that take `position_ids`: gpt_oss with eager attention, gpt_bigcode with flash.
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
            "`peft_config=LoraConfig(lora_dropout=0.0)` (examples/train.py: --use_peft true), or do not quantize."
        )
    if args.use_vllm:
        raise ValueError(
            f"`{name}` with `use_vllm=True` is refused: for every sync TRL merges the adapter into the quantized "
            "weights and takes it out again, and rounds both times, so base model and reference drift; and vLLM gets "
            "the packed weights without their new scales. Use LoRA on a base that is not quantized, or no vLLM."
        )


def warn_of_merging(model: nn.Module, args: TBRMOptions) -> None:
    """Warn if every sync of vLLM would round the base of an adapter, which is the reference too."""
    if not args.use_vllm or not is_peft_model(model):
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
    """Refuse a reference that was loaded with other weights than the policy starts from.

    TRL loads the reference from the folder or id in the model's configuration. A model that was changed after loading,
    or never saved, would silently get another reference.
    """
    weights = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        loaded = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        start = weights.get(name)
        if start is None or start.shape != loaded.shape or start.is_meta:
            continue  # partitioned or renamed by a wrapper: not comparable here
        if not torch.equal(start.detach().to(loaded.device, loaded.dtype), loaded.detach()):
            raise ValueError(
                f"The reference policy is not the model you passed: parameter {name!r} differs between the model "
                f"object and what was loaded from {getattr(policy.config, '_name_or_path', '')!r}. Save the model with "
                "`save_pretrained(folder)` and its tokenizer beside it, and pass `model=folder`."
            )
