"""Two real processes over gloo: the same trajectories give the same gradient as one process, and as brute force."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from oracle import distance, solve
from scripted import script, scripted_trainer
from test_oracle import TOLERANCE, plain
from tiny import perturb, save
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: list[str], launcher: list[str] | None = None) -> None:
    launcher = launcher or ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(TESTS / "two_processes.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_gradient_with_exclusions_on_one_process(accumulation, tmp_path):
    """Rows 4 to 7 go to the second process and none of them counts; it still runs its forward and backward."""
    folder = save(tmp_path / "model")
    rows = script(unscored=(1, 4, 5, 6, 7))
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in rows]))
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    launch([folder, str(rows_file), str(tmp_path), json.dumps(options)])
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)

    on_first, on_second = seen["windows"]
    assert len(on_first) == len(on_second) == 4
    assert all(t.reward != t.reward for t in on_second) and sum(t.reward == t.reward for t in on_first) == 3

    reference = plain(AutoModelForCausalLM.from_pretrained(folder))
    perturbed = AutoModelForCausalLM.from_pretrained(folder)
    perturb(perturbed)
    answer = solve(reference, plain(perturbed), on_first + on_second, beta=0.1)
    assert distance(strip(seen["gradients"]), answer.gradient) <= TOLERANCE
    # What the log shows is the mean over processes.
    assert sum(map(sum, seen["losses"])) / 2 == pytest.approx(answer.loss, rel=TOLERANCE)
    assert seen["log"]["left_out/unscored"] == pytest.approx(5 / 8)
    assert seen["log"]["residual/mean"] == pytest.approx(0.1 * sum(answer.residuals) / 3, rel=1e-3)

    one = scripted_trainer(folder, rows, tmp_path, per_device_train_batch_size=8)
    perturb(one.ref_model)
    one.train()
    assert distance(strip(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_zero(stage, tmp_path):
    """ZeRO shards gradients (2) and parameters (3), the head's among them: loss and gradient norm stay the same."""
    folder = save(tmp_path / "model")
    rows = script(unscored=(1, 4, 5, 6, 7))
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in rows]))
    launcher_config = tmp_path / "zero.yaml"
    launcher_config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: {free_port()}\n"
        f"deepspeed_config: {{zero_stage: {stage}, gradient_accumulation_steps: 2, zero3_init_flag: {stage == 3}}}\n"
    )
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    launch(
        [folder, str(rows_file), str(tmp_path), json.dumps(options)],
        launcher=["accelerate.commands.launch", "--config_file", str(launcher_config)],
    )
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = solve(plain(model), plain(model), seen["windows"][0] + seen["windows"][1], beta=0.1)
    norm = torch.stack([gradient.norm() for gradient in answer.gradient.values()]).norm().item()
    assert sum(map(sum, seen["losses"])) / 2 == pytest.approx(answer.loss, rel=TOLERANCE)
    assert float(seen["log"]["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def strip(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
