"""Run by test_vllm.py: trains with vLLM's rollouts, then compares what vLLM samples with the policy that was trained.

python tests/vllm_processes.py MODEL FOLDER OPTIONS    # options of TBRMConfig as JSON, and `lora`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common.launch import allow_fsdp_on_cpu
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from tbrm_trl import TBRMConfig, TBRMTrainer


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


def main(model: str, folder: str, options: str) -> None:
    allow_fsdp_on_cpu()
    out = Path(folder)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # ZeRO-3 would divide a later one
    rows = Dataset.from_list([{"prompt": f"{i} and {j}:"} for i in range(8) for j in range(8)])
    settings = dict(
        output_dir=str(out / "trained"), beta=0.1, learning_rate=0.01, max_steps=4, lr_scheduler_type="constant",
        per_device_train_batch_size=16, max_completion_length=8, use_cpu=True, bf16=False, use_vllm=True,
        vllm_max_model_length=64, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    settings |= json.loads(options)
    adapter = LoraConfig(r=8, target_modules="all-linear") if settings.pop("lora", False) else None
    trainer = TBRMTrainer(model, reward, TBRMConfig(**settings), rows, peft_config=adapter)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    texts = [row["prompt"] for row in rows][:16]
    prompts, completions, logprobs, _ = trainer.vllm_generation.generate(
        [trainer.processing_class(text)["input_ids"] for text in texts], None, num_generations=1
    )
    seen: dict[str, Any] = {
        name: distance(policy.eval(), prompts, completions, logprobs)
        for name, policy in (("before", before), ("trained", trainer.model))
    }
    seen["updates"] = sum("residual/rms" in row for row in trainer.state.log_history)
    seen["strategy"] = trainer.accelerator.distributed_type.value
    if trainer.accelerator.is_main_process:
        (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
