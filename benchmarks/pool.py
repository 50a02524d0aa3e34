"""What a pool of rollouts saves on long-tailed lengths: decode steps, rows in them, and seconds of a step.

    python benchmarks/pool.py              # SmolLM2-135M; about an hour on two quiet cores
    python benchmarks/pool.py --quick      # a tiny model, in seconds, to a temporary folder

Counts are exact, whatever else the machine does. Writes docs/benchmarks/pool.{json,md,png}.
"""

import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import step
import torch
from common import tasks, tiny
from common.measure import quiet, set_up
from common.report import parse, plt, ratios, table, wrapped, write
from torch import Tensor
from transformers import LogitsProcessor, TrainerCallback

from tbrm_trl.sources.pool import PoolRow, RolloutPool

SIZES = (0, 4, 8, 16, 32, 64)  # of `rollout_pool`
TIMED = {"GRPO β>0": ("GRPO β>0", 0), "TBRM": ("TBRM", 0), "TBRM with a pool": ("TBRM", 16)}


# ---- counts ----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What decoding `windows` windows takes. The prompts are read once each in any case, and are not counted.

    Attributes:
        steps: forward passes that draw a token for every row in them.
        row_steps: rows of these, summed.
        read_again: tokens of rows that went on under a new policy.
        staleness: of each row, updates from its first token to its window.
        mixed: rows that several policies have drawn.
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
    """A decoder that counts and draws no tokens: each row ends at the length that it has in the plan."""

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


# ---- seconds ---------------------------------------------------------------------------------------------------------


class ByPrompt(LogitsProcessor):
    """Each prompt's completion ends at its own length, not before, wherever and whenever it is drawn."""

    def __init__(self, lengths: dict[tuple[int, ...], int], prompt: int, end_token: int):
        self.lengths, self.prompt, self.end_token = lengths, prompt, end_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self.prompt + 1  # with the token that is drawn now
        keys = map(tuple, input_ids[:, : self.prompt].tolist())
        ends = torch.tensor([drawn >= self.lengths[key] for key in keys], device=scores.device)  # (B,)
        scores = scores.masked_fill(ends.unsqueeze(1), -torch.inf)  # (B, V)
        scores[:, self.end_token] = torch.where(ends, 0.0, -torch.inf).to(scores.dtype)  # (B,)
        return scores


class Updates(TrainerCallback):
    """When each update was over, its log included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" not in logs:
            self.ends.append(time.perf_counter())


def seconds(method: str, ahead: int, work: step.Work, windows: int, seed: int) -> list[float]:
    """Of each step after the first epoch of four windows, in which the pool fills."""
    more = {"rollout_pool": ahead} if ahead else {}
    updates = Updates()
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = step.trainer_of(method, replace(work, warm_up=work.lengths), Path(folder), seed, windows, **more)
        trainer.add_callback(updates)
        if ahead:
            tokenizer, model = trainer.processing_class, trainer.model
            ids = tokenizer(text=list(trainer.train_dataset["prompt"]))["input_ids"]
            planned = dict(zip(map(tuple, ids), itertools.cycle(work.lengths), strict=False))
            processors, plan = model._get_logits_processor, ByPrompt(planned, work.prompt, tokenizer.eos_token_id)

            def with_plan(*args: Any, **kwargs: Any) -> Any:
                given = processors(*args, **kwargs)
                given.append(plan)
                return given

            model._get_logits_processor = with_plan
        else:
            full = replace(work, warm_up=work.lengths)
            step.Plan(full, windows, trainer.processing_class, step.Clock()).govern(trainer.model)
        trainer.train()
    return [later - earlier for earlier, later in itertools.pairwise(updates.ends)][3:]


# ---- all of it -------------------------------------------------------------------------------------------------------


def report(counts: dict[int, Counts], measured: dict[str, list[list[float]]], work: step.Work) -> str:
    alone = counts[0]
    longest = max(work.lengths) * alone.windows
    rows = [
        [
            "until the longest",
            f"{longest / alone.windows:.1f}",
            f"{longest * alone.places / alone.windows:.0f}",
            "0",
            *["–"] * 4,
        ]
    ]
    for size, one in counts.items():
        rows.append(
            [
                str(size), f"{one.steps / one.windows:.1f}", f"{one.row_steps / one.windows:.0f}",
                f"{one.read_again / one.windows:.0f}", f"{one.occupancy:.2f}", f"{statistics.mean(one.staleness):.2f}",
                str(max(one.staleness)), f"{one.mixed / len(one.staleness):.2f}",
            ]
        )  # fmt: skip
    header = [
        "`rollout_pool`",
        "steps",
        "rows in them",
        "tokens read again",
        "occupancy",
        "staleness",
        "largest",
        "mixed",
    ]
    counted = f"""Per window of {alone.places} rows, over {alone.windows} windows, each of completions of
        {", ".join(map(str, sorted(work.lengths)))} tokens in another order. The first line is a batch in which every
        row is computed until the longest has ended. No other computes a row that has ended."""
    timed = """Seconds of a step, generation included, after the first four windows; medians over repetitions, and the
        ratio to GRPO with β > 0 within a repetition."""
    means = {name: list(map(statistics.mean, of)) for name, of in measured.items() if of}
    times = [
        [name, f"{statistics.median(of):.2f}", step.spread(ratios(of, means[step.PEER]))] for name, of in means.items()
    ]
    return f"""# What a pool of rollouts saves

Written by `python benchmarks/pool.py`. Raw numbers: [pool.json](pool.json).

![occupancy by the size of the pool](pool.png)

## Counts

{wrapped(counted)}

{table(header, rows)}

## Seconds

{wrapped(timed)}

{table(["", "step, s", "of GRPO β>0"], times)}
"""


def draw(counts: dict[int, Counts]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot([*counts], [one.occupancy for one in counts.values()], marker="o")
    axes.set(xlabel="rollout_pool", ylabel="rows in a decode step, of its places", ylim=(0, 1))
    return figure


def main() -> None:
    options: dict[str, Any] = {
        "model": dict(help="folder of a causal language model (default: SmolLM2-135M)"),
        "repetitions": dict(type=int, help="default: 4, with --quick 1; 0 counts alone"),
        "windows": dict(type=int, help="default: 16, four of which are a warm-up; with --quick 8"),
        "threads": dict(type=int, default=2),
    }
    arguments = parse(__doc__, quick="a tiny model and few tokens", **options)
    set_up(arguments.threads)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or (tiny.save(Path(folder) / "tiny", "llama") if quick else tasks.smollm2())
        work = step.works(model, 16, 4, 32, 16 if quick else 64, None)["long_tail"]
        drawn = [random.Random(window).sample(work.lengths, len(work.lengths)) for window in range(200)]
        counts = {size: count(drawn, size) for size in SIZES}
        windows = arguments.windows or (8 if quick else 16)
        measured: dict[str, list[list[float]]] = {name: [] for name in TIMED}
        repetitions = (1 if quick else 4) if arguments.repetitions is None else arguments.repetitions
        for repetition in range(repetitions):
            turn = repetition % len(TIMED)
            for name in [*TIMED, *TIMED][turn : turn + len(TIMED)]:
                of = seconds(*TIMED[name], work.in_order_of(repetition), windows, repetition)
                measured[name].append(of)
                print(f"{repetition} {name}: {statistics.mean(of):.2f} s", file=sys.stderr)
    raw = {"environment": step.environment(arguments.threads), "counts": counts, "seconds": measured}
    write(arguments.output, "pool", report(counts, measured, work), raw, draw(counts))


if __name__ == "__main__":
    main()
