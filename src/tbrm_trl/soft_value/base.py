"""What every estimator of the soft value answers to: one subclass of `SoftValue` is one published method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..trajectory import Trajectory

if TYPE_CHECKING:
    from ..config import TBRMConfig
    from ..trainer import TBRMTrainer


@dataclass
class Rows:
    """Trajectories as an estimator sees them inside the loss. A `(B,)` tensor each, float32 or wider.

    The rows are those of a micro-batch. Where the estimator reads the ratios of whole groups, they hold whole groups.

    Attributes:
        policy_value: V_θ(s_1) in nats, with gradient.
        ref_value: V_ref(s_1) in nats.
        log_ratio: `Σ_h m_h log π_θ/π_ref` in nats, with gradient (none with `token_fraction` below 1).
        reward: R(τ) as the residual takes it, in reward units; NaN where it does not count.
        value: the constant that the estimator gave the trajectory, in reward units; NaN where it gave none.
        group: int64, equal for the trajectories that an estimator with `group = "ratios"` compares; else each its own.
        counted: bool, rows that enter the loss.
        beta: β, in reward units per nat.
    """

    policy_value: Tensor
    ref_value: Tensor
    log_ratio: Tensor
    reward: Tensor
    value: Tensor
    group: Tensor
    counted: Tensor
    beta: float

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several micro-batches as one."""
        names = [field.name for field in fields(cls) if field.name != "beta"]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, beta=parts[0].beta)


class SoftValue:
    """The value term V of the residual `δ = V + log π_θ/π_ref − R/β`.

    A subclass has a `name`, by which `TBRMConfig(soft_value=name)` finds it, and says what V is (`__call__`). Where V
    is a constant of the trajectory, it is given once, in `on_window`, kept in `Trajectory.value`, and travels with it
    through replay and checkpoints. The other hooks do nothing unless overridden.

    Class attributes:
        name: by which the configuration calls it.
        options: those of `TBRMConfig` that only it reads; they are refused beside an estimator without them.
        group: None; "rewards" if it compares the rewards of `num_generations` trajectories of one prompt, which then
            stand whole in a window of one process; "ratios" if it also needs their log-ratios under the current policy,
            and they stand whole in an update too. Its value is then detached, and a group of which one row counts is
            left out.
        gives_constants: V comes from `Trajectory.value`; a trajectory without one is left out of the loss.
        takes_baseline: whether `reward_baseline` has a meaning beside it.
        bootstraps: whether it is a value of states, so that `truncation="bootstrap"` can ask for that of the last.
    """

    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str | None] = None
    gives_constants: ClassVar[bool] = False
    takes_baseline: ClassVar[bool] = False
    bootstraps: ClassVar[bool] = False

    registry: ClassVar[dict[str, type[SoftValue]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            SoftValue.registry[cls.name] = cls

    def __init__(self, args: TBRMConfig):
        self.args = args

    @classmethod
    def check(cls, args: TBRMConfig) -> None:
        """Refuse, with a ValueError that says what to change, options that this estimator cannot work with."""

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        """The same for the training set, before any model is loaded. `logged`: `(N,)` bool, rows with a completion."""

    def attach(self, trainer: TBRMTrainer) -> None:
        """Called at the end of the trainer's construction, on every process."""

    def prepare(self, trainer: TBRMTrainer) -> None:
        """Called at the beginning of `train`, on every process, before the model is wrapped and a row is drawn."""

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        """Called for each generation window of this process, once rewards and reference scores are there.

        Args:
            trajectories: the window's.
            rows: of the data set, one for each trajectory.
            group_size: trajectories of a group, which stand together.
        """

    def __call__(self, rows: Rows) -> Tensor:
        """V in nats, `(B,)`. What is not to carry gradient is detached here."""
        raise NotImplementedError


class ConstantValue(SoftValue):
    """A constant of the trajectory, given in `on_window` in reward units."""

    gives_constants = True

    def __call__(self, rows: Rows) -> Tensor:
        return rows.value / rows.beta
