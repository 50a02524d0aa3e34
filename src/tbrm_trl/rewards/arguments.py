"""A check of what a reward function is called with, before anything is generated."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from trl.trainer.utils import get_callable_name

NOT_GIVEN = ("prompt", "completion", "completion_ids")  # columns that no reward function is given


def check_columns(title: str, columns: Collection[str], always: Collection[str]) -> None:
    """Refuse columns with the name of an argument that every reward function is given.

    Args:
        title: what the error calls the data set.
        columns: columns of the data set that reward functions are given.
        always: the arguments that every reward function is given.

    Raises:
        ValueError: for such a column.
    """
    if taken := [name for name in columns if name in always and name != "completion_ids"]:
        raise ValueError(
            f"The column {', '.join(map(repr, taken))} of {title} has the name of "
            "an argument that every reward function is given. Rename it: `dataset.rename_column(...)`."
        )


def check_arguments(
    function: Callable[..., Any], title: str, columns: Collection[str], always: Collection[str], more: bool = False
) -> None:
    """Refuse a reward function that cannot be called with what it will be given.

    Args:
        function: a reward function. One without a signature is skipped.
        title: what the error calls the data set.
        columns: columns of the data set.
        always: the arguments that every reward function is given besides.
        more: whether unknown arguments may be added (by environments, a rollout function).

    Raises:
        ValueError: for a function that does not take an argument it is given, and one that needs a column that is
            missing.
    """
    given = [*always, *(name for name in columns if name not in NOT_GIVEN)]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in: it has none
        return
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    name = get_callable_name(function)
    unknown = [argument for argument in given if argument not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"Reward function {name!r} does not take {', '.join(map(repr, unknown))}, which it is given by name "
            f"with {title}. Add `**kwargs` to its arguments."
        )
    missing = sorted(needed - set(given))
    if missing and not more:
        raise ValueError(
            f"Reward function {name!r} needs {', '.join(map(repr, missing))}, but {title} has no such column (its "
            f"columns: {', '.join(columns)}). Add the column, or give the argument a default."
        )
