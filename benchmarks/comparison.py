"""TBRM compared with TRL's GRPO and RLOO and with A*-PO: accuracy against rollouts and seconds, all tuned alike.

    python benchmarks/comparison.py                                     # the tiny model, a quarter of an hour
    python benchmarks/comparison.py --tasks sums --minutes 60           # SmolLM2-135M: continues for an hour
    python benchmarks/comparison.py --tasks sums --methods GRPO TBRM    # these two first
    python benchmarks/comparison.py --tasks operations-lora             # with adapters
    python benchmarks/comparison.py --quick                             # short runs, to a temporary folder

Each method has a learning rate and one knob of its own. A coordinate search selects both, on problems and seeds that no
final run sees: first the rate at the knob's first value, then the knob at that rate. If the best rate is the lowest or
the highest, the search tries the next one, and every method gets as many rates. The criterion is the area under the
curve of accuracy against rollouts. On some tasks the two best candidates of each method are then run with more seeds,
since one seed may favour a rate at the edge of stability. The final runs are paired by seed, which sets the model's
start, the problems and their order.

Finished runs are kept in docs/benchmarks/comparison.json and are not repeated. Delete the file to start over.
"""

import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import tasks
from common.measure import set_up
from common.report import (
    Store,
    area,
    band,
    interval,
    listed,
    parse,
    plt,
    processor,
    show,
    table,
    versions,
    wrapped,
    write,
)
from common.runs import carry_out
from peft import LoraConfig

PEER, GAIN = "GRPO", 0.1
COLOURS = [*(f"C{number}" for number in range(10)), "black"]  # of the methods


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A trainer, its options, and its knob: for each named value, the options that it sets."""

    trainer: str  # a key of `tasks.METHODS`
    knob: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


_GROUPS: dict[str, dict[str, Any]] = {f"n = {n}": dict(num_generations=n) for n in (8, 4, 16)}
_OFFSET: dict[str, Any] = dict(soft_value_offset=True)
METHODS = {
    "GRPO": Method("GRPO", _GROUPS, dict(beta=0.0)),
    "GRPO, windows used K times": Method(
        "GRPO",
        {f"K = {k}": dict(num_iterations=k) for k in (2, 3, 4)},
        dict(beta=0.0, num_generations=8),
    ),
    "RLOO": Method("RLOO", _GROUPS, dict(beta=0.0)),
    "A*-PO": Method("TBRM", {f"N = {n}": dict(soft_value_samples=n) for n in (8, 4, 2)}, dict(soft_value="optimal")),
    "TBRM": Method(
        "TBRM",
        {
            "no offset": {},
            "offset, η = 0.03": dict(soft_value_learning_rate=0.03, **_OFFSET),
            "offset, η = 0.1": dict(soft_value_learning_rate=0.1, **_OFFSET),
        },
        dict(soft_value="calibrated"),
    ),
    "TBRM, tracked": Method(
        "TBRM",
        {"V of rewards": {}, "V of values": dict(soft_value_tracks="value"), "V kept": dict(soft_value_kept=1.0)},
        dict(soft_value="tracked"),
    ),
    "TBRM, group": Method("TBRM", _GROUPS, dict(soft_value="group")),
    "TBRM with replay": Method(
        "TBRM",
        {
            "K = 2": dict(num_iterations=2),
            "K = 4": dict(num_iterations=4),
            "K = 4, offset, η = 0.03": dict(num_iterations=4, soft_value_learning_rate=0.03, **_OFFSET),
        },
        dict(soft_value="calibrated"),
    ),
    "TBRM, V = 0, with replay": Method(
        "TBRM", {f"K = {k}": dict(num_iterations=k) for k in (4, 2, 3)}, dict(soft_value="zero")
    ),
    "TBRM, V = b/β": Method(
        "TBRM",
        {
            "b = mean reward": dict(reward_baseline="batch_mean"),
            "b = 0.1": dict(reward_baseline=0.1),
            "b = 0.3": dict(reward_baseline=0.3),
        },
        dict(soft_value="zero"),
    ),
    "TBRM, V = b/β, with replay": Method(
        "TBRM",
        {f"K = {k}, b = {b}": dict(num_iterations=k, reward_baseline=b) for k, b in ((2, 0.1), (4, 0.1), (2, 0.2))},
        dict(soft_value="zero"),
    ),
}


def first_knob(method: str) -> str:
    """The knob's value at which the learning rate is selected."""
    return next(iter(METHODS[method].knob))


@dataclass(frozen=True)
class Setting:
    """What is compared on one task, and sizes."""

    title: str
    task: str  # its name for `tasks.named`
    updates: int
    rows: int  # trajectories per update
    every: int  # updates between two measurements of a final run
    of_selection: int  # updates between two measurements of a search run
    rates: tuple[float, ...]  # where the search begins
    beta: float  # TBRM's and A*-PO's
    precision: str  # a key of PRECISIONS
    buffer: int
    selection_seeds: tuple[int, ...]  # of every candidate
    final_seeds: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    lora: LoraConfig | None = None
    searched_on: str = ""  # a key of SETTINGS: the search is taken from there
    confirming_seeds: tuple[int, ...] = ()  # of the two best candidates

    @property
    def search_seeds(self) -> tuple[int, ...]:
        return self.selection_seeds + self.confirming_seeds


PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {  # what the page says, and options
    "float32": ("", dict(bf16=False)),
    "mixed": ("Forward and backward passes are in bfloat16 (autocast), weights and Adam in float32.", dict(bf16=True)),
}
# Five seeds first; the next five were added when the intervals of five turned out to be wider than a margin of 0.02.
_TEN = tuple(range(10))
SETTINGS = {
    "sorting": Setting(
        "Tiny model, sorting letters", "sorting", 384, 64, 16, 16, (5e-4, 1e-3, 2e-3), 0.05, "float32", 256, (100, 101),
        (0, 1, 2, 3, 4),
    ),
    "sums": Setting(
        "SmolLM2-135M, one-digit sums", "sums", 32, 16, 2, 4, (1e-5, 2e-5, 4e-5), 0.02, "mixed", 64, (100,), _TEN,
    ),
    "divisors": Setting(
        "SmolLM2-135M, greatest common divisors", "divisors", 32, 16, 2, 4, (1e-5, 2e-5, 4e-5), 0.02, "mixed", 64,
        (100,), _TEN,
    ),
    # In float32, since many processors compute in bfloat16 much more slowly.
    "operations": Setting(
        "SmolLM2-135M, three operations", "operations", 32, 16, 2, 8, (1e-5, 2e-5, 4e-5), 0.02, "float32", 64, (100,),
        _TEN,
    ),
}  # fmt: skip
SETTINGS["operations-lora"] = replace(
    SETTINGS["operations"],
    title="SmolLM2-135M with LoRA, three operations",
    rates=(1e-4, 2e-4, 4e-4),
    final_seeds=(0, 1, 2, 3, 4),
    methods=("GRPO", "TBRM, V = b/β, with replay"),
    lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
# With more problems to train on: policies might learn the 60 of "operations" by heart.
SETTINGS["all-operations"] = replace(
    SETTINGS["operations"],
    title="SmolLM2-135M, three operations, 223 problems",
    task="all-operations",
    methods=(
        "GRPO", "RLOO", "A*-PO", "TBRM", "TBRM, V = 0, with replay", "TBRM, V = b/β", "TBRM, V = b/β, with replay",
    ),
    searched_on="operations",
    confirming_seeds=(101, 102),
)  # fmt: skip
QUICK = replace(
    SETTINGS["sorting"],
    updates=4,
    every=2,
    of_selection=2,
    rates=(1e-3,),
    selection_seeds=(100,),
    final_seeds=(0, 1),
    rows=16,
)


@dataclass(frozen=True)
class Run:
    """One training run. As text it is its key in the JSON."""

    task: str  # a key of SETTINGS
    method: str
    knob: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task}: {self.method}, {self.knob}, lr {self.rate:g}, seed {self.seed}"


# ---- a run -----------------------------------------------------------------------------------------------------------


def result(run: Run, setting: Setting) -> dict[str, Any]:
    """Carry out one run, in a worker process.

    A method that uses a window K times makes K times as many updates, so that all draw equally many rollouts.
    """
    set_up(1)
    method = METHODS[run.method]
    options = {"beta": setting.beta, **method.options, **method.knob[run.knob]}
    if "replay" in run.method:
        options["replay_buffer_size"] = setting.buffer
    uses = options.get("num_iterations", 1)
    selection = run.seed in setting.search_seeds
    updates, every = uses * setting.updates, uses * (setting.of_selection if selection else setting.every)
    with tempfile.TemporaryDirectory() as folder:
        task = tasks.named(setting.task, run.seed, Path(folder), selection)
        measure = tasks.Measure(task, range(0, updates + 1, every))
        trainer = tasks.train(
            method.trainer, measure, setting.lora, learning_rate=run.rate, max_steps=updates, seed=run.seed,
            per_device_train_batch_size=setting.rows, logging_strategy="steps", logging_steps=1,
            **PRECISIONS[setting.precision][1], **options,
        )  # fmt: skip
    logged = {
        name: [round(row[name], 4) for row in trainer.state.log_history if name in row]
        for name in ("reward", "soft_value", "grad_norm", "kl")
    }
    return {"run": vars(run), "processor": processor(), "points": measure.points, "logged": logged}


class Comparison:
    """Selection and final runs on one task.

    Args:
        task: a key of SETTINGS.
        setting: its sizes.
        runs: the results by run.
        methods: those of which runs are made now; by default all.
    """

    def __init__(self, task: str, setting: Setting, runs: Store, methods: Sequence[str] = ()):
        self.task, self.setting, self.runs = task, setting, runs
        self.search = setting.searched_on or task
        self.methods = [method for method in setting.methods if method in (methods or METHODS)]

    # -- selection

    def curve(self, run: Run) -> np.ndarray:
        """`(M,)` accuracies, at the same numbers of rollouts for every method."""
        return np.array([point[2] for point in self.runs[str(run)]["points"]])

    def area(self, runs: Sequence[Run]) -> float:
        """Accuracy averaged over the rollouts of each run and over runs. Raises KeyError while a run is missing."""
        return statistics.fmean(area(self.curve(run)) for run in runs)

    def candidates(self, method: str, knob: str, rates: Sequence[float]) -> dict[tuple[str, float], list[Run]]:
        return {
            (knob, rate): [Run(self.search, method, knob, rate, seed) for seed in self.setting.selection_seeds]
            for rate in rates
        }

    def best(self, of: dict[tuple[str, float], list[Run]]) -> tuple[str, float]:
        """The candidate with the largest area. Raises KeyError while a run is missing."""
        areas = {choice: self.area(runs) for choice, runs in of.items()}
        return max(areas, key=areas.__getitem__)

    def rates(self, method: str, count: int = 0) -> list[float]:
        """The learning rates of a method: widened until the best is not at the edge, then until there are `count`."""
        rates, knob = sorted(self.setting.rates), first_knob(method)
        while len(self.setting.rates) > 1:
            try:
                _, rate = self.best(self.candidates(method, knob, rates))
            except KeyError:
                break
            if rate == rates[0]:
                rates.insert(0, rate / 2)
            elif rate == rates[-1]:
                rates.append(2 * rate)
            elif len(rates) < count:  # on the side where the best one has fewer neighbours
                below = rates.index(rate) <= len(rates) - 1 - rates.index(rate)
                rates = [rates[0] / 2, *rates] if below else [*rates, 2 * rates[-1]]
            else:
                break
        return rates

    def of_knob(self, method: str) -> dict[tuple[str, float], list[Run]]:
        _, rate = self.best(self.candidates(method, first_knob(method), self.rates(method, self.count)))
        candidates = (self.candidates(method, knob, [rate]) for knob in METHODS[method].knob)
        return {choice: runs for of_knob in candidates for choice, runs in of_knob.items()}

    @property
    def count(self) -> int:
        """How many learning rates every method gets: as many as the one that needed most, also after it got as many."""
        count = 0
        while (needed := max(len(self.rates(method, count)) for method in self.setting.methods)) > count:
            count = needed
        return count

    def finalists(self, method: str) -> dict[tuple[str, float], list[Run]]:
        """The two best candidates, with the runs of all seeds of the search. Raises KeyError while a run is missing."""
        knob, rates = first_knob(method), self.rates(method, self.count)
        found = self.candidates(method, knob, rates) | self.of_knob(method)
        two = sorted(found, key=lambda choice: self.area(found[choice]), reverse=True)[:2]
        return {
            (knob, rate): [Run(self.search, method, knob, rate, seed) for seed in self.setting.search_seeds]
            for knob, rate in two
        }

    def selected(self, method: str) -> tuple[str, float]:
        """The best of the finalists, or while runs of theirs are missing, the best on the selection seeds."""
        try:
            return self.best(self.finalists(method))
        except KeyError:
            return self.best(self.of_knob(method))

    def final(self, method: str) -> list[Run]:
        """The final runs of a method. Raises KeyError until it is tuned."""
        return [Run(self.task, method, *self.selected(method), seed) for seed in self.setting.final_seeds]

    def finished(self, method: str) -> list[Run]:
        """The finished final runs of a method; none until it is tuned."""
        try:
            return [run for run in self.final(method) if str(run) in self.runs]
        except KeyError:
            return []

    def superseded(self) -> list[list[Run]]:
        """Finished final runs of candidates that were selected once, and are no more."""
        runs = [Run(**one["run"]) for one in self.runs.values() if one["run"]["task"] == self.task]
        runs = [run for run in runs if run.method in self.setting.methods and run.seed in self.setting.final_seeds]
        valid = [run for method in self.setting.methods for run in self.finished(method)]
        others: dict[tuple[str, str, float], list[Run]] = {}
        for run in sorted(set(runs) - set(valid), key=str):
            others.setdefault((run.method, run.knob, run.rate), []).append(run)
        return list(others.values())

    def shown(self) -> dict[str, list[Run]]:
        """Finished final runs by name: of the selected candidates, and of those that were selected once."""
        found = {method: self.finished(method) for method in self.setting.methods}
        names = {f"{runs[0].method}, not selected ({n})": runs for n, runs in enumerate(self.superseded(), 1)}
        return {name: runs for name, runs in (found | names).items() if runs}

    # -- execution

    def stages(self) -> Iterator[list[Run]]:
        """The runs, stage by stage, in the order in which they are made. A stage may need results of earlier ones."""
        for count in (0, None):  # as many rates as each needs, then as many as the one that needed most
            count = self.count if count is None else count
            yield [
                run
                for method in self.methods
                for runs in self.candidates(method, first_knob(method), self.rates(method, count)).values()
                for run in runs
            ]
        for stage in (self.of_knob, self.finalists):
            yield [run for method in self.methods for runs in stage(method).values() for run in runs]
        yield [run for runs in zip(*(self.final(method) for method in self.methods), strict=True) for run in runs]

    def wanted(self) -> list[Run]:
        """The missing runs of the first unfinished stage."""
        missing = ([run for run in runs if str(run) not in self.runs] for runs in self.stages())
        return next(filter(None, missing), [])

    def execute(self, processes: int, until: float) -> None:
        """Make runs until none is missing, or until `time.monotonic()` reaches `until`."""
        carry_out(
            lambda: {str(run): (run, self.setting) for run in self.wanted()},
            result,
            self.runs,
            processes,
            until,
            lambda name: " ".join(f"{point[2]:.2f}" for point in self.runs[name]["points"]),
        )


# ---- the page --------------------------------------------------------------------------------------------------------


def first_at(points: Sequence[Sequence[float]], target: float, place: int) -> float:
    """The cost at which the accuracy first reaches the target, linear between two points; infinite if never."""
    for before, after in itertools.pairwise(points):
        if after[2] >= target:
            share = (target - before[2]) / (after[2] - before[2]) if after[2] > before[2] else 0.0
            return before[place] + max(share, 0.0) * (after[place] - before[place])
    return math.inf


def medians(costs: Sequence[float]) -> str:
    reached = sum(map(math.isfinite, costs))
    middle = statistics.median(costs)
    return f"{middle:,.0f}" if math.isfinite(middle) else f"{reached} of {len(costs)} reach it"


def trained_on(results: Sequence[dict[str, Any]]) -> str:
    """Mean reward of the last quarter of the rollouts, over runs; empty for runs that did not keep it."""
    rewards = [one["logged"].get("reward", []) for one in results if "logged" in one]
    return show([statistics.mean(of[-(len(of) // 4) :]) for of in rewards]) if rewards and all(rewards) else ""


def section(comparison: Comparison) -> str:
    setting, results = comparison.setting, comparison.runs
    finished = comparison.shown()
    peer = next((name for name, runs in finished.items() if runs[0].method == PEER), None)
    text = f"## {setting.title}\n\n" + wrapped(
        f"{setting.updates} updates of {setting.rows} trajectories, β = {setting.beta:g}; a replay buffer holds "
        f"{setting.buffer}."
    )
    text += "\n\n"
    if lora := setting.lora:
        modules = str(lora.target_modules).replace("-", " ")
        text += f"The trained weights are LoRA's, of rank {lora.r} with α = {lora.lora_alpha}, on {modules} layers.\n\n"
    if precision := PRECISIONS[setting.precision][0]:
        text += f"{precision}\n\n"
    if peer is None:
        return text + wrapped("The selection is not finished.") + "\n\n" + selection(comparison)
    seeds = [run.seed for run in finished[peer]]
    points = {
        name: {run.seed: results[str(run)]["points"] for run in runs if run.seed in seeds}
        for name, runs in finished.items()
    }
    ends = {method: [of[-1][2] for of in by_seed.values()] for method, by_seed in points.items()}
    target = statistics.mean(ends[peer])
    processors = sorted({results[str(run)]["processor"] for runs in finished.values() for run in runs})
    rows, costs = [], []
    for method in finished:
        mine = points[method]
        differences = {
            name: [f(np.array(mine[s])[:, 2]) - f(np.array(points[peer][s])[:, 2]) for s in mine]
            for name, f in (("area", area), ("end", lambda of: of[-1]))
        }
        run, areas = finished[method][0], [area(np.array(of)[:, 2]) for of in mine.values()]
        rows.append(
            [method, f"{run.knob}, {run.rate:g}", str(len(mine)), show(areas), show(ends[method]),
             trained_on([results[str(run)] for run in finished[method]]),
             *("" if method == peer else interval(of) for of in differences.values())]
        )  # fmt: skip
        gained = [first_at(of, of[0][2] + GAIN, 1) for of in mine.values()]
        reached = [[first_at(of, target, place) for of in mine.values()] for place in (1, 4)]
        total = statistics.mean(of[-1][4] for of in mine.values())
        costs.append([method, medians(gained), *map(medians, reached), f"{total:,.0f}"])
    names = ("knob, rate", "seeds", "area", "final accuracy", "reward", f"area − {PEER}'s", f"final − {PEER}'s")
    header = ["", *names]
    drawn = points[peer][seeds[0]][-1][1]
    text += wrapped(
        f"{len(seeds)} of {len(setting.final_seeds)} final seeds of {peer}, {drawn:,} rollouts in a run; *seeds* says "
        "how many another method has so far. *Area* is the mean accuracy along the curve. *Reward* is the mean of the "
        "last quarter of the rollouts, on the problems trained on. Differences are paired by seed, with Student's 95% "
        "interval."
    )
    if setting.task in tasks.GYM_TASKS:
        constant = statistics.mean(tasks.best_constant(setting.task, seed) for seed in seeds)
        text += "\n\n" + wrapped(
            f"The best constant answer would be right on {constant:.3f} of the held-out problems, the mean over seeds."
        )
    text += f"\n\n{table(header, rows)}\n\n"
    text += wrapped(
        f"Medians over seeds of what it takes to gain {GAIN} over the untrained model, and to reach {PEER}'s mean "
        f"final accuracy, {target:.3f}. Seconds are of one thread of a processor ({', '.join(processors)}), without "
        "the measurements."
    )
    header = ["", f"rollouts to gain {GAIN}", f"rollouts to {target:.3f}", f"seconds to {target:.3f}", "seconds in all"]
    return f"{text}\n\n{table(header, costs)}\n\n{selection(comparison)}"


def selection(comparison: Comparison) -> str:
    """A table of every candidate of the search and its area."""
    if comparison.search != comparison.task:
        text = wrapped(f"The search is that of *{SETTINGS[comparison.search].title}*.") + "\n"
        return text + confirmed(comparison)
    made = [Run(**one["run"]) for one in comparison.runs.values() if one["run"]["task"] == comparison.task]
    areas: dict[str, set[tuple[str, float, float]]] = {method: set() for method in comparison.setting.methods}
    for run in made:
        of_seeds = [replace(run, seed=seed) for seed in comparison.setting.selection_seeds]
        if run in of_seeds and all(str(one) in comparison.runs for one in of_seeds):
            areas[run.method].add((run.knob, run.rate, comparison.area(of_seeds)))
    rows = [
        [method, "; ".join(f"{knob}, {rate:g}: {found:.3f}" for knob, rate, found in sorted(of))]
        for method, of in areas.items()
    ]
    return f"Areas of the selection:\n\n{table(['', 'knob, learning rate: area'], rows)}\n"


def confirmed(comparison: Comparison) -> str:
    """A table of the two best candidates of each method, if they were run with more seeds."""
    setting, rows = comparison.setting, []
    for method in setting.methods if setting.confirming_seeds else ():
        try:
            found = comparison.finalists(method)
        except KeyError:  # the search is not finished
            continue
        cells = [
            f"{knob}, {rate:g}: {show([comparison.area([run]) for run in runs])}"
            for (knob, rate), runs in found.items()
            if all(str(run) in comparison.runs for run in runs)
        ]
        rows += [[method, "; ".join(cells)]] if cells else []
    if not rows:
        return ""
    seeds = wrapped(
        f"The two best candidates of these methods were then run with {len(setting.confirming_seeds)} more seeds. The "
        "better one over all seeds is selected:"
    )
    return f"\n{seeds}\n\n{table(['', 'knob, learning rate: area'], rows)}\n"


def draw(comparisons: Sequence[Comparison]) -> plt.Figure:
    shown = [one for one in comparisons if any(runs[0].method == PEER for runs in one.shown().values())]
    columns = min(3, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, one in zip(axes.flat, shown, strict=False):
        for number, method in enumerate(METHODS):
            runs = next((runs for runs in one.shown().values() if runs[0].method == method), [])
            if not runs:
                continue
            points = np.array([one.runs[str(run)]["points"] for run in runs])  # (S, M, 5)
            drawn = points[0, :, 1] - points[0, 0, 1]
            band(axis, drawn, points[:, :, 2].T.tolist(), color=COLOURS[number], label=method)
        axis.set(title=one.setting.title, xlabel="rollouts", ylabel="accuracy")
        axis.legend()
    return figure


def report(comparisons: Sequence[Comparison], packages: str) -> str:
    settings = wrapped(
        "Every method draws equally many rollouts. A method that uses each window of rollouts K times makes K times "
        "as many updates. A*-PO also draws N completions of every prompt from the reference before training; they are "
        "not on the axis, their seconds are counted. TBRM and A*-PO have the β of the task; GRPO and RLOO have β = 0, "
        "as TRL's GRPO has by default."
    )
    sections = "\n".join(map(section, comparisons))
    return f"""# TBRM, GRPO, RLOO and A*-PO, tuned alike

Written by `python benchmarks/comparison.py`. {packages}. Every run: [comparison.json](comparison.json).

{settings}

![accuracy against rollouts](comparison.png)

{sections}"""


def main() -> None:
    arguments = parse(
        __doc__,
        "two short runs of each method on the tiny model",
        tasks=dict(nargs="+", default=["sorting"], choices=list(SETTINGS)),
        methods=dict(nargs="+", default=list(METHODS), choices=list(METHODS), help="make runs of these alone"),
        minutes=dict(type=float, default=math.inf, help="begin no further run after these"),
        processes=dict(type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each"),
    )
    settings = {"sorting": QUICK} if arguments.quick else SETTINGS
    packages = listed(versions("torch", "transformers", "trl", "tbrm-trl", "reasoning-gym"))
    runs = Store(arguments.output / "comparison.json", packages=packages)
    until = time.monotonic() + 60 * arguments.minutes
    comparisons = {task: Comparison(task, setting, runs, arguments.methods) for task, setting in settings.items()}
    for task in arguments.tasks if not arguments.quick else settings:
        comparisons[task].execute(arguments.processes, until)
    begun = [one for one in comparisons.values() if any(key.startswith(f"{one.task}: ") for key in runs)]
    write(arguments.output, "comparison", report(begun, packages), figure=draw(begun))


if __name__ == "__main__":
    main()
