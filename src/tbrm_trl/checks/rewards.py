"""Checks of reward functions before anything is loaded: they must take what they are given, and get what they need."""

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name

# Arguments that TRL gives every reward function, besides the columns of the data set.
_ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_reward_arguments(
    reward_funcs: Any, title: str, columns: Collection[str], more: bool, environments: bool = False
) -> None:
    """Refuse reward functions that cannot be called with what they will be given.

    Args:
        reward_funcs: as the trainer takes them. Models, and functions without a signature, are skipped.
        title: what the error calls the data set.
        columns: columns of the data set, without those that no reward function gets.
        more: whether unknown arguments may be added (by environments, a rollout function).
        environments: whether the functions are given the environments.

    Raises:
        ValueError: for a column with the name of an argument that TRL gives, an entry that is not a function, a
            function that does not take an argument it is given, and one that needs a column that is missing.
    """
    if taken := [name for name in columns if name in _ALWAYS and name != "completion_ids"]:
        raise ValueError(
            f"The column {', '.join(map(repr, taken))} of {title} has the name of "
            "an argument that every reward function is given. Rename it: `dataset.rename_column(...)`."
        )
    given = [*_ALWAYS, *(name for name in columns if name not in ("prompt", "completion", "completion_ids"))]
    given += ["environments"] * environments
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(function, (nn.Module, str)):
            continue
        if inspect.isclass(function) or not callable(function):
            raise ValueError(
                f"`reward_funcs` holds {function!r}, which is no function. Pass a list of functions (of a class: an "
                "instance that can be called)."
            )
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # built-in: it has none
            continue
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        needed = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
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
