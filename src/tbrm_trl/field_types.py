"""Whether a value is of a field's declared type. A dataclass does not check it, and a YAML file may hold anything."""

from enum import Enum, EnumType
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, declared: Any) -> bool:
    """Whether a value is of a declared type. An integer that fits a float counts as a float. A bool is not a number."""
    kind, of = get_origin(declared), get_args(declared)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in of)
    if kind is Literal:
        return value in of
    if kind is list:
        return isinstance(value, list) and all(fits(one, of[0]) for one in value)
    if kind is dict:
        return isinstance(value, dict) and all(fits(one, of[1]) for one in value.values())
    if isinstance(declared, EnumType):
        members: dict[str, Enum] = dict(declared.__members__)
        return isinstance(value, declared) or value in [one.value for one in members.values()]
    if declared is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if declared is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_in_range(value)
    return declared is Any or isinstance(value, declared)


def _is_in_range(number: Real) -> bool:
    """Whether a number fits a float. An integer may be larger."""
    try:
        return float(number) is not None
    except OverflowError:
        return False


def in_words(declared: Any, none: str = "None") -> str:
    """A declared type as an error names it. `none` is the word for no value."""
    kind, of = get_origin(declared), get_args(declared)
    if kind in (Union, UnionType):
        # A choice that may also be given as text is text here.
        named = [one for one in of if not (isinstance(one, EnumType) and str in of) and one is not NoneType]
        return " or ".join([*(in_words(one, none) for one in named), *([none] if NoneType in of else [])])
    if kind is list:
        return f"a list of {in_words(of[0], none)}"
    if kind is dict or declared is dict:
        return "a mapping"
    if kind is Literal or isinstance(declared, EnumType):
        return " or ".join(map(repr, of or declared._value2member_map_))
    return {bool: "true or false", NoneType: none}.get(declared) or declared.__name__
