"""Two real processes over gloo: the same trajectories give the same gradient as one process, and as brute force.

Adapters, DeepSpeed and FSDP2 are in test_distributed.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from common.launch import free_port, launcher_of
from common.tiny import perturb, save
from oracle import distance, solve
from scripted import script, scripted_trainer
from test_oracle import TOLERANCE, plain
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent


def launch(arguments: list[str], launcher: list[str] | None = None, script: str = "two_processes.py") -> None:
    launcher = launcher or ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    folders = [str(TESTS), str(TESTS.parent / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)  # accelerate would take it for "no DeepSpeed"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(TESTS / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # DeepSpeed compiles an operator on its first launch
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def two_processes(tmp_path: Path, **options):
    """Train on rows of which only 0, 2 and 3 count, all on the first process; returns what was seen as well."""
    folder, rows = save(tmp_path / "model"), script(unscored=(1, 4, 5, 6, 7))
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in rows]))
    launch([folder, str(rows_file), str(tmp_path), json.dumps(options)])
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)
    on_first, on_second = seen["windows"]
    assert len(on_first) == len(on_second) == 4
    assert all(t.reward != t.reward for t in on_second) and sum(t.reward == t.reward for t in on_first) == 3
    return folder, rows, seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_gradient_with_exclusions_on_one_process(accumulation, tmp_path):
    """None of the second process's rows counts; it still runs its forward and backward."""
    folder, rows, seen = two_processes(
        tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    perturbed = AutoModelForCausalLM.from_pretrained(folder)
    perturb(perturbed)
    policy = plain(AutoModelForCausalLM.from_pretrained(folder))
    answer = solve(policy, plain(perturbed), seen["windows"][0] + seen["windows"][1], beta=0.1)
    assert distance(strip(seen["gradients"]), answer.gradient) <= TOLERANCE
    # What the log shows is the mean over processes.
    assert sum(map(sum, seen["losses"])) / 2 == pytest.approx(answer.loss, rel=TOLERANCE)
    assert seen["log"][0]["left_out/unscored"] == pytest.approx(5 / 8)
    assert seen["log"][0]["residual/mean"] == pytest.approx(0.1 * sum(answer.residuals) / 3, rel=1e-3)

    one = scripted_trainer(folder, rows, tmp_path, per_device_train_batch_size=8)
    perturb(one.ref_model)
    one.train()
    assert distance(strip(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE


def strip(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}


def test_fsdp_that_became_ddp_is_refused(tmp_path):
    """As accelerate makes of it on CPUs, without a word."""
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in script()]))
    with pytest.raises(AssertionError, match="FSDP was asked for, and accelerate made MULTI_CPU of it"):
        launch(
            [save(tmp_path / "model"), str(rows_file), str(tmp_path), '{"per_device_train_batch_size": 4}'],
            launcher_of("fsdp2"),
        )
