"""Where each estimator must end on a token tree, in float64, computed without the library and without training.

With one value V(x) per prompt, the squared residuals `E_μ (V + log π/π_ref − R/β)²` can all be 0 only if V = V*(x).
With any other V the minimiser over π (under Σπ = 1) is a compromise, weighted by the distribution μ of the data.
Tensors over trajectories are `(P, N)`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.trees import Policy, optimum

BISECTIONS = 60


def lambert_w(x: Tensor) -> Tensor:
    """The principal branch of the w with `w e^w = x`, for x ≥ −1/e: Newton's method, from the right."""
    w = torch.where(x < 0, (2 + 2 * math.e * x).clamp(min=0).sqrt() - 1, x.clamp(min=0).log1p())
    for _ in range(20):
        w = w - (w * w.exp() - x) / (w.exp() * (w + 1)).clamp(min=1e-300)
    return w.clamp(min=-1)


def bisect(function, low: Tensor, high: Tensor) -> Tensor:
    """A root of `function`, elementwise, where it is negative at `low` and positive at `high`."""
    assert (function(low) < 1e-9).all() and (function(high) > -1e-9).all()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = function(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def minimiser(reference: Policy, rewards: Tensor, beta: float, value: Tensor, data: Tensor) -> Policy:
    """The π that minimises `Σ μ (value + log π/π_ref − R/β)²` under Σπ = 1.

    With u the residual of each trajectory, π = exp(u + b), where b = log π_ref + R/β − value. Stationarity under a
    multiplier λ is `2 μ u = λ π`, that is `u e^−u = λ e^b / 2μ`: given the residual t of one trajectory, those of all
    others follow by Lambert's W. If t belongs to the trajectory with the largest e^b / μ, the others are real and below
    1 for every t, and Σπ = 1 determines t. Where `value` is below V*, the problem is convex and this is its only
    minimum. Far above V* there are other minima, in which one trajectory has nearly all the probability.

    Args:
        value: the value term in nats; `(P, 1)`, or `(P, N)` where it depends on the trajectory.
        data: μ, `(P, N)`, up to a factor per prompt; positive.
    """
    mu = data.double() / data.sum(dim=1, keepdim=True)  # (P, N)
    offset = reference.log_probs + rewards / beta - value  # (P, N) b
    stiffness = offset - mu.log()  # (P, N)
    first = stiffness.argmax(dim=1, keepdim=True)  # (P, 1)
    ratio = (stiffness - stiffness.amax(dim=1, keepdim=True)).exp()  # (P, N)

    def residuals(t: Tensor) -> Tensor:
        others = -lambert_w(-(ratio * t * torch.exp(-t)))  # (P, N)
        return others.scatter(1, first, t)

    def excess(t: Tensor) -> Tensor:
        return (residuals(t) + offset).exp().sum(dim=1, keepdim=True) - 1

    edge = torch.full_like(mu[:, :1], 60.0)  # (P, 1)
    u = residuals(bisect(excess, -edge, edge))  # (P, N)
    log_probs = u + offset

    # The conditions of a minimum, independent of how it was found: first order, constraint, second order.
    probs = log_probs.exp()
    multiplier = 2 * (mu * u).sum(dim=1, keepdim=True)  # (P, 1) Σ of 2μu = λπ
    torch.testing.assert_close(2 * mu * u, multiplier * probs, rtol=0, atol=1e-10)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones_like(probs[:, 0]), rtol=0, atol=1e-10)
    curvature = 2 * mu * (1 - u)  # (P, N) diagonal of the Lagrangian's Hessian, positive but for at most one
    assert ((curvature > 0).all(dim=1) | ((probs**2 / curvature).sum(dim=1) < 0)).all()
    return Policy(log_probs, reference.soft_value)


def reward_value(reference: Policy, rewards: Tensor, beta: float) -> Tensor:
    """`V̂*(x) = β log E_ref exp(R/β)`, `(P,)`, in reward units; β = ∞ is the mean."""
    if math.isinf(beta):
        return (reference.probs * rewards).sum(dim=1)
    return beta * optimum(reference, rewards, beta).soft_value


def sampled_value(reference: Policy, rewards: Tensor, beta: float, samples: int, draws: int, seed: int = 0) -> Tensor:
    """`β log mean exp(r/β)` of `samples` trajectories of the reference, `draws` times. `(draws, P)`, reward units."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(reference.probs, draws * samples, replacement=True, generator=generator)  # (P, draws · N)
    r = rewards.gather(1, drawn).reshape(len(rewards), draws, samples)
    value = r.mean(dim=2) if math.isinf(beta) else beta * ((r / beta).logsumexp(dim=2) - math.log(samples))
    return value.T


def group_value(rewards: Tensor, beta: float, counts: Tensor, size: int) -> Tensor:
    """E[log mean exp(R/β) over a group | τ in it], `(P, N)`, nats: groups drawn from a log without replacement.

    Exact, by `log S = ∫ (exp(−e^s) − exp(−S e^s)) ds` over all s (Frullani): with y = exp(−exp(R/β) e^s) of each row,
    the expectation of exp(−S e^s) is the mean product of y over subsets of the log, an elementary symmetric polynomial.
    Besides τ itself, a group holds size − 1 of the other rows.

    The minimiser over random groups is the one for `E[V | τ]`: the rest of (V + log π/π_ref − R/β)² is V's variance.
    """
    s = torch.arange(-45, 5 + (rewards.max() - rewards.min()).item() / beta, 0.05, dtype=torch.float64)  # (S,)
    value = torch.empty_like(rewards)
    for p, (reward, count) in enumerate(zip(rewards / beta, counts, strict=True)):
        top, n = reward.max(), int(count.sum())
        y = torch.exp(-(reward - top).exp()[:, None] * s.exp())  # (N, S)
        mean = [torch.ones_like(s)] + [torch.zeros_like(s)] * (size - 1)  # of products over subsets of 0, 1, … rows
        for m, row in enumerate(y.repeat_interleave(count, dim=0), start=1):
            for k in range(min(m, size - 1), 0, -1):
                mean[k] = mean[k] * (m - k) / m + row * mean[k - 1] * k / m
        others = torch.ones_like(y)  # (N, S) the same without one copy of τ
        for k in range(1, size):
            others = (n * mean[k] - k * y * others) / (n - k)
        value[p] = top - math.log(size) + 0.05 * (torch.exp(-s.exp()) - y * others).sum(dim=1)
    return value


def length_normalized(reference: Policy, rewards: Tensor, beta: float, lengths: Tensor) -> Policy:
    """π_ref exp(|τ| (R/β − V)), where each V + (log π/π_ref)/|τ| − R/β is 0. `lengths`: `(N,)` actions of each.

    V is the only root of Σπ = 1, since Σπ falls with V.
    """

    def log_probs(value: Tensor) -> Tensor:
        return reference.log_probs + lengths * (rewards / beta - value)  # (P, N)

    scaled = rewards / beta
    low, high = scaled.amin(dim=1, keepdim=True), scaled.amax(dim=1, keepdim=True)  # (P, 1)
    value = bisect(lambda v: -log_probs(v).logsumexp(dim=1, keepdim=True), low, high)  # (P, 1)
    return Policy(log_probs(value), value[:, 0])


def partition(reference: Policy, rewards: Tensor, beta: float, logged: Tensor, self_normalized: bool) -> Tensor:
    """Probabilities `(P, N)` at which each residual of a logged trajectory is 0; 0 for the others.

    V = log Σ_logged π_ref exp(R/β), so the logged trajectories have π = π_ref exp(R/β − V) and all the probability.
    With `self_normalized`, V has a division by Σ_logged π_ref inside the log, and together they keep the probability
    that they have under π_ref.
    """
    best = torch.where(logged, optimum(reference, rewards, beta).probs, 0.0)
    mass = torch.where(logged, reference.probs, 0.0).sum(dim=1, keepdim=True) if self_normalized else 1.0
    return mass * best / best.sum(dim=1, keepdim=True)


# ---- two turns, and an environment between them ----------------------------------------------------------------------


@dataclass
class TwoTurns:
    """A policy that stops at once, or takes one of A actions, gets one of E answers, and takes one of B actions.

    Attributes:
        first: `(1 + A,)` log-probabilities of stopping, and of the first actions.
        second: `(A, E, B)` log-probabilities of the second action, after each answer.
    """

    first: Tensor
    second: Tensor

    def distance(self, other: "TwoTurns", chance: Tensor) -> float:
        """Total variation over whole episodes. `chance`, `(A, E)`, has the probabilities of the answers."""

        def joint(policy: TwoTurns) -> Tensor:
            acted = policy.first[1:, None, None].exp() * chance[:, :, None] * policy.second.exp()  # (A, E, B)
            return torch.cat([policy.first[:1].exp(), acted.flatten()])

        return 0.5 * (joint(self) - joint(other)).abs().sum().item()


def two_turn_optimum(reference: TwoTurns, stopped: Tensor, rewards: Tensor, beta: float, chance: Tensor) -> TwoTurns:
    """The π that maximises `E R − β KL`. Before an answer, the value is the mean of the values after it.

    Args:
        stopped: reward of stopping, a scalar.
        rewards: `(A, E, B)`.
        chance: `(A, E)` probability of each answer.
    """
    unnormalised = reference.second + rewards / beta  # (A, E, B)
    after = unnormalised.logsumexp(dim=2)  # (A, E)
    value = torch.cat([stopped[None] / beta, (chance * after).sum(dim=1)])  # (1 + A,)
    return TwoTurns((reference.first + value).log_softmax(dim=0), unnormalised - after[:, :, None])


def two_turn_minimiser(reference: TwoTurns, stopped: Tensor, rewards: Tensor, beta: float, data: Tensor) -> TwoTurns:
    """The π that minimises the expected squared residual on data with `(A, E, B)` counts; V(s_1) is free too.

    V(s_1) + log π/π_ref of a first action is one number, and it must serve every answer. After each answer it is a
    wrong constant, for which `minimiser` gives the best policy. The best number is the one with mean residual 0.
    """
    actions, answers, _ = data.shape
    frequency = data / data.sum(dim=(1, 2), keepdim=True)  # (A, E, B)
    after = Policy(reference.second.flatten(0, 1), rewards.new_zeros(actions * answers))  # (first, answer) is a prompt
    right = optimum(after, rewards.flatten(0, 1), beta).soft_value.unflatten(0, (actions, answers))  # (A, E)

    def second(value: Tensor) -> Tensor:
        constants = value[:, None].expand(actions, answers).reshape(-1, 1)
        policy = minimiser(after, rewards.flatten(0, 1), beta, constants, data.flatten(0, 1))
        return policy.log_probs.unflatten(0, (actions, answers))  # (A, E, B)

    def mean_residual(value: Tensor) -> Tensor:
        residual = value[:, None, None] + second(value) - reference.second - rewards / beta  # (A, E, B)
        return (frequency * residual).sum(dim=(1, 2))  # (A,)

    value = bisect(mean_residual, right.amin(dim=1), right.amax(dim=1))  # (A,)
    unnormalised = reference.first + torch.cat([stopped[None] / beta, value])
    return TwoTurns(unnormalised.log_softmax(dim=0), second(value))
