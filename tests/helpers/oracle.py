"""The residual, loss and gradient by brute force: float64, one unpadded row at a time, full logits, Python loops.

It shares no code with the library: it only reads trajectories (token ids, mask, reward, end). Its options have the
names and meanings of `TBRMConfig`'s. The functions at the end compare a trainer with it.
"""

import copy
import inspect
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from common.tiny import perturb
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-5  # relative, of float32 against float64


@dataclass
class Answer:
    loss: float
    gradient: dict[str, torch.Tensor]
    residuals: list[float]


@dataclass
class Steps:
    """A model's numbers for one trajectory, in nats: an entry per action, and V of the state after the last token."""

    log_probs: list[torch.Tensor]
    values: list[torch.Tensor]
    entropies: list[torch.Tensor]
    end_value: torch.Tensor


def logits_of(model, trajectory, temperature: float) -> torch.Tensor:
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])[None]
    extra = {name: value.double() if value.is_floating_point() else value for name, value in trajectory.vision.items()}
    extra = {name: (value[None] if name.endswith("token_type_ids") else value) for name, value in extra.items()}
    return model(input_ids=ids, use_cache=False, **extra).logits[0] / temperature  # (T, V)


def steps(model, trajectory, temperature: float) -> Steps:
    logits = logits_of(model, trajectory, temperature)
    prompt = len(trajectory.prompt_ids)
    log_probs, values, entropies = [], [], []
    for h in range(len(trajectory.completion_ids)):
        if trajectory.loss_mask[h]:
            state = logits[prompt + h - 1]  # (V,)
            value = torch.log(torch.exp(state).sum())
            probs = torch.exp(state - value)
            log_probs.append(state[int(trajectory.completion_ids[h])] - value)
            values.append(value)
            entropies.append(-(probs * torch.log(probs)).sum())
    return Steps(log_probs, values, entropies, torch.log(torch.exp(logits[-1]).sum()))


def reward_of(trajectory, truncation: str, truncated_reward: float, reward_pessimism: float) -> float:
    if truncation == "bootstrap" and trajectory.end.value == "length":
        return truncated_reward
    if reward_pessimism:  # all functions have weight 1
        verdicts = [reward for reward in trajectory.rewards.values() if not math.isnan(reward)]
        spread = statistics.stdev(verdicts) if len(verdicts) > 1 else 0.0
        return sum(verdicts) - reward_pessimism * math.sqrt(len(verdicts)) * spread if verdicts else math.nan
    return trajectory.reward


def baselines(trajectories, rewards: list[float], reward_baseline: str | float) -> list[float]:
    if reward_baseline not in ("none", "group_mean", "batch_mean"):
        return [float(reward_baseline)] * len(trajectories)
    of = []
    for trajectory in trajectories:
        compared = [
            reward
            for other, reward in zip(trajectories, rewards, strict=True)
            if not math.isnan(reward)
            and (reward_baseline == "batch_mean" or torch.equal(other.prompt_ids, trajectory.prompt_ids))
        ]
        if reward_baseline == "none":
            of.append(0.0)
        elif reward_baseline == "group_mean" and len(compared) < 2:
            of.append(math.nan)  # its own reward would be its mean
        else:
            of.append(sum(compared) / len(compared))
    return of


def solve(
    policy,
    reference,
    trajectories,
    *,
    beta: float,
    temperature: float = 1.0,
    soft_value: str = "policy",
    residual: str = "trajectory",
    loss_units: str = "reward",
    truncation: str = "terminal",
    truncated_reward: float = 0.0,
    reward_baseline: str | float = "none",
    reward_pessimism: float = 0.0,
    sft_coef: float = 0.0,
    sft_threshold: float = 1.0,
    entropy_advantage_coef: float = 0.0,
    subset: Callable[[int], dict[int, float]] | None = None,
) -> Answer:
    """Loss and gradient, means over the counted trajectories, and the residuals, one for each of these.

    Args:
        policy: a plain model in float64 and eval mode, as is `reference`.
        subset: number of actions → the actions that are back-propagated through (from 0), each with the probability
            that it is among them.
    """
    rewards = [
        math.nan
        if not t.loss_mask.any() or (truncation == "mask" and t.end.value == "length")
        else reward_of(t, truncation, truncated_reward, reward_pessimism)
        for t in trajectories
    ]
    counted = [
        (trajectory, reward, baseline)
        for trajectory, reward, baseline in zip(
            trajectories, rewards, baselines(trajectories, rewards, reward_baseline), strict=True
        )
        if not math.isnan(reward - baseline)
    ]
    policy.zero_grad()
    loss, residuals = 0.0, []
    for trajectory, reward, baseline in counted:
        ours = steps(policy, trajectory, temperature)
        with torch.no_grad():
            theirs = steps(reference, trajectory, temperature)
        value, after = ours.values[0], ours.end_value
        if soft_value == "calibrated":
            value, after = value - theirs.values[0], after - theirs.end_value
        elif soft_value == "zero":
            value = torch.zeros_like(value)
        if truncation == "bootstrap" and trajectory.end.value == "length":
            value, baseline = value - after, 0.0  # the value after the cut has the baseline taken off
        delta = value + sum(ours.log_probs) - sum(theirs.log_probs) - (reward - baseline) / beta
        residuals.append(delta.item())

        if subset is not None:
            kept = subset(len(ours.log_probs))
            slope = 2 * delta.item() * (value + sum(ours.log_probs[h] / p for h, p in kept.items()))
            squared = slope + (delta.item() ** 2 - slope.item())  # δ² with that gradient
        elif residual == "token":
            squared = 0.0
            for h, own_value in enumerate(ours.values):
                last = h == len(ours.values) - 1
                upcoming = (reward - baseline) / beta if last else ours.values[h + 1]
                squared = squared + (own_value + ours.log_probs[h] - theirs.log_probs[h] - upcoming) ** 2
        else:
            squared = delta**2
        term = beta**2 * squared + entropy_advantage_coef * beta * delta.item() * sum(ours.entropies)
        if reward >= sft_threshold:
            term = term - sft_coef * sum(ours.log_probs)
        if loss_units == "logits":
            term = term / beta**2
        (term / len(counted)).backward()
        loss += term.item() / len(counted)
    gradient = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    return Answer(loss, gradient, residuals)


def distance(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert gradient.keys() == expected.keys()
    difference = math.sqrt(sum(((gradient[n].double() - expected[n].double()) ** 2).sum().item() for n in expected))
    return difference / math.sqrt(sum((expected[n].double() ** 2).sum().item() for n in expected))


# ---- a trainer beside it ---------------------------------------------------------------------------------------------


def plain(model) -> torch.nn.Module:
    """The model without any patch, hook or wrapper of the trainer, in float64."""
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    return fresh.double().eval()


def options_of(trainer) -> dict:
    """The trainer's options that `solve` takes, under the same names."""
    known = inspect.getfullargspec(solve).kwonlyargs
    return {name: getattr(trainer.args, name) for name in known if hasattr(trainer.args, name)}


def check(trainer, *, tolerance=TOLERANCE, subset=None):
    """Train one step from a policy that differs from its reference, and compare."""
    perturb(trainer.ref_model)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    trainer.train()
    trajectories = trainer.windows[0]
    answer = solve(policy, reference, trajectories, **options_of(trainer), subset=subset)
    # So that a relative error means something:
    assert statistics.mean(map(abs, answer.residuals)) >= 1
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=tolerance)
    expected = {name: g for name, g in answer.gradient.items() if g.norm() > 0}
    actual = {name: g for name, g in trainer.recorder.gradients[0].items() if name in expected}
    assert distance(actual, expected) <= tolerance
    return answer, trajectories


def merged(model: PeftModel) -> torch.nn.Module:
    """A plain model with the same outputs as this one with its trained adapter."""
    return plain(copy_of_adapter(model).merge_and_unload())


def copy_of_adapter(model: PeftModel) -> PeftModel:
    """The same base and trained adapter, without any patch or hook of the trainer."""
    config = copy.deepcopy(model.peft_config["default"])
    base = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    twin = get_peft_model(base, config)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if ".ref." not in n})
    return twin


def perturb_adapter(model: PeftModel, seed: int) -> None:
    """Move the trained adapter a little."""
    perturb(torch.nn.ParameterList([p for name, p in model.named_parameters() if ".default." in name]), seed=seed)
