"""What a trajectory must be."""

from __future__ import annotations

import pytest
import torch

from tbrm_trl.trajectory import End, Trajectory


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="at least one prompt token"):
        Trajectory(torch.tensor([]), torch.tensor([1]), torch.ones(1).bool(), 1.0, End.EOS)
    with pytest.raises(ValueError, match="loss_mask has 2 entries for 1"):
        Trajectory(torch.tensor([1]), torch.tensor([1]), torch.ones(2).bool(), 1.0, End.EOS)
