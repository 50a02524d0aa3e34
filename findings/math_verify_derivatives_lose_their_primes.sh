#!/usr/bin/env bash
# math-verify 0.9.0: a prime is dropped, so a derivative equals the function.
#
# `y''`, `y'` and `y` become one symbol, also inside equations: a differential equation is compared as if it had no
# derivatives in it. The other way of writing one, `\frac{dy}{dx}`, is kept as a derivative, and does not equal `y'`.
#
# Seen: y'' equals y; y'' + y = 0 equals 2y = 0; y' = 2x equals y = 2x; y' does not equal dy/dx.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

pairs = [("$y''$", "$y$"), ("$y'' + y = 0$", "$2y = 0$"), ("$y' = 2x$", "$y = 2x$"), ("$y'$", r"$\frac{dy}{dx}$")]
seen = [verify(parse(gold), parse(answer)) for gold, answer in pairs]
for (gold, answer), equal in zip(pairs, seen):
    print(f"math-verify {version('math-verify')}: {gold} and {answer}: {'equal' if equal else 'different'}")
assert seen == [True, True, True, False]
PYTHON
