"""A*-PO: the optimal value of each prompt, estimated once from samples of the reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset

from ...options import TBRMOptions
from ...trajectory import Trajectory
from .log_mean_exp import log_mean_exp, problem_of_temperature
from .run import Run
from .sampled import SampledValue


class OptimalValue(SampledValue):
    """`V̂*(x) = β₁ log mean_i exp(r_i/β₁)` over N samples of the reference, once per prompt; `V = V̂*/β`.

    A*-PO (arXiv 2505.20686) has N = 8, β₁ = 0.5 and β = 1e-3. A column `optimal_value` may give V̂*, in reward units.
    """

    name = "optimal"
    column, content = "optimal_value", "V̂*, in reward units"
    options: ClassVar = frozenset({"soft_value_beta", "soft_value_samples", "soft_value_drop_unsolved"})

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        yield from problem_of_temperature(args.soft_value_beta)
        yield from super()._problems(args)

    def problem_of_cell(self, cell: Any) -> str | None:
        return self.problem_of_number(cell)

    def cells(self, rewards: Sequence[torch.Tensor]) -> list[float]:
        temperature = self.args.soft_value_beta or self.args.beta
        return [log_mean_exp(given, temperature).item() if len(given) else math.nan for given in rewards]

    def kept(self, dataset: Dataset, rewards: torch.Tensor, run: Run) -> Dataset:
        if not self.args.soft_value_drop_unsolved:
            return dataset
        solved = torch.nonzero((rewards > 0).any(dim=1)).flatten().tolist()
        dropped, unscored = len(dataset) - len(solved), int(rewards.isnan().all(dim=1).sum())
        of_these = f" {unscored} of these have no scored sample." if unscored else ""
        run.accelerator.print(
            f"TBRM: {dropped} of {len(dataset)} prompts dropped: no reference sample was rewarded.{of_these}"
        )
        needed = self.args.generation_batch_size // self.args.num_generations
        if len(solved) < needed:
            raise ValueError(
                f"`soft_value_drop_unsolved=True` leaves {len(solved)} of {len(dataset)} prompts, fewer than the "
                f"{needed} of one generation window. Raise soft_value_samples, give easier prompts, or train on all."
            )
        return dataset.select(solved)

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        for trajectory, row in zip(trajectories, rows, strict=True):
            trajectory.value = row.get(self.column)  # prompts of an evaluation set have no value
