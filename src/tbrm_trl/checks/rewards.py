"""Checks of reward functions before anything is loaded: they must take what they are given, and get what they need."""

import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import AutoConfig

from ..context import loading
from ..rewards.arguments import check_arguments, check_columns
from ..rewards.workers import InWorkers, WorkerError

# Arguments that TRL gives every reward function, besides the columns of the data set.
_ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_reward_arguments(
    reward_funcs: Any,
    title: str,
    columns: Collection[str],
    more: bool,
    environments: bool = False,
    hub_options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse reward functions that cannot be called with what they will be given.

    Args:
        reward_funcs: as the trainer takes them. Models, and functions without a signature, are skipped.
        title: what the error calls the data set.
        columns: columns of the data set, without those that no reward function gets.
        more: whether unknown arguments may be added (by environments, a rollout function).
        environments: whether the functions are given the environments.
        hub_options: with which TRL loads a reward model named by its id or folder.

    Raises:
        OSError: for a reward model that cannot be loaded.
        ValueError: for a column with the name of an argument that TRL gives, an entry that is not a function, a
            function that does not take an argument it is given, and one that needs a column that is missing.
    """
    check_columns(title, columns, _ALWAYS)
    always = [*_ALWAYS, "environments"] if environments else _ALWAYS
    for function in _listed(reward_funcs):
        if isinstance(function, str):
            with loading("The reward model", function):
                AutoConfig.from_pretrained(function, **hub_options)
        if isinstance(function, (nn.Module, str)):
            continue
        if inspect.isclass(function) or not callable(function):
            raise ValueError(
                f"`reward_funcs` holds {function!r}, which is no function. Pass a list of functions (of a class: an "
                "instance that can be called)."
            )
        check_arguments(function, title, columns, always, more)


def _listed(reward_funcs: Any) -> list[Any]:
    """The reward functions of a trainer, which takes several or one."""
    return reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]


def start_workers(reward_funcs: Any) -> None:
    """Start a worker of each reward function that runs in workers.

    Raises:
        ValueError: for a function that no worker can run, such as one that needs a package that is not installed.
    """
    for function in _listed(reward_funcs):
        if isinstance(function, InWorkers):
            try:
                function.start()
            except WorkerError as error:
                raise ValueError(f"Reward function {function.__name__!r} cannot judge. {error}") from error
