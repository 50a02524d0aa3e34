"""Run by test_replay.py on two processes: a shard of the buffer on each, one of which runs empty."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from common.tiny import save
from datasets import Dataset
from test_trainer import build, prompt


def main(folder: str) -> None:
    out = Path(folder)

    def reward(completions, trainer_state, **kwargs):
        scored = trainer.accelerator.process_index == 0 or trainer_state.global_step == 0
        return [float(len(text)) if scored else None for text in completions]

    prompts = Dataset.from_list([{"prompt": f"{i}:"} for i in range(12)])
    trainer = build(
        save(out / "model", "llama"), out, reward, prompts, per_device_train_batch_size=2, max_steps=9,
        num_iterations=3, replay_buffer_size=8, replay_max_age=4,
    )  # fmt: skip
    rank, collect, origins, drawn = trainer.accelerator.process_index, trainer._collect, [], set()

    def watch(rows):
        uses = collect(rows)
        origins.append(uses[0].origin)
        if origins[-1] == "replayed":
            drawn.update(prompt(use.trajectory) for use in uses)
        return uses

    trainer._collect = watch
    trainer.train()
    seen = {
        "origins": origins,
        "drawn": drawn,
        "prompts": [prompt(t) for window in trainer.windows for t in window],
        "shard": [prompt(t) for t in trainer._replay.stored],
    }
    torch.save(seen, out / f"seen-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
