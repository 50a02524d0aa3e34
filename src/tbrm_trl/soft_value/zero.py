"""No value term."""

from torch import Tensor

from .base import Rows, SoftValue


class ZeroValue(SoftValue):
    """0: right only where rewards are centred so that `E_ref exp(R/β) = 1`; else the target depends on the data."""

    name = "zero"
    takes_baseline = True

    def __call__(self, rows: Rows) -> Tensor:
        return rows.policy_value.new_zeros(rows.policy_value.shape)
