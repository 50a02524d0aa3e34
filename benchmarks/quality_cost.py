"""Rollouts, tokens and seconds until a target accuracy: TBRM, with and without replay, beside TRL's GRPO and RLOO.

    python benchmarks/quality_cost.py                    # the tiny model; some ten minutes
    python benchmarks/quality_cost.py --model smollm2    # SmolLM2-135M; an hour and more on two cores

Task, models, settings, learning rates and β are those of benchmarks/replay.py. Three seeds; all runs in one process,
one after the other, methods in turn. Writes docs/benchmarks/quality_cost.{json,md,png}. A model's results stay when the
other is measured.
"""

import itertools
import json
import os
import platform
import statistics
from dataclasses import dataclass, replace

import replay
from common.measure import set_up
from common.report import listed, parse, plt, ratios, table, versions, write

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


def until(points: list[list[float]], target: float, place: int) -> float | None:
    """The cost at which the accuracy first reaches the target, straight between two points; None if it never does."""
    for before, after in itertools.pairwise(points):
        if after[2] >= target:
            share = (target - before[2]) / (after[2] - before[2]) if after[2] > before[2] else 0.0
            return before[place] + max(share, 0.0) * (after[place] - before[place])
    return None


def section(name: str, runs: dict[str, list[list[list[float]]]]) -> str:
    target, peer, rows = COMPARISONS[name].target, next(iter(runs)), []
    reached = {
        (configuration, cost): [at for points in seeds if (at := until(points, target, place)) is not None]
        for configuration, seeds in runs.items()
        for cost, place in COSTS.items()
    }
    for configuration, seeds in runs.items():
        cells = []
        for cost in COSTS:
            mine, theirs = reached[configuration, cost], reached[peer, cost]
            cells.append(f"{len(mine)} of {len(seeds)} reach it")
            if len(mine) == len(seeds):
                ratio = f" ({statistics.median(ratios(mine, theirs)):.2f})" if len(theirs) == len(mine) else ""
                cells[-1] = f"{statistics.median(mine):,.{1 if cost == 'seconds' else 0}f}{ratio}"
        rows.append([configuration, *cells, f"{statistics.mean(points[-1][2] for points in seeds):.3f}"])
    title = {"tiny": "Tiny model, sorting letters", "smollm2": "SmolLM2-135M, one-digit sums"}[name]
    return f"""## {title}: accuracy {target}

Medians over {len(SEEDS)} seeds, of the final accuracy the mean; in brackets the median of the ratios to
{peer} at the same seed.

{table(["", *COSTS, "final accuracy"], rows)}
"""


def report(results: dict) -> str:
    environment = listed(results["environment"])
    sections = "\n".join(section(name, results[name]) for name in COMPARISONS if name in results)
    return f"""# What an accuracy costs

Written by `python benchmarks/quality_cost.py`; raw numbers: [quality_cost.json](quality_cost.json). {environment}.

GRPO and RLOO are TRL's, with 8 rollouts per prompt; TBRM has one. Learning rate and β were selected for each method on
other problems and seeds ([replay.md](replay.md)), on the tiny model alone: on SmolLM2 nothing was tuned, and GRPO and
RLOO have a learning rate of 1e-5, TBRM of 2e-5. All make the same number of updates on equally many trajectories; with
replay, K − 1 of K updates generate nothing. Seconds are of training without the measurements of accuracy.

{sections}
![accuracy against cost](quality_cost.png)
"""


def draw(results: dict) -> plt.Figure:
    names = [name for name in COMPARISONS if name in results]
    figure, axes = plt.subplots(len(names), len(COSTS), figsize=(11, 3.3 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, (cost, place) in zip(row, COSTS.items(), strict=True):
            for number, (configuration, seeds) in enumerate(results[name].items()):
                for seed, points in enumerate(seeds):
                    label = None if seed else configuration
                    xs, ys = [point[place] for point in points], [point[2] for point in points]
                    axis.plot(xs, ys, color=f"C{number}", alpha=0.7, label=label)
            axis.axhline(COMPARISONS[name].target, color="k", linewidth=0.7, linestyle=":")
            axis.set(xlabel=cost, ylabel="accuracy", title=name)
            axis.locator_params(axis="x", nbins=5)
        row[0].legend(frameon=False)
    return figure


def main() -> None:
    arguments = parse(__doc__, model=dict(choices=list(COMPARISONS), default="tiny"))
    comparison, file = COMPARISONS[arguments.model], arguments.output / "quality_cost.json"
    set_up(comparison.threads)
    runs: dict[str, list] = {configuration: [] for configuration in comparison.chosen}
    results = json.loads(file.read_text()) if file.exists() else {}
    results["environment"] = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **versions("torch", "transformers", "trl"),
    }
    for seed in SEEDS:
        for name, chosen in comparison.chosen.items():
            run = replay.Run(arguments.model, "final", replay.CONFIGURATIONS[name], *chosen, seed)
            points = replay.train(run, comparison.settings).points
            if points[0][0] != 0:  # SmolLM2's first configuration measures the start of all
                points.insert(0, runs["GRPO K=1"][seed][0])
            runs[name].append(points)
            print(f"{run}: {points[-1][2]:.3f}", flush=True)
        results[arguments.model] = runs
        # After each seed, so that an interruption costs one.
        write(arguments.output, "quality_cost", report(results), results, draw(results))


if __name__ == "__main__":
    main()
