"""TBRM teaches: a model that starts from random weights learns a task from its rewards alone."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from common.tiny import model, tokenizer
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts
from tbrm_trl.evaluation import Accuracy, evaluate_accuracy

ALPHABET = "abcd"


def starting_point(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """A model with random weights, and its tokenizer of one token per letter."""
    tok = tokenizer(alphabet=ALPHABET)
    tok.save_pretrained(folder)
    model("llama", seed=seed, vocab_size=len(tok), initializer_range=0.2).save_pretrained(folder)
    return tok


def first_letter(prompts, completion_ids, **kwargs) -> list[float]:
    """Half a point for the prompt's first letter, half for stopping after it."""
    tok = tokenizer(alphabet=ALPHABET)
    return [
        0.5 * (ids[:1] == tok.convert_tokens_to_ids([word[0]])) + 0.5 * (ids[1:] == [tok.eos_token_id])
        for word, ids in zip(prompts, completion_ids, strict=True)
    ]


def trainer_of(
    folder: Path, rows: Dataset, output_dir: Path, reward_funcs=first_letter, peft_config=None,
    quantization_config=None, **options,
) -> TBRMTrainer:  # fmt: skip
    settings = dict(
        output_dir=str(output_dir), beta=0.1, learning_rate=0.02, max_steps=200, lr_scheduler_type="linear",
        per_device_train_batch_size=64, max_completion_length=3, gradient_checkpointing=False, bf16=False,
        use_cpu=True, save_strategy="no", report_to="none", logging_steps=20, disable_tqdm=True,
    )  # fmt: skip
    return TBRMTrainer(
        str(folder), reward_funcs, TBRMConfig(**{**settings, **options}), rows, peft_config=peft_config,
        quantization_config=quantization_config,
    )  # fmt: skip


def accuracy(trainer: TBRMTrainer, words: list[str]) -> Accuracy:
    return evaluate_accuracy(
        trainer.model, trainer.processing_class, words, lambda i, text: float(text == words[i][0]), samples=8,
        temperature=1.0, max_new_tokens=3,
    )  # fmt: skip


def words_of(length: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product(ALPHABET, repeat=length)]


def prompts(words: list[str]) -> Dataset:
    return Dataset.from_list([{"prompt": word} for word in words])


@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
@pytest.mark.parametrize("seed", [0, 1])
def test_copying_the_first_letter(seed, soft_value, tmp_path):
    """Say the prompt's first letter, then stop. Chance is about 1/7 for the letter, times 1/7 for the stop: 0.02.

    One rollout per prompt, β = 0.1, 200 updates: sampled accuracy at T = 1 on these 64 words must go from
    below 0.1 to above 0.3.
    """
    starting_point(tmp_path / "model", seed)
    words = words_of(3)
    trainer = trainer_of(tmp_path / "model", prompts(words), tmp_path / "out", soft_value=soft_value, seed=seed)
    before = accuracy(trainer, words).mean
    trainer.train()
    after = accuracy(trainer, words).mean
    print(f"{before:.3f} → {after:.3f}")
    assert before < 0.1
    assert after > 0.3


def test_from_saved_rollouts_alone(tmp_path):
    """2,000 rollouts that one run saved teach a fresh copy of its model, which never generates to learn.

    Held-out words are in neither run. The rise must exceed three standard errors of the difference.
    """
    starting_point(tmp_path / "model", seed=0)
    words = words_of(4)
    random.Random(0).shuffle(words)
    training, held_out = words[:160], words[160:]
    first = trainer_of(tmp_path / "model", prompts(training), tmp_path / "first", max_steps=32, save_rollouts=True)
    first.train()
    rollouts = load_rollouts(tmp_path / "first").select(range(2000))

    copy = trainer_of(tmp_path / "model", rollouts, tmp_path / "copy", None, max_steps=300, soft_value="calibrated")
    before = accuracy(copy, held_out)
    generate = copy.model.generate
    copy.model.generate = None  # a call would raise
    copy.train()
    copy.model.generate = generate
    after = accuracy(copy, held_out)
    print(f"{before} → {after}; saved rollouts' mean reward {sum(rollouts['reward']) / 2000:.3f}")
    assert after.mean - before.mean > 3 * math.hypot(before.standard_error, after.standard_error)
    assert after.mean > 0.15
