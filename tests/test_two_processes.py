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
from peft import LoraConfig
from scripted import script, scripted_trainer
from test_oracle import TOLERANCE, plain
from tiny import perturb, save, save_value_model
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: list[str], launcher: list[str] | None = None, script: str = "two_processes.py") -> None:
    launcher = launcher or ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)  # accelerate would take it for "no DeepSpeed"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(TESTS / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # DeepSpeed compiles an operator on its first launch
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def two_processes(tmp_path: Path, launcher: list[str] | None = None, **options):
    """Train on rows of which only 0, 2 and 3 count, all on the first process; returns what was seen as well."""
    folder, rows = save(tmp_path / "model"), script(unscored=(1, 4, 5, 6, 7))
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in rows]))
    launch([folder, str(rows_file), str(tmp_path), json.dumps(options)], launcher)
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


def test_lora_gives_the_same_gradient(tmp_path):
    """An adapter under DDP, with accumulation: the gradient of one process with everything in one batch."""
    folder, rows, seen = two_processes(
        tmp_path, lora=True, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    one = scripted_trainer(folder, rows, tmp_path, peft_config=lora, per_device_train_batch_size=8)
    one.train()
    assert distance(strip(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE


@pytest.mark.parametrize(("stage", "soft_value"), [(2, "policy"), (3, "policy"), (3, "model")])
def test_deepspeed_zero(stage, soft_value, tmp_path):
    """ZeRO shards gradients (2) and parameters (3), the head's among them: two updates are those of one process.

    The second one is off-policy and away from the reference, so its loss has every term of the residual. A value model
    is whole on every process at any stage.
    """
    launcher_config = tmp_path / "zero.yaml"
    launcher_config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: {free_port()}\n"
        f"deepspeed_config: {{zero_stage: {stage}, gradient_accumulation_steps: 2, zero3_init_flag: {stage == 3}}}\n"
    )
    updates = dict(num_iterations=2, max_steps=2, learning_rate=0.01, lr_scheduler_type="constant")
    if soft_value == "model":
        updates |= dict(soft_value="model", soft_value_model=save_value_model(tmp_path / "value"))
    folder, rows, seen = two_processes(
        tmp_path,
        ["accelerate.commands.launch", "--config_file", str(launcher_config)],
        deepspeed=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, **updates,
    )  # fmt: skip
    one = scripted_trainer(folder, rows, tmp_path, per_device_train_batch_size=8, **updates)
    one.train()
    first, second = (sum(sum(losses[i : i + 2]) for losses in seen["losses"]) / 2 for i in (0, 2))
    assert first == pytest.approx(one.losses[0], rel=TOLERANCE)
    assert second == pytest.approx(one.losses[1], rel=1e-3)  # Adam amplifies rounding in its first step
    assert abs(second - first) > 0.01
    for ours, theirs in zip(seen["log"], one.state.log_history, strict=False):
        if "grad_norm" in theirs:
            assert float(ours["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-3)


def strip(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
