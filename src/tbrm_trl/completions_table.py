"""The table of completions that a run prints, saves and sends to its trackers: TRL's with more columns and rows."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from accelerate.utils import gather_object

from .trajectory import Trajectory, UpdateRow

Cells = dict[str, Any]  # one row's values by column, those that TRL's table lacks
UNKNOWN: Cells = {"advantage": math.nan, "soft_value": math.nan, "reward": math.nan, "origin": None}


class CompletionsTable:
    """Adds columns to TRL's table of rollouts, and rows for an update's replayed and logged trajectories.

    A rollout enters TRL's table when it is generated. It gets its residual and its origin once it was in an update.

    Args:
        size: number of rows of TRL's table that this process generates.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.generations: deque[list[Cells]] = deque()  # cells of this process's rows, by generation
        self.places: dict[str, dict[int, Cells]] = {}  # by mode: id of a trajectory of the last generation → its cells

    def add(self, trajectories: Sequence[Trajectory], mode: str) -> None:
        """Add the rollouts of a generation, in the order TRL returned them. `mode` is "train" or "eval"."""
        cells = [UNKNOWN | {"reward": one.reward, "rewards": one.rewards} for one in trajectories]
        self.generations.append(cells)
        self.places[mode] = {id(one): of_one for one, of_one in zip(trajectories, cells, strict=True)}
        while sum(map(len, self.generations)) - len(self.generations[0]) >= self.size:
            self.generations.popleft()

    def set(self, rows: Sequence[UpdateRow], residual: Sequence[float], soft_value: Sequence[float], mode: str) -> None:
        """Fill in β δ and β V of a micro-batch's rows."""
        places = self.places.get(mode, {})
        for row, *values in zip(rows, residual, soft_value, strict=True):
            if id(row.trajectory) in places:
                origin = row.origin if mode == "train" else "evaluation"
                places[id(row.trajectory)].update(_cells(row, *values) | {"origin": origin})

    def beside(self, logs: dict[str, Any], scored: Iterable[tuple[UpdateRow, float, float]], tokenizer: Any) -> Any:
        """The whole table, in the format of TRL's `_logs`. All processes call this.

        Args:
            logs: TRL's table, with the rollouts of all processes. It is not changed.
            scored: the rows of this process's last update, with β δ and β V. Replayed and logged rows are added to
                the table.
            tokenizer: decodes the prompts and completions of the added rows.
        """
        by_process = zip(*gather_object([list(self.generations)]), strict=True)
        rollouts = [cells for generation in by_process for of_process in generation for cells in of_process]
        count = len(logs["prompt"])
        rollouts = ([UNKNOWN] * count + rollouts)[len(rollouts) :]  # a checkpoint of an older version has no cells

        others = [
            (row.trajectory, _cells(row, *values)) for row, *values in scored if row.origin in ("replayed", "logged")
        ]
        texts = [[tokenizer.decode(ids) for ids in (one.prompt_ids, one.completion_ids)] for one, _ in others]
        added = gather_object([(*text, cells) for text, (_, cells) in zip(texts, others, strict=True)])
        prompts, completions, cells = zip(*added, strict=True) if added else ((), (), ())
        if count and not isinstance(logs["prompt"][0], str):
            prompts, completions = _messages("user", prompts), _messages("assistant", completions)
        columns = {name: [one[name] for one in (*rollouts, *cells)] for name in UNKNOWN}
        rewards = [one.get("rewards", {}) for one in (*rollouts, *cells)]
        found = set(chain(*rewards))
        names = [*(name for name in logs["rewards"] if name in found), *sorted(found - {*logs["rewards"]})]
        by_function = {name: [one.get(name, math.nan) for one in rewards] for name in names}
        given = {*by_function, *logs["extra"]}
        return {
            "images": [*logs["images"], *([None] * len(added) if logs["images"] else ())],
            "prompt": [*logs["prompt"], *prompts],
            "completion": [*logs["completion"], *completions],
            "rewards": by_function,
            "advantages": columns.pop("advantage"),
            "extra": {
                name: [*[None] * (count - len(values)), *values, *[None] * len(added)]  # a function may begin late
                for name, values in logs["extra"].items()
            }
            | {name: values for name, values in columns.items() if name not in given},
        }

    def state(self, window: Sequence[Trajectory]) -> dict[str, Any]:
        """Plain values for a checkpoint. The checkpoint holds the trajectories of `window`."""
        number = {id(cells): (i, j) for i, of_one in enumerate(self.generations) for j, cells in enumerate(of_one)}
        places = self.places.get("train", {})
        found = [number.get(id(places.get(id(trajectory)))) for trajectory in window]
        return {"generations": list(self.generations), "places": found}

    def restore(self, state: dict[str, Any], window: Sequence[Trajectory]) -> None:
        """Continue from the values that `state` returned."""
        self.generations = deque(state["generations"])
        found = [(id(one), place) for one, place in zip(window, state["places"], strict=True) if place]
        self.places = {"train": {one: self.generations[i][j] for one, (i, j) in found}}


def _cells(row: UpdateRow, residual: float, soft_value: float) -> Cells:
    """Make the cells of a row. A row that does not count has no residual and no soft value."""
    numbers = {"advantage": residual, "soft_value": soft_value} if row.left_out is None else {}
    of_trajectory = {"reward": row.trajectory.reward, "rewards": row.trajectory.rewards}
    return UNKNOWN | numbers | of_trajectory | {"origin": row.origin}


def _messages(role: str, texts: Iterable[str]) -> Any:
    return [[{"role": role, "content": text}] for text in texts]
