"""Calls of tools: one that exits gives an error, as one that raises does."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .reward_calls import ended_within


def exits_raise(tools: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The tools by name, with a RuntimeError in place of an exit.

    TRL has the policy read what a tool raises. An exit would end the process, or the event loop of the others: a tool
    that executes the policy's code need only read `exit()`.
    """
    return {name: _exit_raises(tool) for name, tool in tools.items()}


def _exit_raises(tool: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(tool):

        @functools.wraps(tool)
        async def call(*args: Any, **kwargs: Any) -> Any:
            with ended_within():
                return await tool(*args, **kwargs)

    else:

        @functools.wraps(tool)
        def call(*args: Any, **kwargs: Any) -> Any:
            with ended_within():
                return tool(*args, **kwargs)

    return call
