"""Mean rewards that are subtracted from R: that of a prompt's group, or that of a window."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..batch import chunks
from ..trajectory import Trajectory


def mean_reward(rewards: Sequence[float]) -> float:
    """Mean of the rewards that are not NaN; 0 if there are none."""
    given = [reward for reward in rewards if not math.isnan(reward)]
    return sum(given) / len(given) if given else 0.0


def set_baselines(
    trajectories: Sequence[Trajectory],
    kind: str,
    reward_of: Callable[[Trajectory], float],
    group_size: int,
    gather: Callable[[Sequence[float]], Tensor],
) -> None:
    """Give each trajectory of a window the mean reward that is subtracted from its own.

    Args:
        trajectories: the window of this process. Trajectories of a group follow one another.
        kind: "none", "batch_mean" over the window of all processes, or "group_mean".
        reward_of: gives R(τ), or NaN if nothing scored it.
        group_size: number of trajectories in a group.
        gather: gives the numbers of all processes, `(P, n)`, for this one's n.
    """
    if kind == "batch_mean":
        given = [reward for t in trajectories if not math.isnan(reward := reward_of(t))]
        total, count = gather([sum(given), len(given)]).sum(dim=0).tolist()
        for trajectory in trajectories:
            trajectory.baseline = total / max(count, 1)
    elif kind == "group_mean":
        for group in chunks(trajectories, group_size):
            rewards = [reward_of(trajectory) for trajectory in group]
            alone = sum(not math.isnan(reward) for reward in rewards) < 2  # its own reward would be its baseline
            for trajectory in group:
                trajectory.baseline = math.nan if alone else mean_reward(rewards)
