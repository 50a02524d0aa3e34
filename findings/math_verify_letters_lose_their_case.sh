#!/usr/bin/env bash
# math-verify 0.9.0: capital and small letters are one variable, and gamma is Euler's constant.
#
# The parser lowers the case of letters, so an answer that mixes up two quantities of a formula is right, and a difference
# of two of them is 0. `\gamma` is read as Euler's constant alone, and as complex infinity inside a formula, where it
# makes formulas equal that are not. Data sets of physics have such golds.
#
# Seen: A equals a; N - n equals 0; c (gamma - 4) equals c (gamma - 1).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify


def equal(gold: str, answer: str) -> bool:
    return verify(parse(gold), parse(answer))


seen = [equal("$A$", "$a$"), equal("$N-n$", "$0$"), equal(r"$c(\gamma-4)$", r"$c(\gamma-1)$")]
print(f"math-verify {version('math-verify')}: A = a {seen[0]}, N - n = 0 {seen[1]}, c(γ - 4) = c(γ - 1) {seen[2]}")
assert seen == [True, True, True]
PYTHON
