"""Accuracy against the age of the rollouts: every window is trained on a fixed number of updates after it was drawn.

    python benchmarks/staleness.py                 # the tiny model, a quarter of an hour of one core
    python benchmarks/staleness.py --tasks sums    # SmolLM2-135M, an hour of one core
    python benchmarks/staleness.py --quick         # two short runs of each method, to a temporary folder

TBRM follows a folder (`follow_rollouts`) into which a writer in the same process puts windows: after v updates it draws
window v + lag. GRPO keeps its own generations in a queue of length lag, with the log-probabilities under which they
were drawn. Its clipped ratio uses these: the correction that TRL has. The untrained policy draws the first windows of
every run. All runs on a task have one learning rate, which `comparison.py` found good for every method without a lag.

Finished runs are kept in docs/benchmarks/staleness.json and are not repeated. Delete the file to start over.
"""

import math
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import tasks
from common.measure import set_up
from common.report import (
    Store,
    area,
    band,
    listed,
    parse,
    plt,
    show,
    table,
    versions,
    wrapped,
    write,
)
from common.runs import carry_out
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.evaluation.sampling import prompt_ids_of
from tbrm_trl.files import appearing


@dataclass(frozen=True)
class Setting:
    """Sizes of the runs on one task."""

    title: str
    methods: dict[str, dict[str, Any]]
    updates: int
    rows: int  # trajectories per update
    every: int  # updates between two measurements
    rate: float
    lags: tuple[int, ...]
    seeds: tuple[int, ...]


SORTING: dict[str, dict[str, Any]] = {
    "policy": dict(soft_value="policy", beta=0.05),
    "calibrated": dict(soft_value="calibrated", beta=0.05),
    "group": dict(soft_value="group", beta=0.05, num_generations=4),
    "GRPO": dict(beta=0.0, num_generations=4),
}
SUMS: dict[str, dict[str, Any]] = {"calibrated": dict(soft_value="calibrated", beta=0.02)}
SETTINGS = {
    "sorting": Setting("Tiny model, sorting letters", SORTING, 128, 64, 16, 1e-3, (0, 1, 2, 4, 8, 16), (0, 1, 2, 3, 4)),
    "sums": Setting("SmolLM2-135M, one-digit sums", SUMS, 40, 16, 8, 2e-5, (0, 4, 16), (0, 1, 2)),
}
QUICK = replace(SETTINGS["sorting"], updates=4, rows=8, every=2, lags=(0, 2), seeds=(0,))


# ---- windows of an exact age -----------------------------------------------------------------------------------------


class Writer(TrainerCallback):
    """Draws window v + lag after v updates, and before the first update windows 0 to lag."""

    def __init__(self, folder: Path, measure: tasks.Measure, tokenizer: Any, lag: int, rows: int, each: int) -> None:
        self.folder, self.measure, self.tokenizer = folder, measure, tokenizer
        self.lag, self.rows, self.each = lag, rows, each
        self.longest = measure.task.options["max_completion_length"]
        self.prompts = self._in_turn(measure.task.train.to_list())
        self.number = 0

    def _in_turn(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            yield from random.sample(rows, len(rows))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for _ in range(self.lag + 1):
            self.write(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.number < args.max_steps:
            self.write(model, state.global_step)

    @torch.no_grad()
    def write(self, model: PreTrainedModel, step: int) -> None:
        rows = [row for row in islice(self.prompts, self.rows // self.each) for _ in range(self.each)]
        asked = [prompt_ids_of(self.tokenizer, row["prompt"]) for row in rows]
        padded = self.tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")  # (B, P)
        model.eval()
        drawn = model.generate(
            **padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.longest
        )[:, padded["input_ids"].shape[1] :]  # (B, C)
        model.train()
        end = self.tokenizer.eos_token_id
        ids = [one[: one.index(end) + 1] if end in one else one for one in drawn.tolist()]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        rewards = self.measure.reward(
            prompts=[row["prompt"] for row in rows],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=ids,
            **columns,
        )
        records = pa.table(dict(prompt_ids=asked, completion_ids=ids, reward=rewards, policy_step=[step] * len(rows)))
        with appearing(self.folder / f"window-{self.number:08d}.parquet") as partial_file:
            pq.write_table(records, partial_file)
        self.number += 1


class DelayedGRPO(GRPOTrainer):
    """GRPO on its generations from `lag` updates ago, with their log-probabilities as the old ones in its ratio."""

    def __init__(self, *args: Any, lag: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lag, self.queue, self.ages = lag, deque[tuple[int, Any]](), list[int]()

    def _generate_and_score_completions(self, inputs):
        while len(self.queue) < self.lag:  # at the start: other prompts, answered by the untrained policy
            some = random.sample(range(len(self.train_dataset)), len(inputs) // self.num_generations)
            self.queue.append(self._drawn([self.train_dataset[i] for i in some for _ in range(self.num_generations)]))
        self.queue.append(self._drawn(inputs))
        step, output = self.queue.popleft()
        self.ages.append(self.state.global_step - step)
        return output

    def _drawn(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)  # (B, P + C)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, output["completion_ids"].shape[1], batch_size=len(ids)
            )
        return self.state.global_step, {**output, "old_per_token_logps": log_probs}


# ---- a run -----------------------------------------------------------------------------------------------------------


def result(task_name: str, setting: Setting, method: str, lag: int, seed: int) -> dict[str, Any]:
    """Carry out one run in a worker process; return its accuracies and the ages of its rollouts, among others."""
    set_up(1)
    random.seed(seed)
    options = dict(
        setting.methods[method], learning_rate=setting.rate, max_steps=setting.updates, seed=seed,
        per_device_train_batch_size=setting.rows, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        task = tasks.named(task_name, seed, Path(folder) / "model")
        measure = tasks.Measure(task, range(0, setting.updates + 1, setting.every))
        if method == "GRPO":
            trainer = tasks.train((partial(DelayedGRPO, lag=lag), GRPOConfig), measure, **options)
            ages = trainer.ages
        else:
            tokenizer = AutoTokenizer.from_pretrained(task.model)
            records = Path(folder) / "records"
            writer = Writer(records, measure, tokenizer, lag, setting.rows, options.get("num_generations", 1))
            following = dict(follow_rollouts=str(records), max_staleness=lag)
            trainer = tasks.train((partial(_follower, writer), TBRMConfig), measure, **options, **following)
            ages = [int(row["staleness/max"]) for row in trainer.state.log_history if "staleness/max" in row]
    return {
        "task": task_name, "method": method, "lag": lag, "seed": seed, "ages": ages,
        "points": [[point[0], point[2]] for point in measure.points], "seconds": measure.seconds,
    }  # fmt: skip


def _follower(writer: Writer, **given: Any) -> TBRMTrainer:
    """A trainer without data and reward functions. The writer has both."""
    callbacks = [writer, *given.pop("callbacks")]
    return TBRMTrainer(**{**given, "reward_funcs": None, "train_dataset": None}, callbacks=callbacks)


# ---- the page --------------------------------------------------------------------------------------------------------


class Runs:
    """The finished runs on one task."""

    def __init__(self, store: Store, task: str, setting: Setting):
        self.store, self.task, self.setting = store, task, setting

    def name(self, method: str, lag: int, seed: int) -> str:
        return f"{self.task}: {method}, lag {lag}, seed {seed}"

    def of(self, method: str, lag: int) -> list[dict[str, Any]]:
        names = [self.name(method, lag, seed) for seed in self.setting.seeds]
        return [self.store[name] for name in names if name in self.store]


def differences(runs: Runs, method: str, lag: int) -> str:
    """Final accuracy minus that at lag 0, paired by seed."""
    without = {run["seed"]: run for run in runs.of(method, 0)}
    pairs = [
        run["points"][-1][1] - without[run["seed"]]["points"][-1][1]
        for run in runs.of(method, lag)
        if run["seed"] in without
    ]
    return show(pairs, "+")


def section(runs: Runs) -> str:
    setting, parts = runs.setting, []
    for title, number in (
        ("Final accuracy", lambda run: run["points"][-1][1]),
        ("Mean accuracy along the curve", lambda run: area(np.array(run["points"])[:, 1])),
    ):
        rows = [
            [method, *(show(list(map(number, runs.of(method, lag)))) for lag in setting.lags)]
            for method in setting.methods
        ]
        parts.append(f"{title}:\n\n{table(['', *(f'lag {lag}' for lag in setting.lags)], rows)}")
    rows = [[method, *(differences(runs, method, lag) for lag in setting.lags[1:])] for method in setting.methods]
    header = ["", *(f"lag {lag}" for lag in setting.lags[1:])]
    parts.append(f"Final accuracy less that at lag 0, paired by seed:\n\n{table(header, rows)}")
    seeds = max(len(runs.of(method, lag)) for method in setting.methods for lag in setting.lags)
    text = wrapped(
        f"{setting.updates} updates on {setting.rows} rollouts each, learning rate {setting.rate:g} for every method "
        f"and lag, {seeds} of {len(setting.seeds)} seeds so far, means with their standard error."
    )
    tables = "\n\n".join(parts)
    return f"## {setting.title}\n\n{text}\n\n{tables}\n"


def page(of_tasks: Sequence[Runs], packages: str) -> str:
    text = wrapped(
        "Every window is trained on exactly so many updates after it was drawn. `policy`, `calibrated` and `group` are "
        "TBRM's soft values, with β = 0.05 on the tiny model and 0.02 on SmolLM2 and with no correction: they follow a "
        "folder of rollouts. GRPO has TRL's clipped ratio to the policy that drew. The rate was not tuned anew for any "
        "lag; a lower one would suit long lags better."
    )
    sections = "\n".join(map(section, of_tasks))
    return f"""# Accuracy against the age of rollouts

Written by `python benchmarks/staleness.py`. {packages}. Every run: [staleness.json](staleness.json).

{text}

![accuracy against lag](staleness.png)

{sections}"""


def draw(of_tasks: Sequence[Runs]) -> Any:
    figure, axes = plt.subplots(
        1, len(of_tasks), figsize=(5.5 * len(of_tasks), 3.6), layout="constrained", squeeze=False
    )
    for axis, runs in zip(axes[0], of_tasks, strict=True):
        for number, method in enumerate(runs.setting.methods):
            lags = [lag for lag in runs.setting.lags if runs.of(method, lag)]
            ends = [[run["points"][-1][1] for run in runs.of(method, lag)] for lag in lags]
            if lags:
                band(axis, lags, ends, color=f"C{number}", label=method)
        axis.set(
            title=runs.setting.title, xlabel="updates between drawing and training", ylabel="final accuracy",
            ylim=(0, None),
        )  # fmt: skip
        axis.legend()
    return figure


def main() -> None:
    arguments = parse(
        __doc__,
        "two short runs of each method",
        tasks=dict(nargs="+", default=["sorting"], choices=list(SETTINGS)),
        minutes=dict(type=float, default=math.inf, help="begin no further run after these"),
        processes=dict(type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each"),
    )
    settings = {"sorting": QUICK} if arguments.quick else SETTINGS
    packages = listed(versions("torch", "transformers", "trl", "tbrm-trl"))
    store = Store(arguments.output / "staleness.json", packages=packages)
    of_tasks = {task: Runs(store, task, setting) for task, setting in settings.items()}
    wanted = {
        of_tasks[task].name(method, lag, seed): (task, settings[task], method, lag, seed)
        for task in (settings if arguments.quick else arguments.tasks)
        for seed, lag, method in product(settings[task].seeds, settings[task].lags, settings[task].methods)
    }
    carry_out(
        lambda: wanted, result, store, arguments.processes, time.monotonic() + 60 * arguments.minutes,
        lambda name: f"{store[name]['points'][-1][1]:.2f}, {store[name]['seconds']:.0f} s",
    )  # fmt: skip
    begun = [runs for task, runs in of_tasks.items() if any(name.startswith(f"{task}: ") for name in store)]
    write(arguments.output, "staleness", page(begun, packages), figure=draw(begun))


if __name__ == "__main__":
    main()
