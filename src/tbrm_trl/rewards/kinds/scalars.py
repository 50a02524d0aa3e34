"""Single values: numbers without rounding, then units, then expressions. A gold of no other kind is a single value."""

import re
from fractions import Fraction
from string import ascii_lowercase

from .. import symbols
from ..notation import OPENING, bracketed, cut, plain, squeezed
from ..quantities import Number, in_base, number, rounds_to, same_number
from ..units import Unit, amount, several_units, split_unit, unit
from . import Same

RELATION = r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>"
JOIN = r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[,;]|\\(?:vee|lor)(?![a-zA-Z])"
NAME = re.compile(
    r"(?:\\(?:text|overline|vec|hat|tilde|angle|triangle)\s*)?"
    r"\{?(?:\\(?!frac|sqrt|log|sin|cos|tan|ln|binom)[a-zA-Z]+|[a-zA-Z][a-zA-Z ]*)\}?"
    r"'*(?:_\{?[^{}=<>]*\}?)?'*(?:\^\{?-1\}?)?\s*(?:\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?"
)
_CONDITION = re.compile(
    r"(.*\d.*?)[,\s]*(?:\\text\{[^{}]*\b(?:at|when|for|if|with)\b[^{}]*\}|(?<![a-zA-Z\\])(?:at|when|for|if|with)(?![a-zA-Z]))"
    rf"\s*{NAME.pattern}"
)
_MEMBER = re.compile(r"(.{1,40}?)\s*\\in(?![a-zA-Z])\s*(\\\{.*)", re.DOTALL)
_APPROXIMATELY = r"\\approx(?![a-zA-Z])"
_LOG = re.compile(r"\\log(?!\s*_)(?![a-zA-Z])")
_PERCENT, _DEGREE = (("percent", 1),), (("degree", 1),)
_POUND, _STERLING = unit("pound"), unit("£")


def equation(text: str) -> list[str] | None:
    """The sides of an equation, or of a chain of them."""
    if re.search(RELATION, text):
        return None
    sides = cut(text, r"=|\\equiv(?![a-zA-Z])")
    return sides if len(sides) > 1 and all(sides) else None


def several_equations(text: str) -> bool:
    """Whether a text names several values, like `x = 3 or x = 5`, so that no single value is the answer."""
    return sum("=" in part for part in cut(text, JOIN)) > 1


def value_side(text: str) -> str:
    """A name's value: 5 in `x = 5`, `(3, -2)` in `(x, y) = (3, -2)`, `\\{1, 2\\}` in `x \\in \\{1, 2\\}`."""
    sides = None if several_equations(text) else equation(text)
    if sides and (len(sides) > 2 or NAME.fullmatch(sides[0]) or names_of(sides[0])):
        return sides[-1]
    member = _MEMBER.fullmatch(text)
    return member[2] if member and (NAME.fullmatch(member[1]) or names_of(member[1])) else text


def names_of(text: str) -> list[str] | None:
    """The names in `(x, y)`; None for anything else."""
    whole = bracketed(text)
    names = cut(whole[1], ",") if whole and whole[0] in ("(", "\\langle") else []
    return names if len(names) > 1 and all(NAME.fullmatch(name) for name in names) else None


def same_scalar(gold: str, answer: str, same: Same) -> bool:
    if bool(re.search(RELATION, gold)) != bool(re.search(RELATION, answer)):
        return False
    for compare in (_equation_for_value, _approximation, _within_brackets):
        if (verdict := compare(gold, answer, same)) is not None:
            return verdict
    sums = [several_units(text) for text in (gold, answer)]
    if any(sums):
        wanted, given = (_amount(text, whole) for text, whole in zip((gold, answer), sums, strict=True))
        return wanted is not None and wanted == given
    return _same_quantity(*_units_apart(gold, answer))


def _amount(text: str, whole: tuple[Fraction, Unit] | None) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    """The amount in basic units and the powers of its measures; None without a number or unit."""
    found = whole or amount(text)
    return (found[0] * found[1].size, found[1].powers) if found else None


def _equation_for_value(gold: str, answer: str, same: Same) -> bool | None:
    """Compare 5 with `x = 5`, `5 = x`, `m + n = 5` or `m + n = 2 + 3 = 5`.

    A gold that is a formula, or 0, does not match an equation with a formula on its left, such as `a + b = c`.
    """
    sides = equation(answer)
    if sides is None or equation(gold) is not None:
        return None
    if several_equations(answer):
        return False
    first, last = sides[0], sides[-1]
    if condition := _CONDITION.fullmatch(sides[-2]):  # 8 when x = 2
        return same(gold, condition[1])
    if NAME.fullmatch(last):
        return same_scalar(gold, first, same) or same_scalar(gold, last, same)
    value = number(gold)
    is_formula = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", first) and not NAME.fullmatch(first)
    is_curve = re.search(r"\^|x.*y|y.*x", first)  # x² + y² = 1 does not answer 1, but m + n = 40 answers 40
    if len(sides) == 2 and is_formula and (is_curve or value is None or not value.value):
        return False
    return same_scalar(gold, last, same)


def _approximation(gold: str, answer: str, same: Same) -> bool | None:
    """Compare texts that give a value with its decimal, `\\sqrt{2} \\approx 1.414`.

    Either may match, if the one rounds to the other; otherwise the first. If gold and answer both give both, both must.
    """
    if "\\approx" not in gold + answer:
        return None
    wanted, given = ([part for part in cut(text, _APPROXIMATELY) if part] for text in (gold, answer))
    if len(wanted) > 1 and len(given) > 1:
        return same(wanted[0], given[0]) and same(wanted[-1], given[-1])
    if len(given) > 1 and not (_rounds(given[0], given[-1]) or _rounds(given[-1], given[0])):
        given = given[:1]
    return any(same(one, part) for one in wanted for part in {*given[:1], *given[-1:]})


def _rounds(exact: str, decimal: str) -> bool:
    """Whether the second number is the first one, to its last digit."""
    read, rounded = number(exact), number(decimal)
    wanted = read.value if read else symbols.value(exact)
    if wanted is None or rounded is None:
        return False
    if rounded.step is None and rounded.value.denominator > 1:  # a fraction is exact
        return wanted == rounded.value
    return rounds_to(wanted, Number(rounded.value, rounded.step or Fraction(1)), digits=0)


def _within_brackets(gold: str, answer: str, same: Same) -> bool | None:
    while (whole := bracketed(answer)) and whole[0] + whole[2] == "()" and bracketed(whole[1]):
        answer = whole[1]
    if whole is None or not whole[1] or OPENING.get(whole[0], "\\}") != whole[2]:
        return None
    return "," not in whole[1] and same(gold, whole[1])


def _units_apart(gold: str, answer: str) -> tuple[str, Unit | None, str, Unit | None]:
    """Gold and answer without their units, and the units.

    If only one has a unit, a single letter after the other may be its unit too. So may one after a bare number.
    """
    gold_rest, gold_unit = split_unit(gold)
    answer_rest, answer_unit = split_unit(answer)
    if gold_unit and not answer_unit:
        answer_rest, answer_unit = split_unit(answer, loose=True)
    elif answer_unit and not gold_unit:
        gold_rest, gold_unit = split_unit(gold, loose=True)
    elif not answer_unit:  # 5 and 5 m, 5 h and 18000 s: after a bare number and a space, a letter is a unit
        apart = [
            split_unit(text, loose=bool(re.search(rf"{end}\s+[^\d\s]", text)))
            for text, end in ((gold, r"\d"), (answer, r"[\d})]"))
        ]
        if all(number(rest) is not None for rest, _ in apart):
            (gold_rest, gold_unit), (answer_rest, answer_unit) = apart
    if {gold_unit, answer_unit} == {_POUND, _STERLING}:  # `2 pounds` may be £2
        gold_unit = answer_unit = _STERLING
    return gold_rest, gold_unit, answer_rest, answer_unit


def _same_quantity(gold: str, gold_unit: Unit | None, answer: str, answer_unit: Unit | None) -> bool:
    first, second = (unit.powers if unit else () for unit in (gold_unit, answer_unit))
    if first == second:
        return _same_value(
            gold, answer, gold_unit.size / answer_unit.size if gold_unit and answer_unit else Fraction(1)
        )
    if first and second:
        return False
    if _PERCENT in (first, second):
        value = number(gold)
        share = not first and value is not None and 0 < abs(value.value) < 1  # 0.5 is not 0.5%
        ratio = Fraction(1, 100) if first == _PERCENT else Fraction(100)
        return (not share and _same_value(gold, answer)) or _same_value(gold, answer, ratio)
    if second == _DEGREE and "\\pi" in gold:
        answer = f"({answer})\\cdot\\frac{{\\pi}}{{180}}"
    return _same_value(gold, answer)


def _same_value(gold: str, answer: str, scale: Fraction = Fraction(1)) -> bool:
    """Whether the gold times `scale` equals the answer, both without units."""
    if squeezed(gold) == squeezed(answer) and scale == 1:
        return True
    first, second = number(gold), number(answer)
    if first is not None:
        first = Number(first.value * scale, first.step and first.step * scale)
        if second is not None:
            return same_number(first, second)
    if (based := in_base(answer)) is not None:
        return first is not None and first.value == based
    if scale != 1:
        factor = first.value if first is not None else scale
        gold = f"({gold if first is None else 1})\\cdot\\frac{{{factor.numerator}}}{{{factor.denominator}}}"
    if not _could_be_formula(answer) or not _could_be_formula(gold):
        return plain(gold) == plain(answer) and len(plain(gold)) > 1
    if symbols.same_value(gold, answer) or symbols.rounds_as(first or gold, second or answer):
        return True
    # A logarithm without a base may be natural: a completion's if the gold has \ln, and the gold's in an integral.
    if "\\ln" in gold:
        return bool(_LOG.search(answer)) and symbols.same_value(gold, _LOG.sub(r"\\ln", answer))
    is_integral = _LOG.search(gold) and "\\ln" in answer and re.search(r"\\pi(?![a-zA-Z])|\+\s*C(?![a-zA-Z])", gold)
    return bool(is_integral) and symbols.same_value(_LOG.sub(r"\\ln", gold), answer)


def _could_be_formula(text: str) -> bool:
    """Whether a text has no words, so that it may be a formula. Letters in alphabetical order, abcd, are a product."""
    words = re.findall(r"(?<![\\a-zA-Z{_])[a-zA-Z]{4,}(?![a-zA-Z}])", text)
    return all(word in ascii_lowercase for word in words) and not re.search(r"\\text\{[^{}]*[a-zA-Z]{2,}", text)
