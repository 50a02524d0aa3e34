#!/usr/bin/env bash
# reasoning-gym 0.1.25: without parentheses, basic_arithmetic asks one expression and answers another.
#
# The task's value is computed from left to right while the expression is written, so a product after a sum is not
# taken first. For a division, another divisor (or even a multiplication) is computed than the one that the question
# already shows. The task's own scoring compares with this value: a right completion gets 0. With parentheses, the
# default, every answer is that of its expression.
#
# Seen in 500 problems with seed 0, `//` for `/` as the task has it: of two terms, 102 answers (a fifth) are not the value
# of the expression, all of them divisions ("5 / 9" is answered by 10); of three terms without division, 84 ("8 - 3 * 6"
# by 30); of three terms with parentheses, none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
import reasoning_gym


def wrong(**options):
    """Problems whose answer is not the value of their expression, and of these how many have a division."""
    problems = reasoning_gym.create_dataset("basic_arithmetic", seed=0, size=500, min_digits=1, max_digits=1, **options)
    found = []
    for problem in problems:
        expression = problem["metadata"]["expression"]
        assert expression in problem["question"]
        try:
            value = eval(expression.replace("/", "//"))
        except ZeroDivisionError:
            value = None
        if str(value) != problem["answer"]:
            found.append((expression, problem["answer"]))
            assert problems.score_answer(str(value), problem) < 1
    print(options, "->", len(found), found[:3])
    return len(found), sum("/" in expression for expression, _ in found)


two, with_division = wrong(min_terms=2, max_terms=2, allow_parentheses=False)
three, _ = wrong(min_terms=3, max_terms=3, allow_parentheses=False, operators=["+", "-", "*"])
default, _ = wrong(min_terms=3, max_terms=3)
assert two == with_division > 50 and three > 50 and default == 0, (two, with_division, three, default)
PYTHON
