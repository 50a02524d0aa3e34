"""Accuracy against the age of the rollouts: every window is trained on exactly so many updates after it was drawn.

    python benchmarks/staleness.py            # the tiny model, a quarter of an hour on one core
    python benchmarks/staleness.py --quick    # two short runs of each method, to a temporary folder

TBRM follows a folder (`follow_rollouts`) into which a writer in the same process puts windows: after v updates it draws
window v + lag. GRPO keeps its own generations in a queue of that length, with the log-probabilities that they were
drawn with, which its clipped ratio takes: the correction that TRL has. The first windows of a run are all of the
untrained policy. All have one learning rate, which `comparison.py` found good for every method without a lag.

Every finished run is kept in docs/benchmarks/staleness.json, and is not made again. Delete it to start over.
"""

import math
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
    band,
    listed,
    mean_and_error,
    parse,
    plt,
    processor,
    show,
    table,
    versions,
    wrapped,
    write,
)
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.files import appearing

METHODS: dict[str, dict[str, Any]] = {
    "policy": dict(soft_value="policy", beta=0.05),
    "calibrated": dict(soft_value="calibrated", beta=0.05),
    "group": dict(soft_value="group", beta=0.05, num_generations=4),
    "GRPO": dict(beta=0.0, num_generations=4),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of the runs."""

    updates: int = 128
    rows: int = 64  # trajectories per update
    every: int = 16  # updates between two measurements
    rate: float = 1e-3
    lags: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


QUICK = Setting(updates=4, rows=8, every=2, lags=(0, 2), seeds=(0, 1))


# ---- windows of an exact age -----------------------------------------------------------------------------------------


class Writer(TrainerCallback):
    """Draws window v + lag when the policy has made v updates, and before the first all windows up to lag."""

    def __init__(self, folder: Path, measure: tasks.Measure, tokenizer: Any, lag: int, rows: int, each: int) -> None:
        self.folder, self.measure, self.tokenizer = folder, measure, tokenizer
        self.lag, self.rows, self.each = lag, rows, each
        self.prompts = self._in_turn(measure.task.train["prompt"][:])
        self.number = 0

    def _in_turn(self, prompts: Sequence[str]) -> Iterator[str]:
        while True:
            yield from random.sample(prompts, len(prompts))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for _ in range(self.lag + 1):
            self.write(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.number < args.max_steps:
            self.write(model, state.global_step)

    @torch.no_grad()
    def write(self, model: PreTrainedModel, step: int) -> None:
        prompts = [prompt for prompt in islice(self.prompts, self.rows // self.each) for _ in range(self.each)]
        asked = self.tokenizer(prompts, return_tensors="pt")["input_ids"]  # (B, P), all of one length
        model.eval()
        drawn = model.generate(asked, do_sample=True, top_k=0, max_new_tokens=tasks.ANSWER_LENGTH)[:, asked.shape[1] :]
        model.train()
        end = self.tokenizer.eos_token_id
        completions = [ids[: ids.index(end) + 1] if end in ids else ids for ids in drawn.tolist()]
        rewards = self.measure.reward(prompts=prompts, completion_ids=completions)
        columns = dict(prompt_ids=asked.tolist(), completion_ids=completions, reward=rewards)
        records = pa.table({**columns, "policy_step": [step] * len(prompts)})
        with appearing(self.folder / f"window-{self.number:08d}.parquet") as partial_file:
            pq.write_table(records, partial_file)
        self.number += 1


class DelayedGRPO(GRPOTrainer):
    """GRPO on its own generations of `lag` updates ago, with their log-probabilities as the old ones of its ratio."""

    def __init__(self, *args: Any, lag: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lag, self.queue, self.ages = lag, deque[tuple[int, Any]](), list[int]()

    def _generate_and_score_completions(self, inputs):
        while len(self.queue) < self.lag:  # at the start: other prompts, drawn by the untrained policy
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


def result(method: str, lag: int, seed: int, setting: Setting) -> dict[str, Any]:
    """The accuracies of one run, and the ages of what it was trained on."""
    random.seed(seed)
    options = dict(
        METHODS[method], learning_rate=setting.rate, max_steps=setting.updates, seed=seed,
        per_device_train_batch_size=setting.rows, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        task = tasks.named("sorting", seed, Path(folder) / "model")
        measure = tasks.Measure(task, range(0, setting.updates + 1, setting.every))
        if method == "GRPO":
            trainer = tasks.train((partial(DelayedGRPO, lag=lag), GRPOConfig), measure, **options)
            ages = trainer.ages
        else:
            tokenizer = tasks.tiny.tokenizer(alphabet=tasks.LETTERS)
            records = Path(folder) / "records"
            writer = Writer(records, measure, tokenizer, lag, setting.rows, options.get("num_generations", 1))
            following = dict(follow_rollouts=str(records), max_staleness=lag)
            trainer = tasks.train((partial(_follower, writer), TBRMConfig), measure, **options, **following)
            ages = [int(row["staleness/max"]) for row in trainer.state.log_history if "staleness/max" in row]
    return {
        "method": method, "lag": lag, "seed": seed, "ages": ages,
        "points": [[point[0], point[2]] for point in measure.points], "seconds": measure.seconds,
    }  # fmt: skip


def _follower(writer: Writer, **given: Any) -> TBRMTrainer:
    """A trainer that has no data and no rewards, beside a writer that has both."""
    callbacks = [writer, *given.pop("callbacks")]
    return TBRMTrainer(**{**given, "reward_funcs": None, "train_dataset": None}, callbacks=callbacks)


# ---- the page --------------------------------------------------------------------------------------------------------


def area(points: Sequence[Sequence[float]]) -> float:
    """The mean accuracy along the curve."""
    accuracies = np.array(points)[:, 1]
    return float(np.trapezoid(accuracies) / (len(accuracies) - 1))


def finished(runs: Store, setting: Setting, method: str, lag: int) -> list[dict[str, Any]]:
    return [runs[key] for seed in setting.seeds if (key := name(method, lag, seed)) in runs]


def name(method: str, lag: int, seed: int) -> str:
    return f"{method}, lag {lag}, seed {seed}"


def differences(runs: Store, setting: Setting, method: str, lag: int) -> str:
    """Final accuracy less that without a lag, paired by seed."""
    without = {run["seed"]: run for run in finished(runs, setting, method, setting.lags[0])}
    pairs = [
        run["points"][-1][1] - without[run["seed"]]["points"][-1][1]
        for run in finished(runs, setting, method, lag)
        if run["seed"] in without
    ]
    if not pairs:
        return ""
    mean, error = mean_and_error(pairs)
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"


def shown(values: Sequence[float]) -> str:
    return show(values) if values else ""


def page(runs: Store, setting: Setting, facts: str) -> str:
    parts = []
    for title, number in (
        ("Final accuracy", lambda run: run["points"][-1][1]),
        ("Mean accuracy along the curve", lambda run: area(run["points"])),
    ):
        rows = [
            [method, *(shown(list(map(number, finished(runs, setting, method, lag)))) for lag in setting.lags)]
            for method in METHODS
        ]
        parts.append(f"{title}:\n\n{table(['', *(f'lag {lag}' for lag in setting.lags)], rows)}")
    rows = [[method, *(differences(runs, setting, method, lag) for lag in setting.lags[1:])] for method in METHODS]
    header = ["", *(f"lag {lag}" for lag in setting.lags[1:])]
    parts.append(f"Final accuracy less that at lag {setting.lags[0]}, paired by seed:\n\n{table(header, rows)}")
    seeds = len(finished(runs, setting, next(iter(METHODS)), setting.lags[-1]))
    text = wrapped(
        f"The tiny model sorts letters (`benchmarks/common/tasks.py`): {setting.updates} updates on {setting.rows} "
        f"rollouts each, learning rate {setting.rate:g} for every method and lag, {seeds} seeds, means with their "
        "standard error. `policy`, `calibrated` and `group` are TBRM's soft values with β = 0.05 and no correction: "
        "they follow a folder of rollouts. GRPO has TRL's clipped ratio to the policy that drew. The rate was not "
        "tuned anew for any lag; a lower one would suit long lags better."
    )
    tables = "\n\n".join(parts)
    return f"""# Accuracy against the age of rollouts

Written by `python benchmarks/staleness.py`. {facts}. Every run: [staleness.json](staleness.json).

{text}

![accuracy against lag](staleness.png)

{tables}
"""


def draw(runs: Store, setting: Setting) -> Any:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, method in enumerate(METHODS):
        lags = [lag for lag in setting.lags if finished(runs, setting, method, lag)]
        ends = [[run["points"][-1][1] for run in finished(runs, setting, method, lag)] for lag in lags]
        if lags:
            band(axes, lags, ends, color=f"C{number}", label=method)
    axes.set(xlabel="updates between drawing and training", ylabel="final accuracy", ylim=(0, None))
    axes.legend()
    return figure


def main() -> None:
    arguments = parse(
        __doc__,
        "two short runs of each method",
        minutes=dict(type=float, default=math.inf, help="begin no further run after these"),
    )
    setting = QUICK if arguments.quick else Setting()
    set_up(1)
    facts = f"{processor()}; {listed(versions('torch', 'transformers', 'trl', 'tbrm-trl'))}"
    runs = Store(arguments.output / "staleness.json", facts=facts)
    until = time.monotonic() + 60 * arguments.minutes
    wanted = [(method, lag, seed) for seed in setting.seeds for lag in setting.lags for method in METHODS]
    for method, lag, seed in wanted:
        if name(method, lag, seed) in runs or time.monotonic() > until:
            continue
        run = result(method, lag, seed, setting)
        runs[name(method, lag, seed)] = run
        print(f"{name(method, lag, seed)}: {run['points'][-1][1]:.2f}, {run['seconds']:.0f} s", flush=True)
    write(arguments.output, "staleness", page(runs, setting, facts), figure=draw(runs, setting))


if __name__ == "__main__":
    main()
