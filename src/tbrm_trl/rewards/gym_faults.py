"""What reasoning-gym 0.1.25 gets wrong: problems with a wrong stored answer, and wrong answers that a verifier accepts.

Each check knows one task. `docs/rewards.md` has the shares, and the faults that have no check.
"""

import ast
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

Entry = Mapping[str, Any]


def is_answered(task: str, entry: Entry) -> bool:
    """Whether the stored answer is right and can be given, as far as it is known."""
    return entry["answer"] != "" and _ANSWERED.get(task, _always)(entry)


def is_allowed(task: str, answer: str, entry: Entry) -> bool:
    """Whether an answer that has a verifier's full marks also passes what this verifier leaves unchecked."""
    return _ALLOWED.get(task, _always)(answer, entry)


def _always(*given: Any) -> bool:
    return True


# ---- wrong stored answers --------------------------------------------------------------------------------------------


def _is_value_of_its_expression(entry: Entry) -> bool:
    """`basic_arithmetic` shows "5 / 9" and computes 5 * 2; it rounds quotients down, and without parentheses it adds
    before it multiplies.
    """
    from sympy.parsing.sympy_parser import parse_expr

    return parse_expr(entry["metadata"]["expression"]) == int(entry["answer"])


def _is_the_time_between(entry: Entry) -> bool:
    """`time_intervals` cuts a float of seconds off, so that nearly half of its answers are one millisecond too few.

    Where a weekday stands in brackets, it forgets the time of day behind it.
    """
    if "(%A) " in entry["metadata"]["format"]:
        return False
    if entry["metadata"]["expected_format"] != "HH:MM:SS.mmm":
        return True
    start, end = (datetime.fromisoformat(entry["metadata"][name]) for name in ("start_time", "end_time"))
    return entry["answer"].endswith(f".{(end - start) // timedelta(milliseconds=1) % 1000:03d}")


def _is_computed(entry: Entry) -> bool:
    """`intermediate_integration` stores some integrals that it could not compute."""
    return "Integral" not in entry["answer"]


def _has_its_variable(entry: Entry) -> bool:
    """`simple_equations` asks for the solution of "0 = 0", and accepts one number alone."""
    return entry["metadata"]["variable"] in entry["metadata"]["equation"]


def _is_in_its_year(entry: Entry) -> bool:
    """`calendar_arithmetic` counts working days into the next year, and writes the old year beside both dates."""
    dates = entry["metadata"]
    return dates["task"] != "count_business_days" or dates["start_date"][:4] == dates["end_date"][:4]


def _is_role_of_the_first(entry: Entry) -> bool:
    """`family_relationships` asks what A is to B. By marriage it names what B is to A, and of nieces B's gender."""
    return entry["answer"] not in ("mother-in-law", "father-in-law", "niece", "nephew")


def _counts_everyone(entry: Entry) -> bool:
    """`aiw` asks for the sisters of a man without family, and forgets one of two circles of colleagues.

    Matilda has all of the first circle but herself, and the woman in its middle; and all others of the second.
    """
    question = entry["question"]
    if entry["metadata"]["task_type"] == "siblings":
        return f"{question.split()[0]}'s brother" in question
    if entry["metadata"]["task_type"] == "colleagues":
        _, first, _, second = map(int, re.findall(r"\d+", question))
        return int(entry["answer"]) == first + second - 1
    return True


def _follows(entry: Entry) -> bool:
    """`syllogism` does not ask whether the middle term is distributed, and so takes some wrong conclusions for valid.

    A "Yes" is right if no world in which each term has a member satisfies the premises and not the conclusion.
    """
    if entry["answer"] != "Yes":
        return True
    text = [entry["metadata"][name] for name in ("premise1", "premise2", "conclusion")]
    *premises, conclusion = (re.findall(r"(\w+) (\w+) are (not )?(\w+)", one)[0] for one in text)
    terms = sorted({term for _, one, _, other in (*premises, conclusion) for term in (one, other)})
    kinds = [dict(zip(terms, has, strict=True)) for has in itertools.product((False, True), repeat=len(terms))]

    def holds(statement: tuple[str, ...], world: tuple[dict[str, bool], ...]) -> bool:
        quantifier, subject, negated, predicate = statement
        found = [member[predicate] for member in world if member[subject]]
        if quantifier == "Some":
            return not all(found) if negated else any(found)
        return all(found) if quantifier == "All" else not any(found)

    worlds = (world for size in range(1, len(kinds) + 1) for world in itertools.combinations(kinds, size))
    return not any(
        all(any(member[term] for member in world) for term in terms)
        and all(holds(premise, world) for premise in premises)
        and not holds(conclusion, world)
        for world in worlds
    )


_ANSWERED: dict[str, Callable[[Entry], bool]] = {
    "aiw": _counts_everyone,
    "basic_arithmetic": _is_value_of_its_expression,
    "calendar_arithmetic": _is_in_its_year,
    "family_relationships": _is_role_of_the_first,
    "intermediate_integration": _is_computed,
    "simple_equations": _has_its_variable,
    "syllogism": _follows,
    "time_intervals": _is_the_time_between,
}


# ---- what verifiers leave unchecked ----------------------------------------------------------------------------------


def _is_stored(answer: str, entry: Entry) -> bool:
    """`game_of_life_halting` gives 1 to any text, `spell_backward` to an answer with one letter too many."""
    return answer.strip().casefold() == str(entry["answer"]).strip().casefold()


def _is_close(answer: str, entry: Entry) -> bool:
    """`coin_flip` gives 1 to any prefix of the probability's digits, such as "0". Here it may be off by a thousandth.

    Probabilities are as small as 3e-5, so the error is relative.
    """
    stored = Fraction(entry["answer"])
    try:
        return abs(Fraction(answer.replace(",", "")) - stored) <= stored / 1000
    except (ValueError, ZeroDivisionError):
        return False


def _uses_its_numbers(answer: str, entry: Entry) -> bool:
    """`puzzle24` gives 1 to solutions of other puzzles and to 24.5, `countdown` to numbers that were not given."""
    from sympy.parsing.sympy_parser import parse_expr

    if not re.fullmatch(r"[\d\s+\-*/()]+", answer) or "**" in answer or "//" in answer:
        return False
    used = Counter(int(digits) for digits in re.findall(r"\d+", answer))
    given = Counter(int(one) for one in entry["metadata"]["numbers"])
    return used == given and parse_expr(answer) == entry["metadata"].get("target", 24)


def _has_as_many_words(answer: str, entry: Entry) -> bool:
    """`word_sorting` and `letter_jumble` compare as many words as are stored, and accept others behind them."""
    return len(answer.split()) == len(str(entry["answer"]).split())


def _has_its_numbers(answer: str, entry: Entry) -> bool:
    """`number_sorting` allows each number to be off by 1."""
    given, stored = ([Decimal(str(one)) for one in ast.literal_eval(text)] for text in (answer, entry["answer"]))
    return given == stored


def _is_its_grid(answer: str, entry: Entry) -> bool:
    """`game_of_life` accepts further rows and columns."""
    return json.loads(answer) == json.loads(entry["answer"])


def _is_integrated(answer: str, entry: Entry) -> bool:
    """`simple_integration` and `intermediate_integration` accept the integral itself, not computed, and `F or 7`."""
    return not re.search(r"Integral|Derivative|integrate|\b(?:or|and|not|if|else|lambda)\b", answer)


def _is_polynomial(answer: str, entry: Entry) -> bool:
    """`polynomial_multiplication` accepts `expand(question)`, which has sympy do the task, and `answer or 7`."""
    return re.search(r"[a-zA-Z]{2}", answer) is None


def _moves_in_full(answer: str, entry: Entry) -> bool:
    """`rush_hour` passes over moves that are not possible, so that one long text of moves solves many boards."""
    from reasoning_gym.games.rush_hour import Board

    board = Board(entry["metadata"]["board_config"])
    for name, sign, steps in re.findall(r"([A-Z])([+-])(\d+)", answer):
        if ord(name) - ord("A") >= len(board._pieces):
            return False
        piece, by = board._pieces[ord(name) - ord("A")], int(sign + steps)
        wanted = piece.position + piece.stride * by
        board.move(name, by)
        if piece.position != wanted:
            return False
    return True


def _has_its_digits(answer: str, entry: Entry) -> bool:
    """`decimal_arithmetic` asks for twelve digits, and allows an error of a thousandth."""
    stored = Decimal(entry["answer"])
    exponent = stored.as_tuple().exponent
    return isinstance(exponent, int) and abs(Decimal(answer) - stored) <= Decimal(10) ** exponent


def _is_its_matrix(answer: str, entry: Entry) -> bool:
    """`pool_matrix` allows an error of a hundredth of each cell, and takes a row for a column."""
    given, stored = ([row.split() for row in text.strip().splitlines()] for text in (answer, entry["answer"]))
    rows = zip(given, stored, strict=True) if [*map(len, given)] == [*map(len, stored)] else None
    return rows is not None and all(abs(float(a) - float(b)) < 0.01 for row in rows for a, b in zip(*row, strict=True))


def _has_its_sign(answer: str, entry: Entry) -> bool:
    """`gsm_symbolic` does not see a minus."""
    return answer.strip().startswith("-") == str(entry["answer"]).startswith("-")


_ALLOWED: dict[str, Callable[[str, Entry], bool]] = {
    "coin_flip": _is_close,
    "countdown": _uses_its_numbers,
    "decimal_arithmetic": _has_its_digits,
    "game_of_life": _is_its_grid,
    "game_of_life_halting": _is_stored,
    "gsm_symbolic": _has_its_sign,
    "intermediate_integration": _is_integrated,
    "letter_jumble": _has_as_many_words,
    "number_sorting": _has_its_numbers,
    "polynomial_multiplication": _is_polynomial,
    "pool_matrix": _is_its_matrix,
    "puzzle24": _uses_its_numbers,
    "rush_hour": _moves_in_full,
    "simple_integration": _is_integrated,
    "spell_backward": _is_stored,
    "word_sorting": _has_as_many_words,
}
