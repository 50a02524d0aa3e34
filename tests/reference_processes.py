"""Runs of test_reference.py, in its own process or under a launcher: trains as asked; rank 0 saves what was seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common.launch import allow_fsdp_on_cpu
from peft import LoraConfig
from scripted import script, scripted_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback


def train(folder: str, out: str, lora=False, loaded=False, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """One run.

    Args:
        folder: of the model.
        out: where checkpoints go.
        lora: train an adapter.
        loaded: pass the model as an object, not as a folder.
        resume: the checkpoint in `out` to resume from.
    """
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    model = AutoModelForCausalLM.from_pretrained(folder) if loaded else folder
    trainer = scripted_trainer(model, script(unscored=(1,)), out, peft_config=adapter, **options)
    references: dict[int, dict[str, torch.Tensor]] = {}  # by the number of updates before
    scored_at = []  # updates made before each forward of the reference
    score = trainer._score

    def watched_score(*args, **kwargs):
        if not torch.is_grad_enabled():
            scored_at.append(trainer.state.global_step)
        return score(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            references[state.global_step] = whole(trainer._reference._synced().items())

    trainer.add_callback(Watch())
    trainer._score = watched_score
    trainer.train(resume_from_checkpoint=resume and f"{out}/{resume}")
    assert isinstance(next(trainer.model.parameters()), DTensor) == trainer.is_fsdp_enabled
    losses = gather_object([trainer.losses])
    return {
        "strategy": trainer.accelerator.distributed_type.value,
        "losses": [sum(step) / len(losses) for step in zip(*losses, strict=True)],
        "scored_at": scored_at,
        "references": references,
        "reference": whole(trainer._reference._synced().items()),
        "policy": whole(trainer._reference._trained().items()),
    }


def whole(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Copies of all of them, however they are sharded."""
    parameters = list(parameters)
    if any(hasattr(parameter, "ds_id") for _, parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter for _, parameter in parameters]):
            return {name: parameter.detach().clone() for name, parameter in parameters}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in parameters}


def main(folder: str, out: str, runs: str) -> None:
    allow_fsdp_on_cpu()
    seen = {}
    for name, options in json.loads(runs).items():
        seen[name] = train(folder, f"{out}/{options.pop('out', name)}", **options)
    if torch.distributed.get_rank() == 0:
        torch.save(seen, Path(out) / "seen.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
