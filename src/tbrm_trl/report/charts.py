"""Turn a run's numbers into the plain lists of a report's charts. All functions are pure."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..run_log import EVALUATED
from .run import RunFolder, Updates

POINTS = 1000  # most points of a line; with more log entries, each point averages several
PARTS = 200  # most parts of a run for which quantiles are taken
PERIODS = 12  # most periods of a run in which the soft value is compared with the realised one
PROMPTS = 400  # most prompts shown per period
QUANTILES = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}

# Title, explanation, unit, and pattern of the metrics on the chart.
CHARTS: tuple[tuple[str, str, str, str], ...] = (
    (
        "Reward",
        "Mean reward of rollouts.",
        "reward",
        r"reward",
    ),
    (
        "Reward functions",
        "The mean of each.",
        "reward",
        r"rewards/[^/]+/mean",
    ),
    (
        "Evaluation",
        "On held-out prompts: rewards and accuracies.",
        "",
        EVALUATED.pattern,
    ),
    (
        "Residual",
        "Mean of β δ, and root of the mean of (β δ)², over all trajectories and by origin.",
        "reward",
        r"residual/(mean|(\w+_)?rms)",
    ),
    (
        "Soft value and log-ratio",
        "Means of β V and of β log π_θ/π_ref. Their sum tends to R.",
        "reward",
        r"soft_value|log_ratio",
    ),
    (
        "KL",
        "Of the policy to the reference, over fresh rollouts.",
        "nats per token",
        r"kl",
    ),
    (
        "Entropy",
        "Of the distributions that actions were drawn from. A fall to 0 is collapse.",
        "nats per token",
        r"entropy",
    ),
    (
        "Length",
        "Of completions, in tokens.",
        "tokens",
        r"completions/(mean|min|max)_length",
    ),
    (
        "Cut, left out and padding",
        "Shares: cut at the length limit, left out of the loss, and padding.",
        "share",
        r"completions/clipped_ratio|left_out/\w+|pad_fraction",
    ),
    (
        "Replay",
        "Updates since replayed trajectories were drawn.",
        "updates",
        r"replay/age(_max)?",
    ),
    (
        "Optimizer",
        "Norm of the gradient.",
        "",
        r"grad_norm",
    ),
    (
        "Skipped updates",
        "Updates that were not taken, since the start.",
        "updates",
        r"skipped_updates",
    ),
)
TIMES = ("generation_time", "rollouts_time", "rewards_time", "reference_time")


def charts_of(run: RunFolder) -> list[dict[str, Any]]:
    """Every line chart for which the run has numbers: title, text, unit, steps and lines by name.

    Each point is the mean of `entries_per_point` log entries.
    """
    charts, logged = [], [entry["step"] for entry in run.log]
    for title, text, unit, pattern in CHARTS:
        names = dict.fromkeys(name for entry in run.log for name in entry if re.fullmatch(pattern, name))
        lines = _columns(run.log, names)
        if title in ("Cut, left out and padding", "Skipped updates"):  # most of these metrics stay at 0
            lines = {name: values for name, values in lines.items() if any(value > 0 for value in values)}
        if title != "Reward functions" or len(lines) > 1:
            charts += _chart(title, text, unit, logged, lines)
    charts += _chart("Time", "Seconds of an update, by what they went into.", "seconds", logged, _time_split(run.log))
    steps, lines = quantiles_by_step(run.updates.step, run.updates.residual)
    charts += _chart("Distribution of the residual", "Quantiles of β δ over trajectories.", "reward", steps, lines)
    oldest = {"median": 0.5, "95%": 0.95, "oldest": 1.0}
    steps, lines = quantiles_by_step(run.updates.step, run.updates.age, oldest)
    charts += _chart(
        "Staleness", "Updates between a trajectory's drawing and its use: fresh, reused and replayed.", "updates",
        steps, lines,
    )  # fmt: skip
    return charts


def _chart(title: str, text: str, unit: str, steps: Sequence[int], lines: Mapping[str, Any]) -> list[dict]:
    """One chart without lines and steps that have no number; an empty list if there are no numbers at all."""
    columns = {name: np.array(values, float) for name, values in lines.items()}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    if not columns:
        return []
    has_any = np.any([np.isfinite(values) for values in columns.values()], axis=0)
    kept = np.array(steps)[has_any]
    columns = {name: values[has_any] for name, values in columns.items()}
    per_point = math.ceil(len(kept) / POINTS)
    return [
        {
            "title": title,
            "text": text,
            "unit": unit,
            "entries_per_point": per_point,
            "steps": kept[(len(kept) - 1) % per_point :: per_point].tolist(),
            "lines": {name: plain(_thinned(values, per_point)) for name, values in columns.items()},
        }
    ]


def _thinned(values: np.ndarray, per_point: int) -> np.ndarray:
    """Means over every `per_point` values. The first may be over fewer, so that the last is over the last values."""
    if per_point == 1:
        return values
    missing = -len(values) % per_point
    whole = np.concatenate([np.full(missing, np.nan), values]).reshape(-1, per_point)  # (N, P)
    number = np.isfinite(whole).sum(axis=1)
    return np.where(number > 0, np.nansum(whole, axis=1) / np.maximum(number, 1), np.nan)


def _columns(log: Sequence[Mapping[str, Any]], names: Any) -> dict[str, list[Any]]:
    return {name: [_number(entry.get(name)) for entry in log] for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _time_split(log: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Seconds by part. The rest of `step_time` is the policy's forward and backward pass."""
    parts = {name: np.array(values) for name, values in _columns(log, TIMES).items()}
    whole = np.array(_columns(log, ["step_time"])["step_time"])
    if not any(np.isfinite(part).any() for part in parts.values()):
        return {"whole update": whole}
    policy = whole - np.nansum(list(parts.values()), axis=0)
    return {**{name.removesuffix("_time"): part for name, part in parts.items()}, "policy": policy}


def quantiles_by_step(
    step: np.ndarray, values: np.ndarray, quantiles: Mapping[str, float] = QUANTILES
) -> tuple[list[int], dict[str, list[float]]]:
    """Quantiles of the values at each step, or in each of `PARTS` equal parts of a run with more steps.

    Args:
        step: `(N,)` in ascending order.
        values: `(N,)` NaN where there is no value.
        quantiles: by name, the quantiles to take.

    Returns:
        The last step of each part, and the quantiles of each part by name.
    """
    known = np.isfinite(values)
    step, values = step[known], values[known]
    different = np.unique(step)
    ends = different[np.unique(np.linspace(0, len(different), min(len(different), PARTS) + 1)[1:].astype(int) - 1)]
    parts = np.split(values, np.searchsorted(step, ends[:-1], side="right")) if len(ends) else []
    columns = np.array([np.quantile(part, list(quantiles.values())) for part in parts]).reshape(-1, len(quantiles))
    return ends.tolist(), {name: columns[:, place].tolist() for place, name in enumerate(quantiles)}


def calibration(updates: Updates) -> list[dict[str, Any]]:
    """For each period of the run and each prompt, the predicted β V and the value its trajectories imply.

    One trajectory implies `β V − β δ = R − β log π_θ/π_ref`. Several of a prompt imply `β log mean exp` of that over β.
    For trajectories drawn by the policy this estimates `β log E_ref exp(R/β)` by importance weights. At the optimum,
    predicted and implied values are equal for every prompt. β is that of the trajectories' update. A prompt that occurs
    under two β in a period counts as two prompts.
    """
    known = np.isfinite(updates.residual)
    step, beta = updates.step[known], updates.beta[known]
    prompt = np.unique(updates.prompt[known], return_inverse=True)[1]  # (K,) numbers of the prompts
    predicted, implied = updates.soft_value[known], (updates.soft_value - updates.residual)[known]
    steps = np.unique(step)
    periods = []
    for part in np.array_split(steps, min(PERIODS, len(steps))) if len(steps) else []:
        mine = (step >= part[0]) & (step <= part[-1])
        by_beta = np.unique(beta[mine], return_inverse=True)[1]
        _, place = np.unique(prompt[mine] * (by_beta.max() + 1) + by_beta, return_inverse=True)
        count = np.bincount(place)  # (Q,)
        mean = np.bincount(place, predicted[mine]) / count
        realised = log_mean_exp_by(place, implied[mine], beta[mine])
        gap = mean - realised
        order = np.argsort(realised, kind="stable")
        shown = order[np.unique(np.linspace(0, len(order) - 1, min(PROMPTS, len(order))).astype(int))]
        periods.append(
            {
                "first": int(part[0]),
                "last": int(part[-1]),
                "prompts": len(count),
                "mean_gap": plain([gap.mean()])[0],
                "rms_gap": plain([math.sqrt(np.square(gap).mean())])[0],
                "realised": plain(realised[shown]),
                "predicted": plain(mean[shown]),
            }
        )
    return periods


def log_mean_exp_by(place: np.ndarray, values: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """`β log mean exp(values/β)` over the values at each place, which share one β. `(N,)` three times → `(Q,)`."""
    largest = np.full(place.max() + 1, -np.inf)
    np.maximum.at(largest, place, values)
    sums = np.bincount(place, np.exp((values - largest[place]) / beta))
    of_place = np.empty_like(largest)  # (Q,)
    of_place[place] = beta
    return largest + of_place * np.log(sums / np.bincount(place))


def plain(values: Any) -> list[float | None]:
    """Numbers for JSON: whole ones as they are, others to six significant digits. NaN and infinity become None."""
    return [
        None if not math.isfinite(value) else float(value if float(value).is_integer() else f"{value:.6g}")
        for value in values
    ]
