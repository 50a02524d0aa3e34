"""SPO: a running mean of each prompt's rewards, discounted as the policy moves."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from accelerate.utils import gather_object

from ...options import TBRMOptions
from ...trajectory import Source, Trajectory
from .base import ConstantValue
from .run import Run

LEAST_KEPT = 0.875  # of a prompt's counts from one window to the next, however far the policy has moved; as published
EVERY_PROMPT = ""


class TrackedValue(ConstantValue):
    """`V = s/(nβ)`, n and s the number and sum of a prompt's rewards, both discounted by `ρ = 2^(−D/D½)` (SPO,
    arXiv 2509.13232).

    With rewards 0 and 1, s and n − s are SPO's Beta counts. D is the KL moved since the prompt's last window, in nats
    per token. It is measured by the distance from the reference, `d = √(2 KL(π‖π_ref))`: `D = (d − d_last)²/2`, the
    least KL that the two distances allow. The distance is known after updates on fresh rollouts; where there are none
    (logs, rollouts of an earlier policy), counts are multiplied by `soft_value_kept` alone. A window's own rewards are
    counted when the next one begins, so the value of a fresh trajectory does not contain its reward. A new prompt
    starts from the mean of all prompts, which counts as one reward. That mean itself begins with one reward of 0.

    With `soft_value_tracks="value"` s is the sum of `R − β log-ratio` over the trajectories of all updates. Each term
    is a trajectory's estimate of β V. With V free, their mean is the β V that minimises the prompt's squared
    residuals.
    """

    name = "tracked"
    options: ClassVar = frozenset({"soft_value_half_life", "soft_value_kept", "soft_value_tracks"})

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        if not args.soft_value_half_life > 0:
            yield f"`soft_value_half_life={args.soft_value_half_life}` must be positive: it divides the KL moved."
        if not 0 <= args.soft_value_kept <= 1:
            yield f"`soft_value_kept={args.soft_value_kept}` must lie between 0 and 1: it is a share of counts."
        if args.reference == "previous" or args.sync_ref_model:
            yield (
                '`soft_value="tracked"` measures how far the policy has moved by its distance from one fixed '
                'reference. Use `reference="initial"` without `sync_ref_model`.'
            )

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        only_logs = len(logged) and logged.all()
        if only_logs and not self.args.is_default("soft_value_half_life"):
            raise ValueError(
                f"`soft_value_half_life={self.args.soft_value_half_life}` has no effect: how far the policy has moved "
                "is measured on its own rollouts, and the training set has logged rows alone. Leave it at its default; "
                "`soft_value_kept` applies."
            )
        if only_logs and self.args.soft_value_tracks == "reward":
            raise ValueError(
                '`soft_value="tracked"` tracks what the policy\'s own rollouts earn, and the training set has logged '
                'rows alone. What others earned is no value of this policy. Set `soft_value_tracks="value"`, which is '
                "right for any data, or add prompts without a completion."
            )

    def attach(self, run: Run) -> None:
        self.run = run
        self.prepare(run)

    def prepare(self, run: Run) -> None:
        self.counts: dict[str, tuple[float, float, float]] = {}  # by prompt: n, s, and d at its last window
        self.earned: list[tuple[str, float]] = []  # on this process in this window: prompt, and the tracked number
        self.distance = 0.0  # d of the last update

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        if not self.run.evaluating:
            self._count()
            if self.args.soft_value_tracks == "reward":
                own = [t for t in trajectories if t.source is Source.ROLLOUT and self.run.counts(t)]
                self.earned = [(t.prompt_key, self.args.reward_of(t)) for t in own]
        self.on_update(trajectories)

    def on_update(self, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            trajectory.value = self._value(trajectory.prompt_key)

    def after_update(self, metrics: Mapping[str, float], residuals: Iterable[tuple[Trajectory, float]]) -> None:
        if "kl" in metrics:  # it is measured on fresh rollouts
            self.distance = math.sqrt(2 * max(metrics["kl"], 0.0))
        if self.args.soft_value_tracks == "value":  # β V − β δ = R − β log-ratio
            self.earned += [(t.prompt_key, (t.value or 0.0) - residual) for t, residual in residuals]

    def _value(self, prompt: str) -> float:
        number, total, _ = self.counts.get(prompt) or self.counts.get(EVERY_PROMPT) or (1.0, 0.0, 0.0)
        return total / number

    def _count(self) -> None:
        rewards: dict[str, list[float]] = defaultdict(list)
        for prompt, reward in gather_object(self.earned):
            rewards[EVERY_PROMPT].append(reward)  # first, so that a new prompt starts from this mean
            rewards[prompt].append(reward)
        for prompt, given in rewards.items():
            number, total, last = self.counts.get(prompt, (1.0, self._value(prompt), self.distance))
            moved = (self.distance - last) ** 2 / 2
            kept = min(max(2 ** (-moved / self.args.soft_value_half_life), LEAST_KEPT), self.args.soft_value_kept)
            self.counts[prompt] = (kept * number + len(given), kept * total + sum(given), self.distance)
        self.earned = []

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "earned": self.earned, "distance": self.distance}

    def restore(self, state: dict[str, Any]) -> None:
        self.counts = {prompt: tuple(counts) for prompt, counts in state["counts"].items()}
        self.earned = [(prompt, reward) for prompt, reward in state["earned"]]
        self.distance = state["distance"]
