"""What this process holds of a divided parameter, without the padding of ZeRO-3's partitions."""

import pytest
import torch

from tbrm_trl.model.partition import local_part
from tbrm_trl.resume.finite import not_finite, tensors_of_model


@pytest.mark.parametrize("rank", range(3))
def test_padding_is_left_out(rank, monkeypatch):
    """Four numbers over three processes are partitions of two. The last one has none of them."""
    module = torch.nn.Linear(2, 2, bias=False)
    weight, group = module.weight, object()
    whole = torch.cat([weight.detach().flatten(), torch.full((2,), torch.nan)])
    weight.ds_tensor = whole[2 * rank : 2 * rank + 2].clone()
    weight.ds_tensor.ds_numel, weight.ds_numel, weight.ds_process_group = 2, 4, group
    monkeypatch.setattr(torch.distributed, "get_rank", lambda asked: rank if asked is group else None)
    assert local_part(weight).tolist() == weight.detach().flatten()[2 * rank : 2 * rank + 2].tolist()
    assert not_finite(tensors_of_model(module, "weight")) == []
