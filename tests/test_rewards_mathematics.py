"""Verdicts: the table of pairs written by other eyes than the code's, and the conventions of docs/rewards.md."""

import json
import random
from pathlib import Path

import pytest

from tbrm_trl.rewards import correct, verdict
from tbrm_trl.rewards.quantities import number, same_number
from tbrm_trl.rewards.symbols import proportional, same_value
from tbrm_trl.rewards.units import split_unit

TABLE = [json.loads(line) for line in (Path(__file__).parent / "data/verdicts.jsonl").open()]
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
        ("\\gamma^2 - 1", ["(\\gamma - 1)(\\gamma + 1)"], ["\\gamma^2 - 4", "\\gamma"]),
        ("\\sqrt{18}", ["3\\sqrt2", "18^{1/2}"], ["4.243", "3\\sqrt{3}"]),
        ("41.80", ["41.8", "41.799"], ["41.9", "42"]),
        ("\\pm 2", ["2, -2", "\\pm2", "x = \\pm 2"], ["2", "-2"]),
        ("I(0) e^{-t/(RC)}", ["I(0) e^{-\\frac{t}{RC}}"], ["0", "I(0) e^{-t}", "I(0) e^{-t/(rc)}"]),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", ["\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"],
         ["\\begin{bmatrix}1&3\\\\2&4\\end{bmatrix}", "1, 2, 3, 4"]),
        ("e^{2x} - 3e^{x} + 2 = 0", ["2 - 3e^x + e^{2x} = 0"], ["e^{2x} - 3e^{x} = 0"]),
        ("0", ["0", "0.0"], ["4.6 \\times 10^{-24}"]),
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


def test_no_completion_raises():
    """Long integers, towers of powers, deep nesting, and random text of the characters that mean something."""
    nasty = ["9" * 100_000, "9^{9^{9^{9}}}", "1000000!", "(" * 5000 + "1" + ")" * 5000, "\\frac{" * 3000, "{" * 10_000]
    nasty += [
        "\\sum_{k=1}^{10^9} k",
        "x" * 20_000,
        "1+" * 5000 + "1",
        "\\boxed{" * 200,
        "0/0",
        "\\frac{1}{0}",
        "\\infty-\\infty",
    ]
    letters = random.Random(0)
    pieces = r"\frac \sqrt { } ( ) [ ] ^ _ 1 x , = < \le $ \{ \} | \\ \text{ & % e5 . - : \pm \cup \in".split()
    nasty += ["".join(letters.choices(pieces, k=12)) for _ in range(60)]
    golds = [
        "12",
        "x^2 + 1",
        "(1,2)",
        "[0, 1)",
        "x > 3",
        "B",
        "\\{1, 2\\}",
        "3:4",
        "no solution",
        "y = 2x",
        "6:00 p.m.",
    ]
    for at, one in enumerate(nasty):
        assert verdict(golds[at % len(golds)], one) in (0.0, 1.0)
        assert verdict(golds[at % len(golds)], f"\\boxed{{{one}}}") in (0.0, 1.0)
        assert verdict(one, "\\boxed{12}") in (0.0, 1.0, None)


def test_reward_function():
    messages = [[{"role": "assistant", "content": boxed("1/2")}], [{"role": "assistant", "content": "no"}]]
    assert correct(messages, solution=["0.5", "0.5"], prompts=["", ""]) == [1.0, 0.0]
    assert correct([boxed("4")] * 2, ["", "4"]) == [None, 1.0]
