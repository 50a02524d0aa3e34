"""OAPL and Kimi k1.5: log-mean-exp of the group's rewards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...batch import chunks
from ...options import TBRMOptions
from ...trajectory import Trajectory
from .base import ConstantValue


def log_mean_exp(rewards: Tensor, temperature: float) -> Tensor:
    """`β₁ log mean_i exp(r_i/β₁)` over the last dimension, in reward units; at `β₁ = inf` its limit, the mean."""
    if math.isinf(temperature):
        return rewards.mean(dim=-1)
    return temperature * ((rewards / temperature).logsumexp(dim=-1) - math.log(rewards.shape[-1]))


def problem_of_temperature(soft_value_beta: float | None) -> Iterator[str]:
    if soft_value_beta is not None and not soft_value_beta > 0:
        yield (
            f"`soft_value_beta={soft_value_beta}` is refused: β₁ divides the rewards in β₁ log mean exp(r/β₁). For "
            "their mean, its limit at infinity, set float('inf') (.inf in YAML); towards 0 it becomes the largest "
            "reward."
        )


class LogMeanExpValue(ConstantValue):
    """`V̂ = β₁ log mean_i exp(r_i/β₁)` of the group, fixed when the group is drawn; `V = V̂/β`.

    OAPL (arXiv 2602.19362) with `soft_value_beta=1`; Kimi k1.5 with β₁ = β (the default) or `inf`, the mean. With few
    samples it is too small on average. With β₁ ≠ β it estimates another constant than `log E_ref exp(R/β)`.
    """

    name = "log_mean_exp"
    options: ClassVar = frozenset({"soft_value_beta"})
    compares = "rewards"

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        yield from problem_of_temperature(args.soft_value_beta)

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        temperature = self.args.soft_value_beta or self.args.beta
        for group in chunks(trajectories, group_size):
            rewards = self.args.rewards_that_count(group)
            for trajectory in group:
                alone = len(rewards) < 2  # its own reward would be its value
                trajectory.value = (
                    None if alone else log_mean_exp(torch.tensor(rewards, dtype=torch.float64), temperature).item()
                )
