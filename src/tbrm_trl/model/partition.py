"""What this process holds of a parameter that is divided among processes."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shard(parameter: Tensor) -> Tensor:
    """This process's shard of a parameter under FSDP2, or else all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter: its partition under ZeRO-3, its shard under FSDP2, or else all of it.

    ZeRO-3 pads partitions to equal sizes with memory that it does not set. The padding is left out here.
    """
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return local_shard(parameter)
    size = partition.ds_numel
    begin = size * torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    return partition[: max(0, min(size, parameter.ds_numel - begin))]  # type: ignore[attr-defined]
