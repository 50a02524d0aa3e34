"""Read units: what a unit measures and its size, and a text without its unit."""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from .notation import upright
from .quantities import number

_MEASURES: dict[str, dict[str, int | str]] = {
    "length": {"m meter metre": 1, "cm centimeter centimetre": "1/100", "mm millimeter millimetre": "1/1000",
               "km kilometer kilometre": 1000, "dm": "1/10", "in inch inche": "254/10000", "ft foot feet": "3048/10000",
               "yd yard": "9144/10000", "mi mile": "1609344/1000", "nm nanometer": "1/1000000000",
               "au": 149597870700, "lightyear": 9460730472580800, "parsec": 30856775814913673},
    "mass": {"g gram": 1, "kg kilogram": 1000, "mg milligram": "1/1000", "lb lbs pound": "45359237/100000",
             "oz ounce": "45359237/1600000", "ton tonne": 1000000},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800, "ms": "1/1000"},
    "month": {"month": 1, "year yr": 12, "decade": 120, "century centurie": 1200},  # no fixed number of days
    "length^2": {"hectare": 10000, "acre": "40468564224/10000000"},
    "length^3": {"l liter litre": "1/1000", "dl": "1/10000", "cl": "1/100000", "gal gallon": "3785411784/1000000000000",
                 "qt quart": "946352946/1000000000000", "pint": "473176473/1000000000000",
                 "cup": "2365882365/10000000000000"},
    "dollar": {"dollar usd buck \\$": 1, "cent ¢ penny pennie": "1/100", "dime": "1/10", "nickel": "1/20"},
    "euro": {"€ euro eur": 1}, "pound sterling": {"£ gbp": 1, "pence": "1/100"}, "yen": {"¥ yen jpy yuan rmb": 1},
    "rupee": {"₹ rupee rs": 1},
    "degree": {"degree deg": 1}, "radian": {"rad radian": 1}, "percent": {"% percent percentage": 1},
    "celsius": {"celsius": 1}, "fahrenheit": {"fahrenheit": 1}, "kelvin": {"k kelvin": 1},
    "newton": {"n newton": 1}, "watt": {"w watt": 1, "kw": 1000},
    "joule": {"j joule": 1, "kj": 1000, "erg": "1/10000000", "cal calorie": "4184/1000", "kcal": 4184, "wh": 3600,
              "kwh": 3600000,
              "ev electronvolt": "1602176634/10000000000000000000000000000"},
    "volt": {"v volt": 1}, "ampere": {"a amp ampere": 1}, "hertz": {"hz hertz": 1}, "ohm": {"ohm": 1},
    "pascal": {"pa pascal": 1, "hpa": 100, "bar": 100000, "atm atmosphere": 101325, "mmhg torr": "101325/760",
               "psi": "6894757293168/1000000000"},
    "mole": {"mol mole": 1}, "coulomb": {"coulomb": 1}, "farad": {"farad": 1}, "tesla": {"tesla": 1},
    "rotation": {"rpm": 1}, "bit": {"bit": 1, "byte": 8, "KB": 8000},
}  # fmt: skip
_UNITS = {
    name: (measure, Fraction(size))
    for measure, names in _MEASURES.items()
    for spellings, size in names.items()
    for name in spellings.split()
}
# Prefixes, before symbols in upper and lower case as written, and before names. What the table has comes first.
_SYMBOLS = {name: name.lower() for name in "m g s l L N J W V A Hz Pa mol eV bar bit Wh cal ohm".split()}
_SYMBOLS |= {"B": "byte", "b": "bit", "F": "farad", "C": "coulomb"}
_PREFIXES = {"T": 12, "G": 9, "M": 6, "k": 3, "m": -3, "μ": -6, "n": -9, "p": -12}
_LONG_PREFIXES = dict(
    tera=12, giga=9, mega=6, kilo=3, hecto=2, deci=-1, centi=-2, milli=-3, micro=-6, nano=-9, pico=-12
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_LETTER = (
    r"(?:\\mu\s?[msglLNJWVAFC]|[msghlLNJWVAKCF]|[TGMkmn]?(?:Pa|Hz|eV|[JWVN])|[kmn]?mol|kg|[kcmn]m|m[lLgsA])"
    r"(?:\s*\^\s*\{?-?[1-4]\}?)?"
)
_PAIRS = re.compile(r"(?<=[a-zA-Z])\s*(?:\sand\s+)?(?=\d)")  # between 3 hours and 20 minutes
_LETTERS = rf"{_LETTER}(?:\s*(?:/|\\cdot|\s)\s*{_LETTER})*"  # m/s, kg m/s^2


@dataclass(frozen=True)
class Unit:
    """The power of each measure, and the size in basic units. Words that measure nothing (apples) have no powers."""

    powers: tuple[tuple[str, int], ...]
    size: Fraction


# Words right after a number that make another number of it.
_ARITHMETIC = frozenset(
    "and squared cubed factorial half halves thirds fourths fifths sixths sevenths eighths ninths tenths elevenths "
    "twelfths hundredths thousandths tens dozen dozens lakh crore".split()
)
_JOINING = frozenset("plus minus times over point than choose versus maybe".split())  # words between two numbers
_NUMBERS = frozenset("two three four five six seven eight nine ten eleven twelve hundred thousand million".split())


def unit(text: str, glued: bool = False) -> Unit | None:
    """The unit that a text is: "cm^2", "\\text{ft} / \\text{s}", "square inches", "apples"; None if it is none.

    `glued` says that no digit and space are before it. It may then be a product: 2mV has no unit, 2 mV has one.
    """
    words = _words_of(text)
    if not 0 < len(words) <= 8 or words[0].lower() in _ARITHMETIC or _JOINING.intersection(map(str.lower, words[:-1])):
        return None
    if _NUMBERS.intersection(map(str.lower, words)):
        return None
    powers: dict[str, int] = {}
    size, sign, power = Fraction(1), 1, 1
    for word in words:
        name, _, exponent = word.partition("^")
        if name in ("/", "per"):
            sign = -1
        elif name.lower() in _POWERS:
            power = _POWERS[name.lower()]
        elif found := _known(name, glued):
            each = sign * power * int(exponent or 1)
            measure, _, by = found[0].partition("^")
            powers[measure] = powers.get(measure, 0) + each * int(by or 1)
            size *= found[1] ** each
            power = 1
        elif not re.fullmatch(r"[a-zA-Z]{3,}", name):  # apples, of, each
            return None
    return Unit(tuple(sorted((name, p) for name, p in powers.items() if p)), size)


def several_units(text: str) -> tuple[Fraction, Unit] | None:
    """The sum, in basic units, of numbers with ever smaller units of one measure (`3 hours 20 minutes`); else None."""
    parts = _PAIRS.split(upright(text).strip())
    if not 2 <= len(parts) <= 4:
        return None
    found = [one for part in parts if (one := amount(part)) is not None and one[1].powers]
    falling = all(a.size > b.size for (_, a), (_, b) in pairwise(found))
    powers = {unit.powers for _, unit in found}
    if len(found) < len(parts) or len(powers) > 1 or not falling:
        return None
    return sum((value * unit.size for value, unit in found), Fraction(0)), Unit(powers.pop(), Fraction(1))


def amount(text: str) -> tuple[Fraction, Unit] | None:
    """Split a text into number and unit, which may be a single letter; None if either is missing."""
    rest, unit = split_unit(text, loose=True)
    value = number(rest)
    return (value.value, unit) if value is not None and unit is not None else None


def _words_of(text: str) -> list[str]:
    """Split a unit into names with powers, slashes, and currency signs."""
    text = re.sub(r"\^\\circ\s*([CF])(?![a-zA-Z])", lambda m: {"C": "celsius", "F": "fahrenheit"}[m[1]], upright(text))
    text = re.sub(r"\\mu\s*(?=[a-zA-Z\\])", "μ", text).replace("\\Omega", "ohm")
    text = re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text.replace("^\\circ", " degree "))
    text = re.sub(
        r"\\cdot|\\times|-(?!\d)|\*|~|\\(?=%)",
        " ",
        re.sub(r"\bmph\b", "mile/hour", re.sub(r"(?i)\blight[- ]years?\b", "lightyear", text)),
    )
    text = re.sub(r"(?<=\bsq)\.|(?<=\bcu)\.|(?<=[a-zA-Z])\.(?=\s*$)", "", text)  # sq. ft.
    return re.findall(r"μ?[a-zA-Z]+(?:\^-?\d)?|\\\$|\S", text)


def _known(name: str, glued: bool) -> tuple[str, Fraction] | None:
    """A unit's measure and size, by its name as written, in lower case, or without its plural ending."""
    if name in _UNITS:
        return _UNITS[name]
    for prefix, exponent in _PREFIXES.items():  # before the lower case: Mm is not mm
        if (symbol := name.removeprefix(prefix)) in _SYMBOLS and symbol != name:
            return None if glued else _prefixed(_SYMBOLS[symbol], exponent)
    small = name.lower()
    singular = [small.removesuffix("s"), small.removesuffix("es")] if len(name) > 2 else []
    for one in (small, *singular):
        if one in _UNITS:
            return _UNITS[one]
    for prefix, exponent in _LONG_PREFIXES.items():
        for one in (small, *singular):
            if len(unit := one.removeprefix(prefix)) > 2 and unit != one and unit in _UNITS:
                return _prefixed(unit, exponent)
    return None


def _prefixed(unit: str, exponent: int) -> tuple[str, Fraction]:
    measure, size = _UNITS[unit]
    return measure, size * Fraction(10) ** exponent


_END = re.compile(
    r"""^(?P<rest>.*?[\w)\]}!\s.])\s*(?P<unit>
        (?:\\text\{[^{}]*[a-zA-Z%][^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?(?:\s*(?:/|\\cdot|\\times|-|per)?\s*))+
      | \^\\circ\s*(?:\\text\{)?[CF]?\}?
      | (?<![a-zA-Z])[kMG]?\\Omega
      | \\?%
      | (?:square|sq\.?|cubic|cu\.?)?\s*(?<![a-zA-Z\\])[a-zA-Z]{2,}
        (?:\s*(?:/|per)\s*[a-zA-Z]+|[ ][a-zA-Z]+)*(?:\^\{?\d\}?)?
      | [€£¥₹¢] | \\\$
    )$""",
    re.VERBOSE | re.DOTALL,
)
# In sin 30° the degrees belong to the angle, not to the whole.
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])[^()+\-=,]*\^\s*\{?\s*\\circ\s*\}?$")
_LOOSE = re.compile(rf"^(?P<rest>.*?[\d}})\w])\s*(?<![a-zA-Z\\])(?P<unit>{_LETTERS})$", re.DOTALL)
_FRONT = re.compile(
    r"^(?P<sign>[-+]?)\s*(?P<unit>\\\$|\\text\{\s*\\\$\s*\}|[€£¥₹]|(?:USD|Rs\.?)(?![a-zA-Z]))\s*"
    r"(?P<rest>[-+]?\s*[\d.\\({].*)$"
)


def split_unit(text: str, loose: bool = False) -> tuple[str, Unit | None]:
    """A text without its unit, and the unit. Single letters outside `\\text` count as units only if `loose`."""
    if match := _FRONT.match(text):
        if re.search(r"\d\s*(?:\\text\{)?\s*[kKmMbB]\s*\}?$", match["rest"]):  # $4k is no 4 kelvin
            return text, None
        rest, tail = split_unit(match["sign"] + match["rest"], loose)
        return rest, tail if tail and tail.powers else unit(match["unit"])
    match = None if _ANGLE.search(text) else _END.match(text)
    if match and (found := _unit_at_end(match)):
        return match["rest"].strip(), found
    if loose and (match := _LOOSE.match(text)) and (found := unit(match["unit"])):
        return match["rest"].strip(), found
    return text, None


def _unit_at_end(match: re.Match) -> Unit | None:
    is_word = not match["unit"].lstrip().startswith(("\\", "^", "%", "€", "£", "¥", "₹", "¢"))
    before = match.string[: match.start("unit")]
    found = unit(match["unit"], glued=is_word and not re.search(r"\d\s$", before))
    if found is None or not re.search(r"[\w})]", match["rest"]):
        return None
    return found if not is_word or _is_unit_after(before, match["unit"], found) else None


def _is_unit_after(before: str, word: str, found: Unit) -> bool:
    """Whether a word is a unit: it may be a product of letters (6abc, r^2 + 2hr, 2\\pi hr) or part of a sentence."""
    rest, apart = before.rstrip(), before[-1:].isspace()
    if number(rest):
        return bool(found.powers) or apart or not re.match(r"[a-zA-Z]{2,4}(?![a-zA-Z])", word)
    if not found.powers and not re.match(r"(?:square|cubic|sq|cu)(?![a-zA-Z])", word):
        return False
    if rest.endswith("\\pi"):
        return len(word) > 2 or {name for name, _ in found.powers} <= {"length", "mass"}
    has_letters = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", rest)
    return re.search(r"[\d})]$", rest) is not None if apart else not has_letters and rest[-1:] in ("}", ")")
