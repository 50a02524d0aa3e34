"""Where the answer stands: in a completion, and in a cell of a data set.

In a completion it is what is boxed last; else what is announced last ("The answer is", "Answer:", "####"); else the
last mathematics. A cell may hold the answer alone, a worked solution with a box or GSM8K's mark, a number, or a list.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Announcements, each with what stands between it and the answer. The last one in the text counts.
_ANNOUNCED = re.compile(
    r"""(?:
      \#{4}
    | <answer>
    | \b(?:final\s+|correct\s+)?(?:answers?|answer\s+choice|solution)\b (?:\s+(?:to|of|for|here)\b[^.\n:$]{0,60}?)?
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
_CLAUSE_END = re.compile(
    r"(?<=[\w)\]}%$*°!])[.!?](?=\s|$|\*)|。|\s+(?:because|since|which|where|as\s+(?:required|desired|needed)|when)\b|[,;]?\s+so\b",
    re.IGNORECASE,
)
# A minus that touches a digit, a letter or a bracket on its left subtracts; one apart from its number is a sign only
# after an equals sign, a colon or an opening bracket.
_SIGN = r"(?:(?<![\w)\]}])[-+−–](?=[\d.$€£\\])|(?<=[=:(] )[-−–](?= \d)|(?<=[=:(])[-−–](?= \d))?"
_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+\.\d+|\d+\.(?=/)|\d+|(?<![\w.])\.\d+"
_NUMBER = re.compile(
    rf"[ ]?(?<![\w.:])\d+(?:[ ]?:[ ]?\d+)+(?![\d:])(?:[ ]?[ap]\.?m\b\.?)?"  # a ratio, a time of day
    rf"|{_SIGN}[ ]?(?:\\?[$€£¥][ ]?)?(?:(?:{_PLAIN})(?:[eE][-+]?\d+)?(?:[ ]?(?:\\times|[×x*])[ ]?10\^\{{?-?\d+\}}?)?)"
    rf"(?:[ ]\d+/\d+|[ ]?/[ ]?\d+)?(?:[ ]?\\?%)?(?:[ ](?:thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_NOTHING = ("none", "null", "nan", "n/a", "[]")  # of Python and JSON, as text


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or the last message of the policy in a list of messages."""
    if isinstance(completion, str):
        return _SPECIAL.sub("", completion)
    if isinstance(completion, Mapping):
        completion = [completion]
    messages = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = messages[-1].get("content") if messages else None
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return _SPECIAL.sub("", content or "")


def final_answer(text: str) -> str | None:
    """The answer that a completion gives, or None if it gives none. Reasoning before `</think>` is not read."""
    text = text.rpartition("</think>")[2]
    found = boxes(text)
    if found is not None:
        return found[-1][2] if found else None
    for reading in (announced, last_mathematics):
        if (answer := reading(text)) is not None:
            return answer
    return None


def boxes_together(text: str) -> list[str]:
    """The boxes at the end that only commas, "and" or "or" part: `\\boxed{3}, \\boxed{4}` is a list."""
    text = text.rpartition("</think>")[2]
    together: list[str] = []
    start = None  # of the box that follows
    for first, end, content in reversed(boxes(text) or []):
        if start is not None and not _SEPARATORS.fullmatch(text[end:start]):
            break
        together.insert(0, content)
        start = first
    return together


def boxes(text: str) -> list[tuple[int, int, str]] | None:
    """Start, end and content of every box with a content; None if there is no box.

    A box that the text ends inside of has no content that can be known: the list is then empty.
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
    """Where the brace closes that opens at a place."""
    closing, opened = {}, []
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def announced(text: str) -> str | None:
    """What follows the last announcement, up to the end of its sentence; None if there is none."""
    return next((answer for rest in announcements(text) if (answer := _clause(rest))), None)


def announcements(text: str) -> Iterator[str]:
    """What follows each announcement, all of it; the last announcement first."""
    for mark in reversed([*_ANNOUNCED.finditer(text)]):
        yield text[mark.end() :].split("</answer>")[0].strip()


def _clause(rest: str) -> str | None:
    """The answer that a text opens with: its mathematics where it has some, else its first clause."""
    block = re.match(r"[*\s]*(\$\$|\\\[)", rest)
    line = rest if block else rest.split("\n", 1)[0]
    first = _MATHEMATICS.search(line)
    if first and not re.search(r"\w", re.sub(r"[a-z]+|\\text", "", line[: first.start()], flags=re.IGNORECASE)):
        if block:
            return _inside(first)
        # Several pieces of mathematics with only separators between them are one list.
        pieces, end = [_inside(first)], first.end()
        while more := re.match(r"(\s*(?:,|;|and|or)*\s*)", line[end:]):
            piece = _MATHEMATICS.match(line, end + more.end())
            if piece is None or not more[1].strip():
                break
            pieces.append(_inside(piece))
            end = piece.end()
        unit = re.match(r"\s*(\\?%|degrees?|percent|[a-zA-Z]+)?", line[end:])
        tail = unit[1] if unit and unit[1] and re.fullmatch(r"\\?%|percent|degrees?", unit[1]) else ""
        return ", ".join(pieces) + (f" {tail}" if tail else "")
    clause = _HEDGE.sub("", _CLAUSE_END.split(line, maxsplit=1)[0])
    return clause.strip().strip("*_`\"'“” ").rstrip(".,;:").strip("*_` ") or None


def _inside(match: re.Match) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def last_mathematics(text: str) -> str | None:
    """The last formula or number of a text; the whole text where it is short and has neither."""
    last = next(iter([*_MATHEMATICS.finditer(text)][-1:]), None)
    number = next(iter([*_NUMBER.finditer(text, last.end() if last else 0)][-1:]), None)
    stripped = text.strip().strip("*`\"'").strip()
    short = "\n" not in stripped and len(stripped) <= 40 and last is None and len(stripped.split()) <= 4
    if short and (number is None or not re.search(r"[a-zA-Z]{2,}\s", text[: number.start()])):
        return stripped.rstrip(".") or None
    if number is not None:
        return number[0].strip()
    return _inside(last) if last else None


def only_number(text: str) -> str | None:
    """The one number of a clause of words, with its unit: `16 dollars` of "that he has 16 dollars"."""
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or re.search(r"[=^<>{}]|\\[a-zA-Z]|\b(?:not|least|most|more|less|over|under|than|or)\b", text):
        return None
    return text[found[0].start() :].strip() if re.search(r"[^\W\d]{2,}\s", text) else None


def last_number(text: str) -> str | None:
    """The last number of a text, with its sign and decimals but no separators: for tasks that are answered by one."""
    found = re.findall(rf"({_SIGN})[ ]?(?:\\?[$€£¥])?({_PLAIN})", text)
    if not found:
        return None
    sign, digits = found[-1]
    return ("-" if sign in ("-", "−", "–") else "") + digits.replace(",", "")


def gold_text(gold: Any) -> str | None:
    """The answer in a cell of a data set, or None if it holds none that can be read."""
    if isinstance(gold, str):
        return _text_of_string(gold.strip())
    if isinstance(gold, Mapping):  # DAPO's `reward_model`
        named = [gold[name] for name in ("ground_truth", "answer", "final_answer") if name in gold]
        return gold_text(named[0]) if named else None
    if isinstance(gold, Sequence):
        parts = [gold_text(part) for part in gold]
        return None if not parts or None in parts else ", ".join(part for part in parts if part)
    if isinstance(gold, float) and math.isfinite(gold) and gold == int(gold) and abs(gold) < 1e15:
        return str(int(gold))
    return repr(gold) if isinstance(gold, int | float) and math.isfinite(gold) else None


def _text_of_string(text: str) -> str | None:
    """Of a worked solution its box, what follows GSM8K's mark, or what it announces; else all of it."""
    if text[:1] == "[" and text[-1:] == "]" and '"' in text:  # a list that was stored as JSON
        with contextlib.suppress(ValueError):
            return gold_text(json.loads(text))
    found = boxes(text)
    if found is not None or re.search(r"\\boxed\s*\{\s*\}", text):
        return found[-1][2] if found else None
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif ("\n" in text or len(text) > 60) and re.search(r"\banswer\b", text, re.IGNORECASE):
        text = announced(text) or text
    readable = re.search(r"\w|\\(?:emptyset|varnothing|infty)|[∅∞]", text) and text.lower() not in _NOTHING
    return text if readable else None
