"""Read times of day, dates, and angles in degrees, minutes and seconds."""

import re
from fractions import Fraction

from .notation import upright
from .quantities import number
from .units import split_unit

TimeOfDay = tuple[int, int, int, str]  # hours, minutes, seconds, and "am", "pm" or ""

_NAMES = "january february march april may june july august september october november december".split()
_MONTHS = {"sept": 9} | {text: at for at, name in enumerate(_NAMES, start=1) for text in (name, name[:3])}
_DATES = [
    re.compile(r"(?P<year>\d{4})\s*[-/.]\s*(?P<month>\d{1,2})\s*[-/.]\s*(?P<day>\d{1,2})"),
    re.compile(r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})"),
    re.compile(r"(?P<name>[a-zA-Z]{3,9})\.? (?P<day>\d{1,2})(?:st|nd|rd|th)?(?: (?P<year>\d{4}))?"),
    re.compile(r"(?P<day>\d{1,2})(?:st|nd|rd|th)? (?P<name>[a-zA-Z]{3,9})\.?(?: (?P<year>\d{4}))?"),
]
_TIME = re.compile(r"\s*(\d{1,2})(?:\s*:\s*(\d{2})(?:\s*:\s*(\d{2}))?)?\s*(?:([ap])\.?\s*m\.?)?\s*", re.IGNORECASE)
_ANGLE = re.compile(
    r"(-?)(\d+)\s*\^\\circ\s*(\d+)\s*(?:'|\^\{?\s*\\prime\s*\}?)"
    r"\s*(?:(\d+(?:\.\d+)?)\s*(?:''|\"|\^\{?\s*\\prime\s*\\prime\s*\}?))?"
)


def time_of_day(text: str) -> TimeOfDay | None:
    """Read `6:30`, `18:30:15`, `6:30 p.m.` or `6 p.m.`; None for anything else."""
    match = _TIME.fullmatch(upright(text))
    if match is None or not (match[2] or match[4]) or int(match[1]) > 24 or int(match[2] or 0) > 59:
        return None
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), f"{match[4].lower()}m" if match[4] else ""


def same_time(gold: TimeOfDay, answer: TimeOfDay) -> bool:
    """Whether two times of day are the same. If one side lacks a.m. or p.m., the same hour on the clock is enough."""
    first, second = (time[0] % 12 + 12 * (time[3] == "pm") if time[3] else time[0] for time in (gold, answer))
    either = bool(gold[3]) != bool(answer[3]) and gold[0] == answer[0]
    return gold[1:3] == answer[1:3] and (first == second or either)


def date(text: str) -> tuple[int, int, int] | None:
    """Year (0 if there is none), month and day; None for no date. `05/01/2024` has the month first."""
    text = " ".join(upright(text).replace(",", " ").split())
    match = next((match for pattern in _DATES if (match := pattern.fullmatch(text))), None)
    if match is None:
        return None
    found = match.groupdict()
    month = _MONTHS.get(found["name"].lower(), 0) if "name" in found else int(found["month"])
    day = int(found["day"])
    return (int(found["year"] or 0), month, day) if 1 <= month <= 12 and 1 <= day <= 31 else None


def angle(text: str) -> Fraction | None:
    """Degrees of an angle, given as degrees, minutes and seconds or as a number of degrees; None for anything else."""
    if match := _ANGLE.fullmatch(text.strip()):
        degrees = Fraction(match[2]) + Fraction(match[3]) / 60 + Fraction(match[4] or 0) / 3600
        return -degrees if match[1] else degrees
    bare = number(split_unit(text)[0])
    return bare.value if bare else None
