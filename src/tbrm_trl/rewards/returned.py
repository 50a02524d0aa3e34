"""What a reward function may return. Worker processes load this file by its path, so it imports no other library."""

from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any


class NotRewardsError(ValueError):
    """A reward function returned something other than a list of rewards."""


def rewards_of(returned: Any, count: int, name: str) -> list[float | None]:
    """Convert what a reward function returned to one number or None per completion; NaN is an unknown verdict.

    Args:
        returned: a list, tuple, array or tensor.
        count: number of completions.
        name: the reward function's name.

    Raises:
        NotRewardsError: for anything else. The message names the function and shows what it returned.
    """
    wanted = (
        f"Return a list of {count} number{'s' * (count != 1)}, one for each completion (None where the function does "
        "not apply, NaN where its verdict is unknown)."
    )
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
        raise NotRewardsError(f"Reward function {name!r} returned {_shown(returned)}. {wanted}")
    shape = getattr(returned, "shape", None)  # of an array or a tensor
    if shape is not None and len(shape) != 1:
        raise NotRewardsError(f"Reward function {name!r} returned an array of shape {tuple(shape)}. {wanted}")
    values = list(returned)
    if len(values) != count:
        raise NotRewardsError(
            f"Reward function {name!r} returned {len(values)} rewards for {count} completions. {wanted}"
        )
    return [_number(value, row, name, wanted) for row, value in enumerate(values)]


def _number(value: Any, row: int, name: str, wanted: str) -> float | None:
    if getattr(value, "ndim", None) == 0:  # of an array or a tensor
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, Real):
        raise NotRewardsError(f"Reward function {name!r} returned {_shown(value)} for completion {row}. {wanted}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"
