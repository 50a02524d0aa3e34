"""What grows in a long run: memory, open files, threads, the time of an update, files of saved rollouts.

    python benchmarks/long_run.py          # writes docs/benchmarks/long_run.{json,md,png}; 5,000 updates, ten minutes
    python benchmarks/long_run.py --quick  # 60 updates, to a temporary folder

A tiny model with a replay buffer, saved rollouts, logged completions and checkpoints, in one process.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common.measure import QUIET, quiet, set_up
from common.report import listed, parse, plt, processor, table, versions, write
from common.tiny import letters, save
from datasets import Dataset
from transformers import TrainerCallback

from tbrm_trl import TBRMConfig, TBRMTrainer

UPDATES, EVERY = 5000, 25
PROMPTS = [f"{a}+{b}=" for a in range(10) for b in range(10)]


@dataclass
class Seen:
    """The process after `update` updates: seconds per update since the last measurement, MiB, and counts."""

    update: int
    seconds: float
    resident: float
    descriptors: int
    threads: int
    rollout_files: int


class Look(TrainerCallback):
    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every
        self.process, self.seen = psutil.Process(), list[Seen]()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        seconds = (time.perf_counter() - self.began) / self.every
        gc.collect()  # uncollected garbage is no leak
        resident = self.process.memory_info().rss / 2**20
        files = sum(1 for _ in (self.folder / "rollouts").glob("*.parquet"))
        self.seen.append(
            Seen(state.global_step, seconds, resident, self.process.num_fds(), self.process.num_threads(), files)
        )
        self.began = time.perf_counter()


def run(folder: Path, updates: int) -> list[Seen]:
    look = Look(folder / "out", max(1, min(EVERY, updates // 20)))
    options: dict[str, Any] = dict(
        beta=0.1, learning_rate=1e-4, max_steps=updates, max_completion_length=8, per_device_train_batch_size=8,
        num_iterations=2, replay_buffer_size=512, save_rollouts=True, log_completions=True, num_completions_to_print=0,
        bf16=False, use_cpu=True, save_steps=max(1, updates // 10), save_total_limit=2, logging_steps=10,
        generation_kwargs={"min_new_tokens": 8},  # else the policy learns longer texts, and updates seem to slow down
    )  # fmt: skip
    with quiet():
        trainer = TBRMTrainer(
            save(folder / "model"),
            letters,
            TBRMConfig(
                str(folder / "out"), **QUIET | {"save_strategy": "steps", "logging_strategy": "steps"}, **options
            ),
            Dataset.from_list([{"prompt": one} for one in PROMPTS]),
            callbacks=[look],
        )
        trainer.train()
    return look.seen


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter."""
    part = max(1, len(values) // 4)
    return statistics.median(values[:part]), statistics.median(values[-part:])


def report(seen: list[Seen], facts: str) -> str:
    updates = np.array([one.update for one in seen], float)
    half = len(seen) // 2
    slope, _ = np.polyfit(updates[half:] / 1000, [one.resident for one in seen[half:]], 1)
    seconds = quarters([one.seconds for one in seen])
    rows = [
        [name, f"{first:{form}}", f"{last:{form}}"]
        for name, form, (first, last) in (
            ("milliseconds per update", ".1f", (1000 * seconds[0], 1000 * seconds[1])),
            ("resident memory, MiB", ".0f", quarters([one.resident for one in seen])),
            ("open descriptors", ".0f", quarters([float(one.descriptors) for one in seen])),
            ("threads", ".0f", quarters([float(one.threads) for one in seen])),
            ("files in `rollouts/`", ".0f", quarters([float(one.rollout_files) for one in seen])),
        )
    ]
    most = max(one.rollout_files for one in seen)
    return f"""# A long run

Written by `python benchmarks/long_run.py`. {facts}. Raw numbers: [long_run.json](long_run.json).

{seen[-1].update:,} updates of 8 trajectories of a tiny model, every second one from a replay buffer of 512, with saved
rollouts, logged completions and ten checkpoints of which two are kept. Medians of the first and of the last quarter:

{table(["", "first quarter", "last quarter"], rows)}

Over the second half resident memory changes by {slope:+.2f} MiB per 1,000 updates. An update of the last quarter takes
{seconds[1] / seconds[0]:.2f} of the time of one of the first. `rollouts/` never held more than {most} files.

![memory and time](long_run.png)
"""


def main() -> None:
    arguments = parse(__doc__, "60 updates")
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(Path(folder), 60 if arguments.quick else UPDATES)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.5))
    updates = [one.update for one in seen]
    above.plot(updates, [one.resident for one in seen])
    above.set_ylabel("resident MiB")
    below.plot(updates, [1000 * one.seconds for one in seen])
    below.set(xlabel="updates", ylabel="ms per update")
    facts = f"{processor()}; {listed(versions('tbrm-trl', 'torch', 'transformers', 'trl'))}"
    raw = {"facts": facts, "seen": [vars(one) for one in seen]}
    write(arguments.output, "long_run", report(seen, facts), raw, figure)


if __name__ == "__main__":
    main()
