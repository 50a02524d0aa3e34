"""Make text of models and data sets safe to print."""

import unicodedata
from collections import deque
from typing import Any


def printable(value: Any) -> Any:
    """Write out the control characters in text, messages or columns: `\\x1b` becomes four characters.

    A terminal obeys control characters, and a completion may contain any. Line feeds and tabs stay unchanged.
    """
    if isinstance(value, str):
        return "".join(map(_written_out, value))
    if isinstance(value, dict):
        return {printable(name): printable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [printable(one) for one in value]
    return value


def _written_out(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    return character.encode("unicode_escape").decode()
