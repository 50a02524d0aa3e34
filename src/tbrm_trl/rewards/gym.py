"""reasoning-gym: data sets without repeated or wrongly answered problems, and verdicts of 0 or 1 from graded scores.

A task's own verifier may give partial credit to an answer inside a sentence, 0.01 to any text, or 4.9e8. Here the
reward is 1 if the verifier gives full marks and the checks that it lacks pass too, else 0. The verifier's own score,
clipped to [0, 1], is logged as well.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from . import reading
from .notation import normal
from .quantities import number

COLUMN = "gym"
_TRIES = 50  # problems drawn per requested problem before a task counts as exhausted
_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?")
_HUGE_EXPONENT = re.compile(r"[-+]?[\d.,_]+e[-+]?[\d_]{4,}", re.IGNORECASE)
_NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf|infinity)j?(?![a-z])", re.IGNORECASE)


def train_and_test(task: str, train: int, test: int, seed: int = 0, **settings: Any) -> tuple[list[dict], list[dict]]:
    """Rows for training and for testing, with no question twice in either or in both.

    All rows come from one sequence of problems, which `seed` shuffles. reasoning-gym's own seeds would not do, since
    seeds s and s + 1 share 99 of 100 problems.

    Args:
        task: name of a reasoning-gym data set.
        train: number of rows for training.
        test: number of rows for testing.
        seed: seed of the shuffle.
        settings: the task's settings, such as `min_terms=2`.

    Returns:
        The training rows and the test rows, with the columns `question`, `answer` and `gym`. `solved` reads `gym`.

    Raises:
        ValueError: if the task has too few distinct problems.
    """
    entries = distinct_problems(task, train + test, **settings)
    random.Random(seed).shuffle(entries)
    rows = [{"question": e["question"], "answer": str(e["answer"]), COLUMN: encode(task, e)} for e in entries]
    return rows[test:], rows[:test]


def distinct_problems(task: str, count: int, **settings: Any) -> list[dict[str, Any]]:
    """`count` problems of a task with distinct questions. Without this, 62% of `chain_sum`'s small questions repeat.

    Problems whose stored answer is wrong are left out, as far as this is known of version 0.1.25: see `_ANSWERED`.

    Raises:
        ValueError: if the task has too few distinct problems.
    """
    import reasoning_gym

    by_question: dict[str, dict[str, Any]] = {}
    for entry in reasoning_gym.create_dataset(task, size=_TRIES * count, seed=0, **settings):
        if _ANSWERED.get(task, _always)(entry):
            by_question.setdefault(entry["question"], entry)
        if len(by_question) == count:
            return list(by_question.values())
    raise ValueError(
        f"{task} has only {len(by_question)} distinct problems at this difficulty, fewer than the {count} asked for. "
        "Ask for fewer, or raise the difficulty."
    )


def solved(
    completions: Sequence[Any],
    gym: Sequence[str],
    log_extra: Callable[[str, list], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the completion solves its row's reasoning-gym problem, else 0. Logs the task's score as `score`."""
    verdicts: list[float | None] = []
    scores: list[float] = []
    for problem, completion in zip(gym, completions, strict=True):
        task, entry = decode(problem)
        verdict, score = judge(task, entry, reading.completion_text(completion))
        verdicts.append(verdict)
        scores.append(score)
    if log_extra is not None:
        log_extra("score", scores)
    return verdicts


def judge(task: str, entry: Mapping[str, Any], completion: str) -> tuple[float, float]:
    """The verdict on a completion, 0 or 1, and the task's own score of its answer, clipped to [0, 1]."""
    verdict = best = 0.0
    stored = entry.get("answer")
    for answer in readings(completion, stored):
        if _NO_NUMBER.search(answer) and not _NO_NUMBER.search(str(stored)):
            continue  # a verifier that computes min(1, NaN) accepts it
        if _HUGE_EXPONENT.fullmatch(answer.strip()):
            continue  # a verifier that makes it a fraction writes out its digits
        try:
            score = float(_verifier(task)(answer, entry))
        except Exception:  # a verifier that raises has not accepted the answer
            continue
        right = math.isclose(score, 1.0, abs_tol=1e-9) and _ALSO.get(task, _always)(answer, entry)
        verdict, best = max(verdict, float(right)), max(best, min(1.0, score))
    return verdict, best


def readings(completion: str, stored: str | None) -> list[str]:
    """The completion's answer as the task writes answers; two candidates if it is unclear where the answer ends.

    Numbers are compared by value, so "4.0" and "−4" become the stored 4 and -4.
    """
    text = completion.rpartition("</think>")[2]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    found = reading.boxes(text)
    if tagged:
        answers = [tagged[-1].strip()]
    elif found is not None:
        answers = [re.sub(r"^\\text\{(.*)\}$", r"\1", found[-1][2])] if found else []
    elif stored is not None and _PLAIN_NUMBER.fullmatch(stored):
        answers = [text]  # its last number
    else:  # a grid, a list of moves or a sentence: everything after the announcement, or its first clause
        rest = next(reading.announcements(text), None)
        answers = [text.strip()] if rest is None else [rest, reading.announced(text) or ""]
    if stored is not None and _PLAIN_NUMBER.fullmatch(stored):
        answers = [_as_stored(answer, stored) for answer in answers]
    return list(dict.fromkeys(answer for answer in answers if answer))


def _as_stored(answer: str, stored: str) -> str:
    """A numeric answer in the task's spelling: the stored answer if the values are equal, else its own number.

    A number with too many digits for Python to print, or outside a float's range, stays as given.
    """
    given = number(normal(answer)) or number(reading.last_number(answer) or "")
    if given is None:
        return answer
    if given == number(stored) or given.value == Fraction(stored):
        return stored
    try:
        return _plain(given.value)
    except (ValueError, OverflowError):
        return answer


def _plain(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    if not float(value):
        raise OverflowError(f"a fraction of {value.denominator.bit_length()} bits is no 0, but its float is")
    return repr(float(value))


def _always(*given: Any) -> bool:
    return True


# --- problems of reasoning-gym 0.1.25 whose stored answer is wrong ---


def _is_value_of_its_expression(entry: Mapping[str, Any]) -> bool:
    """`basic_arithmetic` shows "5 / 9" and computes 5 * 2; it rounds quotients down, and without parentheses it adds
    before it multiplies.
    """
    from sympy.parsing.sympy_parser import parse_expr

    return parse_expr(entry["metadata"]["expression"]) == int(entry["answer"])


def _has_its_milliseconds(entry: Mapping[str, Any]) -> bool:
    """`time_intervals` cuts a float of seconds off, so that nearly half of its answers are one millisecond too few."""
    if entry["metadata"]["expected_format"] != "HH:MM:SS.mmm":
        return True
    start, end = (datetime.fromisoformat(entry["metadata"][name]) for name in ("start_time", "end_time"))
    return entry["answer"].endswith(f".{(end - start) // timedelta(milliseconds=1) % 1000:03d}")


def _has_its_variable(entry: Mapping[str, Any]) -> bool:
    """`simple_equations` asks for the solution of "0 = 0", and accepts one number alone."""
    return entry["metadata"]["variable"] in entry["metadata"]["equation"]


_ANSWERED: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "basic_arithmetic": _is_value_of_its_expression,
    "time_intervals": _has_its_milliseconds,
    "simple_equations": _has_its_variable,
}


# --- checks that some verifiers of reasoning-gym 0.1.25 lack ---


def _is_stored(answer: str, entry: Mapping[str, Any]) -> bool:
    """`game_of_life_halting` gives 1 to any text, `spell_backward` to an answer with one letter too many."""
    return answer.strip().casefold() == str(entry["answer"]).strip().casefold()


def _is_close(answer: str, entry: Mapping[str, Any]) -> bool:
    """`coin_flip` gives 1 to any prefix of the probability's digits, such as "0". Here it may be off by a thousandth.

    Probabilities are as small as 3e-5, so the error is relative.
    """
    stored = Fraction(entry["answer"])
    try:
        return abs(Fraction(answer.replace(",", "")) - stored) <= stored / 1000
    except (ValueError, ZeroDivisionError):
        return False


def _uses_its_numbers(answer: str, entry: Mapping[str, Any]) -> bool:
    """`puzzle24` gives 1 to solutions of other puzzles, and to 24.5."""
    from sympy.parsing.sympy_parser import parse_expr

    if not re.fullmatch(r"[\d\s+\-*/()]+", answer) or "**" in answer or "//" in answer:
        return False
    used = Counter(int(digits) for digits in re.findall(r"\d+", answer))
    return used == Counter(int(one) for one in entry["metadata"]["numbers"]) and parse_expr(answer) == 24


_ALSO: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "game_of_life_halting": _is_stored,
    "spell_backward": _is_stored,
    "coin_flip": _is_close,
    "puzzle24": _uses_its_numbers,
}


@cache
def _verifier(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


# --- problems as text ---


def encode(task: str, entry: Mapping[str, Any]) -> str:
    """A problem as text that `decode` reads back unchanged.

    Plain JSON turns tuples into lists, and `arc_agi` then refuses its own answer. Drawing the problem again does not
    work either, because six tasks depend on Python's hash seed.
    """
    return json.dumps({"task": task, "entry": _tagged(dict(entry))}, ensure_ascii=False)


@lru_cache(maxsize=1024)
def decode(text: str) -> tuple[str, dict[str, Any]]:
    """The task and the problem of a row."""
    problem = json.loads(text)
    return problem["task"], _untagged(problem["entry"])


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple | set | frozenset):
        return {f"<{type(value).__name__}>": [_tagged(one) for one in value]}
    if isinstance(value, list):
        return [_tagged(one) for one in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tagged(one) for key, one in value.items()}
        return {"<dict>": [[_tagged(key), _tagged(one)] for key, one in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # numpy
        return _tagged(value.tolist())
    return {"<str>": str(value)}  # an object of the task, kept only as text


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inside), kinds = next(iter(value.items())), {"<tuple>": tuple, "<set>": set, "<frozenset>": frozenset}
        if tag in kinds:
            return kinds[tag](_untagged(one) for one in inside)
        if tag == "<dict>":
            return {_untagged(key): _untagged(one) for key, one in inside}
        if tag == "<str>":
            return inside
    return {key: _untagged(one) for key, one in value.items()}


def warm_up() -> None:
    """Import reasoning-gym. A worker calls this before its first row."""
    import reasoning_gym  # noqa: F401
