"""Every estimator converges in the real trainer to π* or to its data's target, which are both known exactly."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from common import tree_targets as targets
from common.trees import EOS, Task, Tree, logits_after, optimum, total_variation

DEEP = Tree(depth=3, letters="abc", prompts=("a", "bc"))  # 40 trajectories after each prompt
WIDE = Tree(depth=2, letters="abcde", prompts=("a", "bcd"))  # 31
LONG = Tree(depth=4, letters="ab", prompts=("b",))  # 31
SMALL = Tree(depth=2, letters="abc", prompts=("a", "b", "cab"))  # 13


# ---- the targets themselves ------------------------------------------------------------------------------------------


def test_targets_by_brute_force(tmp_path):
    """The minimiser is where L-BFGS on logits ends, and the expected group value is the mean over all groups."""
    task = Task(Tree(depth=2, letters="ab", prompts=("a", "b")), 0.2, tmp_path)
    counts = task.tree.counts(task.tree.bad(task.rewards))  # (P, N)
    mu = counts / counts.sum(dim=1, keepdim=True)
    for wrong_by in (-3.0, -0.5, 0.0, 0.5):
        value = task.best.soft_value[:, None] + wrong_by
        logits = task.reference.log_probs.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=1000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(value=value, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            residual = value + logits.log_softmax(dim=1) - task.reference.log_probs - task.rewards / task.beta
            (mean := (mu * residual**2).sum()).backward()
            return mean

        optimizer.step(loss)
        found = targets.minimiser(task.reference, task.rewards, task.beta, value, counts)
        torch.testing.assert_close(found.probs, logits.detach().softmax(dim=1), rtol=0, atol=1e-5)

    for size, p in itertools.product((2, 3), range(2)):
        log = [n for n, count in enumerate(counts[p]) for _ in range(count)]
        scaled = task.rewards[p] / task.beta
        for n in range(len(task.tree.completions)):
            others = list(log)
            others.remove(n)
            groups = torch.tensor([[n, *rest] for rest in itertools.combinations(others, size - 1)])
            mean = (scaled[groups].logsumexp(dim=1) - math.log(size)).mean().item()
            assert targets.group_value(task.rewards, task.beta, counts, size)[p, n] == pytest.approx(mean, abs=1e-12)


# ---- π*, from anywhere -----------------------------------------------------------------------------------------------

PAIRS, FOURS, EIGHTS = ({"num_generations": k} for k in (2, 4, 8))
TRAINED = {"soft_value_learning_rate": 0.05}
OFFSET = TRAINED | {"soft_value_offset": True}
TRACKED = {"soft_value_tracks": "value", "soft_value_kept": 0.5}


def trained_value(trainer, tree: Tree, beta: float) -> torch.Tensor:
    """`(P,)` nats: the head's value of each prompt."""
    with torch.no_grad():
        hidden = [trainer.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in tree.prompt_ids]
        return trainer._soft_value.head(torch.stack(hidden)) / beta


def tracked_value(trainer, tree: Tree, beta: float) -> torch.Tensor:
    """`(P,)` nats: the tracker's value of each prompt."""
    keys = [trajectory.prompt_key for trajectory in trainer._window]
    ids = [trajectory.prompt_ids.tolist() for trajectory in trainer._window]
    return torch.tensor([trainer._soft_value._value(keys[ids.index(one)]) for one in tree.prompt_ids]) / beta


@pytest.mark.parametrize(
    ("soft_value", "data", "tree", "beta", "options"),
    [
        ("policy", "on-policy", WIDE, 0.3, {}),
        ("policy", "uniform", LONG, 0.1, {}),
        ("policy", "bad", DEEP, 0.2, {}),
        ("calibrated", "on-policy", DEEP, 0.5, {}),
        ("calibrated", "uniform", WIDE, 0.1, {}),
        ("calibrated", "bad", LONG, 0.2, {}),
        ("group", "on-policy", DEEP, 0.3, FOURS),
        ("group", "uniform", WIDE, 0.2, PAIRS),
        ("group", "bad", LONG, 0.5, EIGHTS),
        ("optimal", "on-policy", LONG, 0.2, {}),
        ("optimal", "uniform", DEEP, 0.1, {}),
        ("optimal", "bad", WIDE, 0.3, {}),
        ("learned", "on-policy", DEEP, 0.3, TRAINED),
        ("learned", "uniform", WIDE, 0.1, TRAINED),
        ("learned", "bad", DEEP, 0.2, TRAINED),
        ("zero", "bad", LONG, 0.2, OFFSET),
        ("tracked", "on-policy", SMALL, 0.3, TRACKED),
        ("tracked", "uniform", SMALL, 0.2, TRACKED),
        ("tracked", "bad", SMALL, 0.3, TRACKED),
        ("calibrated", "uniform", DEEP, 0.2, OFFSET),
    ],
)
def test_converges_to_the_optimum(soft_value, data, tree, beta, options, tmp_path):
    """Total variation to π* below 0.01, on-policy or from 2,048 trajectories of a uniform or a bad behaviour.

    Where V is learned it ends at log Z: β V_θ(s_1), or when calibrated β (V_θ − V_ref)(s_1), is β log E_ref exp(R/β)
    within 0.002. A separate head, a trained constant and a tracker have rates that do not fall, and end within 0.005 of
    it. With other estimators V_θ is free: only the policy is in the loss.
    """
    task = Task(tree, beta, tmp_path, seed=1)
    rate = 0.1 if data == "on-policy" else 0.5
    if data == "on-policy":
        rows = tree.prompt_rows(128)
    else:
        urn = tree.uniform if data == "uniform" else tree.bad(task.rewards)
        rows = tree.sampled_log(task.rewards, urn, 2048)
        distinct = {(*row["prompt_ids"], -1, *row["completion_ids"]) for row in rows}
        assert len(distinct) == len(tree.trajectories)  # coverage
    if soft_value == "optimal":
        rows = task.with_values(rows, beta * task.best.soft_value)
    assert total_variation(task.reference, task.best) > 0.2  # it is far to go

    trained = task.train(rows, soft_value=soft_value, learning_rate=rate, max_steps=160, **options)

    distance = total_variation(trained, task.best)
    print(f"total variation {total_variation(task.reference, task.best):.3f} -> {distance:.1e}")
    assert distance < 0.01
    learned = {
        "policy": trained.soft_value,
        "calibrated": trained.soft_value - task.reference.soft_value,
        "learned": trained_value(task.trainer, tree, beta) if soft_value == "learned" else None,
        "tracked": tracked_value(task.trainer, tree, beta) if soft_value == "tracked" else None,
        "zero": torch.zeros(len(tree.prompts)),
    }.get(soft_value)  # (P,)
    if learned is not None:
        offset = task.trainer._offset.bias.item() if task.trainer._offset is not None else 0.0
        bound = 0.005 if options in (TRAINED, OFFSET, TRACKED) else 0.002
        assert (beta * (learned - task.best.soft_value) + offset).abs().max() < bound


# ---- a wrong constant: a target that depends on the data -------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft_value", "data", "tree", "beta", "other_beta", "size"),
    [
        ("zero", "uniform", SMALL, 0.3, None, 1),
        ("zero", "bad", SMALL, 0.3, None, 1),
        ("optimal", "uniform", WIDE, 0.2, 1.0, 1),
        ("optimal", "bad", SMALL, 0.3, 0.1, 1),
        ("log_mean_exp", "bad", SMALL, 0.3, 0.3, 2),
        ("log_mean_exp", "bad", WIDE, 0.5, 1.0, 4),
    ],
)
def test_a_wrong_constant_converges_to_a_target_of_its_data(soft_value, data, tree, beta, other_beta, size, tmp_path):
    """The minimiser of `E_μ (V̂ + log π/π_ref − R/β)²` within 0.01 in total variation, where π* is more than 0.1 away.

    The log holds every trajectory in the exact proportion μ, and each update sees all of it. `optimal` is given the
    exact `V̂* = β₁ log E_ref exp(R/β₁)` with a β₁ other than β. The groups of `log_mean_exp` change in every pass, which
    is noise: within 0.02.
    """
    task = Task(tree, beta, tmp_path, seed=2)
    counts = tree.counts(tree.uniform if data == "uniform" else tree.bad(task.rewards))  # (P, N)
    if soft_value == "log_mean_exp" and tree is SMALL:
        counts = 2 * counts  # more groups in an update
    rows, options = tree.exact_log(task.rewards, counts), {}
    if soft_value == "zero":
        value = torch.zeros(len(tree.prompts), 1)
    elif soft_value == "optimal":
        given = targets.reward_value(task.reference, task.rewards, other_beta)  # (P,)
        rows, value = task.with_values(rows, given), given[:, None] / beta
    else:
        value = targets.group_value(task.rewards, other_beta, counts, size) * other_beta / beta  # (P, N)
        options = {"soft_value_beta": other_beta, "num_generations": size}
    target = targets.minimiser(task.reference, task.rewards, beta, value, counts)

    # Redrawn groups are noise, and the residuals do not vanish at the target: smaller and more steps.
    rate, steps, bound = (0.05, 200, 0.02) if soft_value == "log_mean_exp" else (0.3, 150, 0.01)
    trained = task.train(
        rows, soft_value=soft_value, learning_rate=rate, max_steps=steps,
        per_device_train_batch_size=len(rows), **options,
    )  # fmt: skip

    near, far = total_variation(trained, target), total_variation(trained, task.best)
    print(f"{len(rows)} rows: total variation to the target {near:.1e}, to π* {far:.3f}")
    assert near < bound
    assert far > 0.1


@pytest.mark.parametrize(
    ("soft_value", "options", "bound"),
    [("zero", {}, 0.08), ("optimal", {"soft_value_samples": 2}, 0.04), ("tracked", {}, 0.02)],
)
def test_on_policy_a_wrong_constant_does_no_harm(soft_value, options, bound, tmp_path):
    """Where μ = π_θ a constant multiplies E ∇log π = 0: a baseline. `zero`, V̂* of 2 samples, SPO's mean all lead to π*.

    Its price is variance, hence the bounds; on a log `zero` ends more than 0.2 away.
    """
    task = Task(SMALL, 0.3, tmp_path, seed=2)
    log = SMALL.counts(SMALL.uniform)
    off_policy = targets.minimiser(task.reference, task.rewards, task.beta, torch.zeros(3, 1), log)
    assert total_variation(off_policy, task.best) > 0.2

    trained = task.train(
        SMALL.prompt_rows(126), soft_value=soft_value, learning_rate=0.1, max_steps=200,
        per_device_train_batch_size=126, **options,
    )  # fmt: skip

    print(f"total variation to π* {total_variation(trained, task.best):.1e}")
    assert total_variation(trained, task.best) < bound


# ---- length-normalised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft_value", "data", "options"),
    [
        ("learned", "on-policy", {"soft_value_learning_rate": 0.02}),
        ("learned", "uniform", TRAINED),
        ("policy", "bad", {}),
    ],
)
def test_length_normalized(soft_value, data, options, tmp_path):
    """π_ref exp(|τ| (R/β − V)) with Σπ = 1, within 0.01; π* is more than 0.1 away. From a log, a head's V is that root.

    On-policy, where V is no baseline and moves at a constant rate, within 0.03.
    """
    task = Task(SMALL, 0.3, tmp_path, seed=1)
    lengths = torch.tensor([len(said) for said in SMALL.completions])
    target = targets.length_normalized(task.reference, task.rewards, task.beta, lengths)
    rows, rate, steps = SMALL.prompt_rows(126), 0.1, 160
    if data != "on-policy":
        rate, steps = 0.5, 150
        urn = SMALL.uniform if data == "uniform" else SMALL.bad(task.rewards)
        rows = SMALL.exact_log(task.rewards, SMALL.counts(urn))

    trained = task.train(
        rows, soft_value=soft_value, length_normalized=True, learning_rate=rate, max_steps=steps,
        per_device_train_batch_size=len(rows), **options,
    )  # fmt: skip

    near, far = total_variation(trained, target), total_variation(target, task.best)
    print(f"total variation to the target {near:.1e}; of the target to π* {far:.3f}")
    assert near < (0.03 if data == "on-policy" else 0.01)
    assert far > 0.1
    if soft_value == "learned" and data != "on-policy":
        value = trained_value(task.trainer, SMALL, task.beta)
        assert (task.beta * (value - target.soft_value)).abs().max() < 0.01


# ---- quantiles ------------------------------------------------------------------------------------------------------


def mid_ranks(rewards: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """`(P, N)` the share of `(P, S)` samples below each reward, and half of those that equal it."""
    below, equal = samples[:, None] < rewards[:, :, None], samples[:, None] == rewards[:, :, None]
    return (below.double() + equal.double() / 2).mean(dim=2)


@pytest.mark.parametrize("data", ["on-policy", "uniform", "bad"])
def test_quantiles(data, tmp_path):
    """π_ref exp(q/β)/Z within 0.02. q is the mid-rank among samples with each trajectory in its share under π_ref.

    Rewards are raised to the fourth power, so that quantiles differ from them, and rounded to tenths, so that they tie:
    π* of the rewards themselves is more than 0.1 away.
    """
    tree, task = SMALL, Task(SMALL, 0.3, tmp_path, seed=1)
    task.rewards = (10 * task.rewards**4).round() / 10
    cumulative = task.reference.probs.cumsum(dim=1)  # (P, N)
    places = torch.searchsorted(cumulative, (torch.arange(100) + 0.5).expand(len(tree.prompts), -1).double() / 100)
    samples = task.rewards.gather(1, places.clamp(max=task.rewards.shape[1] - 1))  # (P, 100)
    target = optimum(task.reference, mid_ranks(task.rewards, samples), task.beta)
    rows, rate, steps = tree.prompt_rows(126), 0.2, 60
    if data != "on-policy":
        rate, steps = 0.5, 150
        rows = tree.exact_log(task.rewards, tree.counts(tree.uniform if data == "uniform" else tree.bad(task.rewards)))
    rows = task.with_values(rows, samples, "reference_rewards")

    trained = task.train(
        rows, soft_value="quantile", learning_rate=rate, max_steps=steps, per_device_train_batch_size=len(rows)
    )

    near, far = total_variation(trained, target), total_variation(trained, optimum(task.reference, task.rewards, 0.3))
    print(f"{len(rows)} rows: total variation to the target {near:.1e}, to π* {far:.3f}")
    assert near < 0.02
    assert far > 0.1


# ---- reward partitioning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_normalized", [False, True])
@pytest.mark.parametrize("logged", ["all", "half"])
def test_partition(logged, self_normalized, tmp_path):
    """π* if the log has every possible completion. Else the logged completions take all the mass, within 0.01.

    The log then has half of the completions, drawn at random, once or twice each. All their residuals vanish. If
    self-normalised, they together keep the mass that they had, and the rest is not determined. π* is more than 0.1
    away.
    """
    task = Task(DEEP, 0.3, tmp_path, seed=3)
    draw = torch.rand(task.rewards.shape, generator=torch.Generator().manual_seed(0))
    counts = 1 + (draw > 0.7).int() if logged == "all" else (draw > 0.5).int() + (draw > 0.8).int()
    rows = task.tree.exact_log(task.rewards, counts)
    target = targets.partition(task.reference, task.rewards, task.beta, counts > 0, self_normalized)  # (P, N)

    trained = task.train(
        rows, soft_value="partition", soft_value_self_normalized=self_normalized,
        learning_rate=1.0, max_steps=200, per_device_train_batch_size=len(rows),
    )  # fmt: skip

    on_log = torch.where(counts > 0, trained.probs, 0.0)
    far = total_variation(trained, task.best)
    print(f"mass on the log {on_log.sum(dim=1).tolist()}, was "
          f"{(task.reference.probs * (counts > 0)).sum(dim=1).tolist()}; total variation to π* {far:.1e}")  # fmt: skip
    assert (on_log - target).abs().sum(dim=1).max() < 0.01
    assert far < 0.01 if logged == "all" else far > 0.1


@pytest.mark.parametrize("soft_value", ["group", "log_mean_exp"])
def test_groups_of_one_are_refused(soft_value, tmp_path):
    task = Task(DEEP, 0.3, tmp_path)
    with pytest.raises(ValueError, match="num_generations"):
        task.train(task.tree.prompt_rows(128), soft_value=soft_value, num_generations=1)


# ---- an environment --------------------------------------------------------------------------------------------------


def two_turn_policy(model, tree: Tree, answers: list[list[int]]) -> targets.TwoTurns:
    """The model's log-probabilities of first actions, and of second ones after `answers[a]` to the first action a."""
    (prompt,), actions = tree.prompt_ids, list(tree.actions)

    def log_probs(*read: int) -> torch.Tensor:
        return logits_after(model, [*prompt, *read]).log_softmax(dim=0)[actions]

    second = [[log_probs(a, e) for e in answers[i]] for i, a in enumerate(actions[1:])]
    return targets.TwoTurns(log_probs(), torch.stack([torch.stack(of_first) for of_first in second]))


@pytest.mark.parametrize("environment", ["random", "deterministic"])
def test_a_random_environment_biases_the_residual(environment, tmp_path):
    """The policy stops or emits a letter, the environment inserts another (`loss_mask` 0), and the policy acts again.

    One V(s_1) + log π/π_ref of the first letter cannot fit the values after three different answers: the squared
    residual includes their variance too (double sampling). On 240 trajectories of a uniform behaviour with random
    answers, the policy ends within 0.01 of the biased minimiser of the expected squared residual, and more than 0.1
    from the optimum for an environment with the answers' frequencies. If the answer is a function of the first letter,
    the policy ends within 0.01 of the optimum.
    """
    tree = Tree(depth=3, letters="abc", prompts=("a",))
    task = Task(tree, 0.15, tmp_path, seed=4)
    letters, rng = tree.actions[1:], random.Random(0)
    answers = [list(letters)] * 3 if environment == "random" else [[letters[(i + 1) % 3]] for i in range(3)]

    def reward(*said: int) -> torch.Tensor:
        return task.rewards[0, tree.completions.index(list(said))]

    def said(a: int, e: int, b: int) -> list[int]:
        return [letters[a], answers[a][e], tree.actions[b]]

    counts = torch.zeros(3, len(answers[0]), 4, dtype=torch.float64)  # (A, E, B)
    rewards = torch.stack([reward(*said(*index)) for index in itertools.product(*map(range, counts.shape))])
    rewards = rewards.reshape(counts.shape)
    rows = []
    for _ in range(240):
        a, e, b = rng.randrange(4) - 1, rng.randrange(len(answers[0])), rng.randrange(4)
        completion, mask = ([EOS], [1]) if a < 0 else (said(a, e, b), [1, 0, 1])
        counts[a, e, b] += a >= 0
        rows.append(
            {"prompt_ids": tree.prompt_ids[0], "completion_ids": completion, "loss_mask": mask}
            | {"reward": reward(*completion).item()}
        )
    assert (counts > 0).all()

    task.train(rows, soft_value="policy", learning_rate=0.5, max_steps=180, per_device_train_batch_size=len(rows))

    start = two_turn_policy(task.start, tree, answers)
    trained = two_turn_policy(task.trainer.model, tree, answers)
    chance = counts.sum(dim=2) / counts.sum(dim=(1, 2))[:, None]  # (A, E) of the answers, as they fell
    best = targets.two_turn_optimum(start, reward(EOS), rewards, task.beta, chance)
    biased = targets.two_turn_minimiser(start, reward(EOS), rewards, task.beta, counts)
    near, far = trained.distance(biased, chance), trained.distance(best, chance)
    print(f"total variation to the biased minimiser {near:.1e}, to the optimum {far:.1e}")
    assert near < 0.01
    assert far > 0.1 if environment == "random" else far < 0.01


# ---- completions cut at a length limit -------------------------------------------------------------------------------


def rows_of_a_short_horizon(task: Task, horizon: int) -> tuple[list[dict], list[dict]]:
    """Each trajectory as a sampler with a length limit sees it: from the prompt, and from the states at the cuts.

    Rows are cut after `horizon` tokens. The verdict on a fragment, 0.7, is not a reward of the task.
    """
    tree, from_prompt, from_cut = task.tree, {}, []
    for p, n in tree.trajectories:
        row = {**tree.row(p, n, task.rewards), "end": "eos"}  # a word of full depth ends the task, too
        begin, rest = row["completion_ids"][:horizon], row["completion_ids"][horizon:]
        cut = {**row, "completion_ids": begin, "reward": 0.7, "end": "length"}
        from_prompt[p, *begin] = cut if rest else row
        if rest:
            from_cut.append({**row, "prompt_ids": row["prompt_ids"] + begin, "completion_ids": rest})
    return list(from_prompt.values()), from_cut


@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
def test_bootstrapped_truncation_joins_what_the_limit_cut(soft_value, tmp_path):
    """No trajectory is longer than 2 tokens of a task of 3, and the policy is still π* of the whole task.

    A cut row requires V(s_1) + log-ratio = V(s_3), a complete one from s_3 on requires V(s_3) + log-ratio = R/β.
    Together they require the same as a row with all 3 tokens. If the same rows are taken as terminal, with the verdict
    as the reward, they contradict the task.
    """
    task = Task(DEEP, 0.3, tmp_path, seed=5)
    from_prompt, from_cut = rows_of_a_short_horizon(task, 2)
    rows = from_prompt + from_cut
    assert {row["end"] for row in from_prompt} == {"eos", "length"}
    options = dict(soft_value=soft_value, learning_rate=0.5, max_steps=200, per_device_train_batch_size=len(rows))

    distance = {
        truncation: total_variation(task.train(rows, truncation=truncation, **options), task.best)
        for truncation in ("bootstrap", "terminal")
    }

    print(f"total variation to π*: {distance}")
    assert distance["bootstrap"] < 0.01
    assert distance["terminal"] > 0.1


def test_bootstrapping_cannot_tell_what_nothing_anchors(tmp_path):
    """Without a row that goes on from the cuts, their values are free: π* is learned up to the mass of the fragments.

    The complete trajectories still have residual 0, which determines their odds among each other.
    """
    task = Task(DEEP, 0.3, tmp_path, seed=5)
    rows, _ = rows_of_a_short_horizon(task, 2)
    complete = [n for n, completion in enumerate(DEEP.completions) if len(completion) <= 2]

    trained = task.train(rows, truncation="bootstrap", max_steps=150, per_device_train_batch_size=len(rows))

    def odds(policy):
        return policy.log_probs[:, complete].log_softmax(dim=1)

    print(f"total variation to π* {total_variation(trained, task.best):.3f}")
    torch.testing.assert_close(odds(trained), odds(task.best), rtol=0, atol=0.01)
    assert total_variation(trained, task.best) > 0.1
