"""Advice to a run after its first window: a better number, and the reason. Pure functions of its statistics.

Each rule rests on a derivation or a measurement in `docs/`; `docs/recipes.md` lists them. A rule that counts shares
applies if more than half is affected, a rule that compares with published values if they differ by a factor of 5.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..loss.soft_value import SoftValue
from ..options import TBRMOptions
from .options import drawn_ahead

# (response length, β) as published for rewards of 0 and 1, arXiv 2603.23355, and (parameters, learning rate) of full
# models with Adam: `docs/demo.md` for the first, arXiv 2505.15311 for the others.
BETA_BY_LENGTH = ((600.0, 0.02), (5000.0, 0.002))
RATE_BY_SIZE = ((1.345e8, 2e-5), (1.54e9, 2.5e-6), (7.6e9, 2e-6))
FAR = 5.0  # times what was published


@dataclass(frozen=True)
class Seen:
    """A trajectory of the first window.

    Attributes:
        prompt: a key that is equal for the trajectories of a prompt.
        reward: R before a baseline; NaN if nothing scored it.
        baseline: what the residual subtracts from R.
        value: the constant that the estimator gave it, in reward units; NaN if it gave none.
        length: number of tokens of the completion.
        cut: whether it ended at the length limit.
        drawn: whether this run's policy drew it.
        counted: whether it counts in the loss.
    """

    prompt: str
    reward: float
    baseline: float
    value: float
    length: int
    cut: bool
    drawn: bool
    counted: bool


@dataclass(frozen=True)
class FirstWindow:
    """The statistics of a run after its first update.

    Attributes:
        rows: the trajectories of the window, of all processes.
        soft_value: mean of β V over the first update.
        size: number of trained parameters of a full model; None with adapters.
        updates: number of updates of the whole run.
    """

    rows: Sequence[Seen]
    soft_value: float
    size: int | None
    updates: int

    @cached_property
    def rewards(self) -> np.ndarray:
        """`(N,)` R of the trajectories that count."""
        return np.array([row.reward for row in self.rows if row.counted])

    @property
    def span(self) -> float:
        """The span of the rewards; 1 if all are equal, since it is then unknown."""
        return float(np.ptp(self.rewards)) or 1.0


def advice(window: FirstWindow, args: TBRMOptions) -> list[str]:
    """Return sentences, each a suggestion with its reason; an empty list if nothing is off."""
    if not len(window.rewards):
        return []
    rules = (_of_rewards, _of_groups, _of_beta, _of_rate, _of_soft_value, _of_constant, _of_shift, _of_v_rate, _of_cuts)
    return [sentence for rule in rules for sentence in rule(window, args)]


def power_law(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate y at x between the points, on logarithmic axes. Outside of them, return y of the nearer end."""
    xs, ys = np.log(points).T
    return float(np.exp(np.interp(math.log(max(x, 1.0)), xs, ys)))


def _of_rewards(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """If all trajectories of a policy have one δ, the gradient is δ E ∇log π = 0."""
    (common, count), *_ = Counter(window.rewards.tolist()).most_common(1)
    share, rows = 1 - count / len(window.rewards), args.rows_per_update
    if not share:
        if count > 1:
            yield (
                f"Consider other prompts or another reward, because all {count} rewards are {common:g}: nothing says "
                "which completion is better."
            )
    elif (empty := (1 - share) ** rows) > 0.5:
        needed = math.ceil(math.log(0.1) / math.log1p(-share))
        yield (
            f"Consider updates of {needed} trajectories or other prompts, because {share:.1%} of the rewards differ "
            f"from {common:g}: an update of {rows} has none of these with probability {empty:.2g}, one of {needed} "
            "with 0.1, and then nothing says which completion is better."
        )


def _of_groups(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """Groups with equal rewards have equal δ at π_ref, and subtracting the mean leaves 0."""
    compares = SoftValue.registry[args.soft_value].compares
    if not (compares or args.reward_baseline == "group_mean") or not np.ptp(window.rewards):
        return
    groups: dict[str, list[float]] = {}
    for row in window.rows:
        if row.counted:
            groups.setdefault(row.prompt, []).append(row.reward)
    equal = np.mean([min(rewards) == max(rewards) for rewards in groups.values()])
    if equal > 0.5:
        other = 'soft_value="calibrated"' if compares else 'reward_baseline="none"'
        yield (
            f"Consider num_generations above {args.num_generations} or {other}, because in {equal:.0%} of the groups "
            "all rewards are equal: such a group teaches nothing while the policy is the reference."
        )


def _of_beta(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """The target depends on R/β, so rewards of a wider span need a larger β."""
    if args.length_normalized or not np.ptp(window.rewards):
        return  # β is then in reward units per nat and token; or the span of the rewards is unknown
    length = float(np.mean([row.length for row in window.rows]))
    span = 1.0 if args.soft_value == "quantile" else window.span  # quantiles lie between 0 and 1
    beta = span * power_law(BETA_BY_LENGTH, length)
    if 1 / FAR < args.beta / beta < FAR:
        return
    wrong = "too large a beta is stiff" if args.beta > beta else "too small a beta collapses in the end"
    yield (
        f"Consider beta={beta:.2g}, because completions have {length:.0f} tokens and rewards span {span:.3g}. For a "
        "span of 1, 0.02 near 600 tokens and 0.002 near 5,000 were published: "
        f"beta={args.beta:g} is {args.beta / beta:.2g} times what follows, and {wrong}."
    )


def _of_rate(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """Nothing is known of adapters, optimizers other than Adam, and sizes below half or above twice those trained."""
    (least, _), *_, (most, _) = RATE_BY_SIZE
    if window.size is None or not least / 2 < window.size < 2 * most or "adam" not in str(args.optim.value):
        return
    rate = power_law(RATE_BY_SIZE, window.size)
    if args.learning_rate and not 1 / FAR < args.learning_rate / rate < FAR:
        yield (
            f"Consider learning_rate={rate:.2g}, because {window.size / 1e6:.0f} million parameters are trained. What "
            "trained well was 2e-5 for 135 million, 2.5e-6 for 1,500 million and 2e-6 for 7,600 million: "
            f"learning_rate={args.learning_rate:g} is {args.learning_rate / rate:.2g} times what follows."
        )


def _of_soft_value(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """Unless R/β dwarfs V, the residual of the untrained model is mostly V."""
    if args.soft_value == "policy" and abs(window.soft_value) > 0.1 * window.span:
        value = window.soft_value / args.beta
        yield (
            f'Consider soft_value="calibrated", or beta below {0.1 * window.span / abs(value):.2g}, because V(s_1) is '
            f"{value:.1f} nats on average, not small against the {window.span / args.beta:.1f} nats that R/beta spans: "
            "the first updates move the policy, whatever it earns."
        )


def _of_constant(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """β V* is at least E_ref R. A constant that is nats below it moves the target on data of another policy."""
    others = args.num_iterations > 1 or drawn_ahead(args) or not all(row.drawn for row in window.rows)
    if args.soft_value not in ("optimal", "model") or args.soft_value_offset or not others:
        return
    own = [row for row in window.rows if row.drawn and row.counted]
    earned = np.array([row.reward - row.baseline for row in own])  # (n,)
    value = np.array([row.value for row in own])  # (n,)
    if len(own) < 2:
        return
    below, error = (earned - value).mean(), (earned - value).std(ddof=1) / math.sqrt(len(own))
    if below - 2 * error > args.beta:
        yield (
            'Consider soft_value="calibrated" or soft_value_offset=True, because beta V is a constant, '
            f"{value.mean():.2g} on average, and the right one is not below the mean reward, {earned.mean():.2g}: "
            f"{below / args.beta:.2g} nats are missing, and they move the target on data that the policy did not just "
            "draw."
        )


def _of_shift(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """A shift of all rewards is an error of V. On-policy it adds only variance, but much of it."""
    free = args.soft_value in ("policy", "calibrated", "learned", "zero")
    lowest, mean, spread = window.rewards.min(), window.rewards.mean(), window.rewards.std()
    if not free or args.reward_baseline != "none" or not spread:
        return
    noise = (
        f"beta V is {window.soft_value:.2g}: the residual is mostly what all completions share, and its gradient is "
        "noise."
    )
    if mean < 0 and spread < window.soft_value - mean:
        yield (
            f"Consider adding {-lowest:.3g} to every reward, because they are {mean:.2g} on average, with a standard "
            f"deviation of {spread:.2g}, and {noise}"
        )
    elif lowest - window.soft_value > window.span:
        yield (
            f"Consider subtracting {lowest:.3g} from every reward, because the lowest is {lowest:.3g}, they span "
            f"{window.span:.2g}, and {noise}"
        )


def _of_v_rate(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """For a given policy the best trained V is a mean. An update moves V by at most η, or 2 η if it is a head."""
    if not (args.soft_value_offset or args.soft_value == "learned"):
        return
    step = args.soft_value_learning_rate * (1 if args.soft_value_offset else 2)
    earned = np.array([row.reward - row.baseline for row in window.rows if row.counted])  # (N,)
    way, soon = abs(earned.mean() - window.soft_value), window.updates / 4
    if way / step > soon:
        mean = "the mean reward" if np.array_equal(earned, window.rewards) else "the mean reward less its baseline"
        yield (
            f"Consider soft_value_learning_rate={args.soft_value_learning_rate * way / step / soon:.2g}, because "
            f"beta V is {way:.2g} away from {mean} and moves by {step:.2g} an update at most: that takes "
            f"{math.ceil(way / step)} of the run's {window.updates} updates."
        )


def _of_cuts(window: FirstWindow, args: TBRMOptions) -> Iterator[str]:
    """If a cut counts as an end like any other, it does no harm as long as cut completions can be right."""
    drawn = [row for row in window.rows if row.drawn]
    cut = [row for row in drawn if row.cut]
    if len(cut) <= len(drawn) / 2:
        return
    lowest = window.rewards.min()
    if args.truncation == "terminal" and any(row.reward > lowest for row in cut):
        return
    reasons = {
        "terminal": f"none of these earns more than {lowest:g}",
        "mask": "these leave the loss",
        "bootstrap": "only complete ones anchor V",
    }
    yield (
        f"Consider max_completion_length above {args.max_completion_length}, because {len(cut) / len(drawn):.0%} of "
        f"the completions are cut there, and {reasons[str(args.truncation)]}."
    )
