"""The replay buffer: this process's share of past trajectories, first in, first out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .store import TrajectoryStore
from .trajectory import Trajectory

# |residual| of a perfectly fitted trajectory, so that it is still drawn now and then. In reward units.
LEAST_PRIORITY = 1e-6


@dataclass(frozen=True)
class Sample:
    """Trajectories drawn for one update, and the age of each in updates.

    Attributes:
        numbers: of the drawn rows in the buffer; with prioritized sampling one may stand twice.
        trajectories: the rows.
        weights: what each row's squared residual counts; 1 with uniform sampling.
        ages: updates since each was generated.
    """

    numbers: list[int]
    trajectories: list[Trajectory]
    weights: list[float]
    ages: list[int]


class ReplayBuffer:
    """One process's shard of the buffer.

    Uniform sampling draws without replacement, in time that does not grow with the buffer. Prioritized sampling (Schaul
    et al. 2016, arXiv 1511.05952, Section 3.3) draws row i with probability `P(i) ∝ (|β δ_i| + 1e-6)^exponent`, with
    replacement, and weighs its squared residual by `(N P(i))^-correction`, divided by the largest such weight in the
    buffer; N and the largest are over all processes, P(i) is the probability on the process that holds the row. A row
    that was not replayed yet has the largest priority of all processes. TBRM's minimiser is the same for every
    distribution with coverage, so the correction is a choice about emphasis, not about validity.

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
        self.stored = TrajectoryStore(capacity)
        self.max_age, self.prioritized, self.exponent, self.correction = max_age, prioritized, exponent, correction
        self.together = together

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        for trajectory in trajectories:
            if trajectory.policy_step is None:
                raise ValueError("Only this run's rollouts enter the buffer: an age is counted from `policy_step`.")
            self.stored.append(trajectory)

    def sample(self, size: int, update: int, gather: Callable[[Sequence[float]], torch.Tensor]) -> Sample | None:
        """Draw `size` trajectories, or None on every process alike if any of them holds fewer.

        Args:
            size: rows that each process needs.
            update: number of the update that is about to be made.
            gather: gives the numbers of all processes, `(P, n)`, for this one's n. Called once.
        """
        stored = self.stored
        while self.max_age is not None and stored and update - stored.policy_step(stored.first) > self.max_age:
            stored.popleft()

        drawn, weights = self._draw_prioritized(size, gather) if self.prioritized else self._draw(size, gather)
        if not drawn:
            return None
        rows = {number: stored[number] for number in set(drawn)}
        ages = [update - stored.policy_step(number) for number in drawn]
        return Sample(drawn, [rows[number] for number in drawn], weights, ages)

    def _draw(self, size: int, gather: Callable) -> tuple[list[int], list[float]]:
        if gather([len(self)]).min() < size:
            return [], []
        source = random.Random(int(torch.randint(2**62, ())))
        blocks = source.sample(range(len(self) // self.together), size // self.together)
        first = self.stored.first
        return [first + block * self.together + i for block in blocks for i in range(self.together)], [1.0] * size

    def _draw_prioritized(self, size: int, gather: Callable) -> tuple[list[int], list[float]]:
        priority = torch.from_numpy(self.stored.column("priority")).double()  # (N,) NaN where not replayed yet
        known = priority[~priority.isnan()]
        highest, lowest = (known.max().item(), known.min().item()) if len(known) else (0.0, float("inf"))
        powers = self._power(known).sum().item()
        shards = gather([len(self), len(known), powers, highest, lowest]).double()  # (P, 5)
        fills, replayed, powers_by_shard, highests, lowests = shards.unbind(dim=1)  # (P,) each
        if fills.min() < size:
            return [], []

        top = highests.max().item() if replayed.sum() else 1.0
        power = self._power(priority.nan_to_num(nan=top))  # (N,)
        drawn = torch.multinomial(power / power.sum(), size, replacement=True)  # (size,)
        everywhere = powers_by_shard + (fills - replayed) * self._power(torch.tensor(top))  # (P,) sums of powers
        expected = fills.sum() / len(fills) * power[drawn] / power.sum()  # (size,) N P(i): each process draws one Pth
        least = fills.sum() / len(fills) * self._power(lowests.clamp(max=top)) / everywhere  # (P,)
        return (drawn + self.stored.first).tolist(), (expected / least.min()).pow(-self.correction).tolist()

    def _power(self, priority: torch.Tensor) -> torch.Tensor:
        return (priority.double() + LEAST_PRIORITY).pow(self.exponent)
