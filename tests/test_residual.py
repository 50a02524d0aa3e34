"""Values derived by hand, to the digit."""

from __future__ import annotations

import math

import pytest
import torch

from tbrm_trl import bellman_residual, squared_residual_loss, trajectory_log_ratio
from tbrm_trl.loss.residual import mean_over_counted, per_action


def test_log_ratio_by_hand():
    """Row 1: (−1+2) + (−0.5+0.25) = 0.75, the masked 100 aside. Row 2: only the last token: −3+1 = −2."""
    policy = torch.tensor([[-1.0, -0.5, 100.0], [-9.0, -9.0, -3.0]])
    reference = torch.tensor([[-2.0, -0.25, -7.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert trajectory_log_ratio(policy, reference, mask).tolist() == [0.75, -2.0]


def test_residual_by_hand():
    """V + log-ratio − R/β: 3 + 0.75 − 1/0.5 = 1.75; 3 − 2 − 0 = 1; 3 + 0 + 1/0.5 = 5."""
    residual = bellman_residual(
        torch.full((3,), 3.0), torch.tensor([0.75, -2.0, 0.0]), torch.tensor([1.0, 0.0, -1.0]), 0.5
    )
    assert residual.tolist() == [1.75, 1.0, 5.0]


def test_loss_by_hand():
    """(1.75² + 5²) / 2 = 14.03125, the middle row left out; against a step of 4 it is half of that."""
    residual = torch.tensor([1.75, math.nan, 5.0])
    counted = torch.tensor([True, False, True])
    assert squared_residual_loss(residual, counted, 2).item() == 14.03125
    assert squared_residual_loss(residual, counted, 4).item() == 7.015625
    assert squared_residual_loss(residual, counted, 1).item() == 28.0625


def test_weights_by_hand():
    """(3·2² + 0.5·4²) / 4 = 5, and of values already squared (3·2 + 0.5·4) / 4 = 2."""
    values, weight = torch.tensor([2.0, math.nan, 4.0]), torch.tensor([3.0, 9.0, 0.5])
    counted = torch.tensor([True, False, True])
    assert squared_residual_loss(values, counted, torch.tensor(4), weight).item() == 5.0
    assert mean_over_counted(values, counted, 4, weight).item() == 2.0


def test_per_action_by_hand():
    """Over 2 actions, 1, and none: 3/2, −2, and 0 as it was."""
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    assert per_action(torch.tensor([3.0, -2.0, 0.0]), mask).tolist() == [1.5, -2.0, 0.0]


def test_gradient_by_hand():
    """dL/dV = 2 δ / n. With δ = (1.75, 1) and n = 2 it is (1.75, 1), and the same for each unmasked log-prob."""
    value = torch.tensor([3.0, 3.0], requires_grad=True)
    policy = torch.tensor([[-1.0, -0.5], [-9.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -0.25], [-1.0, -1.0]])
    log_ratio = trajectory_log_ratio(policy, reference, torch.tensor([[1, 1], [0, 1]]))
    loss = squared_residual_loss(
        bellman_residual(value, log_ratio, torch.tensor([1.0, 0.0]), 0.5), torch.tensor([True, True]), 2
    )
    loss.backward()
    assert value.grad.tolist() == [1.75, 1.0]
    assert policy.grad.tolist() == [[1.75, 1.75], [0.0, 1.0]]


def test_nan_outside_the_mask_touches_nothing():
    policy = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    log_ratio = trajectory_log_ratio(policy, torch.tensor([[-2.0, math.nan]]), torch.tensor([[True, False]]))
    log_ratio.sum().backward()
    assert log_ratio.item() == 1.0
    assert policy.grad.tolist() == [[1.0, 0.0]]


def test_unscored_rows_give_no_gradient():
    """A NaN reward makes a NaN residual; left out, it gives exactly zero, and a batch of such rows has a graph."""
    value = torch.tensor([3.0], requires_grad=True)
    loss = squared_residual_loss(
        bellman_residual(value, torch.zeros(1), torch.tensor([math.nan]), 0.5), torch.tensor([False]), 0
    )
    loss.backward()
    assert loss.item() == 0.0 and value.grad.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    """1,000 tokens of −0.001 each in log-ratio sum to about −1; in half precision the sum would stall or round."""
    policy = torch.full((1, 1000), -1.0, dtype=dtype)
    reference = torch.full((1, 1000), -0.9921875, dtype=dtype)  # exact in both
    ratio = trajectory_log_ratio(policy, reference, torch.ones(1, 1000))
    assert ratio.dtype == torch.float32
    assert ratio.item() == -7.8125
    assert bellman_residual(torch.ones(1, dtype=dtype), ratio, torch.ones(1, dtype=dtype), 0.1).dtype == torch.float32


def test_float64_stays():
    ones = torch.ones(1, 2, dtype=torch.float64)
    assert trajectory_log_ratio(ones, ones, ones).dtype == torch.float64


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        bellman_residual(torch.ones(1), torch.ones(1), torch.ones(1), beta)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        trajectory_log_ratio(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="one shape"):
        bellman_residual(torch.ones(2), torch.ones(2, 1), torch.ones(2), 0.1)
