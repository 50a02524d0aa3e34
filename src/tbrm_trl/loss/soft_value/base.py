"""The interface of soft value estimators. Each subclass of `SoftValue` is one published method."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ...options import TBRMOptions, refuse
from ...trajectory import Trajectory
from .run import Run


@dataclass
class ValueInputs:
    """What an estimator reads of B trajectories in the loss. Each tensor is `(B,)` unless its shape is given.

    The trajectories are those of a micro-batch. An estimator that compares ratios gets whole groups.

    Attributes:
        policy_value: V_θ(s_1) in nats, with gradient.
        ref_value: V_ref(s_1) in nats.
        hidden: `(B, H)` the policy's last hidden state in s_1, without gradient.
        log_ratio: `Σ_h m_h log π_θ/π_ref` in nats, with gradient (none with `token_fraction` below 1). With
            `length_normalized` it is divided by the number of actions.
        reward: R(τ) as used in the residual, in reward units; NaN where it does not count.
        value: the constant that the estimator gave the trajectory, in reward units; NaN where it gave none.
        group: int64, equal for the trajectories that an estimator with `compares = "ratios"` compares.
        counted: bool, trajectories that enter the loss.
        beta: β, in reward units per nat.
    """

    policy_value: Tensor
    ref_value: Tensor
    hidden: Tensor  # (B, H)
    log_ratio: Tensor
    reward: Tensor
    value: Tensor
    group: Tensor
    counted: Tensor
    beta: float

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The trajectories of several micro-batches as one."""
        names = [field.name for field in fields(cls) if field.name != "beta"]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, beta=parts[0].beta)


class SoftValue:
    """The value term V of the residual `δ = V + log π_θ/π_ref − R/β`.

    A subclass has a `name`, which `TBRMConfig(soft_value=name)` selects, and computes V in `__call__`. If V is a
    constant of the trajectory, `on_window` sets it once. It is kept in `Trajectory.value` and stays with the trajectory
    through replay and checkpoints. The other hooks do nothing unless overridden.

    Class attributes:
        name: its name in the configuration.
        options: options of `TBRMConfig` that it reads. They are refused with an estimator that does not list them.
        compares: None if trajectories are independent. "rewards" if it compares the rewards of the `num_generations`
            trajectories of a prompt, which are then in one window of one process. "ratios" if it also needs their
            log-ratios under the current policy; they are then in one update, too. A compared value is detached, and a
            group in which only one trajectory counts is left out.
        gives_constants: whether V comes from `Trajectory.value`. A trajectory without one is left out of the loss.
        takes_baseline: whether `reward_baseline` may be used with it.
        bootstraps: whether it gives a value for any state, so that `truncation="bootstrap"` can use the last state's.
        column: the column of the training set that it reads, if any. Reward functions do not get it.
    """

    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    compares: ClassVar[str | None] = None
    gives_constants: ClassVar[bool] = False
    takes_baseline: ClassVar[bool] = False
    bootstraps: ClassVar[bool] = False
    column: ClassVar[str | None] = None

    registry: ClassVar[dict[str, type["SoftValue"]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            SoftValue.registry[cls.name] = cls

    def __init__(self, args: TBRMOptions):
        self.args = args

    @classmethod
    def check(cls, args: TBRMOptions) -> None:
        """Refuse options that this estimator cannot work with, by a ValueError that says what to change."""
        refuse(cls._problems(args))

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        """The problems for which `check` refuses the options, one message each."""
        yield from ()

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        """Refuse an unsuitable training set before a model is loaded. `logged`: `(N,)` bool, rows with a completion."""

    def attach(self, run: Run) -> None:
        """Called at the end of the trainer's construction, on every process."""

    def prepare(self, run: Run) -> None:
        """Called when `train` begins, on every process, before the model is wrapped and any row is drawn."""

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        """Called for each generation window of this process, once rewards and reference scores are there.

        It is called equally often on every process, so processes may exchange data in it.

        Args:
            trajectories: the window's trajectories.
            rows: the data set's rows, one for each trajectory.
            group_size: number of adjacent trajectories of a prompt.
        """

    def on_update(self, trajectories: Sequence[Trajectory]) -> None:
        """Called before the loss of each update, with its trajectories on this process, replayed ones included.

        A constant that has changed since a trajectory's window is renewed here.
        """

    def after_update(self, metrics: Mapping[str, float], residuals: Iterable[tuple[Trajectory, float]]) -> None:
        """Called after each update that was taken. If it is not overridden, nothing is read from the device for it.

        Args:
            metrics: metrics of the update, over all processes (`docs/metrics.md`).
            residuals: the trajectories of this process that counted, each with its β δ.
        """

    def state(self) -> Any:
        """What a checkpoint must hold besides trained modules, as JSON-able values. Each process saves its own."""

    def restore(self, state: Any) -> None:
        """Continue from what `state` returned."""

    def __call__(self, inputs: ValueInputs) -> Tensor:
        """V in nats, `(B,)`. Whatever must not carry gradient is detached here."""
        raise NotImplementedError


class ConstantValue(SoftValue):
    """A constant of the trajectory, set in `on_window` in reward units."""

    gives_constants = True

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.value / inputs.beta
