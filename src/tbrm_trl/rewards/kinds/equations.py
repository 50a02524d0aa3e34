"""Equations: a name with its value, or two sides compared with two other sides."""

import re

from .. import symbols
from ..notation import squeezed
from . import Same
from .lists import in_order
from .scalars import NAME, equation, same_scalar, several_equations

_FUNCTION = re.compile(r"(\\?[a-zA-Z]+(?:\^\{?-1\}?)?)\s*\(\s*([a-zA-Z])\s*\)")


def same_equation(gold: list[str], answer: str, same: Same) -> bool:
    given = equation(answer)
    if not NAME.fullmatch(gold[0]):
        is_known = given is None or NAME.fullmatch(given[0]) or symbols.is_constant(given[0])
        if is_known and all(map(symbols.is_constant, gold)):  # 2 + 2 = 4 answers 4
            return same(gold[-1], given[-1] if given else answer)
        return given is not None and len(gold) == len(given) == 2 and _same_sides(gold, given, same)
    if given is None:
        return any(same(side, answer) for side in gold[1:])
    if several_equations(answer):
        return False
    if len(gold) == len(given) == 2 and all(map(NAME.fullmatch, (*gold, *given))) and _swapped(gold, given, same):
        return True
    if not NAME.fullmatch(given[0]):
        return len(gold) == len(given) == 2 and _same_sides(gold, given, same)
    sides = [_with_argument(side, gold[0], given[0]) for side in gold[1:]]
    if not _same_name(gold[0], given[0]):
        return False
    if len(gold) == len(given):
        return in_order(sides, given[1:], same)
    if any(same(side, given[-1]) for side in sides):
        return True
    return len(gold) == 2 and same(sides[0], given[1]) and all(same(side, given[1]) for side in given[2:])


def _swapped(gold: list[str], given: list[str], same: Same) -> bool:
    """Whether y = x is given for x = y."""
    return same_scalar(gold[0], given[1], same) and same_scalar(gold[1], given[0], same)


def _same_sides(gold: list[str], given: list[str], same: Same) -> bool:
    """Whether two equations have the same sides, in either order, or are multiples of each other."""
    if "\\text" in "".join(given) and "\\text" not in "".join(gold):
        return False
    for first, second in (given, given[::-1]):
        if same_scalar(gold[0], first, same) and same_scalar(gold[1], second, same):
            return True
    return symbols.proportional(f"({gold[0]})-({gold[1]})", f"({given[0]})-({given[1]})")


def _same_name(gold: str, answer: str) -> bool:
    """Whether two sides are the same name. Letters must agree, f(x) matches f(t), and any words match."""
    variables = [re.match(r"\s*[EDV]\w*\s*\(\s*([A-Z])\s*\)", text) for text in (gold, answer)]
    if all(variables) and len({match[1] for match in variables if match}) > 1:
        return False  # E(X) is not E(Y)
    first, second = (squeezed(re.sub(r"\(.*", "", text)).strip("{}") for text in (gold, answer))
    if re.search(r"[a-z]{3}", second) and not second.startswith("\\"):
        return True
    if len(first) == 1 and second.isupper() and len(second) > 2:  # a triangle's area
        return True
    return first == second if "_" in first and "_" in second else first.split("_")[0] == second.split("_")[0]


def _with_argument(text: str, gold: str, answer: str) -> str:
    """The right side of f(x) with the answer's letter for x."""
    first, second = _FUNCTION.fullmatch(gold), _FUNCTION.fullmatch(answer)
    return re.sub(rf"(?<![a-zA-Z\\]){first[2]}(?![a-zA-Z])", second[2], text) if first and second else text
