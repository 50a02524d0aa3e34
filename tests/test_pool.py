"""Rollouts that run ahead: windows do not change, and every token comes from the policy named for it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.runs import DATA, PROMPTS, before_each_update, build, config, kept_returns, logged, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from tbrm_trl.model.caches import can_select_rows, empty_cache
from tbrm_trl.trajectory import Trajectory

# Windows of 4 rows, two a prompt; an epoch has 4 of them.
RUN: dict[str, Any] = dict(
    num_generations=2, per_device_train_batch_size=4, max_completion_length=12, max_steps=8, learning_rate=0.05,
)  # fmt: skip


def policy(folder: str) -> PreTrainedModel:
    """A policy with completions that also end at a digit or one of 15 letters, so that some are short."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [1, *range(3, 28)]
    return model


def run(folder: str, tmp_path, **options: Any):
    """A run that keeps the rows and the pool of each update, and what the pool drew for each window."""
    trainer = build(policy(folder), tmp_path, **{**RUN, **options})
    make, trainer.held, trainer.drawn = trainer._make_pool, [], []

    def make_pool():
        pool = make()
        if pool is not None:
            draw = pool.draw
            pool.draw = lambda *given: trainer.drawn.append(draw(*given)) or trainer.drawn[-1]
        return pool

    trainer._make_pool = make_pool
    trainer.versions = before_each_update(trainer, lambda: copy.deepcopy(trainer.model.state_dict()))
    trainer.updates = kept_returns(trainer, "_collect")
    compute = trainer._compute_loss

    def look(*given):
        trainer.held.append(list(trainer._pool.rows) if trainer._pool is not None else [])
        return compute(*given)

    trainer._compute_loss = look
    trainer.train()
    return trainer


def row_of(trajectory: Trajectory) -> tuple:
    return prompt(trajectory), trajectory.completion_ids.tolist(), trajectory.reward


def test_windows_are_those_of_a_synchronous_run(llama, tmp_path):
    """Windows have the same prompts for all lengths, and the first has the same tokens. No row is left at the end."""
    alone, pooled = (run(llama, tmp_path / str(size), rollout_pool=size) for size in (0, 5))
    prompts = [list(map(prompt, window)) for window in pooled.windows]
    assert prompts == [list(map(prompt, window)) for window in alone.windows]
    for epoch in (prompts[:4], prompts[4:]):
        assert Counter(text for window in epoch for text in window) == Counter({text: 2 for text in PROMPTS})
    assert list(map(row_of, pooled.windows[0])) == list(map(row_of, alone.windows[0]))
    assert list(map(row_of, pooled.windows[1])) != list(map(row_of, alone.windows[1]))
    lengths = {len(trajectory.completion_ids) for window in pooled.windows for trajectory in window}
    assert min(lengths) == 1 and max(lengths) == 12

    places = [[(row.window, row.place) for row in rows] for rows in pooled.held]
    following = [[(window + 1 + place // 4, place % 4) for place in range(5)] for window in range(8)]
    assert all(begun == expected[: len(begun)] for begun, expected in zip(places, following, strict=True))
    assert max(map(len, places)) == 5 and places[-1] == [] and pooled._pool.rows == []


def test_every_token_is_drawn_by_the_policy_that_it_names(llama, tmp_path):
    """In a greedy run the policies decide everything. Each one must choose its tokens again."""
    trainer = run(llama, tmp_path, rollout_pool=9, generation_kwargs={"do_sample": False})
    rows = [row for window in trainer.drawn for row in window]
    trained = [one for window in trainer.windows for one in window]
    assert [(one.first_policy_step, one.policy_step) for one in trained] == [(r.steps[0], r.steps[-1]) for r in rows]
    plain, others = AutoModelForCausalLM.from_pretrained(llama), 0
    for version, weights in enumerate(trainer.versions):
        plain.load_state_dict(weights)
        for row in rows:
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            with torch.no_grad():
                chosen = plain(ids).logits[0, len(row.prompt_ids) - 1 : -1].argmax(dim=-1).tolist()  # (C,)
            for token, step, choice in zip(row.completion_ids, row.steps, chosen, strict=True):
                assert choice == token or step != version
                others += choice != token and row.steps[0] == version  # another policy went on
    assert others


def test_staleness_is_logged_and_kl_is_of_the_present_policy(llama, tmp_path):
    trainer = run(llama, tmp_path, rollout_pool=9)
    counted = [0, 0]
    for step, rows in enumerate(trainer.updates):
        entry = trainer.state.log_history[step]
        behind = [step - row.trajectory.first_policy_step for row in rows]
        mixed = [row.trajectory.first_policy_step != row.trajectory.policy_step for row in rows]
        assert [row.origin for row in rows] == ["ahead" if late else "fresh" for late in behind]
        assert entry["staleness/mean"] == pytest.approx(sum(behind) / 4)
        assert (entry["staleness/max"], entry["staleness/mixed"]) == (max(behind), sum(mixed) / 4)
        assert ("kl" in entry) == (0 in behind) and ("residual/ahead_rms" in entry) == any(behind)
        counted[0] += "kl" in entry
        counted[1] += any(mixed)
    assert 0 < counted[0] < 8 and counted[1]
    assert logged(run(llama, tmp_path / "none"), "staleness/mean") == []
    largest = logged(trainer, "staleness/max")
    assert largest[0] != max(largest)
    rarely = run(llama, tmp_path / "rarely", rollout_pool=9, logging_steps=8)
    assert logged(rarely, "staleness/max") == [max(largest)]  # and no mean of maxima


def test_a_checkpoint_of_another_pool_is_another_run(llama, tmp_path):
    run(llama, tmp_path, rollout_pool=4, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = build(llama, tmp_path, rollout_pool=8, **RUN)
    with pytest.raises(ValueError, match="rollout_pool"):
        trainer.train(resume_from_checkpoint=True)


LOGGED = Dataset.from_list([{"prompt": p, "completion": "a", "reward": 1.0} for p in PROMPTS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rollout_pool=-1), "must be 0 or a positive multiple"),
        (dict(reference="previous", soft_value="group", num_generations=2), "has no previous one"),
        (dict(replay_buffer_size=8, num_iterations=2, replay_max_age=2), "out of the order of their ages"),
        (dict(use_transformers_continuous_batching=True), "the policy's own forward"),
        (dict(generation_kwargs={"num_beams": 2}), "several candidates"),
        (dict(generation_kwargs={"guidance_scale": 2.0}), "`guidance_scale`"),
        (dict(cache_implementation="static"), "cannot be selected"),
        (dict(train_dataset=LOGGED), "nothing is drawn"),
        (dict(train_dataset=DATA.to_iterable_dataset()), "without streaming"),
        (dict(rollout_func=lambda prompts, trainer: {}), "`rollout_func` is not drawn in one go"),
    ],
)  # fmt: skip
def test_what_cannot_run_ahead_is_refused(options, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(llama, tmp_path, **{"rollout_pool": 2, "train_dataset": DATA, **options})


def test_a_cache_without_rows_is_known(llama):
    model = policy(llama)
    assert not can_select_rows(StaticCache(config=model.config, max_cache_len=8)) and can_select_rows(
        empty_cache(model)
    )


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (dict(soft_value="zero"), True),
        (dict(soft_value="log_mean_exp", num_generations=2), True),
        (dict(soft_value="optimal", soft_value_beta=0.5), True),
        (dict(soft_value="tracked"), True),
        (dict(soft_value="tracked", soft_value_tracks="value"), False),
        (dict(soft_value="optimal"), False),
        (dict(soft_value="group", num_generations=2), False),
        (dict(soft_value="calibrated"), False),
    ],
)
def test_constants_that_other_policies_data_mislead_are_warned_of(options, warned, recwarn):
    config(rollout_pool=2, **options)
    assert any("rollouts that run ahead" in str(one.message) for one in recwarn) is warned
