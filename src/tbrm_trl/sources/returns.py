"""Turns raw rewards into the return of the residual: checks their size, sums them by weight, takes lower bounds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..trajectory import largest_return


def check_magnitude(rewards: Tensor, weights: Tensor, names: Sequence[str], beta: float) -> None:
    """Refuse rewards that float32 cannot square in nats.

    Args:
        rewards: `(N, F)`, NaN where a function did not apply or its verdict is unknown.
        weights: `(F,)`.
        names: the F functions' names.
        beta: β.

    Raises:
        ValueError: if a reward that counts is infinite or too large. The message names the function, the rollout and
            the reward.
    """
    beyond = (weights * rewards).abs() > largest_return(beta)  # (N, F) never where a function only watches: 0 · inf
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        raise ValueError(
            f"Reward function {names[column]!r} returned {rewards[row, column].item():g} for rollout {row} of "
            f"{len(rewards)}. With beta={beta} a reward may reach {largest_return(beta):g}: the residual divides it by "
            "beta, and float32 could not sum its square. Return a number of ordinary size, or None to leave it out."
        )


def lacking_number(rewards: Tensor, weights: Tensor, functions: Sequence[Any]) -> Tensor:
    """Whether a reward model with a weight gave no number, which is an unknown verdict: it has no None.

    Args:
        rewards: `(N, F)`.
        weights: `(F,)`.
        functions: the F functions, some of them models.

    Returns:
        `(N,)` bool.
    """
    is_model = torch.tensor([isinstance(one, nn.Module) for one in functions], device=weights.device)  # (F,)
    return rewards[:, is_model & (weights != 0)].isnan().any(dim=1)


def unique_names(names: Sequence[str]) -> list[str]:
    """Number repeated names: `["f", "f"]` becomes `["f", "f_2"]`."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def total_reward(rewards: Tensor, weights: Tensor, pessimism: float = 0.0) -> Tensor:
    """The weighted sum of the raw rewards, minus `pessimism` times its standard error.

    Pessimism assumes that all functions judge the same thing. Let n of them apply, with weights w that sum to W,
    weighted mean m and weighted variance `s² = n/(n − 1) Σ w (r − m)²/W`. Their sum W·m has the standard error
    `W s/√n`, so the result is a lower confidence bound. It equals the sum if they agree or only one applies.

    Args:
        rewards: `(B, F)` raw rewards, NaN where a function did not apply.
        weights: `(F,)`.
        pessimism: number of standard errors, ≥ 0.

    Returns:
        `(B,)` in reward units; NaN where no function with a weight applied.

    Source: a lower confidence bound instead of the mean, after MICRO, arXiv 2312.03991.
    """
    applied = ~rewards.isnan() & (weights != 0)  # (B, F) a function without weight only watches
    weight = torch.where(applied, weights, 0.0)  # (B, F)
    given = torch.where(applied, rewards, 0.0)  # (B, F)
    total = (weight * given).sum(dim=1)  # (B,)
    if pessimism:
        whole, count = weight.sum(dim=1), applied.sum(dim=1)  # (B,) each
        mean = total / whole  # NaN where none applied
        variance = (weight * (given - mean[:, None]).square()).sum(dim=1) / whole * count / (count - 1).clamp(min=1)
        total = total - pessimism * whole * (variance / count).sqrt()
    return total.masked_fill(~applied.any(dim=1), torch.nan)
