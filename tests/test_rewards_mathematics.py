"""Verdicts: the tables of pairs written from the data sets' formats, and the conventions of docs/rewards.md.

`verdicts.jsonl` and `verdicts_hidden.jsonl` were written before the code, and by other eyes; the code was written with
the first in sight. `verdicts_third.jsonl` was written before the misses of the second were mended, and measured after.
"""

import json
import random
import time
from pathlib import Path

import pytest

from tbrm_trl.rewards import InWorkers, correct, verdict
from tbrm_trl.rewards.quantities import number, same_number
from tbrm_trl.rewards.symbols import proportional, same_value
from tbrm_trl.rewards.units import split_unit

TABLES = sorted((Path(__file__).parent / "data").glob("verdicts*.jsonl"))
TABLE = [json.loads(line) for path in TABLES for line in path.open()]
KINDS = sorted({row["kind"] for row in TABLE})


@pytest.mark.parametrize("kind", KINDS)
def test_table(kind):
    """All that a person would call clear."""
    wrong = []
    for row in TABLE:
        if row["kind"] == kind and row["clear"]:
            right = None if row["verdict"] == "unreadable" else float(row["verdict"])
            if (given := verdict(row["gold"], row["completion"])) != right:
                wrong.append((row["gold"], row["completion"], given))
    assert not wrong


def boxed(answer: str) -> str:
    return f"So it is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("(3,-2)", ["(3,-2)", "3, -2", "\\langle 3,-2\\rangle"], ["\\{3,-2\\}", "(-2,3)", "[3,-2]"]),
        ("\\{3,-2\\}", ["\\{-2,3\\}", "-2, 3"], ["(3,-2)", "\\{3\\}"]),
        ("1, 3", ["3, 1", "\\{1,3\\}", "1 \\text{ and } 3", "x = 1 \\text{ or } x = 3"], ["1", "1, 3, 5", "(3, 1)"]),
        ("(2,5)", ["2<x<5", "5 > x > 2", "x \\in (2,5)"], ["2 \\le x<5", "[2,5]"]),
        ("x > 2", ["2 < x", "(2, \\infty)"], ["x \\ge 2", "y > 2", "2"]),
        ("50\\%", ["50", "0.5", "\\frac{1}{2}", "50 \\text{ percent}"], ["0.05", "50 \\text{ cm}"]),
        ("5 \\text{ cm}", ["5", "5 \\mathrm{~cm}", "0.05 \\text{ m}"], ["5 \\text{ kg}", "5 \\text{ m}"]),
        ("x = 5", ["5", "x=5", "5 = x"], ["y = 5", "x = 6"]),
        ("x^2 + y^2 = 4", ["2x^2 + 2y^2 = 8", "y^2 + x^2 - 4 = 0"], ["4", "x^2 + y^2", "x^2 + y^2 = 5"]),
        ("f(x) = 2x", ["2x", "f(t) = 2t"], ["f(x) = 3x", "2"]),
        ("M + m", ["m + M"], ["2m", "2M"]),
        ("x + 2\\frac{1}{2}", ["x + 2.5", "\\frac{2x + 5}{2}"], ["x + 1", "x + 2.4"]),
        ("\\sum_{k=1}^{3} k", ["6", "\\sum_{n=1}^{3} n"], ["7", "\\sum_{k=1}^{4} k"]),
        ("f(x) + \\int_0^x g(t) dt", ["\\int_0^x g(t) dt + f(x)"], ["f(x)", "f(x) - \\int_0^x g(t) dt"]),
        ("1.414214", ["\\sqrt{2}"], ["\\sqrt{3}", "\\sqrt{x}"]),
        ("\\gamma^2 - 1", ["(\\gamma - 1)(\\gamma + 1)"], ["\\gamma^2 - 4", "\\gamma"]),
        ("\\sqrt{18}", ["3\\sqrt2", "18^{1/2}"], ["4.243", "3\\sqrt{3}"]),
        ("41.80", ["41.8", "41.799"], ["41.9", "42"]),
        ("\\pm 2", ["2, -2", "\\pm2", "x = \\pm 2"], ["2", "-2"]),
        ("I(0) e^{-t/(RC)}", ["I(0) e^{-\\frac{t}{RC}}"], ["0", "I(0) e^{-t}", "I(0) e^{-t/(rc)}"]),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", ["\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"],
         ["\\begin{bmatrix}1&3\\\\2&4\\end{bmatrix}", "1, 2, 3, 4"]),
        ("e^{2x} - 3e^{x} + 2 = 0", ["2 - 3e^x + e^{2x} = 0"], ["e^{2x} - 3e^{x} = 0"]),
        ("0", ["0", "0.0"], ["4.6 \\times 10^{-24}", "x^2 - 1 = 0"]),
        ("40", ["m + n = 40", "m + n = 31 + 9 = 40", "4 x 10^1", "\\text{The sum is } 40"],
         ["m + n = 41", "x^2 + y^2 = 40"]),
        ("1,360,000", ["1.36 \\text{ million}", "1.36 million dollars"], ["1.36", "1.36 \\text{ billion}"]),
        ("I, III", ["\\text{I and III only}", "III, I"], ["\\text{I and II}", "I"]),
        ("\\{1, \\{2\\}\\}", ["\\{\\{2\\}, 1\\}"], ["\\{1, 2\\}"]),
        ("\\{4\\}", ["4"], ["\\{\\{4\\}\\}"]),
        ("9.8 \\text{ m/s}^2", ["9.8 m/s^2"], ["9.8 m/s"]),
        ("\\begin{pmatrix} -2 \\\\ 4 \\end{pmatrix}", ["-2\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}"],
         ["2\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}"]),
    ],
)  # fmt: skip
def test_conventions(gold, right, wrong):
    assert [verdict(gold, boxed(one)) for one in right] == [1.0] * len(right)
    assert [verdict(gold, boxed(one)) for one in wrong] == [0.0] * len(wrong)


def test_numbers_are_exact():
    assert number("0.1").value * 3 == number("0.3").value
    assert number("-2\\frac{1}{3}").value == number("-\\frac{7}{3}").value
    assert number("0.\\overline{27}").value == number("\\frac{3}{11}").value
    assert number("1 234 567").value == number("1,234,567").value == 1234567
    assert number("5 1/2") != number("51/2") and number("2, 500") is None and number("x") is None
    assert not same_number(number("10000000000000000"), number("10000000000000001"))
    assert split_unit("5 kg")[1].powers == (("mass", 1),) and split_unit("x + 2 t")[1] is None


def test_expressions_are_compared_by_value():
    assert same_value("\\sin^2 x + \\cos^2 x", "1") and not same_value("\\sin x", "\\cos x")
    assert same_value("\\sqrt{x y}", "\\sqrt{x}\\sqrt{y}") and not same_value("|x|", "x")
    assert not same_value("\\sqrt{2} + 10^{-20}", "\\sqrt{2}")
    assert proportional("x - 1", "2x - 2", positive=True) and not proportional("x - 1", "1 - x", positive=True)


GOLDS = [
    "12", "x^2 + 1", "(1,2)", "[0, 1)", "x > 3", "B", "\\{1, 2\\}", "3:4", "no solution", "y = 2x", "6:00 p.m.", "1, 2",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "5 \\text{ cm}", "2024-05-01", "\\pm 2", "1.5e10", "1011_2", "50\\%",
]  # fmt: skip
LARGE = [
    "9" * 1_000_000, "9^{9^{9^{9}}}", "1000000!", "3!" * 500, "1e999999", "\\binom{100000}{50000}", "9999999^{9999}",
    "(" * 50_000 + "1" + ")" * 50_000, "\\frac{1}{" * 20_000 + "1" + "}" * 20_000, "{" * 300_000, "}" * 300_000,
    "\\boxed{" * 50_000, "\\left(" * 50_000, "\\begin{pmatrix}" * 5000, "\\sqrt" * 50_000, "$" * 300_000,
    "x" * 500_000, "1+" * 100_000 + "1", "1," * 200_000, "1:" * 100_000, "x=" * 100_000, "-" * 500_000,
    "and " * 200_000, "\\pm " * 3000, "\\text{a " * 30_000, "answer: " * 100_000, " " * 1_000_000, "\n" * 1_000_000,
    "\x00" * 1_000_000, "\ud800", "\x1b[0m", "\\sum_{k=1}^{10^9} k", "\\prod_{n=1}^{10^6} n", "\\int_0^1 x^{x^x} dx",
    "((((x+1)^{99})^{99})^{99})^{99}", "0/0", "\\frac{1}{0}", "\\infty-\\infty", "\\log_{1} 5", "e^{e^{e^{e^{9}}}}",
]  # fmt: skip


def test_no_completion_raises_or_hangs():
    """In a worker, so that a limit can be held: every verdict takes at most that, and a second for the kill."""
    workers = InWorkers(correct, time_limit=5.0, workers=1)
    cases = [(GOLDS[at % len(GOLDS)], write % one) for at, one in enumerate(LARGE) for write in ("%s", "\\boxed{%s}")]
    for gold, completion in cases:
        assert workers(["\\boxed{1}"], solution=["1"]) == [1.0]  # it is warm
        started = time.monotonic()
        (given,) = workers([completion], solution=[gold])
        assert time.monotonic() - started < workers.time_limit + 1, (gold, completion[:50])
        assert given == 0.0 or workers.counts["late"], (gold, completion[:50])
    assert workers.counts["late"] <= 1 and not workers.counts["raised"] and not workers.counts["crashed"]
    workers.close()


def mutated(text: str, rng: random.Random) -> str:
    """The text with a few places cut, doubled, swapped or filled with what means something."""
    pieces = (
        r"\frac{ \sqrt{ { } ( ) [ ] ^ _ 1 0 , = < \le $ \{ \} | \\ \text{ & % e5 . - : \pm \cup \boxed{ ! √ ² −".split()
    )
    pieces += ["####", "\\begin{pmatrix}", "\\end{pmatrix}", "\x00", "\n", "</think>", "answer: ", "\ud800", "\u202e"]
    letters = list(text)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randint(0, len(letters)), rng.randint(0, 8)
        letters[at : at + length] = rng.choice(([rng.choice(pieces)], letters[at : at + length] * 2, letters[-length:]))
    return "".join(letters)


def test_no_mutation_raises():
    rng = random.Random(0)
    golds, completions = [], []
    for row in rng.sample(TABLE, 250):
        golds += [row["gold"] if rng.random() < 0.7 else rng.choice(GOLDS), mutated(str(row["gold"]), rng)]
        completions += [mutated(row["completion"], rng), row["completion"]]
    workers = InWorkers(correct)
    assert set(workers(completions, solution=golds)) <= {0.0, 1.0, None}
    assert workers.counts["late"] <= 1 and not workers.counts["raised"] and not workers.counts["crashed"]
    workers.close()


def test_reward_function():
    messages = [[{"role": "assistant", "content": boxed("1/2")}], [{"role": "assistant", "content": "no"}]]
    assert correct(messages, solution=["0.5", "0.5"], prompts=["", ""]) == [1.0, 0.0]
    assert correct([boxed("4")] * 2, ["", "4"]) == [None, 1.0]
