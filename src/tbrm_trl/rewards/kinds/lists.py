"""Sets, bare lists, tuples, vectors and matrices: split into parts and compared part by part."""

import re
from collections.abc import Sequence

from ..notation import bracketed, cut, squeezed, trimmed
from ..quantities import number
from ..units import several_units, split_unit
from . import Same
from .intervals import Region, same_region
from .scalars import JOIN, NAME, RELATION, names_of, value_side

_WORD_JOIN = JOIN.replace("[,;]", ";")
_MOST = 60  # parts that are compared in every order
_EQUATION = re.compile(r"-?\d+\s*[a-zA-Z]\s*=")
_IN_ALPHABETICAL_ORDER = [{*names} for names in ("xy", "xyz", "ab", "abc", "abcd", "mn", "hk", "pq", "uv")]
_POINT = re.compile(r"^[A-Z]'?\s*(?=\()")  # P(3,-2)
_LABELLED = re.compile(r"(?:\\text\{)?\s*\(?([A-Z])[).:]\s*\}?\s*([^\s)].*)", re.DOTALL)  # A: 3
_MATRIX = re.compile(
    r"(?P<factor>[^&]*?)\s*(?:\\[{}]|[(\[|{])?\s*\\begin\{(?P<kind>[bpB]?(?:small)?matrix|array)\}\s*(?:\{[^{}]*\})?"
    r"(?P<body>.*?)\\end\{(?P=kind)\}\s*(?:\\[{}]|[)\]|}])?",
    re.DOTALL,
)


# --- comparing parts ---


def matched(gold: Sequence[str], answer: Sequence[str], same: Same) -> bool:
    """Whether the parts are the same in any order."""
    if len(gold) != len(answer) or len(gold) > _MOST:
        return False
    left = list(answer)
    for part in gold:
        alike = [other for other in left if squeezed(part) == squeezed(other)]
        found = alike or [other for other in left if _same_part(part, other, same)][:1]
        if not found:
            return False
        left.remove(found[0])
    return True


def in_order(gold: Sequence[str], answer: Sequence[str], same: Same) -> bool:
    return len(gold) == len(answer) and all(_same_part(a, b, same) for a, b in zip(gold, answer, strict=True))


def _same_part(gold: str, answer: str, same: Same) -> bool:
    """Whether two parts of a collection are the same. Here {2} is not 2, and in `A: 3` both letter and value count."""
    labels = [_LABELLED.fullmatch(part) for part in (gold, answer)]
    if labels[0] and labels[1]:
        return labels[0][1] == labels[1][1] and same(labels[0][2], labels[1][2])
    return (gold[:2] == "\\{") == (answer[:2] == "\\{") and same(gold, answer)


# --- bare lists ---


def items(text: str) -> list[str]:
    """The parts of a list. A part with ± gives two."""
    if _is_number(text) or several_units(text):  # 2,125; 3 hours and 20 minutes
        return [text]
    parts: list[str] = []
    for part in cut(text, _WORD_JOIN):
        parts += [part] if _is_number(part) else components(part)  # 3,500 and 8,200
    return [sign for part in parts for sign in both_signs(trimmed(part))]


def _is_number(text: str) -> bool:
    return number(split_unit(text)[0]) is not None


def both_signs(text: str) -> list[str]:
    """`2 \\pm \\sqrt{3}` with each of the two signs; other text as it is."""
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return [text]
    plus, minus = (
        re.sub(rf"\\{second}(?![a-zA-Z])", "-", re.sub(rf"\\{first}(?![a-zA-Z])", "+", text))
        for first, second in (("pm", "mp"), ("mp", "pm"))
    )
    return [re.sub(r"^\+\s*|(?<=[=(,])\s*\+\s*", "", plus), minus]


def bare_list(text: str) -> list[str] | None:
    parts = items(text)
    return parts if len(parts) > 1 else None


def same_list(gold: list[str], answer: str, same: Same) -> bool:
    """Whether an answer has the gold's parts: in the same order if it is in parentheses, else in any order."""
    names, values = _names_and_values(gold)
    parts = one_by_one(answer) or [] if len(set(names)) > 1 else []
    inside = tuple_(value_side(answer)) if bare_list(answer) is None and not parts else None
    if inside is not None:
        return in_order(values, _names_and_values(inside)[1], same)
    given_names, given = _names_and_values(parts or set_(answer) or items(answer))
    if len(set(names)) > 1 and sorted(names) == sorted(given_names):
        return in_order(_by_name(names, values), _by_name(given_names, given), same)
    if len(set(names)) == len(names) > 1 and all(names):
        if all(given_names):
            return False  # c₁ and c₂ are not c₁ and c₅
        if not any(given_names):  # n = 15, r = 7 is 15, 7 and not 7, 15
            return set_(answer) is None and in_order(values, given, same)
    if len({*map(_letter, names)}) == 1 and all(names) and {*map(_letter, given_names)} - {"", _letter(names[0])}:
        return False  # x = ±1 is not y = ±1
    if any(_EQUATION.match(one) for one in given) and not any("=" in one for one in values):
        return False  # 2x = -2 is no value of x
    return matched(values, given, same)


def _letter(name: str) -> str:
    """A name without index and argument: x for x₁ and f for f(x). Empty for words, which name anything."""
    bare = re.sub(r"_.*|\(.*", "", name)
    return "" if re.search(r"(?<!\\)\b[A-Za-z][a-z]{2}", bare) else bare.lower()


def _names_and_values(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `x = 1` into name and value. A part without a name has the name of the part before: `x = 1, 2`."""
    names: list[str] = []
    values: list[str] = []
    for part in parts:
        sides = cut(part, r"=")
        named = len(sides) == 2 and NAME.fullmatch(sides[0])
        names.append(squeezed(sides[0]) if named else names[-1] if names else "")
        values.append(sides[1] if named else part)
    return names, values


def _by_name(names: list[str], values: list[str]) -> list[str]:
    return [value for _, value in sorted(zip(names, values, strict=True), key=lambda pair: pair[0])]


# --- sets ---


def set_(text: str) -> list[str] | None:
    """The elements of `\\{a, b\\}`."""
    whole = bracketed(value_side(text))
    if whole is None or whole[0] not in ("\\{", "{") or re.search(r"\||" + RELATION, whole[1]):
        return None
    if whole[0] == "{" and "," not in whole[1]:
        return None
    return [sign for part in components(whole[1]) for sign in both_signs(part)]


def same_set(gold: list[str], answer: str, same: Same) -> bool:
    given = set_(answer)
    if given is None:
        answer = value_side(answer)
        given = items(answer) if tuple_(answer) is None else []
    return matched(_distinct(gold), _distinct(given), same)


def _distinct(parts: list[str]) -> list[str]:
    return list({squeezed(part): part for part in parts}.values())


def one_by_one(text: str) -> list[str] | None:
    """`x = 1` and `y = 2` from `(x, y) = (1, 2)`, and from `[x = 1, y = 2]`; None for any other text."""
    sides = cut(text, "=")
    names = names_of(sides[0]) if len(sides) == 2 else None
    values = tuple_(sides[-1])
    if values and len(sides) == 1:
        given, _ = _names_and_values(values)
        return values if all(given) and len(set(given)) == len(given) else None
    if names is None or values is None or len(names) != len(values):
        return None
    return [f"{name} = {value}" for name, value in zip(names, values, strict=True)]


def components(text: str) -> list[str]:
    """The parts inside brackets: `(2,251,252)` has three, but `(1,000, 2,000)`, with a space, has two."""
    spaced = re.search(r"\d, \d", text) and re.search(r"\d,\d{3}(?!\d)", text)
    return [part for cutting in cut(text, r";|,(?=\s)" if spaced else r"[,;]") if (part := trimmed(cutting))]


# --- tuples, vectors and matrices ---


def tuple_(text: str) -> list[str] | None:
    """The components of `(a, b)`, `[a, b]`, `\\langle a, b\\rangle` or a row or column vector."""
    sides = cut(text, "=")
    text = sides[1] if len(sides) == 2 and names_of(sides[0]) else text  # (x, y) = (1, 2)
    whole = bracketed(re.sub(r"\^\{?T\}?$", "", text))
    if whole is None or whole[0] in ("\\{", "{"):
        rows = matrix(text)
        return _cells(rows) if rows and _is_vector(rows) else None
    parts = components(whole[1]) if whole[0] + whole[2] not in ("(]", "[)") else []
    return parts if len(parts) > 1 else None


def same_named(gold: list[str], answer: str, same: Same) -> bool:
    """Whether an answer has the values of `(x, y) = (1, 2)`: by their names if it has them, else in their order."""
    names, values = _names_and_values(gold)
    given_names, given = _names_and_values(one_by_one(answer) or items(answer))
    if sorted(names) == sorted(given_names):
        return in_order(_by_name(names, values), _by_name(given_names, given), same)
    if all(given_names) and names_of(cut(answer, "=")[0]) is None:
        return False  # other names
    return same_tuple(values, answer, same)


def same_tuple(gold: list[str], answer: str, same: Same) -> bool:
    whole = _POINT.sub("", value_side(answer))
    given = tuple_(whole)
    if given is not None and len(gold) == 2 and squeezed(whole)[0] == "[":
        return False  # a gold pair or open interval is not a closed interval
    if given is None and len(gold) == 2 and re.search(RELATION + r"|\\in(?![a-zA-Z])", answer):
        interval: Region = ([((gold[0], False), (gold[1], False))], "")
        return same_region(interval, answer, same)
    if given is None:
        if set_(answer) is not None:
            return False
        given = items(answer)
    names, values = _names_and_values(one_by_one(answer) or given)
    if len(values) > 1 and all(names):
        given = values
        if {*names} in _IN_ALPHABETICAL_ORDER:
            given = _by_name(names, values)
    signs = [sign for part in gold for sign in both_signs(part)]
    return in_order(gold, given, same) or (len(signs) > len(gold) and matched(signs, given, same))


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a matrix. A factor in front of it multiplies every cell."""
    match = _MATRIX.fullmatch(text.strip())
    if match is None or "\\begin" in match["factor"] + match["body"] or re.search("[=,<>]", match["factor"]):
        return None
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-zA-Z])", match["body"]) if row.strip()]
    factor = re.sub(r"\\(?:cdot|times)$", "", match["factor"]).strip()
    factor = {"-": "-1", "+": ""}.get(factor, factor)
    return [[f"({factor})\\cdot({cell.strip()})" if factor else cell.strip() for cell in row] for row in rows]


def _is_vector(rows: list[list[str]]) -> bool:
    return len(rows) == 1 or all(len(row) == 1 for row in rows)


def _cells(rows: list[list[str]]) -> list[str]:
    return [cell for row in rows for cell in row]


def same_matrix(gold: list[list[str]], answer: str, same: Same) -> bool:
    given = matrix(value_side(answer))
    if given is not None:
        return len(gold) == len(given) and all(in_order(a, b, same) for a, b in zip(gold, given, strict=True))
    parts = tuple_(answer) if _is_vector(gold) else None
    return parts is not None and in_order(_cells(gold), parts, same)
