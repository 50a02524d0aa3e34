"""Accuracy against rollouts used: TBRM with and without replay, beside TRL's GRPO and RLOO.

    python benchmarks/replay.py                     # tiny model: selection of learning rates, then the final runs
    python benchmarks/replay.py --model smollm2     # one run of each configuration on SmolLM2-135M
    python benchmarks/replay.py --quick             # two minutes, to a temporary folder

Everything is written to docs/benchmarks/replay.{json,md,png} after each configuration. A run whose result is already
in the JSON is not repeated; delete the JSON to start over.
"""

import contextlib
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common import tasks
from common.measure import set_up
from common.report import (
    Store,
    band,
    listed,
    mean_and_error,
    parse,
    plt,
    processor,
    show,
    table,
    versions,
    write,
)
from common.tasks import HELD_OUT, LETTERS, WORD_LENGTH, Measure, Task

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "tbrm-trl")


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A method, how many updates each window of rollouts serves, and whether the later ones draw from a buffer."""

    method: str
    iterations: int
    replay: bool = False

    def __str__(self) -> str:
        return f"{self.method} K={self.iterations}{' replay' if self.replay else ''}"


# In the order of their selection: K = 1 chooses β for a method's other rows, the first with replay the buffer size.
CONFIGURATIONS = {
    str(configuration): configuration
    for configuration in (
        Configuration("GRPO", 1),
        Configuration("GRPO", 4),
        Configuration("RLOO", 1),
        *(Configuration("TBRM", iterations) for iterations in (1, 2, 4, 8)),
        *(Configuration("TBRM", iterations, replay=True) for iterations in (4, 2, 8)),
    )
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison on one model."""

    updates: int
    rows: int  # trajectories per update
    evaluations: tuple[int, ...]  # after how many updates
    learning_rates: dict[str, tuple[float, ...]]  # per method
    betas: dict[str, tuple[float, ...]]  # per method: KL coefficients, and TBRM's β
    buffer_sizes: tuple[int, ...]
    selection_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    demonstration_steps: int = 0  # supervised steps that make the tiny model's starting point


def _fractions(updates: int) -> tuple[int, ...]:
    return tuple(updates * sixteenth // 16 for sixteenth in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16))


TINY = Settings(
    updates=384,
    rows=64,
    evaluations=_fractions(384),
    learning_rates={
        "TBRM": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "GRPO": (5e-4, 1e-3, 2e-3, 4e-3),
        "RLOO": (5e-4, 1e-3, 2e-3, 4e-3),
    },
    # TRL's defaults are 0 for GRPO and 0.05 for RLOO; 0.04 is what TRL used for GRPO before.
    betas={"TBRM": (0.02, 0.05, 0.1), "GRPO": (0.0, 0.04), "RLOO": (0.0, 0.05)},
    buffer_sizes=(256, 1024),
    selection_seeds=(100, 101),
    final_seeds=(0, 1, 2, 3, 4),
    demonstration_steps=300,
)
SMOKE = replace(
    TINY,
    updates=16,
    evaluations=_fractions(16),
    learning_rates=dict.fromkeys(("TBRM", "GRPO", "RLOO"), (1e-3,)),
    betas={"TBRM": (0.05,), "GRPO": (0.0,), "RLOO": (0.0,)},
    buffer_sizes=(128,),
    selection_seeds=(100,),
    final_seeds=(0, 1),
    demonstration_steps=100,
)
# TBRM's options are those of examples/reasoning_gym_demo.py.
SMOLLM2 = Settings(
    updates=16,
    rows=16,
    evaluations=(16,),
    learning_rates={"TBRM": (2e-5,), "GRPO": (1e-5,), "RLOO": (1e-5,)},
    betas={"TBRM": (0.02,), "GRPO": (0.0,), "RLOO": (0.05,)},
    buffer_sizes=(64,),
    selection_seeds=(),
    final_seeds=(0,),
)
SETTINGS = {"tiny": TINY, "smoke": SMOKE, "smollm2": SMOLLM2}


@dataclass(frozen=True)
class Run:
    """One training run. Its text is its key in the JSON."""

    model: str  # a key of SETTINGS
    stage: str  # "selection" or "final": they share neither seeds nor problems
    configuration: Configuration
    learning_rate: float
    beta: float
    buffer_size: int
    seed: int

    def __str__(self) -> str:
        buffer = f" buffer={self.buffer_size}" if self.configuration.replay else ""
        return (
            f"{self.model} {self.stage}: {self.configuration} lr={self.learning_rate:g} beta={self.beta:g}{buffer} "
            f"seed={self.seed}"
        )


# ---- the runs --------------------------------------------------------------------------------------------------------


def task_of(run: Run, settings: Settings, folder: Path) -> Task:
    if run.model == "smollm2":
        return tasks.sums(run.seed)
    return tasks.sorting(folder, run.seed, settings.demonstration_steps, selection=run.stage == "selection")


def train(run: Run, settings: Settings) -> Measure:
    configuration = run.configuration
    # SmolLM2 starts the same for all: one run measures it.
    start = {0} if run.model != "smollm2" or configuration == CONFIGURATIONS["GRPO K=1"] else set()
    more: dict[str, Any] = {"soft_value": "calibrated"} if configuration.method == "TBRM" else {"num_generations": 8}
    if configuration.replay:
        more |= {"replay_buffer_size": run.buffer_size}
    with tempfile.TemporaryDirectory() as folder:
        measure = Measure(task_of(run, settings, Path(folder)), {*start, *settings.evaluations})
        tasks.train(
            configuration.method, measure, num_iterations=configuration.iterations, learning_rate=run.learning_rate,
            beta=run.beta, max_steps=settings.updates, per_device_train_batch_size=settings.rows, seed=run.seed, **more,
        )  # fmt: skip
    return measure


def result(run: Run) -> dict:
    """Carry out one run, in the process of a worker."""
    measure = train(run, SETTINGS[run.model])
    return {"points": [point[:3] for point in measure.points], "seconds": measure.seconds}


class Benchmark:
    """Selection and final runs on one model."""

    def __init__(self, model: str, runs: Store) -> None:
        self.model, self.settings, self.runs = model, SETTINGS[model], runs

    def grid(self, configuration: Configuration) -> list[Run]:
        """The candidates of a configuration, without a seed of their own."""
        settings, method = self.settings, configuration.method
        betas, buffer_sizes = settings.betas[method], settings.buffer_sizes[:1]
        if configuration.iterations > 1 and len(betas) > 1:
            betas = (self.selected(CONFIGURATIONS[f"{method} K=1"]).beta,)
        if configuration.replay:
            first = CONFIGURATIONS["TBRM K=4 replay"]
            buffer_sizes = settings.buffer_sizes if configuration == first else (self.selected(first).buffer_size,)
        return [
            Run(self.model, "selection", configuration, *choice, seed=-1)
            for choice in itertools.product(settings.learning_rates[method], betas, buffer_sizes)
        ]

    def selection(self, candidate: Run) -> list[Run]:
        return [replace(candidate, seed=seed) for seed in self.settings.selection_seeds]

    def accuracy(self, candidate: Run) -> float:
        """Mean final accuracy over the selection seeds."""
        return statistics.mean(self.runs[str(run)]["points"][-1][2] for run in self.selection(candidate))

    def selected(self, configuration: Configuration) -> Run:
        grid = self.grid(configuration)
        return grid[0] if len(grid) == 1 else max(grid, key=self.accuracy)

    def final(self, configuration: Configuration) -> list[Run]:
        chosen = self.selected(configuration)
        return [replace(chosen, stage="final", seed=seed) for seed in self.settings.final_seeds]

    def execute(self, runs: list[Run], pool: ProcessPoolExecutor) -> None:
        missing = {pool.submit(result, run): run for run in runs if str(run) not in self.runs}
        for future in as_completed(missing):
            run, one = missing[future], future.result()
            self.runs[str(run)] = one
            accuracies = " ".join(f"{accuracy:.3f}" for _, _, accuracy in one["points"])
            print(f"{run}: {accuracies} ({one['points'][-1][1]} rollouts, {one['seconds']:.0f} s)", flush=True)

    def run(self, configuration: Configuration, pool: ProcessPoolExecutor) -> None:
        grid = self.grid(configuration)
        if len(grid) > 1:
            self.execute([run for candidate in grid for run in self.selection(candidate)], pool)
        self.execute(self.final(configuration), pool)


# ---- the report ------------------------------------------------------------------------------------------------------


class Curves:
    """The final runs of one model.

    Attributes:
        accuracies: for each configuration whose runs are all there, by rollouts generated, over seeds.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.accuracies: dict[Configuration, dict[int, list[float]]] = {}
        for c in sorted(
            CONFIGURATIONS.values(), key=lambda c: (c.method != "GRPO", c.method != "RLOO", c.replay, c.iterations)
        ):
            with contextlib.suppress(KeyError):  # some of its runs are missing
                along = zip(*(one["points"] for one in self.results(c)), strict=True)
                self.accuracies[c] = {int(seeds[0][1]): [accuracy for _, _, accuracy in seeds] for seeds in along}

    def results(self, configuration: Configuration) -> list[dict]:
        return [self.benchmark.runs[str(run)] for run in self.benchmark.final(configuration)]

    def rollouts(self, configuration: Configuration) -> int:
        return max(self.accuracies[configuration])

    def final(self, configuration: Configuration) -> list[float]:
        return self.accuracies[configuration][self.rollouts(configuration)]

    def of(self, method: str) -> list[Configuration]:
        return [configuration for configuration in self.accuracies if configuration.method == method]

    @cached_property
    def target(self) -> tuple[Configuration, float]:
        """GRPO's configuration of best final accuracy, and that accuracy less one standard error."""
        best = max(self.of("GRPO"), key=lambda c: statistics.mean(self.final(c)))
        mean, error = mean_and_error(self.final(best))
        return best, mean - error

    def best_within(self, method: str, rollouts: float) -> tuple[float, Configuration, int]:
        """The best mean accuracy that a method reaches with at most so many rollouts, and where."""
        points = (
            (statistics.mean(values), configuration, count)
            for configuration in self.of(method)
            for count, values in self.accuracies[configuration].items()
            if count <= rollouts
        )
        return max(points, key=lambda point: point[0])

    def reaches(self, configuration: Configuration, accuracy: float) -> int | None:
        """The first rollout count at which the mean accuracy is at least this."""
        counts = sorted(self.accuracies[configuration].items())
        return next((count for count, values in counts if statistics.mean(values) >= accuracy), None)


def target_section(curves: Curves) -> str:
    best, threshold = curves.target
    total = curves.rollouts(best)

    def cell(method: str, part: int) -> str:
        if not curves.of(method):
            return "–"
        accuracy, configuration, count = curves.best_within(method, total / part)
        verdict = "met" if accuracy >= threshold else "missed"
        return f"{show(curves.accuracies[configuration][count])} ({configuration}, {count}): {verdict}"

    methods = ("TBRM", "GRPO", "RLOO")
    rows = [
        [f"{name}, {total // part}", *(cell(method, part) for method in methods)]
        for name, part in (("a quarter", 4), ("an eighth", 8))
    ]
    return f"""\
Reach GRPO's best final accuracy less one standard error with at most a quarter of its rollouts. That is {best} with
{show(curves.final(best))} after {total} rollouts, hence **{threshold:.3f}**. Mean over seeds of the best configuration
within each allowance, its points in mid-run included:

{table(["rollouts", *methods], rows)}"""


def final_rows(curves: Curves) -> list[list[str]]:
    """What becomes of each configuration, and what was chosen for it."""
    rows = []
    for configuration in curves.accuracies:
        chosen = curves.benchmark.selected(configuration)
        rates = curves.benchmark.settings.learning_rates[configuration.method]
        edge = " (edge)" if len(rates) > 1 and chosen.learning_rate in (rates[0], rates[-1]) else ""
        rows.append(
            [
                str(configuration),
                str(curves.rollouts(configuration)),
                show(curves.final(configuration)),
                str(curves.reaches(configuration, curves.target[1]) or "not reached"),
                f"{chosen.learning_rate:g}{edge}",
                f"{chosen.beta:g}",
                str(chosen.buffer_size) if configuration.replay else "",
                f"{statistics.mean(one['seconds'] for one in curves.results(configuration)):.0f}",
            ]
        )
    return rows


def along_the_way_section(curves: Curves) -> str:
    total = max(curves.rollouts(configuration) for configuration in curves.accuracies)
    counts = [total >> halvings for halvings in range(6, -1, -1)]
    rows = [
        [str(configuration), *(show(at[count]) if count in at else "" for count in counts)]
        for configuration, at in curves.accuracies.items()
    ]
    return table(["rollouts", *map(str, counts)], rows)


def replay_section(curves: Curves) -> str:
    rows = []
    for configuration in curves.of("TBRM"):
        without = replace(configuration, replay=False)
        if not configuration.replay or without not in curves.accuracies:
            continue
        with_replay, same_rollouts = curves.final(configuration), curves.final(without)
        mean, error = mean_and_error([a - b for a, b in zip(with_replay, same_rollouts, strict=True)])
        verdict = "no clear difference" if not abs(mean) > 3 * error else "helps" if mean > 0 else "**hurts**"
        cells = [f"K={configuration.iterations}", show(same_rollouts), show(with_replay), f"{mean:+.3f} ± {error:.3f}"]
        rows.append([*cells, verdict])
    return table(["", "same rollouts K times", "replay", "difference", ""], rows)


def selection_section(curves: Curves) -> str:
    benchmark = curves.benchmark
    rates = sorted({rate for rates in benchmark.settings.learning_rates.values() for rate in rates})
    rows = []
    for configuration in curves.accuracies:
        grid, chosen = benchmark.grid(configuration), benchmark.selected(configuration)
        tried = {} if len(grid) == 1 else {candidate: f"{benchmark.accuracy(candidate):.3f}" for candidate in grid}
        tried |= {chosen: f"**{tried[chosen]}**"} if tried else {}
        for beta, buffer_size in sorted({(c.beta, c.buffer_size) for c in grid}):
            mine = {
                c.learning_rate: text for c, text in tried.items() if (c.beta, c.buffer_size) == (beta, buffer_size)
            }
            buffer = str(buffer_size) if configuration.replay else ""
            rows.append([str(configuration), f"{beta:g}", buffer, *(mine.get(rate, "") for rate in rates)])
    return table(["", "β", "buffer", *(f"{rate:g}" for rate in rates)], rows)


def smollm2_section(curves: Curves) -> str:
    settings = curves.benchmark.settings
    starts = [at[0][0] for at in curves.accuracies.values() if 0 in at]
    rows = [[*row[:3], row[4], *row[6:]] for row in final_rows(curves)]
    return f"""## SmolLM2-135M, one seed

`python benchmarks/replay.py --model smollm2`: the task of `examples/reasoning_gym_demo.py` (sums and differences of two
one-digit numbers), {settings.updates} updates of {settings.rows} trajectories. Accuracy is on 60 held-out problems,
avg@2 at T = 1; before training it is {starts[0]:.3f}. Nothing was tuned here: TBRM has the demo's learning rate and β,
GRPO and RLOO ten times TRL's default learning rate (1e-6, too small for so few updates) and TRL's KL coefficients.
**One seed: small differences mean nothing.**

{table(["", "rollouts", "final accuracy", "learning rate", "buffer", "seconds of training"], rows)}
"""


def write_report(runs: Store, model: str, output: Path) -> None:
    curves = Curves(Benchmark(model, runs))
    if not curves.of("GRPO"):
        return
    settings, environment = curves.benchmark.settings, runs.head["environment"]
    selected, final = (", ".join(map(str, seeds)) for seeds in (settings.selection_seeds, settings.final_seeds))
    start = statistics.mean(curves.accuracies[curves.of("GRPO")[0]][0])
    real = Curves(Benchmark("smollm2", runs))
    header = f"|rollouts|final accuracy|rollouts to {curves.target[1]:.3f}|learning rate|β|buffer|seconds"
    text = f"""# Replay: accuracy against rollouts used

Written by `python benchmarks/replay.py`; raw numbers: [replay.json](replay.json). {environment["processor"]},
{environment["cores"]} cores, one thread a run; Python {environment["python"]},
{listed({name: environment[name] for name in PACKAGES})}.

![accuracy against rollouts](replay.png)

K is `num_iterations`: the updates that each window of rollouts serves. All configurations make {settings.updates}
updates of {settings.rows} trajectories, so K = 8 uses an eighth of the rollouts of K = 1. Without replay the same
rollouts are used K times; with it, the first update of a window is on them and the others on uniform samples from the
buffer.

## Target

{target_section(curves)}

## Final accuracy

{table(header.split("|"), final_rows(curves))}

± is the standard error over {len(settings.final_seeds)} seeds. Seconds are of training alone, on a machine that was
also doing other things.

## Accuracy at equal rollouts

{along_the_way_section(curves)}

All but the last entry of a row are in mid-run, where the learning rate has not yet decayed.

## What replay adds

The same seeds with and without, final accuracy, paired; "no clear difference" is less than three standard errors (with
five seeds, two are not rare by chance).

{replay_section(curves)}

## Task and selection

A two-layer Llama of width 32 sorts the letters of words: {WORD_LENGTH} of {len(LETTERS)} letters, one token each, then
the end token; the reward is 1 for exactly that, else 0. It starts from random weights and
{settings.demonstration_steps} supervised steps on demonstrations of which half the letters are replaced by random ones:
accuracy {start:.3f}, the same start for all methods of a seed. Accuracy is the exact probability of the right
completion at T = 1, on {HELD_OUT} words that no run trains on.

GRPO and RLOO: TRL's trainers with 8 generations per prompt and their other defaults. TBRM: one rollout per prompt,
calibrated soft value. So a window has {settings.rows // 8} words for the former and {settings.rows} for the latter.
Everyone: AdamW, linear decay, gradient norm clipped at 1.

Learning rate and β (GRPO's and RLOO's is the KL coefficient, in TRL 0 and 0.05 by default) are those of the best mean
final accuracy on seeds {selected} and the other half of the words; the final runs are on seeds {final}. β is chosen at
K = 1 and kept for a method's other rows, the buffer size at K = 4. "edge": the best learning rate is at the end of the
grid. Candidates, mean final accuracy by learning rate:

{selection_section(curves)}
"""
    if model == "tiny" and real.of("GRPO"):
        text += f"\n{smollm2_section(real)}"
    write(output, "replay", text, figure=draw(curves))


def draw(curves: Curves) -> plt.Figure:
    """Two panels, TBRM without replay and with it; the peers are in both."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    colors = {1: "tab:blue", 2: "tab:green", 4: "tab:orange", 8: "tab:red"}
    peers = {"GRPO": "black", "RLOO": "tab:gray"}
    best, threshold = curves.target
    total = curves.rollouts(best)
    ticks = [total >> halvings for halvings in range(7, -1, -1)]
    for axes, replay in zip(panels, (False, True), strict=True):
        for configuration, at in curves.accuracies.items():
            tbrm = configuration.method == "TBRM"
            if tbrm and configuration.replay != replay and configuration.iterations > 1:
                continue
            counts, accuracies = zip(*sorted(at.items())[1:], strict=True)  # 0 has no place on a log axis
            color = peers.get(configuration.method, colors[configuration.iterations])
            style = "-" if tbrm else "--" if configuration.iterations == 1 else ":"
            band(axes, counts, accuracies, style, color=color, label=str(configuration))
        axes.axhline(threshold, color="black", linewidth=0.6)
        axes.text(0.0, threshold, " target", va="bottom", fontsize=9, transform=axes.get_yaxis_transform())
        for part, name in ((4, "¼"), (8, "⅛")):
            axes.axvline(total / part, color="black", linewidth=0.6, alpha=0.5)
            axes.text(total / part, 1.0, f" {name}", va="top", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.set(xlabel="rollouts generated", ylim=(0, 1), title=f"TBRM {'with' if replay else 'without'} replay")
        axes.legend(loc="lower right")
    panels[0].set_ylabel("held-out accuracy (mean ± s.e. over seeds)")
    figure.suptitle(
        "The same number of updates each; thin lines: the target, and ¼ and ⅛ of GRPO's rollouts", fontsize=10
    )
    return figure


def main() -> None:
    names = list(CONFIGURATIONS)
    arguments = parse(
        __doc__,
        quick="few and short runs",
        model=dict(choices=["tiny", "smollm2"], default="tiny"),
        jobs=dict(type=int, help="worker processes (default: all cores; smollm2: 1)"),
        threads=dict(type=int, help="threads of each (default: 1; smollm2: all cores)"),
        only=dict(nargs="+", choices=names, default=names, metavar="NAME", help="some configurations"),
    )
    name = "smoke" if arguments.quick else arguments.model
    cores, big = os.cpu_count() or 1, name == "smollm2"
    jobs, threads = arguments.jobs or (1 if big else cores), arguments.threads or (cores if big else 1)

    environment = {"processor": processor(), "cores": cores, "python": platform.python_version(), **versions(*PACKAGES)}
    settings = {name: asdict(settings) for name, settings in SETTINGS.items()}
    runs = Store(arguments.output / "replay.json", environment=environment, settings=settings)
    benchmark = Benchmark(name, runs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), set_up, (threads,)) as pool:
        for configuration in CONFIGURATIONS.values():
            if str(configuration) in arguments.only:
                benchmark.run(configuration, pool)
                write_report(runs, "tiny" if big else name, arguments.output)


if __name__ == "__main__":
    main()
