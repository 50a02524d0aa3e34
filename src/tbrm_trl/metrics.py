"""What is logged of each optimizer step: sums and weights, added over micro-batches and processes, then divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from .objective import at_least_float32
from .scoring import TrajectoryScores
from .trajectory import Batch

LEFT_OUT_REASONS = ("unscored", "truncated", "no_action")


@dataclass
class Totals:
    """Weighted sums by metric name: `(2,)` tensors that hold the sum and its weight."""

    by_name: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def __add__(self, other: Totals) -> Totals:
        if not self:
            return other
        return Totals({name: pair + other.by_name[name] for name, pair in self.by_name.items()})

    def over_processes(self, accelerator: Accelerator) -> Totals:
        """The totals of all processes, with one reduction."""
        stacked = accelerator.reduce(torch.stack(list(self.by_name.values())), reduction="sum")  # (K, 2)
        return Totals(dict(zip(self.by_name, stacked, strict=True)))

    def means(self) -> dict[str, float]:
        """Sum over weight, of what had any; `residual/rms` is the root of its mean square."""
        means = {}
        for name, (total, weight) in zip(self.by_name, torch.stack(list(self.by_name.values())).tolist(), strict=True):
            if weight:
                means[name] = total / weight
        if "residual/mean_square" in means:
            means["residual/rms"] = math.sqrt(means.pop("residual/mean_square"))
        return means


@torch.no_grad()
def step_totals(
    batch: Batch,
    scores: TrajectoryScores,
    counted: Tensor,
    left_out: Sequence[str | None],
    soft_value: Tensor,
    log_ratio: Tensor,
    residual: Tensor,
    beta: float,
    fresh: bool,
) -> Totals:
    """Totals of one micro-batch. Sequence-level metrics are in reward units (β × nats), token-level ones in nats.

    Args:
        batch: the micro-batch, (B, T).
        scores: the policy's scores of it.
        counted: `(B,)` bool, rows that enter the loss; sequence-level metrics are means over these.
        left_out: per row, why it does not count, or None.
        soft_value: `(B,)` the value term of the residual, nats.
        log_ratio: `(B,)` nats.
        residual: `(B,)` nats.
        beta: reward units per nat.
        fresh: whether these trajectories are trained on for the first time since the policy produced them.
    """
    device = residual.device
    assert scores.entropy is not None, "the policy's head computes entropies"

    def over(values: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([torch.where(mask, at_least_float32(values), 0.0).sum(), mask.sum()]).float()

    def share(part: float, whole: float) -> Tensor:
        return torch.tensor([part, whole], dtype=torch.float32, device=device)

    behind = batch.ref_log_probs - scores.log_probs  # (B, T) log π_ref − log π_θ
    totals = Totals(
        {
            "residual/mean": over(beta * residual, counted),
            "residual/mean_square": over((beta * residual).square(), counted),
            "soft_value": over(beta * soft_value, counted),
            "log_ratio": over(beta * log_ratio, counted),
            # The estimator of KL(π‖π_ref) that TRL logs under this name; on other policies' data it is none.
            "kl": over(behind.exp() - behind - 1, batch.action_mask & fresh),
            "entropy": over(scores.entropy, batch.action_mask),
            **{f"left_out/{r}": share(list(left_out).count(r), len(left_out)) for r in LEFT_OUT_REASONS},
            "pad_fraction": share(batch.pad_fraction * batch.input_ids.numel(), batch.input_ids.numel()),
        }
    )
    if scores.aux_loss is not None:
        totals.by_name["aux_loss"] = share(scores.aux_loss.item(), 1.0)
    return totals
