"""Reward partitioning: the partition function over the logged completions of a prompt."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ...options import TBRMOptions
from ...trajectory import Trajectory
from .base import ConstantValue
from .run import Run


class PartitionValue(ConstantValue):
    """`V = log Σ_i π_ref(y_i|x) exp(r_i/β)` over the distinct logged completions of the prompt (RPO, arXiv 2506.13702).

    δ = 0 on all of them forces `Σ_i π_θ(y_i|x) = 1`: all mass goes to the logged completions, and the target is π* only
    if the log holds every completion that π_ref can draw. `soft_value_self_normalized` divides the sum by
    `Σ_i π_ref(y_i|x)`. The logged completions then keep the mass that they have under π_ref.
    """

    name = "partition"
    options: ClassVar = frozenset({"soft_value_self_normalized"})

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        if args.reference == "previous" or args.sync_ref_model:
            yield (
                '`soft_value="partition"` sums over the log with one fixed reference. Use `reference="initial"` '
                "without `sync_ref_model`."
            )
        if args.precompute_ref_log_probs is False:
            yield (
                '`soft_value="partition"` needs the reference\'s score of every completion before the first update. '
                "Leave `precompute_ref_log_probs` at None."
            )

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        if not (len(logged) and logged.all()):
            raise ValueError(
                '`soft_value="partition"` sums over the logged completions of each prompt, so every row of the '
                'training set needs a `completion`. For rollouts use "log_mean_exp", "policy" or "calibrated".'
            )
        rewards = dataset["reward"] if "reward" in dataset.column_names else [None]
        for index, reward in enumerate(rewards):
            if reward is None:
                raise ValueError(
                    f'Row {index} of the training set: it has no `reward`, and `soft_value="partition"` needs that of '
                    "every logged completion before training. Add the column."
                )

    def attach(self, run: Run) -> None:
        completions: dict[str, dict[bytes, tuple[float, list[float]]]] = defaultdict(dict)
        for trajectory in run.logged_trajectories():
            if not run.counts(trajectory):
                continue  # a fragment, or a row without an action, is not a completion
            assert trajectory.ref_log_probs is not None, "precomputed, as checked above"
            log_prob = trajectory.ref_log_probs[trajectory.loss_mask].double().sum().item()
            completion = trajectory.completion_ids.numpy().tobytes()
            # A completion that was logged several times is one term of the sum, with its mean reward.
            _, rewards = completions[trajectory.prompt_key].setdefault(completion, (log_prob, []))
            rewards.append(trajectory.reward)
        self.values = {prompt: self._value(list(logged.values())) for prompt, logged in completions.items()}

    def _value(self, completions: list[tuple[float, list[float]]]) -> float:
        """`β log Σ_i π_ref(y_i) exp(r_i/β)`, in reward units."""
        log_probs = torch.tensor([log_prob for log_prob, _ in completions], dtype=torch.float64)  # (n,)
        rewards = torch.tensor([np.mean(rewards) for _, rewards in completions], dtype=torch.float64)  # (n,)
        value = (log_probs + rewards / self.args.beta).logsumexp(dim=0)
        if self.args.soft_value_self_normalized:
            value = value - log_probs.logsumexp(dim=0)
        return self.args.beta * value.item()

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        for trajectory in trajectories:
            trajectory.value = self.values.get(trajectory.prompt_key)
