"""Find the answer in a completion, and in a cell of a data set.

In a completion it is the content of the last box; else the text after the last announcement ("The answer is",
"Answer:", "####"); else the last mathematics. A cell may hold only the answer, a worked solution with a box or GSM8K's
mark, a number or a list.
"""

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

# A Markdown heading may begin with GSM8K's mark too. It has several words, a number or a part's name, and text below.
_HEADING = (
    r"(?-i:\s*[*_]*(?:[A-Z][a-z]+[*_:]*[ ](?=[A-Za-z\d])|[A-Z][a-z]+[ ]?:|\d+[.)]\s*[*_]*[A-Za-z]"
    r"|(?:Solution|Answer|Explanation|Reasoning|Calculation|Verification|Check|Proof|Conclusion|Result|Summary)\b))"
)
_STEPS = r"[*_\s]{0,9}[:：][*_\s]{0,9}(?:(?!no\b)[a-z]{2,}\s|\d+[.)]\s*[a-z])"  # "Solution: We have"
# Announcements, each with the words between it and the answer. The last one in the text counts.
_ANNOUNCED = re.compile(
    rf"""(?:
      (?<!\#)\#{{4,}}(?!\#) (?!{_HEADING}[^\n]{{0,100}}\n\s{{0,9}}\S)
    | <answer>
    | \b(?:final\s+|correct\s+)?(?:answers?|answer\s+choice|solutions?(?!{_STEPS}))\b
        (?:\s+(?:to|of|for|here)\b[^.\n:$]{{0,60}}?)?
        [*_\s]* (?: \b(?:is|are|would\s+be|must\s+be|will\s+be|should\s+be|equals)\b | [:：=] )
    | \b(?:correct|right|best)\s+(?:option|choice)\b [*_\s]* (?: \bis\b | [:：] )
    | \b(?:option|choice) \s+ is \b
    | ^(?:[^\S\n]|[\#*_])*(?:final\s+)?answer[\s*_:]*$
    | (?:答案|réponse|respuesta|antwort|resposta|ответ) [*_\s]* (?: 是|为|為 | \b(?:est|es|ist|é)\b | [:：] )
    )(?:[*:：\s]|_(?=[^\s_]))*""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_MATHEMATICS = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\w])\$(?!\s*\d[\d,.]*(?:\s|$)(?![^$\n]*[^\s\\$]\$))"
    r"((?:[^$\\\n]|\\.)+?)\$",
    re.DOTALL,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\b\s*|\\boxed(?=\d)")
_TOKEN = re.compile(r"[^\s$\\]+|\\[a-zA-Z]+(?:\{[^{}]*\})*")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>\s*|</?s>|<eos>|<end_of_turn>")
_SEPARATORS = re.compile(r"(?:[\s$,;.*{}]|\\[,;()\[\] ]|\\text|\\quad|and|or)*")
_HEDGE = re.compile(
    r"^[\s*_]*(?:(?:probably|therefore|thus|hence|simply|just|exactly|indeed|equal to|equals|approximately|about)"
    r"\b[\s:,]*)+",
    re.IGNORECASE,
)
_MINUS = re.compile(r"(?<![\d)}$]\s)\b(?:negative|minus)\s+(\$|\\\()?(?=\s*[\d.])", re.IGNORECASE)  # as a word
# Words after which a number is only a part of the answer.
_PART = re.compile(
    r"\b(?:twice|double|triple|(?:half|thirds?|quarters?|multiples?|square|cube|root|reciprocal|inverse|negative"
    r"|opposite|logarithm)\s+of|divisible\s+by|up\s+to|between|plus|minus|times|and|or|except|besides|below|above"
    r"|log|ln|sin|cos|tan|to\s+the(?:\s+power(?:\s+of)?)?)\s*$",
    re.IGNORECASE,
)
_SCALE = r"(?:hundred|thousand|million|billion|trillion)\b"
_DENIED = re.compile(r"\b(?:not|cannot|never|but|least|most|more|less|over|under|than)\b|n't\b", re.IGNORECASE)
# What may follow mathematics and belongs to the answer: `$1.5$ million`, `$3$ or 4`, `$3$ hours and $20$ minutes`.
_GOES_ON = re.compile(
    rf"\s*(?:{_SCALE}|(?:squared|cubed|factorial)\b|\$|\\\(|\|"
    r"|(?:divided\s+by|over|choose|mod(?:ulo)?|to\s+the(?:\s+power(?:\s+of)?)?)\s+(?:\$|\\\(|-?\d|[a-z]\b)"
    r"|,?\s*(?:but|as\s+well\s+as|and|or)\s+(?:also\s+|possibly\s+|maybe\s+|perhaps\s+|even\s+)?(?:\$|\\\(|-?\d)"
    r"|(?:[a-zA-Z]+\s+)?(?:and|or|to|plus|minus|times)\s+(?:an?\s+(?:half|third|quarter)\b|\$|\\\(|-?\d|[A-Za-z]\b(?!\s[a-z]))"
    r"|[-+*/^]\s*[\d$\\])",
    re.IGNORECASE,
)
# `$3$ when $n$ is even and $4$ when $n$ is odd` is no 3.
_BY_CASES = re.compile(
    r"[\s,]*\b(?:if|when|for)\b[^.]*(?:,|;|\band|\bor)\s*(?:\$|-?\d)[^.]*\b(?:if|when|for|otherwise)\b"
)
_CLAUSE_END = re.compile(
    r"(?<=[\w)\]}%$*°!])[.!?](?=\s|$|\*)|。|(?<!\s)\s+(?:because|since|which|where|as\s+(?:required|desired|needed)|when)\b|[,;]?\s+so\b|,\s+not\b",
    re.IGNORECASE,
)
# A minus right after a digit, a letter or a closing bracket subtracts. A minus with a space before its number is a sign
# only after an equals sign, a colon or an opening bracket.
_SIGN = r"(?:(?<![\w)\]}])[-+−–](?=[\d.$€£\\])|(?<=[=:(] )[-−–](?= \d)|(?<=[=:(])[-−–](?= \d))?"
_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+\.\d+|\d+\.(?=/)|\d+|(?<![\w.])\.\d+"
_NUMBER = re.compile(
    rf"[ ]?(?<![\w.:])\d+(?:[ ]?:[ ]?\d+)+(?![\d:])(?:[ ]?[ap]\.?m\b\.?)?"  # a ratio, a time of day
    rf"|{_SIGN}[ ]?(?:\\?[$€£¥][ ]?)?(?:(?:{_PLAIN})(?:[eE][-+]?\d+)?(?:[ ]?(?:\\times|[×x*])[ ]?10\^\{{?-?\d+\}}?)?)"
    rf"(?:[ ]\d+/\d+|[ ]?/[ ]?\d+)?(?:[ ]?\\?%)?(?:[ ](?:thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<![\w)\]}])\*\*(?=\S)(.{1,200}?)(?<=\S)\*\*")  # after an operand, ** is a power
_BARE_NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?'*")
_SAID = re.compile(r"\s*(?:is|are|equals?|=)\s*(?:equal\s+to\s*)?(?=\$|\\\(|[-−]?\d)")
# A number with a remark that is no second answer: `6 (six apples)`, `6, Tom is happy`.
_REMARK = re.compile(
    r"([-−]?(?:\\?[$€£¥]\s?)?\d[\d,.]*(?<=\d)%?(?:[ ][a-z]{3,})?)\s*"
    r"(?:\((?!mod|base|in\b|or\b|and\b)[^\W\d]{3,}[^()\d=]*\)"
    r"|(?:[,;]\s|\s?[—–]\s?|\s-\s)\s*(?!and\b|or\b)[^\W\d]{2,}\s[^\d$\\=]*)",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"(?:(?:now|also|indeed|clearly|therefore|thus|not)\s+)?(?:complete|consistent|correct|valid|verified|confirmed"
    r"|reasonable|right|unique|clear|as\s+follows|in\s+agreement)\b(?!\s*[,/;])",
    re.IGNORECASE,
)
_NOTHING = ("none", "null", "nan", "n/a", "[]")  # missing values of Python and JSON, as text


def completion_text(completion: Any) -> str:
    """The text of a completion: the string itself, or the policy's last message in a list of messages."""
    if isinstance(completion, str):
        return _SPECIAL.sub("", completion)
    return _SPECIAL.sub("", content_text(last_message(completion).get("content")))


def content_text(content: Any) -> str:
    """The text of a message's content, which may be None or have several parts, such as text and images."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content or ""


def last_message(completion: Any) -> Mapping[str, Any]:
    """The policy's last message in a list of messages, or of one message; empty if there is none."""
    messages = [completion] if isinstance(completion, Mapping) else completion
    own = [message for message in messages if message.get("role", "assistant") == "assistant"]
    return own[-1] if own else {}


def final_answer(text: str) -> str | None:
    """The answer that a completion gives, or None if it gives none. Reasoning before `</think>` is not read."""
    text = text.rpartition("</think>")[2]
    found = boxes(text)
    if found is not None:
        return found[-1][2] if found else None
    text = _MINUS.sub(r"\1-", text)
    for reading in (announced, last_mathematics):
        if (answer := reading(text)) is not None:
            return answer
    return None


def boxes_together(text: str) -> list[str]:
    """The last boxes, as far as only commas, "and" or "or" separate them: `\\boxed{3}, \\boxed{4}` is a list."""
    text = text.rpartition("</think>")[2]
    together: list[str] = []
    start = None  # where the next box begins
    for first, end, content in reversed(boxes(text) or []):
        if start is not None and not _SEPARATORS.fullmatch(text[end:start]):
            break
        together.insert(0, content)
        start = first
    return together


def boxes(text: str) -> list[tuple[int, int, str]] | None:
    """Start, end and content of every box that is not empty; None if there is no such box.

    If the text ends inside a box, that box's content is unknown. It and the boxes before it are left out, and the list
    may be empty.
    """
    found: list[tuple[int, int, str]] = []
    seen = False
    closing = _closing_braces(text)
    for mark in _BOX.finditer(text):
        start = mark.end()
        if text[start : start + 1] == "{":
            end = closing.get(start)
            if end is None:
                found, seen = [], True
                continue
            content = text[start + 1 : end].strip()
        else:  # \boxed 7
            token = _TOKEN.match(text, start)
            content, end = (token[0].rstrip(".,;"), token.end()) if token else ("", start)
        if content:
            seen = True
            found.append((mark.start(), end + 1, content))
    return found if seen else None


def _closing_braces(text: str) -> dict[int, int]:
    """For the place of each opening brace, the place of its closing brace."""
    closing, opened = {}, []
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def announced(text: str) -> str | None:
    """The text after the last announcement, up to the end of its sentence; None if there is no announcement.

    "The solution is complete" is passed over if an earlier announcement gives an answer.
    """
    last = None
    for rest in islice(announcements(text), 10):
        answer = _clause(rest)
        if answer and not _NO_ANSWER.match(answer):
            return answer
        last = last or answer
    return last


def announcements(text: str) -> Iterator[str]:
    """All of the text after each announcement, from the last announcement to the first."""
    for mark in reversed([*_ANNOUNCED.finditer(text)]):
        yield text[mark.end() :].split("</answer>")[0].strip()


def _clause(rest: str, named: bool = False) -> str | None:
    """The answer at the start of a text: its mathematics if it has some, else its first clause."""
    block = re.match(r"[*\s]*(\$\$|\\\[)", rest)
    line = rest if block else _BOLD.sub(r"\1", rest.split("\n", 1)[0])
    first = _MATHEMATICS.search(line)
    before = line[: first.start()] if first else ""
    is_words = not re.search(r"\w", re.sub(r"[a-z]+|\\text", "", before, flags=re.IGNORECASE))
    is_whole = not (_DENIED.search(before) or _PART.search(before))
    if first and is_words and is_whole:
        if block:
            return _inside(first)
        # The value of $x$ is $5$: the answer is the value, not the bare name.
        said = None if named else _SAID.match(line, first.end())
        if said and _BARE_NAME.fullmatch(_inside(first)) and (value := _clause(line[said.end() :], named=True)):
            return f"{_inside(first)} = {value}"
        # Several pieces of mathematics with only separators between them are one list.
        sign = "-" if re.search(r"(?<!\w)(?:[-–]|−\s*)$", before) else ""  # "- " begins an item of a list
        pieces, end, joined = [sign + _inside(first)], first.end(), ", "
        while more := re.match(r"((?:,|;|and\b|or\b|\s)*)", line[end:]):
            piece = _MATHEMATICS.match(line, end + more.end())
            if piece is None or not more[1].strip():
                break
            pieces.append(_inside(piece))
            joined = " or " if "or" in more[1] else joined
            end = piece.end()
        if _BY_CASES.match(line, end):
            return line
        if _GOES_ON.match(line, end):
            return _plain_clause(line.replace("$", " "))
        unit = re.match(r"\s*(\\?%|degrees?|percent|[a-zA-Z]+)?", line[end:])
        tail = unit[1] if unit and unit[1] and re.fullmatch(r"\\?%|percent|degrees?", unit[1]) else ""
        return joined.join(pieces) + (f" {tail}" if tail else "")
    return _plain_clause(line)


def _plain_clause(line: str) -> str | None:
    clause = _HEDGE.sub("", _CLAUSE_END.split(line, maxsplit=1)[0])
    clause = clause.strip().strip("*_`\"'“” ").rstrip(".,;:").strip("*_` ")
    remark = _REMARK.fullmatch(clause)
    return (remark[1] if remark else clause) or None


def _inside(match: re.Match) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def last_mathematics(text: str) -> str | None:
    """The last formula or number of a text; all of a short text that has neither."""
    last = next(iter([*_MATHEMATICS.finditer(text)][-1:]), None)
    number = next(iter([*_NUMBER.finditer(text, last.end() if last else 0)][-1:]), None)
    stripped = _BOLD.sub(r"\1", text.strip()).strip("*`\"'").strip()
    short = "\n" not in stripped and len(stripped) <= 40 and last is None and len(stripped.split()) <= 4
    # The number's match may begin with the space before it.
    after_words = number and re.search(r"[a-zA-Z]{2,}\s", text[: number.start()] + number[0][:1])
    if short and not after_words:
        return stripped.rstrip(".") or None
    if number is not None:
        return number[0].strip()
    if last is None:
        return None
    scale = re.match(rf"\s*{_SCALE}", text[last.end() :], re.IGNORECASE)
    return _inside(last) + (f" {scale[0].strip()}" if scale else "")


def only_number(text: str) -> str | None:
    """The only number in a clause of words, with its unit: `16 dollars` in "that he has 16 dollars"."""
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or re.search(r"[=^<>{}]|\\[a-zA-Z]|\bor\b", text) or _DENIED.search(text):
        return None
    if _PART.search(text[: found[0].start()]):
        return None
    return text[found[0].start() :].strip() if re.search(r"[^\W\d]{2,}\s", text) else None


def last_number(text: str) -> str | None:
    """The last number of a text, with sign and decimals but no separators, for tasks with numeric answers."""
    found = re.findall(rf"({_SIGN})[ ]?(?:\\?[$€£¥])?({_PLAIN})", text)
    if not found:
        return None
    sign, digits = found[-1]
    return ("-" if sign in ("-", "−", "–") else "") + digits.replace(",", "")


def gold_text(gold: Any) -> str | None:
    """The answer in a cell of a data set; None if no answer can be read."""
    if isinstance(gold, str):
        return _text_of_string(gold.strip())
    if isinstance(gold, Mapping):  # DAPO's `reward_model`
        named = [gold[name] for name in ("ground_truth", "answer", "final_answer") if name in gold]
        return gold_text(named[0]) if named else None
    if isinstance(gold, Sequence):
        parts = [gold_text(part) for part in gold]
        return None if not parts or None in parts else ", ".join(part for part in parts if part)
    if isinstance(gold, float) and math.isfinite(gold):
        return f"{gold + 0.0:.15g}"  # a float's reliable digits, the rest is noise, as in 0.1 + 0.2; -0.0 becomes 0
    return repr(gold) if isinstance(gold, int) else None


def _text_of_string(text: str) -> str | None:
    """The answer in a text: its box, the text after GSM8K's mark, or what it announces; else the whole text."""
    if text[:1] == "[" and text[-1:] == "]" and ("'" in text or '"' in text):  # a list that was stored as text
        with contextlib.suppress(ValueError):
            return gold_text(json.loads(text))
        if "\\" not in text.replace("\\\\", ""):  # else Python did not write it
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                listed = ast.literal_eval(text)
                if repr(listed) == text:  # as Python and pandas write lists; not numpy's ['2' '3']
                    return gold_text(listed)
    found = boxes(text)
    if found is not None or re.search(r"\\boxed\s*\{\s*\}", text):
        return found[-1][2] if found else None
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif ("\n" in text or len(text) > 60) and re.search(r"\banswer\b", text, re.IGNORECASE):
        text = announced(text) or text
    readable = re.search(r"\w|\\(?:emptyset|varnothing|infty)|[∅∞]", text) and text.lower() not in _NOTHING
    return text if readable else None
