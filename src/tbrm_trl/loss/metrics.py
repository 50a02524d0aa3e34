"""Metrics as sums and weights that are added over micro-batches and processes, then divided."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.trainer.utils import nanstd

from ..batch import Batch, TrajectoryScores, at_least_float32
from ..trajectory import End, UpdateRow
from .soft_value import ValueInputs
from .trajectory_loss import LossOutput

LEFT_OUT_REASONS = ("unscored", "truncated", "no_action", "no_value")
# Where a trajectory of an update comes from: drawn for it, begun under an earlier policy, a window used once more, the
# replay buffer, or the log.
ORIGINS = ("fresh", "ahead", "reused", "replayed", "logged")
_OF_ROWS = (
    "residual/mean",
    "soft_value",
    "log_ratio",
    "residual/mean_square",
    *(f"residual/{origin}_mean_square" for origin in ORIGINS),
)
_OF_TOKENS = ("kl", "entropy")
_NOT_FINITE = "micro-batches that are not finite"


@dataclass
class Totals:
    """Weighted sums by metric name.

    Attributes:
        names: names of the K metrics.
        pairs: `(K, 2)` the sum and the weight of each. One tensor makes adding and reducing one operation.
    """

    names: tuple[str, ...] = ()
    pairs: Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    def __bool__(self) -> bool:
        return bool(self.names)

    def __add__(self, other: Totals) -> Totals:
        if not self:
            return other
        if self.names != other.names:  # an evaluation adds its loss; a checkpoint of another version has other metrics
            names = tuple(dict.fromkeys(self.names + other.names))
            self, other = self._of(names), other._of(names)
        return Totals(self.names, self.pairs + other.pairs)

    def _of(self, names: tuple[str, ...]) -> Totals:
        pairs = self.pairs.new_zeros(len(names), 2)
        pairs[[names.index(name) for name in self.names]] = self.pairs
        return Totals(names, pairs)

    def all_finite(self) -> Tensor:
        """Bool scalar: whether the losses of all micro-batches are finite."""
        return self.pairs[self.names.index(_NOT_FINITE), 0] == 0

    def over_processes(self, accelerator: Accelerator) -> Totals:
        """The totals of all processes, with one reduction."""
        return Totals(self.names, accelerator.reduce(self.pairs, reduction="sum"))

    def means(self) -> dict[str, float]:
        """Sum divided by weight, for each name with a weight. A mean square becomes its root, under the name `rms`."""
        pairs = zip(self.names, self.pairs.tolist(), strict=True)
        means = {name: total / weight for name, (total, weight) in pairs if weight}
        return {
            name.replace("mean_square", "rms"): math.sqrt(mean) if name.endswith("mean_square") else mean
            for name, mean in means.items()
        }

    def state(self) -> dict[str, list[float]]:
        """Plain values, for a checkpoint."""
        return dict(zip(self.names, self.pairs.tolist(), strict=True))

    @classmethod
    def from_state(cls, state: dict[str, list[float]], device: torch.device) -> Totals:
        if not state:
            return cls()
        return cls(tuple(state), torch.tensor(list(state.values()), dtype=torch.float32, device=device))


@torch.no_grad()
def microbatch_totals(
    rows: Sequence[UpdateRow],
    batch: Batch,
    scores: TrajectoryScores,
    inputs: ValueInputs,
    soft_value: Tensor,
    residual: Tensor,
    is_finite: Tensor,
) -> Totals:
    """Totals of one micro-batch. Metrics of sequences are in reward units (β × nats), those of tokens in nats.

    Args:
        rows: the micro-batch's B trajectories.
        batch: the same, collated: (B, T).
        scores: the policy's scores of the batch.
        inputs: the terms of the residual. Sequence-level metrics are means over the rows that count.
        soft_value: `(B,)` the value term of the residual, nats.
        residual: `(B,)` nats.
        is_finite: bool scalar, whether the micro-batch's loss is finite.
    """
    device, beta, counted = residual.device, inputs.beta, inputs.counted
    assert scores.entropy is not None, "the policy's head computes entropies"
    is_of = torch.tensor([[row.origin == name for row in rows] for name in ORIGINS], device=device)  # (O, B)
    scaled = beta * at_least_float32(torch.stack([residual, soft_value, inputs.log_ratio]))  # (3, B)
    squared = scaled[0].square().expand(1 + len(ORIGINS), -1)  # (1 + O, B)
    by_row = torch.cat([scaled, squared])  # (4 + O, B)
    counted_by = torch.cat([counted.expand(4, -1), counted & is_of])  # (4 + O, B)

    behind = batch.ref_log_probs - scores.log_probs  # (B, T) log π_ref − log π_θ
    # TRL logs this estimator of KL(π‖π_ref) under the same name. It estimates the KL only on the policy's own data,
    # so trajectories that an earlier policy began, replayed and logged ones are left out.
    is_fresh = is_of[ORIGINS.index("fresh")].unsqueeze(1)  # (B, 1)
    own = [row.left_out != "repeated" for row in rows]  # others fill up a batch of an evaluation
    actions = batch.action_mask & torch.tensor(own, device=device).unsqueeze(1)  # (B, T)
    tokens = [(behind.exp() - behind - 1, actions & is_fresh), (scores.entropy, actions)]
    by_token = [torch.stack([torch.where(mask, at_least_float32(of), 0.0).sum(), mask.sum()]) for of, mask in tokens]

    ages = [row.age for row in rows if row.age is not None]
    pooled = [row for row in rows if row.staleness is not None]
    left_out = Counter(row.left_out for row in rows)
    places = batch.input_ids.numel()
    shares: dict[str, tuple[float, float]] = {
        **{f"left_out/{reason}": (left_out[reason], sum(own)) for reason in LEFT_OUT_REASONS},
        "replay/age": (sum(ages), len(ages)),
        "staleness/mean": (sum(row.staleness or 0 for row in pooled), len(pooled)),
        "staleness/mixed": (sum(map(_is_mixed, pooled)), len(pooled)),
        "pad_fraction": (batch.pad_fraction * places, places),
    }
    if scores.aux_loss is not None:
        shares["aux_loss"] = (scores.aux_loss.item() * len(rows), len(rows))  # as it enters the loss
    names = (*_OF_ROWS, *_OF_TOKENS, *shares, _NOT_FINITE)
    pairs = [
        torch.stack([torch.where(counted_by, by_row, 0.0).sum(dim=1), counted_by.sum(dim=1)], dim=1),  # (4 + O, 2)
        torch.stack(by_token),
        torch.tensor(list(shares.values()), dtype=torch.float32, device=device),
        torch.stack([~is_finite, torch.zeros_like(is_finite)]).unsqueeze(0),  # weight 0: it has no mean
    ]
    return Totals(names, torch.cat([one.float() for one in pairs]))


def _is_mixed(row: UpdateRow) -> bool:
    """Whether several policies drew it."""
    return row.trajectory.first_policy_step != row.trajectory.policy_step


def evaluation_loss(output: LossOutput, weight: Tensor) -> Totals:
    """The sum of the losses that count, and how many do. `weight`: `(B,)` factor on each loss."""
    counted = output.inputs.counted  # (B,)
    pair = torch.stack([torch.where(counted, output.loss.detach() * weight, 0.0).sum(), counted.sum()]).float()
    return Totals(("loss",), pair.unsqueeze(0))


def evaluated_numbers(rows: Sequence[UpdateRow], reward_names: Sequence[str]) -> Tensor:
    """`(B, 3 + F)` per row: whether it only fills up the batch, its length, whether it was cut, and each reward."""
    return torch.tensor(
        [
            [
                float(row.left_out == "repeated"),
                float(row.trajectory.loss_mask.sum()),
                float(row.trajectory.end is End.LENGTH),
                *(row.trajectory.rewards.get(name, math.nan) for name in reward_names),
            ]
            for row in rows
        ],
        dtype=torch.float32,
    )


def evaluation_metrics(
    numbers: Tensor, reward_names: Sequence[str], reward_weights: Tensor, group_size: int
) -> dict[str, float]:
    """TRL's metrics of completions and rewards, over all rows of an evaluation instead of per batch.

    Args:
        numbers: `(N, 3 + F)` `evaluated_numbers` of all processes. The rows of a prompt are adjacent.
        reward_names: names of the F reward functions.
        reward_weights: `(F,)`.
        group_size: number of rows per prompt.
    """
    repeated, length, cut, rewards = numbers.double().cpu().tensor_split([1, 2, 3], dim=1)
    own = repeated[:, 0] == 0
    length, ended, rewards = length[own, 0], cut[own, 0] == 0, rewards[own]  # (M,), (M,), (M, F)
    weights = reward_weights.double().cpu()
    total = (rewards * weights).nansum(dim=1)  # (M,)
    total[rewards[:, weights != 0].isnan().all(dim=1)] = math.nan
    if group_size > 1:
        whole = total[: len(total) // group_size * group_size]  # a stream may end within a group
        has_zero_std = nanstd(whole.view(-1, group_size), dim=1).abs() < 1e-8  # (M / group_size,)
    else:
        has_zero_std = torch.ones_like(total, dtype=torch.bool)
    values = {
        "reward": total.nanmean(),
        "reward_std": nanstd(total),
        "frac_reward_zero_std": has_zero_std.double().mean(),
        "completions/clipped_ratio": 1 - ended.double().mean(),
    }
    for name, column in zip(reward_names, rewards.unbind(dim=1), strict=True):
        values |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/std": nanstd(column)}
    for name, lengths in (("", length), ("_terminated", length[ended] if ended.any() else torch.zeros(1))):
        values |= {f"completions/{how}{name}_length": getattr(lengths, how)() for how in ("mean", "min", "max")}
    return {name: value.item() for name, value in values.items()}


class Recorder:
    """The totals of this process in the current optimizer step, and those of all processes since the last log."""

    def __init__(self) -> None:
        self.step = Totals()
        self.since_log = {"train": Totals(), "eval": Totals()}

    def record(self, totals: Totals, accelerator: Accelerator) -> Totals | None:
        """Add a micro-batch's totals. If an optimizer step ends with it, return the step's totals over all processes.

        All processes agree on where a step ends. The caller passes the result to `keep` if the step is taken.
        """
        self.step += totals
        if not accelerator.sync_gradients:
            return None
        summed, self.step = self.step.over_processes(accelerator), Totals()
        return summed

    def keep(self, totals: Totals, mode: str) -> None:
        """Add the totals of all processes to those since the last log of "train" or "eval"."""
        self.since_log[mode] += totals

    def means(self, mode: str) -> dict[str, float]:
        """The means since the last call. This call resets the totals."""
        totals, self.since_log[mode] = self.since_log[mode], Totals()
        return totals.means() if totals else {}

    def clear(self, train: Totals | None = None) -> None:
        """Reset the training totals to nothing, or to these."""
        self.step, self.since_log["train"] = Totals(), train or Totals()
