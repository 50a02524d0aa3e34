"""Intervals, unions, inequalities and sets given by a condition: one kind, as each can be written as another."""

import re
from fractions import Fraction
from itertools import pairwise

from .. import symbols
from ..notation import bracketed, cut, plain, squeezed, trimmed
from ..quantities import number
from . import Same
from .scalars import NAME, RELATION, same_scalar
from .words import EVERYTHING, whole_line

End = tuple[str, bool]  # a bound, and whether it belongs to the interval
Region = tuple[list[tuple[End, End]], str]  # intervals and points, and the variable's name if it has one
Chain = tuple[list[str], list[str]]  # a < b ≤ c: the parts between the signs, and the signs

_LOWEST: End = ("-\\infty", False)
_HIGHEST: End = ("\\infty", False)
_VARIABLE = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_\{?\w+\}?)?'*")
_FLIP = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_DISCRETE = re.compile(r"\\in(?![a-zA-Z])\s*(?:\\[a-zA-Z]+\s*)?\{?\s*(?:\\text\{)?([ZNQ])(?![a-zA-Z])")
_OF = " of "  # between a variable and the numbers that it stands for, if these are not the real ones
_COMPLEMENT = re.compile(r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}")
_EXCLUDED = re.compile(rf"({_VARIABLE.pattern})\s*\\ne(?![a-zA-Z])")
_REAL = r"\s*\\in(?![a-zA-Z])\s*(?:\\mathbb\s*)?\{?\s*(?:\\mathbb\{R\}|R)\s*\}?\s*$"
_UNION = r"\\cup(?![a-zA-Z])|(?<![a-zA-Z\\])[Uu](?![a-zA-Z])"
_IN = r"\\in(?![a-zA-Z])(?!\s*\\\{[^|:<>]*\}$)"  # in an interval; x \in \{1, 2\} is a set
_OR = r"(?<![a-zA-Z\\])or(?![a-zA-Z])"
_ALTERNATIVE = rf"\\text\{{\s*or\s*\}}|{_OR}|,"
_TOGETHER = r"\\text\{\s*,?\s*and\s*\}|(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:wedge|land)(?![a-zA-Z])"


def region(text: str) -> Region | None:
    for read in (_of_condition, _of_member, _of_union, _whole_line, _interval, _without_points, _inequalities):
        if (found := read(text)) is not None:
            return found
    return None


def _of_condition(text: str) -> Region | None:
    """Read `\\{x \\mid x < 2\\}`, or a set of points."""
    whole = bracketed(text)
    if whole is None or whole[0] not in ("\\{", "{"):
        return None
    parts = re.split(r"\||(?<!\\):", whole[1], maxsplit=1)
    if len(parts) == 2:
        inner = region(re.sub(rf",\s*{_VARIABLE.pattern}{_REAL}", "", parts[1]).strip())
        element = re.sub(r"\\in(?![a-zA-Z]).*|\\text\{[^{}]*\}", "", parts[0], flags=re.DOTALL).strip()
        if inner is None or not _VARIABLE.fullmatch(element) or squeezed(element) != squeezed(inner[1] or element):
            return None  # {x + 5 | x > 2} and {x | y > 2} are other sets
        domain = _DISCRETE.search(parts[0])
        return (inner[0], f"{inner[1]}{_OF}{domain[1]}") if domain else inner
    if re.search(RELATION, whole[1]) or whole[0] == "{":
        return None
    points = [part for cutting in cut(whole[1], "[,;]") if (part := trimmed(cutting))]
    return ([((point, True), (point, True)) for point in points], "") if points else None


def _of_member(text: str) -> Region | None:
    """Read `x \\in (2, 5)`."""
    match = re.fullmatch(r"(.{1,12}?)\s*\\in(?![a-zA-Z])\s*(.*)", text)
    inner = region(match[2].strip()) if match and _VARIABLE.fullmatch(match[1].strip()) else None
    return (inner[0], match[1].strip()) if inner and match else None


def _of_union(text: str) -> Region | None:
    pieces = cut(text, _UNION)
    if len(pieces) == 1 and "\\infty" in text:  # (-\infty, 2) or (5, \infty)
        pieces = cut(text, _ALTERNATIVE + "|" + _TOGETHER)
        regions = [_interval(piece) if "\\infty" in piece else None for piece in pieces] if len(pieces) > 1 else [None]
    else:
        regions = [region(piece) for piece in pieces] if len(pieces) > 1 else [None]
    return None if None in regions else ([interval for one in regions if one for interval in one[0]], "")


def _whole_line(text: str) -> Region | None:
    return ([(_LOWEST, _HIGHEST)], "") if whole_line(text) else None


def _interval(text: str) -> Region | None:
    match = re.fullmatch(r"([(\[\]])(.*)([)\]\[])", text.strip(), re.DOTALL)  # ]2, 3[ is (2, 3)
    if match is None or re.search(RELATION + "|=", match[2]):
        return None
    parts = cut(match[2], ",")
    if len(parts) != 2 or not all(parts):
        return None
    return [((parts[0], match[1] == "["), (parts[1], match[3] == "]"))], ""


def _without_points(text: str) -> Region | None:
    """Read `x \\ne 0, 1`, `x \\ne 0 and x \\ne 1`, `x \\ne \\pm 2` and `\\mathbb{R} \\setminus \\{0, 1\\}`."""
    if match := _COMPLEMENT.fullmatch(text):
        name, parts = "", cut(match[1], "[,;]")
    elif match := _EXCLUDED.match(text):
        name, again = match[1], re.compile(re.escape(match[1]) + r"\s*\\ne(?![a-zA-Z])")
        parts = [again.sub("", part).strip() for part in cut(text, _ALTERNATIVE + "|" + _TOGETHER) if part]
    else:
        return None
    signs = [re.fullmatch(r"\\pm\s*(.*)", part) for part in parts]
    points = [end for part, of in zip(parts, signs, strict=True) for end in ((f"-{of[1]}", of[1]) if of else (part,))]
    values = [_value_of(point) if not re.search(RELATION + "|=", point) else None for point in points]
    if (len(points) > 1 and None in values) or any(map(_VARIABLE.fullmatch, points)):  # x ≠ y is also y ≠ x
        return None
    ordered = [point for _, point in sorted(zip(values, points, strict=True))] if len(points) > 1 else points
    bounds: list[End] = [_LOWEST, *((point, False) for point in ordered), _HIGHEST]
    return [*pairwise(bounds)], name


def _inequalities(text: str) -> Region | None:
    parts = cut(text, _ALTERNATIVE + "|" + _TOGETHER)
    found = [one for part in parts for one in [_inequality(part)] if one]
    names = {name for _, name in found}
    if len(found) != len(parts) or len(names) != 1:
        return None
    intervals = [interval for one in found for interval in one[0]]
    both = None if re.search(_OR, text) or len(intervals) != 2 or len(found) != 2 else _overlap(intervals)
    return [both] if both else intervals, names.pop()


def _overlap(intervals: list[tuple[End, End]]) -> tuple[End, End] | None:
    """The overlap of two half-lines, such as `x > 2` and `x < 5`.

    None if they do not meet, since data sets then mean their union.
    """
    low = [one[0] for one in intervals if one[1] == _HIGHEST]
    high = [one[1] for one in intervals if one[0] == _LOWEST]
    if len(low) != 1 or len(high) != 1:
        return None
    first, second = _value_of(low[0][0]), _value_of(high[0][0])
    return (low[0], high[0]) if first is not None and second is not None and first < second else None


def _value_of(bound: str) -> Fraction | None:
    exact = number(bound)
    return exact.value if exact else symbols.value(bound)


def _inequality(text: str) -> Region | None:
    """Read one of `x < a`, `a < x`, `a < x < b` and `x ≠ a`."""
    parts, signs = ascending(text) or ([], [])
    named = [at for at, part in enumerate(parts) if _VARIABLE.fullmatch(part)]
    if len(parts) not in (2, 3) or len(named) != 1 or (len(parts) == 3 and named != [1]):
        return None
    (at,) = named
    if signs == ["\\ne"]:
        bound = (parts[1 - at], False)
        return [(_LOWEST, bound), (bound, _HIGHEST)], parts[at]
    if not set(signs) <= {"<", "\\le"}:
        return None
    low = (parts[0], signs[0] != "<") if at > 0 else _LOWEST
    high = (parts[-1], signs[-1] != "<") if at < len(parts) - 1 else _HIGHEST
    return [(low, high)], parts[at]


def ascending(text: str) -> Chain | None:
    """A chain of relations, reversed if it descends; None for anything else."""
    parts, signs = cut(text, RELATION), re.findall(RELATION, text)
    if not signs or len(parts) != len(signs) + 1 or not all(parts):
        return None
    return (parts[::-1], [_FLIP[sign] for sign in reversed(signs)]) if signs[0] in (">", "\\ge") else (parts, signs)


def gold_region(gold: str) -> Region | None:
    """Read a gold as a region if a bracket, an infinity, a union or a relation shows that it is no ordered pair."""
    if not re.search(RELATION + rf"|\\infty|\\cup|{_IN}|^\(.*\]$|^\[.*\)$|^\[[^,]*,[^,]*\]$|\\mathbb", gold):
        return None
    return region(gold)


def same_region(gold: Region, answer: str, same: Same) -> bool:
    sides = cut(answer, "=")
    if len(sides) == 2 and NAME.fullmatch(sides[0]) and sides[1][:1] in ("(", "[", "\\"):  # D = [2,5]
        answer = sides[1]
    given = _whole_line("\\mathbb{R}") if plain(answer) in EVERYTHING else region(answer)
    if given is None:
        return False
    (name, _, domain), (given_name, _, given_domain) = (one[1].partition(_OF) for one in (gold, given))
    if (name and given_name and squeezed(name) != squeezed(given_name)) or given_domain not in ("", domain):
        return False
    left = list(given[0])
    for ends in gold[0]:
        found = [other for other in left if all(_same_end(a, b, same) for a, b in zip(ends, other, strict=True))]
        if not found:
            return False
        left.remove(found[0])
    return not left


def _same_end(gold: End, answer: End, same: Same) -> bool:
    if gold[1] != answer[1]:
        return False
    if "\\infty" in gold[0] + answer[0]:
        return re.sub(r"[+ {}]", "", gold[0]) == re.sub(r"[+ {}]", "", answer[0])
    return same(gold[0], answer[0])


def both_ways(gold: str) -> list[str] | None:
    """Read an inequality together with its interval, `-1 < x \\le 2 : (-1, 2]`."""
    parts = [part.strip() for part in gold.split(":")]
    return parts if len(parts) == 2 and re.search(RELATION, parts[0]) and all(region(part) for part in parts) else None


def same_either_way(gold: list[str], answer: str, same: Same) -> bool:
    return all(any(same(one, part.strip()) for one in gold) for part in answer.split(":"))


def same_chain(gold: Chain, answer: str, same: Same) -> bool:
    """Whether two chains have the same relations between the same formulas, or proportional differences of sides."""
    given = ascending(answer)
    if given is None or given[1] != gold[1]:
        return False
    if all(same_scalar(a, b, same) for a, b in zip(gold[0], given[0], strict=True)):
        return True
    first, second = (f"({chain[0][0]})-({chain[0][-1]})" for chain in (gold, given))
    return len(gold[0]) == 2 and symbols.proportional(first, second, positive=gold[1] != ["\\ne"])
