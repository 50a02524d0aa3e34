"""VarGrad, TBA, REBEL, CoPG and GVPO: the group's own mean makes its residuals sum to zero."""

import torch
from torch import Tensor

from .base import SoftValue, ValueInputs


class GroupValue(SoftValue):
    """Mean over the group of `R/β − log-ratio`, without gradient: the V that minimises the group's squared residuals.

    So the loss is the variance of `log-ratio − R/β` in the group (VarGrad/TBA, arXiv 2503.18929; GVPO, 2504.19599, with
    `1/(n − 1)`), and with two rows a quarter of the squared difference of the pair (REBEL, 2404.16767; CoPG,
    2406.19185). Letting the mean carry gradient would change nothing: it is multiplied by residuals that sum to zero.
    """

    name = "group"
    compares = "ratios"

    @torch.no_grad()
    def __call__(self, inputs: ValueInputs) -> Tensor:
        wanted = torch.where(inputs.counted, inputs.reward / inputs.beta - inputs.log_ratio, 0.0)  # (B,)
        _, member = inputs.group.unique(return_inverse=True)  # (B,)
        sums = wanted.new_zeros(len(member)).index_add(0, member, wanted)
        sizes = wanted.new_zeros(len(member)).index_add(0, member, inputs.counted.to(wanted.dtype))
        return (sums / sizes.clamp(min=1))[member]
