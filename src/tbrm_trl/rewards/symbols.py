"""Expressions with letters, roots and functions: parsed by math-verify, compared at random points in high precision.

math-verify's own comparison rounds to six decimals and may simplify for up to five seconds. Here, two expressions are
equal if they agree to thirty digits at random points, and different if they differ at one of them. math-verify's
comparison decides only if expressions cannot be evaluated (matrices, sets).
"""

import contextlib
import logging
import math
import re
import zlib
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef

from .constants import with_constants_of
from .quantities import EXACT, Number, rounds_to

_LONGEST = 600
_POINTS = 4
# Expressions with too many digits to evaluate: towers of powers, and exponents and factorials of five or more digits.
_SIDE_BY_SIDE = re.compile(r"(?<![\w^_.{])\d[\d.]*\s+\d")  # math-verify would add 5 6
_SMALL_TOWER = re.compile(r"(?<![\d.^{])([1-4])\s*\^\s*\{?\s*([1-4])\s*\^\s*\{?\s*([1-4])\s*\}*(?![\d^!.}])")
_TOO_LARGE = re.compile(
    r"""\^\s*\{?\s*-?\s*(?:\d{5,} | [\d.]+[eE]\+?\d) | \d[eE][-+]?\d{5,}
    | \d\s*\^\s*\{?\s*\d+\s*\}?\s*\^
    | \d\s*\^\s*\{[^{}a-zA-Z]*\\(?:cdot|times)[^{}a-zA-Z]*\^
    | \d{3,}\s*!\s*\)\s*\^\s*\{?\s*\d{3,} | \^\s*\{?\d+\}?\s*!
    | \d{5,}\s*! | !\s*! | \^\s*\{\s*\d+\s*! | \\prod""",
    re.VERBOSE,
)
# Exponents and factorials of a product in brackets, and exponents that are binomials: how large they are at most.
_NUMBERS = r"((?:[^()a-zA-Z\\]|\\cdot|\\times)*)"
_BRACKETS = re.compile(rf"\^\s*\{{?\s*\({_NUMBERS}\)|\({_NUMBERS}\)\s*!|\^\s*\{{?\s*\\binom\{{(\d+)\}}\{{(\d+)\}}")
_FACTOR = re.compile(r"(\d+)(?:\s*(!)|\s*\^\s*\{?\s*(\d+))?")


def _is_too_large(text: str) -> bool:
    return _TOO_LARGE.search(_SMALL_TOWER.sub("1", text)) is not None or any(map(_is_large, _BRACKETS.finditer(text)))


def _is_large(match: re.Match) -> bool:
    """Whether an exponent or the argument of a factorial may have more than five digits."""
    if match[3]:
        most, chosen = int(match[3]), int(match[4])
        return most > 99 or math.comb(most, chosen) > 10**5
    digits = 0.0
    for number, factorial, power in _FACTOR.findall(match[1] or match[2] or ""):
        size = math.log10(int(number) or 1)
        digits += int(number[:9]) * size if factorial else size * int(power[:9] or 1)
    return digits > 5


@lru_cache(maxsize=4096)
def expression(text: str) -> Any | None:
    """The sympy object for a text in normal spelling; None if it cannot be read."""
    fits = len(text) <= _LONGEST and not _is_too_large(text) and not _SIDE_BY_SIDE.search(text)
    if not fits or not re.search(r"\w", text) or ":" in text:
        return None
    from math_verify import parse

    try:
        parsed = parse(
            f"\\boxed{{{_readable(text)}}}",
            [_extraction()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # the worker has its own limit, and an alarm works only in the main thread
        )
    except RecursionError:
        return None
    return _same_letters(parsed[0]) if parsed and not isinstance(parsed[0], str) else None


@cache
def _extraction() -> Any:
    """math-verify's settings: look only for a box, and do not change what `_readable` has prepared."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, boxed="last")
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)


def _readable(text: str) -> str:
    """Rewrite a text in normal spelling so that math-verify reads it correctly."""
    if not _DIFFERENTIALS.search(text):
        text = re.sub(r"(?<![a-zA-Z\\])(?<!\\text\{)d\s*(?=[a-qA-Zw(*]|\\(?!theta|phi))", "{d}", text)
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


# math-verify 0.9.0 reads capitals as small letters, so M + m would be 2m. Capitals, and e with an index, get names of
# their own. It reads \gamma as infinity, a value of the gamma function, so Greek letters get their own names too.
_CAPITALS = (
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega alpha beta gamma delta epsilon zeta eta theta iota "
    "kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega varepsilon vartheta varphi varrho ell"
).split()
_CAPITAL = re.compile(
    rf"(?:(?<![\\a-zA-Z{{])|(?<=[a-zA-Z])(?<!\\[a-zA-Z])|(?<=\{{))(?:([A-Z])|(e)(?=_)|\\({'|'.join(_CAPITALS)})(?![a-zA-Z]))"
    r"(?:_(?:\{([^{}]*)\}|(\w)))?(\s*\((?!\s*\w\s*\)))?"
)


def _named(match: re.Match) -> str:
    letter = match[1] or match[2] or match[3]
    if letter == "Gamma" and match[6]:
        return match[0]
    at = 200 + _CAPITALS.index(letter) if match[3] else ord(letter)
    index = re.sub(r"[\s\\{}]", "", match[4] or match[5] or "")
    index = re.sub(r"\W", lambda sign: f"y{ord(sign[0])}y", index)  # F_{n+1} is not F_{n-1}
    return f" x_{{9{at:03d}{index}}}" + (r"\cdot (" if match[6] else "")


def _chosen(match: re.Match) -> str:
    """C_5^2 as a binomial. With an index of 1 or 2, or an exponent above the index, it is a constant's power."""
    top, bottom = int(match[1]), int(match[2] or match[3])
    return f"\\binom{{{top}}}{{{bottom}}}" if 3 <= top >= bottom > 0 else match[0]


def _primed(match: re.Match) -> str:
    """A derivative is a letter of its own, with its argument: math-verify drops primes, so y'' would be y."""
    letter, before, primes, after, argument = match.groups()
    if letter[0] == "\\" and letter[1:] not in _CAPITALS:
        return match[0]
    said = (letter, before or after or "", len(primes), re.sub(r"\s", "", argument or ""))
    return f" x_{{8{zlib.crc32(repr(said).encode())}}} "


def _as_fraction(match: re.Match) -> str:
    value = Fraction(int((match[1] or "0") + match[2]), 10 ** len(match[2]))
    return f"{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _mixed(match: re.Match) -> str:
    whole, top, bottom = (int(group) for group in match.groups())
    if not 0 < top < bottom:
        return match[0]
    return match[0].replace(match[0].lstrip(), f"{{\\frac{{{whole * bottom + top}}}{{{bottom}}}}}")


# In other texts dn is a product, n d, but dx, dy, dz, dt, du, dv, dr and the like remain differentials.
_DIFFERENTIALS = re.compile(r"\\(?:int|iint|oint|partial)|\\frac\s*\{\s*d[^{}]*\}\s*\{[^{}]*d|d\w*\s*/\s*d")
_PRODUCT = re.compile(r"(?<![\w)}/^.])(\d+)\s*/\s*(\d+)(?=[a-zA-Z])")
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log"
# The order matters. math-verify reads adjacent letters as one symbol, a mixed number as a product, and 2(3) as a sum.
_RULES: list[tuple[str, Any]] = [
    (r"([_^])\s+", r"\1"),
    (r"(?<![a-z\\{])tr(?![a-zA-Z(])", "t r"),  # else the trace of a matrix
    (  # \ln 2 \cdot 3: the argument ends before the dot
        rf"(\\(?:{_FUNCTIONS})(?![a-zA-Z])(?:\s*[\^_]\s*(?:\{{[^{{}}]*\}}|\w))*)\s*"
        rf"((?:\d|\.(?=\d)|[a-zA-Z]|\\(?!cdot|times|(?:{_FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]+(?![a-zA-Z])"
        r"|\{(?:[^{}]|\{[^{}]*\})*\}|[\^_/]|\s)+?)\s*(?=\\cdot|\\times|\*)",
        r"\1(\2)",
    ),
    (  # \ln 2/2 and \sin x / x: the argument ends before the slash. In \cos x/2 it may not.
        rf"(\\(?:{_FUNCTIONS})(?![a-zA-Z])(?:\s*[\^_]\s*(?:\{{[^{{}}]*\}}|\w))*)\s*"
        rf"(\d+|[a-zA-Z](?=\s+/|/\s*\\(?:{_FUNCTIONS})(?![a-zA-Z])))\s*(?=/)",
        r"\1(\2)",
    ),
    (r"(?<![\w)}/^.])(\d+)\s*/\s*(\d+)\s+(?=[a-zA-Z\\])", r"\\frac{\1}{\2} "),  # 1/3 x is x/3
    (r"\\sqrt\s*\[\s*(\d*[13579])\s*\]\s*\{\s*-\s*([^{}+\-]*)\}", r"(-\\sqrt[\1]{\2})"),  # real, for odd roots
    (r"\\text\{\s*([a-zA-Z])\s*\}\s*(?=_)", r" \1"),  # an upright letter is a letter here
    (r"\\text\{\s*([a-zA-Z])\s*\}", r" \1 "),
    (r"\\text\{([^{}]*)\}", r"\\mathrm{\1}"),
    (r"(?<![\w.\\])(\d+)\.(?=\s*/)", r"\1"),  # -1./3
    (r"(?<![a-zA-Z\\])C_\{?(\d{1,3})\}?\s*\^\s*(?:\{(\d{1,3})\}|(\d))", _chosen),
    (r"(\d*\.?\d+)\s*\^\\circ", r"{(\1\\cdot\\frac{\\pi}{180})}"),
    # Decimals as fractions: exact, and 1e-5 is no product with Euler's number.
    (r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w^])", r"{\1\\cdot 10^{\2}}"),
    (r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[1].replace(",", "")),
    (r"(?<![\w.])(\d*)\.(\d+)\b", _as_fraction),
    (r"(\d)\.(?!\d)", r"\1"),
    (r"(?<![\d}\w)^_])\s*(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", _mixed),
    (r"(?<![_^\d.])(\d+)\s*(?=\(|\\frac|\\binom)", r"\1\\cdot "),
    (r"(\)|\\(?:frac|binom)\{[^{}]*\}\{[^{}]*\})\s*(?=\\binom)", r"\1\\cdot "),
    (r"(\\binom\{[^{}]*\}\{[^{}]*\})\s*(?=\d|\(|\\frac)", r"\1\\cdot "),
    (r"(\)|\\pi|\\frac\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\}|\d\}\})\s*(?=\()", r"\1\\cdot "),
    (r"(\))\s*(?=\d|\\frac)", r"\1\\cdot "),
    (r"((?:[)}\d]|(?<![a-zA-Z\\])[a-zA-Z])\^\d)\s*(?=\\frac)", r"\1\\cdot "),
    (r"\\exp\s*\{", r"e^{"),
    (r"\\(?:mathrm|operatorname)\{([die])\}", r"\1"),
    (r"\*", r"\\cdot "),
    (r"(\([^()]*\)|\\?[a-zA-Z]+|\d+)\s*!", r"{\1}!"),
    (
        r"(\\[a-zA-Z]+|[a-zA-Z])(?:_\{?(\w+)\}?)?\s*('+)(?:_\{?(\w+)\}?)?(?:\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\))?",
        _primed,
    ),
    (_CAPITAL.pattern, _named),
    (r"\s+", " "),
]


def _same_letters(parsed: Any) -> Any:
    """Give each letter one symbol, however math-verify read it. `i` is the imaginary unit, `e` Euler's number."""
    constants = {"i": sympy.I, "e": sympy.E, "pi": sympy.pi}
    letters = {one: constants.get(str(one), sympy.Symbol(str(one))) for one in getattr(parsed, "free_symbols", ())}
    with contextlib.suppress(Exception):
        return parsed.xreplace(letters) if letters else parsed
    return parsed


def same_value(gold: str, answer: str) -> bool:
    """Whether two texts in normal spelling stand for equal expressions. In the answer, 1/3x may be x/3 or 1/(3x)."""
    return any(_same_value(gold, reading) for reading in {answer, _PRODUCT.sub(r"\\frac{\1}{\2} ", answer)})


def _same_value(gold: str, answer: str) -> bool:
    first, second = expression(gold), expression(answer)
    if first is None or second is None:
        return False
    if isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr):
        verdict = first == second or same_at_points(first, second)
        if verdict is False and (renamed := with_constants_of(first, second)) is not None:
            verdict = same_at_points(first, renamed)
        if verdict is not None:
            return verdict
    return _by_math_verify(first, second)


def _by_math_verify(first: Any, second: Any) -> bool:
    from math_verify import verify

    with contextlib.suppress(Exception):
        return verify([first], [second], strict=True, float_rounding=12, numeric_precision=30, timeout_seconds=None)
    return False


def proportional(gold: str, answer: str, positive: bool = False) -> bool:
    """Whether two expressions are multiples of each other, as left minus right sides of equivalent equations are.

    With `positive`, the factor must be positive too.
    """
    first, second = expression(gold), expression(answer)
    if not isinstance(first, sympy.Expr) or not isinstance(second, sympy.Expr):
        return False
    if first.free_symbols != second.free_symbols:
        return False
    if not first.free_symbols:
        return same_at_points(first, second) is True
    ratios = [a / b for a, b in _values(first, second) if b and a]
    if len(ratios) < 2 or (positive and (abs(ratios[0].imag) > 1e-20 or ratios[0].real < 0)):
        return False
    return all(abs(ratio - ratios[0]) <= abs(ratios[0]) * 1e-25 for ratio in ratios)


def same_at_points(first: Any, second: Any) -> bool | None:
    """Whether two expressions have the same values at random points; None if too few points give values.

    Rational numbers are compared exactly.
    """
    if (verdict := _same_rational(first, second)) is not None:
        return verdict
    values = [] if first.has(sympy.Float) or second.has(sympy.Float) else _values(first, second)
    if len(values) < (2 if first.free_symbols or second.free_symbols else 1):
        return None
    if all(_near(a, b) for a, b in values):
        return True
    # In roots and logarithms, textbooks assume positive letters, for which √x√y = √(xy).
    roots = re.search(r"sqrt|log|\*\*\(", str((first, second)))
    if not roots or ("Abs" in str(first)) != ("Abs" in str(second)):
        return False
    values = _values(first, second, positive=True)
    return len(values) >= 2 and all(_near(a, b) for a, b in values)


def _same_rational(first: Any, second: Any) -> bool | None:
    """Compare two rational numbers exactly, of however many digits; None if one of them is no such number."""
    if first.free_symbols or second.free_symbols:
        return None
    with contextlib.suppress(Exception):
        first, second = first.doit(), second.doit()
        if first.is_Rational and second.is_Rational:
            return bool(first == second)
    return None


def _near(first: Any, second: Any) -> bool:
    return abs(first - second) <= max(abs(first), abs(second), 1e-60) * 1e-30


# What sympy writes of expressions that need points of their own: steps at whole numbers, kinks far from 0; and those
# whose points must stay small.
_STEPS = re.compile(r"floor|ceiling|\(-1\)\*\*")
_KINKS = re.compile(r"Abs|Max|Min|Piecewise|sqrt")
_GROWTH = re.compile(r"factorial|exp|\*\*(?:[a-z]|\([^()]*[a-z])")
_TOWER = re.compile(r"factorial\(.*factorial\(|\*\*\(?[^()+ ]*\*\*")
_WHOLE = re.compile(r"[jklmnpq]|x_{?90(?:75|77|78)}?")  # the last ones are K, M and N under their own names


def _values(first: Any, second: Any, positive: bool = False) -> list[tuple[Any, Any]]:
    """Pairs of values of two expressions at the same points, from points where both are finite."""
    first, second = (_opaque(one) for one in (first, second))
    letters = sorted(first.free_symbols | second.free_symbols, key=str)
    pairs: list[tuple[Any, Any]] = []
    said = str((first, second))
    grows = _GROWTH.search(said) is not None
    far = not grows and _KINKS.search(said) is not None
    whole = all(_WHOLE.fullmatch(str(letter)) for letter in letters)
    whole = whole and _STEPS.search(said) is not None and _TOWER.search(said) is None
    most = 3 * _POINTS if far or whole else _POINTS
    with mpmath.workdps(50):
        for at in range(2 * most if letters else 1):
            with contextlib.suppress(Exception):
                point = _whole_point(letters, at, grows) if whole else _point(letters, at, positive, far)
                a, b = (one.evalf(50, subs=point) for one in (first, second))
                if all(one.is_number and one.is_finite for one in (a, b)):
                    pairs.append((mpmath.mpmathify(a), mpmath.mpmathify(b)))
            if len(pairs) == most:
                break
    return pairs


def _whole_point(letters: list[Any], at: int, small: bool) -> dict[Any, Any]:
    """Natural numbers for the letters of a formula with steps; up to 12 if they are in exponents or factorials."""
    sizes = range(1, 13) if small else (1, 2, 3, 4, 5, 6, 7, 8, 29, 97, 360, 1009)
    return {
        letter: sympy.Integer(sizes[(at * (2 * index + 1) + 5 * index) % len(sizes)])
        for index, letter in enumerate(letters)
    }


def _point(letters: list[Any], at: int, positive: bool, far: bool) -> dict[Any, Any]:
    """A value for each letter. Points are fixed, so verdicts never change, and arbitrary, so only identities pass.

    With `far`, two of three points are farther from 0, where |x − 3| is no longer 3 − x.
    """
    point = {}
    for index, letter in enumerate(letters):
        spread = (at + 1) * 7919 + (index + 1) * 104729 + sum(map(ord, str(letter)))
        size = sympy.Rational(spread % 9973 + 1009, 4271) * ((1, 11, 101)[at % 3] if far else 1)
        point[letter] = size if positive or ((at // 3 if far else at) + index) % 3 else -size
    return point


def _opaque(parsed: Any) -> Any:
    """The expression with a letter for each part that has no value at a point.

    Such parts are undefined functions, derivatives, integrals, limits, products and long sums. Two of them are equal if
    they are written alike.
    """
    kinds = (AppliedUndef, sympy.Derivative, sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product)
    parts = sorted(parsed.atoms(*kinds), key=lambda one: -len(str(one)))
    return parsed.xreplace({one: _short_sum(one) or sympy.Symbol(_spelled(one)) for one in parts}) if parts else parsed


def _short_sum(part: Any) -> Any | None:
    if not isinstance(part, sympy.Sum) or len(part.limits) != 1:
        return None
    _, low, high = part.limits[0]
    return part.doit() if low.is_Integer and high.is_Integer and high - low <= 1000 else None


def _spelled(part: Any) -> str:
    return type(part).__name__ + str([sympy.expand(one) if isinstance(one, sympy.Expr) else one for one in part.args])


def is_constant(text: str) -> bool:
    """Whether a text is an expression without letters, and without functions of which nothing is known."""
    parsed = expression(text)
    return isinstance(parsed, sympy.Expr) and not parsed.free_symbols and not parsed.atoms(AppliedUndef)


def value(text: str) -> Fraction | None:
    """The value of an expression without letters, to forty digits, for comparing with decimals; None if it has none."""
    parsed = expression(text)
    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols or parsed.has(sympy.Float):
        return None
    with contextlib.suppress(Exception):
        numeric = sympy.N(parsed, 40)
        return Fraction(str(numeric)) if numeric.is_real and numeric.is_finite else None
    return None


def rounds_as(gold: str | Number, answer: str | Number) -> bool:
    """Whether one side is exact and rounds to the other, a decimal: a gold of three digits or an answer of ten."""
    for decimal, other, digits in ((gold, answer, 3), (answer, gold, EXACT)):
        if isinstance(decimal, Number) and isinstance(other, str) and decimal.digits >= digits:
            exact = value(other)
            return exact is not None and rounds_to(exact, decimal, digits)
    return False
