"""Expressions with letters, roots and functions: read by math-verify, compared at random points in high precision.

math-verify's own comparison rounds to six decimals, and simplifies for up to five seconds. Two expressions that agree
to thirty digits at points drawn at random are equal; two that differ at one of them are not. Where they cannot be
evaluated (matrices, sets), math-verify's comparison decides.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .quantities import EXACT, Number, rounds_to

_LONGEST = 600
_POINTS = 4
# Written out, these have more digits than fit: towers of powers, exponents of six digits, factorials of five.
_SMALL_TOWER = re.compile(r"(?<![\d.^{])([1-4])\s*\^\s*\{?\s*([1-4])\s*\^\s*\{?\s*([1-4])\s*\}*(?![\d^!.}])")
_TOO_LARGE = re.compile(
    r"\^\s*\{?\s*-?\s*\d{5,}|\d\s*\^\s*\{?\s*\d+\s*\}?\s*\^|\d{5,}\s*!|!\s*!|\\prod|\^\s*\{\s*\d+\s*!"
)


@lru_cache(maxsize=4096)
def expression(text: str) -> Any | None:
    """The sympy object that a text in normal spelling is, or None if it cannot be read."""
    if (
        len(text) > _LONGEST
        or _TOO_LARGE.search(_SMALL_TOWER.sub("1", text))
        or not re.search(r"\w", text)
        or ":" in text
    ):
        return None
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=False, boxed="last"
        ),
    )
    try:
        parsed = parse(
            f"\\boxed{{{_readable(text)}}}",
            [config],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # the worker has a limit; an alarm works in the main thread only
        )
    except RecursionError:
        return None
    if not parsed or isinstance(parsed[0], str):
        return None
    return _same_letters(parsed[0])


def _readable(text: str) -> str:
    """What math-verify reads rightly, from a text in normal spelling."""
    text = re.sub(r"\\text\{\s*([a-zA-Z])\s*\}", r" \1 ", text)  # an upright letter is a letter here
    text = re.sub(r"\\text\{([^{}]*)\}", r"\\mathrm{\1}", text)
    text = re.sub(r"(?<![\w.\\])(\d+)\.(?=\s*/)", r"\1", text)  # -1./3
    text = re.sub(r"(\d)\s*\^\\circ", r"\1\\cdot\\frac{\\pi}{180}", text)
    # Decimals as fractions: exact, and 1e-5 is no product with Euler's number.
    text = re.sub(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w^])", r"{\1\\cdot 10^{\2}}", text)
    text = re.sub(r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[1].replace(",", ""), text)
    text = re.sub(r"(?<![\w.])(\d*)\.(\d+)\b", _as_fraction, text)
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = re.sub(r"(?<![\d}\w)])\s*(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", _mixed, text)
    # Products of digits and brackets, and letters that touch: math-verify reads each letter as one symbol.
    text = re.sub(r"\\exp\s*\{", r"e^{", text)
    text = re.sub(r"\\(?:mathrm|operatorname)\{(?:d|i|e)\}", lambda m: m[0][-2], text)
    text = text.replace("*", r"\cdot ").replace("−", "-")
    text = re.sub(r"(\([^()]*\)|\\?[a-zA-Z]+|\d+)\s*!", r"{\1}!", text)
    text = _CAPITAL.sub(_named, text)
    return re.sub(r"\s+", " ", text)


# math-verify 0.9.0 reads capitals as small letters: M + m as 2m. A capital gets its own name; so does e with an index.
# It reads \gamma as infinity, a value of the gamma function: Greek letters get names of their own too.
_CAPITALS = [
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Upsilon",
    "Phi",
    "Psi",
    "Omega",
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "chi",
    "psi",
    "omega",
    "varepsilon",
    "vartheta",
    "varphi",
    "varrho",
    "ell",
]
_CAPITAL = re.compile(
    rf"(?:(?<![\\a-zA-Z{{])|(?<=[a-zA-Z])(?<!\\[a-zA-Z])|(?<=\{{))(?:([A-Z])|(e)(?=_)|\\({'|'.join(_CAPITALS)})(?![a-zA-Z]))"
    r"(?:_(?:\{([^{}]*)\}|(\w)))?(\s*\((?!\s*\w\s*\)))?"
)


def _named(match: re.Match) -> str:
    letter = match[1] or match[2] or match[3]
    if letter == "Gamma" and match[6]:
        return match[0]
    at = 200 + _CAPITALS.index(letter) if match[3] else ord(letter)
    index = re.sub(r"\W", "", match[4] or match[5] or "")
    return f" x_{{9{at:03d}{index}}}" + (r"\cdot (" if match[6] else "")


def _as_fraction(match: re.Match) -> str:
    value = Fraction(int((match[1] or "0") + match[2]), 10 ** len(match[2]))
    return f"{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _mixed(match: re.Match) -> str:
    whole, top, bottom = (int(group) for group in match.groups())
    if not 0 < top < bottom:
        return match[0]
    return match[0].replace(match[0].lstrip(), f"{{\\frac{{{whole * bottom + top}}}{{{bottom}}}}}")


def _same_letters(parsed: Any) -> Any:
    """The same letter is the same symbol however math-verify understood it: `i` is the imaginary unit, `e` Euler's."""
    import sympy

    symbols = getattr(parsed, "free_symbols", None)
    if not symbols:
        return parsed
    replacements: dict[Any, Any] = {}
    for symbol in symbols:
        name = str(symbol)
        replacements[symbol] = {"i": sympy.I, "e": sympy.E, "pi": sympy.pi}.get(name, sympy.Symbol(name))
    try:
        return parsed.xreplace(replacements)
    except Exception:
        return parsed


def same_value(gold: str, answer: str) -> bool:
    """Whether two texts in normal spelling are the same expression."""
    first, second = expression(gold), expression(answer)
    if first is None or second is None:
        return False
    return _equal(first, second)


def _equal(first: Any, second: Any) -> bool:
    import sympy

    if isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr):
        if first == second:
            return True
        verdict = same_at_points(first, second)
        if verdict is not None:
            return verdict
    return _by_math_verify(first, second)


def _by_math_verify(first: Any, second: Any) -> bool:
    from math_verify import verify

    try:
        return bool(
            verify([first], [second], strict=True, float_rounding=12, numeric_precision=30, timeout_seconds=None)
        )
    except Exception:
        return False


def proportional(gold: str, answer: str, positive: bool = False) -> bool:
    """Whether two differences are multiples of one another, as those of the two sides of equal equations are."""
    import sympy

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
    """Whether two expressions have the same values at random points; None if too few values can be had."""
    if _has_float(first) or _has_float(second):
        return None
    values = _values(first, second)
    if len(values) < min(2, _POINTS) and (first.free_symbols or second.free_symbols):
        return None
    if not values:
        return None
    if all(_near(a, b) for a, b in values):
        return True
    # Roots and logarithms of letters: textbooks mean positive ones, where √x√y = √(xy).
    text = str((first, second))
    if not ("sqrt" in text or "log" in text or "**(" in text) or ("Abs" in str(first)) != ("Abs" in str(second)):
        return False
    values = _values(first, second, positive=True)
    return len(values) >= 2 and all(_near(a, b) for a, b in values)


def _near(first: Any, second: Any) -> bool:
    return abs(first - second) <= max(abs(first), abs(second), 1e-60) * 1e-30


def _has_float(parsed: Any) -> bool:
    import sympy

    return bool(getattr(parsed, "has", lambda kind: False)(sympy.Float))


def _values(first: Any, second: Any, positive: bool = False) -> list[tuple[Any, Any]]:
    """Values of two expressions at the same points, where both have one."""
    import mpmath
    import sympy

    first, second = (_opaque(one) for one in (first, second))
    letters = sorted(first.free_symbols | second.free_symbols, key=str)
    pairs = []
    with mpmath.workdps(50):
        for at in range(2 * _POINTS if letters else 1):
            # Fixed, so that a verdict never changes; of no special form, so that only identities hold at all of them.
            point = {}
            for index, letter in enumerate(letters):
                spread = (at + 1) * 7919 + (index + 1) * 104729 + sum(map(ord, str(letter)))
                size = sympy.Rational(spread % 9973 + 1009, 4271)
                point[letter] = size if positive or (at + index) % 3 else -size
            try:
                a, b = (sympy.N(one.xreplace(point), 50) for one in (first, second))
                if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
                    continue
                pairs.append((mpmath.mpmathify(a), mpmath.mpmathify(b)))
            except Exception:
                continue
            if len(pairs) == _POINTS:
                break
    return pairs


def _opaque(parsed: Any) -> Any:
    """The expression with a letter for each part that has no value at a point: values of functions that are only named,
    derivatives, integrals, limits, and sums but short ones. Such parts are the same where they are written alike."""
    import sympy
    from sympy.core.function import AppliedUndef

    kinds = (AppliedUndef, sympy.Derivative, sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product)
    parts = sorted(parsed.atoms(*kinds), key=lambda one: -len(str(one))) if hasattr(parsed, "atoms") else []
    return (
        parsed.xreplace({one: _short_sum(one) or sympy.Symbol(f"{_spelled(one)}") for one in parts})
        if parts
        else parsed
    )


def _short_sum(part: Any) -> Any | None:
    import sympy

    if not isinstance(part, sympy.Sum) or len(part.limits) != 1:
        return None
    _, low, high = part.limits[0]
    return part.doit() if low.is_Integer and high.is_Integer and high - low <= 1000 else None


def _spelled(part: Any) -> str:
    import sympy

    return str(type(part).__name__) + str(
        [sympy.expand(one) if isinstance(one, sympy.Expr) else one for one in part.args]
    )


def value(text: str) -> Fraction | None:
    """A number without letters, to forty digits: for comparing with decimals."""
    import sympy

    parsed = expression(text)
    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols or _has_float(parsed):
        return None
    try:
        numeric = sympy.N(parsed, 40)
        if not numeric.is_real or not numeric.is_finite:
            return None
        return Fraction(str(numeric))
    except Exception:
        return None


def rounds_as(gold: str | Number, answer: str | Number) -> bool:
    """Whether one side is a decimal that the other, exact one rounds to: a gold of three digits, an answer of ten."""
    if isinstance(gold, Number) and isinstance(answer, str):
        exact = value(answer) if gold.digits >= 3 else None
        return exact is not None and rounds_to(exact, gold, 3)
    if isinstance(gold, str) and isinstance(answer, Number):
        exact = value(gold) if answer.digits >= EXACT else None
        return exact is not None and rounds_to(exact, answer, EXACT)
    return False
