"""Updates that were not finite: how many, in a row and in all, and what they were made of."""

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
        limit: updates in a row after which the run stops.
        total: since the start of the run.
        in_a_row: since the last update that was taken.
        since_log: since the last log.
        taken_since_log: updates that were taken since the last log.
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
        """The mean over the updates taken since the last log, from one that counts the skipped ones as 0."""
        if not self.since_log:
            return mean
        taken = self.taken_since_log
        return mean * (taken + self.since_log) / taken if taken else math.nan

    def logged(self) -> None:
        self.since_log = self.taken_since_log = 0

    def state(self) -> dict[str, int]:
        return asdict(self)


def write_culprits(file: Path, update: int, cause: str, culprits: Iterable[tuple[UpdateRow, float, float]]) -> None:
    """Append what a skipped update was made of to a file of JSON lines.

    Args:
        file: this process's.
        update: its number, from 1.
        cause: "loss" if the rows have a loss that is not finite, "gradient" if the sum of their gradients is not.
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
