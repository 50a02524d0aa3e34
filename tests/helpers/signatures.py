"""Signatures as text, for comparison with those written in a test."""

import inspect
import re
from collections.abc import Callable
from typing import Any


def signature(function: Callable[..., Any]) -> str:
    """The names and defaults of a function's parameters, without annotations."""
    bare = inspect.signature(inspect.unwrap(function))
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    shown = str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function (\S+) at \w+>", r"\1", shown)
