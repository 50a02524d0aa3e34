"""The residual, loss and gradient by brute force: float64, one unpadded row at a time, full logits, Python loops.

Shares no code with the library; it only reads trajectories (token ids, mask, reward, end).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Answer:
    loss: float
    gradient: dict[str, torch.Tensor]
    residuals: list[float]


def logits_of(model, trajectory, temperature: float) -> torch.Tensor:
    ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])[None]
    extra = {name: value.double() if value.is_floating_point() else value for name, value in trajectory.vision.items()}
    extra = {name: (value[None] if name.endswith("token_type_ids") else value) for name, value in extra.items()}
    return model(input_ids=ids, use_cache=False, **extra).logits[0] / temperature  # (T, V)


def residual(policy, reference, trajectory, *, beta: float, temperature: float, soft_value: str) -> torch.Tensor:
    prompt = len(trajectory.prompt_ids)
    logits = logits_of(policy, trajectory, temperature)
    with torch.no_grad():
        ref_logits = logits_of(reference, trajectory, temperature)
    chosen = [h for h in range(len(trajectory.completion_ids)) if trajectory.loss_mask[h]]
    first_state = prompt + chosen[0] - 1
    value = torch.log(torch.exp(logits[first_state]).sum())
    if soft_value == "calibrated":
        value = value - torch.log(torch.exp(ref_logits[first_state]).sum())
    total = value - trajectory.reward / beta
    for h in chosen:
        token = int(trajectory.completion_ids[h])
        state = prompt + h - 1
        log_policy = logits[state, token] - torch.log(torch.exp(logits[state]).sum())
        log_reference = ref_logits[state, token] - torch.log(torch.exp(ref_logits[state]).sum())
        total = total + log_policy - log_reference
    return total


def solve(
    policy,
    reference,
    trajectories,
    *,
    beta,
    temperature=1.0,
    soft_value="policy",
    loss_units="reward",
    mask_truncated=False,
) -> Answer:
    """Mean over the counted trajectories; `policy` and `reference` are plain models in float64 and eval mode."""
    counted = [
        t
        for t in trajectories
        if not math.isnan(t.reward) and t.loss_mask.any() and not (mask_truncated and t.end.value == "length")
    ]
    policy.zero_grad()
    loss, residuals = 0.0, []
    for trajectory in counted:
        delta = residual(policy, reference, trajectory, beta=beta, temperature=temperature, soft_value=soft_value)
        residuals.append(delta.item())
        scaled = beta * delta if loss_units == "reward" else delta
        term = scaled**2 / len(counted)
        term.backward()
        loss += term.item()
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
