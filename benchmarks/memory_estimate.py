"""What `tbrm_trl.memory` says beforehand, against the measured peak of training.

    python benchmarks/memory_estimate.py        # writes docs/benchmarks/memory_estimate.{json,md}; some ten minutes

Every configuration trains two steps in a process of its own, on random weights of the given sizes; where the table does
not say that rollouts are generated they are given, since generation is slow on a CPU and seldom where the peak is.
Measured is the peak of tensor memory: on a CPU what the allocator handed out (the profiler's events) on top of what was
live when training began, on a GPU `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from common.measure import peak_memory
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.memory.estimate import estimate_memory

ROOT = Path(__file__).resolve().parent.parent
from common.launch import allow_fsdp_on_cpu, launcher_of  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed")
TARGET = 0.15
MODELS: dict[str, dict[str, Any]] = {
    "llama-256": dict(
        model_type="llama", hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=16000,
    ),
    "qwen2-512": dict(
        model_type="qwen2", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True,
    ),
    "qwen2-768": dict(
        model_type="qwen2", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=False,
    ),
    "SmolLM2-135M": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip
# What differs from `Run`'s defaults.
RUNS: dict[str, dict[str, Any]] = {
    "AdamW, generating its rollouts": dict(model="llama-256", generates=True),
    "AdamW, checkpointing": dict(model="llama-256", gradient_checkpointing=True),
    "eager attention, 16 + 240 tokens": dict(model="llama-256", attn="eager", prompt=16, completion=240),
    "one row": dict(model="llama-256", rows=1, completion=224),
    "SGD, 64 + 192 tokens": dict(model="qwen2-512", optim="sgd", prompt=64, completion=192),
    "SGD, checkpointing, 64 + 192 tokens": dict(
        model="qwen2-512", optim="sgd", prompt=64, completion=192, gradient_checkpointing=True
    ),
    "4 micro-batches, checkpointing": dict(model="qwen2-512", accumulation=4, gradient_checkpointing=True),
    "LoRA 16": dict(model="qwen2-512", lora=16),
    "LoRA 16, checkpointing": dict(model="qwen2-512", lora=16, gradient_checkpointing=True),
    "LoRA 16, checkpointing, generating 32 rows at a time": dict(
        model="qwen2-512",
        lora=16,
        gradient_checkpointing=True,
        accumulation=16,
        completion=128,
        rows=2,
        generates=True,
    ),
    "2 processes, DDP": dict(model="llama-256", processes=2, gradient_checkpointing=True),
    "2 processes, FSDP2": dict(model="qwen2-512", processes=2, fsdp=True, gradient_checkpointing=True),
    "2 processes, FSDP2, 2 micro-batches": dict(
        model="qwen2-512", processes=2, fsdp=True, gradient_checkpointing=True, accumulation=2
    ),
    "2 processes, ZeRO-1": dict(model="llama-256", processes=2, zero_stage=1, gradient_checkpointing=True),
    "2 processes, ZeRO-2": dict(model="llama-256", processes=2, zero_stage=2, gradient_checkpointing=True),
    "2 processes, ZeRO-3": dict(model="qwen2-512", processes=2, zero_stage=3, gradient_checkpointing=True),
    "bfloat16 autocast": dict(model="qwen2-768", bf16=True),
    "bfloat16 autocast, checkpointing": dict(model="qwen2-768", bf16=True, gradient_checkpointing=True),
    "bfloat16 autocast, LoRA 16": dict(model="qwen2-768", bf16=True, lora=16),
    "NF4, LoRA 16, bfloat16": dict(model="qwen2-768", lora=16, quantization="4bit", dtype="bfloat16", bf16=True),
    "SmolLM2, AdamW, checkpointing": dict(model="SmolLM2-135M", gradient_checkpointing=True),
    "8-bit AdamW, checkpointing": dict(model="qwen2-512", optim="adamw_bnb_8bit", gradient_checkpointing=True),
    "bfloat16 weights": dict(model="qwen2-768", bf16=True, dtype="bfloat16"),
    '`reference="previous"`': dict(model="qwen2-512", reference="previous"),
    "SmolLM2, LoRA 16": dict(model="SmolLM2-135M", lora=16),
}


@dataclasses.dataclass
class Run:
    model: str
    rows: int = 4
    prompt: int = 32
    completion: int = 96
    accumulation: int = 1
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    attn: str = "sdpa"
    dtype: str = "float32"
    bf16: bool = False
    lora: int = 0
    quantization: str | None = None
    reference: str = "initial"
    generates: bool = False
    processes: int = 1
    zero_stage: int = 0
    fsdp: bool = False

    @property
    def peft_config(self) -> LoraConfig | None:
        if not self.lora:
            return None
        return LoraConfig(r=self.lora, task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0)


def estimate(run: Run, device: str) -> dict[str, dict[str, int]]:
    sizes = dict(MODELS[run.model])
    return estimate_memory(
        AutoConfig.for_model(sizes.pop("model_type"), **sizes), rows=run.rows, accumulation=run.accumulation,
        generated_rows=run.rows * run.accumulation * run.generates, prompt_length=run.prompt,
        completion_length=run.completion, dtype=run.dtype,
        mixed_precision="bfloat16" if run.bf16 else None, attn_implementation=run.attn,
        gradient_checkpointing=run.gradient_checkpointing, optimizer=run.optim, peft_config=run.peft_config,
        quantization=run.quantization, reference=run.reference == "initial", device=device,
        processes=run.processes, zero_stage=run.zero_stage, fsdp=run.fsdp,
    ).phases  # fmt: skip


def launcher(run: Run, folder: Path) -> list[str]:
    """The start of the command that runs a script in the configuration's processes."""
    if run.processes == 1:
        return [sys.executable]
    if run.fsdp:
        return [sys.executable, "-m", *launcher_of("fsdp2", run.processes)]
    if not run.zero_stage:
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={run.processes}"]
    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_machines": 1, "machine_rank": 0,
        "num_processes": run.processes, "mixed_precision": "no", "use_cpu": not torch.cuda.is_available(),
        "deepspeed_config": {"zero_stage": run.zero_stage, "gradient_accumulation_steps": run.accumulation},
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(settings))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.json")]


def save_model(run: Run, folder: Path) -> PreTrainedTokenizerFast:
    """Random weights; returns a tokenizer with a word for every id."""
    sizes = dict(MODELS[run.model])
    torch.manual_seed(0)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype)).save_pretrained(folder)
    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, config.vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )


def live_bytes() -> int:
    """Of all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, DTensor):  # has none of its own: its part is another tensor
            continue
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure(run: Run, folder: Path) -> int:
    """Train two steps in this process; the peak in bytes."""
    if run.fsdp and not torch.cuda.is_available():
        allow_fsdp_on_cpu()
    tokenizer = save_model(run, folder / "model")
    rows = run.rows * run.accumulation
    # Prompts of different lengths, so that rows are padded; the longest among them.
    prompts = [" ".join(f"w{3 + i + j}" for j in range(run.prompt - i % rows % 4)) for i in range(2 * rows)]
    on_gpu = torch.cuda.is_available()
    quantization = None
    if run.quantization == "4bit":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, run.dtype)
        )

    def rollout(prompts: list[str], trainer: TBRMTrainer) -> dict[str, Any]:
        completions = torch.randint(3, 1000, (len(prompts), run.completion)).tolist()
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * run.completion] * len(prompts)}

    trainer = TBRMTrainer(
        str(folder / "model"),
        lambda completions, **kwargs: [float(len(completion) % 2) for completion in completions],
        TBRMConfig(
            output_dir=str(folder / "run"), beta=0.02, reference=run.reference, max_steps=2, optim=run.optim,
            per_device_train_batch_size=run.rows, gradient_accumulation_steps=run.accumulation,
            max_completion_length=run.completion, gradient_checkpointing=run.gradient_checkpointing, bf16=run.bf16,
            use_cpu=not on_gpu, model_init_kwargs={"dtype": run.dtype, "attn_implementation": run.attn},
            save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False, logging_steps=1,
        ),
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=run.peft_config,
        quantization_config=quantization,
        rollout_func=None if run.generates else rollout,
    )  # fmt: skip
    before = torch.cuda.memory_allocated() if on_gpu else live_bytes()
    with peak_memory("cuda" if on_gpu else "cpu") as above:
        trainer.train()
    assert trainer.state.global_step == 2 and trainer.accelerator.num_processes == run.processes
    assert max(len(trajectory) for trajectory in trainer._window) == run.prompt + run.completion
    return before + above.bytes


def describe(run: Run) -> str:
    """What the table says of a configuration besides its name."""
    rows = f"{run.accumulation} × {run.rows}" if run.accumulation > 1 else str(run.rows)
    return f"{run.model} | {rows} × ({run.prompt} + {run.completion})"


def report(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "| configuration | model | rows × tokens | peak in | estimate, MiB | measured, MiB | ratio | beside states |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios, misses = {}, []
    for name, seen in results["runs"].items():
        totals = {phase: sum(parts.values()) for phase, parts in seen["phases"].items()}
        phase = max(totals, key=totals.__getitem__)
        estimated, measured = totals[phase], seen["measured"]
        states = sum(seen["phases"][phase][part] for part in ("weights", "reference", "optimizer"))
        ratios[name] = estimated / measured
        beside = (estimated - states) / (measured - states)
        if abs(ratios[name] - 1) > TARGET:
            misses.append(name)
        lines.append(
            f"| {name} | {describe(Run(**RUNS[name]))} | {phase} | {estimated / 2**20:.0f} | {measured / 2**20:.0f} "
            f"| {ratios[name]:.2f} | {beside:.2f} |"
        )
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    outside = f"Outside 15%: {', '.join(misses)}." if misses else "All are within 15%."
    summary = textwrap.fill(
        f"{outside} The lowest ratio is {ratios[low]:.2f} ({low}), the highest {ratios[high]:.2f} ({high}). The last "
        "column is the ratio of what comes on top of weights, reference and optimizer states, which are exact: the "
        "harder test.",
        120,
    )
    table = "\n".join(lines)
    return f"""# Estimated and measured peaks of memory

Written by `python benchmarks/memory_estimate.py`. {results["hardware"]}; {versions}.
Raw numbers: [memory_estimate.json](memory_estimate.json).

Two updates of `TBRMTrainer` on random weights; the peak of tensor memory over the whole of `train()`. Unless the
configuration says otherwise: full fine-tuning with AdamW in float32, reference kept, sdpa, activations kept, rollouts
given rather than generated. Prompts differ in length, so rows are padded.

{table}

{summary}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help="measure those with this in their name, and any without a measured peak")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    arguments = parser.parse_args()
    if arguments.measure:
        name, file = arguments.measure
        with tempfile.TemporaryDirectory() as folder:
            peak = measure(Run(**RUNS[name]), Path(folder))
        if os.environ.get("RANK", "0") == "0":
            Path(file).write_text(json.dumps(peak))
        return
    on_gpu = torch.cuda.is_available()
    file = arguments.output / "memory_estimate.json"
    before = json.loads(file.read_text())["runs"] if arguments.only is not None else {}
    runs: dict[str, Any] = dict(before)
    results = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, one thread",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "runs": runs,
    }
    for name, options in RUNS.items():
        if name in before and arguments.only not in name:
            measured = before[name]["measured"]
        else:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "peak.json"
                command = [*launcher(Run(**options), Path(folder)), __file__, "--measure", name, str(output)]
                subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
                measured = json.loads(output.read_text())
        runs[name] = {"measured": measured, "phases": estimate(Run(**options), "cuda" if on_gpu else "cpu")}
        file.write_text(json.dumps(results, indent=2) + "\n")
    (arguments.output / "memory_estimate.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
