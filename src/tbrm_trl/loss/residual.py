"""The arithmetic of TBRM: pure functions of tensors, with no model and no trainer.

One line of mathematics (arXiv 2505.15311, Eq. 4), in logit units:

    δ(τ) = V_θ(s_1) + Σ_h m_h [log π_θ(a_h|s_h) − log π_ref(a_h|s_h)] − R(τ)/β        L(θ) = mean over τ of δ(τ)²
"""

import torch
from torch import Tensor

from ..batch import at_least_float32


def sum_over(mask: Tensor, per_token: Tensor) -> Tensor:
    """`(B,)` sums of `(B, T)` values over the tokens where the mask is true, in float32 or wider."""
    return torch.where(mask, at_least_float32(per_token), 0.0).sum(dim=-1)


def trajectory_log_ratio(policy_logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Sum of the per-token log-ratios over the tokens that the policy chose: `Σ_h m_h (log π_θ − log π_ref)`.

    Args:
        policy_logps: `(B, T)` log-probabilities of the taken tokens under π_θ, in nats; carries the gradient.
        ref_logps: `(B, T)` the same tokens under π_ref.
        mask: `(B, T)` m_h: true (or 1) on tokens the policy chose, false on padding, prompt and inserted tokens.

    Returns:
        `(B,)` log-ratios in nats, accumulated in float32 or wider. A value at a masked position, NaN included, does not
        affect value or gradient.

    Raises:
        ValueError: if the three shapes differ.

    Source: arXiv 2505.15311, Eq. 4.
    """
    if not policy_logps.shape == ref_logps.shape == mask.shape:
        raise ValueError(
            f"policy_logps {tuple(policy_logps.shape)}, ref_logps {tuple(ref_logps.shape)} and mask "
            f"{tuple(mask.shape)} must have one shape (B, T)."
        )
    return sum_over(mask.bool(), at_least_float32(policy_logps) - at_least_float32(ref_logps))  # (B,)


def per_action(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio of each trajectory divided by the number of its actions: `(B,)` and `(B, T)` → `(B,)`.

    Source: FlowRL, arXiv 2509.15207.
    """
    return log_ratio / mask.sum(dim=-1).clamp(min=1)


def bellman_residual(soft_value: Tensor, log_ratio: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The trajectory Bellman residual `δ = V + log-ratio − R/β`, in logit units.

    Args:
        soft_value: `(B,)` the value term: `V_θ(s_1)`, or `V_θ(s_1) − V_ref(s_1)` when calibrated; in nats.
        log_ratio: `(B,)` from `trajectory_log_ratio`; in nats.
        reward: `(B,)` R(τ), in reward units; NaN if the trajectory has no reward (its residual is then NaN).
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
        residual: `(B,)` residuals. The loss has the square of their units.
        counted: `(B,)` bool; false rows are left out of the sum, whatever their residual (NaN included).
        denominator: number of counted trajectories of the optimizer step; 0 is taken as 1.
        weight: `(B,)` weight of each row, for rows that were not drawn uniformly; 1 if omitted.

    Returns:
        Scalar loss. If no row counts it is 0 and still attached to the graph, with zero gradients.

    Source: arXiv 2505.15311, Algorithm 1 (the mean over trajectories).
    """
    kept = torch.where(counted, residual, 0.0)  # selected before squaring: d(NaN²) would be NaN
    return mean_over_counted(kept.square(), counted, denominator, weight)


def mean_over_counted(
    values: Tensor, counted: Tensor, denominator: Tensor | float, weight: Tensor | None = None
) -> Tensor:
    """`Σ weight · value / denominator` over the counted rows: `squared_residual_loss` of already squared values."""
    kept = torch.where(counted, values, 0.0)  # (B,)
    weighted = kept if weight is None else weight * kept  # (B,)
    return weighted.sum() / torch.as_tensor(denominator, device=values.device).clamp(min=1)


def token_residuals(log_ratio: Tensor, values: Tensor, mask: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The classical Bellman residual of every action, `logit_θ(s_h, a_h) − log π_ref(a_h|s_h) − V_θ(s_{h+1}) − R_h/β`.

    The reward is given for the last action. After it the value is 0. s_{h+1} is the next state in which the policy
    acts. The residuals of a trajectory sum to its trajectory residual. For ablations: it collapses on language models.

    Args:
        log_ratio: `(B, T)` log π_θ − log π_ref of each action, nats.
        values: `(B, T)` V_θ of the state in which the action was chosen, nats.
        mask: `(B, T)` m_h.
        reward: `(B,)` R, reward units.
        beta: β.

    Returns:
        `(B, T)` nats, 0 where the policy did not act.

    Source: arXiv 2505.15311, App. H.3.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # (B, T)
    never = mask.shape[1]
    upcoming = torch.where(mask, columns, never).flip(1).cummin(dim=1).values.flip(1)  # (B, T) action at or after each
    following = torch.cat([upcoming[:, 1:], upcoming.new_full((len(mask), 1), never)], dim=1)  # (B, T) after each
    last = following == never  # (B, T)
    next_value = torch.where(last, 0.0, values.gather(1, following.clamp(max=never - 1)))  # (B, T)
    residual = log_ratio + values - next_value - torch.where(last, reward[:, None] / beta, 0.0)  # (B, T)
    return torch.where(mask, residual, 0.0)
