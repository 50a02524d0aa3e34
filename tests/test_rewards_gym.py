"""reasoning-gym: no problem twice, and verdicts for tasks with a score that is no verdict."""

import ast
import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")

from tbrm_trl.rewards import load  # noqa: E402
from tbrm_trl.rewards.gym import decode, distinct_problems, encode, judge, solved, train_and_test  # noqa: E402
from tbrm_trl.rewards.gym_faults import is_allowed, is_answered  # noqa: E402

SUMS = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def test_no_problem_twice():
    train, test = train_and_test("chain_sum", 100, 50, **SUMS)
    questions = [row["question"] for row in train + test]
    assert len(questions) == len(set(questions)) == 150
    again, other = (train_and_test("chain_sum", 100, 50, seed=seed, **SUMS)[1] for seed in (0, 1))
    assert again == test and other != test
    with pytest.raises(ValueError, match=r"only .* distinct problems"):
        distinct_problems("chain_sum", 1000, **SUMS)


@pytest.mark.parametrize("terms", [2, 3])
def test_arithmetic_answers_what_it_asks(terms):
    """reasoning-gym answers "5 / 9" by 10, and "8 - 3 * 6" by 30."""
    settings = dict(min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, allow_parentheses=False)
    for entry in distinct_problems("basic_arithmetic", 100, **settings):
        expression = re.sub(r"\d+", r"Fraction(\g<0>)", entry["question"].removeprefix("Calculate ").removesuffix("."))
        assert eval(expression, {"Fraction": Fraction}) == int(entry["answer"]), entry["question"]


def test_milliseconds_are_those_of_the_question():
    """reasoning-gym takes 09:43:58.821 from 22:11:11.690 and has 12:27:12.868 left."""
    for entry in distinct_problems("time_intervals", 50, task_types=["time_ms"]):
        start, end = (
            int(h) * 3_600_000 + int(m) * 60_000 + int(s) * 1000 + int(ms)
            for h, m, s, ms in re.findall(r"(\d\d):(\d\d):(\d\d)\.(\d{3})", entry["question"])
        )
        left = end - start
        said = f"{left // 3_600_000:02d}:{left // 60_000 % 60:02d}:{left // 1000 % 60:02d}.{left % 1000:03d}"
        assert entry["answer"] == said and judge("time_intervals", entry, f"\\boxed{{{said}}}")[0] == 1.0


def days(start: str, end: str) -> dict[str, str]:
    return {"task": "count_business_days", "start_date": start, "end_date": end}


@pytest.mark.parametrize(
    ("task", "stored", "question", "metadata", "right"),
    [
        ("family_relationships", "father-in-law", "", {}, 0),  # Mia, the wife of Edward's son, is his daughter-in-law
        ("family_relationships", "father", "", {}, 1),
        # Matilda is one of Alice's 3 women: she knows Alice, the other 2, and of Bob's 4 women all but herself.
        ("aiw", "6", "Alice has 2 male and 3 female colleagues, Bob 1 and 4.", {"task_type": "colleagues"}, 1),
        ("aiw", "4", "Alice has 2 male and 3 female colleagues, Bob 1 and 4.", {"task_type": "colleagues"}, 0),
        ("aiw", "3", "Alice has 2 sisters. How many has Alice's brother?", {"task_type": "siblings"}, 1),
        ("aiw", "3", "Alice has 2 sisters. How many has Bob's brother?", {"task_type": "siblings"}, 0),
        ("calendar_arithmetic", "72", "", days("2022-12-18", "2023-03-28"), 0),
        ("calendar_arithmetic", "2", "", days("2022-12-29", "2022-12-30"), 1),
        ("intermediate_integration", "x - Integral(exp(x**2), x) + C", "", {}, 0),
        ("time_intervals", "29 days, 00:00:00", "", {"format": "%Y-%m-%d (%A) %H:%M:%S %z"}, 0),
        ("ab", "", "", {}, 0),  # no completion can give it
    ],
)  # fmt: skip
def test_problems_with_a_wrong_stored_answer(task, stored, question, metadata, right):
    assert is_answered(task, {"answer": stored, "question": question, "metadata": metadata}) == right


@pytest.mark.parametrize(
    ("premises", "conclusion", "right"),
    [
        (("All ants are dolphins", "All dolphins are cats"), "All ants are cats", 1),
        (("All ants are dolphins", "All dolphins are cats"), "Some ants are cats", 1),  # there are ants
        (("All ants are dolphins", "Some dolphins are cats"), "Some ants are cats", 0),
        (("All ants are dolphins", "Some dolphins are not cats"), "Some ants are not cats", 0),
        (("No ants are dolphins", "Some dolphins are cats"), "Some cats are not ants", 1),
    ],
)
def test_conclusions_that_follow(premises, conclusion, right):
    metadata = dict(premise1=premises[0], premise2=premises[1], conclusion=conclusion)
    assert is_answered("syllogism", {"answer": "Yes", "metadata": metadata}) == right


def test_problems_do_not_depend_on_what_was_drawn_before():
    """`list_functions` draws from the global generator, and `pool_matrix` seeds NumPy's."""
    random.seed(1)
    np.random.seed(1)
    first = distinct_problems("list_functions", 20)
    assert (random.random(), np.random.random()) == (random.Random(1).random(), np.random.RandomState(1).random())
    assert distinct_problems("list_functions", 20) == first


def test_equations_have_their_variable():
    """reasoning-gym's problem 13 of seed 0 asks which i satisfies 0 = 0, and is answered by 83."""
    assert "0 = 0" in reasoning_gym.create_dataset("simple_equations", size=14, seed=0)[13]["question"]
    assert not any("0 = 0" in entry["question"] for entry in distinct_problems("simple_equations", 50))


def test_reasoning_gym_seeds_overlap():
    """This is why seeds do not separate training from test problems."""
    first, second = (
        {e["question"] for e in reasoning_gym.create_dataset("chain_sum", size=100, seed=s)} for s in (1, 2)
    )
    assert len(first & second) == 99


def problem(task, **settings):
    return reasoning_gym.create_dataset(task, size=1, seed=3, **settings)[0]


@pytest.mark.parametrize(
    "task", ["arc_agi", "chain_sum", "mini_sudoku", "calendar_arithmetic", "n_queens", "caesar_cipher"]
)
def test_own_answer(task):
    """The stored answer is right in every form, also after a problem was stored as text. Another text is wrong."""
    name, entry = decode(encode(task, problem(task)))
    assert name == task and entry == problem(task)
    for said in ("\\boxed{%s}", "<answer>%s</answer>", "Let us see.\nThe answer is: %s", "%s"):
        assert judge(task, entry, said % entry["answer"]) == (1.0, 1.0), said
    assert judge(task, entry, "\\boxed{7193}")[0] == 0.0 and judge(task, entry, "")[0] == 0.0


@pytest.mark.parametrize(
    ("task", "completion"),
    [
        ("game_of_life_halting", "\\boxed{anything}"),
        ("spell_backward", "\\boxed{%sx}"),
        ("coin_flip", "\\boxed{0}"),
        ("puzzle24", "\\boxed{24 * 1 * 1 * 1}"),
        ("calendar_arithmetic", "\\boxed{7193}"),
        ("countdown", "\\boxed{1}"),
        ("chain_sum", "\\boxed{99999}"),
        ("word_sorting", "\\boxed{%s, further}"),
        ("letter_jumble", "\\boxed{%s further}"),
        ("gsm_symbolic", "\\boxed{-%s}"),
        ("polynomial_multiplication", "\\boxed{%s or 7}"),
        ("polynomial_multiplication", "\\boxed{expand(%s)}"),
        ("simple_integration", "\\boxed{%s or 7}"),
    ],
)
def test_wrong_answers(task, completion):
    entry = problem(task)
    verdict, score = judge(task, entry, completion.replace("%s", str(entry["answer"])))
    assert verdict == 0.0 and 0.0 <= score <= 1.0


def test_moves_that_are_not_possible():
    """reasoning-gym passes over them: whatever else is in a text, the car that can leave does."""
    entry = {
        "answer": "",
        "metadata": {"board_config": "oooooo" * 2 + "oAAooo" + "oooooo" * 2 + "BBoooo"},
        "question": "",
    }
    entry["metadata"] |= {"source_dataset": "rush_hour", "source_index": 0, "min_moves": 1}
    assert judge("rush_hour", entry, "\\boxed{A+3}")[0] == 1.0
    assert judge("rush_hour", entry, "\\boxed{B+4 B-1 A+3}")[0] == 1.0
    assert judge("rush_hour", entry, "\\boxed{A+5}")[0] == judge("rush_hour", entry, "\\boxed{B-1 A+3}")[0] == 0.0


def test_digits_and_shapes():
    """reasoning-gym allows an error of a thousandth and of a hundredth, and takes a row for a column."""
    decimal = {"answer": "8.27243551523", "metadata": {}, "question": ""}
    assert is_allowed("decimal_arithmetic", "8.27243551523", decimal)
    assert is_allowed("decimal_arithmetic", "8.272435515234", decimal)
    assert not is_allowed("decimal_arithmetic", "8.2724", decimal)
    pooled = {"answer": "2.5 2.17\n3.0 4.0", "metadata": {}, "question": ""}
    assert is_allowed("pool_matrix", "2.5 2.17\n3 4", pooled) and is_allowed(
        "pool_matrix", "2.50 2.1667\n3.0 4.0", pooled
    )
    assert not is_allowed("pool_matrix", "2.52 2.17\n3.0 4.0", pooled)
    assert not is_allowed("pool_matrix", "2.5\n2.17\n3.0\n4.0", pooled)


def test_sorted_numbers_are_those_of_the_question():
    """`number_sorting` itself allows each to be off by 1."""
    entry = problem("number_sorting", min_decimals=1, max_decimals=2)
    numbers = ast.literal_eval(entry["answer"])
    whole = [str(float(int(float(one)))) for one in numbers]
    assert whole != numbers and reasoning_gym.get_score_answer_fn("number_sorting")(str(whole), entry) == 1
    assert judge("number_sorting", entry, f"\\boxed{{{whole}}}")[0] == 0.0
    assert judge("number_sorting", entry, f"\\boxed{{{numbers}}}")[0] == 1.0


def test_a_grid_has_no_further_rows():
    entry = problem("game_of_life")
    grid = json.loads(entry["answer"])
    assert judge("game_of_life", entry, f"\\boxed{{{json.dumps(grid)}}}")[0] == 1.0
    assert judge("game_of_life", entry, f"\\boxed{{{json.dumps([*grid, grid[0]])}}}")[0] == 0.0


def test_an_integral_is_to_be_computed():
    entry = problem("simple_integration")
    given = "Integral({integrand}, {variable})".format(**entry["metadata"])
    assert judge("simple_integration", entry, f"\\boxed{{{given}}}")[0] == 0.0
    assert judge("simple_integration", entry, f"\\boxed{{{entry['answer']}}}")[0] == 1.0


MARKED = [
    "<answer>\\boxed{%s}</answer>",
    "<answer>```\n%s\n```</answer>",
    "The answer is:\n```text\n%s\n```",
    "```\n%s\n```",
    "<answer>**%s**</answer>",
    "<answer>$%s$</answer>",
    "The final answer is **%s**.",
    "\\boxed{\\texttt{%s}}.",
    "<answer>%s.</answer>",
    'The answer is "%s".',
]


@pytest.mark.parametrize("said", MARKED)
@pytest.mark.parametrize("task", ["rotate_matrix", "syllogism", "word_sorting", "game_of_life", "chain_sum", "dice"])
def test_marks_around_an_answer(task, said):
    for entry in reasoning_gym.create_dataset(task, size=2, seed=1):
        assert judge(task, entry, said.replace("%s", entry["answer"]))[0] == 1.0
        assert judge(task, entry, said.replace("%s", "7193 x"))[0] == 0.0


@pytest.mark.parametrize(
    ("task", "stored", "said"),
    [
        ("prime_factorization", "2 × 2 × 7", r"2 \times 2 \times 7"),
        ("prime_factorization", "2 × 2 × 7", r"2 \cdot 2 \cdot 7"),
        ("dice", "781/960", r"\dfrac{781}{960}"),
        ("power_function", "8.064e-06", r"8.06 \times 10^{-6}"),
    ],
)
def test_latex_for_a_plain_answer(task, stored, said):
    numbers = [int(one) for one in re.findall(r"\d+", stored)]
    metadata = {"factors": numbers, "number": math.prod(numbers), "solution": stored}
    metadata["puzzle"] = dict(zip(("num", "den"), numbers, strict=False))
    entry = {"answer": stored, "metadata": {"source_dataset": task, **metadata}}
    assert judge(task, entry, f"\\boxed{{{said}}}")[0] == 1.0
    assert judge(task, entry, f"\\boxed{{{said.replace('8', '9').replace('7', '5')}}}")[0] == 0.0


@pytest.mark.parametrize("answer", ["nan", "nan+nanj", "\\boxed{nan}", "inf"])
def test_answers_that_are_no_number(answer):
    """The verifier of complex_arithmetic computes min(1, exp(−|difference|)), which is 1 for NaN."""
    for entry in reasoning_gym.create_dataset("complex_arithmetic", size=3, seed=3):
        assert judge("complex_arithmetic", entry, f"<answer>{answer}</answer>")[0] == 0.0
        assert judge("complex_arithmetic", entry, f"<answer>{entry['answer']}</answer>")[0] == 1.0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("1/32768", 1),
        ("0.00003052", 1),
        ("0", 0),
        ("0.0001", 0),
        ("0.00004", 0),
        ("4e-5", 0),
        ("1e99999999", 0),
        ("1e9_999_999", 0),
    ],
)
def test_small_probabilities(said, right):
    """15 heads in 15 flips: 0 is off by less than 1e-4, and is no answer."""
    entry = {**problem("coin_flip"), "answer": "3.051757812e-05"}
    assert judge("coin_flip", entry, f"\\boxed{{{said}}}")[0] == right


def test_solution_of_another_puzzle():
    """`puzzle24` itself gives it full marks."""
    first, second = reasoning_gym.create_dataset("puzzle24", size=2, seed=3)
    assert reasoning_gym.get_score_answer_fn("puzzle24")(second["answer"], first) == 1.0
    assert judge("puzzle24", first, f"\\boxed{{{second['answer']}}}")[0] == 0.0
    assert judge("puzzle24", first, f"\\boxed{{{first['answer']}}}")[0] == 1.0


@pytest.mark.parametrize(
    ("stored", "completion", "right"),
    [
        ("4", "4.0", 1), ("4", "The sum is 4", 1), ("0", "12.0", 0), ("-4", "8-4", 0), ("-4", "−4", 1), ("-4", "-4", 1),
        ("4", "8 - 4 = 4", 1), ("1234", "1,234", 1), ("12", "12.5", 0), ("4", "4", 1), ("4", "14", 0), ("4", "", 0),
    ],
)  # fmt: skip
def test_whole_numbers(stored, completion, right):
    """The demo's completions, and the ways in which its first extraction went wrong."""
    entry = {**problem("chain_sum"), "answer": stored}
    assert judge("chain_sum", entry, completion)[0] == right


def test_reward_function():
    (row, *_), _ = train_and_test("chain_sum", 2, 1, **SUMS)
    extra = {}
    rewards = solved([row["answer"], f"{row['answer']}9"], [row["gym"]] * 2, log_extra=extra.__setitem__)
    assert rewards == [1.0, 0.0] and extra["score"][0] == 1.0 and 0 <= extra["score"][1] < 1
    (in_workers,), _ = load("reasoning_gym", workers=1)
    assert in_workers([row["answer"], "?"], gym=[row["gym"]] * 2, log_extra=extra.__setitem__) == [1.0, 0.0]
    assert extra["score"] == [1.0, 0.0]
    in_workers.close()
