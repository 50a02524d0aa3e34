"""What becomes of raw rewards before the residual takes them: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def total_reward(rewards: Tensor, weights: Tensor, pessimism: float = 0.0) -> Tensor:
    """The weighted sum of the raw rewards, less `pessimism` standard errors of it.

    With pessimism the functions are verdicts on the same thing, and the sum W·m of n of them, with weighted mean m and
    weighted variance `s² = n/(n − 1) Σ w (r − m)²/W`, is known up to `W s/√n`: the result is a lower confidence bound.
    Where they agree, or one alone applies, nothing is subtracted.

    Args:
        rewards: `(B, F)` raw rewards, NaN where a function did not apply.
        weights: `(F,)`.
        pessimism: standard errors, ≥ 0.

    Returns:
        `(B,)` in reward units; NaN where no function applied.

    Source: a lower confidence bound in place of the mean, after MICRO, arXiv 2312.03991.
    """
    applied = ~rewards.isnan()  # (B, F)
    weight = torch.where(applied, weights, 0.0)  # (B, F)
    given = torch.where(applied, rewards, 0.0)  # (B, F)
    total = (weight * given).sum(dim=1)  # (B,)
    if pessimism:
        whole, count = weight.sum(dim=1), applied.sum(dim=1)  # (B,) each
        mean = total / whole
        variance = (weight * (given - mean[:, None]).square()).sum(dim=1) / whole * count / (count - 1).clamp(min=1)
        total = total - pessimism * whole * (variance / count).sqrt()
    return total.masked_fill(~applied.any(dim=1), torch.nan)


def mean_reward(rewards: Sequence[float]) -> float:
    """Mean of those that are given; 0 where none is."""
    given = [reward for reward in rewards if not math.isnan(reward)]
    return sum(given) / len(given) if given else 0.0
