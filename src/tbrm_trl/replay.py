"""The replay buffer: this process's share of past trajectories, first in, first out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .trajectory import Trajectory, random_order

# |residual| of a perfectly fitted trajectory, so that it is still drawn now and then. In reward units.
LEAST_PRIORITY = 1e-6


@dataclass(frozen=True)
class Sample:
    """Trajectories drawn for one update, and the age of each in updates.

    Attributes:
        trajectories: drawn rows; with prioritized sampling one may stand twice.
        weights: what each row's squared residual counts; 1 with uniform sampling.
        ages: updates since each was generated.
    """

    trajectories: list[Trajectory]
    weights: list[float]
    ages: list[int]


class ReplayBuffer:
    """One process's shard of the buffer. It holds the very trajectories it was given, not copies.

    Uniform sampling draws without replacement. Prioritized sampling (Schaul et al. 2016, arXiv 1511.05952, Section 3.3)
    draws row i with probability `P(i) ∝ (|β δ_i| + 1e-6)^exponent`, with replacement, and weighs its squared residual
    by `(N P(i))^-correction`, divided by the largest such weight in the buffer; N and the largest are over all
    processes, P(i) is the probability on the process that holds the row. A row that was not replayed yet has the
    largest priority of all processes. TBRM's minimiser is the same for every distribution with coverage, so the
    correction is a choice about emphasis, not about validity.

    Args:
        capacity: trajectories that this shard may hold; the oldest make room.
        max_age: updates after which a trajectory is dropped; None keeps it until room is needed.
        prioritized: draw by |residual| instead of uniformly.
        exponent: 0 is uniform, 1 fully prioritized.
        correction: 0 leaves the draws' distribution as it is, 1 undoes it.
        together: trajectories that are added and drawn together, as a group; 1 where each is by itself.
    """

    def __init__(
        self,
        capacity: int,
        max_age: int | None = None,
        prioritized: bool = False,
        exponent: float = 0.6,
        correction: float = 0.4,
        together: int = 1,
    ):
        self.trajectories: deque[Trajectory] = deque(maxlen=capacity)
        self.max_age, self.prioritized, self.exponent, self.correction = max_age, prioritized, exponent, correction
        self.together = together

    def __len__(self) -> int:
        return len(self.trajectories)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        self.trajectories.extend(trajectories)

    def sample(self, size: int, update: int, gather: Callable[[Sequence[float]], torch.Tensor]) -> Sample | None:
        """Draw `size` trajectories, or None on every process alike if any of them holds fewer.

        Args:
            size: rows that each process needs.
            update: number of the update that is about to be made.
            gather: gives the numbers of all processes, `(P, n)`, for this one's n. Called once.
        """
        while self.max_age is not None and self.trajectories and self._age(self.trajectories[0], update) > self.max_age:
            self.trajectories.popleft()

        known = torch.tensor([t.priority for t in self.trajectories if t.priority is not None], dtype=torch.float64)
        highest, lowest = (known.max().item(), known.min().item()) if len(known) else (0.0, float("inf"))
        powers = self._power(known).sum().item()
        shards = gather([len(self), len(known), powers, highest, lowest]).double()  # (P, 5)
        fills, replayed, powers_by_shard, highests, lowests = shards.unbind(dim=1)  # (P,) each
        if fills.min() < size:
            return None

        rows = list(self.trajectories)
        if not self.prioritized:
            drawn = random_order(len(rows), self.together)[:size]
            weights = [1.0] * size
        else:
            top = highests.max().item() if replayed.sum() else 1.0
            priority = torch.tensor([top if t.priority is None else t.priority for t in rows], dtype=torch.float64)
            power = self._power(priority)  # (N,)
            drawn = torch.multinomial(power / power.sum(), size, replacement=True).tolist()
            everywhere = powers_by_shard + (fills - replayed) * self._power(torch.tensor(top))  # (P,) sums of powers
            expected = fills.sum() / len(fills) * power / power.sum()  # (N,) N P(i): each process draws one Pth
            least = fills.sum() / len(fills) * self._power(lowests.clamp(max=top)) / everywhere  # (P,)
            weights = (expected[drawn] / least.min()).pow(-self.correction).tolist()
        return Sample([rows[i] for i in drawn], weights, [self._age(rows[i], update) for i in drawn])

    def _power(self, priority: torch.Tensor) -> torch.Tensor:
        return (priority.double() + LEAST_PRIORITY).pow(self.exponent)

    @staticmethod
    def _age(trajectory: Trajectory, update: int) -> int:
        assert trajectory.policy_step is not None, "only this run's rollouts enter the buffer"
        return update - trajectory.policy_step
