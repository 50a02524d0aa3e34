"""Run by test_two_processes.py under a launcher: one optimizer step on scripted rows; rank 0 saves what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from scripted import Row, scripted_trainer
from tiny import perturb


def main(folder: str, rows_file: str, out: str, options: str) -> None:
    rows = [Row(**row) for row in json.loads(Path(rows_file).read_text())]
    options = json.loads(options)
    lora, deepspeed = options.pop("lora", False), options.pop("deepspeed", False)
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    trainer = scripted_trainer(folder, rows, out, peft_config=adapter, **options)
    assert trainer.is_deepspeed_enabled == deepspeed and trainer.accelerator.num_processes == 2
    if trainer.ref_model is not None and not deepspeed:
        perturb(trainer.accelerator.unwrap_model(trainer.ref_model))
    trainer.train()
    losses = gather_object([trainer.losses])
    windows = gather_object([trainer.windows[0]])
    log = trainer.state.log_history
    gradients = trainer.recorder.gradients[0] if trainer.recorder.gradients else {}
    if trainer.accelerator.is_main_process:
        torch.save({"losses": losses, "windows": windows, "gradients": gradients, "log": log}, Path(out) / "seen.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
