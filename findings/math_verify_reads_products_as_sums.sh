#!/usr/bin/env bash
# math-verify 0.9.0: a number times a number in brackets is read as a mixed number, and a function takes what follows a
# dot into its argument.
#
# `2(3)` is 5, and `\frac{5(4)}{2}` is 9/2, as if a whole number stood before a fraction; with a letter, `2(x)` is 2x.
# `\ln 2 \cdot 3` is ln 6: the dot does not end the argument. So a product that is written out loses its reward, and a
# wrong one may earn it. `\ln(2) \cdot 3` is read as a product.
#
# Seen: 2(3) equals 5 and not 6; 5(4)/2 equals 9/2 and not 10; 2(x) equals 2x; ln 2 · 3 equals ln 6 and not 3 ln 2;
# ln(2) · 3 equals 3 ln 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

pairs = [
    ("$5$", "$2(3)$"), ("$6$", "$2(3)$"), ("$10$", r"$\frac{5(4)}{2}$"), (r"$\frac{9}{2}$", r"$\frac{5(4)}{2}$"),
    ("$2x$", "$2(x)$"),
    (r"$\ln 6$", r"$\ln 2 \cdot 3$"), (r"$3\ln 2$", r"$\ln 2 \cdot 3$"), (r"$3\ln 2$", r"$\ln(2) \cdot 3$"),
]
seen = [verify(parse(gold), parse(answer)) for gold, answer in pairs]
for (gold, answer), equal in zip(pairs, seen):
    print(f"math-verify {version('math-verify')}: {gold} and {answer}: {'equal' if equal else 'different'}")
assert seen == [True, False, False, True, True, True, False, True], seen
PYTHON
