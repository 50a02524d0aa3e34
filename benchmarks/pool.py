"""What a pool of rollouts saves on long-tailed lengths: decode steps, and the rows in them.

    python benchmarks/pool.py              # seconds: counts are exact, and no model is needed
    python benchmarks/pool.py --quick      # fewer windows, to a temporary folder

Writes docs/benchmarks/pool.{json,md,png}. `benchmarks/paired_steps.py` measures seconds.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import step
from common.report import parse, plt, table, wrapped, write

from tbrm_trl.sources.pool import PoolRow, RolloutPool

SIZES = (0, 4, 8, 16, 32, 48, 64)  # of `rollout_pool`


# ---- counts ----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """The work of decoding `windows` windows. Prompts are not counted: each is read once in any case.

    Attributes:
        steps: forward passes that draw a token for every row in them.
        row_steps: rows in these passes, summed.
        read_again: tokens that are read again because their row goes on under a new policy.
        staleness: for each row, the updates from its first token to its window.
        mixed: rows that more than one policy has drawn.
    """

    windows: int
    places: int
    steps: int = 0
    row_steps: int = 0
    read_again: int = 0
    staleness: list[int] = field(default_factory=list)
    mixed: int = 0

    @property
    def occupancy(self) -> float:
        return self.row_steps / (self.steps * self.places)


class PlannedDecoder:
    """A decoder that counts steps instead of drawing tokens. Each row ends at its planned length."""

    def __init__(self, lengths: Sequence[Sequence[int]], counts: Counts):
        self.lengths, self.counts = lengths, counts

    def has_ended(self, row: PoolRow) -> bool:
        return len(row.completion_ids) == self.lengths[row.window][row.place]

    def run(self, more: Any, is_done: Any) -> None:
        rows: list[PoolRow] = []
        while not is_done():
            started = more(self.counts.places - len(rows))
            self.counts.read_again += sum(len(row.completion_ids) for row in started)
            rows = [*rows, *started]
            for row in rows:
                row.completion_ids.append(0)
            self.counts.steps += 1
            self.counts.row_steps += len(rows)
            rows = [row for row in rows if not self.has_ended(row)]


def count(lengths: Sequence[Sequence[int]], ahead: int) -> Counts:
    """Decode windows of these lengths, one update after each."""
    counts = Counts(len(lengths), len(lengths[0]))
    pool = RolloutPool(ahead, lambda window: [[0]] * counts.places, lambda: len(lengths))
    decoder = PlannedDecoder(lengths, counts)
    for window in range(len(lengths)):
        for row in pool.draw(window, [[0]] * counts.places, window, decoder):
            counts.staleness.append(window - row.steps[0])
            counts.mixed += row.steps[0] != row.steps[-1]
    return counts


# ---- all of it -------------------------------------------------------------------------------------------------------


def report(counts: dict[int, Counts], work: step.Work) -> str:
    alone = counts[0]
    longest = max(work.lengths)
    rows = [["until the longest", str(longest), str(longest * alone.places), "0", *["–"] * 4]]
    for size, one in counts.items():
        rows.append(
            [
                str(size), f"{one.steps / one.windows:.1f}", f"{one.row_steps / one.windows:.0f}",
                f"{one.read_again / one.windows:.0f}", f"{one.occupancy:.2f}", f"{statistics.mean(one.staleness):.2f}",
                str(max(one.staleness)), f"{one.mixed / len(one.staleness):.2f}",
            ]
        )  # fmt: skip
    header = [
        "`rollout_pool`", "steps", "rows in them", "tokens read again", "occupancy", "staleness", "largest", "mixed",
    ]  # fmt: skip
    counted = f"""Per window of {alone.places} rows, over {alone.windows} windows, each of completions of
        {", ".join(map(str, sorted(work.lengths)))} tokens in another order. The first line is a batch in which every
        row is computed until the longest has ended. No other computes a row that has ended."""
    return f"""# What a pool of rollouts saves

Written by `python benchmarks/pool.py`. Raw numbers: [pool.json](pool.json). Seconds of a step:
[paired_steps.md](paired_steps.md).

![occupancy by the size of the pool](pool.png)

{wrapped(counted)}

{table(header, rows)}
"""


def draw(counts: dict[int, Counts]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot([*counts], [one.occupancy for one in counts.values()], marker="o")
    axes.set(xlabel="rollout_pool", ylabel="rows in a decode step, of its places", ylim=(0, 1))
    return figure


def main() -> None:
    arguments = parse(__doc__, quick="fewer windows")
    work = step.works("", 16, 4, 32, 64, None)["long_tail"]
    windows = 20 if arguments.quick else 200
    drawn = [random.Random(window).sample(work.lengths, len(work.lengths)) for window in range(windows)]
    counts = {size: count(drawn, size) for size in SIZES}
    write(arguments.output, "pool", report(counts, work), {"counts": counts}, draw(counts))


if __name__ == "__main__":
    main()
