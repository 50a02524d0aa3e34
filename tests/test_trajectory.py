"""Collation, written out."""

from __future__ import annotations

import math

import pytest
import torch

from tbrm_trl.trajectory import End, Trajectory, by_length, collate


def trajectory(prompt: list[int], completion: list[int], mask: list[int] | None = None, **fields) -> Trajectory:
    return Trajectory(
        prompt_ids=torch.tensor(prompt, dtype=torch.long),
        completion_ids=torch.tensor(completion, dtype=torch.long),
        loss_mask=torch.tensor(mask or [1] * len(completion), dtype=torch.bool),
        reward=fields.pop("reward", 1.0),
        end=End.EOS,
        **fields,
    )


def test_collate_by_hand():
    """Padded on the right to the longest trajectory (4), not to longest prompt plus longest completion (5)."""
    batch = collate(
        [
            trajectory([5, 6, 7], [8], ref_log_probs=torch.tensor([-1.5]), ref_soft_value=2.0),
            trajectory([5], [9, 1], [0, 1], reward=math.nan),
        ],
        pad_token_id=0,
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 1, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.action_mask.tolist() == [[False, False, False, True], [False, False, True, False]]
    assert batch.ref_log_probs[0].tolist() == [0, 0, 0, -1.5]
    assert batch.ref_log_probs[1].isnan().tolist() == [False, True, True, False]
    assert batch.ref_soft_value[0] == 2 and batch.ref_soft_value[1].isnan()
    assert batch.pad_fraction == 1 / 8


def test_pad_to_multiple():
    assert collate([trajectory([1, 2], [3])], pad_token_id=0, pad_to_multiple_of=8).input_ids.shape == (1, 8)


def test_chunks_by_length():
    lengths = [7, 2, 5, 3, 2]
    chunks = list(by_length([trajectory([1] * n, [2]) for n in lengths], 2))
    assert [[len(t) for t in chunk] for chunk in chunks] == [[3, 3], [4, 6], [8]]


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="at least one prompt token"):
        trajectory([], [1])
    with pytest.raises(ValueError, match="loss_mask has 2 entries for 1"):
        trajectory([1], [1], [1, 1])
