"""Bring LaTeX and Unicode into one normal spelling, and cut texts outside brackets."""

import re
from typing import Any

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega mu phi epsilon"
).split()
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "＋": "+", "，": ",", "（": "(", "）": ")",
        "：": ":", "；": ";", "．": ".", "％": "%", "＝": "=", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ",
        "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "⩽": r"\le ", "⩾": r"\ge ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
        "°": r"^\circ ", "ℝ": r"\mathbb{R}", "≡": r"\equiv ",
        "⁄": "/", "。": ".", "、": ",", "？": "?", "’": "'", "‘": "'", "“": '"', "”": '"', "′": "'", "″": "''",
        "…": r"\ldots ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
        "\u200b": "", "\ufeff": "", "∠": r"\angle ", "≈": r"\approx ", "⟨": r"\langle ", "⟩": r"\rangle ",
    }
    | {letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξρςστυφχψωΓΔΘΛΞΣΦΨΩµϕϵ", _GREEK, strict=True)}
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|sl|up)?|math(?:rm|bf|it|sf|tt|normal|bb(?=\{[^R]))"
    r"|mbox|hbox|bf|boldsymbol|bm|operatorname\*?)"
)


def _primes(match: re.Match) -> str:
    return "'" * match[0].count("prime")


def _ordinal(match: re.Match) -> str:
    """The number of 3rd; 2st stays a product."""
    of_ten = {"1": "st", "2": "nd", "3": "rd"}.get(match[1][-1], "th")
    return match[1] if match[3] == ("th" if match[1][-2:-1] == "1" else of_ten) else match[0]


def _index(match: re.Match) -> str:
    """An index of words as letters: x_{max} for x_{\\text{max}} and x_\\max."""
    return "_{" + re.sub(r"[^\w+\-]", "", match[1] or match[2] or "") + "}"


_RULES: list[tuple[str, Any]] = [
    (
        r"(?<!\\)\\\\(?=(?:frac|dfrac|sqrt|text|pi|left|right|cdot|times|infty|boxed|mathrm)(?![a-zA-Z]))",
        r"\\",
    ),  # escaped twice
    (r"\\\\\s*(?:\[[^\]]*\])?", r"\\cr "),
    (r"\\begin\{(?:aligned|align\*?|equation\*?|gathered)\}|\\end\{(?:aligned|align\*?|equation\*?|gathered)\}", ""),
    (r"\\(?:left|right|middle)\b\s*\.", ""),  # \left. has no bracket
    (r"\\(?:[mM]?left|[mM]?right|middle|[bB]ig{1,2}[lrm]?)(?![a-zA-Z])\s*", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathop|nonumber|rm|it|bf|centering)(?![a-zA-Z])\s*", ""),
    (r"\\(?:[,;:>]|quad|qquad|thinspace|enspace|hspace\*?\{[^{}]*\}|phantom\{[^{}]*\})|\\ |~|\\\n", " "),
    (r"\\(?:textcolor|colorbox)\s*(?:\[[^\]]*\])?\{[^{}]*\}|\\color\s*\{[^{}]*\}|\\tag\*?\s*\{[^{}]*\}", ""),
    (r"\^\s*\{((?:\s*\\prime(?![a-zA-Z]))+)\s*\}|\^\s*(\\prime)(?![a-zA-Z])", _primes),
    (r"\\!", ""),
    (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])\s*|\\underline(?=\s*\{)", ""),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"{\\binom{\1}{\2}}"),
    (r"(\\(?:vec|hat|tilde|overrightarrow))\s+([a-zA-Z])(?![a-zA-Z])", r"\1{\2}"),
    (r"\{\s*([,:])\s*\}", r"\1"),  # 2{,}125
    (r"\\(?:[dtc]|sf)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:leqslant|leq|leqq)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geqslant|geq|geqq)(?![a-zA-Z])", r"\\ge "),
    (r"\\(?:neq|not\s*=)(?![a-zA-Z])|!=", r"\\ne "),
    (r"<=|=<", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:lbrace|lgroup)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace|rgroup)(?![a-zA-Z])", r"\\}"),
    (r"\\lbrack(?![a-zA-Z])", "["),
    (r"\\rbrack(?![a-zA-Z])", "]"),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
    (r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:colon)(?![a-zA-Z])", ":"),
    (r"\\(?:Re|R|reals)(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\\mathbb\s*R(?![a-zA-Z])|\\(?:mathbf|bf)\s*\{R\}", r"\\mathbb{R}"),
    (r"\\bigcup(?![a-zA-Z_])", r"\\cup "),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])", r"^\\circ "),
    (r"\\overline|\\bar(?![a-zA-Z])|\\dot(?=\s*\{?\d)", r"\\overline"),
    (r"\\euro(?![a-zA-Z])|\\texteuro(?![a-zA-Z])", "€"),
    (r"\\dots|\\cdots|\\ldots", r"\\ldots"),
    (r"\\(?:infty|infin)(?![a-zA-Z])|(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![a-zA-Z\\])(?:sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])sqrt(?=\s*\{)", r"\\sqrt"),
    (r"\^\s*\(([^()]*)\)", r"^{(\1)}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"(?<=[\w)\]}])\s*\*\*(?=\s*[\d({-])", "^"),  # not Markdown's **7**
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s+[xX]\s+(?=\d)", r"\\times "),  # 3 x 10^8
    (r"(?<![a-zA-Z\\])(?:np|math)\.(?=[a-z])", ""),
    (r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sin|cos|tan|log|ln|exp|pi)(?![a-zA-Z])", r"\\\1 "),
]
# Rules that apply once every upright word is in \\text.
_WORD_RULES: list[tuple[str, Any]] = [
    (r"\\text\{\\text\{([^{}]*)\}\}", r"\\text{\1}"),
    (r"_\s*(?:\{\s*\\text\{([^{}]*)\}\s*\}|\\text\{([^{}]*)\})", _index),
    (r"_\s*(?:\{\s*\\(max|min|sup)\s*\}|\\(max|min|sup)(?![a-zA-Z]))", _index),
    (r"_\s*(\\(?!text)[a-zA-Z]+|[-+])(?![a-zA-Z{])", r"_{\1}"),
    (r"\\mu\s*\\text\{(?=[a-zA-Z])", r"\\text{\\mu "),  # 5 \mu\text{m}
    (r"\\text\{([kMG])\}\s*\\Omega(?![a-zA-Z])", r"\\text{\1\\Omega }"),
    (r"\\text\{(\(?[A-Z]\)?|[.:])\}\s*\\text\{([).:]*)\}", r"\\text{\1\2}"),
    *(
        (rf"(?<=[\d}}])\s*(\\text\{{)?\s*{name}s?(?![a-zA-Z])", rf"\\cdot 10^{{{power}}} \1")
        for name, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
    # 5\text{th} and 5^{\text{th}}; as a whole or before a word also 5th and 5^{th}, which may else be a product.
    (r"(?<=\d)\s*\^?\s*(\{\s*)?\\text\{(?:st|nd|rd|th)\}(?(1)\s*\})", ""),
    (r"^(\d+)\s*(?:\^\s*(\{\s*)?)?(st|nd|rd|th)(?(2)\s*\})(?=$|\s+(?:[a-z]{2,}|\\text))", _ordinal),
    (r"\bper cent\b", "percent"),
    (r"^\\text\{([A-Z]+(?:(?:,|\s|and|or|only)+[A-Z]+)+)(?:\s+only)?\}$", r"\1"),  # I and III
    (r"^\\text\{([^{}]*\d[^{}]*)\}$", r"\1"),  # \text{18 dollars}
    # An introduction to the answer: \text{The sum is } x + 1; without \text only if a formula follows.
    (r"^\\text\{[^{}]*(?:\b(?:is|are|equals?|be)|=|:)\s*\}(?=\s*[^\s.])(?!.*\b(?:is|are)\b)", ""),
    (r"(?i)^(?:[a-z]{2,}[^{}\\\d=]*\b(?:is|are|equals?|be)|(?:final )?answer:)\s+(?=[\\\d(\[{-]|.{1,3}$)", ""),
    (r"\\text\{[\s.,;]*\}", " "),
    (r"^\\text\{\s*(?:about|approximately|exactly|roughly|only)\s*\}\s*(?=[\d\\.-])", ""),
]
_COMPILED, _COMPILED_FOR_WORDS = (
    [(re.compile(pattern), replacement) for pattern, replacement in rules] for rules in (_RULES, _WORD_RULES)
)
_MICRO = re.compile(r"(?<=\d)\s*[μµ]((?:mol|Hz|Pa|[msglLNJWVAFC])(?![a-zA-Z]))")  # else μ is a letter
_WORDS = re.compile(_TEXT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# \frac13, \frac{1}3, \frac1{3}, \frac 1 3; likewise roots.
_ARGUMENT = r"(\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}|\\[a-zA-Z]+(?:\{[^{}]*\})?|[a-zA-Z\d])"
_FRACTION = re.compile(r"\\frac\s*" + _ARGUMENT + r"\s*" + _ARGUMENT)
_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*([a-zA-Z\d]|\\[a-zA-Z]+)")
_MODULUS = re.compile(  # \pmod{3}, \bmod 3, (\text{mod } 3), mod 3
    r"(\(\s*)?(?:\\[pb]?mod(?![a-zA-Z])|\\text\{\s*(\(\s*)?mod\s*\}|(?<![a-zA-Z\\])mod(?![a-zA-Z]))"
    r"\s*(\{\s*)?(\w+)(?(3)\s*\})(?(1)\s*\)|(?(2)\s*\)))"
)
# A last remark on what a letter stands for: k \in \mathbb{Z}, for all x.
_FOR_ALL = (
    r"\\text\{\s*\(?(?:where|for|with)\s*(?:all|any|every|each|some)?\s*(?:real|integers?|natural)?\s*"
    r"(?:numbers?|values?)?\s*(?:of)?\s*\}\s*"
)
_NUMBERS = r"\\in(?![a-zA-Z])\s*(?:\\mathbb\s*)?\{?\s*(?:\\text\{)?(?:\\mathbb\{)?[ZNR]\}?\s*\}?(?:\^\s*\{?[+*]\}?)?"
_DOMAIN = [
    re.compile(rf"[,(\s]\s*(?:{_FOR_ALL})?(?P<letter>[a-z])\s*{_NUMBERS}\s*\)?\s*$"),
    re.compile(rf"[,(\s]\s*{_FOR_ALL}(?P<letter>[a-z])\s*\)?\s*$"),
]


def normal(text: str) -> str:
    """The text in one spelling: no layout, `\\frac{a}{b}` with braces, `\\text{…}` for every upright word."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text.strip())
    text = _MICRO.sub(r"\\text{μ\1}", text)
    text = _lines(unwrap(text.translate(_CHARACTERS)))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=\})[\s.,;]+$", "", text)
    text = re.sub(r"\{\s*\\(?:rm|it|bf)\s+([^{}]*)\}", r"\\text{\1}", text)
    for _ in range(3):  # nested, as \textbf{(\mathrm{C})}
        text = _WORDS.sub(lambda m: "\\text{" + m[1].strip() + "}", text)
        for pattern, replacement in _COMPILED_FOR_WORDS:
            text = pattern.sub(replacement, text)
    if "\\equiv" in text:
        text = _MODULUS.sub(r" \\pmod{\4}", text)
    text = re.sub(r"\{\s+", "{", re.sub(r"\s+\}", "}", text)) if "\\text" not in text else text
    for _ in range(4):
        fixed = _FRACTION.sub(_braces, _ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text))
        if fixed == text:
            break
        text = fixed
    return trimmed(re.sub(r"\s+", " ", text))


def _lines(text: str) -> str:
    """Join lines that are all equations into a list of equations. Other text stays as it is."""
    lines = [line.strip().rstrip(",;") for line in text.split("\n") if line.strip()]
    return "; ".join(lines) if len(lines) > 1 and "\\begin" not in text and all("=" in line for line in lines) else text


def _braces(match: re.Match) -> str:
    first, second = (part if part[0] == "{" else "{" + part + "}" for part in match.groups())
    return f"\\frac{first}{second}"


def unwrap(text: str) -> str:
    """The text without the delimiters of mathematics. A dollar sign for money stays, as `\\$`."""
    text = text.strip().strip("`").strip()
    text = re.sub(r"^\*+(.*?)\*+$", r"\1", text)
    whole = re.fullmatch(
        r"\$\$(.+?)\$\$\.?|\\\[(.+?)\\\]\.?|\\\((.+?)\\\)\.?|\$((?:[^$\\]|\\.)+)\$\.?", text, re.DOTALL
    )
    if whole:
        return unwrap(next(part for part in whole.groups() if part is not None))
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$((?:[^$\\]|\\.)*)\$", r" \1 ", text)
    else:  # one sign alone is money
        text = re.sub(r"(?<!\\)\$\s*(?=-?[\d.])", r"\\$", text)
        text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"\\\(|\\\)|\\\[|(?<!\\)\\\](?!\[)", " ", text).strip()


def trimmed(text: str) -> str:
    """The text without surrounding full stops, quotes, asterisks, and labels such as "solution:"."""
    text = re.sub(r"(?<=\S)\s*(?:solution|answer):\s*$", "", text)
    text = re.sub(r"^(?:the\s+)?solutions?\s*(?:is|are)?\s*:\s*", "", text.strip(), flags=re.IGNORECASE) or text
    text = re.sub(r",?\s+for (?:all|any|every) (?:real )?(?:numbers?|values?)?[^.]{0,30}$", "", text) or text
    text = _without_domain(text)
    text = re.sub(r"^([\"'`])(.*)\1$", r"\2", text.strip(), flags=re.DOTALL).strip()  # a prime stays
    text = re.sub(r"^(?:=|:)\s*", "", text)
    text = re.sub(r"^\*+|\*+$", "", text).strip()
    while text and (text[-1] in ",;" or (text[-1] == "." and not re.search(r"(?:\b[ap]\.\s?m|\\ldots|^\d+)\.$", text))):
        text = text[:-1].rstrip()
    if re.fullmatch(r"-?\d+\.", text):
        text = text[:-1]
    return re.sub(r"\s*\\(?:cr|newline)$|^\\cr\s", "", text).strip()


def _without_domain(text: str) -> str:
    """The text without a last remark that says which numbers its letter stands for: `\\pi k, k \\in \\mathbb{Z}`."""
    remark = next(filter(None, (pattern.search(text) for pattern in _DOMAIN)), None)
    if remark is None:
        return text
    rest = text[: remark.start()].strip().rstrip(",")
    # In whole numbers, a relation or a set would be another one.
    changes = "R" not in remark[0] and re.search(r"\\(?:le|ge|ne|in|mid)(?![a-zA-Z])|[<>|:]", rest)
    is_named = re.search(rf"(?<![a-zA-Z\\]){remark['letter']}(?![a-zA-Z])", rest)
    return rest if balanced(rest) and is_named and not changes else text


def upright(text: str) -> str:
    """The text with the words of `\\text{…}` as plain words."""
    return re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)


def squeezed(text: str) -> str:
    """The text without spaces and without braces around one character, for comparing letter by letter."""
    text = re.sub(r"\s+", " ", upright(text))
    text = re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", "\\1\0", text)  # \pi r is not \pir
    text = re.sub(r"\{\s*(\w)\s*\}", r"\1", text)
    text = re.sub(r"(?<=\d) +(?=\d)", "\0", text)  # 5 1/2 is not 51/2
    return re.sub(r"\s+", "", text).replace("\0", " ").replace("{}", "")


def plain(text: str) -> str:
    """The text without markup, articles and upper case, for comparing words."""
    words = re.sub(r"[^\w\s+\-*/=<>^().,:\\]", " ", upright(text)).casefold().strip(" .").split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


OPENING = {"(": ")", "[": "]", "{": "}"}


def cut(text: str, separator: str) -> list[str]:
    """The parts of a text between matches of `separator` outside brackets. Unmatched brackets give one part."""
    pattern = re.compile(separator)
    parts, depth, start, at = [], 0, 0, 0
    half_open = not balanced(text)
    angles = "|" not in text and text.count("\\langle") == text.count("\\rangle")  # a ket has no opening bracket
    while at < len(text):
        if depth == 0 and (match := pattern.match(text, at)) and match.end() > at:
            parts.append(text[start:at].strip())
            at = start = match.end()
            continue
        letter = text[at]
        if letter == "\\" and at + 1 < len(text):
            if text[at + 1] == "{" or (angles and text.startswith("\\langle", at)):
                depth += 1
            elif text[at + 1] == "}" or (angles and text.startswith("\\rangle", at)):
                depth -= 1
            at += 2
            while text[at - 1].isalpha() and at < len(text) and text[at].isalpha():
                at += 1
            continue
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth = max(0, depth - 1)
        at += 1
    parts.append(text[start:].strip())
    return [text] if half_open and depth else parts


def balanced(text: str) -> bool:
    """Whether all braces match."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def complete(text: str) -> bool:
    """Whether the text is not cut off: every `\\begin` and `\\left` is closed."""
    opened, closed = (len(re.findall(rf"\\{side}(?![a-zA-Z])", text)) for side in ("left", "right"))
    return opened <= closed and text.count("\\begin{") == text.count("\\end{")


def bracketed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, inside and closing bracket of a text that one pair of brackets encloses; else None."""
    match = re.fullmatch(r"(\\\{|\\langle|[(\[{<])\s*(.*?)\s*(\\\}|\\rangle|[)\]}>])", text, re.DOTALL)
    if match is None:
        return None
    depth = 0
    inside = match[2]
    for token in re.finditer(r"\\[{}]|\\langle|\\rangle|\\[a-zA-Z]+|\\.|[()\[\]{}]", inside):
        if token[0] in ("\\{", "\\langle", "(", "[", "{"):
            depth += 1
        elif token[0] in ("\\}", "\\rangle", ")", "]", "}"):
            depth -= 1
            if depth < 0:
                return None
    return (match[1], inside, match[3]) if depth == 0 else None
