"""What is subtracted from R: the mean reward of a prompt's group or of a window, or a number."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from ..trajectory import Trajectory


class Baselines:
    """The latest windows' baselines. A prompt's trajectories have equal ones whenever they are trained on.

    V learns `V* − b/β`. Trajectories of one prompt with different b would therefore pull it to different values.

    Args:
        kind: "none", "batch_mean" over the window of all processes, "group_mean", or a number.
        rewards_that_count: returns R(τ) of those trajectories that can enter the loss.
        remembered: number of prompts whose group means are kept, the latest ones; 0 if nothing is replayed.
    """

    def __init__(
        self, kind: str | float, rewards_that_count: Callable[[Sequence[Trajectory]], list[float]], remembered: int = 0
    ):
        self.kind, self.rewards_that_count, self.remembered = kind, rewards_that_count, remembered
        self.clear()

    def clear(self) -> None:
        self._was_another = False  # whether the run was resumed with another kind
        self._of_window: float | None = None
        self._of_prompts: dict[str, float] = {}  # ordered by their last groups, oldest first

    def set(
        self,
        window: Sequence[Trajectory],
        group_size: int,
        gather: Callable[[Sequence[float]], Tensor],
        learn: bool,
    ) -> None:
        """Set the baseline of each trajectory of a window: what is subtracted from its reward.

        Args:
            window: this process's trajectories. Those of a group are adjacent.
            group_size: number of trajectories in a group.
            gather: takes n numbers of this process and returns those of all processes, `(P, n)`.
            learn: whether the window is trained on. If so, the means are kept for trajectories that are replayed later.
                If not, it is an evaluation's batch, and its "batch_mean" is that of the latest window trained on, which
                V follows; before the first one it is the batch's own.
        """
        follows = self.kind == "batch_mean" and not learn and self._of_window is not None
        if isinstance(self.kind, float) or self.kind == "none" or follows:
            self.renew(window)
        elif self.kind == "batch_mean":
            given = self.rewards_that_count(window)
            total, count = gather([sum(given), len(given)]).sum(dim=0).tolist()
            for trajectory in window:
                trajectory.baseline = total / count if count > 1 else math.nan  # alone it would be its own baseline
            if learn and count:
                self._of_window = total / count
        elif self.kind == "group_mean":
            # A prompt may have several groups in a window, such as rollouts and logged ones. An evaluation keeps groups
            # apart, since some only fill up its last batch.
            of = [t.prompt_key if learn else str(at // group_size) for at, t in enumerate(window)]
            counted = [(key, self.rewards_that_count([t])) for key, t in zip(of, window, strict=True)]
            rewards: dict[str, list[float]] = {}
            for key, own in gather_object(counted) if learn else counted:
                rewards.setdefault(key, []).extend(own)
            means = {key: sum(some) / len(some) for key, some in rewards.items() if len(some) > 1}
            for key, trajectory in zip(of, window, strict=True):
                trajectory.baseline = means.get(key, math.nan)  # alone it would be its own baseline
            if learn and self.remembered:
                for prompt, mean in means.items():
                    self._of_prompts.pop(prompt, None)
                    self._of_prompts[prompt] = mean
                for prompt in list(self._of_prompts)[: -self.remembered]:
                    del self._of_prompts[prompt]

    def renew(self, replayed: Sequence[Trajectory]) -> None:
        """Give replayed trajectories the number, or the latest mean: of the window, or of their prompt's last groups.

        If the run was resumed without a baseline, those that were given one before lose it.
        """
        for trajectory in replayed:
            if isinstance(self.kind, float):
                trajectory.baseline = self.kind
            elif self.kind == "none" and self._was_another:
                trajectory.baseline = 0.0
            elif self.kind == "batch_mean" and self._of_window is not None:
                trajectory.baseline = self._of_window
            elif self.kind == "group_mean":
                trajectory.baseline = self._of_prompts.get(trajectory.prompt_key, trajectory.baseline)

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"kind": self.kind, "window": self._of_window, "prompts": self._of_prompts, "other": self._was_another}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._of_window, self._of_prompts = state["window"], dict(state["prompts"])
        earlier = state.get("kind", self.kind)  # checkpoints from before it was kept
        self._was_another = state.get("other", False) or earlier != self.kind
