"""Optional parts of the loss as pure functions: added terms, and back-propagation through part of the tokens."""

import math

import torch
from torch import Tensor

from ..batch import at_least_float32
from .residual import sum_over


def success_nll(log_probs: Tensor, mask: Tensor, reward: Tensor, threshold: float) -> Tensor:
    """`−log π_θ(τ)` where the reward reaches the threshold, else 0.

    Args:
        log_probs: `(B, T)` log π_θ of the taken tokens, nats, with gradient.
        mask: `(B, T)` m_h.
        reward: `(B,)` R before any baseline; NaN never reaches the threshold.
        threshold: in reward units.

    Returns:
        `(B,)` nats.

    Source: arXiv 2405.16436 (a supervised term as a guard against over-optimisation).
    """
    return torch.where(reward >= threshold, -sum_over(mask, log_probs), 0.0)


def advantage_weighted_entropy(entropy: Tensor, mask: Tensor, residual: Tensor, beta: float) -> Tensor:
    """`A Σ_h m_h H(π_θ(·|s_h))` with the advantage `A = sg(R − β V − β log-ratio) = −β sg(δ)`, a term to maximise.

    The advantage needs no group of rollouts. One rollout suffices.

    Args:
        entropy: `(B, T)` nats, with gradient.
        mask: `(B, T)` m_h.
        residual: `(B,)` δ, nats.
        beta: β.

    Returns:
        `(B,)` reward units × nats.

    Source: IBRO, arXiv 2507.18391.
    """
    return -beta * residual.detach() * sum_over(mask, entropy)


def subset_surrogate(residual: Tensor, value: Tensor, log_probs: Tensor, chosen: Tensor, probability: Tensor) -> Tensor:
    """A loss equal to `δ²`; its gradient, averaged over draws of the subset, equals that of `δ²`.

    The gradient is that of `2 sg(δ) (V + Σ_{h∈S} log π_h / P_h)`. δ is taken over all tokens, so its square is right.
    The gradient of the log-ratio is a sum over tokens; a weighted subset estimates it without bias if every P_h > 0.

    Args:
        residual: `(B,)` δ over all tokens, without gradient.
        value: `(B,)` the value term, with its gradient.
        log_probs: `(B, T)` log π_θ of the chosen tokens, with gradient.
        chosen: `(B, T)` S.
        probability: `(B, T)` P_h, the probability that h is in S.

    Source: after arXiv 2504.20834.
    """
    weighted = sum_over(chosen, at_least_float32(log_probs) / probability.clamp(min=1e-30))  # (B,)
    slope = 2 * residual.detach() * (value + weighted)  # (B,)
    return residual.detach().square() + (slope - slope.detach())


def random_subset(mask: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Draw `⌈fraction · n⌉` of the n actions of each row. All subsets of that size are equally likely.

    Returns:
        `(B, T)` S, and `(B, T)` P_h = ⌈fraction · n⌉/n.
    """
    actions = mask.sum(dim=1, keepdim=True)  # (B, 1)
    kept = (fraction * actions).ceil()  # (B, 1)
    draw = torch.rand(mask.shape).to(mask.device).masked_fill(~mask, torch.inf)  # (B, T) on the CPU: one random state
    rank = draw.argsort(dim=1).argsort(dim=1)  # (B, T)
    return mask & (rank < kept), (kept / actions.clamp(min=1)).expand_as(mask)


def random_prefix(mask: Tensor, fraction: float, draw: float | None = None) -> tuple[Tensor, Tensor]:
    """The first c of the n actions of each row: `c = ⌈n u^a⌉` with one uniform u, `a = 1/fraction − 1`; on average
    about `fraction · n`.

    Action h is kept if `n u^a > h − 1`, so `P_h = 1 − ((h − 1)/n)^(1/a)`, which is positive for every action.

    Args:
        mask: `(B, T)` m_h.
        fraction: in (0, 1).
        draw: u; None draws it.

    Returns:
        `(B, T)` S, and `(B, T)` P_h.
    """
    power = 1 / fraction - 1
    u = torch.rand(()).item() if draw is None else draw
    actions = mask.sum(dim=1, keepdim=True)  # (B, 1)
    before = mask.cumsum(dim=1) - 1  # (B, T) h − 1
    share = before.clamp(min=0).double() / actions.clamp(min=1)  # (B, T) in float64: 1 − share may be small
    kept = mask & (share < max(math.pow(u, power), 1e-12))
    return kept, torch.where(mask, (1 - share.pow(1 / power)).float(), 1.0)
