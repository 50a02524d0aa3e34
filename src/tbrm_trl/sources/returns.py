"""From raw rewards to the return that the residual takes: checked numbers, weighted sums, lower bounds."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import is_async_callable


def rewards_of(returned: Any, count: int, name: str) -> list[float | None]:
    """What a reward function returned, as one number or None for each completion.

    Args:
        returned: a list, tuple, array or tensor.
        count: number of completions.
        name: of the reward function.

    Raises:
        ValueError: for anything else. It names the function and says what it returned.
    """
    wanted = f"Return a list of {count} numbers, one for each completion (None where the function does not apply)."
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
        raise ValueError(f"Reward function {name!r} returned {_shown(returned)}. {wanted}")
    if hasattr(returned, "shape") and len(returned.shape) != 1:
        raise ValueError(f"Reward function {name!r} returned an array of shape {tuple(returned.shape)}. {wanted}")
    values = returned.tolist() if isinstance(returned, Tensor) else list(returned)
    if len(values) != count:
        raise ValueError(f"Reward function {name!r} returned {len(values)} rewards for {count} completions. {wanted}")
    return [_number(value, row, name, wanted) for row, value in enumerate(values)]


def _number(value: Any, row: int, name: str, wanted: str) -> float | None:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, Real):
        raise ValueError(f"Reward function {name!r} returned {_shown(value)} for completion {row}. {wanted}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"


def checked_reward(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The reward function, followed by `rewards_of`."""
    if is_async_callable(function):

        @functools.wraps(function)
        async def checked(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
            return rewards_of(await function(*args, completions=completions, **kwargs), len(completions), name)

    else:

        @functools.wraps(function)
        def checked(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
            return rewards_of(function(*args, completions=completions, **kwargs), len(completions), name)

    return checked


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, those that come again with a number: `["f", "f"]` becomes `["f", "f_2"]`."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def total_reward(rewards: Tensor, weights: Tensor, pessimism: float = 0.0) -> Tensor:
    """The weighted sum of the raw rewards, less `pessimism` standard errors of it.

    Pessimism takes the functions for verdicts on the same thing. Let n of them apply, with weights w that sum to W,
    weighted mean m and weighted variance `s² = n/(n − 1) Σ w (r − m)²/W`. Their sum W·m has the standard error
    `W s/√n`, so the result is a lower confidence bound. It is the sum itself if they agree or only one applies.

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
