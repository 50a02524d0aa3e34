"""How far the estimators of the soft value end from π*, and what each does where there is no reward at all.

    python benchmarks/soft_values.py          # writes docs/benchmarks/soft_values.{md,png}; a few minutes on one core

The token trees and the exact targets are those of tests/test_soft_values_converge.py; nothing is downloaded.
"""

import datetime
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import tiny
from common import tree_targets as targets
from common.measure import quiet, set_up
from common.report import listed, parse, plt, table, versions, write
from common.trees import BOS, EOS, Policy, Task, Tree, total_variation
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from tbrm_trl import TBRMTrainer

BETA, SEED = 0.3, 2
GROUP_SIZES = (2, 4, 8, 16, 32)
SAMPLES, DRAWS, TRAINED_SAMPLES = tuple(2**i for i in range(9)), 200, (1, 4, 16, 64)
RATIOS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, math.inf)  # β₁/β
LOG_SIZE = 64  # rows per prompt
KL_STEPS, KL_EVERY, KL_SEEDS = 300, 5, 3
KL_RATES = {"table": 0.05, "transformer": 1e-3}
ESTIMATORS = ("policy", "calibrated", "zero", "group", "log_mean_exp", "optimal", "partition", "model")

TREE = Tree(depth=2, letters="abc", prompts=("a", "b", "cab"))
VOCABULARY = BOS + 1 + len(TREE.letters)


# ---- bias ------------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """Total variations: exact target (float64) to π*, trained policy to π*, and trained policy to exact target."""

    exact: float
    trained: float
    apart: float


class Bias:
    """Trains on logs with every trajectory in a known proportion, and compares the result with its exact target."""

    def __init__(self, folder: Path):
        self.task = Task(TREE, BETA, folder, SEED)
        uniform = TREE.counts(TREE.uniform)  # (P, N)
        # In proportion to π_ref, rounded to at least one row each; the most frequent one absorbs the rounding.
        like_ref = (LOG_SIZE * self.task.reference.probs).round().long().clamp(min=1)
        like_ref.scatter_add_(1, like_ref.argmax(dim=1, keepdim=True), LOG_SIZE - like_ref.sum(dim=1, keepdim=True))
        self.logs = {"uniform": uniform * LOG_SIZE // uniform.sum(dim=1, keepdim=True), "π_ref": like_ref}

    def target(self, value: Tensor, log: str) -> Policy:
        """The exact target on a log. `value` is in nats, `(P, 1)` or `(P, N)`."""
        return targets.minimiser(self.task.reference, self.task.rewards, BETA, value, self.logs[log])

    def point(self, target: Policy, trained: Policy) -> Point:
        best = self.task.best
        return Point(total_variation(target, best), total_variation(trained, best), total_variation(trained, target))

    @quiet()
    def train(self, log: str, soft_value: str, value: Tensor | None = None, **options) -> Policy:
        """Train on a log. `value`, `(P,)`, is V̂* of each prompt in reward units."""
        rows = self.task.tree.exact_log(self.task.rewards, self.logs[log])
        if value is not None:
            rows = self.task.with_values(rows, value)
        noisy = soft_value == "log_mean_exp"  # its groups change in every pass: smaller and more steps
        return self.task.train(
            rows, soft_value=soft_value, per_device_train_batch_size=len(rows),
            learning_rate=0.05 if noisy else 0.3, max_steps=200 if noisy else 150, **options,
        )  # fmt: skip

    def by_group_size(self, log: str) -> tuple[dict[int, Point], dict[int, Point]]:
        """The points of `log_mean_exp` and of `group`, by group size k."""
        mixed, grouped = {}, {}
        for k in GROUP_SIZES:
            value = targets.group_value(self.task.rewards, BETA, self.logs[log], k)  # (P, N)
            mixed[k] = self.point(self.target(value, log), self.train(log, "log_mean_exp", num_generations=k))
            grouped[k] = self.point(self.task.best, self.train(log, "group", num_generations=k))
            print(f"log {log}, k = {k}: log_mean_exp {mixed[k]}, group {grouped[k]}", flush=True)
        return mixed, grouped

    def by_samples(self) -> tuple[dict[int, list[float]], dict[int, Point]]:
        """`optimal`, β₁ = β, uniform log: distances of many draws of V̂* from N samples; for some N, one is trained."""
        distances, points = {}, {}
        for n in SAMPLES:
            values = targets.sampled_value(self.task.reference, self.task.rewards, BETA, n, DRAWS)  # (DRAWS, P)
            drawn = [self.target(value[:, None] / BETA, "uniform") for value in values]
            distances[n] = [total_variation(target, self.task.best) for target in drawn]
            if n in TRAINED_SAMPLES:
                points[n] = self.point(drawn[0], self.train("uniform", "optimal", values[0]))
                print(f"N = {n}: mean {np.mean(distances[n]):.3f}, one draw {points[n]}", flush=True)
        return distances, points

    def by_ratio(self, log: str) -> dict[float, Point]:
        """`optimal` with the exact `β₁ log E_ref exp(R/β₁)`, by β₁/β."""
        points = {}
        for ratio in RATIOS:
            value = targets.reward_value(self.task.reference, self.task.rewards, ratio * BETA)  # (P,)
            points[ratio] = self.point(self.target(value[:, None] / BETA, log), self.train(log, "optimal", value))
            print(f"log {log}, β₁/β = {ratio:g}: {points[ratio]}", flush=True)
        return points


# ---- no reward -------------------------------------------------------------------------------------------------------


class Drift(TrainerCallback):
    """Records how a policy drifts without reward, as means over prompts of sums over all possible completions.

    Attributes:
        kl: KL(π_θ‖π_ref) every `KL_EVERY` steps, from 0 on; nats.
        logged_mass: probability of the completions that the log covers, at the same steps.
        residual: root mean square of δ over the last of these intervals; nats.
    """

    residual: float

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.logged_mass: list[float] = []

    def measure(self, args, state, control, model=None, **kwargs):
        if state.global_step % KL_EVERY == 0:
            policy = log_probs(model)  # (P, N)
            if state.global_step == 0:
                self.reference = policy
            self.kl.append((policy.exp() * (policy - self.reference)).sum(dim=1).mean().item())
            self.logged_mass.append(policy[:, LOGGED].exp().sum(dim=1).mean().item())

    on_train_begin = on_step_end = measure


class NoReward:
    """Training with R = 0 on the skewed log of a bad behaviour policy. The target is π_ref, the start."""

    def __init__(self, network: str, folder: Path, seed: int = SEED):
        self.task, self.network = Task(TREE, BETA, folder, seed), network
        rows = TREE.exact_log(torch.zeros_like(self.task.rewards), TREE.counts(TREE.bad(self.task.rewards)))
        self.rows = self.task.with_values(rows, torch.zeros(len(TREE.prompts)))  # β₁ log mean exp(0), of any samples
        if network == "transformer":
            self.task.model = tiny.save(folder / "transformer", "llama", alphabet=TREE.letters, seed=seed)

    @quiet()
    def trainer(self, soft_value: str, **options) -> TBRMTrainer:
        if soft_value == "model":
            options["soft_value_model"] = tiny.save_value_model(self.task.folder / "value", "llama", SEED, TREE.letters)
        return self.task.trainer_on(
            self.rows, soft_value=soft_value, num_generations=2 if soft_value in ("group", "log_mean_exp") else 1,
            per_device_train_batch_size=len(self.rows), logging_strategy="steps", **options,
        )  # fmt: skip

    def first_step(self, soft_value: str) -> tuple[float, float]:
        """One step of SGD at rate 1: root mean square of δ before it (nats), and largest change of a parameter."""
        trainer = self.trainer(soft_value, optim="sgd", learning_rate=1.0, max_steps=1, logging_steps=1)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        with quiet():
            trainer.train()
        moves = [(p - b).abs().max().item() for p, b in zip(trainer.model.parameters(), before, strict=True)]
        return trainer.state.log_history[0]["residual/rms"] / BETA, max(moves)

    def drift(self, soft_value: str) -> Drift:
        drift, rate = Drift(), KL_RATES[self.network]
        trainer = self.trainer(
            soft_value, learning_rate=rate, max_steps=KL_STEPS, logging_steps=KL_EVERY, callbacks=[drift]
        )
        with quiet():
            trainer.train()
        drift.residual = [row["residual/rms"] / BETA for row in trainer.state.log_history if "residual/rms" in row][-1]
        print(f"{self.network}, {soft_value}: KL at most {max(drift.kl):.3f}, last {drift.kl[-1]:.3f}", flush=True)
        return drift


def ends_once(said: tuple[int, ...]) -> bool:
    """Whether nothing but <eos> follows an <eos>."""
    return EOS not in said or set(said[said.index(EOS) :]) == {EOS}


# All possible completions, also with <pad> and <bos>, filled up with <eos>. The log has only letters and <eos>.
SAID = torch.tensor(list(filter(ends_once, itertools.product(range(VOCABULARY), repeat=TREE.depth))))  # (N, depth)
ACTED = (SAID == EOS).cumsum(dim=1) - (SAID == EOS).int() == 0  # (N, depth) no <eos> before
LOGGED = torch.isin(SAID, torch.tensor(TREE.actions)).all(dim=1)  # (N,)


@torch.no_grad()
def log_probs(model: PreTrainedModel) -> Tensor:
    """`(P, N)` log π of all possible completions of each prompt, float64."""
    rows = []
    for prompt in TREE.prompt_ids:
        ids = torch.cat([torch.tensor(prompt).expand(len(SAID), -1), SAID], dim=1)  # (N, T)
        logits = model(ids, torch.ones_like(ids)).logits[:, len(prompt) - 1 : -1].double()  # (N, depth, V)
        chosen = logits.log_softmax(dim=-1).gather(2, SAID[:, :, None]).squeeze(2)  # (N, depth)
        rows.append((chosen * ACTED).sum(dim=1))
    return torch.stack(rows)


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    start: float  # total variation from π_ref to π*
    by_group_size: dict[str, tuple[dict[int, Point], dict[int, Point]]]  # by log: log_mean_exp and group
    spread: dict[int, list[float]]
    by_samples: dict[int, Point]
    by_ratio: dict[str, dict[float, Point]]  # by log
    first_steps: dict[str, dict[str, tuple[float, float]]]  # by network and estimator
    drifts: dict[str, dict[str, list[Drift]]]  # by network and estimator, one for each seed


def measure(folder: Path) -> Results:
    bias = Bias(folder / "bias")
    spread, by_samples = bias.by_samples()
    return Results(
        start=total_variation(bias.task.reference, bias.task.best),
        by_group_size={log: bias.by_group_size(log) for log in bias.logs},
        spread=spread,
        by_samples=by_samples,
        by_ratio={log: bias.by_ratio(log) for log in bias.logs},
        first_steps={
            network: {name: NoReward(network, folder / network).first_step(name) for name in ESTIMATORS}
            for network in KL_RATES
        },
        drifts={
            network: {
                name: [NoReward(network, folder / f"{network}-{seed}", seed).drift(name) for seed in range(KL_SEEDS)]
                for name in ("policy", "calibrated")
            }
            for network in KL_RATES
        },
    )


def draw(results: Results) -> plt.Figure:
    figure, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(12, 7))

    def compare(name: str, x: Sequence[float], points: Mapping[Any, Point], color: str, label: str) -> None:
        """Draw the exact targets as a line and the trained policies as dots."""
        axes[name].plot(x, [p.exact for p in points.values()], color=color, label=label)
        axes[name].plot(x, [p.trained for p in points.values()], "o", color=color)

    finite = [ratio for ratio in RATIOS if math.isfinite(ratio)]
    places = [*finite, 2 * finite[-1]]  # ∞ is drawn one step further
    for color, log in (("C0", "uniform"), ("C1", "π_ref")):
        mixed, grouped = results.by_group_size[log]
        compare("A", GROUP_SIZES, mixed, color, f"log_mean_exp, log {log}")
        axes["A"].plot(GROUP_SIZES, [p.trained for p in grouped.values()], "x", color=color, label=f"group, log {log}")
        compare("C", places, results.by_ratio[log], color, f"optimal, log {log}")

    spread = list(results.spread.values())
    exact, trained = zip(*((point.exact, point.trained) for point in results.by_samples.values()), strict=True)
    axes["B"].plot(SAMPLES, np.mean(spread, axis=1), color="C0", label=f"optimal, mean of {DRAWS} draws")
    axes["B"].fill_between(SAMPLES, *np.quantile(spread, (0.1, 0.9), axis=1), color="C0", alpha=0.2, label="10% to 90%")
    axes["B"].plot(TRAINED_SAMPLES, exact, "_", color="black", markersize=14, label="one of them, exact")
    axes["B"].plot(TRAINED_SAMPLES, trained, "o", color="C0")

    for name, title, label, ticks, texts in (
        ("A", "group size", "k", GROUP_SIZES, GROUP_SIZES),
        ("B", "samples per prompt (uniform log)", "N", SAMPLES[::2], SAMPLES[::2]),
        ("C", "another temperature", "β₁/β", places, [*(f"{ratio:g}" for ratio in finite), "∞"]),
    ):
        axes[name].set(title=title, xlabel=label, xscale="log")
        axes[name].set_ylim(bottom=0)
        axes[name].set_xticks(ticks, map(str, texts))
        axes[name].minorticks_off()
    axes["A"].set_ylabel("total variation to π*")

    for name, network in (("D", "table"), ("E", "transformer")):
        for colour, (estimator, drifts) in zip(("C3", "C2"), results.drifts[network].items(), strict=True):
            for seed, drift in enumerate(drifts):
                steps = range(0, KL_STEPS + 1, KL_EVERY)
                axes[name].plot(steps, drift.kl, color=colour, label=estimator if seed == 0 else None)
        axes[name].set(title=f"no reward: {network}", xlabel="optimizer step", ylabel="KL(π_θ‖π_ref), nats")
    for axis in axes.values():
        axis.legend()
    return figure


def report(results: Results) -> str:
    packages = listed(versions("torch", "transformers", "trl"))
    logs = list(results.by_group_size)
    by_group_size = table(
        [
            "k",
            *(f"{what}, log {log}" for log in logs for what in ("`log_mean_exp` exact", "trained", "`group` trained")),
        ],
        [
            [str(k)]
            + [
                f"{distance:.3f}"
                for mixed, grouped in results.by_group_size.values()
                for distance in (mixed[k].exact, mixed[k].trained, grouped[k].trained)
            ]
            for k in GROUP_SIZES
        ],
    )
    drawn = results.by_samples
    by_samples = table(
        ["N", f"mean of {DRAWS} draws", "10% to 90%", "one draw, exact", "trained on it"],
        [
            [str(n), f"{np.mean(spread):.3f}", "{:.3f} to {:.3f}".format(*np.quantile(spread, (0.1, 0.9)))]
            + ([f"{drawn[n].exact:.3f}", f"{drawn[n].trained:.3f}"] if n in drawn else ["", ""])
            for n, spread in results.spread.items()
        ],
    )
    by_ratio = table(
        ["β₁/β", *(f"{what}, log {log}" for log in logs for what in ("exact", "trained"))],
        [
            ["∞" if math.isinf(ratio) else f"{ratio:g}"]
            + [f"{d:.3f}" for log in logs for p in [results.by_ratio[log][ratio]] for d in (p.exact, p.trained)]
            for ratio in RATIOS
        ],
    )
    first_steps = table(
        ["`soft_value`", *(f"{what}, {network}" for network in KL_RATES for what in ("rms δ", "largest move"))],
        [
            [f"`{name}`", *(f"{number:.2g}" for network in KL_RATES for number in results.first_steps[network][name])]
            for name in ESTIMATORS
        ],
    )
    drifts = table(
        ["network", "`soft_value`", "largest KL", f"KL after {KL_STEPS} steps", "rms δ then", "mass on the log"],
        [
            [network, f"`{name}`"]
            + [
                ", ".join(f"{number:.2g}" for number in numbers)
                for numbers in zip(*((max(d.kl), d.kl[-1], d.residual) for d in by_seed), strict=True)
            ]
            + [", ".join(f"{before:.2f} → {after:.2f}" for before, *_, after in (d.logged_mass for d in by_seed))]
            for network, by_name in results.drifts.items()
            for name, by_seed in by_name.items()
        ],
    )
    noisy = [point for mixed, _ in results.by_group_size.values() for point in mixed.values()]
    exact = [point for _, grouped in results.by_group_size.values() for point in grouped.values()]
    exact += [*drawn.values(), *(point for points in results.by_ratio.values() for point in points.values())]
    return f"""# The estimators of the soft value: bias off-policy, and drift without reward

Written by `python benchmarks/soft_values.py` on {datetime.date.today()}; CPU, {packages}.
That every estimator ends at its target is a test
([test_soft_values_converge.py](../../tests/test_soft_values_converge.py)); here is how far from π* these targets are.
Why they are there: [theory.md](../theory.md).

![bias by group size, samples and temperature; KL without reward](soft_values.png)

## Distance to π*

A tree of {len(TREE.prompts)} prompts with {len(TREE.completions)} trajectories each, random rewards in [0, 1), a random
reference, β = {BETA:g}. Distances are total variation, of the worst prompt; π_ref, the start, is
{results.start:.3f} from π*. The log holds {LOG_SIZE} trajectories of each prompt, in the proportions of a uniform
behaviour or (rounded) of π_ref, and every step takes all of it. *Exact* is the minimiser of the expected squared
residual on that log, computed in float64 without training: the lines of the figure, whose markers are trained. The
trained policy is within {max(point.apart for point in exact):.0e} of it; for `log_mean_exp`, whose groups are drawn
anew in every pass and leave noise, within {max(point.apart for point in noisy):.3f}.

### By group size

{by_group_size}

`group` has no bias at any k ≥ 2: its target is π*. `log_mean_exp` has two: with few trajectories the log of a mean is
too low on average, and a trajectory's own reward is in its own value. Both go away with k. What stays depends on who
drew the groups: their log-mean-exp tends to `log E_μ exp(R/β)`, which is V* on a log of π_ref (up to its rounding), and
another constant on that of another behaviour.

### By number of reference samples

`optimal` with β₁ = β on the uniform log; V̂* of each prompt from N samples, in reward units.

{by_samples}

### By β₁

`optimal` with the exact `β₁ log E_ref exp(R/β₁)` for β = {BETA:g}; ∞ is the mean of the rewards.

{by_ratio}

β₁ below β (towards the best sample) costs more than β₁ above it (towards the mean).

All of this is off-policy. On-policy each of these constants is a baseline, and the target is π*; that too is tested.

## No reward

R = 0, and θ = θ_ref: there is nothing to learn. The log is that of a bad behaviour, which takes at every state one
action half the time, with all trajectories in their exact proportion. Beside the table there is a transformer of two
layers over the same tokens.

One step of SGD at learning rate 1 (loss in reward units, β = {BETA:g}): root mean square of δ before it, in nats, and
the largest move of a parameter.

{first_steps}

`calibrated`, `zero`, `group`, `log_mean_exp` and `optimal` stay where they are. `policy` sees V_θ(s_1). `partition`
sees the log of what the log covers under π_ref: all of it in the table, while the transformer could also say <pad> and
<bos>, which the log never does. `model` sees whatever its value model says, here one with random weights.

KL(π_θ‖π_ref) over {KL_STEPS} steps of Adam (learning rate {KL_RATES["table"]:g} in the table and
{KL_RATES["transformer"]:g} in the transformer, falling linearly to 0), summed exactly over all that can be said;
{KL_SEEDS} seeds each.

{drifts}

In the table the log covers everything, so that δ = 0 only at π_ref with V = 0, and the drift is a transient. In the
transformer δ ends near 0 too, but elsewhere: V makes up for probability that moves to what the log never says.
"""


def main() -> None:
    output = parse(__doc__).output
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    write(output, "soft_values", report(results), figure=draw(results))


if __name__ == "__main__":
    main()
