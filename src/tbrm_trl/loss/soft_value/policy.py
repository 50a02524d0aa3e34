"""TBRM: the policy's own soft value."""

from torch import Tensor

from .base import SoftValue, ValueInputs


class PolicyValue(SoftValue):
    """`V_θ(s_1)`, with gradient (TBRM, arXiv 2505.15311, Eq. 4). Target: π*, `β V_θ(s_1) = β log E_ref exp(R/β)`."""

    name = "policy"
    takes_baseline = bootstraps = True

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.policy_value
