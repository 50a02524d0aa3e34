"""Metrics: sums and weights, added over micro-batches and processes, then divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ..batch import Batch, TrajectoryScores, at_least_float32
from ..trajectory import End, UpdateRow
from .soft_value import ValueInputs
from .trajectory_loss import LossOutput

LEFT_OUT_REASONS = ("unscored", "truncated", "no_action", "no_value")
# Where an update has a trajectory from: drawn for it, the same window again, the replay buffer, or the log.
ORIGINS = ("fresh", "reused", "replayed", "logged")


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
        """Sum divided by weight, for each name that had any. A mean square becomes its root, under the name `rms`."""
        pairs = zip(self.by_name, torch.stack(list(self.by_name.values())).tolist(), strict=True)
        means = {name: total / weight for name, (total, weight) in pairs if weight}
        return {
            name.replace("mean_square", "rms"): math.sqrt(mean) if name.endswith("mean_square") else mean
            for name, mean in means.items()
        }

    def state(self) -> dict[str, list[float]]:
        """Plain values, for a checkpoint."""
        return {name: pair.tolist() for name, pair in self.by_name.items()}

    @classmethod
    def from_state(cls, state: dict[str, list[float]], device: torch.device) -> Totals:
        return cls({name: torch.tensor(pair, dtype=torch.float32, device=device) for name, pair in state.items()})


@torch.no_grad()
def microbatch_totals(
    rows: Sequence[UpdateRow],
    batch: Batch,
    scores: TrajectoryScores,
    inputs: ValueInputs,
    soft_value: Tensor,
    residual: Tensor,
) -> Totals:
    """Totals of one micro-batch. Metrics of sequences are in reward units (β × nats), those of tokens in nats.

    Args:
        rows: the micro-batch's B trajectories.
        batch: the same, collated: (B, T).
        scores: the policy's scores of it.
        inputs: what the residual is made of. Sequence-level metrics are means over the rows that count.
        soft_value: `(B,)` the value term of the residual, nats.
        residual: `(B,)` nats.
    """
    device, beta, counted = residual.device, inputs.beta, inputs.counted
    assert scores.entropy is not None, "the policy's head computes entropies"

    def over(values: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([torch.where(mask, at_least_float32(values), 0.0).sum(), mask.sum()]).float()

    def share(part: float, whole: float) -> Tensor:
        return torch.tensor([part, whole], dtype=torch.float32, device=device)

    origin = {name: torch.tensor([row.origin == name for row in rows], device=device) for name in ORIGINS}  # (B,) each
    ages = [row.age for row in rows if row.age is not None]
    squared = (beta * residual).square()  # (B,)
    behind = batch.ref_log_probs - scores.log_probs  # (B, T) log π_ref − log π_θ
    totals = Totals(
        {
            "residual/mean": over(beta * residual, counted),
            "residual/mean_square": over(squared, counted),
            **{f"residual/{name}_mean_square": over(squared, counted & mine) for name, mine in origin.items()},
            "soft_value": over(beta * soft_value, counted),
            "log_ratio": over(beta * inputs.log_ratio, counted),
            # TRL logs this estimator of KL(π‖π_ref) under the same name. It is one on the policy's own data alone.
            "kl": over(behind.exp() - behind - 1, batch.action_mask & origin["fresh"].unsqueeze(1)),
            "entropy": over(scores.entropy, batch.action_mask),
            **{f"left_out/{r}": share([row.left_out for row in rows].count(r), len(rows)) for r in LEFT_OUT_REASONS},
            "replay/age": share(sum(ages), len(ages)),
            "pad_fraction": share(batch.pad_fraction * batch.input_ids.numel(), batch.input_ids.numel()),
        }
    )
    if scores.aux_loss is not None:
        totals.by_name["aux_loss"] = share(scores.aux_loss.item(), 1.0)
    return totals


@torch.no_grad()
def evaluation_totals(
    rows: Sequence[UpdateRow], reward_names: Sequence[str], output: LossOutput, weight: Tensor
) -> dict[str, Tensor]:
    """Totals of an evaluation batch by TRL's names, over its rows instead of its batches. Repeated rows do not count.

    Args:
        rows: B rows, after `left_out` was decided.
        reward_names: of the reward functions.
        output: the loss of the rows.
        weight: `(B,)` factor on each loss.
    """
    own = [row.trajectory for row in rows if row.left_out != "repeated"]
    values: dict[str, list[float]] = {
        "reward": [one.reward for one in own],
        **{f"rewards/{name}/mean": [one.rewards.get(name, math.nan) for one in own] for name in reward_names},
        "completions/mean_length": [float(len(one.completion_ids)) for one in own],
        "completions/clipped_ratio": [float(one.end is End.LENGTH) for one in own],
        "loss": torch.where(output.inputs.counted, output.loss * weight, math.nan).tolist(),
    }
    given = {name: [value for value in column if not math.isnan(value)] for name, column in values.items()}
    device = output.loss.device
    return {name: torch.tensor([sum(column), len(column)], device=device) for name, column in given.items()}


class Recorder:
    """The totals of this process in the current optimizer step, and those of all processes since the last log."""

    def __init__(self) -> None:
        self.step = Totals()
        self.since_log = {"train": Totals(), "eval": Totals()}

    def record(self, totals: Totals, mode: str, step_ends: bool, accelerator: Accelerator) -> Totals | None:
        """Add a micro-batch's totals. If an optimizer step ends with it, return the step's totals over all processes.

        Args:
            totals: from `microbatch_totals`.
            mode: "train" or "eval".
            step_ends: whether this is the last micro-batch of an optimizer step. All processes agree on it.
            accelerator: reduces over processes.
        """
        self.step += totals
        if not step_ends:
            return None
        summed, self.step = self.step.over_processes(accelerator), Totals()
        self.since_log[mode] += summed
        return summed

    def means(self, mode: str) -> dict[str, float]:
        """The means since the last call. Counting begins anew."""
        totals, self.since_log[mode] = self.since_log[mode], Totals()
        return totals.means() if totals else {}

    def clear(self, train: Totals | None = None) -> None:
        """Begin training with nothing recorded, or with these totals."""
        self.step, self.since_log["train"] = Totals(), train or Totals()
