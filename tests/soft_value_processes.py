"""Run by test_soft_values.py on two processes: groups of logged pairs, then sampling of optimal values."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common.tiny import perturb
from datasets import Dataset
from test_soft_values import PROMPTS, log, watch_updates
from test_trainer import build, letters


def main(folder: str, out: str) -> None:
    options = dict(beta=0.1, learning_rate=0.0, max_steps=1, max_grad_norm=0.0)
    grouped = build(
        folder, Path(out) / "group", None, Dataset.from_list(log()), soft_value="group", num_generations=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, **options,
    )  # fmt: skip
    perturb(grouped.accelerator.unwrap_model(grouped.model))
    updates = watch_updates(grouped)
    grouped.train()
    uses = gather_object(updates[0])
    losses = gather_object([grouped.state.log_history[0]["loss"]])

    sampled = build(
        folder, Path(out) / "optimal", letters, PROMPTS, soft_value="optimal", soft_value_samples=4,
        per_device_train_batch_size=2, max_steps=1,
    )  # fmt: skip
    sampled.train()
    columns = gather_object([sampled.train_dataset["optimal_value"]])
    values = gather_object([[t.value for t in sampled.windows[-1]]])
    if grouped.accelerator.is_main_process:
        model = grouped.accelerator.unwrap_model(grouped.model)
        torch.save(
            {
                "uses": uses,
                "losses": losses,
                "gradient": grouped.recorder.gradients[0],
                "policy": model.state_dict(),
                "columns": columns,
                "values": values,
            },
            Path(out) / "seen.pt",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
