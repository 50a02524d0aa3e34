"""Arbitrary constants: a solution may write `+ c`, `+ C` or `+ K`, and `2\\pi k` or `2\\pi n`."""

import re
from typing import Any

import sympy

# Capitals have the names that `symbols` gives them: x_{9067} is C, x_{90671} is C_1, x_{9075} is K.
_CONSTANT = re.compile(r"(?:c|k|x_\{9067|x_\{9075)(?:_\{?)?(\d?)\}?")
_A_AND_B = {"x_{9065}": "1", "x_{9066}": "2"}
_INTEGER = re.compile("[knm]")
_VARIABLES = frozenset("xytzuws")  # beside one of them a letter may be an arbitrary constant
_MOST = 4
_WITH_NUMBER = re.compile(r"(?<![a-zA-Z\\])[cC]_(?:\{(\d)\}|(\d))")


def small(text: str) -> str:
    """The text with c_1 for C_1, to compare vectors with constants, which are compared as text."""
    return _WITH_NUMBER.sub(r"c_\1\2", text)


def with_constants_of(gold: sympy.Expr, answer: sympy.Expr) -> sympy.Expr | None:
    """The answer with the gold's names for arbitrary constants; None if none has another name.

    Only letters that the other side lacks are renamed. Beside a variable such as x, constants are c, C, k and K, alone
    or each with a number, and A and B for the first two. A single one may be another letter than the gold's only if it
    is added. Multiples of π have k, n or m for any integer.
    """
    ours, theirs = gold.free_symbols - answer.free_symbols, answer.free_symbols - gold.free_symbols
    if not 0 < len(ours) == len(theirs) <= _MOST:
        return None
    if len(ours) == 1:
        return _with_constant_of(gold, ours.pop(), answer, theirs.pop())
    numbered, given = _numbered(ours), _numbered(theirs)
    if not _has_variable(gold) or numbered is None or given is None or numbered.keys() != given.keys():
        return None
    return answer.xreplace({given[number]: numbered[number] for number in numbered})


def _with_constant_of(gold: sympy.Expr, our: Any, answer: sympy.Expr, their: Any) -> sympy.Expr | None:
    is_integer = all(
        _INTEGER.fullmatch(str(one)) and _counts_pi(side, one) for side, one in ((gold, our), (answer, their))
    )
    numbered, given = _numbered({our}), _numbered({their})
    is_constant = numbered is not None and given is not None and numbered.keys() == given.keys() and _has_variable(gold)
    is_added = abs(gold.diff(our)) == 1 and abs(answer.diff(their)) == 1
    if is_integer or (is_constant and (is_added or _letter(our) == _letter(their))):
        return answer.xreplace({their: our})
    return None


def _has_variable(expression: sympy.Expr) -> bool:
    return any(str(letter) in _VARIABLES for letter in expression.free_symbols)


def _counts_pi(expression: sympy.Expr, letter: Any) -> bool:
    """Whether the expression has a rational multiple of π for each unit of the letter."""
    step = expression.diff(letter) / sympy.pi
    return bool(step.is_Rational)


def _numbered(letters: set[Any]) -> dict[str, Any] | None:
    """Arbitrary constants by their number; None if a letter stands for none, or two have one number."""
    names = {str(one): one for one in letters}
    if names.keys() == _A_AND_B.keys():
        return {_A_AND_B[name]: one for name, one in names.items()}
    found = {match[1]: one for name, one in names.items() if (match := _CONSTANT.fullmatch(name))}
    return found if len(found) == len(letters) else None


def _letter(constant: Any) -> str:
    """The small letter of an arbitrary constant."""
    name = str(constant)
    return {"x_{9067": "c", "x_{9075": "k"}.get(name[:7], name[0])
