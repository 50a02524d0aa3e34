"""The loss of each trajectory: soft value, residual, square, and the added terms."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import Batch, TrajectoryScores, float_tensor
from ..options import TBRMOptions
from ..trajectory import Trajectory, UpdateRow
from .residual import bellman_residual, per_action, token_residuals, trajectory_log_ratio
from .soft_value import SoftValue, ValueInputs
from .terms import advantage_weighted_entropy, random_prefix, random_subset, subset_surrogate, success_nll

Scorer = Callable[..., TrajectoryScores]  # batch, and options for further outputs → scores


@dataclass
class LossOutput:
    """The loss of B trajectories, and its parts.

    Attributes:
        loss: `(B,)` with gradient, in reward units squared (or nats squared); meaningless for rows that do not count.
        residual: `(B,)` δ in nats, 0 where a row does not count.
        soft_value: `(B,)` the residual's value term, nats.
        inputs: what the estimator read.
        scores: the policy's scores of all tokens.
        aux_loss: load-balancing loss of a mixture-of-experts model, with gradient.
    """

    loss: Tensor
    residual: Tensor
    soft_value: Tensor
    inputs: ValueInputs
    scores: TrajectoryScores
    aux_loss: Tensor | None


class TrajectoryLoss:
    """`(β δ)²` of each trajectory, and the optional terms. It calls a scorer and runs no model itself.

    Args:
        args: the options.
        soft_value: the value term.
        offset: a trained constant added to the value term, in reward units, as a function of hidden states, or None.
        router_loss: ask the policy for its load-balancing loss.
    """

    def __init__(
        self,
        args: TBRMOptions,
        soft_value: SoftValue,
        offset: Callable[[Tensor], Tensor] | None = None,
        router_loss: bool = False,
    ):
        self.args, self.soft_value, self.offset, self.router_loss = args, soft_value, offset, router_loss

    def left_out(self, trajectory: Trajectory) -> str | None:
        """Why a trajectory does not count, or None if it does."""
        if reason := self.args.left_out(trajectory):
            return reason
        value = 0.0 if not self.soft_value.gives_constants else trajectory.value
        if value is None or math.isnan(value) or math.isnan(trajectory.baseline):
            return "no_value"
        return None

    def mark_left_out(self, rows: Sequence[UpdateRow]) -> int:
        """Decide which trajectories of an update are left out, and return how many count."""
        for row in rows:
            row.left_out = self.left_out(row.trajectory)
        if self.soft_value.compares == "ratios":
            in_group = Counter(row.group for row in rows if row.left_out is None)
            for row in rows:
                if row.left_out is None and in_group[row.group] == 1:
                    row.left_out = "no_value"  # its own ratio would be its value
        return sum(row.left_out is None for row in rows)

    @torch.no_grad()
    def value_beforehand(self, batches: Iterable[tuple[Sequence[UpdateRow], Batch]], scorer: Scorer) -> None:
        """Compute V of all trajectories of an update, in one pass over its micro-batches."""
        scored = [(rows, self._inputs(rows, batch, scorer(batch))) for rows, batch in batches]
        values = self.soft_value(ValueInputs.joined([inputs for _, inputs in scored]))  # (N,)
        for row, value in zip((row for rows, _ in scored for row in rows), values.tolist(), strict=True):
            row.value = value

    def __call__(self, rows: Sequence[UpdateRow], batch: Batch, scorer: Scorer, in_part: bool = False) -> LossOutput:
        """Score a micro-batch and compute its loss.

        Args:
            rows: B trajectories. `mark_left_out` must have seen their update.
            batch: the same, collated.
            scorer: the policy.
            in_part: back-propagate through `token_fraction` of the tokens, in a second forward pass.
        """
        args, beta = self.args, self.args.beta
        with torch.no_grad() if in_part else nullcontext():
            scores = scorer(batch, router_logits=self.router_loss, every_value=args.residual == "token")
            inputs = self._inputs(rows, batch, scores)
            soft_value, upcoming = self._values(rows, batch, scores, inputs)  # (B,) each
            residual = bellman_residual(soft_value - upcoming, inputs.log_ratio, inputs.reward, beta)  # (B,)
            residual = torch.where(inputs.counted, residual, 0.0)

        aux_loss = scores.aux_loss
        if in_part:
            squared, aux_loss = self._squared_in_part(rows, batch, scorer, inputs, residual)
        elif args.residual == "token":
            assert scores.state_values is not None, "asked for above"
            log_ratio = scores.log_probs - batch.ref_log_probs  # (B, T)
            each = token_residuals(log_ratio, scores.state_values, batch.action_mask, inputs.reward, beta)  # (B, T)
            squared = torch.where(inputs.counted[:, None], each, 0.0).square().sum(dim=1)  # (B,)
        else:
            squared = residual.square()  # (B,)

        loss = beta**2 * squared  # (B,) in reward units, as the weights of the added terms require
        if args.sft_coef:
            earned = float_tensor([args.reward_of(row.trajectory) for row in rows], loss.device)  # (B,)
            loss = loss + args.sft_coef * success_nll(scores.log_probs, batch.action_mask, earned, args.sft_threshold)
        if args.entropy_advantage_coef:
            assert scores.entropy is not None, "the policy's head computes entropies"
            weighted = advantage_weighted_entropy(scores.entropy, batch.action_mask, residual, beta)  # (B,)
            loss = loss - args.entropy_advantage_coef * weighted
        if args.loss_units == "logits":
            loss = loss / beta**2
        return LossOutput(loss, residual, soft_value, inputs, scores, aux_loss if self.router_loss else None)

    def _inputs(self, rows: Sequence[UpdateRow], batch: Batch, scores: TrajectoryScores) -> ValueInputs:
        device, reward_of = batch.input_ids.device, self.args.reward_of
        log_ratio = trajectory_log_ratio(scores.log_probs, batch.ref_log_probs, batch.action_mask)  # (B,)
        if self.args.length_normalized:
            log_ratio = per_action(log_ratio, batch.action_mask)
        return ValueInputs(
            policy_value=scores.soft_value,
            ref_value=batch.ref_soft_value,
            hidden=scores.hidden,
            log_ratio=log_ratio,
            reward=float_tensor([reward_of(t) - self._baseline(t) for t in (row.trajectory for row in rows)], device),
            value=float_tensor([row.trajectory.value for row in rows], device),
            group=torch.tensor([row.group for row in rows], device=device),
            counted=torch.tensor([row.left_out is None for row in rows], device=device),
            beta=self.args.beta,
        )

    def _baseline(self, trajectory: Trajectory) -> float:
        """What is subtracted from R: 0 if bootstrapped, since V of the last state is already lower by the baseline."""
        return 0.0 if self.args.is_bootstrapped(trajectory) else trajectory.baseline

    def _value(self, inputs: ValueInputs) -> Tensor:
        """`(B,)` V of a state, nats, including the offset."""
        value = self.soft_value(inputs)
        return value if self.offset is None else value + self.offset(inputs.hidden) / inputs.beta

    def _values(
        self, rows: Sequence[UpdateRow], batch: Batch, scores: TrajectoryScores, inputs: ValueInputs
    ) -> tuple[Tensor, Tensor]:
        """`(B,)` V(s_1), and `(B,)` V of the state in which a row was cut: 0 without `truncation="bootstrap"`."""
        known = rows[0].value is not None
        value = float_tensor([row.value for row in rows], inputs.reward.device) if known else self._value(inputs)
        if self.soft_value.compares == "ratios":
            value = value.detach()  # `value_beforehand` gives no gradient either: any split has the same
        if self.args.truncation != "bootstrap":
            return value, torch.zeros_like(value)
        assert scores.end_value is not None, "the scorer gives it where truncation is bootstrapped"
        is_cut = torch.tensor([self.args.is_bootstrapped(row.trajectory) for row in rows], device=value.device)
        there = replace(inputs, policy_value=scores.end_value, ref_value=batch.ref_end_value)
        return value, torch.where(is_cut, self._value(there), 0.0)

    def _squared_in_part(
        self, rows: Sequence[UpdateRow], batch: Batch, scorer: Scorer, inputs: ValueInputs, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`(B,)` δ², with the gradient of a random part of the tokens from a second forward, and its router loss."""
        select = random_subset if self.args.token_selection == "scatter" else random_prefix
        chosen, probability = select(batch.action_mask, self.args.token_fraction)  # (B, T) each
        if self.args.token_selection == "cut":
            # A row without an action keeps its whole width: it may be the only one.
            idle = batch.attention_mask.bool() & ~batch.action_mask.any(dim=1, keepdim=True)  # (B, T)
            width = int((chosen | idle).any(dim=0).nonzero().max()) + 1
            batch, chosen, probability = batch.until(width), chosen[:, :width], probability[:, :width]
        scores = scorer(batch, scored=chosen, router_logits=self.router_loss)
        value, upcoming = self._values(rows, batch, scores, replace(inputs, policy_value=scores.soft_value))
        value = torch.where(residual != 0, value - upcoming, 0.0)  # (B,) a row that does not count may have none
        return subset_surrogate(residual, value, scores.log_probs, chosen, probability), scores.aux_loss
