"""QRPO: the quantile of a reward among the rewards of reference samples. Its partition function is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...trajectory import Trajectory
from .sampled import SampledValue


def quantile(reward: float, samples: Tensor) -> float:
    """Share of the samples below a reward. Those that equal it count half (mid-ranks).

    They are compared in float32, the precision in which reward functions are read. So 0.3 in a data set equals 0.3 from
    a function.
    """
    given, own = samples.float(), torch.tensor(reward, dtype=torch.float32)
    return ((given < own).double() + 0.5 * (given == own).double()).mean().item()


def log_partition(samples: Tensor, beta: float) -> float:
    """`log E_ref exp(q/β)` of the quantile q: uniform, `log ∫₀¹ e^{q/β} dq = log β(e^{1/β} − 1)`, unless samples tie.

    Tied rewards have few distinct quantiles. The expectation is then the mean over the samples.
    """
    distinct, counts = samples.float().unique(return_counts=True)  # (D,) each, ascending
    if len(distinct) == len(samples):
        return math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))
    share = counts.double() / len(samples)  # (D,)
    quantiles = share.cumsum(dim=0) - share / 2  # (D,) mid-ranks
    return (quantiles / beta + share.log()).logsumexp(dim=0).item()


class QuantileValue(SampledValue):
    """`δ = log Z + log-ratio − q/β`: q is the quantile of R among N samples of the reference, and `Z = E_ref exp(q/β)`
    is known without an estimate (QRPO, arXiv 2507.08068). Tied rewards, such as 0/1, have mid-ranks.

    It sets R − q as baseline, so the residual contains q in place of R. A column `reference_rewards` may give the
    rewards of the samples, a list for each prompt.
    """

    name = "quantile"
    column, content = "reference_rewards", "a list: what samples of the reference earn for this prompt"
    options: ClassVar = frozenset({"soft_value_samples"})

    def problem_of_cell(self, cell: Any) -> str | None:
        if not isinstance(cell, Sequence) or isinstance(cell, str) or not cell:
            return "It must be a list of rewards, one or more."
        return next(filter(None, map(self.problem_of_number, cell)), None)

    def cells(self, rewards: Sequence[Tensor]) -> list[list[float]]:
        return [given.tolist() for given in rewards]

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        for trajectory, row in zip(trajectories, rows, strict=True):
            if not (given := row.get(self.column)):
                continue  # prompts of an evaluation set have no samples
            samples, reward = torch.tensor(given, dtype=torch.float64), self.args.reward_of(trajectory)
            trajectory.baseline = reward - quantile(reward, samples)
            trajectory.value = self.args.beta * log_partition(samples, self.args.beta)
