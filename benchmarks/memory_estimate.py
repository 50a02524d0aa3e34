"""The estimate of `tbrm_trl.memory`, compared with the measured peak of training.

    python benchmarks/memory_estimate.py        # writes docs/benchmarks/memory_estimate.{json,md}; some ten minutes

Every configuration trains two steps in a process of its own, on random weights of the given sizes. Rollouts are given
unless the table says that they are generated: generation is slow on a CPU, and the peak is seldom there. The benchmark
measures the peak of tensor memory: on a GPU `torch.cuda.max_memory_allocated`, on a CPU the bytes that were live when
training began plus those that the allocator handed out afterwards (the profiler's events).
"""

import gc
import json
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import tiny
from common.launch import allow_fsdp_on_cpu, launch, launcher_of
from common.measure import QUIET, peak_memory
from common.report import listed, parse, table, versions, wrapped, write
from datasets import Dataset
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerFast

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.memory.estimate import estimate_memory

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed")
TARGET = 0.15
FIRST_CHARACTER = 0x20000  # of a long range of characters
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


def run_of(model: str, **changes: Any) -> dict[str, Any]:
    """A configuration of training as arguments of `estimate_memory`. By default one process trains every weight.

    Three entries are not its arguments: `model` is a key of `MODELS`, `lora` is a rank (0: no adapter), and `generates`
    says whether the run generates its rollouts.
    """
    return {
        "model": model, "rows": 4, "prompt_length": 32, "completion_length": 96, "accumulation": 1,
        "optimizer": "adamw_torch_fused", "gradient_checkpointing": False, "attn_implementation": "sdpa",
        "dtype": "float32", "mixed_precision": None, "lora": 0, "quantization": None, "reference": True,
        "generates": False, "processes": 1, "zero_stage": 0, "fsdp": False, **changes,
    }  # fmt: skip


RUNS = {
    "AdamW, generating its rollouts": run_of("llama-256", generates=True),
    "AdamW, checkpointing": run_of("llama-256", gradient_checkpointing=True),
    "eager attention, 16 + 240 tokens": run_of(
        "llama-256", attn_implementation="eager", prompt_length=16, completion_length=240
    ),
    "one row": run_of("llama-256", rows=1, completion_length=224),
    "SGD, 64 + 192 tokens": run_of("qwen2-512", optimizer="sgd", prompt_length=64, completion_length=192),
    "SGD, checkpointing, 64 + 192 tokens": run_of(
        "qwen2-512", optimizer="sgd", prompt_length=64, completion_length=192, gradient_checkpointing=True
    ),
    "4 micro-batches, checkpointing": run_of("qwen2-512", accumulation=4, gradient_checkpointing=True),
    "LoRA 16": run_of("qwen2-512", lora=16),
    "LoRA 16, checkpointing": run_of("qwen2-512", lora=16, gradient_checkpointing=True),
    "LoRA 16, checkpointing, generating 32 rows at a time": run_of(
        "qwen2-512",
        lora=16,
        gradient_checkpointing=True,
        accumulation=16,
        completion_length=128,
        rows=2,
        generates=True,
    ),
    "2 processes, DDP": run_of("llama-256", processes=2, gradient_checkpointing=True),
    "2 processes, FSDP2": run_of("qwen2-512", processes=2, fsdp=True, gradient_checkpointing=True),
    "2 processes, FSDP2, 2 micro-batches": run_of(
        "qwen2-512", processes=2, fsdp=True, gradient_checkpointing=True, accumulation=2
    ),
    "2 processes, ZeRO-1": run_of("llama-256", processes=2, zero_stage=1, gradient_checkpointing=True),
    "2 processes, ZeRO-2": run_of("llama-256", processes=2, zero_stage=2, gradient_checkpointing=True),
    "2 processes, ZeRO-3": run_of("qwen2-512", processes=2, zero_stage=3, gradient_checkpointing=True),
    "bfloat16 autocast": run_of("qwen2-768", mixed_precision="bfloat16"),
    "bfloat16 autocast, checkpointing": run_of("qwen2-768", mixed_precision="bfloat16", gradient_checkpointing=True),
    "bfloat16 autocast, LoRA 16": run_of("qwen2-768", mixed_precision="bfloat16", lora=16),
    "NF4, LoRA 16, bfloat16": run_of(
        "qwen2-768", lora=16, quantization="4bit", dtype="bfloat16", mixed_precision="bfloat16"
    ),
    "SmolLM2, AdamW, checkpointing": run_of("SmolLM2-135M", gradient_checkpointing=True),
    "8-bit AdamW, checkpointing": run_of("qwen2-512", optimizer="adamw_bnb_8bit", gradient_checkpointing=True),
    "bfloat16 weights": run_of("qwen2-768", mixed_precision="bfloat16", dtype="bfloat16"),
    '`reference="previous"`': run_of("qwen2-512", reference=False),
    "SmolLM2, LoRA 16": run_of("SmolLM2-135M", lora=16),
}


def config_of(model: str, **more: Any) -> PretrainedConfig:
    sizes = {**MODELS[model], **more}
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def adapter(lora: int) -> LoraConfig | None:
    return LoraConfig(r=lora, task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0) if lora else None


def estimate(run: dict[str, Any], device: str) -> dict[str, dict[str, int]]:
    given = {name: value for name, value in run.items() if name not in ("model", "lora", "generates")}
    generated = run["rows"] * run["accumulation"] * run["generates"]
    return estimate_memory(
        config_of(run["model"]), generated_rows=generated, peft_config=adapter(run["lora"]), device=device, **given
    ).phases


def launcher(run: dict[str, Any]) -> list[str]:
    """The launcher of the configuration's processes; empty for a single process."""
    file = "fsdp2" if run["fsdp"] else f"zero{run['zero_stage']}" if run["zero_stage"] else "ddp"
    return launcher_of(file, run["processes"]) if run["processes"] > 1 else []


def save_model(model: str, dtype: torch.dtype, folder: Path) -> PreTrainedTokenizerFast:
    """Save random weights; returns a tokenizer with a character for every id."""
    torch.manual_seed(0)
    config = config_of(model, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return tiny.tokenizer(alphabet="".join(chr(FIRST_CHARACTER + i) for i in range(3, config.vocab_size)))


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    # A DTensor has no storage of its own: its local part is another tensor. Tracing leaves tensors without any.
    tensors = [it for it in gc.get_objects() if isinstance(it, torch.Tensor)]
    tensors = [it for it in tensors if not isinstance(it, DTensor | FakeTensor)]
    storages = [it.untyped_storage() for it in tensors if it.device.type == "cpu" and it.layout is torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(name: str) -> int:
    """Train two steps in this process, and return the peak in bytes."""
    run, on_gpu = SimpleNamespace(**RUNS[name]), torch.cuda.is_available()
    dtype = getattr(torch, run.dtype)
    alive = torch.cuda.memory_allocated if on_gpu else live_bytes
    others = alive()  # what this process holds besides
    if run.fsdp and not on_gpu:
        allow_fsdp_on_cpu()
    rows, ids = run.rows * run.accumulation, range(FIRST_CHARACTER + 3, FIRST_CHARACTER + 3 + 1000)
    # Prompts of different lengths, so that rows are padded; some have the full length.
    prompts = ["".join(map(chr, ids[i:][: run.prompt_length - i % rows % 4])) for i in range(2 * rows)]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)

    def rollout(prompts: list[str], trainer: TBRMTrainer) -> dict[str, Any]:
        completions = torch.randint(3, 1000, (len(prompts), run.completion_length)).tolist()
        ids = trainer.processing_class(prompts)["input_ids"]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * run.completion_length] * len(prompts),
        }

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_model(run.model, dtype, Path(folder))
        trainer = TBRMTrainer(
            folder,
            lambda completions, **kwargs: [float(len(completion) % 2) for completion in completions],
            TBRMConfig(
                output_dir=folder, beta=0.02, reference="initial" if run.reference else "previous", max_steps=2,
                optim=run.optimizer, shuffle_dataset=False,
                per_device_train_batch_size=run.rows, gradient_accumulation_steps=run.accumulation,
                max_completion_length=run.completion_length, bf16=run.mixed_precision == "bfloat16", use_cpu=not on_gpu,
                model_init_kwargs={"dtype": run.dtype, "attn_implementation": run.attn_implementation},
                **QUIET | dict(gradient_checkpointing=run.gradient_checkpointing, logging_strategy="steps"),
                logging_steps=1,
            ),
            Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            peft_config=adapter(run.lora),
            quantization_config=quantization if run.quantization else None,
            rollout_func=None if run.generates else rollout,
        )  # fmt: skip
    before = alive() - others
    with peak_memory("cuda" if on_gpu else "cpu") as above:
        trainer.train()
    assert trainer.state.global_step == 2 and trainer.accelerator.num_processes == run.processes
    assert max(len(trajectory) for trajectory in trainer._window) == run.prompt_length + run.completion_length
    return before + above.bytes


def report(results: dict[str, Any]) -> str:
    rows, ratios = [], {}
    for name, run in RUNS.items():
        phases, measured = results["runs"][name]["phases"], results["runs"][name]["measured"]
        phase = max(phases, key=lambda phase: sum(phases[phase].values()))
        estimated = sum(phases[phase].values())
        states = sum(phases[phase][part] for part in ("weights", "reference", "optimizer"))
        ratios[name] = estimated / measured
        numbers = f"{run['prompt_length']} + {run['completion_length']}"
        count = f"{run['accumulation']} × {run['rows']}" if run["accumulation"] > 1 else str(run["rows"])
        mib = [f"{peak / 2**20:.0f}" for peak in (estimated, measured)]
        beside = (estimated - states) / (measured - states)
        rows.append([name, run["model"], f"{count} × ({numbers})", phase, *mib, f"{ratios[name]:.2f}", f"{beside:.2f}"])
    misses = [name for name, ratio in ratios.items() if abs(ratio - 1) > TARGET]
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    outside = f"Outside 15%: {', '.join(misses)}." if misses else "All are within 15%."
    summary = f"""{outside} The lowest ratio is {ratios[low]:.2f} ({low}), the highest {ratios[high]:.2f} ({high}). The
        last column is the ratio of what comes on top of weights, reference and optimizer states, which are exact: the
        harder test."""
    header = "configuration|model|rows × tokens|peak in|estimate, MiB|measured, MiB|ratio|beside states".split("|")
    return f"""# Estimated and measured peaks of memory

Written by `python benchmarks/memory_estimate.py`. {results["hardware"]}; {listed(results["versions"])}.
Raw numbers: [memory_estimate.json](memory_estimate.json).

Two updates of `TBRMTrainer` on random weights; the peak of tensor memory over the whole of `train()`. Unless the
configuration says otherwise: full fine-tuning with AdamW in float32, reference kept, sdpa, activations kept, rollouts
given rather than generated. Prompts differ in length, so rows are padded.

{table(header, rows)}

{wrapped(summary)}
"""


def main() -> None:
    only = dict(help="measure those with this in their name, and any without a measured peak")
    arguments = parse(__doc__, only=only)
    on_gpu = torch.cuda.is_available()
    file = arguments.output / "memory_estimate.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if arguments.only is not None else {}
    results = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, one thread",
        "versions": versions(*PACKAGES),
        "runs": runs,
    }
    for name, run in RUNS.items():
        if name not in runs or arguments.only in name:
            (peak, *_) = launch(
                "memory_estimate:measure", launcher(run), environment={"OMP_NUM_THREADS": "1"}, timeout=3600, name=name
            )
            runs[name] = {"measured": peak}
        runs[name]["phases"] = estimate(run, "cuda" if on_gpu else "cpu")
        file.write_text(json.dumps(results, indent=1) + "\n")
    write(arguments.output, "memory_estimate", report(results))


if __name__ == "__main__":
    main()
