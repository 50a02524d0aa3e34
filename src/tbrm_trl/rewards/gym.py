"""reasoning-gym: data sets without repeated or wrongly answered problems, and verdicts of 0 or 1 from graded scores.

A task's own verifier may give partial credit to an answer inside a sentence, 0.01 to any text, or 4.9e8. Here the
reward is 1 if the verifier gives full marks and the checks that it lacks pass too, else 0. The verifier's own score,
clipped to [0, 1], is logged as well.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import numpy as np

from . import reading
from .gym_faults import is_allowed, is_answered
from .notation import normal
from .quantities import number

COLUMN = "gym"
_TRIES = 50  # problems drawn per requested problem before a task counts as exhausted
_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?")
_HUGE_EXPONENT = re.compile(r"[-+]?[\d.,_]+e[-+]?[\d_]{4,}", re.IGNORECASE)
# Marks around an answer, and LaTeX for the signs with which the tasks write answers.
_WRAPPED = re.compile(
    r"```\w*\n(.*)\n\s*```|\*\*(.*)\*\*|\$\$?(.*?)\$\$?|\"(.*)\"|`(.*)`|\\(?:text\w*|math\w*)\{(.*)\}", re.DOTALL
)
_LAYERS = 3  # of marks around an answer
_SIGNS = {
    r" ?\\(?:times|cdot) ?10\^(?:\{(-?\d+)\}|(\d))": r"e\1\2",
    r"\\(?:times|cdot)(?![a-z])": "×",
    r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}": r"\1/\2",
    r"\^\{?\\circ\}?": "°",
    r"\\(?:left|right)(?![a-z])": "",
    r"\\(?:rightarrow|to|implies)(?![a-z])": "→",
    r"\\(?:leftrightarrow|iff)(?![a-z])": "↔",
    r"\\(?:lor|vee)(?![a-z])": "∨",
    r"\\(?:land|wedge)(?![a-z])": "∧",
    r"\\(?:neg|lnot)(?![a-z])": "¬",
}
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

    Problems whose stored answer is wrong are left out, as far as this is known of version 0.1.25: see `gym_faults.py`.

    Raises:
        ValueError: if the task has too few distinct problems.
    """
    import reasoning_gym

    by_question: dict[str, dict[str, Any]] = {}
    with _global_seeds(0):
        for entry in reasoning_gym.create_dataset(task, size=_TRIES * count, seed=0, **settings):
            if is_answered(task, entry):
                by_question.setdefault(entry["question"], entry)
            if len(by_question) == count:
                return list(by_question.values())
    raise ValueError(
        f"{task} has only {len(by_question)} distinct problems at this difficulty, fewer than the {count} asked for. "
        "Ask for fewer, or raise the difficulty."
    )


@contextmanager
def _global_seeds(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy, and put their states back: `list_functions` draws from the first,
    `pool_matrix` seeds the second.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
            right = math.isclose(score, 1.0, abs_tol=1e-9) and is_allowed(task, answer, entry)
        except Exception:  # a verifier that raises has not accepted the answer
            continue
        verdict, best = max(verdict, float(right)), max(best, min(1.0, score))
    return verdict, best


def readings(completion: str, stored: str | None) -> list[str]:
    """The completion's answer as the task writes answers; several if it is unclear what belongs to it.

    Numbers are compared by value, so "4.0" and "−4" become the stored 4 and -4. Other answers are also read without
    marks around them, such as those of bold text and of code, and with their LaTeX as plain signs.
    """
    text = completion.rpartition("</think>")[2]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    found = reading.boxes(text)
    if tagged:
        answers = [box[2] for box in (reading.boxes(tagged[-1]) or [])[-1:]] or [tagged[-1].strip()]
    elif found is not None:
        answers = [box[2] for box in found[-1:]]
    elif stored is not None and _PLAIN_NUMBER.fullmatch(stored):
        answers = [text]  # its last number
    else:  # a grid, a list of moves or a sentence: everything after the announcement, or its first clause
        rest = next(reading.announcements(text), None)
        answers = [text.strip()] if rest is None else [rest, reading.announced(text) or ""]
    if stored is not None and _PLAIN_NUMBER.fullmatch(stored):
        answers = [_as_stored(answer, stored) for answer in answers]
    else:
        answers = [variant for answer in answers for variant in _without_marks(answer, stored)]
    return list(dict.fromkeys(answer for answer in answers if answer))


def _without_marks(answer: str, stored: str | None) -> list[str]:
    """The answer itself, then without a full stop and the marks around it, then with LaTeX as plain signs."""
    bare = answer.strip().removesuffix(".")
    if bare.count("**") % 2:  # the announcement took the first
        bare = bare.removesuffix("**")
    for _ in range(_LAYERS):
        if wrapped := _WRAPPED.fullmatch(bare.strip().removesuffix(".")):
            bare = next(filter(None, wrapped.groups()), "")
    plain = bare
    if "\\" not in str(stored):
        for latex, sign in _SIGNS.items():
            plain = re.sub(latex, sign, plain)
    return [answer, bare, bare.strip().removesuffix("."), plain]


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
