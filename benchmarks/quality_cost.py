"""Rollouts, tokens and seconds until a target accuracy: TBRM, with and without replay, beside TRL's GRPO and RLOO.

    python benchmarks/quality_cost.py                    # the tiny model; some ten minutes
    python benchmarks/quality_cost.py --model smollm2    # SmolLM2-135M; an hour and more on two cores

Task, models and settings are those of benchmarks/replay.py, whose selection of learning rate and β this takes over.
Three seeds, all runs one after the other in one process, methods in turn. Writes
docs/benchmarks/quality_cost.{json,md,png}; a model's results stay when the other is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import replay
import torch
from transformers import PreTrainedModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (0, 1, 2)
COSTS = {"rollouts": 1, "generated tokens": 3, "seconds": 4}  # their place in a point


@dataclass(frozen=True)
class Comparison:
    """What is compared on one model: per configuration of replay.py its learning rate, β and buffer size."""

    target: float
    settings: replay.Settings
    chosen: dict[str, tuple[float, float, int]]
    threads: int


COMPARISONS = {
    "tiny": Comparison(
        0.6,
        replay.TINY,
        {
            "GRPO K=1": (2e-3, 0.04, 0),
            "RLOO K=1": (2e-3, 0.05, 0),
            "TBRM K=1": (1e-3, 0.05, 0),
            "TBRM K=4 replay": (1e-3, 0.05, 256),
        },
        threads=1,
    ),
    "smollm2": Comparison(
        0.4,
        replace(replay.SMOLLM2, evaluations=(4, 8, 12, 16)),
        {
            "GRPO K=1": (1e-5, 0.0, 0),
            "RLOO K=1": (1e-5, 0.05, 0),
            "TBRM K=1": (2e-5, 0.02, 0),
            "TBRM K=2 replay": (2e-5, 0.02, 64),
        },
        threads=os.cpu_count() or 1,
    ),
}


class Costs(replay.Measure):
    """Points [updates, rollouts, accuracy, generated tokens, seconds of training without the measuring]."""

    def __init__(self, task: replay.Task, evaluations: Iterable[int]) -> None:
        super().__init__(task, evaluations)
        self.tokens, self.measuring, self.started = 0, 0.0, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.measuring = time.perf_counter(), 0.0

    def reward(self, prompts, **kwargs) -> list[float]:
        self.tokens += sum(map(len, kwargs["completion_ids"]))
        return super().reward(prompts=prompts, **kwargs)

    def measure(self, updates: int, model: PreTrainedModel) -> None:
        begin = time.perf_counter()
        seconds = begin - self.started - self.measuring if updates else 0.0
        super().measure(updates, model)
        self.points[-1] += [self.tokens, round(seconds, 2)]
        self.measuring += time.perf_counter() - begin


def until(points: list[list[float]], target: float, place: int) -> float | None:
    """The cost at which the accuracy first reaches the target, straight between two points; None if it never does."""
    for before, after in itertools.pairwise(points):
        if after[2] >= target:
            share = (target - before[2]) / (after[2] - before[2]) if after[2] > before[2] else 0.0
            return before[place] + max(share, 0.0) * (after[place] - before[place])
    return None


def section(name: str, runs: dict[str, list[list[list[float]]]]) -> str:
    comparison = COMPARISONS[name]
    rows: list[str] = []
    peer: dict[str, list[float]] = {}
    for configuration, seeds in runs.items():
        cells = []
        for cost, place in COSTS.items():
            reached = [at for points in seeds if (at := until(points, comparison.target, place)) is not None]
            if len(reached) < len(seeds):
                cells.append(f"{len(reached)} of {len(seeds)} reach it")
                continue
            peer.setdefault(cost, reached)
            ratio = statistics.median(mine / theirs for mine, theirs in zip(reached, peer[cost], strict=True))
            middle = statistics.median(reached)
            cells.append(f"{middle:,.1f} ({ratio:.2f})" if cost == "seconds" else f"{middle:,.0f} ({ratio:.2f})")
        final = statistics.mean(points[-1][2] for points in seeds)
        rows.append(f"| {configuration} | {' | '.join(cells)} | {final:.3f} |")
    title = {"tiny": "Tiny model, sorting letters", "smollm2": "SmolLM2-135M, one-digit sums"}[name]
    return f"""## {title}: accuracy {comparison.target}

Medians over {len(SEEDS)} seeds, of the final accuracy the mean; in brackets the median of the ratios to
{next(iter(runs))} at the same seed.

| | {" | ".join(COSTS)} | final accuracy |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def report(results: dict) -> str:
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    sections = [section(name, results[name]) for name in COMPARISONS if name in results]
    return f"""# What an accuracy costs

Written by `python benchmarks/quality_cost.py`; raw numbers: [quality_cost.json](quality_cost.json). {environment}.

GRPO and RLOO are TRL's, with 8 rollouts per prompt; TBRM has one. Learning rate and β were selected for each method on
other problems and seeds ([replay.md](replay.md)), on the tiny model alone: on SmolLM2 nothing was tuned, and GRPO and
RLOO have a learning rate of 1e-5, TBRM of 2e-5. All make the same number of updates on equally many trajectories; with
replay, K − 1 of K updates generate nothing. Seconds are of training without the measurements of accuracy.

{chr(10).join(sections)}
![accuracy against cost](quality_cost.png)
"""


def draw(results: dict, file: Path) -> None:
    names = [name for name in COMPARISONS if name in results]
    figure, axes = plt.subplots(
        len(names), len(COSTS), figsize=(11, 3.3 * len(names)), constrained_layout=True, squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        for axis, (cost, place) in zip(row, COSTS.items(), strict=True):
            for number, (configuration, seeds) in enumerate(results[name].items()):
                for points in seeds:
                    label = configuration if points is seeds[0] else None
                    xs, ys = [point[place] for point in points], [point[2] for point in points]
                    axis.plot(xs, ys, color=f"C{number}", alpha=0.7, label=label)
            axis.axhline(COMPARISONS[name].target, color="k", linewidth=0.7, linestyle=":")
            axis.set(xlabel=cost, ylabel="accuracy", title=name)
            axis.locator_params(axis="x", nbins=5)
        row[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(COMPARISONS), default="tiny")
    parser.add_argument("--output", type=Path, default=replay.ROOT / "docs/benchmarks")
    arguments = parser.parse_args()
    comparison, file = COMPARISONS[arguments.model], arguments.output / "quality_cost.json"
    torch.set_num_threads(comparison.threads)
    replay.start_worker(comparison.threads)
    runs: dict[str, list] = {configuration: [] for configuration in comparison.chosen}
    results = json.loads(file.read_text()) if file.exists() else {}
    results["environment"] = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
    }
    for seed in SEEDS:
        for name, (learning_rate, beta, buffer_size) in comparison.chosen.items():
            configuration = replay.CONFIGURATIONS[name]
            run = replay.Run(arguments.model, "final", configuration, learning_rate, beta, buffer_size, seed)
            points = replay.train(run, comparison.settings, Costs)["points"]
            if points[0][0] != 0:  # of SmolLM2 the first one measures the common start
                points.insert(0, runs["GRPO K=1"][seed][0])
            runs[name].append(points)
            print(f"{run}: {points[-1][2]:.3f}", flush=True)
        results[arguments.model] = runs
        file.write_text(json.dumps(results, indent=1) + "\n")  # after each seed, so that an interruption costs one
    (arguments.output / "quality_cost.md").write_text(report(results))
    draw(results, arguments.output / "quality_cost.png")
    print(report(results))


if __name__ == "__main__":
    main()
