"""TBRM teaches: a model that starts from random weights learns a task from its rewards alone."""

from __future__ import annotations

import itertools

import pytest
from datasets import Dataset
from tiny import model, tokenizer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.evaluation import evaluate_accuracy

ALPHABET = "abcd"


@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
@pytest.mark.parametrize("seed", [0, 1])
def test_copying_the_first_letter(seed, soft_value, tmp_path):
    """Say the prompt's first letter, then stop. Chance is about 1/7 for the letter, times 1/7 for the stop: 0.02.

    One rollout per prompt, β = 0.1, 200 updates: sampled accuracy at T = 1 on these 64 words must go from
    below 0.1 to above 0.3.
    """
    words = ["".join(letters) for letters in itertools.product(ALPHABET, repeat=3)]
    tok = tokenizer(alphabet=ALPHABET)
    tok.save_pretrained(tmp_path / "model")
    model("llama", seed=seed, vocab_size=len(tok), initializer_range=0.2).save_pretrained(tmp_path / "model")

    def reward(prompts, completion_ids, **kwargs):
        return [
            0.5 * (ids[:1] == tok.convert_tokens_to_ids([word[0]])) + 0.5 * (ids[1:] == [tok.eos_token_id])
            for word, ids in zip(prompts, completion_ids, strict=True)
        ]

    trainer = TBRMTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=reward,
        args=TBRMConfig(
            output_dir=str(tmp_path / "out"), beta=0.1, soft_value=soft_value, learning_rate=0.02, max_steps=200,
            lr_scheduler_type="linear", seed=seed, per_device_train_batch_size=64, max_completion_length=3,
            gradient_checkpointing=False, bf16=False,
            use_cpu=True, save_strategy="no", report_to="none", logging_steps=20, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": word} for word in words]),
    )  # fmt: skip

    def accuracy() -> float:
        return evaluate_accuracy(
            trainer.model, tok, words, lambda i, text: float(text == words[i][0]), samples=8, temperature=1.0,
            max_new_tokens=3,
        ).mean  # fmt: skip

    before = accuracy()
    trainer.train()
    after = accuracy()
    print(f"{before:.3f} → {after:.3f}")
    assert before < 0.1
    assert after > 0.3
