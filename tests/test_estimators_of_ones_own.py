"""Estimators written against the `Run` protocol alone: one with trained parameters, and one with state per prompt.

Both are saved, resumed and equal on every process. All estimators that ship accept a plain object with the protocol's
names as a run.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from common.launch import allow_fsdp_on_cpu, flat
from common.tiny import save_value_model
from datasets import Dataset
from helpers.forked import launch
from helpers.oracle import TOLERANCE, distance, steps
from helpers.resume import build as build_resumable
from helpers.resume import outcome
from helpers.runs import DATA, TOKENIZER, build, config, log, one_update
from helpers.two_processes import in_each_of
from torch import nn
from transformers import AutoTokenizer, TrainerCallback

from tbrm_trl import SoftValue
from tbrm_trl.loss.metrics import Totals
from tbrm_trl.loss.soft_value import ConstantValue, Run
from tbrm_trl.model.value_head import ValueHead
from tbrm_trl.trajectory import End, Source, Trajectory

BETA, RATE = 0.1, 0.05


class HeadValue(SoftValue):
    """`V = w · h(s_1) + b`, trained on the same loss. It starts elsewhere on every process."""

    name = "linear_head"

    def attach(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(run.accelerator.process_index)
        self.head = nn.Linear(32, 1)
        for parameter in self.head.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        run.train_module(self.head, RATE)

    def __call__(self, inputs):
        return self.head(inputs.hidden).squeeze(1)


class RunningMean(ConstantValue):
    """The mean reward of a prompt so far, over all processes; 0 for a new one."""

    name = "running_mean"

    def attach(self, run: Run) -> None:
        self.run = run

    def prepare(self, run: Run) -> None:
        self.totals: dict[str, list[float]] = {}  # number and sum of rewards, by prompt

    def on_window(self, trajectories, rows, group_size):
        for trajectory in trajectories:
            number, total = self.totals.get(trajectory.prompt_key, (0, 0.0))
            trajectory.value = total / max(number, 1)
        if self.run.evaluating:
            return
        for key, reward in gather_object([(t.prompt_key, t.reward) for t in trajectories]):
            number, total = self.totals.get(key, (0, 0.0))
            if not math.isnan(reward):
                self.totals[key] = [number + 1, total + reward]

    def state(self):
        return self.totals

    def restore(self, state):
        self.totals = state


def head_of(trainer) -> dict[str, Any]:
    """Trained parameters and their optimizer, copied."""
    kept = {"head": trainer._soft_value.head.state_dict(), "optimizer": trainer._trained_modules.optimizer.state_dict()}
    return dict(flat(kept))


# ---- trained parameters ----------------------------------------------------------------------------------------------


def test_the_first_gradient(llama, tmp_path):
    """Gradients of `mean (β δ)²` in w and b, over two micro-batches, and in the policy (V constant), and Adam's step.

    AdamW's first step is `−rate · g/(|g| + 1e-8)`.
    """
    kept: dict[str, Any] = {"gradients": {"weight": 0.0, "bias": 0.0}}

    def watch(trainer):
        head = trainer._soft_value.head
        kept["before"] = {name: p.detach().clone() for name, p in head.named_parameters()}
        for name, parameter in head.named_parameters():
            parameter.register_hook(
                lambda g, name=name: kept["gradients"].update({name: kept["gradients"][name] + g.clone()})
            )

    update = one_update(
        llama, tmp_path, log(unscored=(3,)), lambda prompts, **kwargs: [None] * len(prompts), watch,
        soft_value="linear_head", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    head = nn.Linear(32, 1).double()
    head.load_state_dict(kept["before"])
    assert len(update.counted) == 7
    loss = 0.0
    for trajectory in update.counted:
        ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])[None]
        s_1 = len(trajectory.prompt_ids) + trajectory.loss_mask.tolist().index(True) - 1
        with torch.no_grad():
            hidden = update.policy.base_model(ids).last_hidden_state[0, s_1]
            reference = sum(steps(update.reference, trajectory, 1.0).log_probs)
        log_ratio = sum(steps(update.policy, trajectory, 1.0).log_probs) - reference
        loss = loss + (BETA * (head(hidden)[0] + log_ratio - trajectory.reward / BETA)) ** 2 / 7
    update.policy.zero_grad()
    loss.backward()
    assert update.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    assert distance(update.gradient, {name: p.grad for name, p in update.policy.named_parameters()}) <= TOLERANCE
    gradients = {name: p.grad for name, p in head.named_parameters()}
    assert distance(kept["gradients"], gradients) <= TOLERANCE
    for name, after in update.trainer._soft_value.head.state_dict().items():
        expected = kept["before"][name] - RATE * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-6)


def train_head(folder: str, out: str, batch: int, name: str) -> dict[str, Any]:
    """Make four updates on a log of eight rows, in this process."""
    allow_fsdp_on_cpu()
    trainer = build(
        folder, Path(out), None, Dataset.from_list(log()), soft_value=name, per_device_train_batch_size=batch,
        max_steps=4, shuffle_dataset=False,
    )  # fmt: skip
    start = dict(flat(trainer._soft_value.head.state_dict()))
    trainer.train()
    head = {name: p.detach().clone() for name, p in trainer._soft_value.head.named_parameters()}
    return {"start": start, "kept": head_of(trainer), "head": head, "losses": trainer.losses}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (None, "linear_head"),
        *(pytest.param(f, "learned", marks=pytest.mark.launch) for f in ("fsdp2", "zero2", "zero3")),
    ],
)
def test_two_processes_train_one_head(file, name, llama, tmp_path):
    """They begin with the main process's weights, agree on every bit afterwards, and match a single process."""
    options = {"folder": llama, "name": name}
    first, second = launch("test_estimators_of_ones_own:train_head", file, **options, out=tmp_path, batch=4)
    assert first["start"] == second["start"] and first["kept"] == second["kept"]
    assert first["losses"] != second["losses"]  # of their own rows
    one = train_head(**options, out=str(tmp_path / "one"), batch=8)
    assert (
        one["start"] == first["start"] != {name: value for name, value in one["kept"].items() if name in first["start"]}
    )
    for name, parameter in one["head"].items():
        torch.testing.assert_close(first["head"][name], parameter, rtol=1e-3, atol=1e-5)


# ---- state per prompt ------------------------------------------------------------------------------------------------


def track(folder: str, out: str) -> dict[str, Any]:
    """Train on six windows of four prompts, with evaluations between, in this process."""
    trainer = build(
        folder, Path(out), train_dataset=DATA.select(range(4)), eval_dataset=DATA.select(range(2)), max_steps=6,
        soft_value="running_mean", eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2,
    )  # fmt: skip
    windows: list[list[tuple[bool, str, float, float]]] = []
    on_window = trainer._soft_value.on_window

    def watch(trajectories, rows, group_size):
        on_window(trajectories, rows, group_size)
        windows.append([(trainer.evaluating, t.prompt_key, t.reward, t.value) for t in trajectories])

    trainer._soft_value.on_window = watch
    trainer.train()
    before = trainer._soft_value.state().copy()
    trainer.evaluate()
    return {"windows": windows, "state": trainer._soft_value.state(), "before": before}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mean_of_each_prompt(processes, llama, tmp_path):
    """Each window gets the means of earlier windows on both processes. Evaluations get them and change nothing."""
    seen = in_each_of(processes, track, folder=llama, out=str(tmp_path))
    rewards: dict[str, list[float]] = {}
    for windows in zip(*(one["windows"] for one in seen), strict=True):
        everything = [row for window in windows for row in window]
        for _, key, _, value in everything:
            known = rewards.get(key, [0.0])
            assert value == pytest.approx(sum(known) / len(known), abs=1e-12)
        for evaluating, key, reward, _ in everything:
            if not evaluating:
                rewards.setdefault(key, []).append(reward)
    assert len(rewards) == 4 and sum(map(len, rewards.values())) == 6 * 2 * processes
    expected = {key: [len(given), pytest.approx(sum(given))] for key, given in rewards.items()}
    assert len({mean for mean in (sum(given) / len(given) for given in rewards.values())}) > 1
    for one in seen:
        assert one["state"] == one["before"] == expected
        assert any(evaluating for window in one["windows"] for evaluating, *_ in window)
    assert all(one["state"] == seen[0]["state"] for one in seen)


def track_spo(folder: str, out: str, rows: int, tracks: str) -> dict[str, Any]:
    """Train on six windows with a replayed update each. Returns each one's events, and the tracker at the end."""
    trainer = build(
        folder, Path(out), train_dataset=DATA.select(range(4)), max_steps=12, soft_value="tracked", num_iterations=2,
        replay_buffer_size=64, per_device_train_batch_size=rows, learning_rate=0.03, soft_value_tracks=tracks,
    )  # fmt: skip
    estimator, seen = trainer._soft_value, []
    on_window, after_update, collect = estimator.on_window, estimator.after_update, trainer._collect

    def window(trajectories, rows, group_size):
        on_window(trajectories, rows, group_size)
        seen.append(("window", estimator.distance, [(t.prompt_key, t.reward, t.value) for t in trajectories]))

    def update(rows):
        collected = collect(rows)
        seen.append(
            ("update", estimator.distance, [(r.trajectory.prompt_key, 0.0, r.trajectory.value) for r in collected])
        )
        return collected

    def said(metrics, residuals):
        after_update(metrics, residuals := list(residuals))
        seen.append(("said", estimator.distance, [(t.prompt_key, t.value - delta, t.value) for t, delta in residuals]))

    estimator.on_window, estimator.after_update, trainer._collect = window, said, update
    trainer.train()
    return {
        "seen": seen,
        "state": estimator.state(),
        "kl": [one["kl"] for one in trainer.state.log_history if "kl" in one],
    }


@pytest.mark.parametrize(
    ("processes", "tracks"),
    [(1, "reward"), (1, "value"), pytest.param(2, "value", marks=pytest.mark.launch)],
)
def test_spos_tracker(processes, tracks, llama, tmp_path):
    """The counts of arXiv 2509.13232 by a loop over windows, and each row's value from them, also in replay.

    `α ← ρ α + Σ r`, `n ← ρ n + k`, ρ = 2^(−D/0.06) between 0.875 and 0.96; a window's rewards count from the next on.
    If values are tracked, r is the value that each row of each update implies.
    """
    given = dict(folder=llama, out=str(tmp_path), rows=4 // processes, tracks=tracks)
    of_processes = in_each_of(processes, track_spo, **given)
    table: dict[str, list[float]] = {}
    earned: list[tuple[str, float]] = []
    forgotten = set()

    def value(prompt: str) -> float:
        number, total, _ = table.get(prompt) or table.get("all") or [1.0, 0.0, 0.0]
        return total / number

    replayed = 0
    for events in zip(*(one["seen"] for one in of_processes), strict=True):
        kind, distance = events[0][:2]
        assert {event[:2] for event in events} == {(kind, distance)}
        rows = [row for event in events for row in event[2]]
        if kind == "said":
            earned += [(prompt, one) for prompt, one, _ in rows if tracks == "value"]
            continue
        if kind == "window":
            for prompt in dict.fromkeys(["all", *(name for name, _ in earned)] if earned else []):
                number, total, last = table.get(prompt, [1.0, value(prompt), distance])
                mine = [reward for name, reward in earned if prompt in (name, "all")]
                rho = min(max(2 ** (-((distance - last) ** 2) / 2 / 0.06), 0.875), 0.96)
                forgotten.add(rho)
                table[prompt] = [rho * number + len(mine), rho * total + sum(mine), distance]
            earned = [(prompt, reward) for prompt, reward, _ in rows if tracks == "reward"]
        else:
            replayed += 1
        for prompt, _, given in rows:
            assert given == pytest.approx(value(prompt), abs=1e-9)
    assert replayed == 12 and len(table) == 5
    assert min(forgotten) < 0.96  # the policy has moved
    for one in of_processes:
        assert all(one["state"][name] == of_processes[0]["state"][name] for name in ("counts", "distance"))
        for prompt, counts in one["state"]["counts"].items():
            assert list(counts) == pytest.approx(table[prompt or "all"], abs=1e-9)
        assert one["state"]["distance"] == pytest.approx(math.sqrt(2 * one["kl"][-1 if one["kl"] else 0]), rel=1e-4)


# ---- stopped and resumed ---------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "case", "options"),
    [
        ("linear_head", "fresh", {"soft_value_offset": True}),
        ("learned", "lora", {}),
        ("tracked", "replay", {}),
        ("tracked", "fresh", {"soft_value_tracks": "value"}),
        ("running_mean", "fresh", {}),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(name, case, options, qwen2, tmp_path):
    """Stopped in update 6 and resumed from checkpoint 3, in the middle of a window: the same bits of everything."""

    def made(folder: str):
        return build_resumable(case, qwen2, tmp_path / folder, soft_value=name, max_steps=8, **options)

    whole = made("whole")  # this seeds the random numbers
    whole.train()
    stopped = made("stopped")
    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert [file.name for file in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = made("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    ends = [dict(flat(outcome(trainer))) for trainer in (whole, resumed)]
    assert [path for path in {**ends[0], **ends[1]} if ends[0].get(path) != ends[1].get(path)] == []
    if name in ("linear_head", "learned"):
        start = made("another")
        assert head_of(resumed) == head_of(whole)
        assert not torch.equal(start._soft_value.head.weight, whole._soft_value.head.weight)
    if "soft_value_offset" in options:
        assert resumed._offset.bias.item() == whole._offset.bias.item() != 0
    if name == "tracked":
        states = [trainer._soft_value.state() for trainer in (whole, resumed)]
        assert states[0] == states[1] and len(states[0]["counts"]) > 3 and states[0]["distance"] > 0
    if name == "running_mean":
        assert resumed._soft_value.totals == whole._soft_value.totals != {}


# ---- a run that is none ----------------------------------------------------------------------------------------------


class FakeRun:
    """Has the protocol's names, and nothing else."""

    def __init__(self, rows: list[dict[str, Any]], trajectories: list[Trajectory]):
        self.train_dataset, self.evaluating = Dataset.from_list(rows), False
        self.tokenizer, self.reference_key, self.rollout_settings = TOKENIZER, "key", {}
        self._trajectories, self._trained = trajectories, []

    @property
    def accelerator(self):
        return Accelerator(cpu=True)

    def counts(self, trajectory):
        return trajectory.reward >= 0

    def logged_trajectories(self):
        return iter(self._trajectories)

    def sample(self, rows):
        return [trajectory(row["prompt"], reward=float(len(row["prompt"]))) for row in rows]

    def replace_prompts(self, dataset):
        self.train_dataset = dataset

    def train_module(self, module, learning_rate):
        self._trained.append((module, learning_rate))

    def value_head(self, learning_rate):
        self.train_module(head := ValueHead(4), learning_rate)
        return head


def trajectory(text: str, reward: float, log_prob: float = -1.0, completion: int = 40) -> Trajectory:
    return Trajectory(
        torch.tensor(TOKENIZER(text)["input_ids"]), torch.tensor([completion]), torch.tensor([True]), reward, End.EOS,
        ref_log_probs=torch.tensor([log_prob]),
    )  # fmt: skip


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


@pytest.fixture
def run() -> FakeRun:
    logged = [trajectory("a", 0.1, -1.0), trajectory("a", 0.2, -2.0, 41), trajectory("a", -1.0, -9.0, 42)]
    return FakeRun([{"prompt": "a"}, {"prompt": "bc"}], logged)


def test_it_has_the_names_of_the_protocol_alone(run):
    assert public({*vars(run), *vars(FakeRun)}) == public({*inspect.get_annotations(Run), *vars(Run)})


def test_optimal_needs_no_more(run, tmp_path):
    """Two samples of each prompt with rewards 1, 1 and 2, 2: their log-mean-exp is 1 and 2."""
    estimator = SoftValue.registry["optimal"](
        config(soft_value="optimal", soft_value_samples=2, output_dir=str(tmp_path))
    )
    estimator.attach(run)
    estimator.prepare(run)
    assert run.train_dataset["optimal_value"] == pytest.approx([1.0, 2.0])
    window = run.sample(run.train_dataset)
    estimator.on_window(window, list(run.train_dataset), 1)
    assert [t.value for t in window] == pytest.approx([1.0, 2.0])


def test_quantile_needs_no_more(run, tmp_path):
    """Two samples of each prompt, both 1 or both 2. They tie: q = 1/2 is the one quantile, and log Z = 1/(2β)."""
    estimator = SoftValue.registry["quantile"](
        config(soft_value="quantile", soft_value_samples=2, output_dir=str(tmp_path), beta=0.1)
    )
    estimator.attach(run)
    estimator.prepare(run)
    assert run.train_dataset["reference_rewards"] == [[1.0, 1.0], [2.0, 2.0]]
    window = run.sample(run.train_dataset)
    estimator.on_window(window, list(run.train_dataset), 1)
    assert [t.value for t in window] == pytest.approx([0.5, 0.5])
    assert [t.reward - t.baseline for t in window] == pytest.approx([0.5, 0.5])


def test_partition_needs_no_more(run):
    """`β log (e^(−1 + 0.1/β) + e^(−2 + 0.2/β))` at β = 0.1: both exponents are 0. The third row does not count."""
    estimator = SoftValue.registry["partition"](config(soft_value="partition", beta=0.1))
    estimator.attach(run)
    estimator.prepare(run)
    window = list(run.logged_trajectories())
    estimator.on_window(window, [{}] * 3, 1)
    assert [t.value for t in window] == pytest.approx([0.1 * math.log(2)] * 3)


def test_model_needs_no_more(run, tmp_path):
    folder = save_value_model(tmp_path / "value")
    run.tokenizer = AutoTokenizer.from_pretrained(folder)
    estimator = SoftValue.registry["model"](config(soft_value="model", soft_value_model=folder))
    estimator.attach(run)
    estimator.prepare(run)
    window = run.sample(run.train_dataset)
    estimator.on_window(window, list(run.train_dataset), 1)
    expected = [estimator.model(t.prompt_ids[None]).logits.item() for t in window]
    assert [t.value for t in window] == pytest.approx(expected) and expected[0] != expected[1]


def test_what_trajectories_say_of_a_prompts_value(run):
    """`R − β log-ratio` of each is β V − β δ. Two windows by hand; ρ = 0.96, since no KL is measured.

    In window 1, V is 0 and the trajectories imply 0.5, 0.1 and 0.3. Over all prompts (n, s) is (0.96 + 3, 0.9). Both
    prompts begin with that mean m = 0.9/3.96 at weight 1, so theirs are (2.96, 0.96 m + 0.6) and (1.96, 0.96 m + 0.3).
    In window 2 the first prompt's trajectory implies its V minus 0.1.
    """
    estimator = SoftValue.registry["tracked"](config(soft_value="tracked", soft_value_tracks="value"))
    estimator.check_data(None, np.ones(3, bool))  # logs alone
    estimator.attach(run)
    a, b, c = (trajectory(text, 0.0) for text in "abc")
    for one in (a, b, c):
        one.source = Source.LOGGED
    estimator.on_window([a, b], [{}] * 2, 1)
    assert a.value == b.value == 0
    estimator.after_update({}, iter([(a, -0.5), (b, -0.3)]))
    estimator.after_update({}, iter([(a, -0.1)]))  # the window again
    estimator.on_window([a, c], [{}] * 2, 1)
    m = 0.9 / 3.96
    assert [a.value, c.value] == pytest.approx([first := (0.96 * m + 0.6) / 2.96, m])
    estimator.after_update({}, iter([(a, 0.1)]))
    estimator.on_update([b])
    assert b.value == pytest.approx((0.96 * m + 0.3) / 1.96)
    estimator.on_window([a], [{}], 1)
    assert a.value == pytest.approx((0.96 * 2.96 * first + first - 0.1) / (0.96 * 2.96 + 1))
    run.evaluating = True
    estimator.on_window([a], [{}], 1)
    assert estimator.earned == []


def test_metrics_are_read_for_those_that_learn_from_updates(llama, tmp_path, monkeypatch):
    """For other estimators an update copies nothing from the device. The last log reads them once."""
    read: list[int] = []
    means = Totals.means
    monkeypatch.setattr(Totals, "means", lambda self: read.append(1) or means(self))
    for name, expected in (("calibrated", 1), ("tracked", 5)):
        trainer = build(llama, tmp_path / name, soft_value=name, max_steps=4, logging_strategy="no")
        trainer._was_advised = True
        read.clear()
        trainer.train()
        assert len(read) == expected, name


@pytest.mark.parametrize(
    "name",
    ["calibrated", "group", "learned", "log_mean_exp", "policy", "tracked", "zero", "linear_head", "running_mean"],
)
def test_the_others_ask_nothing_else(name, run):
    groups = dict(num_generations=2, per_device_train_batch_size=2)
    estimator = SoftValue.registry[name](config(soft_value=name, **groups))
    estimator.attach(run)
    estimator.prepare(run)
    estimator.on_window(window := list(run.logged_trajectories())[:2], [{}] * 2, 2)
    estimator.restore(estimator.state())
    assert [t.value is None for t in window] == [not estimator.gives_constants] * 2
    assert [rate for _, rate in run._trained] == {"linear_head": [RATE], "learned": [0.01]}.get(name, [])
