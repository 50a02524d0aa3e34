"""Training on a token tree: the real trainer, on the CPU and quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from token_tree import Policy, TokenTreeForCausalLM, Tree, enumerate_policy, optimum
from torch import Tensor

from tbrm_trl import TBRMConfig, TBRMTrainer


class Task:
    """A tree with random rewards, a random reference, and β.

    Attributes:
        start: the model of π_ref.
        reference: π_ref, enumerated.
        best: π* and V*.
        trainer: the last that `train` made.
    """

    def __init__(self, tree: Tree, beta: float, folder: Path, seed: int = 0):
        self.tree, self.beta, self.folder = tree, beta, folder
        self.rewards = tree.random_rewards(seed)  # (P, N)
        self.model = tree.save(folder / "model", seed)
        self.start = TokenTreeForCausalLM.from_pretrained(self.model)
        self.reference = enumerate_policy(self.start, tree)
        self.best = optimum(self.reference, self.rewards, beta)

    def with_values(self, rows: list[dict[str, Any]], values: Tensor) -> list[dict[str, Any]]:
        """The rows with a column `optimal_value`, from `(P,)` values by prompt, in reward units."""
        by_prompt = {}
        for ids, text, value in zip(self.tree.prompt_ids, self.tree.prompts, values.tolist(), strict=True):
            by_prompt[tuple(ids)] = by_prompt[tuple(f"<bos>{text}")] = value
        return [{**row, "optimal_value": by_prompt[tuple(row.get("prompt_ids") or row["prompt"])]} for row in rows]

    def trainer_on(self, rows: list[dict[str, Any]], **options: Any) -> TBRMTrainer:
        """A trainer on prompts or logged rows; what is neither in `options` nor here is at the library's defaults."""
        settings = dict(
            beta=self.beta, learning_rate=0.3, lr_scheduler_type="linear", max_grad_norm=0.0,
            per_device_train_batch_size=128, max_completion_length=self.tree.depth,
            gradient_checkpointing=False, bf16=False, use_cpu=True,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        return TBRMTrainer(
            model=self.model,
            reward_funcs=self.tree.reward_function(self.rewards),
            args=TBRMConfig(output_dir=str(self.folder / "out"), **{**settings, **options}),
            train_dataset=Dataset.from_list(rows),
        )

    def train(self, rows: list[dict[str, Any]], **options: Any) -> Policy:
        """Train, and enumerate the policy that comes of it."""
        self.trainer = self.trainer_on(rows, **options)
        self.trainer.train()
        return enumerate_policy(self.trainer.model, self.tree)
