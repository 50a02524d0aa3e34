"""No value term."""

from torch import Tensor

from .base import SoftValue, ValueInputs


class ZeroValue(SoftValue):
    """0: right only if rewards are centred so that `E_ref exp(R/β) = 1`. Otherwise the target depends on the data."""

    name = "zero"
    takes_baseline = True

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.policy_value.new_zeros(inputs.policy_value.shape)
