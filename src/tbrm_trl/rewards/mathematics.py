"""Compare a completion's answer with the data set's gold, mathematically. The gold decides which convention applies.

`verdict` compares one pair, and `correct` is the reward function. docs/rewards.md lists the conventions.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from . import constants, reading
from .kinds import equations, intervals, lists, measures, scalars, words
from .notation import balanced, bracketed, complete, cut, normal, squeezed
from .quantities import in_base, number
from .times import date, time_of_day
from .units import split_unit

_DEEPEST = 6  # deepest nesting of collections that is compared
_APPROXIMATELY = re.compile(rf"^({scalars.NAME.pattern})\s*\\approx(?![a-zA-Z])")

# The kinds of gold: how to read a gold, and how to compare an answer with it. The first kind that reads a gold is used.
_KINDS: list[tuple[Callable[[str], Any], Callable[[Any, str, Any], bool]]] = [
    (words.sentences, words.same_sentences),
    (intervals.both_ways, intervals.same_either_way),
    (words.choice_with_value, words.same_choice),
    (date, measures.alike(date)),
    (measures.minutes_of_arc, measures.alike(measures.angle)),
    (time_of_day, measures.same_time_of_day),
    (words.words, words.same_words),
    (in_base, measures.alike(in_base)),
    (intervals.gold_region, intervals.same_region),
    (lists.set_, lists.same_set),
    (lists.bare_list, lists.same_list),
    (lists.matrix, lists.same_matrix),
    (lists.one_by_one, lists.same_named),
    (lists.tuple_, lists.same_tuple),
    (measures.ratio, measures.same_ratio),
    (intervals.ascending, intervals.same_chain),
    (scalars.equation, equations.same_equation),
    (str, scalars.same_scalar),
]


def correct(completions: Sequence[Any], solution: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the completion's answer equals the one in the column `solution`, else 0; None for an unreadable gold."""
    return [verdict(gold, completion) for gold, completion in zip(solution, completions, strict=True)]


def verdict(gold: Any, completion: Any) -> float | None:
    """1.0 if the completion gives the gold's answer, 0.0 if not, None if no answer can be read from the gold."""
    wanted = read_gold(gold)
    if wanted is None:
        return None
    text = reading.completion_text(completion)
    given = reading.final_answer(text)
    if given is None:
        return 0.0
    if equal(wanted, given) or _equal_number(wanted, given):
        return 1.0
    together = reading.boxes_together(text)
    is_list = len(together) > 1 and (len(cut(wanted, scalars.JOIN)) == len(together) or bracketed(wanted))
    return float(bool(is_list) and equal(wanted, ", ".join(together)))


def _equal_number(gold: str, answer: str) -> bool:
    """Whether the gold is a number and equals the only number in the answer's clause."""
    alone = reading.only_number(answer)
    return alone is not None and number(split_unit(gold)[0]) is not None and equal(gold, alone)


def read_gold(gold: Any) -> str | None:
    """The gold's answer in normal spelling; None if it has no readable answer."""
    text = reading.gold_text(gold)
    return None if text is None else _normal_gold(text)


@lru_cache(maxsize=4096)
def _normal_gold(text: str) -> str | None:
    spelled = normal(text)
    readable = complete(text) and balanced(spelled) and re.search(r"\w|\\infty|\\emptyset", spelled)
    return spelled if readable else None


def equal(gold: str, answer: str) -> bool:
    """Whether an answer equals a gold in normal spelling; False if comparing them raises an error."""
    try:
        answer = normal(answer[: 4 * len(gold) + 2000])
        value = words.without_label(answer)
        return _same(gold, answer) or (value is not None and words.choice(gold) is None and _same(gold, value))
    except (RecursionError, MemoryError, ArithmeticError, ValueError, TypeError, AttributeError, IndexError):
        return False


def _same(gold: str, answer: str, depth: int = 0) -> bool:
    if not answer or depth > _DEEPEST:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    if "\\begin" in gold and squeezed(constants.small(gold)) == squeezed(constants.small(answer)):
        return True
    gold, answer = (_with_equals(text) for text in (gold, answer))
    kind, compare = next((kind, compare) for read, compare in _KINDS if (kind := read(gold)) is not None)
    return compare(kind, answer, partial(_same, depth=depth + 1))


def _with_equals(text: str) -> str:
    """Write x ≈ 3 as x = 3. The value of a constant, π ≈ 3.14, is compared as an approximation."""
    name = _APPROXIMATELY.match(text)
    return text if name is None or name[1].strip() in ("\\pi", "e", "\\phi") else _APPROXIMATELY.sub(r"\1=", text)


def warm_up() -> None:
    """Parse common expressions once, which takes a second. A worker calls this before its first row."""
    for gold in (
        "x+1",
        "\\frac{\\sqrt{3}}{2}",
        "-\\frac{a_1}{2} \\sin^2(3 x) e^{-2 x}",
        "\\ln|x| + \\pi \\cdot 2^{n+1}",
    ):
        verdict(gold, f"\\boxed{{1 + {gold}}}")
