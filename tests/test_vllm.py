"""Rollouts by vLLM: the unchanged launch lines, and that vLLM samples from the policy in training.

These tests run where vLLM for CPUs is installed (`make vllm`); helpers/vllm_on_cpu.py says what it needs there. Sleep
mode, which the colocate setup requests, exists only on GPUs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest
import requests
import torch
from common.launch import ROOT, SEARCHED, allow_fsdp_on_cpu, free_port, launch, run
from common.tiny import save
from datasets import Dataset
from helpers.examples import HOW, SETUPS, logged_updates, run_line, sums
from helpers.vllm_on_cpu import in_trainer, install
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.evaluation.results import read_result
from tbrm_trl.model.publisher import write_base

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: `make vllm` has it"),
]

BFLOAT16 = 0.1  # mean difference of a token's log-probability, nats: vLLM computes float32 checkpoints in it
EXACT = 0.02  # the same for a server in float32
AWAY = 1.0  # the least by which the updates move it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One model for all tests, since server and trainers must name the same. vLLM's CPU kernels take heads of 32."""
    folder = tmp_path_factory.mktemp("vllm")
    return save(folder / "model", hidden_size=128, intermediate_size=128, head_dim=32)


@pytest.fixture(scope="module")
def environment(model: str) -> dict[str, str]:
    plugin = install(Path(model).parent / "plugin")
    return {"PYTHONPATH": f"{plugin}:{SEARCHED}:{ROOT / 'src'}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1",
            "VLLM_HOST_IP": "127.0.0.1"}  # fmt: skip


@pytest.fixture(scope="module")
def server(model: str, environment: dict[str, str]) -> Iterator[int]:
    """The port of a server that is started by the command in the setup's comment."""
    text = re.search(r"in another shell:\n((?:# {5}.*\n)+)", (SETUPS / "vllm_server.yaml").read_text())[1]
    line = shlex.split(re.sub(r"^# *", "", text, flags=re.MULTILINE).replace("\\\n", " "))
    at = line.index("vllm")
    assert line[at : at + 2] == ["vllm", "serve"]
    line[at + 2] = model
    port = free_port()
    log = Path(model).parent / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "vllm"),
                *line[at + 1 :],
                "--max-model-len",
                "128",
                "--port",
                str(port),
                "--dtype",
                "float32",
                "--enable-lora",
                "--max-lora-rank",
                "8",
                "--max-loras",
                "4",
            ],
            env={
                **os.environ,
                **environment,
                **dict(word.split("=") for word in line[:at]),
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            },
            stdout=output,
            stderr=output,
            start_new_session=True,  # with its engine
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve(port: int, folder: str) -> None:
    """Give the server these weights, since an earlier test may have left others."""
    asked = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    requests.post(f"http://localhost:{port}/collective_rpc", json=asked).raise_for_status()
    requests.post(f"http://localhost:{port}/reset_prefix_cache").raise_for_status()


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://localhost:{port}/health", timeout=5) as response:
            return response.status == 200
    except (URLError, OSError):
        return False


def test_colocate_setup(model, environment, tmp_path):
    """Its own line, without sleep mode."""
    options = ["--model_name_or_path", model, "--vllm_max_model_length", "128", "--vllm_enable_sleep_mode", "false"]
    run_line(SETUPS / "vllm_colocate.yaml", tmp_path, *options, **environment)
    logged_updates(tmp_path)


def reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    return [float(len(set(ids)) / 8) for ids in completion_ids]


@torch.no_grad()
def distance(model: PreTrainedModel, prompts, completions, logprobs) -> float:
    """Mean difference, in nats, of the tokens' log-probabilities from those that vLLM reports of its samples."""
    differences = []
    for prompt, completion, reported in zip(prompts, completions, logprobs, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()  # (T, V)
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])  # (T, 1)
        differences.append((own - torch.tensor(reported)).abs().flatten())
    return float(torch.cat(differences).mean())


def train_and_compare(model: str, folder: str, **options: Any) -> dict[str, Any]:
    """Train with vLLM's rollouts, then compare what vLLM samples with the policy that was trained.

    `options` are those of `TBRMConfig`, and `lora`.
    """
    in_trainer()
    allow_fsdp_on_cpu()
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # ZeRO-3 would divide a later one
    rows = Dataset.from_list([{"prompt": f"{i} and {j}:"} for i in range(8) for j in range(8)])
    settings = dict(
        output_dir=f"{folder}/trained", beta=0.1, learning_rate=0.01, max_steps=4, lr_scheduler_type="constant",
        per_device_train_batch_size=16, max_completion_length=8, use_cpu=True, bf16=False, use_vllm=True,
        vllm_max_model_length=64, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    settings |= options
    adapter = LoraConfig(r=8, target_modules="all-linear") if settings.pop("lora", False) else None
    trainer = TBRMTrainer(model, reward, TBRMConfig(**settings), rows, peft_config=adapter)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    texts = [row["prompt"] for row in rows][:16]
    prompts, completions, logprobs, _ = trainer.vllm_generation.generate(
        [trainer.processing_class(text)["input_ids"] for text in texts], None, num_generations=1
    )
    compared: dict[str, Any] = {
        name: distance(policy.eval(), prompts, completions, logprobs)
        for name, policy in (("before", before), ("trained", trainer.model))
    }
    compared["updates"] = sum("residual/rms" in row for row in trainer.state.log_history)
    compared["strategy"] = trainer.accelerator.distributed_type.value
    return compared


def trained(model: str, out: Path, environment: dict[str, str], file: str, **options: Any) -> dict[str, Any]:
    """The first process's result under a launch file."""
    processes = 1 if file == "single" else 2
    return launch(
        "test_vllm:train_and_compare", file, processes, environment, model=model, folder=out, **options
    )[0]  # fmt: skip


def check(seen: dict[str, Any], file: str) -> None:
    print(file, seen)
    assert (seen["strategy"], seen["updates"]) == (HOW[file][0], 4)
    assert seen["trained"] < BFLOAT16 < AWAY < seen["before"], seen


@pytest.mark.parametrize("file", ["single", "ddp"])
def test_colocated_samples_are_of_the_trained_policy(file, model, environment, tmp_path):
    check(trained(model, tmp_path, environment, file, vllm_mode="colocate"), file)


def distinct_samples(model: str, folder: str, vllm_mode: str) -> int:
    """The number of different completions among 8 that vLLM draws for one prompt of a trainer."""
    in_trainer()
    options = dict(use_cpu=True, bf16=False, use_vllm=True, vllm_mode=vllm_mode, vllm_max_model_length=64)
    args = TBRMConfig(folder, max_completion_length=8, report_to="none", **options)
    trainer = TBRMTrainer(model, reward, args, Dataset.from_list([{"prompt": "a"}] * 8))
    prompts = [trainer.processing_class("a")["input_ids"]] * 8
    _, completions, _, _ = trainer.vllm_generation.generate(prompts, None, num_generations=1)
    return len(set(map(tuple, completions)))


def test_what_a_model_ships_with_does_not_reach_vllms_samples(model, environment, tmp_path):
    """vLLM takes these fields of the model's file by default; TRL sends its own value for each of them."""
    shipped = GenerationConfig.from_pretrained(model)
    shipped.update(do_sample=True, top_k=1, temperature=0.01, min_p=0.9, repetition_penalty=3.0)
    biased = shutil.copytree(model, tmp_path / "biased")
    shipped.save_pretrained(biased)
    (distinct,) = launch(
        "test_vllm:distinct_samples", "single", 1, environment, model=biased, folder=tmp_path, vllm_mode="colocate"
    )
    assert distinct == 8


def test_server_setup(model, server, environment, tmp_path):
    """Its own line, against the server of its own line."""
    options = ["--model_name_or_path", model, "--vllm_server_port", str(server), "--vllm_group_port", str(free_port())]
    run_line(SETUPS / "vllm_server.yaml", tmp_path, *options, plugin="tests/helpers/vllm_on_cpu.py", **environment)
    logged_updates(tmp_path)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("file", ["single", "fsdp2", "zero3"])
def test_served_samples_are_of_the_trained_policy(file, lora, model, server, environment, tmp_path):
    """The server takes named adapters and gathered shards, from one run after the other."""
    serve(server, model)
    options: dict[str, Any] = {"lora": True, "learning_rate": 0.05} if lora else {}
    ports = dict(vllm_server_port=server, vllm_group_port=free_port())
    check(trained(model, tmp_path, environment, file, vllm_mode="server", **ports, **options), file)


# ---- rollouts beside training ----------------------------------------------------------------------------------------

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
UPDATES = 20


def policy_of(base: Path | str, version: Path) -> PreTrainedModel:
    """Load a version as a user would."""
    if not (version / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(version, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), version).eval()


def base_of(policy: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in policy.named_parameters() if not one.requires_grad}


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_what_is_drawn_beside_training_is_of_the_version_that_it_says(kind, model, server, environment, tmp_path):
    """The actor and vLLM draw for 20 updates. The tokens' log-probabilities are those of the named version."""
    if kind == "qlora" and find_spec("bitsandbytes") is None:
        pytest.skip("no bitsandbytes here")
    for name, value in environment.items():
        if name != "PYTHONPATH":
            os.environ.setdefault(name, value)
    rows = Dataset.from_list([{"prompt": f"{i} and {j}:"} for i in range(8) for j in range(8)])
    settings = dict(
        output_dir=str(tmp_path / "out"), beta=2.0, soft_value="calibrated",
        learning_rate=0.004 if kind == "full" else 0.02, max_steps=UPDATES,
        lr_scheduler_type="constant", per_device_train_batch_size=8, max_completion_length=8, use_cpu=True, bf16=False,
        rollouts="async", async_server=f"http://localhost:{server}", max_staleness=1, save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, follow_timeout=240.0,
    )  # fmt: skip
    adapter = None if kind == "full" else LoraConfig(r=8, target_modules="all-linear")
    quantized = NF4 if kind == "qlora" else None
    args = TBRMConfig(**settings)
    trainer = TBRMTrainer(model, reward, args, rows, peft_config=adapter, quantization_config=quantized)
    trainer._publisher.kept = UPDATES
    policy, base = tmp_path / "out/policy", Path(model)
    if kind == "qlora":
        base = write_base(policy, trainer.model, trainer.processing_class)
    serve(server, str(base))
    bits = base_of(trainer.model)
    trainer.train()
    assert all(torch.equal(one, bits[name]) for name, one in base_of(trainer.model).items())

    drawn: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((tmp_path / "out/records").glob("window-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            drawn.setdefault(row["policy_version"], []).append(row)
    versions = [next(policy.glob(f"step-{step:08d}-*")) for step in range(UPDATES)]
    policies = {version.name: policy_of(base, version) for version in versions}
    assert len(drawn) >= UPDATES // 2
    own, others = [], []
    for name, of_version in drawn.items():
        columns = [[row[n] for row in of_version] for n in ("prompt_ids", "completion_ids", "sampler_log_probs")]
        columns[2] = [[[one] for one in row] for row in columns[2]]
        at = [version.name for version in versions].index(name)
        neighbour = versions[abs(at - 1)].name  # the one before; of the first, the one after
        own.append(distance(policies[name], *columns))
        others.append(distance(policies[neighbour], *columns))
    waits = [row["rollouts/learner_wait_time"] for row in trainer.state.log_history if "rollouts/queue" in row]
    stale = [row["staleness/max"] for row in trainer.state.log_history if "staleness/max" in row]
    print(kind, f"own {max(own):.2g}, neighbours {min(others):.2g} to {max(others):.2g}, waited {sum(waits):.1f} s")
    assert max(own) <= EXACT
    assert statistics.mean(others) >= 10 * EXACT  # so versions that are one off would fail the line above
    assert len(waits) == UPDATES and max(stale) <= 1


def test_async_setup(model, server, environment, tmp_path):
    """Its own line. The server takes an adapter of the run's rank.

    The reward differs between rows: where all rewards are zero, so are a calibrated soft value and the residual.
    """
    serve(server, model)
    options = ["--model_name_or_path", model, "--async_server", f"http://localhost:{server}", "--lora_r", "8"]
    options += ["--reward_funcs", "helpers.reward_functions.letters", "--dtype", "float32"]
    run_line(SETUPS / "vllm_async.yaml", tmp_path, *options, **environment)
    logged_updates(tmp_path)


def test_an_evaluation_by_vllm_gives_the_completions_of_transformers(model, environment, tmp_path):
    """Greedy completions of both, in float32. In bfloat16 the processor's roundings would change tokens."""
    file = sums(tmp_path / "sums.json")
    rows = {}
    for backend, on_cpu in (("transformers", ["--use_cpu", "true"]), ("vllm", [])):
        run(
            [
                sys.executable, "-m", "tbrm_trl.cli", "eval", "--model_name_or_path", model, "--benchmarks", file,
                "--limit", "12", "--samples", "1", "--temperature", "0", "--max_new_tokens", "6", "--backend", backend,
                "--reward_funcs", "helpers.reward_functions.letters", "--output_dir", tmp_path / backend,
                "--dtype", "float32", *on_cpu,
            ],
            **environment,
        )  # fmt: skip
        (found,) = (tmp_path / backend).glob("*.jsonl")
        result = read_result(found)
        assert result.header["backend"] == backend and len(result.rows) == 12
        rows[backend] = [row.completion for _, row in sorted(result.rows.items())]
    assert rows["vllm"] == rows["transformers"] and len(set(rows["vllm"])) > 1
