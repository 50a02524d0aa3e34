"""Read numbers without rounding: decimals, fractions, powers of ten, mixed numbers, repeating decimals, bases."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .notation import upright

EXACT = 10  # a decimal of at least this many significant digits stands for an exact number
_LONGEST = 2000  # characters of a number; a longer one is compared as text
_APART = re.compile(r"\d\s*,\s+\d|\d\.\s+\d|\d\s+\.\d|[eE]\s+[-+]|[eE][-+]\s")  # two numbers; a letter and a difference
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_THOUSANDS = re.compile(r"\d{1,3}(?: \d{3})+(?:\.\d+)?")  # 1 234 567, as in French
_MIXED = re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+)(?: | and )(\d+) ?/ ?(\d+)")
_WORD_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


@dataclass(frozen=True)
class Number:
    """A number, with the value of one unit in its last decimal place if it was written as a decimal."""

    value: Fraction
    step: Fraction | None = None

    @property
    def digits(self) -> int:
        """Significant digits of a decimal; 0 for zero, and for a number that is no decimal."""
        return 0 if self.step is None or not self.value else len(str(abs(self.value) // self.step))

    def __neg__(self) -> "Number":
        return Number(-self.value, self.step)


def number(text: str) -> Number | None:
    """The number that a text in normal spelling stands for; None if it is not one number."""
    text = text.strip()
    if not text or len(text) > _LONGEST or not re.search(r"\d", text) or _APART.search(text):
        return None
    if text[0] in "+-":
        inner = number(text[1:])
        return inner if inner is None or text[0] == "+" else -inner
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = (int(part) for part in match.groups() if part)
        return Number(whole + Fraction(top, bottom)) if top < bottom else None
    if re.search(r"\d \d", text) and not _THOUSANDS.fullmatch(text):  # 5 1 is not 51
        return None
    compact = text.replace(" ", "")
    for pattern, read in _FORMS:
        if match := re.fullmatch(pattern, compact):
            return read(*match.groups())
    return None


def _decimal(digits: str, exponent: str | None) -> Number:
    digits, power = digits.replace(",", ""), int(exponent or 0)
    places = len(digits.partition(".")[2])
    # 4.5e33 is a decimal although it is whole; 45 is exact.
    step = Fraction(10) ** (power - places) if places or power else None
    return Number(Fraction(digits.rstrip(".")) * Fraction(10) ** power, step)


def _power_of_ten(digits: str | None, exponent: str) -> Number:
    return _decimal(digits, exponent) if digits else Number(Fraction(10) ** int(exponent))


def _repeating(whole: str, head: str, cycle: str) -> Number:
    tail = Fraction(int(cycle), 10 ** len(cycle) - 1) / 10 ** len(head)
    return Number(Fraction(f"{whole or 0}.{head or 0}") + tail)


def _quotient(top: str, bottom: str) -> Number | None:
    first, second = number(top), number(bottom)
    return Number(first.value / second.value) if first and second and second.value else None


_FORMS: list[tuple[str, Callable[..., Number | None]]] = [
    (rf"({_DECIMAL})(?:[eE]([-+]?\d{{1,4}}))?", _decimal),
    (rf"(?:({_DECIMAL})(?:\\times|\\cdot|\*|x))?10\^\{{?([-+]?\d{{1,4}})\}}?", _power_of_ten),
    (r"(\d*)\.(\d*)\\overline\{?(\d+)\}?(?:\\ldots)?", _repeating),
    (r"\\frac\{([^{}]+)\}\{([^{}]+)\}", _quotient),
    (rf"({_DECIMAL})/(-?{_DECIMAL})", _quotient),
    (r"\((.*)\)", number),
    (r"\{(.*)\}", number),
]


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal, or the answer rounds to a decimal gold of three significant digits or more.

    An exact gold needs an exact answer, or a decimal of ten significant digits or more to which the gold rounds.
    """
    if gold.value == answer.value:
        return True
    if gold.step is not None and gold.digits >= 15 and answer.step is not None and answer.digits >= 12:  # a float
        return abs(gold.value - answer.value) <= abs(gold.value) / 10**14
    if gold.step is None:
        return answer.step is not None and rounds_to(gold.value, answer, EXACT)
    return rounds_to(answer.value, gold, 3) and (answer.step is None or answer.step < gold.step)


def rounds_to(exact: Fraction, decimal: Number, digits: int) -> bool:
    """Whether a value rounds to a decimal, which must have at least `digits` significant digits."""
    if decimal.step is None or decimal.digits < digits:
        return False
    return abs(exact - decimal.value) * 2 <= decimal.step


def in_base(text: str) -> int | None:
    """The value of `1011_2`, `4A3_{16}` or `1011_{\\text{two}}`; None for anything else."""
    match = re.fullmatch(
        r"\(?([0-9A-Fa-f]+)\)?_\{?(?:base)?\(?(\d{1,2}|[a-z]+)\)?\}?", re.sub(r"\s+", "", upright(text))
    )
    if match is None or not re.search(r"\d", match[1]):
        return None
    base = int(match[2]) if match[2].isdecimal() else _WORD_BASES.get(match[2], 0)
    try:
        return int(match[1], base) if 2 <= base <= 36 else None
    except ValueError:  # the base lacks a digit, so this is a letter with an index
        return None
