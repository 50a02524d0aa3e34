"""Dates, times of day, angles, bases and ratios."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ..notation import cut
from ..times import TimeOfDay, angle, same_time, time_of_day
from . import Same
from .scalars import RELATION, same_scalar


def alike(read: Callable[[str], Any]) -> Callable[[Any, str, Same], bool]:
    """A comparison for kinds where an answer is right if `read` gives the same as for the gold."""
    return lambda gold, answer, same: read(answer) == gold


def minutes_of_arc(gold: str) -> Fraction | None:
    """Degrees of a gold in degrees and minutes; None for other golds."""
    return angle(gold) if "\\prime" in gold or "'" in gold else None


def same_time_of_day(gold: TimeOfDay, answer: str, same: Same) -> bool:
    """Compare times. The gold may be a ratio, `9:16`: this is what an answer of the form `9 to 16` says."""
    given = time_of_day(answer)
    if given is None and not gold[3] and gold[1] and re.search(r"\bto\b", answer):
        return same_ratio([str(term) for term in gold[:3] if term], answer, same)
    return given is not None and same_time(gold, given)


def ratio(text: str) -> list[str] | None:
    """The terms of `3:2` or `3 to 2`."""
    if "\\{" in text or re.search(RELATION + "|=", text):
        return None
    parts = cut(re.sub(r"\\text\{\s*to\s*\}|(?<=\d)\s+to\s+(?=\d)", ":", text), ":")
    wrong = len(parts) < 2 or any(not part or "[" in part or "\\text" in part for part in parts)
    return None if wrong else parts


def same_ratio(gold: list[str], answer: str, same: Same) -> bool:
    given = ratio(answer) or [answer, "1"]
    # a : b = c : d if and only if ad = bc, unless both terms are 0.
    proportional = len(given) == len(gold) and all(
        same_scalar(f"({gold[0]})\\cdot({theirs})", f"({given[0]})\\cdot({ours})", same)
        for ours, theirs in zip(gold[1:], given[1:], strict=True)
    )
    return proportional and not all(same_scalar("0", term, same) for term in given)
