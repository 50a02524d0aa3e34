"""The part of a model that a process holds, and the whole model."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def whole(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Copies of all parameters in full, however they are sharded."""
    parameters = list(parameters)
    if any(hasattr(parameter, "ds_id") for _, parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter for _, parameter in parameters]):
            return {name: parameter.detach().clone() for name, parameter in parameters}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in parameters}


def held_here(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part: ZeRO-3's partition, FSDP2's shard, else all of it."""
    return getattr(tensor, "ds_tensor", tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def unwrapped(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients by the parameters' names without DDP's prefix."""
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
