"""What a trajectory must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tbrm_trl.trajectory import End, Trajectory


def test_prompts_with_other_images_are_others():
    """Values of prompts are kept by this key. What the images say of the completion's tokens is not of the prompt."""

    def key(prompt: list[int], **vision: torch.Tensor) -> str:
        return Trajectory(
            torch.tensor(prompt), torch.tensor([1]), torch.ones(1).bool(), 1.0, End.EOS, vision=vision
        ).prompt_key

    white, black = torch.ones(1, 3, 2, 2).bfloat16(), torch.zeros(1, 3, 2, 2).bfloat16()
    keys = [key([5]), key([6]), key([5], pixel_values=white), key([5], pixel_values=black)]
    assert len({*keys}) == 4
    assert key([5], pixel_values=white.clone(), token_type_ids=torch.tensor([0, 1])) == keys[2]

    # Two tiles, with a channel of zeros, and padded to four.
    tiles, mask = torch.tensor([1.0, 0.0, 2.0])[:, None, None].expand(1, 2, 3, 4, 4), torch.ones(1, 2, 4, 4).bool()
    padded = dict(pixel_values=F.pad(tiles, (0,) * 7 + (2,)), pixel_attention_mask=F.pad(mask, (0,) * 5 + (2,)))
    assert padded["pixel_values"].shape == (1, 4, 3, 4, 4) and padded["pixel_attention_mask"].shape == (1, 4, 4, 4)
    assert key([5], **padded) == key([5], pixel_values=tiles, pixel_attention_mask=mask)
    assert key([5], pixel_values=tiles.flip(2), pixel_attention_mask=mask) != key([5], **padded)


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="at least one prompt token"):
        Trajectory(torch.tensor([]), torch.tensor([1]), torch.ones(1).bool(), 1.0, End.EOS)
    with pytest.raises(ValueError, match="loss_mask has 2 entries for 1"):
        Trajectory(torch.tensor([1]), torch.tensor([1]), torch.ones(2).bool(), 1.0, End.EOS)
