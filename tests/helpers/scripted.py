"""Trainers whose rollouts are scripted, so that masks, lengths, ends and rewards are exactly what a test needs.

They go through TRL's own `rollout_func`, reward functions and `train()`: everything past generation is the real path.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.trajectory import Trajectory

EOS = 1
# Options of a run on a CPU that neither saves nor reports, and computes nothing twice.
QUIET: dict[str, Any] = dict(
    gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
    disable_tqdm=True,
)  # fmt: skip


@dataclass
class Row:
    """One prompt and the one completion it will get."""

    prompt: str
    completion: list[int]
    mask: list[int]
    reward: float | None


def script(rows: int = 8, seed: int = 0, tools: bool = True, unscored: tuple[int, ...] = ()) -> list[Row]:
    """Prompts and completions of different lengths, some truncated; with `tools`, some inserted and leading tokens."""
    rng = random.Random(seed)
    made = []
    for index in range(rows):
        length = rng.randint(3, 12)
        completion = [rng.randint(3, 90) for _ in range(length)]
        if index % 3 != 2:
            completion[-1] = EOS  # the others are cut at the length limit
        mask = [1] * length
        if tools and index % 4 == 1:
            mask[1:3] = [0, 0]  # inserted in the middle
        if tools and index % 4 == 2:
            mask[:2] = [0, 0]  # inserted before the policy's first token: s_1 is not the prompt's end
        prompt = f"{index}:" + "".join(rng.choice("abcdef ") for _ in range(rng.randint(1, 15)))
        reward = None if index in unscored else round(rng.uniform(-1, 1), 2)
        made.append(Row(prompt, completion, mask, reward))
    return made


@dataclass
class Recorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, as the optimizer would see them."""

    trainer: TBRMTrainer | None = None
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = self.trainer.accelerator.unwrap_model(model)
        self.gradients.append(
            {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )


class RecordingTrainer(TBRMTrainer):
    """A TBRMTrainer that keeps the loss of each micro-step and the trajectories of each window."""

    def __init__(self, *args, **kwargs):
        self.recorder = Recorder()
        super().__init__(*args, callbacks=[self.recorder], **kwargs)
        self.recorder.trainer = self
        self._starts_at_reference = False  # tests move policy and reference apart after this
        self.losses: list[float] = []
        self.windows: list[list[Trajectory]] = []

    def _roll_out(self, rows):
        trajectories = super()._roll_out(rows)
        self.windows.append(trajectories)
        return trajectories

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def scripted_trainer(
    model, rows: list[Row], output_dir: Path | str, peft_config=None, quantization_config=None, reward_funcs=None,
    **options,
):  # fmt: skip
    """A trainer for one optimizer step at learning rate 0 on exactly these rows, in order, with their rewards."""
    by_prompt = {row.prompt: row for row in rows}

    def rollout(prompts, trainer):
        chosen = [by_prompt[prompt] for prompt in prompts]
        ids = trainer.processing_class(prompts)["input_ids"]
        return {
            "prompt_ids": ids,
            "completion_ids": [row.completion for row in chosen],
            "logprobs": [[0.0] * len(row.completion) for row in chosen],
            "env_mask": [row.mask for row in chosen],
        }

    def reward(prompts, **kwargs):
        return [by_prompt[prompt].reward for prompt in prompts]

    defaults = QUIET | dict(
        output_dir=str(output_dir), beta=0.1, per_device_train_batch_size=len(rows), max_steps=1, learning_rate=0.0,
        max_grad_norm=0.0, shuffle_dataset=False, max_completion_length=16,
    )  # fmt: skip
    return RecordingTrainer(
        model=model,
        reward_funcs=reward_funcs or reward,
        args=TBRMConfig(**{**defaults, **options}),
        train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in rows]),
        rollout_func=rollout,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
