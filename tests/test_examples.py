"""The launch lines of `examples/` run unchanged, with only model, data, sizes, output and machine overridden.

A line for several processes runs on two.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from common.launch import ROOT, run
from common.tiny import save
from helpers.examples import RECIPES, SETUPS, after, command_of, logged_updates, processes_of, run_line, small
from nbclient import NotebookClient
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tbrm_trl import TBRMConfig

CONFIGS = [*sorted(RECIPES.glob("*.yaml")), *sorted(SETUPS.glob("*.yaml"))]
BATCH = re.compile(r"^# .*: (\d+) rows × (\d+) process\D*?(?:\(.*\) )?× (\d+)$", re.MULTILINE)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_batch_arithmetic(file, train_script, monkeypatch):
    """Rows × processes × accumulation, as in the comment, is one update of the file on the processes of its line."""
    command = command_of(file)
    assert after(command, "--config") == str(file.relative_to(ROOT))
    monkeypatch.setattr(TBRMConfig, "world_size", property(lambda self: processes_of(command)))
    _, config, _ = train_script.parse(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    ((rows, processes, accumulation),) = BATCH.findall(file.read_text())
    assert int(rows) == config.per_device_train_batch_size
    assert int(processes) == processes_of(command)
    assert int(accumulation) == config.gradient_accumulation_steps
    assert int(rows) * int(processes) * int(accumulation) == config.rows_per_update
    if "tbrm" in config.output_dir:
        published = yaml.safe_load((RECIPES / "tbrm.yaml").read_text())
        assert config.rows_per_update == 128
        for name in ("beta", "num_generations", "max_completion_length", "temperature", "max_steps"):
            assert getattr(config, name) == published[name]
        assert config.soft_value == ("calibrated" if config.rollouts == "async" else published["soft_value"])


@pytest.mark.launch
@pytest.mark.parametrize("name", ["tbrm", "tbrm_7b"])
def test_full_fine_tuning(name, tmp_path):
    """The published recipes. After training their saved model is complete and has changed."""
    printed = run_line(RECIPES / f"{name}.yaml", tmp_path)
    assert "(2 per device × 2 process(es) × 2 accumulation)" in printed
    logged_updates(tmp_path)
    after_training, before = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict() for folder in ("out", "model")
    )
    assert not torch.equal(after_training["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.launch
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_adapters(name, tmp_path):
    """The adapter is trained, saved, and loads onto its base. QLoRA: its optimizer keeps 8 bits."""
    run_line(SETUPS / f"{name}.yaml", tmp_path)
    logged_updates(tmp_path)
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(weight.any() for weight in weights.values())  # B starts at zero
    assert not any("lm_head" in parameter for parameter in weights)
    # In bfloat16, as TRL makes it for a quantised base, most updates of an adapter would round to nothing.
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path / "out"))

    (saved,) = tmp_path.glob("out/checkpoint-*/optimizer.pt")
    states = torch.load(saved, weights_only=False)["state"].values()
    moments = [state.get("__bnb_optimizer_quant_state__", state) for state in states]
    kept = {value.dtype for one in moments for value in one.values() if torch.is_tensor(value)}
    assert (torch.uint8 in kept) == (name == "qlora")


@pytest.mark.launch
def test_demo(tmp_path):
    """On a tiny model it writes held-out accuracies before and after, a model, and a curve."""
    model = save(tmp_path / "model")
    sizes = dict(
        steps=2, rollouts_per_step=4, train_problems=8, eval_problems=4, eval_samples=2, output=tmp_path / "out"
    )
    words = [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    run([sys.executable, "examples/reasoning_gym_demo.py", "--model", model, *words])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row["step"] for row in metrics["history"]] == [1, 2]
    assert metrics["held_out"]["sampled"].keys() == {"before", "after"}
    for sampled in metrics["held_out"]["sampled"].values():
        assert (sampled["problems"], sampled["samples"]) == (4, 2) and 0 <= sampled["mean"] <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.launch
def test_notebook(tmp_path):
    """It runs top to bottom in a kernel, on a tiny model with smaller numbers. It is stored without outputs."""
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nmodel, steps, rollouts, samples = {save(tmp_path / 'model')!r}, 3, 4, 2"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Trained on 12 logged answers." in printed
    assert (tmp_path / "outputs/quickstart/report.html").is_file()


@pytest.mark.launch
def test_slurm(tmp_path):
    """The whole file with its ZeRO-3, on one node with two CPU processes and substitutes for `srun` and `scontrol`."""
    file = ROOT / "examples/slurm.sh"
    line = shlex.split(file.read_text().splitlines()[1].removeprefix("#"))
    assert line[:2] == ["sbatch", "examples/slurm.sh"]
    for name, body in (("srun", 'shift 2; exec "$@"'), ("scontrol", "echo 127.0.0.1; echo another-node")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    settings = yaml.safe_load((ROOT / re.search(r"LAUNCH_CONFIG:-(\S+)\}", file.read_text())[1]).read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump({**settings, "use_cpu": True, "mixed_precision": "no"}))
    printed = run(
        ["bash", str(file), *line[2:], *small(tmp_path)],
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        LAUNCH_CONFIG=str(tmp_path / "cpu.yaml"),
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_NODEID="0",
        SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_ID=str(os.getpid()),
    )
    assert "(2 per device × 2 process(es) × 2 accumulation)" in printed
    logged_updates(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_slurm_keeps_the_recipe(train_script):
    """On its nodes × GPUs, its options give one update of the recipe."""
    text = (ROOT / "examples/slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "examples/slurm.sh"], check=False).returncode == 0
    given = shlex.split(text.splitlines()[1])[3:]
    processes = math.prod(int(re.search(rf"^#SBATCH --{name}=(\d+)", text, re.M)[1]) for name in NODES)
    recipe = yaml.safe_load((ROOT / after(given, "--config")).read_text())
    rows = recipe["per_device_train_batch_size"]
    accumulation = int(after(given, "--gradient_accumulation_steps"))
    assert rows * processes * accumulation == 128
    assert f"{rows} rows × {processes} processes × {accumulation}" in text


NODES = ("nodes", "gpus-per-node")
