"""A loss that does not reach the weights unless the whole update is finite."""

from typing import Any

import torch
from torch import Tensor


class _VoidedUnless(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, is_finite: Tensor) -> Tensor:
        ctx.save_for_backward(is_finite)
        return torch.where(is_finite, loss, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (is_finite,) = ctx.saved_tensors
        return torch.where(is_finite, gradients[0], torch.nan), None


def voided_unless(is_finite: Tensor, loss: Tensor) -> Tensor:
    """The loss, with its gradient, if `is_finite`. Otherwise 0 with a gradient of NaN.

    A NaN gradient has a NaN norm however the model is sharded, and an optimizer that skips it skips the whole update.
    The choice is made on the device, so that the host does not wait for it between a forward and its backward.

    Args:
        is_finite: bool scalar, the same on every process.
        loss: scalar.
    """
    voided: Tensor = _VoidedUnless.apply(loss, is_finite)
    return voided
