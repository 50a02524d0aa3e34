"""TBRM teaches: a model that starts from random weights learns a task from its rewards alone."""

from __future__ import annotations

import math
import random

import pytest
from helpers.first_letter import prompts, save_start, trainer_of, words_of

from tbrm_trl import TBRMTrainer, load_rollouts
from tbrm_trl.evaluation import Accuracy, evaluate_accuracy


def accuracy(trainer: TBRMTrainer, words: list[str]) -> Accuracy:
    return evaluate_accuracy(
        trainer.model, trainer.processing_class, words, lambda i, text: float(text == words[i][0]), samples=8,
        temperature=1.0, max_new_tokens=3,
    )  # fmt: skip


@pytest.mark.parametrize(("seed", "soft_value"), [(0, "calibrated"), (1, "policy")])
def test_copying_the_first_letter(seed, soft_value, tmp_path):
    """Say the prompt's first letter, then stop. Chance is about 1/7 for the letter, times 1/7 for the stop: 0.02.

    One rollout per prompt, β = 0.1, 200 updates: sampled accuracy at T = 1 on these 64 words must go from
    below 0.1 to above 0.3.
    """
    save_start(tmp_path / "model", seed)
    words = words_of(3)
    trainer = trainer_of(tmp_path / "model", prompts(words), tmp_path / "out", soft_value=soft_value, seed=seed)
    before = accuracy(trainer, words).mean
    trainer.train()
    after = accuracy(trainer, words).mean
    print(f"{before:.3f} → {after:.3f}")
    assert before < 0.1
    assert after > 0.3


def test_from_saved_rollouts_alone(tmp_path):
    """2,000 rollouts that one run saved teach a fresh copy of its model, which never generates in training.

    Held-out words are in neither run. The rise must exceed three standard errors of the difference.
    """
    save_start(tmp_path / "model", seed=0)
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
