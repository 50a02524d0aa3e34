"""Reward functions, given by name, by dotted path, or with weights.

    from tbrm_trl.rewards import load

    functions, weights = load({"math": 1.0, "format": 0.1, "my_module.my_reward": 0.5})
    TBRMTrainer(reward_funcs=functions, args=TBRMConfig(reward_weights=weights, ...), ...)

`math` compares the answer with the column `solution`, `reasoning_gym` asks the task's verifier, `format` and `thinking`
check the form, and `length(limit=2048)` the length. docs/rewards.md describes each reward.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import form, gym, mathematics
from .golds import Golds, find_column, read_golds
from .mathematics import correct, verdict
from .workers import InWorkers, RewardError

Reward = Callable[..., Any]

# name: (the function, or a class whose instances are functions; whether it runs in workers)
NAMES: dict[str, tuple[Any, bool]] = {
    "math": (mathematics.correct, True),
    "reasoning_gym": (gym.solved, True),
    "format": (form.boxed, False),
    "thinking": (form.thinking, False),
    "length": (form.Length, False),
}

__all__ = [
    "NAMES",
    "Golds",
    "InWorkers",
    "RewardError",
    "correct",
    "find_column",
    "load",
    "read_golds",
    "reward_function",
    "verdict",
    "with_arguments",
]


def load(
    rewards: str | Reward | Sequence[str | Reward] | Mapping[str, float], **worker_options: Any
) -> tuple[list[Reward], list[float] | None]:
    """Reward functions and their weights, for `reward_funcs` and `reward_weights`.

    Args:
        rewards: one name, dotted path or function; several in a list; or a mapping from names to weights.
        worker_options: options of `InWorkers`, such as `time_limit` and `raises`, for rewards that run in workers.

    Returns:
        The functions, and their weights if weights were given, else None.
    """
    if isinstance(rewards, Mapping):
        return [reward_function(one, **worker_options) for one in rewards], [
            float(weight) for weight in rewards.values()
        ]
    several = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    return [reward_function(one, **worker_options) for one in several], None


def reward_function(reward: str | Reward, **worker_options: Any) -> Reward:
    """The reward function for a name ("math", "length(limit=2048)") or a dotted path ("my_module.my_reward").

    `math`, `reasoning_gym` and functions given by dotted path run in worker processes (`InWorkers`), except coroutine
    functions. A function given by dotted path is the user's own, so its exceptions are raised unless the options
    contain `raises=False`. A function passed as such is returned unchanged.

    Raises:
        ValueError: if the name is unknown, its arguments are wrong, or the dotted path cannot be imported.
    """
    if not isinstance(reward, str):
        return reward
    name, arguments = with_arguments(reward, "length(limit=2048)")
    if name in NAMES:
        function, in_workers = NAMES[name]
        if arguments and not inspect.isclass(function):
            raise ValueError(f"The reward {name!r} takes no arguments.")
    else:
        function, in_workers = _imported(name), True
    if inspect.isclass(function) or arguments:
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"The reward {reward!r} needs other arguments: {inspect.signature(function)}.") from error
        try:
            function = function(**arguments)
        except ValueError:
            raise
        except Exception as error:  # the user's own may raise anything
            raise ValueError(f"The reward {reward!r} cannot be made: {type(error).__name__}: {error}") from error
    if not in_workers or inspect.iscoroutinefunction(function):
        return function
    return InWorkers(function, **{"raises": name not in NAMES, **worker_options})


def with_arguments(text: str, example: str) -> tuple[str, dict[str, Any]]:
    """Split `length(limit=2048)` into a name and its arguments. The error for another form shows the example."""
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text.strip(), {}
    try:
        call = ast.parse(f"call({rest.strip()}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return name.strip(), {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"A name with arguments is written as {example}, not {text!r}.") from None


def _imported(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(f"There is no reward {path!r}. Names: {', '.join(NAMES)}; or a dotted path, module.function.")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module may raise anything
        raise ValueError(f"The reward {path!r} cannot be imported: {str(error) or type(error).__name__}") from error
    if not callable(found):
        raise ValueError(f"The reward {path!r} is no function, but {found!r}.")
    return found
