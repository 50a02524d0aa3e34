"""Metrics: sums and weights, added over micro-batches and processes, then divided."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import nanstd

from ..batch import Batch, TrajectoryScores, at_least_float32
from ..trajectory import End, Trajectory, UpdateRow
from .soft_value import ValueInputs
from .trajectory_loss import LossOutput

LEFT_OUT_REASONS = ("unscored", "truncated", "no_action", "no_value")
_NOT_FINITE = "micro-batches that are not finite"
# Where an update has a trajectory from: drawn for it, begun under an earlier policy, the same window again, the replay
# buffer, or the log.
ORIGINS = ("fresh", "ahead", "reused", "replayed", "logged")


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

    def count_not_finite(self, is_not: Tensor) -> None:
        """Note, by a bool scalar, that a micro-batch has a loss that is not finite."""
        count = is_not.float()
        self.by_name[_NOT_FINITE] = torch.stack([count, torch.zeros_like(count)])  # without weight it has no mean

    def all_finite(self) -> Tensor:
        """Bool scalar: whether no micro-batch has a loss that is not finite."""
        return self.by_name[_NOT_FINITE][0] == 0

    def finite(self) -> Totals:
        """The totals without the count of what is not finite."""
        return Totals({name: pair for name, pair in self.by_name.items() if name != _NOT_FINITE})

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
    pooled = [row for row in rows if row.staleness is not None]
    squared = (beta * residual).square()  # (B,)
    behind = batch.ref_log_probs - scores.log_probs  # (B, T) log π_ref − log π_θ
    totals = Totals(
        {
            "residual/mean": over(beta * residual, counted),
            "residual/mean_square": over(squared, counted),
            **{f"residual/{name}_mean_square": over(squared, counted & mine) for name, mine in origin.items()},
            "soft_value": over(beta * soft_value, counted),
            "log_ratio": over(beta * inputs.log_ratio, counted),
            # TRL logs this estimator of KL(π‖π_ref) under the same name. It is one on the policy's own data alone,
            # which no trajectory is that an earlier policy began.
            "kl": over(behind.exp() - behind - 1, batch.action_mask & origin["fresh"].unsqueeze(1)),
            "entropy": over(scores.entropy, batch.action_mask),
            **{f"left_out/{r}": share([row.left_out for row in rows].count(r), len(rows)) for r in LEFT_OUT_REASONS},
            "replay/age": share(sum(ages), len(ages)),
            "staleness/mean": share(sum(row.staleness or 0 for row in pooled), len(pooled)),
            "staleness/mixed": share(sum(map(_is_mixed, pooled)), len(pooled)),
            "pad_fraction": share(batch.pad_fraction * batch.input_ids.numel(), batch.input_ids.numel()),
        }
    )
    if scores.aux_loss is not None:
        totals.by_name["aux_loss"] = share(scores.aux_loss.item(), 1.0)
    return totals


def _is_mixed(row: UpdateRow) -> bool:
    """Whether several policies have drawn it."""
    return row.trajectory.first_policy_step != row.trajectory.policy_step


def evaluation_loss(output: LossOutput, weight: Tensor) -> Tensor:
    """`(2,)` the sum of the losses that count, and their number. `weight`: `(B,)` factor on each."""
    counted = output.inputs.counted  # (B,)
    return torch.stack([torch.where(counted, output.loss.detach() * weight, 0.0).sum(), counted.sum()]).float()


def evaluated_numbers(rows: Sequence[UpdateRow], reward_names: Sequence[str]) -> Tensor:
    """`(B, 3 + F)` of each row: whether it only fills up the batch, its length, whether it was cut, and each reward."""
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
    """TRL's metrics of completions and rewards, over all rows of an evaluation instead of one batch after the other.

    Args:
        numbers: `(N, 3 + F)` `evaluated_numbers` of all processes, the rows of a prompt one after the other.
        reward_names: of the F reward functions.
        reward_weights: `(F,)`.
        group_size: rows of a prompt.
    """
    repeated, length, cut, rewards = numbers.double().cpu().tensor_split([1, 2, 3], dim=1)
    own = repeated[:, 0] == 0
    length, ended, rewards = length[own, 0], cut[own, 0] == 0, rewards[own]  # (M,), (M,), (M, F)
    total = (rewards * reward_weights.double().cpu()).nansum(dim=1)  # (M,)
    total[rewards.isnan().all(dim=1)] = math.nan
    if group_size > 1:
        whole = total[: len(total) // group_size * group_size]  # a stream may end in a part of a group
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


class AdvantageColumn:
    """`β δ` of the rollouts that TRL's table of completions shows, in its order.

    A row of the table is there once it is generated, and has its residual once it was in an update.

    Args:
        size: the rows of the table that this process generates.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.generations: deque[list[float | None]] = deque()  # the values of each generation's rows on this process
        self.places: dict[str, dict[int, tuple[list[float | None], int]]] = {}  # of the last trajectories of each mode

    def add(self, trajectories: Sequence[Trajectory], mode: str) -> None:
        """Add the rollouts of a generation, in the order in which TRL returned them. `mode`: "train" or "eval"."""
        values: list[float | None] = [None] * len(trajectories)
        self.generations.append(values)
        self.places[mode] = {id(one): (values, place) for place, one in enumerate(trajectories)}
        while sum(map(len, self.generations)) - len(self.generations[0]) >= self.size:
            self.generations.popleft()

    def set(self, rows: Sequence[UpdateRow], residual: Tensor, mode: str) -> None:
        """Take the residuals of a micro-batch: `(B,)` in reward units. Rows that do not count have none."""
        places = self.places.get(mode, {})
        for row, value in zip(rows, residual.tolist(), strict=True):
            if id(row.trajectory) in places and row.left_out is None:
                values, place = places[id(row.trajectory)]
                values[place] = value

    def over_processes(self) -> list[float]:
        """The whole column: in each generation the rows of one process after those of another. All call this."""
        generations = zip(*gather_object([list(self.generations)]), strict=True)
        column = [value for of_processes in generations for values in of_processes for value in values]
        return [math.nan if value is None else value for value in column]

    def state(self, window: Sequence[Trajectory]) -> dict[str, Any]:
        """Plain values, for a checkpoint that holds these trajectories."""
        number = {id(values): number for number, values in enumerate(self.generations)}
        found = [self.places.get("train", {}).get(id(trajectory)) for trajectory in window]
        places = [found and id(found[0]) in number and [number[id(found[0])], found[1]] for found in found]
        return {"generations": list(self.generations), "places": places}

    def restore(self, state: dict[str, Any], window: Sequence[Trajectory]) -> None:
        """Go on from what `state` returned."""
        self.generations = deque(state["generations"])
        found = [(one, place) for one, place in zip(window, state["places"], strict=True) if place]
        self.places = {"train": {id(one): (self.generations[n], place) for one, (n, place) in found}}


class Recorder:
    """The totals of this process in the current optimizer step, and those of all processes since the last log."""

    def __init__(self) -> None:
        self.step = Totals()
        self.since_log = {"train": Totals(), "eval": Totals()}

    def record(self, totals: Totals, accelerator: Accelerator) -> Totals | None:
        """Add a micro-batch's totals. If an optimizer step ends with it, return the step's totals over all processes.

        All processes agree on where a step ends. `keep` then says that the step was taken.
        """
        self.step += totals
        if not accelerator.sync_gradients:
            return None
        summed, self.step = self.step.over_processes(accelerator), Totals()
        return summed

    def keep(self, totals: Totals, mode: str) -> None:
        """Count the totals of all processes among those since the last log of "train" or "eval"."""
        self.since_log[mode] += totals

    def means(self, mode: str) -> dict[str, float]:
        """The means since the last call. Counting begins anew."""
        totals, self.since_log[mode] = self.since_log[mode], Totals()
        return totals.means() if totals else {}

    def clear(self, train: Totals | None = None) -> None:
        """Begin training with nothing recorded, or with these totals."""
        self.step, self.since_log["train"] = Totals(), train or Totals()
