"""Updates skipped because they were not finite: how many, in a row and in total, and their trajectories."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .run_log import append_line
from .trajectory import UpdateRow


@dataclass
class SkippedUpdates:
    """Counts of skipped updates.

    Attributes:
        limit: number of skipped updates in a row after which the run stops.
        total: skipped updates since the start of the run.
        in_a_row: skipped updates since the last update that was taken.
        since_log: skipped updates since the last log.
        taken_since_log: updates taken since the last log.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0
    since_log: int = 0
    taken_since_log: int = 0

    def took(self) -> None:
        self.in_a_row, self.taken_since_log = 0, self.taken_since_log + 1

    def skipped(self) -> None:
        self.total, self.in_a_row, self.since_log = self.total + 1, self.in_a_row + 1, self.since_log + 1

    def mean_over_taken(self, mean: float) -> float:
        """Turn a mean since the last log that counts skipped updates as 0 into the mean over the taken updates."""
        if not self.since_log:
            return mean
        taken = self.taken_since_log
        return mean * (taken + self.since_log) / taken if taken else math.nan

    def logged(self) -> None:
        self.since_log = self.taken_since_log = 0

    def state(self) -> dict[str, int]:
        return asdict(self)


def write_culprits(file: Path, update: int, cause: str, culprits: Iterable[tuple[UpdateRow, float, float]]) -> None:
    """Append the rows of a skipped update to a file of JSON lines.

    Args:
        file: the file of this process.
        update: the update's number, counted from 1.
        cause: "loss" if the rows have a loss that is not finite, "gradient" if only the sum of their gradients is not
            finite.
        culprits: rows with their loss and their residual β δ.
    """
    for row, loss, residual in culprits:
        one = row.trajectory
        log_prob = None if one.ref_log_probs is None else float(one.ref_log_probs[one.loss_mask].double().sum())
        values = {
            "update": update,
            "cause": cause,
            "origin": row.origin,
            "loss": loss,
            "residual": residual,
            "reward": one.reward,
            "rewards": one.rewards,
            "ref_log_prob": log_prob,
            "ref_soft_value": one.ref_soft_value,
            "policy_step": one.policy_step,
            "first_policy_step": one.first_policy_step,
            "end": one.end.value,
            "prompt_ids": one.prompt_ids.tolist(),
            "completion_ids": one.completion_ids.tolist(),
        }
        append_line(file, values, digits=None)
