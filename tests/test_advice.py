"""What is said before and at the first step."""

from __future__ import annotations

import pytest
from common.tiny import save
from datasets import Dataset
from helpers.runs import config
from helpers.scripted import script, scripted_trainer

from tbrm_trl.checks.advice import beta_for_length, startup_line, warn_of_beta, warn_of_soft_value
from tbrm_trl.checks.data import check_dataset
from tbrm_trl.sources.sampler import WindowSampler


def test_startup_line():
    """70 prompts in generations of 16 × 2 = 32 trajectories: 4 generations an epoch, 2 × 2 updates each, 6 left."""
    args = config(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8, num_generations=2,
        num_iterations=2, num_train_epochs=3,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": str(i)} for i in range(70)])
    logged, mix = check_dataset(prompts, args, args.window_group_size)
    sampler = WindowSampler(logged, mix, args.num_generations, 1, 4, epoch=lambda: 0, seed=None)
    line = startup_line(mix, args, sampler)
    assert "16 prompts × 2 rollouts = 32 trajectories, for 4 update(s) on 16 each" in line
    assert "(4 per device × 1 process(es) × 4 accumulation)" in line
    assert "70 prompts give 16 updates per epoch, dropping 6 tail prompts; 48 updates in all" in line
    assert "\n" not in line


def test_it_is_printed(tmp_path, capsys):
    scripted_trainer(save(tmp_path / "model"), script(), tmp_path)
    assert "TBRM: each generation takes 8 prompts × 1 rollouts = 8 trajectories" in capsys.readouterr().out


def test_beta_rule():
    """The published points, and half-way between them on a log-log line: √(600·5000) ↦ √(0.02·0.002)."""
    assert beta_for_length(600) == pytest.approx(0.02)
    assert beta_for_length(5000) == pytest.approx(0.002)
    assert beta_for_length(3_000_000**0.5) == pytest.approx(0.00004**0.5)
    assert beta_for_length(10) == pytest.approx(0.02)
    with pytest.warns(UserWarning, match="completions of 600 tokens.*beta=0.02"):
        warn_of_beta(0.002, 600)


def test_soft_value_warning():
    with pytest.warns(UserWarning, match=r"30.0 nats on average, not small against 1/beta = 50.0.*calibrated"):
        warn_of_soft_value(0.02, 30.0)


@pytest.mark.parametrize(
    ("beta", "soft_value", "expected"),
    [(0.1, "policy", {"soft value", "beta=0.1"}), (0.02, "calibrated", set()), (0.1, "calibrated", {"beta=0.1"})],
)
def test_warnings_in_a_run(beta, soft_value, expected, tmp_path, recwarn):
    """Once per run, in the first update: V ≈ 5.6 against 1/β = 10; 8 tokens call for β = 0.02."""
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, beta=beta, soft_value=soft_value, max_steps=3
    )
    trainer.train()
    messages = [str(w.message) for w in recwarn]
    for words in ("soft value", "beta=0.1"):
        found = [m for m in messages if words in m and ("published" in m or "nats" in m)]
        assert len(found) == (1 if words in expected else 0), messages


def test_the_warning_waits_for_a_step_that_counts(tmp_path, recwarn):
    """Nothing of the first generation can be scored: the soft value is judged in the second."""
    rows = script(rows=16, unscored=tuple(range(8)))
    scripted_trainer(save(tmp_path / "model"), rows, tmp_path, per_device_train_batch_size=8, max_steps=2).train()
    assert sum("nats on average" in str(w.message) for w in recwarn) == 1
