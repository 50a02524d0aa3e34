"""Collation and micro-batches, written out."""

from __future__ import annotations

import math

import pytest
import torch

from tbrm_trl.batch import MicrobatchSize, collate
from tbrm_trl.trajectory import End, Trajectory


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
    for positions, width in ((5, 5), (3, 3), (2, 3), (9, 8)):  # never less than the row
        batch = collate([trajectory([1, 2], [3])], pad_token_id=0, pad_to_multiple_of=8, positions=positions)
        assert batch.input_ids.shape == (1, width)


def lengths_of(batches):
    return [[len(row) for row in batch] for batch in batches]


def rows_of(*lengths):
    return ["x" * length for length in lengths]


def test_microbatches_of_so_many_rows():
    assert lengths_of(MicrobatchSize(2).split(rows_of(7, 2, 5, 3, 2))) == [[7, 5], [3, 2], [2]]
    in_pairs = MicrobatchSize(4).split(rows_of(1, 8, 5, 5, 7, 2), group_size=2)  # the pairs' longest: 8, 5, 7
    assert lengths_of(in_pairs) == [[1, 8, 7, 2], [5, 5]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MicrobatchSize(1, tokens=12), [[7], [5, 3], [2, 2]]),  # 7 rows of 2 would be 14
        (MicrobatchSize(1, tokens=12, packed=True), [[7, 5], [3, 2, 2]]),
        (MicrobatchSize(1, tokens=12, multiple=4), [[7], [5], [3, 2, 2]]),  # 5 is as wide as 8
        (MicrobatchSize(1, tokens=6), [[7], [5], [3, 2], [2]]),  # a row above the budget is alone
        (MicrobatchSize(1, tokens=1), [[7], [5], [3], [2], [2]]),
    ],
)
def test_microbatches_of_so_many_tokens(size, expected):
    assert lengths_of(size.split(rows_of(7, 2, 5, 3, 2))) == expected


def test_microbatches_are_spread_over_as_many_as_others_have():
    size, rows = MicrobatchSize(1, tokens=30), rows_of(3, 3, 3, 2, 2, 2)
    batches = size.split(rows)
    assert lengths_of(batches) == [[3, 3, 3, 2, 2, 2]]
    assert lengths_of(size.spread(batches, 2)) == [[3, 3, 3], [2, 2, 2]]
    assert lengths_of(size.spread(batches, 6)) == [[3], [3], [3], [2], [2], [2]]
    assert lengths_of(size.spread(batches, 3, group_size=2)) == [[3, 3], [3, 2], [2, 2]]
    assert not size.keeps_whole(rows_of(9, 9, 9, 9), group_size=4) and size.keeps_whole(
        rows_of(9, 9, 2, 2), group_size=2
    )
