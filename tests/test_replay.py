"""The replay buffer: its arithmetic by hand, and through `train()` with real generations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.forked import launch
from helpers.oracle import TOLERANCE, distance, plain, solve
from helpers.runs import build, kept_returns, logged, prompt, train
from transformers import TrainerCallback

from tbrm_trl.sources.replay import BLOCK, LEAST_PRIORITY, ReplayBuffer
from tbrm_trl.trajectory import End, Trajectory


def drawn_at(step: int, name: int = 0, priority: float | None = None) -> Trajectory:
    return Trajectory(
        prompt_ids=torch.tensor([name]),
        completion_ids=torch.tensor([1]),
        loss_mask=torch.tensor([True]),
        reward=0.0,
        end=End.EOS,
        policy_step=step,
        priority=priority,
    )


def alone(values) -> torch.Tensor:
    """Gather over a single process."""
    return torch.tensor([values])


def names(trajectories) -> list[int]:
    return [int(t.prompt_ids[0]) for t in trajectories]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_first_in_first_out():
    buffer = ReplayBuffer(capacity=3)
    buffer.add(drawn_at(0, name) for name in range(5))
    assert names(buffer.stored) == [2, 3, 4]


def test_age():
    """At update 7 with a maximal age of 3, what was drawn at updates 4 to 7 remains."""
    buffer = ReplayBuffer(capacity=10, max_age=3)
    buffer.add(drawn_at(step, step) for step in range(8))
    sample = buffer.sample(4, 7, alone)
    assert sorted(names(sample.trajectories)) == [4, 5, 6, 7]
    assert sample.ages == [7 - t.policy_step for t in sample.trajectories] and len(buffer) == 4
    assert names(buffer.stored[number] for number in sample.numbers) == names(sample.trajectories)


def test_uniform_draws_without_replacement():
    """1,200 draws of 2 out of 4: each row about 600 times (sd 17), none twice in one draw, all with weight 1."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=4)
    buffer.add(drawn_at(0, name) for name in range(4))
    counts = [0] * 4
    for _ in range(1200):
        sample = buffer.sample(2, 0, alone)
        assert len(set(names(sample.trajectories))) == 2 and sample.weights == [1.0, 1.0]
        for name in names(sample.trajectories):
            counts[name] += 1
    assert all(abs(count - 600) < 85 for count in counts)


def test_any_process_that_is_short_stops_all():
    buffer = ReplayBuffer(capacity=4)
    buffer.add(drawn_at(0) for _ in range(4))
    assert buffer.sample(3, 0, lambda mine: torch.tensor([mine, [2]])) is None
    assert buffer.sample(2, 0, lambda mine: torch.tensor([mine, [2]])) is not None


def test_prioritized_by_hand():
    """Exponent 1, priorities 1, 3 and a new row, on this process; 4 (twice) on the other, whose maximum is 4.

    The new row gets 4, so P = 1/8, 3/8, 4/8 of this process's half of the draws. N = 5, hence N P = 5/16, 15/16, 20/16
    here, and 5/2 · 4/8 = 20/16 there. The smallest is 5/16, so with correction 1 the weights are 1, 1/3, 1/4.
    """
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=3, prioritized=True, exponent=1.0, correction=1.0)
    buffer.add([drawn_at(0, 0, priority=1.0), drawn_at(0, 1, priority=3.0), drawn_at(0, 2)])
    counts, weights = [0] * 3, {}
    for _ in range(500):
        sample = buffer.sample(2, 0, lambda mine: torch.tensor([mine, [2.0, 2.0, 8.0, 4.0, 4.0]]))
        for name, weight in zip(names(sample.trajectories), sample.weights, strict=True):
            counts[name] += 1
            weights[name] = weight
    assert [count / 1000 for count in counts] == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.06)
    assert [weights[name] for name in range(3)] == pytest.approx([1, 1 / 3, 1 / 4], rel=1e-4)


def test_the_exponents_are_0_6_and_0_4_unless_given():
    """Of priorities 1 and 32 the shares are as 1 and 32^0.6 = 8, and the weights as 1 and 8^-0.4."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=2, prioritized=True)
    buffer.add([drawn_at(0, 0, priority=1.0), drawn_at(0, 1, priority=32.0)])
    draws = [buffer.sample(2, 0, alone) for _ in range(300)]
    weights = {name: w for one in draws for name, w in zip(names(one.trajectories), one.weights, strict=True)}
    assert weights == {0: pytest.approx(1.0), 1: pytest.approx(8**-0.4, rel=1e-4)}
    assert sum(names(one.trajectories).count(0) for one in draws) / 600 == pytest.approx(1 / 9, abs=0.05)


def test_extremes_of_several_blocks():
    """The largest and the smallest priority are not in the first block. With correction 1 a weight is P's inverse.

    1,024 rows of priority 2, then 1, 4 and a row that was never replayed, which counts as 4.
    """
    buffer = ReplayBuffer(capacity=2 * BLOCK, prioritized=True, exponent=1.0, correction=1.0)
    buffer.add(drawn_at(0, name, priority=2.0) for name in range(BLOCK))
    buffer.add(drawn_at(0, BLOCK + i, priority=one) for i, one in enumerate([1.0, 4.0, None]))
    torch.manual_seed(0)
    seen: dict[int, float] = {}
    for _ in range(10):
        sample = buffer.sample(1000, 0, alone)
        seen |= dict(zip(names(sample.trajectories), sample.weights, strict=True))
    expected = [1 / 2] * BLOCK + [1, 1 / 4, 1 / 4]
    assert seen == pytest.approx({name: expected[name] for name in seen}, rel=1e-5)
    assert {BLOCK, BLOCK + 1, BLOCK + 2} <= set(seen)


def test_uniform_draws_differ():
    """400 draws of one row in a thousand: about 330 different ones."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=1000)
    buffer.add(drawn_at(0, name) for name in range(1000))
    assert 250 < len({number for _ in range(400) for number in buffer.sample(1, 0, alone).numbers}) < 400


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_trajectory_is_dropped_with_its_group(prioritized):
    """From groups (2, 3), (4, 5) and (6, 7), left after an eviction, the one with 5 is dropped."""
    buffer = ReplayBuffer(capacity=6, prioritized=prioritized, group_size=2)
    everyone = [drawn_at(0, name, priority=1.0) for name in range(8)]
    buffer.add(everyone)
    buffer.drop([everyone[5]])
    assert names(buffer.stored) == [2, 3, 6, 7]
    drawn = {name for _ in range(50) for name in names(buffer.sample(2, 0, alone).trajectories)}
    assert drawn == {2, 3, 6, 7}
    buffer.drop([everyone[0]])  # it is no longer there
    assert names(buffer.stored) == [2, 3, 6, 7]


def test_a_new_row_has_the_largest_priority_there_is():
    """It has also if that is below 1: for 0.25, 0.5 and a new row, the weights are 1, 1/2 and 1/2."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=3, prioritized=True, exponent=1.0, correction=1.0)
    buffer.add([drawn_at(0, 0, priority=0.25), drawn_at(0, 1, priority=0.5), drawn_at(0, 2)])
    draws = [buffer.sample(2, 0, alone) for _ in range(30)]
    weights = {name: w for one in draws for name, w in zip(names(one.trajectories), one.weights, strict=True)}
    assert weights == pytest.approx({0: 1.0, 1: 0.5, 2: 0.5}, rel=1e-4)


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_cleared_buffer_begins_anew(prioritized):
    buffer = ReplayBuffer(capacity=4, prioritized=prioritized)
    buffer.add(drawn_at(0, name, priority=1.0) for name in range(4))
    assert buffer.sample(2, 0, alone) is not None
    buffer.clear()
    assert len(buffer) == 0 and buffer.sample(1, 0, alone) is None
    buffer.add([drawn_at(1, 7, priority=3.0)])
    assert names(buffer.sample(1, 1, alone).trajectories) == [7]


def test_groups_are_drawn_from_what_is_there():
    """There are two groups of two in a buffer for eight rows."""
    buffer = ReplayBuffer(capacity=8, group_size=2)
    buffer.add(drawn_at(0, name) for name in range(4))
    for _ in range(20):
        numbers = buffer.sample(4, 0, alone).numbers
        assert sorted(numbers) == [0, 1, 2, 3] and numbers[1] == numbers[0] + 1


def test_what_is_dropped_weighs_no_more():
    """After the row of smallest priority is dropped, the weights of the others, 2 and 4, are 1 and 1/2."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=8, prioritized=True, exponent=1.0, correction=1.0)
    everyone = [drawn_at(0, name, priority=priority) for name, priority in enumerate([1.0, 2.0, 4.0])]
    buffer.add(everyone)
    buffer.sample(2, 0, alone)
    buffer.drop(everyone[:1])
    draws = [buffer.sample(2, 0, alone) for _ in range(20)]
    weights = {name: w for one in draws for name, w in zip(names(one.trajectories), one.weights, strict=True)}
    assert weights == {1: pytest.approx(1.0), 2: pytest.approx(0.5, rel=1e-4)}


def test_prioritized_draws_from_a_large_buffer_are_as_often_as_they_should_be():
    """40,000 draws over several blocks, after evictions, with changed priorities and with rows never replayed."""
    torch.manual_seed(0)
    buffer = ReplayBuffer(capacity=2500, prioritized=True, exponent=0.7, correction=0.5)
    buffer.add(drawn_at(0, name) for name in range(3100))
    buffer.sample(4, 0, alone)
    known = {number: 0.1 + number % 7 for number in range(600, 3100, 3)}
    for number, priority in known.items():
        buffer.set_priority(number, priority)
    powers = {n: (known.get(n, 6.1) + LEAST_PRIORITY) ** 0.7 for n in range(600, 3100)}  # 6.1 is the largest known
    total, least = sum(powers.values()), min(powers.values())
    counts = dict.fromkeys(powers, 0)
    for _ in range(20):
        sample = buffer.sample(2000, 0, alone)
        assert sample.weights == pytest.approx([(powers[n] / least) ** -0.5 for n in sample.numbers], rel=1e-5)
        for number in sample.numbers:
            counts[number] += 1
    for rest in range(7):  # each seventh, replayed and not
        for some in (set(known), set(powers) - set(known)):
            members = [n for n in some if n % 7 == rest]
            share = sum(powers[n] for n in members) / total
            deviation = (share * (1 - share) / 40_000) ** 0.5
            assert sum(counts[n] for n in members) / 40_000 == pytest.approx(share, abs=4 * deviation)


def test_a_fitted_trajectory_is_still_drawn():
    buffer = ReplayBuffer(capacity=2, prioritized=True)
    buffer.add([drawn_at(0, 0, priority=0.0), drawn_at(0, 1, priority=0.0)])
    sample = buffer.sample(2, 0, alone)
    assert sample.weights == pytest.approx([1.0, 1.0])
    buffer.set_priority(1, 3 * LEAST_PRIORITY)  # the other's share is 1/(1 + 4^0.6), 0.3
    torch.manual_seed(0)
    assert any(0 in names(buffer.sample(2, 0, alone).trajectories) for _ in range(25))


# ---- through train() -------------------------------------------------------------------------------------------------

REPLAY = dict(num_iterations=3, replay_buffer_size=8, max_steps=9, per_device_train_batch_size=4)


class At(TrainerCallback):
    """Calls back before one update."""

    def __init__(self, update: int, action):
        self.update, self.action = update, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            self.action()


def test_the_buffer_feeds_the_loss(llama, tmp_path):
    """Two runs differ only in the rewards stored in the buffer. The fresh update agrees, the next does not."""
    runs = []
    for change in (0.0, 1.0):
        trainer = build(llama, tmp_path, **REPLAY)

        def add(trainer=trainer, change=change):
            trainer._replay.stored._records["reward"] += change

        trainer.add_callback(At(1, add))
        trainer.train()
        runs.append(trainer.losses)
    assert runs[0][0] == runs[1][0] and runs[0][1] != runs[1][1]


@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
def test_a_replay_update_is_the_oracles(sampling, llama, tmp_path):
    """The gradient of a replay update is the weighted mean over the drawn rows with their stored reference scores."""
    trainer = build(
        llama, tmp_path, **{**REPLAY, "learning_rate": 0.05, "max_grad_norm": 0.0}, replay_sampling=sampling
    )
    collected = {}
    collect = trainer._collect

    def watch(rows):
        update = collect(rows)
        if trainer.state.global_step == 7:
            collected.update(rows=copy.deepcopy(update), policy=plain(trainer.model))
        return update

    trainer._collect = watch
    trainer.train()
    rows = collected["rows"]
    assert [row.origin for row in rows] == ["replayed"] * 4 and len({row.age for row in rows}) > 1
    assert ({row.weight for row in rows} == {1.0}) is (sampling == "uniform")
    reference, expected, loss = plain(trainer.ref_model), None, 0.0
    for row in rows:
        answer = solve(collected["policy"], reference, [row.trajectory], beta=0.1)
        loss += row.weight * answer.loss / 4
        part = {name: row.weight * g.clone() / 4 for name, g in answer.gradient.items()}
        expected = part if expected is None else {name: expected[name] + g for name, g in part.items()}
    assert trainer.losses[7] == pytest.approx(loss, rel=TOLERANCE)
    assert distance(trainer.recorder.gradients[7], expected) <= TOLERANCE


def test_ages_eviction_and_metrics(llama, tmp_path):
    """Windows at updates 0, 3, 6 of 4 rows each, a buffer of 8, ages up to 4.

    Replay updates 1, 2 see ages 1 and 2; updates 4, 5 see rows of update 3 (ages 1, 2) and of update 0 (age 4, then 5:
    gone); updates 7, 8 see rows of 6 (1, 2) and of 3 (4, then gone). So the fill goes 4 4 4 8 8 4 8 8 4.
    """
    trainer = train(llama, tmp_path, **REPLAY, replay_max_age=4)
    assert logged(trainer, "replay/fill") == [4, 4, 4, 8, 8, 4, 8, 8, 4]
    ages = [entry["replay/age_max"] for entry in trainer.state.log_history if "replay/age_max" in entry]
    assert [ages[i] for i in (0, 1, 3, 5)] == [1, 2, 2, 2] and {ages[2], ages[4]} <= {1, 4}
    assert all(age >= 1 for age in logged(trainer, "replay/age"))
    assert logged(trainer, "replay/updates_per_trajectory") == pytest.approx(
        [1, 2, 3, 2, 2.5, 3, 7 / 3, 8 / 3, 3], rel=1e-3
    )
    for entry in trainer.state.log_history[:9]:
        replay = "replay/age" in entry
        assert ("residual/replayed_rms" in entry) is replay and ("residual/fresh_rms" in entry) is not replay
        assert ("kl" in entry) is not replay
        assert entry["residual/rms"] == entry["residual/replayed_rms" if replay else "residual/fresh_rms"]


def test_what_does_not_count_does_not_enter(llama, tmp_path):
    """Unscored rows and, where they are masked, truncated ones: too few remain, so the window is used again."""

    def half(completions, **kwargs):
        return [1.0 if index % 2 else None for index in range(len(completions))]

    options = {**REPLAY, "max_steps": 6}
    trainer = train(llama, tmp_path, half, **options, mask_truncated_completions=True)
    kept = list(trainer._replay.stored)
    assert all(t.reward == 1.0 and t.end is End.EOS for t in kept)
    assert len(kept) == sum(t.reward == 1.0 and t.end is End.EOS for w in trainer.windows for t in w) < 4
    assert not logged(trainer, "replay/age") and logged(trainer, "residual/reused_rms")


def test_no_reference_forward_for_replayed_rows(llama, tmp_path):
    trainer = build(llama, tmp_path, **REPLAY)
    scored = []
    trainer.ref_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: scored.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert scored == [4, 4, 4]  # three windows, nine updates


def replay_shards(folder: str, out: str) -> dict[str, Any]:
    """A shard of the buffer on each of two processes, one of which runs empty. Returns what this one saw."""

    def reward(completions, trainer_state, **kwargs):
        scored = trainer.accelerator.process_index == 0 or trainer_state.global_step == 0
        return [float(len(text)) if scored else None for text in completions]

    prompts = Dataset.from_list([{"prompt": f"{i}:"} for i in range(12)])
    trainer = build(
        folder, Path(out), reward, prompts, per_device_train_batch_size=2, max_steps=9,
        num_iterations=3, replay_buffer_size=8, replay_max_age=4,
    )  # fmt: skip
    updates = kept_returns(trainer, "_collect")
    trainer.train()
    return {
        "origins": [rows[0].origin for rows in updates],
        "drawn": {prompt(row.trajectory) for rows in updates for row in rows if row.origin == "replayed"},
        "prompts": [prompt(t) for window in trainer.windows for t in window],
        "shard": [prompt(t) for t in trainer._replay.stored],
    }


def test_two_processes(llama, tmp_path):
    """Disjoint shards; when one shard is emptied by age, both processes fall back on the window, and none stalls."""
    first, second = launch("test_replay:replay_shards", folder=llama, out=tmp_path)
    assert first["origins"] == second["origins"]
    # Window 0 (updates 0 to 2) replays; then process 1 gets no reward, its rows age out, and nobody replays.
    assert (
        first["origins"] == ["fresh", "replayed", "replayed", "fresh", "replayed", "reused", "fresh"] + ["reused"] * 2
    )
    assert len(first["shard"]) == 2 and not second["shard"]  # of the last window; what came before is too old
    assert first["prompts"] and not set(first["prompts"]) & set(second["prompts"])
    assert first["drawn"] <= set(first["prompts"]) and second["drawn"] <= set(second["prompts"])


@pytest.mark.parametrize(("kind", "group"), [("batch_mean", 1), ("group_mean", 2), (0.25, 1)])
def test_a_replayed_row_takes_the_latest_baseline(kind, group, llama, tmp_path):
    """It is that of the window beside which it is replayed, of the last group of its prompt in any window, or a number.

    Rewards grow by 1 with every window, so that a stored baseline would be far off.
    """
    calls = []

    def later_is_better(completions, **kwargs):
        calls.append(None)
        return [len(calls) + 0.1 * len(text) for text in completions]

    trainer = build(
        llama, tmp_path, later_is_better, soft_value="calibrated", reward_baseline=kind, num_generations=group,
        num_iterations=2, replay_buffer_size=64, per_device_train_batch_size=4, max_steps=16, learning_rate=1e-3,
    )  # fmt: skip
    windows = kept_returns(trainer, "_new_window")
    updates: list[tuple[int, list[tuple[str, str, float]]]] = []
    collect = trainer._collect

    def watched(rows):
        update = collect(rows)
        updates.append((len(windows), [(r.origin, r.trajectory.prompt_key, r.trajectory.baseline) for r in update]))
        return update

    trainer._collect = watched
    trainer.train()
    mean: dict[str, float] = {}
    seen, renewed = 0, 0
    for number, rows in updates:
        for window in windows[seen:number]:
            for t in window:
                alike = [o.reward for o in window if kind == "batch_mean" or o.prompt_key == t.prompt_key]
                mean[t.prompt_key if kind == "group_mean" else "window"] = sum(alike) / len(alike)
        seen = number
        for origin, prompt_key, baseline in rows:
            expected = mean[prompt_key if kind == "group_mean" else "window"]
            assert baseline == pytest.approx(expected if isinstance(kind, str) else kind, abs=1e-5)
            renewed += origin == "replayed"
    assert renewed == 32 and seen == 8
