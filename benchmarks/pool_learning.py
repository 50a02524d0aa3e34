"""Whether a policy learns as well from rollouts that ran ahead: accuracy with and without a pool, paired by seed.

    python benchmarks/pool_learning.py                      # the tiny model: some minutes
    python benchmarks/pool_learning.py --tasks sums         # SmolLM2-135M: an hour
    python benchmarks/pool_learning.py --quick              # two short pairs, to a temporary folder

The pool holds the rows of three windows. Rates and β are those of `benchmarks/comparison.py`; the tiny model sorts
words of 4 and 5 letters, so that completions have different lengths. Finished runs are kept in
docs/benchmarks/pool_learning.json and are not repeated. Delete the file to start over.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import tasks
from common.measure import set_up
from common.report import Store, interval, listed, parse, processor, show, table, versions, wrapped, write
from common.runs import carry_out

AT_LEAST = -0.05
LENGTHS = (4, 5)


@dataclass(frozen=True)
class Setting:
    title: str
    updates: int
    rows: int  # trajectories per update
    rate: float
    beta: float
    seeds: int
    measurements: int = 8


SETTINGS = {
    "sorting": Setting("Tiny model, sorting letters", 384, 64, 2e-3, 0.05, 10),
    "sums": Setting("SmolLM2-135M, one-digit sums", 24, 16, 2e-5, 0.02, 3, measurements=4),
}
SOFT_VALUES = ("calibrated", "policy")  # the tiny model trains with both, SmolLM2 with the first


def accuracies(task: str, setting: Setting, soft_value: str, windows_ahead: int, seed: int) -> dict[str, Any]:
    """Carry out one run in a worker process, and return its accuracies and staleness."""
    set_up(1)
    with tempfile.TemporaryDirectory() as folder:
        every = setting.updates // setting.measurements
        chosen = (
            tasks.sorting(Path(folder), seed, 600, lengths=LENGTHS) if task == "sorting" else tasks.of_gym(task, seed)
        )
        measure = tasks.Measure(chosen, range(0, setting.updates + 1, every))
        trainer = tasks.train(
            "TBRM", measure, learning_rate=setting.rate, beta=setting.beta, soft_value=soft_value, seed=seed,
            max_steps=setting.updates, per_device_train_batch_size=setting.rows,
            rollout_pool=windows_ahead * setting.rows, logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
    staleness = [row["staleness/mean"] for row in trainer.state.log_history if "staleness/mean" in row]
    return {"accuracies": [point[2] for point in measure.points], "staleness": staleness}


def name_of(task: str, soft_value: str, windows_ahead: int, seed: int) -> str:
    return f"{task}: {soft_value}, {windows_ahead} windows ahead, seed {seed}"


def rows_of(task: str, setting: Setting, soft_value: str, runs: Store) -> list[str] | None:
    """A line of the table from the finished pairs, or None with fewer than two."""
    names = [[name_of(task, soft_value, ahead, seed) for ahead in (0, 3)] for seed in range(setting.seeds)]
    pairs = [[runs[name] for name in pair] for pair in names if all(name in runs for name in pair)]
    if len(pairs) < 2:
        return None
    without, ahead = ([pair[place]["accuracies"] for pair in pairs] for place in (0, 1))
    ends = [b[-1] - a[-1] for a, b in zip(without, ahead, strict=True)]
    means = [sum(b[1:]) / len(b[1:]) - sum(a[1:]) / len(a[1:]) for a, b in zip(without, ahead, strict=True)]
    stale = [sum(one["staleness"]) / len(one["staleness"]) for _, one in pairs if one["staleness"]]
    staleness = sum(stale) / max(len(stale), 1)
    shown = [show([one[place] for one in of]) for of, place in ((without, 0), (without, -1), (ahead, -1))]
    return [
        setting.title, soft_value, str(len(pairs)), *shown, interval(ends), interval(means), f"{staleness:.2f}",
    ]  # fmt: skip


def report(settings: dict[str, Setting], runs: Store, facts: str) -> str:
    lines = [
        line
        for task, setting in settings.items()
        for soft_value in SOFT_VALUES
        if (line := rows_of(task, setting, soft_value, runs))
    ]
    text = f"""Written by `python benchmarks/pool_learning.py`. {facts}. Every run:
        [pool_learning.json](pool_learning.json)."""
    explained = f"""Accuracy of samples at T = 1 on held-out problems, before, and after training without a pool and
        with one of three windows' rows (`rollout_pool`). Differences are with minus without, paired by seed, with
        Student's 95% interval: at the end, and of the means over all measurements. Asked of the first: at least
        {AT_LEAST} at its lower end. Staleness is the mean number of updates between a rollout's first token and its
        use."""
    header = ["task", "`soft_value`", "pairs", "before", "without", "with", "at the end", "over the run", "staleness"]
    return f"""# What a policy learns from rollouts that ran ahead

{wrapped(text)}

{wrapped(explained)}

{table(header, lines)}
"""


def main() -> None:
    arguments = parse(
        __doc__,
        "two short pairs",
        tasks=dict(nargs="+", default=["sorting"], choices=list(SETTINGS)),
        minutes=dict(type=float, default=float("inf"), help="begin no further run after these"),
        processes=dict(type=int, default=2, help="runs at a time, of one thread each"),
    )
    settings = SETTINGS
    if arguments.quick:
        settings = {"sorting": replace(SETTINGS["sorting"], updates=8, seeds=2, rows=16)}
    facts = f"{processor()}; {listed(versions('torch', 'transformers', 'trl', 'tbrm-trl'))}"
    runs = Store(arguments.output / "pool_learning.json", facts=facts)
    until = time.monotonic() + 60 * arguments.minutes
    wanted = {
        name_of(task, soft_value, ahead, seed): (task, settings[task], soft_value, ahead, seed)
        for task in arguments.tasks
        for soft_value in (SOFT_VALUES if task == "sorting" else SOFT_VALUES[:1])
        for seed in range(settings[task].seeds)
        for ahead in (0, 3)
    }

    def say(name: str) -> str:
        return " ".join(f"{one:.2f}" for one in runs[name]["accuracies"])

    carry_out(lambda: wanted, accuracies, runs, arguments.processes, until, say)
    write(arguments.output, "pool_learning", report(settings, runs, facts))


if __name__ == "__main__":
    main()
