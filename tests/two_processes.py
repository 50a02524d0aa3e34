"""Run by test_two_processes.py under a launcher: one optimizer step on scripted rows; rank 0 saves what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common.tiny import perturb
from scripted import Row, scripted_trainer


def main(folder: str, rows_file: str, out: str, options: str) -> None:
    rows = [Row(**row) for row in json.loads(Path(rows_file).read_text())]
    trainer = scripted_trainer(folder, rows, out, **json.loads(options))
    assert trainer.accelerator.num_processes == 2
    perturb(trainer.accelerator.unwrap_model(trainer.ref_model))
    trainer.train()
    losses = gather_object([trainer.losses])
    windows = gather_object([trainer.windows[0]])
    log = trainer.state.log_history
    gradients = trainer.recorder.gradients[0]
    if trainer.accelerator.is_main_process:
        torch.save({"losses": losses, "windows": windows, "gradients": gradients, "log": log}, Path(out) / "seen.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
