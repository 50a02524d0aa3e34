"""The replay buffer: this process's share of past trajectories. The oldest are evicted first, by age or for space."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..trajectory import Trajectory
from .store import TrajectoryStore

# Added to |residual|, in reward units, so that a perfectly fitted trajectory is still drawn now and then.
LEAST_PRIORITY = 1e-6
BLOCK = 1024  # rows over which a prioritized draw keeps one sum


@dataclass(frozen=True)
class ReplaySample:
    """Trajectories drawn for one update.

    Attributes:
        numbers: each trajectory's number in the buffer. Prioritized sampling may draw one twice.
        trajectories: the trajectories.
        weights: factor on each squared residual; 1 with uniform sampling.
        ages: updates since each was generated.
    """

    numbers: list[int]
    trajectories: list[Trajectory]
    weights: list[float]
    ages: list[int]


class ReplayBuffer:
    """One process's shard of the buffer.

    Uniform sampling draws without replacement. Prioritized sampling (Schaul et al. 2016, arXiv 1511.05952, Section 3.3)
    draws trajectory i with probability `P(i) ∝ (|β δ_i| + 1e-6)^exponent`, with replacement. It weighs the squared
    residual by `(N P(i))^-correction`, divided by the largest such weight in the buffer. N and the largest weight are
    those of all processes; P(i) is the probability on the process that holds the trajectory. A trajectory that was not
    replayed yet has the largest priority of all processes. TBRM's minimiser is the same for every distribution with
    coverage, so the correction chooses an emphasis; the target is valid without it. The time of a uniform draw does not
    depend on the buffer's size. A prioritized draw reads one number per 1,024 trajectories and the blocks that it draws
    from.

    Args:
        capacity: largest number of trajectories in this shard. When it is reached, the oldest is dropped for a new one.
        max_age: updates after which a trajectory is dropped; None keeps it until room is needed.
        prioritized: draw by |residual| instead of uniformly.
        exponent: 0 is uniform, 1 fully prioritized.
        correction: 0 leaves the draws' distribution as it is, 1 undoes it.
        group_size: trajectories of one prompt that are added and drawn together; 1 if there are no groups.
    """

    def __init__(
        self,
        capacity: int,
        max_age: int | None = None,
        prioritized: bool = False,
        exponent: float = 0.6,
        correction: float = 0.4,
        group_size: int = 1,
    ):
        self.stored = TrajectoryStore(capacity)
        self._priorities = _Priorities(self.stored, exponent)
        self.max_age, self.prioritized, self.exponent, self.correction = max_age, prioritized, exponent, correction
        self.group_size = group_size

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        for trajectory in trajectories:
            if trajectory.policy_step is None:
                raise ValueError("Only this run's rollouts enter the buffer: an age is counted from `policy_step`.")
            self._priorities.changed(self.stored.append(trajectory))

    def set_priority(self, number: int, priority: float) -> None:
        """Keep |β δ| of a trajectory that was just replayed."""
        self.stored.set_priority(number, priority)
        self._priorities.changed(number)

    def drop(self, trajectories: Iterable[Trajectory]) -> None:
        """Remove trajectories together with their groups. The time grows with the buffer."""
        first, size = self.stored.first, self.group_size
        groups = {(number - first) // size for one in trajectories for number in self.stored.find(one)}
        if groups:
            self.stored.remove({first + group * size + i for group in groups for i in range(size)})
            self._priorities = _Priorities(self.stored, self.exponent)

    def clear(self) -> None:
        self.stored.clear()
        self._priorities = _Priorities(self.stored, self.exponent)

    def restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue from what `stored.state` returned."""
        self.stored.restore(state, arrays)
        self._priorities = _Priorities(self.stored, self.exponent)

    def sample(self, size: int, update: int, gather: Callable[[Sequence[float]], torch.Tensor]) -> ReplaySample | None:
        """Draw `size` trajectories; return None on every process if any process holds fewer.

        Args:
            size: number of rows that each process needs.
            update: number of the update that is about to be made.
            gather: takes n numbers of this process and returns those of all processes, `(P, n)`. Called once.
        """
        stored = self.stored
        while self.max_age is not None and stored and update - stored.policy_step(stored.first) > self.max_age:
            self._priorities.changed(stored.popleft())

        drawn, weights = self._draw_prioritized(size, gather) if self.prioritized else self._draw(size, gather)
        if not drawn:
            return None
        rows = {number: stored[number] for number in set(drawn)}
        ages = [max(update - stored.policy_step(number), 0) for number in drawn]
        return ReplaySample(drawn, [rows[number] for number in drawn], weights, ages)

    def _draw(self, size: int, gather: Callable) -> tuple[list[int], list[float]]:
        if gather([len(self)]).min() < size:
            return [], []
        source = random.Random(int(torch.randint(2**62, ())))
        blocks = source.sample(range(len(self) // self.group_size), size // self.group_size)
        first = self.stored.first
        return [first + block * self.group_size + i for block in blocks for i in range(self.group_size)], [1.0] * size

    def _draw_prioritized(self, size: int, gather: Callable) -> tuple[list[int], list[float]]:
        own = self._priorities
        own.update()
        shards = gather([len(self), own.replayed.sum(), own.power.sum(), own.highest.max(), own.lowest.min()])
        fills, replayed, powers, highests, lowests = shards.double().numpy().T  # (P,) each
        if fills.min() < size:
            return [], []
        top = highests.max() if replayed.sum() else 1.0
        drawn, power, total = own.draw(size, top)
        everywhere = powers + (fills - replayed) * own.power_of(top)  # (P,) sums of powers
        expected = fills.sum() / len(fills) * power / total  # (size,) N P(i): each process draws 1/P of the rows
        least = (fills.sum() / len(fills) * own.power_of(np.minimum(lowests, top)) / everywhere).min()
        return drawn, ((expected / least) ** -self.correction).tolist()


class _Priorities:
    """Sums and extremes of priorities, kept for each block of positions in a store's ring.

    A draw reads the blocks that changed and the blocks that it draws from. Its cost grows with the size of the draw,
    plus one number per block.

    Attributes:
        power: per block, the sum of powers of the rows that were replayed.
        replayed, live: per block, how many rows were replayed, and how many there are.
        highest, lowest: per block, the extremes of the known priorities; 0 and inf if none is known.
    """

    def __init__(self, stored: TrajectoryStore, exponent: float):
        self.stored, self.exponent = stored, exponent
        blocks = -(-stored.capacity // BLOCK)
        self.power, self.highest = np.zeros(blocks), np.zeros(blocks)  # (blocks,)
        self.lowest = np.full(blocks, np.inf)  # (blocks,)
        self.replayed, self.live = np.zeros(blocks, int), np.zeros(blocks, int)  # (blocks,)
        self._changed = set(range(blocks))

    def changed(self, number: int) -> None:
        self._changed.add(number % self.stored.capacity // BLOCK)

    def update(self) -> None:
        for block in self._changed:
            priority = self._of(block)[1]
            known = priority[~np.isnan(priority)]
            self.live[block], self.replayed[block] = len(priority), len(known)
            self.power[block] = self.power_of(known).sum()
            self.highest[block], self.lowest[block] = known.max(initial=0.0), known.min(initial=np.inf)
        self._changed.clear()

    def draw(self, size: int, top: float) -> tuple[list[int], np.ndarray, float]:
        """Numbers of drawn rows, `(size,)` their powers, and the sum over all rows. New rows have priority `top`."""
        mass = self.power + (self.live - self.replayed) * self.power_of(top)  # (blocks,)
        counts = torch.from_numpy(mass).multinomial(size, replacement=True).bincount(minlength=len(mass))
        drawn: list[int] = []
        powers = []
        for block in counts.nonzero().flatten().tolist():
            numbers, priority = self._of(block)
            power = self.power_of(np.where(np.isnan(priority), top, priority))  # (n,)
            chosen = torch.from_numpy(power).multinomial(int(counts[block]), replacement=True).numpy()
            drawn += numbers[chosen].tolist()
            powers.append(power[chosen])
        return drawn, np.concatenate(powers), float(mass.sum())

    def _of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and priorities of a block's rows."""
        first, capacity = self.stored.first, self.stored.capacity
        places = np.arange(block * BLOCK, min((block + 1) * BLOCK, capacity))
        numbers = first + (places - first) % capacity
        numbers = numbers[numbers < self.stored.end]
        return numbers, self.stored.priorities(numbers)

    def power_of(self, priority: Any) -> Any:
        return (priority + LEAST_PRIORITY) ** self.exponent
