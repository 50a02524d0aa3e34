"""Optional terms, rewards and back-propagation through part of the tokens: by hand, by enumeration, by brute force."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch
from common.tiny import perturb, save
from datasets import Dataset
from helpers.oracle import (
    TOLERANCE,
    check,
    copy_of_adapter,
    distance,
    merged,
    options_of,
    perturb_adapter,
    plain,
    solve,
)
from helpers.runs import build, config, kept_returns, log, one_update
from helpers.scripted import Row, script, scripted_trainer
from helpers.sharded import unwrapped
from helpers.two_processes import on_two_processes
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import tbrm_trl.trainer
from tbrm_trl import TBRMConfig
from tbrm_trl.loss import trajectory_loss
from tbrm_trl.loss.residual import token_residuals
from tbrm_trl.loss.terms import advantage_weighted_entropy, random_prefix, random_subset, subset_surrogate, success_nll
from tbrm_trl.sources.baselines import Baselines
from tbrm_trl.trajectory import End, Trajectory

NAN = math.nan
MASK = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 0]]).bool()  # 4 and 2 actions, an inserted token between


def float64(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- added terms -----------------------------------------------------------------------------------------------------


def test_success_nll_by_hand():
    """Rewards 1 and 2 reach the threshold 1: −(−1 − 2) = 3 and 7; 0.9 and NaN do not. Masked NaNs touch nothing."""
    log_probs = torch.tensor([[-1.0, -2.0, NAN], [-3.0, -4.0, NAN], [-5.0, NAN, -6.0], [-7.0, NAN, NAN]])
    mask = ~log_probs.isnan()
    log_probs.requires_grad_()
    nll = success_nll(log_probs, mask, torch.tensor([1.0, 0.9, NAN, 2.0]), threshold=1.0)
    nll.sum().backward()
    assert nll.tolist() == [3.0, 0.0, 0.0, 7.0]
    assert log_probs.grad.tolist() == [[-1, -1, 0], [0, 0, 0], [0, 0, 0], [-1, 0, 0]]


def test_advantage_weighted_entropy_by_hand():
    """A = −β δ: −0.5·(−4) = 2 and −0.5·3 = −1.5; times 1 + 0.5 and 2 nats. δ is a constant here."""
    entropy = torch.tensor([[1.0, 0.5, 9.0], [9.0, 2.0, 9.0]], requires_grad=True)
    residual = torch.tensor([-4.0, 3.0], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    weighted = advantage_weighted_entropy(entropy, mask, residual, beta=0.5)
    weighted.sum().backward()
    assert weighted.tolist() == [3.0, -3.0]
    assert entropy.grad.tolist() == [[2.0, 2.0, 0.0], [0.0, -1.5, 0.0]] and residual.grad is None


SFT = {"sft_coef": 0.5, "sft_threshold": 1.2}
ENTROPY = {"entropy_advantage_coef": 0.05}
CENTRED = {"reward_baseline": "batch_mean"}  # the threshold is for rewards, not for centred ones


@pytest.mark.parametrize(
    ("terms", "accumulation"),
    [(SFT | CENTRED, 1), (ENTROPY, 1), *((SFT | ENTROPY | {"loss_units": "logits"}, n) for n in (1, 2, 4))],
    ids=str,
)
def test_added_terms(terms, accumulation, qwen2, tmp_path):
    """In either unit the same multiple of (β δ)²: with `logits`, all of it is divided by β²."""
    rows = [replace(row, reward=row.reward and 1 + row.reward) for row in script(unscored=(3,))]
    trainer = scripted_trainer(
        qwen2, rows, tmp_path, **terms, temperature=0.7,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    answer, trajectories = check(trainer)
    assert sum(t.reward >= 1.2 for t in trajectories) in range(2, 6)  # some do and some do not
    unit = 1 if terms.get("loss_units") == "logits" else trainer.args.beta**2
    alone = unit * statistics.mean(r * r for r in answer.residuals)
    assert abs(answer.loss - alone) > 0.1 * alone


# ---- the classical residual of every token ---------------------------------------------------------------------------


def test_token_residuals_by_a_loop():
    """Of each action; they telescope to the trajectory's residual."""
    mask = torch.cat([MASK, torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()])
    log_ratio, values = float64(4, 6), float64(4, 6, seed=1)
    reward, beta = torch.tensor([1.0, -0.5, 0.25, 3.0], dtype=torch.float64), 0.3
    residuals = token_residuals(log_ratio, values, mask, reward, beta)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for b in range(4):
        acting = [t for t in range(6) if mask[b, t]]
        for t, following in itertools.zip_longest(acting, acting[1:]):
            upcoming = reward[b] / beta if following is None else values[b, following]
            expected[b, t] = values[b, t] + log_ratio[b, t] - upcoming
    torch.testing.assert_close(residuals, expected, rtol=0, atol=1e-14)
    for b, first in enumerate([1, 2, 5]):
        whole = values[b, first] + log_ratio[b][mask[b]].sum() - reward[b] / beta
        assert residuals[b].sum().item() == pytest.approx(whole.item(), abs=1e-13)
    assert residuals[3].eq(0).all()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_token_residual(accumulation, qwen2, tmp_path):
    """Some rows have no score, and their NaN must not reach the gradient."""
    trainer = scripted_trainer(
        qwen2, script(unscored=(3,)), tmp_path, residual="token", truncation="mask", temperature=0.7,
        reward_baseline="batch_mean", per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    answer, _ = check(trainer)
    of_trajectories = trainer.args.beta**2 * statistics.mean(r * r for r in answer.residuals)
    assert abs(answer.loss - of_trajectories) > 0.1 * of_trajectories


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_pessimism(qwen2, tmp_path):
    """Three functions judge the completions, one of them only some. The residual has the lower bound of their sum."""

    def first(completion_ids, **kwargs):
        return [float(ids[0] % 2) for ids in completion_ids]

    def second(completion_ids, **kwargs):
        return [float(ids[0] % 3 == 0) for ids in completion_ids]

    def third(completion_ids, **kwargs):
        return [None if ids[0] % 5 == 0 else 1.0 for ids in completion_ids]

    trainer = scripted_trainer(
        qwen2, script(), tmp_path, reward_funcs=[first, second, third], reward_pessimism=0.8, soft_value="calibrated"
    )
    _, trajectories = check(trainer)
    gaps = [sum(r for r in t.rewards.values() if not math.isnan(r)) - t.reward for t in trajectories]
    assert sum(gap > 0.5 for gap in gaps) >= 3 and min(gaps) >= 0


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_batch_mean(accumulation, qwen2, tmp_path):
    """It is the mean of the window's rows that count, for any micro-batches: neither unscored nor cut and masked."""
    trainer = scripted_trainer(
        qwen2, script(unscored=(0, 3)), tmp_path, reward_baseline="batch_mean", soft_value="calibrated",
        truncation="mask", per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    _, trajectories = check(trainer)
    counted = [t.reward for t in trajectories if not math.isnan(t.reward) and t.end is not End.LENGTH]
    assert 1 < len(counted) < 6 and abs(sum(counted)) > 0.1
    assert [t.baseline for t in trajectories] == [pytest.approx(sum(counted) / len(counted), abs=1e-6)] * 8


def test_batch_mean_of_one():
    """Alone it would be its own baseline. Later windows' baseline may be of one trajectory, as any may."""
    baselines = Baselines("batch_mean", lambda rows: [t.reward for t in rows if not math.isnan(t.reward)])

    def one(reward: float) -> Trajectory:
        ids = torch.tensor([5])
        return Trajectory(ids, ids, torch.ones(1, dtype=torch.bool), reward, End.EOS)

    alone = [one(0.75), one(math.nan)]
    baselines.set(alone, 1, lambda numbers: torch.tensor([numbers]), learn=True)
    assert all(math.isnan(t.baseline) for t in alone)
    replayed = one(0.5)
    baselines.renew([replayed])
    assert replayed.baseline == 0.75


def of_prompt(prompt: int, reward: float) -> Trajectory:
    return Trajectory(torch.tensor([prompt]), torch.tensor([5]), torch.ones(1, dtype=torch.bool), reward, End.EOS)


def test_group_means_of_a_prompt_with_several_groups():
    """Rollouts of a prompt beside logged rows of it: all have one mean, also when they are replayed."""
    baselines = Baselines("group_mean", lambda rows: [t.reward for t in rows if not math.isnan(t.reward)], remembered=9)
    window = [of_prompt(1, 5.0), of_prompt(1, 6.0), of_prompt(2, 1.0), of_prompt(2, math.nan)]
    window += [of_prompt(1, 0.0), of_prompt(1, 1.0)]
    baselines.set(window, 2, lambda numbers: torch.tensor([numbers]), learn=True)
    assert [t.baseline for t in window] == pytest.approx([3.0, 3.0, math.nan, math.nan, 3.0, 3.0], nan_ok=True)
    replayed = [of_prompt(1, 5.0), of_prompt(1, 0.0)]
    baselines.renew(replayed)
    assert [t.baseline for t in replayed] == [3.0, 3.0]
    baselines.set(window, 2, lambda numbers: torch.tensor([numbers]), learn=False)  # its groups stay apart
    assert [t.baseline for t in window] == pytest.approx([5.5, 5.5, math.nan, math.nan, 0.5, 0.5], nan_ok=True)


def test_group_means_of_a_prompt_on_two_processes(monkeypatch):
    """Another process has a group of the prompt. `gather_object` gives what all have, process by process."""
    others = [(of_prompt(1, 0.0).prompt_key, [8.0]), (of_prompt(3, 0.0).prompt_key, [])]
    monkeypatch.setattr("tbrm_trl.sources.baselines.gather_object", lambda mine: [*mine, *others])
    window = [of_prompt(1, 1.0), of_prompt(1, 3.0), of_prompt(2, 1.0), of_prompt(2, 0.0)]
    baselines = Baselines("group_mean", lambda rows: [t.reward for t in rows])
    baselines.set(window, 2, lambda numbers: torch.tensor([numbers]), learn=True)
    assert [t.baseline for t in window] == [4.0, 4.0, 0.5, 0.5]


def test_a_run_that_is_resumed_without_its_baseline():
    """What the checkpoint holds loses it: replayed and logged trajectories alike, also after a second resume."""
    state = Baselines(0.5, lambda rows: []).state()
    for _ in range(2):
        resumed = Baselines("none", lambda rows: [])
        resumed.restore(state)
        kept = [replace(of_prompt(1, 1.0), baseline=0.5) for _ in range(2)]
        resumed.renew(kept[:1])
        resumed.set(kept[1:], 1, lambda numbers: torch.tensor([numbers]), learn=True)
        assert [t.baseline for t in kept] == [0.0, 0.0]
        state = resumed.state()
    own = replace(of_prompt(1, 1.0), baseline=0.25)  # an estimator's own
    Baselines("none", lambda rows: []).set([own], 1, lambda numbers: torch.tensor([numbers]), learn=True)
    assert own.baseline == 0.25


@pytest.mark.parametrize(("soft_value", "given"), [("zero", 0.3), ("calibrated", -2), ("zero", "1e-1")])
def test_a_number_as_baseline(soft_value, given, qwen2, tmp_path):
    """A command line gives it as text. It shifts every reward, and not the threshold of `sft_coef`."""
    trainer = scripted_trainer(
        qwen2, script(unscored=(3,)), tmp_path, soft_value=soft_value, reward_baseline=given, **SFT
    )
    _, trajectories = check(trainer)
    assert [t.baseline for t in trajectories] == [float(given)] * 8


@pytest.mark.parametrize("soft_value", ["policy", "zero"])
def test_group_mean(soft_value, qwen2, tmp_path):
    """It is the mean of the prompt's rows, in any order and micro-batch. One has no reward, its partner no mean."""
    seen = one_update(
        qwen2, tmp_path, log(unscored=(3,)), lambda prompts, **kwargs: [None] * len(prompts), soft_value=soft_value,
        reward_baseline="group_mean", num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    window = [row.trajectory for row in seen.rows]
    assert len({t.baseline for t in window}) == 4 and len(seen.counted) == 6
    answer = solve(seen.policy, seen.reference, window, **options_of(seen.trainer))
    assert seen.loss == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(seen.gradient, answer.gradient) <= TOLERANCE


def test_batch_mean_of_an_evaluation(qwen2, tmp_path):
    """V follows the mean of the windows that are trained on, so an evaluation's rows have the latest one for any batch.

    Before training there is none, and they have their batch's.
    """
    prompts = Dataset.from_list([{"prompt": text} for text in ("a", "b:", "1+1=", "x y z")])
    trainer = build(
        qwen2, tmp_path, reward_baseline="batch_mean", soft_value="calibrated", eval_dataset=prompts, max_steps=1
    )
    evaluated = kept_returns(trainer, "_evaluation_rows")
    trainer.args.per_device_eval_batch_size = 2
    trainer.evaluate()
    for batch in evaluated:
        rewards = [row.trajectory.reward for row in batch]
        assert [row.trajectory.baseline for row in batch] == [pytest.approx(sum(rewards) / 2)] * 2
    windows = kept_returns(trainer, "_new_window")
    trainer.train()
    mean = sum(t.reward for t in windows[0]) / len(windows[0])
    for size in (2, 4):
        evaluated.clear()
        trainer.args.per_device_eval_batch_size = size
        trainer.evaluate()
        assert [row.trajectory.baseline for batch in evaluated for row in batch] == [pytest.approx(mean)] * 4


def test_a_set_of_one_evaluation_has_whole_groups(qwen2, tmp_path):
    """The check of the evaluation set holds for one that only a call of `evaluate` brings."""
    trainer = build(
        qwen2, tmp_path, soft_value="log_mean_exp", num_generations=4, per_device_train_batch_size=4, max_steps=1,
        per_device_eval_batch_size=6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="per_device_eval_batch_size=6 does not hold whole groups of 4"):
        trainer.evaluate(Dataset.from_list([{"prompt": "a"}, {"prompt": "b:"}]))


def test_batch_mean_over_two_processes(tmp_path):
    """The mean is over the rows of both processes, and their own means differ."""
    folder, rows = save(tmp_path / "model"), script()
    options = {"reward_baseline": "batch_mean", "soft_value": "calibrated", "per_device_train_batch_size": 4}
    seen = on_two_processes(folder, rows, tmp_path, **options)
    means = [sum(t.reward for t in window) / 4 for window in seen["windows"]]
    assert abs(means[0] - means[1]) > 0.1
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    perturb(reference)
    answer = solve(
        plain(policy), plain(reference), [*seen["windows"][0], *seen["windows"][1]], beta=0.1, soft_value="calibrated",
        reward_baseline="batch_mean",
    )  # fmt: skip
    assert distance(unwrapped(seen["gradients"]), answer.gradient) <= TOLERANCE


# ---- part of the tokens: which ---------------------------------------------------------------------------------------


def places(chosen: torch.Tensor) -> tuple[int, ...]:
    return tuple(chosen.nonzero().flatten().tolist())


def test_scatter_draws_every_subset_alike():
    """2 of 4 actions: each of the 6 subsets in 6000 draws within 4.5 standard deviations of 1000, so P_h = 1/2."""
    torch.manual_seed(0)
    chosen, probability = random_subset(MASK[:1].expand(6000, 6), 0.5)
    assert probability.unique().tolist() == [0.5]
    counts = Counter(map(places, chosen))
    assert set(counts) == set(itertools.combinations((1, 2, 4, 5), 2))
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * math.sqrt(6000 * 1 / 6 * 5 / 6)


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.5, (2, 1, 0)), (0.01, (1, 1, 0)), (0.7, (3, 2, 0)), (1.0, (4, 2, 0))]
)
def test_scatter_keeps_so_many(fraction, kept):
    """⌈f n⌉ of n = 4, 2, 0 and 1 actions, at least one where there is any."""
    mask = torch.cat([MASK, torch.zeros(1, 6).bool(), torch.arange(6)[None] == 3])
    chosen, probability = random_subset(mask, fraction)
    assert tuple(chosen.sum(dim=1).tolist()) == (*kept, 1) and not (chosen & ~mask).any() and probability[3, 3] == 1
    for row, (k, n) in enumerate(zip(kept, (4, 2), strict=False)):
        assert probability[row, mask[row]].tolist() == pytest.approx([k / n] * n)


@pytest.mark.parametrize("fraction", [0.02, 0.25, 0.5, 0.9])
def test_cut_keeps_each_action_as_often_as_it_says(fraction):
    """Over a grid of u, the share in which action h is kept is `P_h = 1 − ((h − 1)/n)^(f/(1 − f))`; P_1 = 1."""
    draws = [(i + 0.5) / 2000 for i in range(2000)]
    kept = torch.stack([random_prefix(MASK, fraction, draw)[0] for draw in draws]).double().mean(dim=0)  # (B, T)
    probability = random_prefix(MASK, fraction)[1]
    for row, n in ((0, 4), (1, 2)):
        formula = [1 - (before / n) ** (fraction / (1 - fraction)) for before in range(n)]
        assert probability[row, MASK[row]].tolist() == pytest.approx(formula, rel=1e-6)
        assert kept[row, MASK[row]].tolist() == pytest.approx(formula, abs=1 / 2000)
        assert formula[0] == 1 and min(formula) > 0
    assert not kept[~MASK].any()


def test_cut_draws_uniformly():
    """With u of its own: 4000 cuts of 4 actions, each kept within 4.5 standard deviations of P = 1, 3/4, 1/2, 1/4."""
    torch.manual_seed(0)
    kept = torch.stack([random_prefix(MASK[:1], 0.5)[0] for _ in range(4000)]).double().mean(dim=0)[0, MASK[0]]  # (4,)
    for share, p in zip(kept.tolist(), (1, 0.75, 0.5, 0.25), strict=True):
        assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize("fraction", [1e-3, 0.1, 0.5, 0.99])
def test_cut_keeps_a_prefix_and_excludes_no_token(fraction):
    """Of 5000 tokens the first is always kept, and the last with probability `1 − (1 − 1/5000)^(f/(1 − f)) > 0`."""
    mask = torch.ones(1, 5000).bool()
    for draw in (0.0, 1e-30, 0.5, 1 - 2**-24):
        chosen, probability = random_prefix(mask, fraction, draw)
        kept = int(chosen.sum())
        assert kept >= 1 and chosen[0, :kept].all()
    assert probability[0, 0] == 1 and (probability > 0).all() and probability.diff().le(0).all()
    last = -math.expm1(math.log1p(-1 / 5000) * fraction / (1 - fraction))
    assert probability[0, -1].item() == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("selection", [random_subset, random_prefix])
def test_on_average_so_large_a_part(selection, fraction):
    probability = selection(torch.ones(1, 1000).bool(), fraction)[1]
    assert probability.mean().item() == pytest.approx(fraction, abs=1.1e-3)  # up to one token is rounded up


# ---- part of the tokens: what is expected of it ----------------------------------------------------------------------


class Scores:
    """A log-probability per token of `(2, 6)` states over 5 letters, and the value of the first state; by autograd."""

    def __init__(self, beta=0.1):
        self.logits = float64(2, 6, 5).requires_grad_()
        self.value = self.logits[[0, 1], [1, 2]].logsumexp(dim=-1)  # (2,) the states of the first actions
        self.log_probs = self.logits.log_softmax(dim=-1)[..., 0]  # (2, 6)
        offset = float64(2, seed=1) / beta  # of reward and reference
        self.residual = self.value + torch.where(MASK, self.log_probs, 0.0).sum(dim=1) + offset  # (2,)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss.sum(), self.logits, retain_graph=True)[0]

    def in_part(self, chosen, probability) -> torch.Tensor:
        loss = subset_surrogate(self.residual.detach(), self.value, self.log_probs, chosen, probability)
        torch.testing.assert_close(loss, self.residual.square(), rtol=1e-15, atol=0)
        return self.gradient(loss)


def test_a_token_that_is_never_drawn_gives_no_nan():
    """As in a row without an action: P is 0 where nothing is in S."""
    log_probs = torch.tensor([[-1.0, -2.0], [0.0, 0.0]], requires_grad=True)
    chosen, probability = torch.tensor([[True, False], [False, False]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    loss = subset_surrogate(torch.tensor([3.0, 0.0]), torch.zeros(2), log_probs, chosen, probability)
    loss.sum().backward()
    assert loss.tolist() == [9.0, 0.0] and log_probs.grad.tolist() == [[12.0, 0.0], [0.0, 0.0]]


def all_scattered(fraction: float) -> list[tuple[torch.Tensor, float]]:
    """Every pair of subsets of the sizes that `scatter` keeps, and its probability."""
    of_rows = []
    for row in MASK:
        places = row.nonzero().flatten().tolist()
        of_rows.append(list(itertools.combinations(places, math.ceil(fraction * len(places)))))
    pairs = []
    for pair in itertools.product(*of_rows):
        chosen = torch.zeros_like(MASK)
        for row, kept in enumerate(pair):
            chosen[row, list(kept)] = True
        pairs.append((chosen, 1 / math.prod(map(len, of_rows))))
    return pairs


def all_cut(fraction: float, lengths=(4, 2)) -> list[tuple[float, float]]:
    """A draw u inside each interval in which the same tokens are kept, and the length of the interval."""
    power = 1 / fraction - 1
    ends = sorted({(before / n) ** (1 / power) for n in lengths for before in range(n + 1)})
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(ends)]


@pytest.mark.parametrize(("fraction", "precision"), [(0.5, 1e-14), (0.25, 1e-14), (0.7, 1e-6)])
def test_all_scattered_subsets_average_to_the_full_gradient(fraction, precision):
    """Exactly so, up to the float32 of P_h = 3/4 and 1."""
    scores, probability = Scores(), random_subset(MASK, fraction)[1]
    mean = sum(p * scores.in_part(chosen, probability) for chosen, p in all_scattered(fraction))
    torch.testing.assert_close(mean, scores.gradient(scores.residual.square()), rtol=precision, atol=100 * precision)
    one = scores.in_part(all_scattered(fraction)[0][0], probability)
    assert (one - mean).norm() > 0.1 * mean.norm()


@pytest.mark.parametrize(("fraction", "precision"), [(0.5, 1e-14), (0.25, 1e-6), (0.7, 1e-6)])
def test_all_cuts_average_to_the_full_gradient(fraction, precision):
    scores, pieces = Scores(), all_cut(fraction)
    assert sum(p for _, p in pieces) == pytest.approx(1) and len(pieces) == 4
    mean = sum(p * scores.in_part(*random_prefix(MASK, fraction, draw)) for draw, p in pieces)
    torch.testing.assert_close(mean, scores.gradient(scores.residual.square()), rtol=precision, atol=100 * precision)


def test_squaring_a_part_of_the_residual_is_biased():
    """This is what the surrogate avoids: the mean gradient of the squares is another one."""
    scores, probability = Scores(), random_subset(MASK, 0.5)[1]
    mean = 0.0
    for chosen, p in all_scattered(0.5):
        missing = scores.log_probs * (chosen / probability - MASK.double())  # (2, 6) of mean 0
        mean = mean + p * scores.gradient((scores.residual + missing.sum(dim=1)).square())
    full = scores.gradient(scores.residual.square())
    assert (mean - full).norm() > 0.02 * full.norm()


# ---- part of the tokens: in the trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("soft_value", "truncation"), [("policy", "bootstrap"), ("calibrated", "terminal")])
def test_a_given_subset(soft_value, truncation, accumulation, qwen2, tmp_path, monkeypatch):
    """Every other action, as if each were kept with probability 1/2, in any split into micro-batches."""

    def every_other(mask, fraction):
        chosen = mask & (mask.cumsum(dim=1) % 2 == 1)
        return chosen, torch.full(mask.shape, fraction)

    monkeypatch.setattr(trajectory_loss, "random_subset", every_other)
    trainer = scripted_trainer(
        qwen2, script(unscored=(3,)), tmp_path, token_fraction=0.5, soft_value=soft_value, truncation=truncation,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    check(trainer, subset=lambda n: dict.fromkeys(range(0, n, 2), 0.5))


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, False), (2, False), (4, False), (2, True)])
def test_a_given_cut(accumulation, checkpointing, qwen2, tmp_path, monkeypatch):
    """The first ⌈0.4 n⌉ of n actions. Later ones are not computed a second time."""
    monkeypatch.setattr(
        trajectory_loss, "random_prefix", lambda mask, fraction: random_prefix(mask, fraction, draw=0.4)
    )
    trainer = scripted_trainer(
        qwen2, script(unscored=(3,)), tmp_path, token_fraction=0.5, token_selection="cut",
        gradient_checkpointing=checkpointing, per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    score, widths = tbrm_trl.trainer.score, []

    def watch(model, batch, **wanted):
        widths.append(batch.input_ids.shape[1])
        return score(model, batch, **wanted)

    monkeypatch.setattr(tbrm_trl.trainer, "score", watch)
    check(trainer, subset=lambda n: {h: 1 - h / n for h in range(math.ceil(0.4 * n))})
    wide, narrow = widths[-2:]
    assert narrow < wide - 1


FOURS = [Row(prompt, [*completion, 1], [1, 0, 1, 1, 1], reward) for prompt, completion, reward in
         (("ab", [10, 11, 12, 13], 0.5), ("cde", [20, 21, 22, 23], -0.3))]  # fmt: skip


@pytest.mark.parametrize("selection", ["scatter", "cut"])
def test_all_parts_average_to_the_full_gradient_in_the_trainer(selection, qwen2, tmp_path, monkeypatch):
    """One update, at learning rate 0, for each of the 6 pairs of 4 tokens, or each of 4 places to cut."""
    if selection == "scatter":
        parts = [(kept, 1 / 6) for kept in itertools.combinations(range(4), 2)]
    else:
        parts = all_cut(0.5, (4,))
    upcoming = iter(parts)

    def next_scattered(mask, fraction):
        kept, _ = next(upcoming)
        place = mask.cumsum(dim=1) - 1  # (B, T)
        return mask & torch.isin(place, torch.tensor(kept)), random_subset(mask, fraction)[1]

    monkeypatch.setattr(trajectory_loss, "random_subset", next_scattered)
    monkeypatch.setattr(
        trajectory_loss,
        "random_prefix",
        lambda mask, fraction: random_prefix(mask, fraction, next(upcoming)[0]),
    )
    trainer = scripted_trainer(
        qwen2, FOURS, tmp_path, token_fraction=0.5, token_selection=selection, num_iterations=len(parts),
        max_steps=len(parts),
    )  # fmt: skip
    perturb(trainer.ref_model)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    trainer.train()
    answer = solve(policy, reference, trainer.windows[0], beta=0.1)
    gradients = trainer.recorder.gradients
    mean = {name: sum(p * g[name] for (_, p), g in zip(parts, gradients, strict=True)) for name in gradients[0]}
    assert distance(mean, answer.gradient) <= TOLERANCE
    assert all(distance(gradient, answer.gradient) > 0.05 for gradient in gradients[:3])
    assert trainer.losses == [pytest.approx(answer.loss, rel=TOLERANCE)] * len(parts)


@pytest.mark.parametrize("selection", ["scatter", "cut"])
def test_each_update_draws_anew(selection, qwen2, tmp_path):
    """The loss is that of all tokens, the gradient another at every update."""
    trainer = scripted_trainer(
        qwen2, script(), tmp_path, token_fraction=0.5, token_selection=selection, num_iterations=2, max_steps=2
    )
    trainer.train()
    assert trainer.losses[0] == pytest.approx(trainer.losses[1], rel=TOLERANCE)
    assert distance(*trainer.recorder.gradients) > 0.05


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("selection", ["scatter", "cut"])
def test_a_row_without_an_action(selection, size, qwen2, tmp_path):
    """Alone in its micro-batch or beside others that are cut, it does not count, in part or in full."""
    rows = [*script(3), Row("only a tool's, and longer than the others", [10] * 15 + [1], [0] * 16, 1.0)]
    trainer = scripted_trainer(
        qwen2, rows, tmp_path, token_fraction=0.5, token_selection=selection, per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // size,
    )  # fmt: skip
    perturb(trainer.ref_model)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    trainer.train()
    assert trainer.state.log_history[0]["left_out/no_action"] == 0.25
    answer = solve(policy, reference, trainer.windows[0], beta=0.1)
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=TOLERANCE)
    assert all(g.isfinite().all() for g in trainer.recorder.gradients[0].values())


def test_lora(qwen2, tmp_path, monkeypatch):
    """Through an adapter, whose base model is the reference."""
    monkeypatch.setattr(
        trajectory_loss, "random_prefix", lambda mask, fraction: random_prefix(mask, fraction, draw=0.4)
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    trainer = scripted_trainer(qwen2, script(), tmp_path, peft_config=lora, token_fraction=0.5, token_selection="cut")
    reference = merged(trainer.model)
    perturb_adapter(trainer.model, seed=4)
    policy = copy_of_adapter(trainer.model).double().eval()
    trainer.train()
    answer = solve(
        policy, reference, trainer.windows[0], beta=0.1,
        subset=lambda n: {h: 1 - h / n for h in range(math.ceil(0.4 * n))},
    )  # fmt: skip
    assert distance(trainer.recorder.gradients[0], answer.gradient) <= TOLERANCE


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: bad}, rf"`{name}={bad}` must be 0 \(off\) or positive")
          for name in ("sft_coef", "entropy_advantage_coef", "reward_pessimism") for bad in (-0.1, NAN)),
        *(({"token_fraction": bad}, rf"`token_fraction={bad}` must lie in \(0, 1\]") for bad in (0.0, -0.5, 1.5, NAN)),
        ({"residual": "turn"}, "`residual='turn'` is unknown. Choose one of trajectory, token"),
        ({"token_selection": "cut"}, "`token_selection='cut'` has no effect without `token_fraction`"),
        ({"sft_threshold": 0.5}, "`sft_threshold=0.5` has no effect without `sft_coef`"),
        ({"token_selection": "suffix"}, "`token_selection='suffix'` is unknown. Choose one of scatter, cut"),
        *(({"reward_baseline": bad}, "Choose one of none, group_mean, batch_mean, or a finite number")
          for bad in ("median", "inf", NAN)),
        ({"reward_baseline": True}, "`reward_baseline=True` is refused: it must be str or float"),
        ({"residual": "token", "soft_value": "calibrated"}, "it needs `soft_value=\"policy\"`, and no bootstrap"),
        ({"token_fraction": 0.5, "residual": "token"}, "`token_fraction=0.5` with `residual='token'` is refused"),
        ({"token_fraction": 0.5, "sft_coef": 0.1}, "`token_fraction=0.5` with `sft_coef=0.1` is refused"),
        ({"token_fraction": 0.5, "entropy_advantage_coef": 0.1}, "with `entropy_advantage_coef=0.1` is refused"),
        ({"reward_pessimism": 1.0, "reward_weights": [1.0, 0.0]}, "`reward_weights` must be positive"),
        *(({"reward_baseline": kind, "soft_value": "optimal"}, "a baseline would be taken off twice. Use 'none'")
          for kind in ("batch_mean", 0.1)),
        ({"reward_baseline": "group_mean", "soft_value": "group", "num_generations": 2}, "be taken off twice"),
        ({"reward_baseline": "group_mean"}, "`reward_baseline='group_mean'` compares .* Use 2 or more"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_groups_stand_whole_on_a_process(monkeypatch):
    """3 rows on each of 2 processes are 3 pairs, but one would be torn; 4 may be split over updates, not processes."""
    monkeypatch.setattr(TBRMConfig, "world_size", 2)
    pairs = {"reward_baseline": "group_mean", "num_generations": 2}
    with pytest.raises(ValueError, match=r"on one process, but 3 rows \(per_device_train_batch_size 3 × steps_per_gen"):
        config(**pairs, per_device_train_batch_size=3)
    whole = config(**pairs, per_device_train_batch_size=1, steps_per_generation=4)
    assert (whole.window_group_size, whole.update_group_size) == (2, 1)
    with pytest.raises(ValueError, match=r"1 rows \(per_device_train_batch_size 1 × gradient_accumulation_steps 1\)"):
        config(soft_value="group", num_generations=2, per_device_train_batch_size=1, steps_per_generation=4)


def test_pessimism_about_one_function(qwen2, tmp_path):
    with pytest.raises(ValueError, match=r"`reward_pessimism=1\.0` has no effect with one reward function"):
        scripted_trainer(qwen2, script(), tmp_path, reward_pessimism=1.0)
