"""What a change to the trainer costs: an update of this version compared with one of another version.

    git worktree add ../before eb01c68
    python benchmarks/update_cost.py --before ../before --quick    # a few pairs, to a temporary folder
    python benchmarks/update_cost.py --before ../before            # 300 pairs: docs/benchmarks/update_cost.{json,md}

Two processes, one with each version's `src/`, hold the same tiny model and the same scripted rollouts on one core. They
take turns: each update of one is followed by one of the other, and the order changes from pair to pair. Both also
count the operations that an update dispatches.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common.launch import ROOT
from common.measure import QUIET, quiet, set_up
from common.report import listed, parse, processor, table, versions, write
from common.tiny import save
from common.turns import Process, Turns, interval, take_turns

PAIRS, WARMED_UP = 300, 10
ROWS, LENGTH = 16, 32


def worker(folder: str) -> None:
    """Train in this process: an update for each line on stdin, with its seconds and operations on stdout."""
    from datasets import Dataset
    from torch.utils._python_dispatch import TorchDispatchMode

    from tbrm_trl import TBRMConfig, TBRMTrainer

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    turns = Turns(Count, lambda count: count.counts)
    ids = [[3 + (i * 7 + j) % 90 for j in range(LENGTH)] for i in range(ROWS)]

    def rollout(prompts, trainer):
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": ids[: len(prompts)],
            "logprobs": [[0.0] * LENGTH for _ in prompts],
        }

    def reward(completions, **kwargs):
        return [i / ROWS for i in range(len(completions))]

    set_up()
    options: dict[str, Any] = dict(
        beta=0.1, learning_rate=1e-4, max_steps=10**6, max_completion_length=LENGTH, bf16=False, use_cpu=True,
        per_device_train_batch_size=ROWS,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"{i}="} for i in range(ROWS)])
    with quiet():
        trainer = TBRMTrainer(
            folder, reward, TBRMConfig(f"{folder}/{os.getpid()}", **QUIET | options), rows, rollout_func=rollout,
            callbacks=[turns],
        )  # fmt: skip
        trainer.train()


def measure(before: Path, pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        versions_ = {
            name: Process(
                [__file__, "--worker", folder],
                {min(os.sched_getaffinity(0))},
                os.pathsep.join([str(source / "src"), str(Path(__file__).parent)]),
            )
            for name, source in (("before", before), ("now", ROOT))
        }
        seconds, operations = take_turns(versions_, WARMED_UP, pairs)
    return {"ms": {name: [1000 * one for one in took] for name, took in seconds.items()}, "operations": operations}


def report(raw: dict[str, Any], before: str) -> str:
    ratio, low, high = interval(raw["ms"]["now"], raw["ms"]["before"])
    now, then = (Counter(raw["operations"][name]) for name in ("now", "before"))
    rows = [[f"`{name}`", str(then[name]), str(now[name])] for name in sorted(now | then) if now[name] != then[name]]
    took = {name: statistics.median(values) for name, values in raw["ms"].items()}
    return f"""# What an update costs beside an earlier version

Written by `python benchmarks/update_cost.py --before …`, of version `{before}`. {raw["facts"]}.
Raw numbers: [update_cost.json](update_cost.json).

{len(raw["ms"]["now"])} pairs of updates of {ROWS} trajectories of {LENGTH} tokens, a tiny model, one core:
{took["now"]:.1f} ms now, {took["before"]:.1f} ms before. The median of the paired ratios is **{ratio:.3f}**, with a 95%
interval of {low:.3f} to {high:.3f}.

An update dispatches {sum(now.values()):,} operations now, {sum(then.values()):,} before. Those that differ:

{table(["operation", "before", "now"], rows)}
"""


def main() -> None:
    arguments = parse(
        __doc__, "20 pairs", before=dict(type=Path, required=True, help="a checkout of the other version")
    )
    raw = measure(arguments.before.resolve(), 20 if arguments.quick else PAIRS)
    commit = ["git", "-C", str(arguments.before), "rev-parse", "--short", "HEAD"]
    before = subprocess.run(commit, capture_output=True, text=True).stdout.strip() or arguments.before.name
    raw |= {"facts": f"{processor()}; {listed(versions('torch', 'transformers', 'trl'))}", "before": before}
    write(arguments.output, "update_cost", report(raw, before), raw)


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main()
