"""Choices, words and sentences, which are compared by letters instead of values."""

import re

from ..notation import plain, squeezed, upright
from . import Same

_CHOICE = re.compile(
    r"(?:\(\s*([A-Z])\s*\)|([A-Z])(?=\s*(?:[).:]|$))(?!\s*\)\s*[-+*/^]))"
    r"(?![\s).:]*(?:[\^_=(+/<>]|\\cu[pa]))"  # part of a formula
)
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:(?: ?[,;/&] ?| (?=and|or))(?:(?:and|or) )?\(?[A-Z]\)?)+")  # (B) and (C)
_SECOND = re.compile(r"(?<=[\s,;:).])(?:\([A-K]\)|[A-K]\)|[A-K][.:]\s+\S)")  # B) 3 C) 4
_LABELLED = re.compile(r"(?:\\text\{)?\s*(?:\([A-K]\)|[A-K][).:])\s*\}?\s*(.+)")
_ORDER = re.compile(r"[A-Z]{3,}")
_EITHER = re.compile(r"(?:(?:yes|no|true|false)(?:\W+(?:and|or)\W+|\W+|$)){2,}")  # yes / no
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_CONDITION = re.compile(r"(?<![\\a-zA-Z])(?:otherwise|where|when|if|for|such that)(?![a-zA-Z])|\\begin\{cases\}")
_WHOLE_LINE = {"(-\\infty,\\infty)", "(-\\infty,+\\infty)", "\\mathbbR", "\\mathbb{R}", "\\mathbb R"}
EVERYTHING = {
    "all real numbers", "the set of all real numbers", "set of all real numbers", "any real number",
    "\\mathbb{r}", "all reals", "all real", "all real values", "r", "every real number",
    "x \\in \\mathbb{r}",
}  # fmt: skip
_SYNONYMS = (
    {
        "no solution", "no solutions", "\\emptyset", "empty set", "\\{\\}", "no real solution", "no real solutions",
        "the empty set", "there is no solution", "there are no solutions", "there is no real solution",
        "there are no real solutions", "the equation has no solution", "the system has no solution",
    },
    EVERYTHING,
    {"does not exist", "dne", "the limit does not exist", "limit does not exist"},
)  # fmt: skip


def choice(text: str) -> str | None:
    """The letter of a choice: `B`, `(B)`, `\\text{(B)}`, `B) 7`, `option B`; None for anything else."""
    match = _CHOICE.match(re.sub(r"(?i)^\s*(?:option|choice|answer)\s+", "", upright(text)).strip())
    return match and (match[1] or match[2])


def _several_choices(text: str) -> bool:
    """Whether a text names several choices: `(B) and (C)`, `A, C`."""
    return _SEVERAL.fullmatch(" ".join(upright(text).split()).strip(" .")) is not None


def choice_with_value(gold: str) -> tuple[str, str | None] | None:
    """Read a gold's letter, and its value if there is one: `B) 7`."""
    letter = choice(gold)
    if letter is None or _several_choices(gold):
        return None
    if re.fullmatch(r"\(?[A-Z]\)?", re.sub(r"\s", "", upright(gold))):
        return letter, None
    several = re.search(r",\s*(?:\\text\{)?[A-Z]\}?\s*:", gold)  # J: 4 h, S: 14 h
    match = None if several else _LABELLED.fullmatch(gold)
    return (letter, match[1]) if match else None


def same_choice(gold: tuple[str, str | None], answer: str, same: Same) -> bool:
    letter, value = gold
    if _several_choices(answer):
        return False
    given = choice(answer)
    if given is not None:
        return given == letter and _SECOND.search(upright(answer).strip()) is None
    if value is not None:
        return same(value, answer)
    name, _, named = answer.rpartition("=")
    return squeezed(named).strip("()") == letter and bool(name) and not re.fullmatch(r"[A-E]", squeezed(name))


def without_label(answer: str) -> str | None:
    """The value after a choice's label, `(C) 1/2`; None without a label."""
    match = _LABELLED.fullmatch(answer)
    return match and match[1]


def sentences(gold: str) -> str | None:
    """Read a gold of sentences, or a gold with conditions."""
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", re.sub(r"\\(?:begin|end)\{[^{}]*\}", "", gold))
    return gold if len(words) > 4 or (_CONDITION.search(gold) and re.search(r"[\d=]", gold)) else None


def same_sentences(gold: str, answer: str, same: Same) -> bool:
    return plain(gold) == plain(answer)


def words(gold: str) -> str | None:
    """Read a gold of words, without digits or formulas. Three capitals or more are an order, as CAB, and no product."""
    bare = upright(gold).strip()
    if _ORDER.fullmatch(bare):
        return bare
    if any(bare.casefold() in names for names in _SYNONYMS):
        return bare
    if re.search(r"[\d\\=<>^_|{}]", bare):
        return None
    longest = max(map(len, re.findall(r"[^\W\d_]{2,}", bare)), default=0)
    return bare if longest > 3 or (longest and ("\\text" in gold or bare.casefold() in ("yes", "no", "odd"))) else None


def same_words(gold: str, answer: str, same: Same) -> bool:
    if _ORDER.fullmatch(gold) and _letters_in_order(answer) == gold:
        return True
    wanted, given = gold.casefold(), upright(answer).strip().casefold()
    if wanted in ("yes", "no", "true", "false"):
        if _EITHER.fullmatch(given) or re.search(rf"\b(?:but|or|actually|otherwise)\b.*\b{_OPPOSITE[wanted]}\b", given):
            return False
        return re.match(rf"{wanted}(?![a-z]|\w* \w)", given) is not None
    for names in _SYNONYMS:
        if wanted in names:
            return given.strip(" .") in names or (names is EVERYTHING and whole_line(answer))
    return plain(gold) == plain(answer) or _without_article(gold) == _without_article(answer)


def _letters_in_order(text: str) -> str:
    """CAB from `x = CAB`, `(C, A, B)`, `C \\to A \\to B` and `C \\cdot A \\cdot B`."""
    without_arrows = re.sub(r"\\(?:to|rightarrow|cdot|times)(?![a-zA-Z])", "", upright(text).rpartition("=")[2])
    return re.sub(r"[\s,()>*-]", "", without_arrows)


def whole_line(text: str) -> bool:
    """Whether a text stands for all real numbers: `\\mathbb{R}`, `x \\in (-\\infty, \\infty)`."""
    bare = squeezed(text)
    return bare.rpartition("\\in ")[2] in _WHOLE_LINE or re.fullmatch(r"-\\infty<[a-z]<\+?\\infty", bare) is not None


def _without_article(text: str) -> str:
    return plain(re.sub(r"(?i)^\s*(?:the|a|an|it is|is)\s+", "", upright(text)))
