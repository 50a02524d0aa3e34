#!/usr/bin/env bash
# reasoning-gym 0.1.25: three verifiers give full marks to answers that do not do the task.
#
# rush_hour carries out the moves of an answer and passes over those that are not possible. So a long text of random
# moves, made without looking at the board, solves many boards. polynomial_multiplication parses the answer as a sympy
# expression, in which `expand` is a function: the question's product inside it is right. decimal_arithmetic asks for up
# to twelve significant digits and allows an error of a thousandth. A policy that is trained with these scores as its
# reward is paid for all three.
#
# Seen, with seed 0 and Python's hash seed 0: one text of 3,000 random moves solves 31 of 60 boards of at most five moves.
# `expand(…)` is right for 60 of 60 questions; what they show is right as it stands for 5, in which nothing is left to
# do. 60 of 60 stored decimals may be off by 0.0009.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
PYTHONHASHSEED=0 "$folder/venv/bin/python" - <<'PYTHON'
import random
from decimal import Decimal

import reasoning_gym

N = 60


def problems(task, **settings):
    made = reasoning_gym.create_dataset(task, seed=0, size=N, **settings)
    return made, [made[number] for number in range(N)]


draw = random.Random(0)
moves = " ".join(f"{draw.choice('BCDEFG')}{draw.choice('+-')}{draw.randint(1, 4)} A+4" for _ in range(1500))
made, boards = problems("rush_hour", max_moves=5)
solved = sum(made.score_answer(moves, one) == 1 for one in boards)
print("rush_hour:", solved, "of", N, "boards are solved by one text of random moves")

made, products = problems("polynomial_multiplication")
bare = [one["question"].splitlines()[0].partition(": ")[2] for one in products]
expanded = sum(made.score_answer(f"expand({text})", one) == 1 for text, one in zip(bare, products))
unchanged = sum(made.score_answer(text, one) == 1 for text, one in zip(bare, products))
print("polynomial_multiplication:", expanded, "of", N, "are right as expand(…), and", unchanged, "as they stand")

made, decimals = problems("decimal_arithmetic")
off = sum(made.score_answer(str(Decimal(one["answer"]) + Decimal("0.0009")), one) == 1 for one in decimals)
print("decimal_arithmetic:", off, "of", N, "may be off by 0.0009")
assert solved >= 5 and expanded == N and unchanged < 10 and off == N
PYTHON
