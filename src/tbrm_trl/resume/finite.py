"""Find the tensors that hold NaN or infinity, reading each once."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.partition import local_part, local_shard


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity. Integer tensors are skipped."""
    names, flags = [], []
    for name, tensor in tensors:
        local = local_shard(tensor)
        if local.is_floating_point() and local.numel():
            names.append(name)
            # Extremes, since a sum of finite numbers may overflow. `aminmax` is not defined for numbers of 8 bits.
            low, high = torch.aminmax(local.detach() if local.itemsize > 1 else local.detach().float())
            flags.append(torch.isfinite(low) & torch.isfinite(high))
    by_device: dict[torch.device, list[int]] = {}
    for place, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(place)
    found = {
        place
        for places in by_device.values()  # one wait for the device
        for place, finite in zip(places, torch.stack([flags[p] for p in places]).tolist(), strict=True)
        if not finite
    }
    return [name for place, name in enumerate(names) if place in found]


def tensors_of_model(model: nn.Module, title: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what this process holds of a model's parameters."""
    for name, parameter in model.named_parameters():
        yield f"{title} {name}", local_part(parameter)


def tensors_of_optimizer(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what this process holds of an optimizer's state."""
    for place, state in enumerate(getattr(optimizer, "state", {}).values()):
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor):
                yield f"optimizer state {name} of parameter {place}", value
