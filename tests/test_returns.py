"""R(τ) from the raw rewards, by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from tbrm_trl.sources.returns import total_reward

NAN = math.nan


def test_total_reward_by_hand():
    """1·1 + 2·0.5 = 2; a function that did not apply leaves the sum: 2·2 = 4; none applied: NaN."""
    rewards = torch.tensor([[1.0, 0.5], [NAN, 2.0], [NAN, NAN]])
    total = total_reward(rewards, torch.tensor([1.0, 2.0]))
    assert total[:2].tolist() == [2.0, 4.0] and total[2].isnan()


def test_a_function_without_weight_only_watches():
    """It gives no return where no other function applies, and does not count among those that agree."""
    rewards = torch.tensor([[3.0, 1.0], [3.0, NAN]])
    total = total_reward(rewards, torch.tensor([0.0, 2.0]))
    assert total[0].item() == 2.0 and total[1].isnan()
    with_watcher = torch.tensor([[0.0, 1.0, 5.0]]).double()
    lower = total_reward(with_watcher, torch.tensor([1.0, 1.0, 0.0]).double(), pessimism=1.0)
    assert lower.item() == total_reward(with_watcher[:, :2], torch.ones(2).double(), pessimism=1.0).item()


def test_pessimism_by_hand():
    """Verdicts 0, 0, 0, 2 of weight 2: m = 0.5, s² = 4/3 · (3·0.25 + 2.25)/4 = 1, W s/√n = 8·1/2 = 4 below W m = 4.

    Weights 1, 2, 1 on 3, 0, 1: m = 1, s² = 3/2 · (4 + 2 + 0)/4 = 2.25, W s/√n = 4·1.5/√3 = √12 below 4.
    """
    four = torch.tensor([[0.0, 0.0, 0.0, 2.0], [0.0, 2.0, NAN, NAN], [1.0, 1.0, 1.0, 1.0], [NAN, 1.0, NAN, NAN]])
    four = torch.cat([four, torch.full((1, 4), NAN)]).double()
    lower = total_reward(four, torch.full((4,), 2.0).double(), pessimism=0.5)
    assert lower[:4].tolist() == [2.0, 2.0, 8.0, 2.0]  # the second: 4 − 0.5·4·√(2/2); then nothing to disagree on
    assert lower[4].isnan()
    three = torch.tensor([[3.0, 0.0, 1.0]]).double()
    lower = total_reward(three, torch.tensor([1.0, 2.0, 1.0]).double(), pessimism=1.0)
    assert lower.item() == pytest.approx(4 - math.sqrt(12), abs=1e-14)


def test_pessimism_is_standard_errors_of_the_sum():
    rewards = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = total_reward(rewards, torch.ones(3).double(), pessimism=1.7)
    for row, value in zip(rewards.tolist(), lower.tolist(), strict=True):
        standard_error = 3 * statistics.stdev(row) / math.sqrt(3)
        assert value == pytest.approx(sum(row) - 1.7 * standard_error, abs=1e-14)
