"""Runs of test_distributed.py, in its own process or under a launcher: jobs, one after the other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import resume
import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, gather_object
from common.launch import allow_fsdp_on_cpu
from peft import LoraConfig
from reference_processes import whole
from scripted import script, scripted_trainer
from test_learning import prompts, trainer_of, words_of
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback

from tbrm_trl import TBRMTrainer

NF4: dict[str, Any] = dict(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
UPDATES: dict[str, Any] = dict(
    optim="sgd", learning_rate=0.2, lr_scheduler_type="constant", num_iterations=2, max_steps=2
)
WORDS = words_of(4)
LEARNING: dict[str, Any] = dict(
    soft_value="calibrated", max_completion_length=2, learning_rate=0.01, max_steps=150, per_device_train_batch_size=64
)


def given(kind: str) -> dict[str, Any]:
    """What makes a trainer's run a full one, one of LoRA, or one of QLoRA."""
    arguments: dict[str, Any] = {}
    if kind != "full":
        arguments["peft_config"] = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    if kind == "QLoRA":
        arguments["quantization_config"] = BitsAndBytesConfig(**NF4)
    return arguments


def trained(trainer: TBRMTrainer) -> dict[str, torch.Tensor]:
    """Copies of the weights that are trained, whole."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return whole((name, p) for name, p in model.named_parameters() if p.requires_grad)


def held(trainer: TBRMTrainer) -> dict[str, Any]:
    """How a run that has trained is distributed, read off its model and its optimizer.

    Returns:
        `strategy` of accelerate; `stage` of ZeRO; `offload` of optimizer and of weights; `weights`, `moments`: numbers
        that this process holds, over those that one process alone would.
    """
    weights = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    sizes = [getattr(p, "ds_numel", p.numel()) for p in weights]
    state = [value for one in optimizer_of(trainer).state.values() for value in one.values()]
    moments = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
    engine = trainer.deepspeed if trainer.is_deepspeed_enabled else None
    places = [engine.zero_offload_optimizer(), engine.zero_offload_param()] if engine else []
    return {
        "strategy": trainer.accelerator.distributed_type.value,
        "stage": engine and engine.zero_optimization_stage(),
        "offload": [place is not None and place.device == "cpu" for place in places],
        "weights": sum(_here(p).numel() for p in weights) / sum(sizes),
        # Adam's two
        "moments": sum(_here(moment).numel() for moment in moments)
        / sum(2 * size for size, p in zip(sizes, weights, strict=True) if p.requires_grad),
    }


def optimizer_of(trainer: TBRMTrainer) -> Any:
    """The optimizer inside accelerate's and DeepSpeed's."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part: ZeRO-3's partition, FSDP2's shard, else all of it."""
    return getattr(tensor, "ds_tensor", tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def two_updates(
    folder: str,
    out: str,
    kind: str = "full",
    unscored: tuple[int, ...] = (1,),
    float32_adapter: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Two updates on one scripted window, by plain SGD, so that each gradient can be read off the weights.

    Returns:
        `weights` before the first, before the second and after it; `losses` of the two, means over processes;
        `gradients` as the optimizer saw them, where they are whole; their `norms` as logged; the `optimizer`'s class;
        `accumulation` that DeepSpeed was told.
    """
    trainer = scripted_trainer(folder, script(unscored=tuple(unscored)), out, **given(kind), **UPDATES | options)
    if float32_adapter:  # TRL makes those of a quantised model bfloat16
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    weights = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weights.append(trained(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    losses, steps = gather_object([trainer.losses]), trainer.args.gradient_accumulation_steps
    whole_gradients = trainer.accelerator.distributed_type.value in ("NO", "MULTI_CPU")
    return {
        "held": held(trainer),
        "weights": [*weights, trained(trainer)],
        "losses": [sum(sum(mine[i : i + steps]) for mine in losses) / len(losses) for i in (0, steps)],
        "gradients": trainer.recorder.gradients if whole_gradients else None,
        "norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
        "optimizer": type(optimizer_of(trainer)).__name__,
        "accumulation": trainer.deepspeed.gradient_accumulation_steps() if trainer.is_deepspeed_enabled else None,
    }


def learn(
    folder: str, out: str, kind: str = "full", state_dict_type: str | None = None, **options: Any
) -> dict[str, Any]:
    """The task of test_learning.py, on policy; the trained model is saved to `out`.

    Args:
        state_dict_type: of FSDP's checkpoints, if another than the launch file says.

    Returns:
        `log_probs` of the right answers by the trained model as it stands in the trainer.
    """
    trainer = trainer_of(folder, prompts(WORDS), out, **LEARNING | given(kind) | options)
    trainer.train()
    seen = {"held": held(trainer), "log_probs": answers(trainer.model, trainer.processing_class)}
    if state_dict_type is not None:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(state_dict_type)
    trainer.save_model(out)
    return seen


@torch.no_grad()
def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Log-probability of the right letter and of stopping after it, of every word. `(256, 2)`"""
    ids = torch.tensor([tokenizer(word + word[0])["input_ids"] + [tokenizer.eos_token_id] for word in WORDS])
    log_probs = model.eval()(input_ids=ids).logits.log_softmax(dim=-1)  # (256, 6, vocabulary)
    return log_probs[:, 3:5].gather(2, ids[:, 4:, None]).squeeze(2)


def resumable(folder: str, out: str, case: str, checkpoint: int | None = None, **changes: Any) -> list[Any]:
    """A run of resume.py with all its checkpoints, or the rest of it from one. Returns what each process has made."""
    changes = dict(per_device_train_batch_size=1, save_total_limit=None) | changes
    trainer = resume.build(case, folder, Path(out), **changes)
    trainer.train(resume_from_checkpoint=checkpoint and f"{out}/checkpoint-{checkpoint}")
    made = resume.outcome(trainer)
    del made["optimizer"]  # sharded; the weights at the end depend on all of it
    made["model"] = trained(trainer)
    if trainer._reference is not None and trainer.args.sync_ref_model:
        made["reference"] = whole(trainer._reference._synced().items())
    made["held"] = held(trainer)
    return gather_object([made])


def release_small_weights() -> None:
    """ZeRO-3 keeps weights of fewer than 1e5 numbers whole once they were gathered: of a tiny model, all."""
    init = DeepSpeedPlugin.__post_init__

    def init_with_threshold(self):
        init(self)
        if self.zero_stage == 3:
            self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = init_with_threshold


def main(out: str, jobs: str) -> None:
    allow_fsdp_on_cpu()
    release_small_weights()
    seen = {}
    for name, options in json.loads(jobs).items():
        job = globals()[options.pop("job")]
        seen[name] = job(out=f"{out}/{name}", **options)
    if os.environ.get("RANK", "0") == "0":
        torch.save(seen, Path(out) / "seen.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
