"""ReVal: the policy's soft value minus the reference's."""

from torch import Tensor

from .base import SoftValue, ValueInputs


class CalibratedValue(SoftValue):
    """`V_θ(s_1) − V_ref(s_1)`, with gradient (ReVal, arXiv 2603.23355).

    It is 0 before training up to rounding, and so is the residual of a trajectory with R = 0.
    """

    name = "calibrated"
    takes_baseline = bootstraps = True

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.policy_value - inputs.ref_value
