"""Decoding of only the unfinished rows: the tokens are those of `generate`, and new rows take free places."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from common.tiny import model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from tbrm_trl.model.caches import ROOM, RoomyLayer, can_select_rows, closed_up, equally_wide
from tbrm_trl.model.decoding import Slots, sample

ENDS = [1, *range(5, 16)]  # a tiny model meets one of them now and then
COUNTED = dict(repetition_penalty=1.3, min_new_tokens=4, exponential_decay_length_penalty=(6, 1.1))
SLIDING = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
MODELS = {"llama": ("llama", {}), "absolute positions": ("gpt2", {}), "sliding window": ("qwen2", SLIDING)}


@dataclass
class Row:
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)


def built(name: str) -> PreTrainedModel:
    architecture, changes = MODELS[name]
    return model(architecture, **changes).eval()


def config(**options: Any) -> GenerationConfig:
    defaults = dict(max_new_tokens=20, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=ENDS, disable_compile=True)
    return GenerationConfig(**defaults | options)


def prepared(policy: PreTrainedModel, given: GenerationConfig) -> GenerationConfig:
    """The configuration that `generate` passes on."""
    handed = []

    def keep(model, input_ids, generation_config, **kwargs):
        handed.append(generation_config)
        return input_ids

    policy.generate(torch.ones(1, 1, dtype=torch.long), generation_config=given, custom_generate=keep)
    return handed[0]


def prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(16, 90) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def test_a_cache_with_room_holds_what_any_other_does():
    """After any tokens, selections of rows, repetitions and cuts. A further token does not copy the earlier ones."""
    rng = random.Random(0)
    for _ in range(50):
        ours, theirs = RoomyLayer(rng.choice([0, 6])), DynamicLayer()
        rows = rng.randint(1, 4)
        for _ in range(16):
            new = torch.randn(2, rows, 2, rng.choice([1, 1, 1, 5, ROOM + 3]), 3)  # keys and values
            for layer in (ours, theirs):
                assert all(map(torch.equal, layer.update(*new), (layer.keys, layer.values)))
            change = rng.randrange(8)
            if change == 0:
                kept = torch.tensor(rng.choices(range(rows), k=rng.randint(1, 4)))
            if change == 1:
                kept = torch.tensor(closed_up(sorted(rng.sample(range(rows), rng.randint(1, rows)))))
            added = torch.randn(2, rng.randint(1, 2), 2, rng.randint(1, 9), 3)
            for layer in (ours, theirs):
                if change < 2:
                    layer.batch_select_indices(kept)
                if change == 2:
                    layer.crop(-1)
                if change == 3 and layer is ours:
                    layer.cut(1)
                elif change == 3:
                    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
                if change == 4 and layer is ours:
                    layer.append(*added)
                elif change == 4:
                    layer.keys = torch.cat(equally_wide(layer.keys, added[0], dim=-2))
                    layer.values = torch.cat(equally_wide(layer.values, added[1], dim=-2))
            rows = len(ours.keys)
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    ours, places = RoomyLayer(4), set()
    for rows in (3, 2, 4):  # rows leave, and others come
        if rows == 2:
            ours.batch_select_indices(torch.tensor(closed_up([1, 2])))
        if rows == 4:
            ours.append(*torch.randn(2, 2, 2, 3, 3))
        places |= {ours.update(*torch.randn(2, rows, 2, 1, 3))[0].data_ptr() for _ in range(ROOM // 3)}
    assert len(places) == 1


def test_rows_close_up():
    assert closed_up([0, 1, 2]) == [0, 1, 2] and closed_up([]) == []
    assert closed_up([1, 2, 3]) == [3, 1, 2] and closed_up([0, 3, 5]) == [0, 5, 3]


def positions_read(policy: PreTrainedModel) -> list[int]:
    """A list with rows times tokens of each forward pass from now on."""
    read: list[int] = []
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return read


# ---- one batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, COUNTED], ids=["sampled", "greedy", "processors"])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_and_the_random_state_of_generate(name, options):
    """Each row is read once for each of its tokens but the last; `generate` reads all rows until the longest ends."""
    policy, rows = built(name), prompts(7, 5)
    width = max(map(len, rows))
    batch: dict[str, Tensor] = {
        "input_ids": torch.tensor([[0] * (width - len(one)) + one for one in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in rows]),
    }
    torch.manual_seed(1)
    expected, state = policy.generate(**batch, generation_config=config(**options)), torch.get_rng_state()
    read = positions_read(policy)
    torch.manual_seed(1)
    ids = policy.generate(**batch, generation_config=config(**options), custom_generate=sample)
    assert ids.equal(expected) and torch.get_rng_state().equal(state)

    is_end = torch.isin(ids[:, width:], torch.tensor(ENDS))  # (B, C)
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, is_end.shape[1])  # (B,)
    assert len(set(lengths.tolist())) > 2
    assert sum(read) == batch["input_ids"].numel() + int((lengths - 1).sum())


def test_a_cache_that_gives_no_rows_out_is_left_to_generate():
    policy, ids = built("llama"), torch.tensor(prompts(1, 4) * 6)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        results = []
        for more in ({}, {"custom_generate": sample}):
            torch.manual_seed(1)
            results.append(policy.generate(ids, generation_config=config(**options), **more))
        assert results[0].equal(results[1])


def test_a_row_that_ends_moves_no_more_rows_than_end(monkeypatch):
    """The last rows fill the gaps. Moving all that come after costs two copies a row and layer."""
    moved: list[tuple[int, int]] = []
    select = DynamicCache.batch_select_indices

    def counted(cache: DynamicCache, indices: Tensor) -> None:
        kept = indices.tolist()
        moved.append((sum(place != row for place, row in enumerate(kept)), len(cache.layers[0].keys) - len(kept)))
        select(cache, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", counted)
    policy, ids = built("llama"), torch.tensor(prompts(1, 4) * 12)
    policy.generate(ids, generation_config=config(), custom_generate=sample)
    assert len(moved) > 2 and all(rows <= ended for rows, ended in moved)


def test_rows_that_do_not_stay_where_they_are_are_not_taken_out():
    cache = DynamicCache()
    assert can_select_rows(cache)
    cache.offloading = True  # keys and values go to the host and back, layer by layer
    assert not can_select_rows(cache)


# ---- places that are filled again ------------------------------------------------------------------------------------


def decode(policy: PreTrainedModel, given: GenerationConfig, rows: list[Row], size: int, pauses: list[int]) -> None:
    """Draw all rows. The cache is dropped after each number of steps in `pauses`, as when the policy changes."""
    with torch.no_grad():
        for pause in [*pauses, 10**9]:
            slots = Slots(policy, given, size)
            waiting = [row for row in rows if not slots.has_ended(row)]
            steps = iter(range(pause))

            def more(count: int, waiting=waiting) -> list[Row]:
                return [waiting.pop(0) for _ in range(min(count, len(waiting)))]

            slots.run(
                more, lambda slots=slots, steps=steps: all(map(slots.has_ended, rows)) or next(steps, None) is None
            )


@pytest.mark.parametrize("options", [{}, COUNTED], ids=["plain", "counted from the prompt"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_rows_that_take_each_others_places(name, options):
    """13 rows in 4 places, with two pauses after which prefixes are read again, get the same tokens as alone."""
    policy, given = built(name), config(do_sample=False, **options)
    rows = [Row(one) for one in prompts(13)]
    expected = [
        policy.generate(torch.tensor([row.prompt_ids]), generation_config=given)[0, len(row.prompt_ids) :].tolist()
        for row in rows
    ]
    read = positions_read(policy)
    decode(policy, prepared(policy, given), rows, 4, [7, 5])
    assert [row.completion_ids for row in rows] == expected
    lengths = list(map(len, expected))
    assert len(set(lengths)) > 3
    assert len(read) < 2 * sum(lengths) / 4  # the places are full: a quarter of the steps, and as many prompts


@pytest.mark.parametrize("name", MODELS)
def test_what_several_rows_begin_with_is_read_once(name):
    """Three rows of one prompt and two of another, one with two tokens drawn: three beginnings."""
    policy, given = built(name), config(do_sample=False, min_new_tokens=4)
    first, second = prompts(2, seed=1)
    alone = {
        tuple(one): policy.generate(torch.tensor([one]), generation_config=given)[0, len(one) :].tolist()
        for one in (first, second)
    }
    rows = [Row(first), Row(second), Row(first), Row(second, alone[tuple(second)][:2]), Row(first)]
    read = positions_read(policy)
    decode(policy, prepared(policy, given), rows, 5, [])
    assert [row.completion_ids for row in rows] == [alone[tuple(row.prompt_ids)] for row in rows]
    assert read[0] == 3 * max(len(first), len(second) + 2)


def test_two_processes_run_equally_many_forwards():
    """One has three short rows, the other one long row. A sharded model would wait forever for a missing forward."""
    barrier, said, read = threading.Barrier(2, timeout=30), [[], []], [0, 0]
    works = [[Row([20]), Row([21, 22]), Row([23])], [Row([24] * 5)]]
    policies = [built("llama"), built("llama")]
    endless = {"do_sample": False, "suppress_tokens": [1], "eos_token_id": [1]}
    configs = [prepared(policies[0], config(max_new_tokens=count, **endless)) for count in (3, 9)]

    def work(process: int) -> None:
        def any_of(flags: list[bool]) -> list[bool]:
            said[process] = flags
            barrier.wait()
            together = [any(pair) for pair in zip(*said, strict=True)]
            barrier.wait()
            return together

        forwards = positions_read(policies[process])
        slots, waiting = Slots(policies[process], configs[process], 2, any_of), list(works[process])
        with torch.no_grad():
            slots.run(
                lambda count: [waiting.pop(0) for _ in range(min(count, len(waiting)))],
                lambda: all(map(slots.has_ended, works[process])),
            )
        read[process] = len(forwards)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, process) for process in range(2)]:
            done.result()
    lengths = [[len(row.completion_ids) for row in rows] for rows in works]
    assert lengths == [[3, 3, 3], [9]]
    assert read == [10, 10]  # the first prompts, eight further tokens of the long row, and the third short row's prompt


def test_the_distribution_is_the_policys():
    """All completions of up to 3 of 5 tokens, enumerated: their frequencies, by χ², with pauses and refilled places."""
    policy = model("llama", vocab_size=5, initializer_range=0.6).eval()
    given = prepared(policy, config(max_new_tokens=3, eos_token_id=[1]))
    prompt = [2, 3]
    outcomes = [
        list(one)
        for n in (1, 2, 3)
        for one in product(range(5), repeat=n)
        if 1 not in one[:-1] and (n == 3 or one[-1] == 1)
    ]
    chances = {1.0: torch.zeros(len(outcomes)), 1.5: torch.zeros(len(outcomes))}
    with torch.no_grad():
        for number, outcome in enumerate(outcomes):
            logits = policy(torch.tensor([prompt + outcome])).logits[0, len(prompt) - 1 : -1]  # (C, V)
            for temperature, chance in chances.items():
                log_probs = (logits / temperature).log_softmax(dim=-1)
                chance[number] = log_probs[range(len(outcome)), outcome].sum().exp()
    assert chances[1.0].sum().item() == pytest.approx(1, abs=1e-5)

    torch.manual_seed(0)
    rows = [Row(list(prompt)) for _ in range(3000)]
    decode(policy, given, rows, 128, [5, 6, 20])
    counts = torch.zeros(len(outcomes))
    for row in rows:
        counts[outcomes.index(row.completion_ids)] += 1

    def z_score(chance: Tensor) -> float:
        """The z-score of χ², which is nearly normal at this many degrees of freedom: mean n, variance 2n."""
        seen = chance * len(rows) >= 5
        expected = torch.cat([chance[seen], chance[~seen].sum(dim=0, keepdim=True)]) * len(rows)
        found = torch.cat([counts[seen], counts[~seen].sum(dim=0, keepdim=True)])
        freedom = len(expected) - 1
        return float(((found - expected).square() / expected.clamp(min=1e-3)).sum() - freedom) / (2 * freedom) ** 0.5

    assert abs(z_score(chances[1.0])) < 3 and z_score(chances[1.5]) > 20
