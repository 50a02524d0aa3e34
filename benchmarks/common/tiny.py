"""Tiny real models and tokenizers, made here: nothing is downloaded."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def tokenizer(pad_is_eos: bool = False, alphabet: str = string.printable) -> PreTrainedTokenizerFast:
    """One token per character of the alphabet."""
    words = ["<pad>", "<eos>", "<bos>", *alphabet]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


VOCABULARY = len(tokenizer())
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    initializer_range=0.2,
)
_EXPERTS = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)

# The comments say what each architecture tests.
ARCHITECTURES: dict[str, dict] = {
    "qwen2": _SIZES,  # the published recipe's family
    "llama": {**_SIZES, "tie_word_embeddings": True},
    "gemma2": {**_SIZES, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},  # a soft-cap that has an effect
    "cohere": {**_SIZES, "logit_scale": 0.0625},
    "granite": {**_SIZES, "logits_scaling": 4.0},
    "phi": _SIZES,  # a bias in the head
    "gpt2": dict(  # absolute positions, and dropout in its defaults
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=2, eos_token_id=1,
        initializer_range=0.2,
    ),
    "qwen3_moe": {**_SIZES, **_EXPERTS},
}  # fmt: skip


def model(architecture: str = "qwen2", seed: int = 0, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases start at zero and would test nothing
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return built


def save(
    folder: Path, architecture: str = "qwen2", pad_is_eos: bool = False, alphabet: str = string.printable, **changes
) -> str:
    """Save a tiny model and its tokenizer; returns the folder, as a user would pass it."""
    if not (folder / "config.json").exists():
        words = tokenizer(pad_is_eos, alphabet)
        words.save_pretrained(folder)
        model(architecture, **{"vocab_size": len(words), **changes}).save_pretrained(folder)
    return str(folder)


def save_value_model(folder: Path, architecture: str = "qwen2", seed: int = 3, alphabet: str = string.printable) -> str:
    """Save a model with random weights that scores a text with one number; returns the folder."""
    torch.manual_seed(seed)
    letters = tokenizer(alphabet=alphabet)
    config = AutoConfig.for_model(architecture, **{**_SIZES, "vocab_size": len(letters), "num_labels": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    letters.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def perturb(module: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Move every parameter a little, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs between rollouts: the share of lower-case letters."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(str.islower, text)) / 8 for text in texts]
