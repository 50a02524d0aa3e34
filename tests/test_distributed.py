"""Every launch file on two processes: gradients, learning, saving, resuming; and that nothing fell back to DDP.

The processes are CPUs over gloo. A file is used as it is, with what a CPU needs on the command line after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common.launch import launcher_of
from common.tiny import model, save, save_value_model, tokenizer
from distributed_processes import NF4, UPDATES, answers, learn, two_updates
from oracle import distance
from peft import PeftModel
from test_learning import ALPHABET
from test_recipes import after, command_of
from test_resume import flat
from test_two_processes import TESTS, launch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

FILES = TESTS.parent / "examples/accelerate"
# Of each file: strategy, ZeRO stage, and the share of weights and of optimizer that one of two processes holds.
HOW: dict[str, tuple[str, int | None, float, float]] = {
    "single": ("NO", None, 1, 1),
    "ddp": ("MULTI_CPU", None, 1, 1),
    "fsdp2": ("FSDP", None, 0.5, 0.5),
    "zero1": ("DEEPSPEED", 1, 1, 0.5),
    "zero2": ("DEEPSPEED", 2, 1, 0.5),
    "zero3": ("DEEPSPEED", 3, 0.5, 0.5),
    "zero3_offload": ("DEEPSPEED", 3, 0.5, 0.5),
    "multi_node": ("DEEPSPEED", 3, 0.5, 0.5),
}
WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16)  # a quantised base that adapters learn well on
TOLERANCE = 1e-5  # of gradients read off float32 weights: norm of the difference over the norm
BFLOAT16 = 2**-7  # of bfloat16 gradients: two roundings

NOISE = 0.15  # of accuracy after learning: five standard deviations over seeds


def run(file: str, out: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Jobs of distributed_processes.py under a launch file. Returns what rank 0 has seen of each."""
    settings = yaml.safe_load((FILES / f"{file}.yaml").read_text())
    arguments = launcher_of(file, processes=1 if file == "single" else 2)
    nodes = settings.get("num_machines", 1)
    if nodes > 1:
        arguments += ["--main_process_ip", "127.0.0.1"]
    with ThreadPoolExecutor() as started:
        done = [
            started.submit(
                launch,
                [str(out), json.dumps(jobs)],
                arguments + ["--machine_rank", str(node)] * (nodes > 1),
                "distributed_processes.py",
            )
            for node in range(nodes)
        ]
        for one in done:
            one.result()
    return torch.load(out / "seen.pt", weights_only=False)


def check_how(file: str, held: dict[str, Any], quantised: bool = False, adam: bool = True) -> None:
    strategy, stage, weights, moments = HOW[file]
    assert (held["strategy"], held["stage"]) == (strategy, stage)
    if held["stage"] == 3:
        assert held["offload"] == [file == "zero3_offload"] * 2
    if not quantised:  # which packs two weights into a number
        assert held["weights"] == pytest.approx(weights, abs=0.02)
    assert held["moments"] == pytest.approx(moments if adam else 0, abs=0.02)


def save_task(folder: Path, **changes: Any) -> str:
    """A model with random weights, and its tokenizer of one token per letter."""
    tok = tokenizer(alphabet=ALPHABET)
    tok.save_pretrained(folder)
    model("llama", vocab_size=len(tok), **changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": save(folder / "tiny"),
        "value": save_value_model(folder / "value"),
        "task": save_task(folder / "task"),
        "task, wide": save_task(folder / "task, wide", **WIDE),
    }


@pytest.mark.parametrize("file", HOW)
def test_the_line_that_uses_it(file):
    """Opens the file; its update has as many trajectories as on the four processes that the recipe is for."""
    command = command_of(FILES / f"{file}.yaml")
    assert command[:4] == ["accelerate", "launch", "--config_file", f"examples/accelerate/{file}.yaml"]
    recipe = yaml.safe_load((TESTS.parent / after(command, "--config")).read_text())
    processes = yaml.safe_load((FILES / f"{file}.yaml").read_text()).get("num_processes", 1)
    accumulation = int(after(command, "--gradient_accumulation_steps") or recipe["gradient_accumulation_steps"])
    assert processes * accumulation == 4 * recipe["gradient_accumulation_steps"]


def test_every_file_is_tested():
    assert {file.stem for file in FILES.glob("*.yaml")} == set(HOW)


def change(seen: dict[str, Any], update: int) -> dict[str, torch.Tensor]:
    """What an update subtracted from the weights, over the learning rate: plain SGD's gradient."""
    before, after = seen["weights"][update : update + 2]
    return {name: (before[name] - after[name]) / UPDATES["learning_rate"] for name in before}


def updates(jobs: dict[str, dict[str, Any]], file: str, folders: dict[str, str], out: Path) -> dict[str, Any]:
    """Jobs of two updates each, on two processes under a launch file and on one: their gradients must be equal."""
    jobs = {name: {"job": "two_updates", "folder": folders["tiny"], **job} for name, job in jobs.items()}
    if file == "single":  # the same rows
        twice = {name: 2 * job["per_device_train_batch_size"] for name, job in jobs.items()}
        jobs = {name: job | dict(per_device_train_batch_size=twice[name]) for name, job in jobs.items()}
    seen = run(file, out, jobs)
    for name, job in jobs.items():
        options = {key: value for key, value in job.items() if key not in ("job", "gradient_accumulation_steps")}
        one, many = two_updates(out=str(out / "one"), **options | dict(per_device_train_batch_size=8)), seen[name]
        check_how(file, many["held"], quantised=job.get("kind") == "QLoRA", adam="optim" in job)
        assert many["accumulation"] in (None, job.get("gradient_accumulation_steps", 1))
        rounded = job.get("kind") == "QLoRA" and not job.get("float32_adapter")
        assert all(torch.equal(p, one["weights"][0][n]) for n, p in many["weights"][0].items())
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-3 if rounded else TOLERANCE)
        assert abs(many["losses"][1] - many["losses"][0]) > 0.01
        assert many["norms"] == pytest.approx(one["norms"], rel=BFLOAT16 if rounded else 1e-4)
        for update in range(2):
            gradient, expected = change(many, update), one["gradients"][update]
            if rounded:  # bfloat16 weights less bfloat16 weights
                gradient = {n.removeprefix("module."): g for n, g in many["gradients"][update].items()}
            if "optim" in job:
                expected = change(one, update)
            relative = distance(gradient, expected)
            print(f"{file}, {name}, update {update + 1}: {relative:.1e}")
            assert relative <= (BFLOAT16 if rounded else TOLERANCE), (name, update)
    return seen


SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
# Only rows 0, 2 and 3 count, all on the first process; the second one still runs its forward and backward.
ONE_SIDED = dict(per_device_train_batch_size=4, unscored=[1, 4, 5, 6, 7])
ADAPTER = SPLIT | dict(kind="LoRA")
BY_TOKENS = dict(per_device_train_batch_size=4, max_tokens_per_microbatch=50)  # two or three micro-batches of an update


@pytest.mark.parametrize("file", ["ddp", "fsdp2", "zero3"])
def test_gradients_of_two_processes(file, folders, tmp_path):
    """Those of one process, of two updates; the second is off-policy and away from the reference: every term counts.

    With QLoRA the adapter is bfloat16, as TRL makes it, so the gradient is equal to that precision; and once float32.
    """
    quantized = dict(per_device_train_batch_size=4, kind="QLoRA")
    jobs: dict[str, dict[str, Any]] = {"split": SPLIT, "one-sided": ONE_SIDED, "LoRA": ADAPTER}
    jobs["QLoRA, float32"] = quantized | dict(float32_adapter=True)
    if file == "fsdp2":
        jobs["by tokens"] = BY_TOKENS
    if file == "ddp":
        jobs["QLoRA"] = quantized
    if file == "zero3":  # whole on every process at any stage
        jobs["value model"] = SPLIT | dict(soft_value="model", soft_value_model=folders["value"])
    updates(jobs, file, folders, tmp_path)


@pytest.mark.launch
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3_offload", "multi_node", "single"])
def test_gradients_under_the_other_files(file, folders, tmp_path):
    """Offloaded weights are stepped by DeepSpeed's Adam for CPUs; two nodes are two launchers of one process each.

    Adam's ε is large, so that its step is no sign of a rounding error.
    """
    jobs: dict[str, dict[str, Any]] = {"split": SPLIT, "LoRA": ADAPTER}
    if file == "zero1":
        jobs["by tokens"] = BY_TOKENS
    if file == "zero3_offload":
        adam = dict(optim="adamw_torch", adam_epsilon=0.1)
        jobs = {name: job | adam for name, job in jobs.items()}
    seen = updates(jobs, file, folders, tmp_path)
    if file == "zero3_offload":
        assert {run["optimizer"] for run in seen.values()} == {"DeepSpeedCPUAdam"}


# ---- learning, saving, resuming -------------------------------------------------------------------------------------


def base(kind: str) -> str:
    return "task, wide" if kind == "QLoRA" else "task"


def reload(folders: dict[str, str], kind: str, saved: Path) -> torch.nn.Module:
    """What a user loads of a saved run."""
    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(saved)
    quantised = dict(quantization_config=BitsAndBytesConfig(**NF4)) if kind == "QLoRA" else {}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[base(kind)], **quantised), saved)
    for name, parameter in loaded.named_parameters():
        if quantised and "lora_" in name:  # as it was trained; PEFT makes it float32
            parameter.data = parameter.data.bfloat16()
    return loaded


def accuracy(log_probs: torch.Tensor) -> float:
    """Probability of the right answer, averaged over words: exact, where sampling would add noise."""
    return log_probs.sum(dim=1).exp().mean().item()


@pytest.fixture(scope="module")
def of_one_process(folders, tmp_path_factory) -> Callable[[str], float]:
    """Accuracy that one process reaches."""

    @cache
    def of(kind: str) -> float:
        out = str(tmp_path_factory.mktemp("one"))
        return accuracy(learn(folders[base(kind)], out, kind, per_device_train_batch_size=128)["log_probs"])

    return of


@pytest.mark.launch
@pytest.mark.parametrize("file", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_learning_saving_and_resuming(file, folders, of_one_process, tmp_path):
    """From random weights to a word's first letter and a stop, as well as one process; what is saved; what resumes.

    Chance is 0.02. Two processes draw other rollouts than one, which draws others with another seed: 0.77 ± 0.03 of
    full models. They must come within NOISE of one, or above.
    """
    kinds = {"ddp": ["full", "LoRA", "QLoRA"], "fsdp2": ["full", "LoRA"], "zero3": ["full", "LoRA"]}.get(file, ["full"])
    cases = ["two, mixed", "lora, reset"] if file in ("fsdp2", "zero3") else []
    short = dict(max_steps=3) if cases else {}  # of an adapter, what is saved is the point
    jobs: dict[str, dict[str, Any]] = {
        kind: dict(job="learn", folder=folders[base(kind)], kind=kind, **short if kind == "LoRA" else {})
        for kind in kinds
    }
    if file == "fsdp2":  # with this one, the Trainer itself would save nothing
        jobs["LoRA"]["state_dict_type"] = "SHARDED_STATE_DICT"
    jobs |= {case: dict(job="resumable", folder=folders["tiny"], case=case) for case in cases}
    seen = run(file, tmp_path, jobs)

    for kind in kinds:
        check_how(file, seen[kind]["held"], quantised=kind == "QLoRA")
        tok, loaded = AutoTokenizer.from_pretrained(folders["task"]), reload(folders, kind, tmp_path / kind)
        log_probs = answers(loaded, tok)
        torch.testing.assert_close(log_probs, seen[kind]["log_probs"], atol=1e-4, rtol=1e-5)
        if kind == "LoRA":
            with loaded.disable_adapter():
                assert (answers(loaded, tok) - log_probs).abs().max() > 0.01
            merged = answers(loaded.merge_and_unload(), tok)
            torch.testing.assert_close(merged, log_probs, atol=1e-4, rtol=1e-4)
        if "max_steps" not in jobs[kind]:
            print(f"{file}, {kind}: {accuracy(log_probs):.3f}, one process {of_one_process(kind):.3f}")
            assert accuracy(log_probs) > of_one_process(kind) - NOISE > 0.2

    if cases:
        resumed = run(file, tmp_path, {case: jobs[case] | dict(checkpoint=6) for case in cases})
    for case in cases:
        for whole, rest in zip(seen[case], resumed[case], strict=True):
            check_how(file, whole["held"])
            first, second = dict(flat(whole)), dict(flat(rest))
            assert [name for name in {**first, **second} if first.get(name) != second.get(name)] == []
