"""What is said before and at the first step."""

from __future__ import annotations

import pytest
from datasets import Dataset
from scripted import script, scripted_trainer
from test_config import config
from tiny import save

from tbrm_trl.startup import beta_for_length, check_dataset, startup_line, warn_of_beta, warn_of_soft_value


def prompts(n: int) -> Dataset:
    return Dataset.from_list([{"prompt": str(i)} for i in range(n)])


def test_startup_line():
    """70 prompts in generations of 16 × 2 = 32 trajectories: 4 generations an epoch, 2 × 2 updates each, 6 left."""
    args = config(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8, num_generations=2,
        num_iterations=2, num_train_epochs=3,
    )  # fmt: skip
    line = startup_line(prompts(70), args)
    assert "16 prompts × 2 rollouts = 32 trajectories, for 4 updates on 16 each" in line
    assert "(4 per device × 1 processes × 4 accumulation)" in line
    assert "70 prompts give 16 updates per epoch, dropping 6 tail prompts; 48 updates in all" in line
    assert "\n" not in line


def test_it_is_printed(tmp_path, capsys):
    scripted_trainer(save(tmp_path / "model"), script(), tmp_path)
    assert "TBRM: each generation takes 8 prompts × 1 rollouts = 8 trajectories" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n", "options", "largest"),
    [
        (5, {"per_device_train_batch_size": 8}, "5 rollouts. Set per_device_train_batch_size to at most 5"),
        (5, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, "4 rollouts.*at most 2"),
        (3, {"per_device_train_batch_size": 8, "num_generations": 2}, "6 rollouts.*at most 6"),
        (3, {"gradient_accumulation_steps": 4}, "3 rollouts. Lower steps_per_generation"),
    ],
)
def test_too_few_prompts(n, options, largest):
    with pytest.raises(
        ValueError, match=f"has {n} prompts, fewer than.*largest generation batch that fits is {largest}"
    ):
        check_dataset(prompts(n), config(**options))
    assert check_dataset(prompts(64), config(**options)) is None


def test_too_few_prompts_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="largest generation batch that fits is 8 rollouts"):
        scripted_trainer("no/such/model", script(rows=8), tmp_path, per_device_train_batch_size=9)


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
