"""Run by test_logged.py on two processes: messages to roll out, n = 4, beside logged text. Each saves what it saw."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from common.tiny import save
from datasets import Dataset
from test_logged import closing
from test_trainer import build, prompt


def main(folder: str) -> None:
    out = Path(folder)
    rows = [{"prompt": [{"role": "user", "content": f"{i}!"}], "completion": "abc", "reward": 1.0} for i in range(16)]
    rows += [{"prompt": [{"role": "user", "content": f"{i}"}], "completion": None, "reward": None} for i in range(8)]
    trainer = build(
        save(out / "model", "llama"), out, train_dataset=Dataset.from_list(rows), per_device_train_batch_size=8,
        num_generations=4, logged_fraction=0.5, max_steps=3, shuffle_dataset=False,
        processing_class=closing(out / "model"),
    )  # fmt: skip
    windows, fill = [], trainer._new_window
    trainer._new_window = lambda rows: windows.append(fill(rows)) or windows[-1]
    trainer.train()
    seen = [[(t.source.value, prompt(t)) for t in window] for window in windows]
    torch.save(seen, out / f"seen-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
