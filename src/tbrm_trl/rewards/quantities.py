"""Numbers without rounding: decimals, fractions, powers of ten, repeating decimals, bases; units, times and dates."""

import re
from dataclasses import dataclass
from fractions import Fraction

EXACT = 10  # significant digits from which a decimal stands for an exact number
_LONGEST = 2000  # digits; more are compared as text
_APART = re.compile(r"\d\s*,\s+\d|\d\.\s+\d|\d\s+\.\d|[eE]\s+[-+]|[eE][-+]\s")  # two numbers; a letter and a difference
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"


@dataclass(frozen=True)
class Number:
    """A number, and the value of one unit in its last decimal place if it was written as a decimal."""

    value: Fraction
    step: Fraction | None = None

    @property
    def digits(self) -> int:
        """Significant digits of a decimal."""
        return 0 if self.step is None or not self.value else len(str(abs(self.value) // self.step))

    def __neg__(self) -> "Number":
        return Number(-self.value, self.step)


def number(text: str) -> Number | None:
    """The number that a text in normal spelling is, or None."""
    text = text.strip()
    if not text or len(text) > _LONGEST or not re.search(r"\d", text) or _APART.search(text):
        return None
    if text[0] in "+-":
        inner = number(text[1:])
        return inner if inner is None or text[0] == "+" else -inner
    compact = text.replace(" ", "")
    if match := re.fullmatch(rf"({_DECIMAL})(?:[eE]([-+]?\d{{1,4}}))?", compact if not _gap(text) else text):
        return _decimal(match[1], int(match[2] or 0))
    if match := re.fullmatch(rf"(?:({_DECIMAL})(?:\\times|\\cdot|\*|x))?10\^\{{?([-+]?\d{{1,4}})\}}?", compact):
        return _decimal(match[1] or "1", int(match[2])) if match[1] else Number(Fraction(10) ** int(match[2]))
    if match := re.fullmatch(r"(\d*)\.(\d*)\\overline\{?(\d+)\}?(?:\\ldots)?", compact):
        whole, head, cycle = match.groups()
        tail = Fraction(int(cycle), 10 ** len(cycle) - 1) / 10 ** len(head)
        return Number(Fraction(int(whole or 0)) + Fraction(int(head or 0), 10 ** len(head)) + tail)
    if match := re.fullmatch(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+)(?: |-| and )(\d+) ?/ ?(\d+)", text):
        whole, top, bottom = (int(part) for part in match.groups() if part)
        return Number(whole + Fraction(top, bottom)) if bottom and top < bottom else None
    if match := re.fullmatch(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", text):
        return _quotient(match[1], match[2])
    if match := re.fullmatch(rf"({_DECIMAL})/(-?{_DECIMAL})", compact):
        return _quotient(match[1], match[2])
    if match := re.fullmatch(r"\((.*)\)|\{(.*)\}", text):
        return number(match[1] or match[2] or "")
    return None


def _gap(text: str) -> bool:
    """Whether a space stands between two digits: 5 1/2 is not 51/2. French thousands (1 234 567) have no gap."""
    return bool(re.search(r"\d \d", text)) and not re.fullmatch(r"\d{1,3}(?: \d{3})+(?:\.\d+)?", text)


def _decimal(digits: str, exponent: int) -> Number:
    digits = digits.replace(",", "")
    places = len(digits.partition(".")[2])
    value = Fraction(digits.rstrip(".") if digits != "." else "0") * Fraction(10) ** exponent
    # 4.5e33 is a decimal in spite of being whole; 45 is exact.
    return Number(value, Fraction(10) ** (exponent - places) if places or exponent else None)


def _quotient(top: str, bottom: str) -> Number | None:
    first, second = number(top), number(bottom)
    return Number(first.value / second.value) if first and second and second.value else None


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are the same, or the answer rounds to a decimal gold of three significant digits or more.

    An exact gold wants an exact answer, or one of ten significant digits.
    """
    if gold.value == answer.value:
        return True
    if gold.step is not None and gold.digits >= 15 and answer.step is not None and answer.digits >= 12:  # of a float
        return abs(gold.value - answer.value) <= abs(gold.value) / 10**14
    if gold.step is None:
        return answer.step is not None and rounds_to(gold.value, answer, EXACT)
    return rounds_to(answer.value, gold, 3) and (answer.step is None or answer.step < gold.step)


def rounds_to(exact: Fraction, decimal: Number, digits: int) -> bool:
    """Whether a value rounds to a decimal that has so many significant digits."""
    if decimal.step is None or decimal.digits < digits:
        return False
    return abs(exact - decimal.value) * 2 <= decimal.step


# --- bases ---

_WORD_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


def in_base(text: str) -> int | None:
    """The value of `1011_2`, `4A3_{16}` or `1011_{\\text{two}}`; None for anything else."""
    text = re.sub(r"\s+", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
    match = re.fullmatch(r"\(?([0-9A-Fa-f]+)\)?_\{?(?:base)?\(?(\d{1,2}|[a-z]+)\)?\}?", text)
    if match is None or not any(letter.isdigit() for letter in match[1]):
        return None
    base = int(match[2]) if match[2].isdigit() else _WORD_BASES.get(match[2], 0)
    try:
        return int(match[1], base) if 2 <= base <= 36 else None
    except ValueError:  # a digit that the base does not have: a letter with an index
        return None


# --- units ---

# name: (what it measures, how much of it)
_UNITS: dict[str, tuple[str, Fraction]] = {}
_MEASURES: dict[str, dict[str, int | str]] = {
    "length": {"m": 1, "meter metre": 1, "cm centimeter centimetre": "1/100", "mm millimeter millimetre": "1/1000",
               "km kilometer kilometre": 1000, "in inch inche": "254/10000", "ft foot feet": "3048/10000",
               "yd yard": "9144/10000", "mi mile": "1609344/1000", "nm nanometer": "1/1000000000"},
    "mass": {"g gram": 1, "kg kilogram": 1000, "mg milligram": "1/1000", "lb lbs pound": "45359237/100000",
             "oz ounce": "45359237/1600000", "ton tonne": 1000000},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800, "ms": "1/1000"},
    "litre": {"l liter litre": 1, "ml milliliter millilitre": "1/1000"},
    "dollar": {"dollar usd buck": 1, "cent ¢ penny pennie": "1/100"},
    "euro": {"€ euro eur": 1}, "pound sterling": {"£ gbp": 1}, "yen": {"¥ yen jpy yuan rmb": 1},
    "rupee": {"₹ rupee rs": 1},
    "degree": {"degree deg": 1}, "radian": {"rad radian": 1}, "percent": {"% percent percentage": 1},
    "celsius": {"celsius": 1}, "fahrenheit": {"fahrenheit": 1}, "kelvin": {"k kelvin": 1},
    "newton": {"n newton": 1}, "joule": {"j joule": 1, "kj": 1000}, "watt": {"w watt": 1, "kw": 1000},
    "volt": {"v volt": 1}, "ampere": {"a amp ampere": 1}, "hertz": {"hz hertz": 1}, "pascal": {"pa pascal": 1},
    "mole": {"mol mole": 1}, "erg": {"erg": 1},
}  # fmt: skip
for _measure, _names in _MEASURES.items():
    for _spellings, _size in _names.items():
        for _name in _spellings.split():
            _UNITS[_name] = (_measure, Fraction(_size))
_SHORT = set(
    ["m", "s", "g", "h", "l", "L", "N", "J", "W", "V", "A", "K", "C", "F"]
)  # letters that are units only where they stand upright or apart
_COUNTED = {"unit", "square unit", "sq unit", "cubic unit", "units²"}


@dataclass(frozen=True)
class Unit:
    """Powers of what is measured, and the size in basic units. Words that measure nothing (apples) have no powers."""

    powers: tuple[tuple[str, int], ...]
    size: Fraction


def unit(text: str) -> Unit | None:
    """The unit that a text is: "cm^2", "\\text{ft} / \\text{s}", "square inches", "apples"; None if it is none."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\\circ\s*([CF])(?![a-zA-Z])", lambda m: {"C": "celsius", "F": "fahrenheit"}[m[1]], text)
    text = re.sub(r"\\?(%)", r" \1 ", re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text))
    text = re.sub(r"\\cdot|\\times|-|\*|~", " ", text.replace("^\\circ", " degree ").replace("\\$", " dollar "))
    text = re.sub(r"\b(?:mph)\b", "mile/hour", text)
    powers: dict[str, int] = {}
    size, sign, power = Fraction(1), 1, 1
    words = re.findall(r"[a-zA-Z]+(?:\^-?\d)?|/|[%€£¥₹¢]|\S", text)
    if not words or len(words) > 8:
        return None
    for word in words:
        name, _, exponent = word.partition("^")
        if name == "/" or name == "per":
            sign = -1
            continue
        if name.lower() in ("square", "sq"):
            power = 2
            continue
        if name.lower() in ("cubic", "cu"):
            power = 3
            continue
        if not re.fullmatch(r"[a-zA-Z]+|[%€£¥₹¢]", name):
            return None
        found = _UNITS.get(name if name in _UNITS else name.lower())
        if found is None and len(name) > 2:
            found = _UNITS.get(name.lower().removesuffix("s")) or _UNITS.get(name.lower().removesuffix("es"))
        if found is None:
            if len(name) < 3:
                return None
            continue  # apples, of, each
        each = sign * power * int(exponent or 1)
        powers[found[0]] = powers.get(found[0], 0) + each
        size *= found[1] ** each
        power = 1
    return Unit(tuple(sorted((name, p) for name, p in powers.items() if p)), size)


_END = re.compile(
    r"""^(?P<rest>.*?[\w)\]}!\s.])\s*(?P<unit>
        (?:\\text\{[^{}]*[a-zA-Z%][^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?(?:\s*(?:/|\\cdot|\\times|-|per)?\s*))+
      | \^\\circ\s*(?:\\text\{)?[CF]?\}?
      | \\?%
      | (?:square|sq\.?|cubic|cu\.?)?\s*(?<![a-zA-Z\\])[a-zA-Z]{2,}
        (?:\s*(?:/|per)\s*[a-zA-Z]+|[ ][a-zA-Z]+)*(?:\^\{?\d\}?)?
      | [€£¥₹¢] | \\\$
    )$""",
    re.VERBOSE | re.DOTALL,
)
_LOOSE = re.compile(
    r"^(?P<rest>.*?[\d})\w])\s*(?<![a-zA-Z\\])(?P<unit>[msghlLNJWVAKCF](?:\s*\^\s*\{?[23]\}?)?)$", re.DOTALL
)
_FRONT = re.compile(
    r"^(?P<sign>[-+]?)\s*(?P<unit>\\\$|[€£¥₹]|(?:USD|Rs\.?)(?![a-zA-Z]))\s*(?P<rest>[-+]?\s*[\d.\\({].*)$"
)


def split_unit(text: str, loose: bool = False) -> tuple[str, Unit | None]:
    """A text without its unit, and the unit. Single letters that are not upright are units only if `loose`."""
    if match := _FRONT.match(text):
        rest, tail = split_unit(match["sign"] + match["rest"], loose)
        return rest, tail if tail and tail.powers else unit(match["unit"])
    match = _END.match(text)
    if match and (found := unit(match["unit"])) and re.search(r"[\w})]", match["rest"]):
        is_word = not match["unit"].lstrip().startswith(("\\text", "^", "%", "\\", "€", "£", "¥", "₹", "¢"))
        # Plain words after anything but a number may be a product of letters or part of a sentence.
        if not is_word or number(match["rest"]) or (found.powers and re.search(r"[\d}]\s*$", match["rest"])):
            return match["rest"].strip(), found
    if loose and (match := _LOOSE.match(text)) and (found := unit(match["unit"])):
        return match["rest"].strip(), found
    return text, None


_ANGLE = re.compile(
    r"(-?)(\d+)\s*\^\\circ\s*(\d+)\s*(?:'|\^\{?\s*\\prime\s*\}?)"
    r"\s*(?:(\d+(?:\.\d+)?)\s*(?:''|\"|\^\{?\s*\\prime\s*\\prime\s*\}?))?"
)


def angle(text: str) -> Fraction | None:
    """Degrees of an angle in degrees, minutes and seconds, or of one that is a number of degrees."""
    if match := _ANGLE.fullmatch(text.strip()):
        degrees = Fraction(match[2]) + Fraction(match[3]) / 60 + Fraction(match[4] or 0) / 3600
        return -degrees if match[1] else degrees
    bare = number(split_unit(text)[0])
    return bare.value if bare else None


# --- times of day and dates ---

_NAMED_DATE = re.compile(
    r"(?:([a-zA-Z]{3,9})\.? (\d{1,2})(?:st|nd|rd|th)?|(\d{1,2})(?:st|nd|rd|th)? ([a-zA-Z]{3,9})\.?)(?: (\d{4}))?"
)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


def time_of_day(text: str) -> tuple[int, int, int, str] | None:
    """Hours, minutes, seconds and "am", "pm" or ""."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    match = re.fullmatch(
        r"\s*(\d{1,2})\s*:\s*(\d{2})(?:\s*:\s*(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?\s*", text, re.IGNORECASE
    )
    if match is None:
        match = re.fullmatch(r"\s*(\d{1,2})()()\s*([ap])\.?\s*m\.?\s*", text, re.IGNORECASE)
    if match is None or int(match[1]) > 24 or int(match[2] or 0) > 59:
        return None
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), f"{match[4].lower()}m" if match[4] else ""


def same_time(gold: tuple[int, int, int, str], answer: tuple[int, int, int, str]) -> bool:
    """The same time of day. Where one side names no half of the day, the hands must stand alike."""

    def hour(time: tuple[int, int, int, str]) -> int:
        return time[0] % 12 + 12 * (time[3] == "pm") if time[3] else time[0]

    if (gold[3] and answer[3]) or not (gold[3] or answer[3]):
        return (hour(gold), *gold[1:3]) == (hour(answer), *answer[1:3])
    return gold[1:3] == answer[1:3] and (hour(gold) == hour(answer) or gold[0] == answer[0])


def date(text: str) -> tuple[int, int, int] | None:
    """Year, month and day; of `05/01/2024` the month comes first."""
    text = " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace(",", " ").split())
    if match := re.fullmatch(r"(\d{4})\s*[-/.]\s*(\d{1,2})\s*[-/.]\s*(\d{1,2})", text):
        year, month, day = map(int, match.groups())
    elif match := re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", text):
        month, day, year = map(int, match.groups())
    elif match := re.fullmatch(
        r"(?:([a-zA-Z]{3,9})\.? (\d{1,2})|(\d{1,2}) ([a-zA-Z]{3,9})\.?)(?:st|nd|rd|th)?(?: (\d{4}))?", text
    ):
        name, day = match[1] or match[4], int(match[2] or match[3])
        if name[:3].lower() not in _MONTHS:
            return None
        month, year = _MONTHS.index(name[:3].lower()) + 1, int(match[5] or 0)
    else:
        return None
    return (year, month, day) if 1 <= month <= 12 and 1 <= day <= 31 else None
