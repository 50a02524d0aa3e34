"""Run by test_reference.py under a launcher: trains on scripted rows as asked; rank 0 saves what was seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from scripted import script, scripted_trainer


def fsdp_on_cpu() -> None:
    """accelerate makes DDP of FSDP on the CPU, where torch runs it as well."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def whole(named) -> dict[str, torch.Tensor]:
    """Full copies of parameters, whatever they are sharded by."""
    named = list(named)
    if any(hasattr(p, "ds_id") for _, p in named):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            return {name: p.detach().clone() for name, p in named}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named}


def train(folder: str, out: str, *, lora: bool = False, **options) -> dict:
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    trainer = scripted_trainer(folder, script(unscored=(1,)), out, peft_config=adapter, **options)
    trainer.train()
    losses = gather_object([trainer.losses])
    return {
        "losses": [sum(step) / len(losses) for step in zip(*losses, strict=True)],
        "reference": whole(trainer._reference._synced()),
        "policy": whole(trainer.accelerator.unwrap_model(trainer.model).named_parameters()),
        "type": str(trainer.accelerator.distributed_type),
        "log": trainer.state.log_history,
    }


def main(folder: str, out: str, runs: str) -> None:
    fsdp_on_cpu()
    seen = {}
    for name, options in json.loads(runs).items():
        seen[name] = train(folder, out, **options)
    if torch.distributed.get_rank() == 0:
        torch.save(seen, Path(out) / "seen.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
