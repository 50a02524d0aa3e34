"""Each estimator of the soft value in `train()`, against loops in float64, and what each refuses."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from common.tiny import perturb, save_value_model, tokenizer
from datasets import Dataset
from helpers.forked import launch
from helpers.oracle import TOLERANCE, distance, logits_of, plain
from helpers.runs import Update, build, kept_returns, letters, log, one_update
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from tbrm_trl import SoftValue, TBRMConfig, bellman_residual, squared_residual_loss, trajectory_log_ratio
from tbrm_trl.loss.residual import per_action
from tbrm_trl.loss.soft_value import ConstantValue, ValueInputs
from tbrm_trl.loss.soft_value.log_mean_exp import log_mean_exp
from tbrm_trl.loss.soft_value.quantile import log_partition, quantile
from tbrm_trl.model.value_head import ValueHead
from tbrm_trl.trajectory import Trajectory

BETA = 0.1


@dataclass
class Parts:
    """The terms of a residual, float64, in nats."""

    value: torch.Tensor
    ref_value: torch.Tensor
    log_ratio: torch.Tensor


def parts(seen: Update, trajectory: Trajectory) -> Parts:
    logits = logits_of(seen.policy, trajectory, 1.0)
    with torch.no_grad():
        ref_logits = logits_of(seen.reference, trajectory, 1.0)
    prompt = len(trajectory.prompt_ids)
    chosen = [h for h in range(len(trajectory.completion_ids)) if trajectory.loss_mask[h]]
    log_ratio = 0.0
    for h in chosen:
        state, token = prompt + h - 1, int(trajectory.completion_ids[h])
        log_ratio = log_ratio + logits[state].log_softmax(-1)[token] - ref_logits[state].log_softmax(-1)[token]
    first = prompt + chosen[0] - 1
    return Parts(logits[first].logsumexp(-1), ref_logits[first].logsumexp(-1), log_ratio)


def by_prompt(trajectories) -> dict[tuple, list[Trajectory]]:
    groups = defaultdict(list)
    for trajectory in trajectories:
        groups[tuple(trajectory.prompt_ids.tolist())].append(trajectory)
    return groups


def solve(seen: Update, values) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the mean of (β δ)², V in nats from `values(trajectory, its parts)`."""
    seen.policy.zero_grad()
    counted, loss = seen.counted, 0.0
    for trajectory in counted:
        of = parts(seen, trajectory)
        delta = values(trajectory, of) + of.log_ratio - trajectory.reward / BETA
        term = (BETA * delta) ** 2 / len(counted)
        term.backward()
        loss += term.item()
    return loss, {name: p.grad for name, p in seen.policy.named_parameters()}


def check(seen: Update, values) -> None:
    loss, gradient = solve(seen, values)
    assert loss > 1e-4 and seen.loss == pytest.approx(loss, rel=TOLERANCE)
    assert distance(seen.gradient, gradient) <= TOLERANCE


def group_value(seen: Update, trajectory: Trajectory) -> float:
    group = by_prompt(seen.counted)[tuple(trajectory.prompt_ids.tolist())]
    with torch.no_grad():
        return sum(t.reward / BETA - parts(seen, t).log_ratio.item() for t in group) / len(group)


@pytest.mark.parametrize("options", [{}, {"token_fraction": 0.5}], ids=str)
def test_learned(options, llama, tmp_path):
    """A head with another value in every s_1. It changes no logit: V is a constant for the policy.

    Adam's first step moves each weight by the learning rate, or by nothing where it has no gradient.
    """

    def watch(trainer):
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer._soft_value.head.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        kept.update({name: p.detach().clone() for name, p in trainer._soft_value.head.named_parameters()})

    kept: dict[str, torch.Tensor] = {}
    seen = one_update(
        llama, tmp_path, None, None, watch, soft_value="learned", soft_value_learning_rate=0.03, **options
    )

    def value(trajectory, of):
        ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])[None]
        s_1 = len(trajectory.prompt_ids) + trajectory.loss_mask.tolist().index(True) - 1
        with torch.no_grad():
            hidden = seen.policy.base_model(ids).last_hidden_state[0, s_1]
        return (hidden / hidden.abs().sum() @ kept["weight"].double() + kept["bias"].double()) / BETA

    assert len({round(float(value(t, None)), 3) for t in seen.counted}) > 2
    if options:  # the gradient of the policy is that of a draw; the value's is exact
        assert seen.loss == pytest.approx(solve(seen, value)[0], rel=TOLERANCE)
    else:
        check(seen, value)
    for name, after in seen.trainer._soft_value.head.named_parameters():
        torch.testing.assert_close((after - kept[name]).abs(), torch.full_like(after, 0.03), rtol=1e-3, atol=0)


@pytest.mark.parametrize("soft_value", ["policy", "group"])
def test_length_normalized(soft_value, llama, tmp_path):
    """The log-ratio per action, in a group's mean too; inserted tokens are no actions."""
    groups = {"num_generations": 2} if soft_value == "group" else {}
    seen = one_update(llama, tmp_path, soft_value=soft_value, length_normalized=True, **groups)

    def mean_ratio(trajectory):
        return parts(seen, trajectory).log_ratio / int(trajectory.loss_mask.sum())

    def value(trajectory, of):
        if soft_value == "policy":
            own = of.value
        else:
            group = by_prompt(seen.counted)[tuple(trajectory.prompt_ids.tolist())]
            with torch.no_grad():
                own = sum(t.reward / BETA - mean_ratio(t).item() for t in group) / len(group)
        return own + of.log_ratio / int(trajectory.loss_mask.sum()) - of.log_ratio  # in the place of the sum

    assert len({int(t.loss_mask.sum()) for t in seen.counted}) > 2
    check(seen, value)


@pytest.mark.parametrize("soft_value", ["policy", "optimal"])
def test_offset(soft_value, llama, tmp_path):
    """A constant of 0.3 in reward units; Adam's first step moves it by the learning rate against the mean residual."""

    def watch(trainer):
        trainer._offset.bias.data.fill_(0.3)

    rows = [{**row, "optimal_value": 0.1} for row in log()] if soft_value == "optimal" else None
    seen = one_update(
        llama, tmp_path, rows, None, watch, soft_value=soft_value, soft_value_offset=True, soft_value_learning_rate=0.02
    )
    check(seen, lambda t, of: (of.value if soft_value == "policy" else 0.1 / BETA) + 0.3 / BETA)
    metrics = seen.trainer.state.log_history[0]
    moved = math.copysign(0.02, -metrics["residual/mean"])
    assert metrics["soft_value_offset"] == pytest.approx(0.3 + moved, rel=1e-4)


def test_zero(llama, tmp_path):
    check(one_update(llama, tmp_path, soft_value="zero"), lambda t, of: 0.0)


# ---- groups under the current policy -------------------------------------------------------------------------------


def test_group(llama, tmp_path):
    seen = one_update(llama, tmp_path, soft_value="group", num_generations=2)
    assert sorted(map(len, by_prompt(seen.counted).values())) == [2, 2, 2, 2]
    check(seen, lambda t, of: group_value(seen, t))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_group_split_over_micro_batches(size, llama, tmp_path):
    """Groups of 3 in micro-batches of 1, 2, 3 and 6. If a group is split, an extra pass gives the same value."""
    rows = log(prompts=2, each=3)
    options = dict(soft_value="group", num_generations=3, gradient_accumulation_steps=6 // size)
    seen = one_update(llama, tmp_path, rows, per_device_train_batch_size=size, **options)
    assert (seen.rows[0].value is None) is (size % 3 == 0)
    check(seen, lambda t, of: group_value(seen, t))


def test_a_group_with_one_scored_row_leaves_the_loss(llama, tmp_path):
    """One of 4 pairs has a row without a score: 6 rows count, one is `unscored`, and its partner has `no_value`."""
    rows = log(unscored=(3,))
    seen = one_update(
        llama, tmp_path, rows, lambda prompts, **kwargs: [None] * len(prompts), soft_value="group", num_generations=2
    )
    metrics = seen.trainer.state.log_history[0]
    assert (metrics["left_out/unscored"], metrics["left_out/no_value"]) == (1 / 8, 1 / 8)
    assert len(seen.counted) == 6
    check(seen, lambda t, of: group_value(seen, t))


def test_pairs_are_rebel(llama, tmp_path):
    """REBEL squares `β (log-ratio_1 − log-ratio_2) − (r_1 − r_2)`: of a pair, four times the group's mean square."""
    seen = one_update(llama, tmp_path, soft_value="group", num_generations=2)
    seen.policy.zero_grad()
    loss = 0.0
    for first, second in by_prompt(seen.counted).values():
        of = parts(seen, first).log_ratio - parts(seen, second).log_ratio
        pair = (BETA * of - (first.reward - second.reward)) ** 2 / 4  # mean over 4 pairs
        pair.backward()
        loss += pair.item()
    assert seen.loss == pytest.approx(loss / 4, rel=TOLERANCE)
    expected = {name: p.grad / 4 for name, p in seen.policy.named_parameters()}
    assert distance(seen.gradient, expected) <= TOLERANCE


def test_variance_with_gradient_in_the_mean(llama, tmp_path):
    """VarGrad's variance, `1/k Σ (d − mean d)²`, differentiated through the mean too; GVPO's is k/(k − 1) of it."""
    k = 4
    seen = one_update(llama, tmp_path, log(prompts=2, each=k), soft_value="group", num_generations=k)
    seen.policy.zero_grad()
    loss = 0.0
    for group in by_prompt(seen.counted).values():
        d = torch.stack([BETA * parts(seen, t).log_ratio - t.reward for t in group])
        gvpo = (d - d.mean()).square().sum() / (k - 1) / 2  # mean over 2 groups
        gvpo.backward()
        loss += gvpo.item()
    assert seen.loss == pytest.approx(loss * (k - 1) / k, rel=TOLERANCE)
    expected = {name: p.grad * (k - 1) / k for name, p in seen.policy.named_parameters()}
    assert distance(seen.gradient, expected) <= TOLERANCE


class OfItsProcess:
    """A reward with a value that differs from process to process, as a connection or a folder of its own would."""

    __name__ = "letters"

    def __init__(self):
        self.process = os.getpid()

    def __call__(self, completions, **columns):
        return letters(completions)


def group_and_sample(folder: str, out: str) -> dict[str, Any]:
    """Train on groups of logged pairs, then sample optimal values. Returns what both processes saw."""
    options = dict(beta=0.1, learning_rate=0.0, max_steps=1, max_grad_norm=0.0)
    grouped = build(
        folder, Path(out) / "group", None, Dataset.from_list(log()), soft_value="group", num_generations=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, **options,
    )  # fmt: skip
    perturb(grouped.accelerator.unwrap_model(grouped.model))
    updates = kept_returns(grouped, "_collect")
    grouped.train()
    rows, losses = gather_object(updates[0]), gather_object([grouped.state.log_history[0]["loss"]])

    sampled = build(
        folder, Path(out) / "optimal", OfItsProcess(), PROMPTS, soft_value="optimal", soft_value_samples=4,
        per_device_train_batch_size=2, max_steps=1,
    )  # fmt: skip
    sampled.train()
    return {
        "rows": rows,
        "losses": losses,
        "gradient": grouped.recorder.gradients[0],
        "policy": grouped.accelerator.unwrap_model(grouped.model).state_dict(),
        "columns": gather_object([sampled.train_dataset["optimal_value"]]),
        "values": gather_object([[t.value for t in sampled.windows[-1]]]),
    }


def test_two_processes(llama, tmp_path):
    """A pair on each process and in micro-batches of one row; prompts are sampled in blocks of both processes."""
    seen = launch("test_soft_values:group_and_sample", folder=llama, out=tmp_path)[0]
    policy = AutoModelForCausalLM.from_pretrained(llama)
    policy.load_state_dict(seen["policy"])
    reference = plain(AutoModelForCausalLM.from_pretrained(llama))
    both = Update(seen["losses"][0], seen["gradient"], seen["rows"], plain(policy), reference)
    assert len(both.counted) == 8 and sorted(map(len, by_prompt(both.counted).values())) == [2, 2, 2, 2]
    assert all(row.value is not None for row in both.rows)
    check(both, lambda t, of: group_value(both, t))

    first, second = seen["columns"]
    assert first == second and len(first) == 6 and len(set(first)) > 2
    assert {value for values in seen["values"] for value in values} <= set(first)


def test_groups_are_replayed_whole(llama, tmp_path):
    trainer = build(
        llama, tmp_path, soft_value="group", num_generations=2, per_device_train_batch_size=4, max_steps=6,
        num_iterations=3, replay_buffer_size=8,
    )  # fmt: skip
    updates = kept_returns(trainer, "_collect")
    trainer.train()
    pairs = [pair for rows in updates for pair in zip(rows[::2], rows[1::2], strict=True)]
    replayed = [(a, b) for a, b in pairs if a.origin == b.origin == "replayed"]
    assert len(replayed) == 8  # two pairs in each of four replay updates
    for a, b in replayed:
        assert (
            a.trajectory is not b.trajectory and a.trajectory.group_id == b.trajectory.group_id and a.group == b.group
        )


# ---- constants of the group ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_value_beta", [None, 1.0, math.inf])
def test_log_mean_exp(soft_value_beta, llama, tmp_path):
    seen = one_update(
        llama, tmp_path, soft_value="log_mean_exp", num_generations=2, soft_value_beta=soft_value_beta
    )  # fmt: skip
    b = soft_value_beta or BETA

    def value(trajectory, of):
        rewards = [t.reward for t in by_prompt(seen.counted)[tuple(trajectory.prompt_ids.tolist())]]
        if math.isinf(b):
            return sum(rewards) / 2 / BETA
        return b * math.log(sum(math.exp(r / b) for r in rewards) / 2) / BETA

    check(seen, value)


def test_log_mean_exp_by_hand():
    """r = 0 and ln 3 at β₁ = 1: log((1 + 3)/2) = log 2; at ∞ the mean; near 0 the largest."""
    rewards = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    assert log_mean_exp(rewards, 1.0).item() == pytest.approx(math.log(2), abs=1e-15)
    assert log_mean_exp(rewards, math.inf).item() == rewards.mean().item()
    assert log_mean_exp(rewards, 1e-6).item() == pytest.approx(math.log(3), abs=1e-5)


# ---- constants of the prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_normalized", [False, True])
def test_partition(self_normalized, llama, tmp_path):
    """Over the distinct completions of a prompt: a repeated one is one term of the sum, with its mean reward."""
    rows = log(prompts=2, each=3)
    repeated = {**rows[0], "reward": rows[0]["reward"] + 0.5}
    rows = [*rows, repeated, {**rows[1]}]
    seen = one_update(llama, tmp_path, rows, soft_value="partition", soft_value_self_normalized=self_normalized)
    assert len(seen.counted) == 8
    ids = list(rows[0]["prompt_ids"]), list(rows[0]["completion_ids"])

    def value(trajectory, of):
        terms, mass, done = [], [], set()
        for t in by_prompt(seen.counted)[tuple(trajectory.prompt_ids.tolist())]:
            completion = tuple(t.completion_ids.tolist())
            if completion in done:
                continue
            done.add(completion)
            is_repeated = (t.prompt_ids.tolist(), list(completion)) == ids
            reward = rows[0]["reward"] + 0.25 if is_repeated else t.reward
            logits = logits_of(seen.reference, t, 1.0).detach()
            log_prob = sum(
                logits[len(t.prompt_ids) + h - 1].log_softmax(-1)[token].item()
                for h, token in enumerate(completion)
                if t.loss_mask[h]
            )
            terms.append(math.exp(log_prob + reward / BETA))
            mass.append(math.exp(log_prob))
        return math.log(sum(terms) / (sum(mass) if self_normalized else 1))

    check(seen, value)


def test_quantiles_by_hand():
    """Of 0.2, 0.5, 0.9: none below 0.1, all below 1; 0.5 has one below and itself. Of 0, 0, 0, 1: 3/8 and 7/8."""
    distinct, ties = torch.tensor([0.5, 0.2, 0.9]).double(), torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    assert [quantile(r, distinct) for r in (0.1, 0.3, 0.5, 1.0)] == pytest.approx([0, 1 / 3, 1 / 2, 1])
    assert [quantile(r, ties) for r in (0.0, 1.0)] == [3 / 8, 7 / 8]
    assert quantile(torch.tensor(0.9).item(), distinct) == pytest.approx(5 / 6)  # as a reward function's 0.9 is read
    assert log_partition(distinct, 0.5) == pytest.approx(math.log(0.5 * (math.exp(2) - 1)), abs=1e-14)
    assert log_partition(distinct, 0.001) == pytest.approx(1000 + math.log(0.001), abs=1e-9)  # e^1000 is no float
    expected = math.log(0.75 * math.exp(3 / 4) + 0.25 * math.exp(7 / 4))
    assert log_partition(ties, 0.5) == pytest.approx(expected, abs=1e-14)


def test_quantile(llama, tmp_path):
    """QRPO's published loss, `(q − β log Z − β log-ratio)²`: with ties on every second prompt."""
    given = ([-1.0, -0.3, 0.3, 0.8], [0.0, 0.0, 1.0, -1.0])
    rows = [{**row, "reference_rewards": given[len(row["prompt_ids"]) % 2]} for row in log()]
    seen = one_update(llama, tmp_path, rows, soft_value="quantile")
    assert len(seen.counted) == 8 and {len(t.prompt_ids) % 2 for t in seen.counted} == {0, 1}

    def value(trajectory, of):
        samples = given[len(trajectory.prompt_ids) % 2]

        def rank(r):
            return sum((s < r) + (s == r) / 2 for s in samples) / len(samples)

        uniform = math.log(BETA * (math.exp(1 / BETA) - 1))
        log_z = uniform if samples is given[0] else math.log(sum(math.exp(rank(s) / BETA) for s in samples) / 4)
        return log_z + (trajectory.reward - rank(trajectory.reward)) / BETA  # q in the place of R

    check(seen, value)


def test_optimal_from_a_column(llama, tmp_path):
    rows = [{**row, "optimal_value": 0.1 * len(row["prompt_ids"])} for row in log()]
    seen = one_update(llama, tmp_path, rows, soft_value="optimal")
    check(seen, lambda t, of: 0.1 * len(t.prompt_ids) / BETA)


def test_optimal_is_a2pos_loss(llama, tmp_path):
    """TRL's experimental A*-PO on the same trajectories: `(β₂ log-ratio − (r − V*))²`, its loss with β₂ = β.

    Intended differences, none of which shows here: A2PO drops prompts whose samples all fail by default (here
    `soft_value_drop_unsolved`), sums over inserted tokens too, finds V* by the prompt's text (here by the row), takes
    the mean of each micro-batch (here of the update), and its temperature does not enter the log-probabilities.
    """
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    rows = [{**row, "loss_mask": None, "optimal_value": 0.3} for row in log()]
    seen = one_update(llama, tmp_path, rows, soft_value="optimal")
    peer = object.__new__(A2POTrainer)
    peer.args = object.__new__(A2POConfig)
    peer.args.beta2 = BETA
    peer.model_kwarg_keys = {"logits_to_keep"}
    peer._metrics = {"train": defaultdict(list)}
    peer.model = seen.policy.train()
    peer.accelerator = seen.trainer.accelerator
    seen.policy.zero_grad()
    total = 0.0
    for trajectory in seen.counted:  # one by one, so that nothing is padded
        ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])[None]
        keep = len(trajectory.completion_ids)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            ref_logps = peer._get_sequence_logps(seen.reference, ids, mask, keep)
        inputs = {
            "input_ids": ids, "attention_mask": mask, "logits_to_keep": keep, "ref_logps": ref_logps,
            "rewards": torch.tensor([trajectory.reward]).double(), "v_star": torch.tensor([0.3]).double(),
        }  # fmt: skip
        loss = peer.compute_loss(seen.policy, inputs) / len(seen.counted)
        loss.backward()
        total += loss.item()
    assert seen.loss == pytest.approx(total, rel=TOLERANCE)
    assert distance(seen.gradient, {name: p.grad for name, p in seen.policy.named_parameters()}) <= TOLERANCE


PROMPTS = Dataset.from_list([{"prompt": text} for text in ("1+1=", "Say: ab", "c", "What? ", "longer", "x y")])


def test_optimal_by_sampling(llama, tmp_path):
    """V̂* of 4 samples per prompt is kept on disk. A second run reads it and samples nothing, and trains the same."""
    options = dict(
        soft_value="optimal", soft_value_samples=4, soft_value_beta=0.5, per_device_train_batch_size=3, max_steps=2
    )
    first = build(llama, tmp_path, letters, PROMPTS, **options)
    first.train()
    [file] = (tmp_path / "out" / "optimal_values").glob("*.parquet")
    rewards = Dataset.from_parquet(str(file), cache_dir=str(tmp_path))["rewards"]
    assert [len(row) for row in rewards] == [4] * 6 and len({tuple(row) for row in rewards}) > 3
    for value, row in zip(first.train_dataset["optimal_value"], rewards, strict=True):
        assert value == pytest.approx(0.5 * math.log(sum(math.exp(r / 0.5) for r in row) / 4))
    sampled = sum(len(window) for window in first.windows) - 2 * 3
    assert sampled == 6 * 4
    by_prompt_ids = {tuple(map(ord, row["prompt"])): row["optimal_value"] for row in first.train_dataset}
    for trajectory in first.windows[-1]:
        text = tuple(map(ord, first.processing_class.decode(trajectory.prompt_ids, skip_special_tokens=True)))
        assert trajectory.value == by_prompt_ids[text]

    again = build(llama, tmp_path, letters, PROMPTS, **options)
    again.train()
    assert sum(len(window) for window in again.windows) == 2 * 3
    assert again.losses == first.losses  # sampling left no trace in training's random numbers
    other = build(llama, tmp_path, letters, PROMPTS, **{**options, "soft_value_samples": 2})
    other.train()
    assert len(list((tmp_path / "out" / "optimal_values").glob("*.parquet"))) == 2


def test_optimal_goes_on_where_it_was_interrupted(llama, tmp_path):
    """Blocks of one prompt (4 samples, windows of 3). After a kill in the fourth, the next run samples the rest."""
    options = dict(soft_value="optimal", soft_value_samples=4, per_device_train_batch_size=3, max_steps=1)
    state = SimpleNamespace(calls=[], dies=True)  # a list would be a value, and make it another reward function

    def counted(completions, **kwargs):
        state.calls.append(len(completions))
        if state.dies and len(state.calls) == 7:
            raise KeyboardInterrupt
        return letters(completions)

    with pytest.raises(KeyboardInterrupt):
        build(llama, tmp_path, counted, PROMPTS, **options).train()
    assert state.calls == [3, 1] * 3 + [3]
    state.calls, state.dies = [], False
    resumed = build(llama, tmp_path, counted, PROMPTS, **options)
    resumed.train()
    assert state.calls == [3, 1] * 3 + [3]
    whole = build(llama, tmp_path / "whole", letters, PROMPTS, **options)
    whole.train()
    assert resumed.train_dataset["optimal_value"] == whole.train_dataset["optimal_value"]


def test_another_reward_or_template_is_sampled_again(llama, tmp_path):
    """The name on disk depends on what the functions do, not on their names."""
    options = dict(soft_value="optimal", soft_value_samples=2, per_device_train_batch_size=3, max_steps=1)

    def reward(completions, **kwargs):
        return [0.0] * len(completions)

    first = build(llama, tmp_path, reward, PROMPTS, **options)
    first.train()

    def reward(completions, **kwargs):
        return [1.0] * len(completions)

    second = build(llama, tmp_path, reward, PROMPTS, **options)
    second.train()
    assert set(first.train_dataset["optimal_value"]) == {0.0}
    assert second.train_dataset["optimal_value"] == pytest.approx([1.0] * 6)
    unlike = build(llama, tmp_path, reward, PROMPTS, **options)
    unlike.chat_template = "{{ messages }}"
    unlike.train()
    assert len(list((tmp_path / "out" / "optimal_values").glob("*.parquet"))) == 3


def test_prompts_cut_otherwise_and_failures_rewarded_otherwise_are_sampled_again(llama, tmp_path):
    """The samples on disk are only for these prompts with these rewards."""
    options = dict(soft_value="optimal", soft_value_samples=2, per_device_train_batch_size=3, max_steps=1)

    def rewarded_or_not(completions, **kwargs):
        if kwargs["trainer_state"].global_step == 0:
            raise ConnectionError("the judge is away")
        return [0.0] * len(completions)

    for count, changes in enumerate(
        ({}, {"long_prompts": "cut", "max_prompt_length": 2}, {"long_prompts": "cut", "max_prompt_length": 1}), start=1
    ):
        build(llama, tmp_path / "cut", letters, PROMPTS, **options, **changes).train()
        assert len(list((tmp_path / "cut" / "out" / "optimal_values").glob("*.parquet"))) == count
    for failed in (-1.0, -2.0):
        trainer = build(llama, tmp_path / "failed", rewarded_or_not, PROMPTS, reward_on_error=failed, **options)
        trainer.train()
        assert trainer.train_dataset["optimal_value"] == pytest.approx([failed] * 6)


def test_failures_in_sampling_the_reference_are_not_those_of_training(llama, tmp_path):
    """The function raises for every sample and for no rollout."""
    asked = []

    def flaky(completions, **kwargs):
        asked.append(len(completions))
        if len(asked) <= 6:
            raise ConnectionError("the judge is away")
        return [0.5] * len(completions)

    trainer = build(
        llama, tmp_path, flaky, PROMPTS, soft_value="optimal", soft_value_samples=4, reward_on_error=0.0,
        per_device_train_batch_size=6, logging_steps=1, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert asked == [4] * 6 + [6]  # a prompt's samples at a time, then the rollouts
    assert trainer.state.log_history[0]["rewards/flaky/raised"] == 0.0


def test_unsolved_prompts_can_be_dropped(llama, tmp_path):
    def only_some(prompts, **kwargs):
        return [float(prompt in ("c", "x y", "longer")) for prompt in prompts]

    trainer = build(
        llama, tmp_path, only_some, PROMPTS, soft_value="optimal", soft_value_samples=2, soft_value_drop_unsolved=True,
        per_device_train_batch_size=3, max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.train_dataset["prompt"] == ["c", "longer", "x y"]
    trained = {trainer.processing_class.decode(t.prompt_ids) for window in trainer.windows[-3:] for t in window}
    assert trained == {"c", "x y", "longer"}


def test_too_few_solved_prompts(llama, tmp_path):
    trainer = build(
        llama, tmp_path, lambda prompts, **kwargs: [float(p == "c") for p in prompts], PROMPTS, soft_value="optimal",
        soft_value_samples=2, soft_value_drop_unsolved=True, per_device_train_batch_size=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="leaves 1 of 6 prompts, fewer than the 3 of one generation window"):
        trainer.train()


def test_what_leaves_the_loss_leaves_the_sum(llama, tmp_path):
    """A logged row without an action would count in the partition function with π_ref = exp(0) = 1."""
    rows = log(prompts=2, each=3)
    idle = {**rows[0], "loss_mask": [0] * len(rows[0]["loss_mask"]), "completion_ids": [5] * len(rows[0]["loss_mask"])}
    values = []
    for data in ([*rows, *rows[:2]], [*rows, idle, rows[1]]):
        seen = one_update(llama, tmp_path, data, soft_value="partition")
        values.append({round(t.value, 6) for t in seen.counted})
    assert values[0] == values[1] and len(values[0]) == 2


def test_a_value_that_is_not_a_number_leaves_the_loss(llama, tmp_path):
    class SomeNaN(ConstantValue):
        name = "some_nan"

        def on_window(self, trajectories, rows, group_size):
            for place, trajectory in enumerate(trajectories):
                trajectory.value = math.nan if place == 2 else 0.0

    try:
        seen = one_update(llama, tmp_path, soft_value="some_nan")
    finally:
        del SoftValue.registry["some_nan"]
    assert len(seen.counted) == 7
    check(seen, lambda t, of: 0.0)


def test_whole_groups_in_evaluation(llama, tmp_path):
    with pytest.raises(ValueError, match="per_device_eval_batch_size=3 does not hold whole groups of 2"):
        build(
            llama, tmp_path, letters, PROMPTS, soft_value="group", num_generations=2, per_device_eval_batch_size=3,
            eval_dataset=PROMPTS,
        )  # fmt: skip


def test_model(llama, tmp_path):
    """A value model scores the tokens up to s_1, inserted ones included."""
    of_values = save_value_model(tmp_path / "value", "llama")
    seen = one_update(llama, tmp_path, soft_value="model", soft_value_model=of_values)
    value_model = LlamaForSequenceClassification.from_pretrained(of_values).double()

    def value(trajectory, of):
        first = trajectory.loss_mask.tolist().index(True)
        ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids[:first]])[None]
        return value_model(ids).logits.item() / BETA

    assert len({round(value(t, None), 4) for t in seen.counted}) > 2
    check(seen, value)


# ---- identities, float64 throughout: the library's own functions against each method's loss as published -----------


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs, retain_graph=True)])


def random_rows(soft_value: str, group: list[int], seed: int = 0, **changes):
    """ValueInputs of 12 trajectories in float64, and the residual of `soft_value` on them."""
    draw = torch.Generator().manual_seed(seed)
    numbers = {
        name: torch.randn(12, generator=draw, dtype=torch.float64)
        for name in ("policy_value", "ref_value", "log_ratio", "reward", "value")
    }
    numbers["log_ratio"].requires_grad_()
    numbers |= {"hidden": torch.zeros(12, 4), **changes}
    rows = ValueInputs(**numbers, group=torch.tensor(group), counted=torch.ones(12, dtype=torch.bool), beta=BETA)
    value = SoftValue.registry[soft_value](None)(rows)
    return rows, bellman_residual(value, rows.log_ratio, rows.reward, BETA)


EXACTLY = dict(rtol=1e-12, atol=1e-12)


def test_dro_v_is_learned():
    """`(R − V_φ − β log-ratio)²` (arXiv 2405.19107, with its factor 1/2 left out), in the policy and in the head."""
    rows, _ = random_rows("zero", [0] * 12, hidden=torch.randn(12, 4, dtype=torch.float64))
    head = ValueHead(4).double()
    for parameter in head.parameters():
        parameter.data.normal_()
    estimator = SoftValue.registry["learned"](TBRMConfig("unused", use_cpu=True, bf16=False, soft_value="learned"))
    estimator.attach(SimpleNamespace(value_head=lambda learning_rate: head))
    residual = bellman_residual(estimator(rows), rows.log_ratio, rows.reward, BETA)
    ours = squared_residual_loss(BETA * residual, rows.counted, 12)
    value = (rows.hidden / rows.hidden.abs().sum(dim=1, keepdim=True)) @ head.weight + head.bias
    theirs = (rows.reward - value - BETA * rows.log_ratio).square().mean()
    inputs = (rows.log_ratio, head.weight, head.bias)
    torch.testing.assert_close(ours, theirs, **EXACTLY)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs), **EXACTLY)


def test_rebel_copg_vargrad_and_gvpo_are_group():
    rows, residual = random_rows("group", [0, 1, 2, 3, 4, 5] * 2)
    ours = squared_residual_loss(BETA * residual, rows.counted, 12)
    d = BETA * rows.log_ratio - rows.reward  # (12,) rows i and i + 6 are a pair
    rebel = (d[:6] - d[6:]).square().mean()  # also CoPG's, with another reference
    torch.testing.assert_close(4 * ours, rebel, **EXACTLY)
    torch.testing.assert_close(4 * gradients(ours, rows.log_ratio), gradients(rebel, rows.log_ratio), **EXACTLY)

    rows, residual = random_rows("group", [0, 1, 2] * 4)
    ours = squared_residual_loss(BETA * residual, rows.counted, 12)
    d = (BETA * rows.log_ratio - rows.reward).reshape(4, 3)  # (k, groups)
    vargrad, gvpo = d.var(dim=0, correction=0).mean(), d.var(dim=0, correction=1).mean()
    torch.testing.assert_close(ours, vargrad, **EXACTLY)
    torch.testing.assert_close(4 / 3 * ours, gvpo, **EXACTLY)
    torch.testing.assert_close(gradients(ours, rows.log_ratio), gradients(vargrad, rows.log_ratio), **EXACTLY)
    torch.testing.assert_close(4 / 3 * gradients(ours, rows.log_ratio), gradients(gvpo, rows.log_ratio), **EXACTLY)


def test_policy_is_algorithm_1():
    """`logit(s_1, a_1) + Σ_{h≥2} log π − log π_ref − R/β`: V_θ(s_1) + log π(a_1) is the raw logit of the first "
    "token."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 5, 7, generator=draw, dtype=torch.float64).requires_grad_()  # (B, T, vocabulary)
    actions = torch.randint(7, (12, 5), generator=draw)
    ref_log_probs = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    log_probs = logits.log_softmax(dim=-1).gather(2, actions[:, :, None])[:, :, 0]  # (B, T)
    log_ratio = trajectory_log_ratio(log_probs, ref_log_probs, torch.ones_like(actions))
    value = logits[:, 0].logsumexp(dim=-1)
    rows, residual = random_rows("policy", [0] * 12, policy_value=value, log_ratio=log_ratio)
    ours = squared_residual_loss(residual, rows.counted, 12)
    first = logits[:, 0].gather(1, actions[:, :1])[:, 0]
    theirs = (first + log_probs[:, 1:].sum(dim=1) - ref_log_probs.sum(dim=1) - rows.reward / BETA).square().mean()
    torch.testing.assert_close(ours, theirs, **EXACTLY)
    torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits), **EXACTLY)


def test_a2po_is_optimal():
    """TRL's experimental A2POTrainer on tensors of ours: its β₂ is β, its loss in reward units, its mean over rows."""
    from trl.experimental.a2po import A2POTrainer

    rows, residual = random_rows("optimal", [0] * 12)
    ours = squared_residual_loss(BETA * residual, rows.counted, 12)
    peer = object.__new__(A2POTrainer)
    peer.args = SimpleNamespace(beta2=BETA)
    peer.model = torch.nn.Linear(1, 1)
    peer._metrics = {"train": defaultdict(list)}
    peer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    ref_logps = torch.randn(12, dtype=torch.float64)
    peer._get_sequence_logps = lambda *args: rows.log_ratio + ref_logps
    inputs = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
    inputs |= {"ref_logps": ref_logps, "rewards": rows.reward, "v_star": rows.value}
    theirs = peer.compute_loss(peer.model, inputs)
    torch.testing.assert_close(ours, theirs, **EXACTLY)
    torch.testing.assert_close(gradients(ours, rows.log_ratio), gradients(theirs, rows.log_ratio), **EXACTLY)


def test_flowrl_is_learned_and_normalised():
    """`(log Z_φ + log π/|y| − log π_ref/|y| − β r)²` (arXiv 2509.15207, at importance weight 1): its β is 1/β here."""
    draw = torch.Generator().manual_seed(2)
    log_probs, ref_log_probs = torch.randn(2, 12, 5, generator=draw, dtype=torch.float64)
    log_probs.requires_grad_()
    mask = torch.rand(12, 5, generator=draw) < 0.6
    mask[:, 0] = True
    log_ratio = per_action(trajectory_log_ratio(log_probs, ref_log_probs, mask), mask)
    log_z = torch.randn(12, generator=draw, dtype=torch.float64).requires_grad_()
    rows, residual = random_rows("policy", [0] * 12, policy_value=log_z, log_ratio=log_ratio)
    ours = squared_residual_loss(residual, rows.counted, 12)
    theirs = 0.0
    for b in range(12):
        length = int(mask[b].sum())
        policy, reference = log_probs[b][mask[b]].sum() / length, ref_log_probs[b][mask[b]].sum() / length
        theirs = theirs + (log_z[b] + policy - (1 / BETA) * rows.reward[b] - reference) ** 2 / 12
    torch.testing.assert_close(ours, theirs, **EXACTLY)
    torch.testing.assert_close(gradients(ours, log_probs, log_z), gradients(theirs, log_probs, log_z), **EXACTLY)


def test_spo_is_tracked_with_the_kl_in_the_reward():
    """SPO's policy gradient `−E[A ∇log π]`, `A = r − v̂` (arXiv 2509.13232, before its batch normalisation).

    At π = π_ref it is half the gradient of `(βδ)²` per β; elsewhere r is the regularised reward `r − β log-ratio`.
    """
    rows, residual = random_rows("tracked", [0] * 12)
    ours = squared_residual_loss(BETA * residual, rows.counted, 12)
    advantage = (rows.reward - BETA * rows.log_ratio - rows.value).detach()
    theirs = -(advantage * rows.log_ratio).mean()  # ∇log-ratio is ∇log π
    expected = 2 * BETA * gradients(theirs, rows.log_ratio)
    torch.testing.assert_close(gradients(ours, rows.log_ratio), expected, **EXACTLY)


def test_a_tracked_value_descends_dro_vs_square():
    """`½ (r − V(x) − β log-ratio)²` (DRO-V, arXiv 2405.19107) with a number V(x) for each prompt.

    A window moves V by a gradient step at rate η = k/(ρ n + k), for its k trajectories and ρ = 0.96 of n before.
    """
    rows, residual = random_rows("tracked", [0] * 12)
    value = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    said = (rows.reward - BETA * rows.log_ratio).detach()
    ((said - value).square() / 2).mean().backward()

    args = TBRMConfig("unused", use_cpu=True, bf16=False, soft_value="tracked", soft_value_tracks="value")
    estimator = SoftValue.registry["tracked"](args)
    estimator.prepare(None)
    number, rate = 5.0, 12 / (0.96 * 5.0 + 12)
    estimator.counts["x"] = (number, number * value.item(), 0.0)
    window = [SimpleNamespace(prompt_key="x", value=given) for given in rows.value.tolist()]
    estimator.after_update({}, zip(window, (BETA * residual).tolist(), strict=True))
    estimator._count()
    assert estimator._value("x") == pytest.approx((value - rate * value.grad).item(), abs=1e-12)


# ---- nothing to learn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_value", ["calibrated", "zero", "group", "log_mean_exp", "optimal"])
def test_without_reward_the_reference_is_the_optimum(soft_value, llama, tmp_path):
    """R = 0 at θ = θ_ref: |β δ| below 1e-6, and a step of SGD moves no parameter by more than 1e-7."""
    rows = [{**row, "reward": 0.0} for row in log()]
    if soft_value == "optimal":
        rows = [{**row, "optimal_value": 0.0} for row in rows]
    trainer = build(
        llama, tmp_path, None, Dataset.from_list(rows), soft_value=soft_value, max_steps=1, learning_rate=0.1,
        optim="sgd", num_generations=2, per_device_train_batch_size=8, max_grad_norm=0.0,
    )  # fmt: skip
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.log_history[0]["residual/rms"] < 1e-6
    assert max((a - b).abs().max().item() for a, b in zip(start, trainer.model.parameters(), strict=True)) < 1e-7


def test_with_the_policys_value_it_is_not(llama, tmp_path):
    """For comparison with the bound above: TBRM's residual is then V itself, some nats."""
    rows = [{**row, "reward": 0.0} for row in log()]
    seen = one_update(llama, tmp_path, rows, soft_value="policy")
    assert seen.trainer.state.log_history[0]["residual/rms"] > 0.1


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_value": "group"}, "num_generations=1 each would be compared with itself"),
        ({"soft_value": "log_mean_exp"}, "num_generations=1 each would be compared with itself"),
        ({"soft_value": "group", "num_generations": 3, "per_device_train_batch_size": 2,
          "steps_per_generation": 3}, "2 rows .*not whole groups of num_generations=3.*multiple of 3"),
        ({"soft_value": "log_mean_exp", "num_generations": 2, "soft_value_beta": 0.0}, "soft_value_beta=0.0.*'inf'"),
        ({"soft_value": "optimal", "soft_value_beta": 0.0}, "soft_value_beta=0.0.*'inf'"),
        ({"soft_value": "optimal", "top_p": 0.9}, "top_p.*is refused"),
        ({"soft_value": "optimal", "generation_kwargs": {"top_k": 5}}, "top_k.*is refused"),
        ({"soft_value": "optimal", "sync_ref_model": True}, "initial reference"),
        ({"soft_value": "optimal", "reference": "previous"}, "initial reference"),
        ({"soft_value": "optimal", "remove_unused_columns": True}, "would drop the column `optimal_value`"),
        ({"soft_value": "partition", "sync_ref_model": True}, "one fixed reference"),
        ({"soft_value": "partition", "precompute_ref_log_probs": False}, "Leave `precompute_ref_log_probs` at None"),
        ({"soft_value": "model"}, "needs `soft_value_model`"),
        ({"soft_value": "policy", "soft_value_beta": 1.0}, "has no effect.*belongs to.*optimal"),
        ({"soft_value": "zero", "soft_value_model": "x"}, "has no effect.*belongs to model"),
        ({"soft_value": "tracked", "soft_value_half_life": 0.0}, "it divides the KL moved"),
        ({"soft_value": "tracked", "reference": "previous"}, "distance from one fixed reference"),
        ({"soft_value": "tracked", "soft_value_kept": 1.5}, "must lie between 0 and 1: it is a share"),
        ({"soft_value": "tracked", "soft_value_tracks": "both"}, "Choose one of reward, value"),
        ({"soft_value_half_life": 0.1}, "has no effect.*belongs to tracked"),
        ({"length_normalized": True, "soft_value": "zero"}, "another V belongs to their mean"),
        ({"length_normalized": True, "soft_value": "optimal"}, "another V belongs to their mean"),
        ({"length_normalized": True, "residual": "token"}, "length_normalized=True` with `residual='token'` is ref"),
        ({"length_normalized": True, "truncation": "bootstrap"}, "with `truncation='bootstrap'` is refused"),
        ({"length_normalized": True, "token_fraction": 0.5}, "with `token_fraction=0.5` is refused"),
        ({"soft_value_learning_rate": 0.1}, "nothing of V is trained beside the policy.*soft_value_offset=True"),
        ({"soft_value": "learned", "soft_value_learning_rate": 0.0}, "must be positive and finite"),
        ({"soft_value": "learned", "fp16": True}, 'fp16=True` with `soft_value="learned"` is refused'),
        ({"soft_value": "learned", "soft_value_offset": True}, "a constant of its own"),
        ({"soft_value": "learned", "truncation": "bootstrap"}, "no value of the state after the cut"),
        ({"soft_value_offset": True, "residual": "token"}, "a constant cancels between two states"),
        ({"soft_value_offset": True, "soft_value": "group", "num_generations": 2, "per_device_train_batch_size": 2},
         "a group's residuals sum to 0"),
        ({"soft_value": "group", "num_generations": 2, "per_device_train_batch_size": 2, "num_iterations": 2,
          "replay_buffer_size": 3}, "multiple of 2"),
        ({"soft_value": "group", "num_generations": 2, "per_device_train_batch_size": 2, "num_iterations": 2,
          "replay_buffer_size": 4, "replay_sampling": "prioritized"}, "draws single trajectories"),
    ],
)  # fmt: skip
def test_options_that_an_estimator_cannot_work_with(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TBRMConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_an_option_that_the_configuration_lacks(tmp_path, monkeypatch):
    """One's own estimator may read an option of a subclass of TBRMConfig."""

    @dataclass
    class Wider(TBRMConfig):
        kept_share: float = 0.5

    monkeypatch.setattr(SoftValue, "registry", dict(SoftValue.registry))

    class Mine(SoftValue):
        name, options = "mine", frozenset({"kept_share"})

    with pytest.raises(ValueError, match=r"'mine'` reads kept_share, which TBRMConfig does not have\. Add"):
        TBRMConfig(str(tmp_path), use_cpu=True, bf16=False, soft_value="mine")
    assert Wider(str(tmp_path), use_cpu=True, bf16=False, soft_value="mine").kept_share == 0.5


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (log(each=2)[:7], {"soft_value": "group", "num_generations": 2}, "Row . of .*has 1 logged completions"),
        (log(each=3), {"soft_value": "group", "num_generations": 2, "per_device_train_batch_size": 10},
         "has 8 logged trajectories in whole groups"),
        (log(), {"soft_value": "optimal"}, "add a column `optimal_value`"),
        ([{"prompt": "a"}] * 6, {"soft_value": "optimal", "num_generations": 3, "per_device_train_batch_size": 3},
         "Use 9"),
        ([{**row, "optimal_value": 0.0} for row in log()], {"soft_value": "optimal", "soft_value_drop_unsolved": True},
         "`soft_value_drop_unsolved=True` has no effect: the training set brings"),
        ([{**row, "optimal_value": i / 0.5 if i else math.inf} for i, row in enumerate(log())],
         {"soft_value": "optimal"}, "Row 0 .*`optimal_value` is inf"),
        ([*log(), {"prompt": "a"}], {"soft_value": "partition"}, "every row of the training set needs a `completion`"),
        (log(), {"soft_value": "quantile"}, "add a column `reference_rewards`"),
        ([{**row, "reference_rewards": []} for row in log()], {"soft_value": "quantile"},
         "`reference_rewards` is empty in every row of the training set. It holds a list: what samples"),
        (log(), {"soft_value": "tracked"}, "what the policy's own rollouts earn"),
        (log(unscored=(2,)), {"soft_value": "partition"}, r"Row \d of .*no `reward`"),
    ],
)  # fmt: skip
def test_data_that_an_estimator_cannot_work_with(rows, options, message, tmp_path):
    """It is refused before a model is loaded: there is no model of that name."""
    with pytest.raises(ValueError, match=message):
        build("no/such-model", tmp_path, letters, Dataset.from_list(rows), **options)


def test_value_model_of_another_vocabulary(llama, tmp_path):
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "value")
    tokenizer(alphabet="abc").save_pretrained(tmp_path / "value")
    with pytest.raises(ValueError, match="another vocabulary"):
        build(
            llama, tmp_path, None, Dataset.from_list(log()), soft_value="model",
            soft_value_model=str(tmp_path / "value"),
        )  # fmt: skip


# ---- evaluation, extension -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_value", ["group", "log_mean_exp", "optimal"])
def test_evaluation(soft_value, llama, tmp_path):
    """Groups of the evaluation set have their own size; its prompts have no sampled value, and leave the loss."""
    trainer = build(
        llama, tmp_path, letters, PROMPTS, soft_value=soft_value, num_generations=2, num_generations_eval=3,
        per_device_train_batch_size=6, per_device_eval_batch_size=6, eval_dataset=PROMPTS,
        **({"soft_value_samples": 2} if soft_value == "optimal" else {}),
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_left_out/no_value"] == float(soft_value == "optimal")
    if soft_value != "optimal":
        assert metrics["eval_residual/rms"] > 0


def test_an_estimator_of_ones_own(llama, tmp_path):
    class Half(SoftValue):
        name = "half"

        def __call__(self, rows):
            return 0.5 * rows.policy_value

    try:
        seen = one_update(llama, tmp_path, soft_value="half")
    finally:
        del SoftValue.registry["half"]
    check(seen, lambda t, of: 0.5 * of.value)
