"""The arithmetic of TBRM: pure functions of tensors, with no model and no trainer.

One line of mathematics (arXiv 2505.15311, Eq. 4), in logit units:

    δ(τ) = V_θ(s_1) + Σ_h m_h [log π_θ(a_h|s_h) − log π_ref(a_h|s_h)] − R(τ)/β        L(θ) = mean over τ of δ(τ)²
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half-precision to float32; leave float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def trajectory_log_ratio(policy_logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Sum of the per-token log-ratios over the tokens that the policy chose: `Σ_h m_h (log π_θ − log π_ref)`.

    Args:
        policy_logps: `(B, T)` log-probabilities of the taken tokens under π_θ, in nats; carries the gradient.
        ref_logps: `(B, T)` the same tokens under π_ref.
        mask: `(B, T)` m_h: true (or 1) on tokens the policy chose, false on padding, prompt and inserted tokens.

    Returns:
        `(B,)` log-ratios in nats, accumulated in float32 or wider. What stands at a masked position, NaN included,
        has no influence on value or gradient.

    Raises:
        ValueError: if the three shapes differ.

    Source: arXiv 2505.15311, Eq. 4.
    """
    if not policy_logps.shape == ref_logps.shape == mask.shape:
        raise ValueError(
            f"policy_logps {tuple(policy_logps.shape)}, ref_logps {tuple(ref_logps.shape)} and mask "
            f"{tuple(mask.shape)} must have one shape (B, T)."
        )
    per_token = at_least_float32(policy_logps) - at_least_float32(ref_logps)  # (B, T)
    return torch.where(mask.bool(), per_token, 0.0).sum(dim=-1)  # (B,)


def bellman_residual(soft_value: Tensor, log_ratio: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The trajectory Bellman residual `δ = V + log-ratio − R/β`, in logit units.

    Args:
        soft_value: `(B,)` the value term: `V_θ(s_1)`, or `V_θ(s_1) − V_ref(s_1)` when calibrated; in nats.
        log_ratio: `(B,)` from `trajectory_log_ratio`; in nats.
        reward: `(B,)` R(τ), in reward units; NaN where the trajectory has no reward (its residual is then NaN).
        beta: KL coefficient β > 0, in reward units per nat. `beta * residual` is the residual in reward units.

    Returns:
        `(B,)` residuals in float32 or wider.

    Raises:
        ValueError: if β is not positive, or the shapes differ.

    Source: arXiv 2505.15311, Eq. 4 and Algorithm 1; the calibrated value term is arXiv 2603.23355.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: the residual divides the reward by it.")
    if not soft_value.shape == log_ratio.shape == reward.shape:
        raise ValueError(
            f"soft_value {tuple(soft_value.shape)}, log_ratio {tuple(log_ratio.shape)} and reward "
            f"{tuple(reward.shape)} must have one shape (B,)."
        )
    return at_least_float32(soft_value) + at_least_float32(log_ratio) - at_least_float32(reward) / beta


def squared_residual_loss(
    residual: Tensor, counted: Tensor, denominator: Tensor | float, weight: Tensor | None = None
) -> Tensor:
    """`Σ weight · residual² / denominator` over the counted trajectories.

    The denominator is an argument, not the size of this batch: it is the number of counted trajectories of the whole
    optimizer step, so that every split of them into micro-batches and processes adds up to the same gradient.

    Args:
        residual: `(B,)` residuals, in the units the loss shall have (squared).
        counted: `(B,)` bool; rows that are false leave the sum, whatever their residual holds (NaN included).
        denominator: number of counted trajectories of the optimizer step; 0 is taken as 1.
        weight: `(B,)` what each row counts, for rows that were not drawn uniformly; 1 where omitted.

    Returns:
        Scalar loss. Where no row counts it is 0 and still attached to the graph, with zero gradients.

    Source: arXiv 2505.15311, Algorithm 1 (the mean over trajectories).
    """
    kept = torch.where(counted, residual, 0.0)  # selected before squaring: d(NaN²) would be NaN
    squared = kept.square() if weight is None else weight * kept.square()  # (B,)
    return squared.sum() / torch.as_tensor(denominator, device=residual.device).clamp(min=1)
