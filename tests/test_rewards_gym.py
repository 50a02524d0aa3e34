"""reasoning-gym: no problem twice, and verdicts for tasks with a score that is no verdict."""

import re
from fractions import Fraction

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")

from tbrm_trl.rewards import load  # noqa: E402
from tbrm_trl.rewards.gym import decode, distinct_problems, encode, judge, solved, train_and_test  # noqa: E402

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
    ],
)
def test_wrong_answers(task, completion):
    entry = problem(task)
    verdict, score = judge(task, entry, completion.replace("%s", str(entry["answer"])))
    assert verdict == 0.0 and 0.0 <= score <= 1.0


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
