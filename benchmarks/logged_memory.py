"""Peak memory of training on saved rollouts alone, compared with the run that made them.

    python benchmarks/logged_memory.py        # writes docs/benchmarks/logged_memory.{json,md}; a few minutes

SmolLM2-135M on the demo's task. One run rolls out and saves its rollouts; another starts from the same weights and
trains on those alone. Each has its own process, and the operating system reports the peak of its resident memory.
"""

import os
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

from common import tasks
from common.launch import launch
from common.measure import QUIET
from common.report import listed, parse, table, versions, write

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts

STEPS, ROLLOUTS_PER_STEP = 2, 16
PACKAGES = ("torch", "transformers", "trl", "accelerate", "reasoning-gym")


def train(folder: str, logged: bool) -> dict[str, float]:
    """Carry out one of the two runs in this process."""
    task = tasks.of_gym("sums", seed=0)
    trainer = TBRMTrainer(
        task.model,
        None if logged else task.reward,
        TBRMConfig(
            output_dir=f"{folder}/{logged}", beta=0.02, soft_value="calibrated", learning_rate=2e-5, max_steps=STEPS,
            per_device_train_batch_size=ROLLOUTS_PER_STEP, bf16=False, logging_steps=1, save_rollouts=not logged,
            max_completion_length=16, **QUIET | {"logging_strategy": "steps"},
        ),
        load_rollouts(f"{folder}/False") if logged else task.train,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == STEPS
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def report(results: dict[str, Any]) -> str:
    online, logged, weights = results["online"]["peak_gib"], results["logged"]["peak_gib"], results["weights_gib"]
    rows = [
        ["rolls out", f"{online:.2f} GiB"],
        ["trains on saved rollouts", f"{logged:.2f} GiB"],
        ["ratio", f"**{logged / online:.2f}**"],
    ]
    return f"""# Memory of training on saved rollouts alone

Written by `python benchmarks/logged_memory.py`. {results["hardware"]}; {listed(results["versions"])}.
Raw numbers: [logged_memory.json](logged_memory.json).

SmolLM2-135M-Instruct in float32 on the demo's task, {STEPS} updates of {ROLLOUTS_PER_STEP} trajectories, AdamW. The
second run trains on the rollouts that the first one saved: it never generates, and its reference model is freed before
training, as soon as it has scored them.

{table(["run", "peak resident memory"], rows)}

Weights, gradients and Adam's two moments are {4 * weights:.2f} GiB of either; the reference that the first run keeps is
{weights:.2f} GiB.
"""


def main() -> None:
    cores = os.cpu_count() or 1
    output = parse(__doc__).output
    weights = sum(file.stat().st_size for file in Path(tasks.smollm2()).glob("*.safetensors")) / 2**30
    results: dict[str, Any] = {
        "weights_gib": weights,
        "hardware": f"{platform.machine()}, {cores} cores",
        "versions": versions(*PACKAGES),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in ("online", "logged"):
            given: dict[str, Any] = dict(folder=folder, logged=name == "logged")
            threads = {"OMP_NUM_THREADS": str(cores)}
            (results[name],) = launch("logged_memory:train", (), environment=threads, timeout=3600, **given)
    write(output, "logged_memory", report(results), results)


if __name__ == "__main__":
    main()
