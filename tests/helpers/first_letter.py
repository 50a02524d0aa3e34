"""A task that a tiny model learns from random weights: say the prompt's first letter, then stop."""

import itertools
from pathlib import Path

from common.tiny import save, tokenizer
from datasets import Dataset

from helpers.scripted import QUIET
from tbrm_trl import TBRMConfig, TBRMTrainer

ALPHABET = "abcd"


def save_start(folder: Path, seed: int = 0, **changes) -> str:
    """Save a model with random weights, and its tokenizer of one token per letter."""
    return save(folder, "llama", alphabet=ALPHABET, seed=seed, **changes)


def first_letter(prompts, completion_ids, **kwargs) -> list[float]:
    """Half a point for the prompt's first letter, half for stopping after it."""
    tok = tokenizer(alphabet=ALPHABET)
    return [
        0.5 * (ids[:1] == tok.convert_tokens_to_ids([word[0]])) + 0.5 * (ids[1:] == [tok.eos_token_id])
        for word, ids in zip(prompts, completion_ids, strict=True)
    ]


def trainer_of(
    folder: Path | str, rows: Dataset, output_dir: Path | str, reward_funcs=first_letter, peft_config=None,
    quantization_config=None, **options,
) -> TBRMTrainer:  # fmt: skip
    settings = QUIET | dict(
        output_dir=str(output_dir), beta=0.1, learning_rate=0.02, max_steps=200, lr_scheduler_type="linear",
        per_device_train_batch_size=64, max_completion_length=3, logging_steps=20,
    )  # fmt: skip
    return TBRMTrainer(
        str(folder), reward_funcs, TBRMConfig(**settings | options), rows, peft_config=peft_config,
        quantization_config=quantization_config,
    )  # fmt: skip


def words_of(length: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product(ALPHABET, repeat=length)]


def prompts(words: list[str]) -> Dataset:
    return Dataset.from_list([{"prompt": word} for word in words])
