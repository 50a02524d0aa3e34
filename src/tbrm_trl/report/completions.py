"""Choose the completions that a report shows: a sample of those that a run saved."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..run_log import trajectory_ids
from .charts import plain
from .run import Rollouts, Updates

SHOWN = 1000
CHARACTERS = 3000  # most characters of one text; a longer text loses its middle
_COLUMNS = ("prompt", "completion", "prompt_ids", "completion_ids", "reward", "end", "policy_step")


def completions_of(rollouts: Rollouts, updates: Updates, characters: int) -> list[dict[str, Any]]:
    """A sample spread evenly over policy steps, and over rewards within each step.

    Each completion has β δ, β V and its origin from the last update that trained on it.

    Args:
        rollouts: a run's rollouts.
        updates: the same run's updates.
        characters: most characters of all texts together. One completion is shown even if it has more.
    """
    order = np.lexsort((rollouts.reward, np.nan_to_num(rollouts.policy_step, nan=-1)))
    read = _shown(rollouts.rows(order[_spread(len(order), SHOWN)], _COLUMNS), updates)
    rows = read
    while True:
        size = sum(len(row["prompt"]) + len(row["completion"]) + 150 for row in rows)
        if size <= characters or len(rows) == 1:
            return rows
        number = max(1, min(len(rows) - 1, int(len(rows) * characters / size)))
        rows = [read[place] for place in _spread(len(read), number)]


def _spread(number: int, most: int) -> np.ndarray:
    """At most `most` of the places 0 to `number - 1`, spread evenly."""
    return np.linspace(0, number - 1, min(most, number)).astype(int)


def _shown(rows: list[dict[str, Any]], updates: Updates) -> list[dict[str, Any]]:
    ids, prompts = trajectory_ids([(row["prompt_ids"], row["completion_ids"]) for row in rows])
    wanted = np.flatnonzero(np.isin(updates.id, ids))
    last = {str(updates.id[place]): place for place in wanted}  # the latest, since updates are in order
    shown = []
    for row, one, prompt in zip(rows, ids, prompts, strict=True):
        place = last.get(one)
        residual, value = (updates.residual[place], updates.soft_value[place]) if place is not None else (np.nan,) * 2
        shown.append(
            {
                "update": None if row["policy_step"] is None else row["policy_step"] + 1,
                "reward": row["reward"] if row["reward"] is None else plain([row["reward"]])[0],
                "residual": plain([residual])[0],
                "soft_value": plain([value])[0],
                "origin": None if place is None else str(updates.origin[place]),
                "last_update": None if place is None else int(updates.step[place]),
                "length": len(row["completion_ids"]),
                "end": row["end"],
                "prompt_id": prompt,
                "prompt": shortened(text_of(row.get("prompt"))),
                "completion": shortened(text_of(row.get("completion"))),
            }
        )
    return shown


def text_of(value: Any) -> str:
    """Text as it is, messages one after the other with their roles, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable) and all(isinstance(one, dict) and "role" in one for one in value):
        return "\n".join(_message(one) for one in value)
    return json.dumps(value, ensure_ascii=False)


def _message(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    said = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]
    calls = message.get("tool_calls")
    return f"[{message['role']}] " + "\n".join(said + ([json.dumps(calls, ensure_ascii=False)] if calls else []))


def shortened(text: str) -> str:
    if len(text) <= CHARACTERS:
        return text
    head, tail = CHARACTERS * 2 // 3, CHARACTERS // 3
    return f"{text[:head]}\n[… {len(text) - head - tail} characters are not shown …]\n{text[-tail:]}"
