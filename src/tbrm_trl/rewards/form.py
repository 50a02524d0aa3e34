"""Rewards for form and length, which do not depend on whether the answer is right."""

import re
from collections.abc import Sequence
from typing import Any

from .reading import boxes, completion_text, last_message

_THINKING = re.compile(r"\s*(?:<think>)?(?:(?!</?think>).)*</think>\s*(?=\S)(?:(?!</?think>).)*", re.DOTALL)


def boxed(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion has an answer in a closed box that is not empty, else 0."""
    return [float(bool(boxes(completion_text(one).rpartition("</think>")[2]))) for one in completions]


def thinking(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where reasoning ends with exactly one `</think>` and an answer follows, else 0. The prompt may hold `<think>`.

    TRL removes the marks from a response that it parses. The reasoning is then in its own field of the message.
    """
    return [float(_THINKING.fullmatch(_with_reasoning(one)) is not None) for one in completions]


def _with_reasoning(completion: Any) -> str:
    """The text of a completion, after the reasoning field of the policy's last message in `<think>` marks."""
    text = completion_text(completion)
    if isinstance(completion, str):
        return text
    message = last_message(completion)
    reasoning = message.get("reasoning_content") or message.get("thinking") or ""
    return f"<think>{reasoning}</think>{text}" if reasoning.strip() else text


class Length:
    """0 up to `free` tokens, then falling linearly to -1 at `limit` and beyond, like DAPO's length penalty.

    The length is the number of completion tokens, or of characters if called without token ids.

    Raises:
        ValueError: unless both are whole numbers and 0 ≤ free < limit.
    """

    __name__ = "length"

    def __init__(self, limit: int, free: int = 0) -> None:
        if not all(isinstance(one, int) for one in (limit, free)) or not 0 <= free < limit:
            raise ValueError(f"length needs whole numbers 0 ≤ free < limit, not free={free!r} and limit={limit!r}.")
        self.limit, self.free = limit, free

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        lengths = [len(ids) for ids in completion_ids or map(completion_text, completions)]
        return [-min(1.0, max(0.0, (length - self.free) / (self.limit - self.free))) for length in lengths]
