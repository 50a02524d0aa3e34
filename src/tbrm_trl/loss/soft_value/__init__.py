"""The estimators of the soft value: the one term in which the published residual methods differ."""

from .base import ConstantValue, SoftValue, ValueInputs
from .calibrated import CalibratedValue
from .group import GroupValue
from .learned import LearnedValue
from .log_mean_exp import LogMeanExpValue
from .model import ModelValue
from .optimal import OptimalValue
from .partition import PartitionValue
from .policy import PolicyValue
from .quantile import QuantileValue
from .run import Run
from .tracked import TrackedValue
from .zero import ZeroValue

__all__ = [
    "CalibratedValue",
    "ConstantValue",
    "GroupValue",
    "LearnedValue",
    "LogMeanExpValue",
    "ModelValue",
    "OptimalValue",
    "PartitionValue",
    "PolicyValue",
    "QuantileValue",
    "Run",
    "SoftValue",
    "TrackedValue",
    "ValueInputs",
    "ZeroValue",
]
