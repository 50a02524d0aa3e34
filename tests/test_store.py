"""Trajectories in flat arrays: they come out as they went in, within the promised memory."""

from __future__ import annotations

import inspect
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch

from tbrm_trl.sources.store import _SEGMENT, TrajectoryStore
from tbrm_trl.trajectory import End, Trajectory


def drawn(rng: random.Random, longest: int = 70) -> Trajectory:
    """A random trajectory of any kind that the buffer may get."""
    completion = rng.randint(1, longest)
    kind = rng.randrange(3)
    mask = [True] * completion if kind else [rng.random() < 0.5 for _ in range(completion)]
    mask[rng.randrange(completion)] = True
    scored = rng.random() < 0.8
    return Trajectory(
        prompt_ids=torch.tensor([rng.randrange(200_000) for _ in range(rng.randint(1, 30))]),
        completion_ids=torch.tensor([rng.randrange(200_000) for _ in range(completion)]),
        loss_mask=torch.tensor(mask),
        reward=rng.gauss(0, 1),
        end=rng.choice(list(End)),
        policy_step=rng.randrange(1000),
        ref_log_probs=torch.tensor([-rng.random() * m for m in mask]) if scored else None,
        ref_soft_value=float(np.float32(rng.random())) if scored else None,
        ref_end_value=float(np.float32(rng.random())) if rng.random() < 0.5 else None,
        ref_key=rng.choice(["a", "b"]) if scored else None,
        value=rng.choice([None, rng.random()]),
        baseline=rng.random(),
        priority=rng.choice([None, float(np.float32(rng.random()))]),
    )


def same(stored: Trajectory, given: Trajectory) -> bool:
    """Whether all stored fields are equal; for the reference's log-probabilities, their sum and where they are 0."""
    if given.ref_log_probs is None:
        equal = stored.ref_log_probs is None
    else:
        equal = math.isclose(stored.ref_log_probs.sum(), given.ref_log_probs.double().sum(), rel_tol=1e-6)
        equal = equal and not stored.ref_log_probs[~given.loss_mask].any()
    numbers = ("reward", "end", "policy_step", "ref_soft_value", "ref_end_value", "ref_key", "value", "baseline")
    return (
        equal
        and all(
            torch.equal(getattr(stored, ids), getattr(given, ids))
            for ids in ("prompt_ids", "completion_ids", "loss_mask")
        )
        and all(getattr(stored, name) == getattr(given, name) for name in (*numbers, "priority"))
    )


def test_what_goes_in_comes_out():
    """Through many segments and three times the capacity, and with one trajectory longer than a segment."""
    rng = random.Random(0)
    store, given = TrajectoryStore(2000), [drawn(rng) for _ in range(6000)]
    given[3000] = drawn(rng, longest=2)
    given[3000].prompt_ids = torch.arange(_SEGMENT + 5)
    for count, trajectory in enumerate(given, 1):
        store.append(trajectory)
        if count in (1, 1999, 2000, 2001, 3500):
            kept = given[max(count - 2000, 0) : count]
            assert len(store) == len(kept) and all(map(same, store, kept))
    assert store.first == 4000 and same(store[4000], given[4000]) and same(store[5999], given[-1])
    assert [store.policy_step(number) for number in range(4000, 6000)] == [t.policy_step for t in given[4000:]]


def test_it_is_restored_as_it_was():
    rng = random.Random(1)
    store = TrajectoryStore(50)
    for _ in range(130):
        store.append(drawn(rng))
    again = TrajectoryStore(50)
    again.restore(*store.state())
    assert (again.first, again.end) == (store.first, store.end) == (80, 130)
    assert all(same(again[n], store[n]) and torch.equal(again[n].loss_mask, store[n].loss_mask) for n in range(80, 130))
    more = drawn(rng)
    for one in (store, again):
        one.append(more)
        assert len(one) == 50 and same(one[130], more)
    words = [len(one) + -(-len(one.completion_ids) // 32) * (not one.loss_mask.all()) for one in store]
    assert store.state()[1]["words_of"].tolist() == words
    assert len(store.state()[0]["keys"]) <= 50 < len(store._keys)  # keys of removed trajectories are not kept
    empty = TrajectoryStore(50)
    empty.restore(*TrajectoryStore(50).state())
    assert len(empty) == 0


def test_an_emptied_store_gives_its_memory_back():
    """A segment holds three trajectories. All are dropped, then many more are added."""
    store = TrajectoryStore(8)
    long = drawn(random.Random(0), longest=1)
    long.prompt_ids = torch.zeros(_SEGMENT // 3 - 100, dtype=torch.long)
    for _ in range(3):
        store.append(long)
    for _ in range(3):
        store.popleft()
    assert len(store) == 0
    for _ in range(100):
        store.append(long)
    assert same(store[102], long) and store.nbytes < 1.6 * 8 * 4 * len(long)


def of_words(prompt: int, completion: int = 1, step: int = 0) -> Trajectory:
    """A trajectory with these numbers of tokens."""
    return Trajectory(torch.full((prompt,), 7), torch.arange(completion), torch.ones(completion, dtype=torch.bool),
                      reward=1.0, end=End.EOS, policy_step=step)  # fmt: skip


def test_segments_by_hand():
    """Two halves fill a segment. A third opens another, which gives back its empty rest when a fifth does not fit."""
    half, record = _SEGMENT // 2, 62
    store = TrajectoryStore(4)
    given = [of_words(half - 1), of_words(half - 1), of_words(half - 1), of_words(9), of_words(half - 1)]
    assert [store.append(one) for one in given[:3]] == [0, 1, 2]
    assert store.nbytes == 2 * _SEGMENT * 4 + 3 * record
    assert [store.append(one) for one in given[3:]] == [3, 4]  # number 0 makes room, and its segment still holds 1
    assert store.nbytes == _SEGMENT * 4 + (half + 10) * 4 + _SEGMENT * 4 + 4 * record
    assert all(map(same, store, given[1:]))
    assert store.popleft() == 1  # the last of its segment
    assert store.nbytes == (half + 10) * 4 + _SEGMENT * 4 + 4 * record
    assert all(map(same, store, given[2:]))


def test_masks_of_every_length():
    """32 tokens to a word of bits, the last of them true."""
    store = TrajectoryStore(100)
    for length in range(2, 100):
        given = of_words(1, length)
        given.loss_mask[:-1] = torch.arange(length - 1) % 3 == 0
        given.loss_mask[-2] = False
        assert same(store[store.append(given)], given)


def test_what_is_found_has_the_same_tokens_and_the_same_policy():
    store = TrajectoryStore(9)
    for one in (of_words(1, 2), of_words(1, 2, step=1), of_words(1, 3), of_words(1, 2)):
        store.append(one)
    assert store.find(of_words(1, 2)) == [0, 3] and store.find(of_words(1, 2, step=1)) == [1]
    split = of_words(1, 2)  # the same tokens, of which two are the prompt
    split.prompt_ids, split.completion_ids, split.loss_mask = torch.tensor([7, 0]), torch.tensor([1]), torch.ones(1) > 0
    assert store.find(split) == []


def test_scores_and_priorities_are_renewed():
    rng = random.Random(2)
    store = TrajectoryStore(3)
    for _ in range(5):
        store.append(drawn(rng))
    renewed = store[3]
    renewed.ref_log_probs = -torch.ones(len(renewed.completion_ids)) * renewed.loss_mask
    renewed.ref_soft_value, renewed.ref_end_value, renewed.ref_key = 2.5, None, "c"
    before = [store[2], store[4]]
    store.keep_scores(3, renewed)
    store.set_priority(3, 0.5)
    renewed.priority = 0.5
    assert same(store[3], renewed) and all(map(same, [store[2], store[4]], before))


def test_memory():
    """At most 1.1 × the ids' bytes and 64 bytes each, also after many came and went."""
    rng = random.Random(3)
    tracemalloc.start()
    store, tokens = TrajectoryStore(20_000), []
    for _ in range(50_000):
        length = rng.randint(10, 150)
        ones = Trajectory(
            torch.zeros(length // 3 + 1, dtype=torch.long), torch.zeros(length, dtype=torch.long),
            torch.ones(length, dtype=torch.bool), 0.0, End.EOS, policy_step=0,
        )  # fmt: skip
        tokens.append(len(ones))
        store.append(ones)
    of_the_store = tracemalloc.Filter(True, inspect.getfile(TrajectoryStore))  # leaves out allocations of other threads
    traces = tracemalloc.take_snapshot().filter_traces([of_the_store])
    tracemalloc.stop()
    allocated = sum(statistic.size for statistic in traces.statistics("filename"))
    assert store.nbytes <= 1.1 * 4 * sum(tokens[-20_000:]) + 64 * 20_000
    assert allocated == pytest.approx(store.nbytes, rel=0.01)
