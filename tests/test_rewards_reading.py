"""How the answer is found in a completion and in a cell of a data set."""

import pytest

from tbrm_trl.rewards import verdict
from tbrm_trl.rewards.reading import boxes_together, completion_text, final_answer, gold_text, last_number


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So $x = \\boxed{3}$ and $y = \\boxed{4}$, hence \\boxed{7}.", "7"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\fbox{5}", "5"),
        ("\\boxed 7.", "7"),
        ("Put it in \\boxed{}. It is \\boxed{8}.", "8"),
        ("\\boxed{4} and then \\boxed{12", None),  # the text ends inside the last box
        ("<think>\\boxed{1}</think>The answer is 2.", "2"),
        ("The answer is 7. Then \\boxed{3}.", "3"),
        ("Answer: 34", "34"),
        ("#### 1,234", "1,234"),
        ("The answer is (B).", "(B)"),
        ("**Final Answer**\n\n$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("The answer is\n\\[\nx = 5\n\\]\n", "x = 5"),
        ("The answer is $3$ and $4$.", "3, 4"),
        ("The answer is 3.5 because 7/2 = 3.5.", "3.5"),
        ("The answer is 4. Wait. The answer is 6.", "6"),
        ("<answer>18</answer>", "18"),
        ("Therefore $x = -3$.", "x = -3"),
        ("That makes 5 * 50 = 250 ml in all.", "250"),
        ("It costs $18.", "$18"),
        ("The answer is $3$ or $4$.", "3 or 4"),
        ("I give up on this one, sorry about that.", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_boxes_side_by_side():
    assert boxes_together("$\\boxed{1}$; so $\\boxed{3}$, $\\boxed{4}$ and $\\boxed{5}$.") == ["3", "4", "5"]
    assert boxes_together("First \\boxed{3}, after which we get \\boxed{4}.") == ["4"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4.0", "4.0"), ("8-4", "4"), ("8 - 4 = 4", "4"), ("= -4", "-4"), ("−17", "-17"), ("the sum is -3", "-3"),
        ("12.", "12"), ("1,234", "1234"), ("$1,234.50", "1234.50"), ("no number", None), ("0", "0"), ("-0.5", "-0.5"),
        ("(3)-2", "2"), ("5\n-2", "-2"),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


def test_completion_text():
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    assert completion_text("a<|im_end|>") == completion_text(said) == "a"
    assert completion_text([{"content": [{"type": "text", "text": "a"}]}]) == "a"
    assert completion_text([]) == completion_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("6 · 7 = <<6*7=42>>42\n#### 42", "42"),
        (27.0, "27"),
        (1e-05, "1e-05"),
        (["$2$"], "$2$"),
        (["1", "2"], "1, 2"),
        ('["34"]', "34"),
        ("['2', '3']", "2, 3"),
        ("['\\\\frac{1}{2}', '3']", "\\frac{1}{2}, 3"),
        ("['2' '3']", "['2' '3']"),  # numpy's, not Python's: 23 is not meant
        (0.1 + 0.2, "0.3"),
        ({"style": "rule", "ground_truth": "34"}, "34"),
        ("Hence $L = \\boxed{3.2e31}$ erg/s.", "3.2e31"),
        ("\\$18.90", "\\$18.90"),
    ],
)
def test_gold(cell, text):
    assert gold_text(cell) == text


@pytest.mark.parametrize(
    "cell", ["", " ", None, "None", [], [None], float("nan"), "$ $", "\\boxed{}", {}, {"style": "rule"}]
)
def test_no_gold(cell):
    assert gold_text(cell) is None


# ---- numbers that are only a part of the answer ----------------------------------------------------------------------

# gold: completions that give it, completions that do not
PARTS = {
    "1.5": ([], ["The answer is $1.5$ million.", "The population is $1.5$ million."]),
    "1500000": (["The answer is $1.5$ million.", "The population is $1.5$ million."], []),
    "3": (
        ["The answer is $3$ for all $n$.", "The answer is $3$ if $n$ is even."],
        [
            "The answer is $3$ or 4.",
            "The answer is $3$ + $4$ = $7$.",
            r"\boxed{3 \text{ fourths}}",
            "The answer is $3$ when $n$ is even and $4$ when $n$ is odd.",
            "#### $3$ or 4",
            "<answer>$3$ apples and 4 pears</answer>",
        ],
    ),
    "B": ([], ["Answer: $B$ or C"]),
    "3 hours": ([], ["The answer is $3$ hours and $20$ minutes."]),
    "3 hours and 20 minutes": (["The answer is $3$ hours and $20$ minutes."], []),
    "5": (
        [
            "The answer is $5$ and we are done.",
            "The answer is $5$ apples.",
            "The answer is $5$ when $x = 2$.",
            "The value of $x$ is $5$.",
            "The answer is $5$, which is prime.",
            "The answer is $5$ to the nearest integer.",
            "The answer is $5$ and it is unique.",
            "The answer is $5$ - five.",
            "The solution is $x=5$.",
            "Solutions: x = 5",
            r"\boxed{5 \text{ times}}",
            r"\boxed{5 \text{ more apples}}",
            "The answer is $5$ cm and this is final.",
            "The answer is $5$ or five.",
        ],
        [
            "The answer is $5$ squared.",
            "The answer is $5$ and a half.",
            r"\boxed{5 \text{ plus n}}",
            r"\boxed{5 plus n}",
            r"\boxed{5 \text{ times n}}",
            r"\boxed{5 \text{ point five}}",
            r"\boxed{5 \text{ less than half}}",
        ],
    ),
    "7": (["The answer is $3$ + $4$ = $7$."], []),
    "1": ([], ["Answer: $a = 1$ and b = 2"]),
    "4": (
        ["the square root of 16 is 4"],
        [
            "The answer is twice $4$.",
            "The answer is a multiple of $4$.",
            "The answer is negative $4$.",
            "So the answer is minus 4.",
            "The answer is negative 4.",
            "The answer is twice 4.",
            r"\boxed{4 \text{ lakh}}",
            r"\boxed{\$4\text{k}}",
        ],
    ),
    "-4": (
        [
            "The answer is negative $4$.",
            "So the answer is minus 4.",
            "The answer is negative 4.",
            "The temperature is negative 4 degrees.",
        ],
        [],
    ),
    "1, 2": (["The solutions are $x=1$ and $x=2$.", "The solutions are 1 and 2."], []),
    "2": ([], ["The solutions are $x=1$ and $x=2$.", "The solutions are 1 and 2."]),
    "4000": ([], [r"\boxed{\$4\text{k}}"]),
    "3, 4": (["The answer is $3$ and $4$."], []),
    "6": ([], ["The answer is 10 minus 4."]),
    "8": (["The answer is $2^3$ = $8$"], []),
    "5 apples": ([], ["The answer is $5$ apples and $3$ pears"]),
    "1/2": (["The answer is $1/2$ of the cake"], []),
    "9": (["The answer is 3 times 3 = 9"], []),
    "18": ([r"\boxed{\$18}"], [r"\boxed{\$18\text{ million}}"]),
}


@pytest.mark.parametrize("gold", PARTS)
def test_what_stands_around_a_number_belongs_to_the_answer(gold):
    given, not_given = PARTS[gold]
    assert [one for one in given if verdict(gold, one) != 1.0] == []
    assert [one for one in not_given if verdict(gold, one) != 0.0] == []
