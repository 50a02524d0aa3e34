"""Mathematical equality: is the answer of a completion that of the data set? The gold decides by which convention.

`verdict` compares one pair, and `correct` is the reward function. docs/rewards.md has the conventions.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from . import quantities, reading, symbols
from .notation import OPENING, balanced, bracketed, cut, normal, plain, squeezed, trimmed
from .quantities import Number, number, split_unit

_RELATION = r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>"
_JOIN = (
    r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[,;]|\\vee(?![a-zA-Z])|\\lor(?![a-zA-Z])"
)
_WORD_JOIN = _JOIN.replace("[,;]", ";")
_NAME = re.compile(
    r"(?:\\(?:text|overline|vec|hat|tilde|angle|triangle)\s*)?"
    r"\{?(?:\\(?!frac|sqrt|log|sin|cos|tan|ln|binom)[a-zA-Z]+|[a-zA-Z][a-zA-Z ]*)\}?"
    r"'*(?:_\{?[^{}=<>]*\}?)?'*(?:\^\{?-1\}?)?\s*(?:\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?"
)
_VARIABLE = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_\{?\w+\}?)?'*")
_LABEL = re.compile(r"\(?([A-Z])\)?")
_EMPTY = {
    "no solution",
    "no solutions",
    "\\emptyset",
    "empty set",
    "\\{\\}",
    "no real solution",
    "no real solutions",
    "the empty set",
}
_NOWHERE = {"does not exist", "dne", "the limit does not exist", "limit does not exist"}
_EVERYTHING = {
    "all real numbers",
    "\\mathbb{r}",
    "all reals",
    "all real",
    "all real values",
    "r",
    "every real number",
    "x \\in \\mathbb{r}",
}


def correct(completions: Sequence[Any], solution: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the answer of the completion is that of the column `solution`, else 0; None where that is unreadable."""
    return [verdict(gold, completion) for gold, completion in zip(solution, completions, strict=True)]


def verdict(gold: Any, completion: Any) -> float | None:
    """1.0 if the completion gives the gold's answer, 0.0 if not, None if the gold holds no answer that can be read."""
    wanted = read_gold(gold)
    if wanted is None:
        return None
    text = reading.completion_text(completion)
    given = reading.final_answer(text)
    if given is None:
        return 0.0
    if equal(wanted, given) or ((alone := reading.only_number(given)) is not None and _is_number(wanted, alone)):
        return 1.0
    together = reading.boxes_together(text)
    if (len(together) > 1 and len(cut(wanted, _JOIN)) == len(together)) or (len(together) > 1 and bracketed(wanted)):
        return float(equal(wanted, ", ".join(together)))
    return 0.0


def _is_number(gold: str, answer: str) -> bool:
    return number(split_unit(gold)[0]) is not None and equal(gold, answer)


def read_gold(gold: Any) -> str | None:
    """The gold's answer in normal spelling; None if there is none."""
    text = reading.gold_text(gold)
    if text is None:
        return None
    return _normal_gold(text)


@lru_cache(maxsize=4096)
def _normal_gold(text: str) -> str | None:
    text = normal(text)
    return text if balanced(text) and re.search(r"\w|\\infty|\\emptyset", text) else None


def equal(gold: str, answer: str) -> bool:
    """Whether an answer says the same as a gold in normal spelling. Never raises."""
    try:
        answer = normal(answer[: 4 * len(gold) + 2000])
        return _same(gold, answer) or _same_without_label(gold, answer)
    except (
        RecursionError,
        MemoryError,
        OverflowError,
        ValueError,
        ArithmeticError,
        TypeError,
        AttributeError,
        IndexError,
    ):
        return False


def _same_without_label(gold: str, answer: str) -> bool:
    """For a choice that stands with its value, `(C) 1/2`: whether the value is that of the gold."""
    match = re.fullmatch(r"(?:\\text\{)?\s*(?:\(([A-K])\)|([A-K])[).:])\s*\}?\s*(.+)", answer)
    return match is not None and choice(gold) is None and _same(gold, match[3])


def _same(gold: str, answer: str, depth: int = 0) -> bool:
    if not answer or depth > 6:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    gold, answer = (re.sub(rf"^({_NAME.pattern})\\s*\\\\approx(?![a-zA-Z])", r"\1=", text) for text in (gold, answer))
    for read, compare in _KINDS:
        kind = read(gold)
        if kind is not None:
            return compare(kind, answer, depth + 1)
    return _same_scalar(gold, answer, depth + 1)


_CONDITION = re.compile(r"(?<![\\a-zA-Z])(?:otherwise|where|when|if|for|such that)(?![a-zA-Z])|\\begin\{cases\}")


def _prose(gold: str) -> str | None:
    """A gold of sentences, or one that depends on conditions: only the same words are the same answer."""
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", re.sub(r"\\(?:begin|end)\{[^{}]*\}", "", gold))
    return gold if len(words) > 4 or (_CONDITION.search(gold) and re.search(r"[\d=]", gold)) else None


def _same_prose(gold: str, answer: str, depth: int) -> bool:
    return plain(gold) == plain(answer)


def _double(gold: str) -> list[str] | None:
    """An inequality and the interval that it means, `-1 < x \\le 2 : (-1, 2]`."""
    parts = [part.strip() for part in gold.split(":")]
    return parts if len(parts) == 2 and re.search(_RELATION, parts[0]) and all(region(part) for part in parts) else None


def _same_double(gold: list[str], answer: str, depth: int) -> bool:
    return all(any(_same(one, part.strip(), depth) for one in gold) for part in answer.split(":"))


# --- choices, words, times, dates, ratios, bases ---


def choice(text: str) -> str | None:
    """The letter of a choice: `B`, `(B)`, `\\text{(B)}`, `B) 7`, `option B`."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    text = re.sub(r"^(?:option|choice|answer)\s+", "", text, flags=re.IGNORECASE).strip()
    match = re.match(r"\(\s*([A-Z])\s*\)|([A-Z])(?=\s*(?:[).:]|$))", text)
    if match is None:
        return None
    rest = text[match.end() :].strip(" ).:")
    if (
        match[1] is None
        and text[match.end() :].lstrip()[:1] == ")"
        and re.match(r"\)\s*[-+*/^]", text[match.end() :].lstrip())
    ):
        return None
    return (
        (match[1] or match[2])
        if not rest.startswith(("^", "_", "=", "(", "+", "/", "\\cup", "\\cap", "<", ">"))
        else None
    )


def _gold_choice(gold: str) -> str | None:
    letter = choice(gold)
    return (
        gold
        if letter and (_LABEL.fullmatch(re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", gold)) or _labelled(gold))
        else None
    )


def _labelled(gold: str) -> re.Match | None:
    """A choice's letter with its value, `B) 7`; not several letters with theirs, `J: 4 h, S: 14 h`."""
    if re.search(r",\s*(?:\\text\{)?[A-Z]\}?\s*:", gold):
        return None
    return re.match(r"(?:\\text\{)?\s*(?:\([A-K]\)|[A-K][).:])\s*\}?\s*\S", gold)


def _same_choice(gold: str, answer: str, depth: int) -> bool:
    letter = choice(answer)
    if letter is not None:
        return letter == choice(gold)
    if _labelled(gold) and (match := re.fullmatch(r"(?:\\text\{)?\s*(?:\([A-K]\)|[A-K][).:])\s*\}?\s*(.+)", gold)):
        return _same(match[1], answer, depth)
    return "=" in answer and squeezed(answer.rpartition("=")[2]) == squeezed(gold)


def _words(gold: str) -> str | None:
    """A gold of words: no digits, no formula."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", gold)
    everything = bare.strip().casefold()
    if everything in _EMPTY or everything in _EVERYTHING:
        return everything
    if re.search(r"[\d\\=<>^_|{}]", bare):
        return None
    words = re.findall(r"[^\W\d_]{2,}", bare)
    return (
        bare if words and (max(map(len, words)) > 3 or "\\text" in gold or bare.casefold() in ("yes", "no")) else None
    )


def _same_words(gold: str, answer: str, depth: int) -> bool:
    given = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", answer).strip().casefold()
    if gold.strip().casefold() in ("yes", "no", "true", "false"):
        return re.match(r"[a-z]*", given)[0] == gold.strip().casefold() and not re.match(r"\w+ \w", given)  # type: ignore[index]
    for synonyms in (_EMPTY, _EVERYTHING, _NOWHERE):
        if gold.strip().casefold() in synonyms:
            name = given.strip(" .")
            return name in synonyms or (
                synonyms is _EVERYTHING and squeezed(answer).rpartition("\\in ")[2] in _WHOLE_LINE
            )
    return plain(gold) == plain(answer) or plain(_after_articles(gold)) == plain(_after_articles(answer))


_WHOLE_LINE = {"(-\\infty,\\infty)", "(-\\infty,+\\infty)", "\\mathbbR", "\\mathbb{R}", "\\mathbb R"}


def _after_articles(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"^\s*(?:the|a|an|it is|is)\s+", "", text, flags=re.IGNORECASE)


def _same_date(gold: tuple[int, int, int], answer: str, depth: int) -> bool:
    return quantities.date(answer) == gold


def _same_time_of_day(gold: tuple[int, int, int, str], answer: str, depth: int) -> bool:
    given = quantities.time_of_day(answer)
    return given is not None and quantities.same_time(gold, given)


def _angle(gold: str) -> Fraction | None:
    return quantities.angle(gold) if "\\prime" in gold or "'" in gold else None


def _same_angle(gold: Fraction, answer: str, depth: int) -> bool:
    return quantities.angle(answer) == gold


def _ratio(text: str) -> list[str] | None:
    if "\\{" in text or re.search(_RELATION + "|=", text):
        return None
    parts = cut(re.sub(r"\\text\{\s*to\s*\}|(?<=\d)\s+to\s+(?=\d)", ":", text), ":")
    return (
        parts if len(parts) > 1 and all(parts) and not any("[" in part or "\\text" in part for part in parts) else None
    )


def _same_ratio(gold: list[str], answer: str, depth: int) -> bool:
    given = _ratio(answer)
    if given is None:
        given = [answer, "1"] if len(gold) == 2 else []
    if len(given) != len(gold):
        return False
    # a : b = c : d exactly where ad = bc.
    first_gold, first_given = gold[0], given[0]
    return all(
        _same_scalar(f"({first_gold})\\cdot({other})", f"({first_given})\\cdot({one})", depth)
        for one, other in zip(gold[1:], given[1:], strict=True)
    )


def _based(gold: str) -> str | None:
    return gold if quantities.in_base(gold) is not None else None


def _same_based(gold: str, answer: str, depth: int) -> bool:
    return quantities.in_base(gold) == quantities.in_base(answer)


# --- collections ---


def items(text: str) -> list[str]:
    """The parts of a list, with both values of a ±."""
    if number(split_unit(text)[0]) is not None:  # 2,125
        return [text]
    parts = []
    for part in cut(text, _WORD_JOIN):
        if part and number(split_unit(part)[0]) is not None:  # 3,500 and 8,200
            parts.append(part)
        else:
            parts += _components(part)
    return [one for part in parts for one in _both_signs(trimmed(part))]


def _both_signs(text: str) -> list[str]:
    if not re.search(r"\\[pm][pm](?![a-zA-Z])", text) or not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return [text]
    plus = re.sub(r"\\mp(?![a-zA-Z])", "-", re.sub(r"\\pm(?![a-zA-Z])", "+", text))
    minus = re.sub(r"\\mp(?![a-zA-Z])", "+", re.sub(r"\\pm(?![a-zA-Z])", "-", text))
    return [re.sub(r"^\+\s*|(?<=[=(,])\s*\+\s*", "", plus), minus]


def _matched(gold: Sequence[str], answer: Sequence[str], depth: int) -> bool:
    """Whether the parts are the same in some order."""
    if len(gold) != len(answer) or len(gold) > 60:
        return False
    left = list(answer)
    for one in gold:
        found = next((other for other in left if squeezed(one) == squeezed(other)), None) or next(
            (other for other in left if _same(one, other, depth)), None
        )
        if found is None:
            return False
        left.remove(found)
    return True


def _in_order(gold: Sequence[str], answer: Sequence[str], depth: int) -> bool:
    return len(gold) == len(answer) and all(_same(a, b, depth) for a, b in zip(gold, answer, strict=True))


def _set(text: str) -> list[str] | None:
    """The elements of `\\{a, b\\}`."""
    text = _value_side(text)
    whole = bracketed(text)
    if whole is None or whole[0] not in ("\\{", "{") or re.search(r"\||" + _RELATION, whole[1]):
        return None
    if whole[0] == "{" and "," not in whole[1]:
        return None
    return [sign for part in _components(whole[1]) for sign in _both_signs(part)]


def _same_set(gold: list[str], answer: str, depth: int) -> bool:
    given = _set(answer)
    if given is None:
        answer = _value_side(answer)
        if _tuple(answer) is not None:
            return False
        given = items(answer)
    return _matched(_distinct(gold), _distinct(given), depth)


def _distinct(parts: list[str]) -> list[str]:
    return list({squeezed(part): part for part in parts}.values())


def _tuple(text: str) -> list[str] | None:
    """The components of `(a, b)`, `[a, b]`, `\\langle a, b\\rangle` or a row or column vector."""
    whole = bracketed(re.sub(r"\^\{?T\}?$", "", text))
    if whole is None or whole[0] in ("\\{", "{"):
        rows = _matrix(text)
        if rows is not None and (len(rows) == 1 or all(len(row) == 1 for row in rows)):
            return [cell for row in rows for cell in row]
        return None
    if (whole[0] == "(" and whole[2] == "]") or (whole[0] == "[" and whole[2] == ")"):
        return None
    parts = _components(whole[1])
    return parts if len(parts) > 1 else None


def _components(text: str) -> list[str]:
    """Within brackets, `(2,251,252)` has three components; with spaces, `(1,000, 2,000)` has two."""
    spaced = re.search(r"\d, \d", text) and re.search(r"\d,\d{3}(?!\d)", text)
    return [part for cutting in cut(text, r";|,(?=\s)" if spaced else r"[,;]") if (part := trimmed(cutting))]


def _same_tuple(gold: list[str], answer: str, depth: int) -> bool:
    given = _tuple(answer)
    if given is not None and len(gold) == 2 and squeezed(answer)[0] == "[":
        return False  # the open interval or the pair, against the closed interval
    if given is None and len(gold) == 2 and re.search(_RELATION + r"|\\in(?![a-zA-Z])", answer):
        # An interval, written as an inequality.
        return _same_region(([((gold[0], False), (gold[1], False))], ""), answer, depth)
    if given is None:
        if _set(answer) is not None:
            return False
        named = _named(answer)
        given = [text for _, text in named] if named else items(answer)
    return _in_order(gold, given, depth) or (
        any("\\pm" in part for part in gold) and _matched([p for g in gold for p in _both_signs(g)], given, depth)
    )


def _list(text: str) -> list[str] | None:
    parts = items(text)
    return parts if len(parts) > 1 else None


def _same_list(gold: list[str], answer: str, depth: int) -> bool:
    """A bare list has no order; if the answer puts it in parentheses, it has the gold's."""
    names, values = _names_and_values(gold)
    answer = re.sub(r"^(?:\\text\{)?(?:Solution is:?|solutions?:)\}?\s*", "", answer, flags=re.IGNORECASE)
    components = _tuple(answer) if _list(answer) is None else None
    if components is not None and len(components) != 1:
        given_names, given = _names_and_values(components)
        if len(set(names)) == len(names) and given_names and names == given_names:
            return _in_order(values, given, depth)
        return _in_order(values, given, depth)
    parts = _set(answer) or items(answer)
    given_names, given = _names_and_values(parts)
    if len(set(names)) > 1 and names == given_names:
        return _in_order(values, given, depth)
    if len(set(names)) > 1 and sorted(names) == sorted(given_names):
        ordered = [dict(zip(given_names, given, strict=True))[name] for name in names]
        return len(set(given_names)) == len(names) and _in_order(values, ordered, depth)
    if len(set(names)) == len(names) > 1 and all(names) and all(given_names):
        return False  # c₁ and c₂ are not c₁ and c₅
    return _matched(values, given, depth)


def _names_and_values(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """`x = 1` as name and value; a part without a name has that of the part before: `x = 1, 2`."""
    names: list[str] = []
    values: list[str] = []
    for part in parts:
        sides = cut(part, r"=")
        if len(sides) == 2 and _NAME.fullmatch(sides[0].strip()):
            names.append(squeezed(sides[0]))
            values.append(sides[1].strip())
        else:
            names.append(names[-1] if names and names[-1] else "")
            values.append(part)
    return names, values


def _named(text: str) -> list[tuple[str, str]] | None:
    parts = items(text)
    names, values = _names_and_values(parts)
    return list(zip(names, values, strict=True)) if len(parts) > 1 and all(names) else None


_MATRIX = re.compile(
    r"(?:\\[{}]|[(\[|{])?\s*\\begin\{(?P<kind>[bpvBV]?(?:small)?matrix|array)\}\s*(?:\{[^{}]*\})?(?P<body>.*?)\\end\{(?P=kind)\}\s*(?:\\[{}]|[)\]|}])?",
    re.DOTALL,
)


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text.strip())
    if match is None or "\\begin" in match["body"]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-zA-Z])", match["body"]) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _same_matrix(gold: list[list[str]], answer: str, depth: int) -> bool:
    given = _matrix(_value_side(answer))
    if given is None:
        parts = _tuple(answer)
        if parts is None or not (len(gold) == 1 or all(len(row) == 1 for row in gold)):
            return False
        return _in_order([cell for row in gold for cell in row], parts, depth)
    return len(gold) == len(given) and all(_in_order(a, b, depth) for a, b in zip(gold, given, strict=True))


# --- intervals and inequalities ---

End = tuple[str, bool]  # a bound, and whether it belongs to the interval
Region = tuple[list[tuple[End, End]], str]  # intervals and points, and the variable's name if it has one


def region(text: str) -> Region | None:
    """Intervals, unions of them, inequalities in one variable, and sets given by a condition."""
    whole = bracketed(text)
    if whole and whole[0] in ("\\{", "{"):
        parts = re.split(r"\||(?<!\\):", whole[1], maxsplit=1)
        if len(parts) == 2:
            return region(parts[1].strip())
        if not re.search(_RELATION, whole[1]) and whole[0] == "\\{":
            points = items(whole[1])
            return ([((point, True), (point, True)) for point in points], "") if points else None
    match = re.fullmatch(r"(?:(.{1,12}?)\s*\\in(?![a-zA-Z])\s*)(.*)", text)
    if match and _VARIABLE.fullmatch(match[1].strip()):
        inner = region(match[2].strip())
        return (inner[0], match[1].strip()) if inner else None
    pieces = cut(text, r"\\cup(?![a-zA-Z])|(?<![a-zA-Z\\])[Uu](?![a-zA-Z])")
    if len(pieces) > 1:
        regions = [region(piece) for piece in pieces]
        if any(one is None for one in regions):
            return None
        return [interval for one in regions if one for interval in one[0]], ""
    if squeezed(text) in _WHOLE_LINE:
        return [(("-\\infty", False), ("\\infty", False))], ""
    if (interval := _interval(text)) is not None:
        return [interval], ""
    return _inequalities(text)


def _interval(text: str) -> tuple[End, End] | None:
    match = re.fullmatch(r"([(\[])(.*)([)\]])", text.strip(), re.DOTALL)
    if match is None or re.search(_RELATION + "|=", match[2]):
        return None
    parts = cut(match[2], ",")
    if len(parts) != 2 or not all(parts):
        return None
    return (parts[0], match[1] == "["), (parts[1], match[3] == "]")


def _inequalities(text: str) -> Region | None:
    found = [
        _inequality(part)
        for part in cut(text, r"\\text\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|,|\\text\{\s*,?\s*and\s*\}")
    ]
    if not found or any(one is None for one in found):
        return None
    regions = [one for one in found if one is not None]
    names = {name for _, name in regions}
    return ([interval for one in regions for interval in one[0]], names.pop()) if len(names) == 1 else None


_FLIP = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


def _inequality(text: str) -> Region | None:
    """One of `x < a`, `a < x`, `a < x < b` and `x ≠ a`."""
    parts, signs = _chain(text)
    if len(parts) == 2:
        left, right = parts
        sign = signs[0]
        if not _VARIABLE.fullmatch(left) or (_VARIABLE.fullmatch(right) and not _VARIABLE.fullmatch(left)):
            left, right, sign = right, left, _FLIP[sign]
        if not _VARIABLE.fullmatch(left) or _VARIABLE.fullmatch(right):
            return None
        if sign == "\\ne":
            return [(("-\\infty", False), (right, False)), ((right, False), ("\\infty", False))], left
        if sign in ("<", "\\le"):
            return [(("-\\infty", False), (right, sign != "<"))], left
        return [((right, sign != ">"), ("\\infty", False))], left
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[1]):
        if signs[0] in (">", "\\ge"):
            parts, signs = parts[::-1], [_FLIP[sign] for sign in reversed(signs)]
        if all(sign in ("<", "\\le") for sign in signs) and not any(
            _VARIABLE.fullmatch(p) for p in (parts[0], parts[2])
        ):
            return [((parts[0], signs[0] != "<"), (parts[2], signs[1] != "<"))], parts[1]
    return None


def _chain(text: str) -> tuple[list[str], list[str]]:
    parts = cut(text, _RELATION)
    signs = [sign for sign in re.findall(_RELATION, text)]
    return (parts, signs) if len(parts) == len(signs) + 1 else ([text], [])


def _gold_region(gold: str) -> Region | None:
    """A gold that is no ordered pair: a bracket, an infinity, a union or a relation says so."""
    if not re.search(_RELATION + r"|\\infty|\\cup|\\in(?![a-zA-Z])|^\(.*\]$|^\[.*\)$|^\[[^,]*,[^,]*\]$|\\mathbb", gold):
        return None
    return region(gold)


def _same_region(gold: Region, answer: str, depth: int) -> bool:
    given = region(answer)
    if given is None and plain(answer) in _EVERYTHING:
        given = [(("-\\infty", False), ("\\infty", False))], ""
    if given is None or (gold[1] and given[1] and squeezed(gold[1]) != squeezed(given[1])):
        return False
    if len(gold[0]) != len(given[0]):
        return False
    left = list(given[0])
    for (low, has_low), (high, has_high) in gold[0]:
        for other in left:
            (other_low, has_other_low), (other_high, has_other_high) = other
            if (has_low, has_high) == (has_other_low, has_other_high) and (
                _same_bound(low, other_low, depth) and _same_bound(high, other_high, depth)
            ):
                left.remove(other)
                break
        else:
            return False
    return True


def _same_bound(gold: str, answer: str, depth: int) -> bool:
    infinite = [re.sub(r"[+ {}]", "", text) for text in (gold, answer)]
    if "\\infty" in gold or "\\infty" in answer:
        return infinite[0] == infinite[1]
    return _same(gold, answer, depth)


def _order(text: str) -> tuple[list[str], list[str]] | None:
    """A chain of relations, turned so that it ascends."""
    parts, signs = _chain(text)
    if not signs or any(not part for part in parts):
        return None
    if signs[0] in (">", "\\ge"):
        parts, signs = parts[::-1], [_FLIP[sign] for sign in reversed(signs)]
    return parts, signs


def _same_order(gold: tuple[list[str], list[str]], answer: str, depth: int) -> bool:
    given = _order(answer)
    if given is None or given[1] != gold[1]:
        return False
    if all(_same_scalar(a, b, depth) for a, b in zip(gold[0], given[0], strict=True)):
        return True
    if len(gold[0]) == 2:
        (low, high), (given_low, given_high) = gold[0], given[0]
        return symbols.proportional(f"({low})-({high})", f"({given_low})-({given_high})", positive=gold[1] != ["\\ne"])
    return False


# --- equations and single values ---


def _equation(text: str) -> list[str] | None:
    if re.search(_RELATION, text):
        return None
    sides = cut(text, r"=|\\equiv(?![a-zA-Z])")
    return sides if len(sides) > 1 and all(sides) else None


def _value_side(text: str) -> str:
    """What a name is said to equal: 5 of `x = 5`."""
    sides = _equation(text)
    return sides[-1] if sides and (len(sides) > 2 or _NAME.fullmatch(sides[0])) else text


def _same_equation(gold: list[str], answer: str, depth: int) -> bool:
    given = _equation(answer)
    name = gold[0] if _NAME.fullmatch(gold[0]) else None
    if given is None:
        return name is not None and any(_same(side, answer, depth) for side in gold[1:])
    if name is not None and _NAME.fullmatch(given[0]):
        sides = [_with_argument(side, name, given[0]) for side in gold[1:]]
        if not _same_name(name, given[0]):
            return False
        if len(gold) == len(given):
            return _in_order(sides, given[1:], depth)
        return any(_same(side, given[-1], depth) for side in sides) or (
            len(gold) == 2 and _same(sides[0], given[1], depth)
        )
    if len(gold) == len(given) == 2:
        if _same_scalar(gold[0], given[0], depth) and _same_scalar(gold[1], given[1], depth):
            return True
        if _same_scalar(gold[0], given[1], depth) and _same_scalar(gold[1], given[0], depth):
            return True
        return symbols.proportional(f"({gold[0]})-({gold[1]})", f"({given[0]})-({given[1]})")
    return False


_FUNCTION = re.compile(r"^(\\?[a-zA-Z]+)\s*\(\s*([a-zA-Z])\s*\)$")


def _same_name(gold: str, answer: str) -> bool:
    """Whether two sides name the same: letters must agree, f(x) is f(t), and words may be any."""
    first, second = (squeezed(re.sub(r"\(.*", "", text)).strip("{}") for text in (gold, answer))
    if (re.search(r"[a-z]{3}", second) and not second.startswith("\\")) or (
        len(first) == 1 and second.isupper() and len(second) > 2
    ):
        return True
    return first == second if "_" in first and "_" in second else first.split("_")[0] == second.split("_")[0]


def _with_argument(text: str, gold: str, answer: str) -> str:
    """The right side of f(x) with the answer's letter for x."""
    first, second = _FUNCTION.match(gold), _FUNCTION.match(answer)
    if first is None or second is None or first[2] == second[2]:
        return text
    return re.sub(rf"(?<![a-zA-Z\\]){first[2]}(?![a-zA-Z])", second[2], text)


def _same_scalar(gold: str, answer: str, depth: int) -> bool:
    """Two single values: numbers without rounding, then units, then expressions."""
    given = _equation(answer)
    if bool(re.search(_RELATION, gold)) != bool(re.search(_RELATION, answer)):
        return False
    if given is not None and _equation(gold) is None:
        if not (_NAME.fullmatch(given[0]) or _NAME.fullmatch(given[-1])) and re.search(
            r"(?<![\\a-zA-Z])[a-zA-Z]", given[0]
        ):
            return False  # x² + y² = 1 is not 1
        return any(
            _same_scalar(gold, side, depth)
            for side in {given[-1], given[0] if _NAME.fullmatch(given[-1]) else given[-1]}
        )
    if "\\approx" in gold + answer:
        wanted, said = ([part for part in cut(text, r"\\approx(?![a-zA-Z])") if part] for text in (gold, answer))
        if len(wanted) > 1 and len(said) > 1:  # the exact value and its decimal, both
            return _same(wanted[0], said[0], depth + 1) and _same(wanted[-1], said[-1], depth + 1)
        return bool(said) and any(_same(one, part, depth + 1) for one in wanted for part in {said[0], said[-1]})
    while (
        (whole := bracketed(answer))
        and whole[0] == "("
        and whole[2] == ")"
        and "," not in whole[1]
        and bracketed(whole[1])
    ):
        answer = whole[1]
    if whole and whole[0] in ("(", "\\{", "{", "[") and whole[1] and OPENING.get(whole[0], "\\}") == whole[2]:
        return "," not in whole[1] and _same(gold, whole[1], depth + 1)
    gold_rest, gold_unit = split_unit(gold)
    answer_rest, answer_unit = split_unit(answer)
    if gold_unit and not answer_unit:
        answer_rest, answer_unit = split_unit(answer, loose=True)
    elif answer_unit and not gold_unit:
        gold_rest, gold_unit = split_unit(gold, loose=True)
    elif not answer_unit and number(gold) is not None:
        loose_rest, loose_unit = split_unit(answer, loose=True)
        if loose_unit and number(loose_rest) is not None and re.search(r"\s\S+$", answer):
            answer_rest, answer_unit = loose_rest, loose_unit
    return _same_quantity(gold_rest, gold_unit, answer_rest, answer_unit)


_PERCENT, _DEGREE = (("percent", 1),), (("degree", 1),)


def _same_quantity(
    gold: str, gold_unit: quantities.Unit | None, answer: str, answer_unit: quantities.Unit | None
) -> bool:
    first = gold_unit.powers if gold_unit else ()
    second = answer_unit.powers if answer_unit else ()
    if first == second:
        if gold_unit and answer_unit and gold_unit.size != answer_unit.size:
            return _same_plain(gold, answer, gold_unit.size / answer_unit.size)
        return _same_plain(gold, answer)
    if not first or not second:
        if _PERCENT in (first, second):
            ratio = Fraction(1, 100) if first == _PERCENT else Fraction(100)
            return (_same_plain(gold, answer) and not _fraction_of_one(gold, first)) or _same_plain(gold, answer, ratio)
        if second == _DEGREE and "\\pi" in gold:
            return _same_plain(gold, f"({answer})\\cdot\\frac{{\\pi}}{{180}}")
        return _same_plain(gold, answer)
    return False


def _fraction_of_one(gold: str, powers: tuple) -> bool:
    """A gold below 1 without a percent sign is a share: 0.5% is not 0.5."""
    value = number(gold)
    return not powers and value is not None and 0 < abs(value.value) < 1


def _same_plain(gold: str, answer: str, scale: Fraction = Fraction(1)) -> bool:
    if squeezed(gold) == squeezed(answer) and scale == 1:
        return True
    first, second = number(gold), number(answer)
    if first is not None and scale != 1:
        first = Number(first.value * scale, first.step * scale if first.step is not None else None)
    if first is not None and second is not None:
        return quantities.same_number(first, second)
    if quantities.in_base(answer) is not None:
        return first is not None and first.value == quantities.in_base(answer)
    if first is None and scale != 1:
        gold = f"({gold})\\cdot\\frac{{{scale.numerator}}}{{{scale.denominator}}}"
    if not _could_be_formula(answer) or not _could_be_formula(gold):
        return plain(gold) == plain(answer) and len(plain(gold)) > 1
    if "\\ln" in gold + answer:  # a logarithm without a base is the natural one beside an \\ln
        gold, answer = (re.sub(r"\\log(?!\s*_)(?![a-zA-Z])", r"\\ln", text) for text in (gold, answer))
    if symbols.same_value(
        gold if first is None or scale == 1 else f"\\frac{{{first.value.numerator}}}{{{first.value.denominator}}}",
        answer,
    ):
        return True
    return symbols.rounds_as(first if first is not None else gold, second if second is not None else answer)


def _could_be_formula(text: str) -> bool:
    """Whether a text is not made of words."""
    return not re.search(r"(?<![\\a-zA-Z{_])[a-zA-Z]{4,}(?![a-zA-Z}])|\\text\{[^{}]*[a-zA-Z]{3,}", text)


# The kinds of gold, the first that reads it decides: how a gold is read, and how an answer is held against it.
_KINDS: list[tuple[Callable[[str], Any], Callable[[Any, str, int], bool]]] = [
    (_prose, _same_prose),
    (_double, _same_double),
    (_gold_choice, _same_choice),
    (quantities.date, _same_date),
    (_angle, _same_angle),
    (quantities.time_of_day, _same_time_of_day),
    (_words, _same_words),
    (_based, _same_based),
    (_gold_region, _same_region),
    (_set, _same_set),
    (_list, _same_list),
    (_matrix, _same_matrix),
    (_tuple, _same_tuple),
    (_ratio, _same_ratio),
    (_order, _same_order),
    (_equation, _same_equation),
]


def warm_up() -> None:
    """Build math-verify's parser, which takes a second: a worker does it before its first row."""
    verdict("x+1", "\\boxed{1+x}")
