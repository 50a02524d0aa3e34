"""Trainers that generate and score rollouts or train on a log, and functions that look into any trainer."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.tiny import letters, perturb, tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers.oracle import plain
from helpers.scripted import QUIET, RecordingTrainer
from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.trajectory import Trajectory, UpdateRow

PROMPTS = ["1+1=", "Say: ab", "c", "What is it? ", "longer than the others", "x y", "z", "0:"]
DATA = Dataset.from_list([{"prompt": text, "answer": i} for i, text in enumerate(PROMPTS)])
CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": p}], "start": i} for i, p in enumerate(PROMPTS)])
TOKENIZER = tokenizer()


def config(**options: Any) -> TBRMConfig:
    return TBRMConfig(**{"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none", **options})


def digits(completions, **kwargs) -> list[float | None]:
    """Scores only completions that hold a digit."""
    return [float(sum(map(str.isdigit, text))) or None for text in completions]


def build(
    model, output_dir: Path, reward_funcs=letters, train_dataset=DATA, trainer_class=RecordingTrainer, **kwargs
) -> RecordingTrainer:
    """A trainer of 2 tiny updates; keyword arguments are options of TBRMConfig or else of the trainer."""
    options = QUIET | dict(
        output_dir=str(output_dir / "out"), beta=0.1, learning_rate=0.01, max_steps=2, max_completion_length=8,
        per_device_train_batch_size=2,
    )  # fmt: skip
    options |= {name: kwargs.pop(name) for name in list(kwargs) if name in TBRMConfig.__dataclass_fields__}
    return trainer_class(model, reward_funcs, args=TBRMConfig(**options), train_dataset=train_dataset, **kwargs)


def train(*args, **kwargs) -> RecordingTrainer:
    """Build and train, and require that every loss was finite and the policy moved."""
    trainer = build(*args, **kwargs)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert trainer.losses and all(map(math.isfinite, trainer.losses))
    assert differ(start, trainer.model.parameters())
    return trainer


# ---- what a test looks at --------------------------------------------------------------------------------------------


def prompt(trajectory: Trajectory) -> str:
    return TOKENIZER.decode(trajectory.prompt_ids)


def completion(trajectory: Trajectory) -> str:
    return TOKENIZER.decode(trajectory.completion_ids, skip_special_tokens=True)


def logged(trainer: TBRMTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def differ(some, others) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(some, others, strict=True))


def kept_returns(owner: Any, name: str) -> list[Any]:
    """A list of what a method of the trainer returns, call by call: `_new_window`, `_collect`, `_microbatches_of`."""
    method, returned = getattr(owner, name), []
    setattr(owner, name, lambda *args: returned.append(method(*args)) or returned[-1])
    return returned


def before_each_update(trainer: TBRMTrainer, look: Callable[[], Any]) -> list[Any]:
    """What `look()` returns before the first update, before the second, and so on."""
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(look())

    trainer.add_callback(Look())
    return seen


# ---- a log, and one update on it -------------------------------------------------------------------------------------


def log(prompts: int = 4, each: int = 2, seed: int = 0, unscored: tuple[int, ...] = ()) -> list[dict]:
    """`each` completions for each prompt, some with inserted tokens, some cut, in mixed order."""
    rng, rows = random.Random(seed), []
    for prompt in range(prompts):
        prompt_ids = [2, *(rng.randrange(3, 60) for _ in range(rng.randint(1, 6)))]
        for one in range(each):
            completion = [rng.randrange(3, 60) for _ in range(rng.randint(3, 8))]
            mask = [1] * len(completion)
            if one == 1:
                mask[:1] = [0]  # inserted first: s_1 is not the prompt's end
            else:
                completion[-1] = 1
            rows.append(
                {
                    "prompt": f"{prompt}:",
                    "prompt_ids": prompt_ids,
                    "completion_ids": completion,
                    "loss_mask": mask,
                    "reward": None if len(rows) in unscored else round(rng.uniform(-1, 1), 2),
                }
            )
    rng.shuffle(rows)
    return rows


@dataclass
class Update:
    """One update of a trainer at learning rate 0, and float64 copies of its policy and reference."""

    loss: float
    gradient: dict[str, torch.Tensor]
    rows: list[UpdateRow]
    policy: torch.nn.Module
    reference: torch.nn.Module
    trainer: Any = None

    @property
    def counted(self) -> list[Trajectory]:
        return [row.trajectory for row in self.rows if row.left_out is None]


def one_update(folder: str, tmp_path: Path, rows=None, reward_funcs=None, watch=None, **options: Any) -> Update:
    """An update on a log, by a policy that differs from its reference. `watch` gets the trainer before training."""
    defaults = dict(beta=0.1, learning_rate=0.0, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=8)
    data = Dataset.from_list(log() if rows is None else rows)
    trainer = build(folder, tmp_path, reward_funcs, data, **{**defaults, **options})
    perturb(trainer.model)
    updates = kept_returns(trainer, "_collect")
    if watch is not None:
        watch(trainer)
    trainer.train()
    reference = plain(AutoModelForCausalLM.from_pretrained(folder))
    gradient, loss = trainer.recorder.gradients[0], trainer.state.log_history[0]["loss"]
    return Update(loss, gradient, updates[0], plain(trainer.model), reference, trainer)
