"""The papers' ablations on a small model: token-level residual, frozen V, calibration over β, shape of the reward.

    python benchmarks/ablations.py                        # about ten minutes on one core
    python benchmarks/ablations.py --quick                # a minute, to a temporary folder

Everything is written to docs/benchmarks/ablations.{json,md,png}. A run whose result is already in the JSON is not
repeated; delete the JSON to start over. The task is the one of benchmarks/comparison.py; nothing is downloaded.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from common import tasks
from common.measure import set_up
from common.report import (
    T_95,
    Store,
    band,
    listed,
    mean_and_error,
    parse,
    plt,
    show,
    table,
    versions,
    write,
)
from common.tasks import Measure
from torch import Tensor

from tbrm_trl import SoftValue
from tbrm_trl.loss.soft_value import ValueInputs

VERSIONS = versions("torch", "transformers", "trl", "tbrm-trl")
ROWS, GROUP = 64, 4  # trajectories per update, and per prompt in (d)
SELECTION_SEED = 100  # no final run uses its words


class FrozenValue(SoftValue):
    """V_θ(s_1) without gradient, as in examples/frozen_soft_value.py."""

    name = "frozen"

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.policy_value.detach()  # (B,) nats


@dataclass(frozen=True)
class Variant:
    """The settings that differ between runs, by default TBRM's. As text they are part of a run's key in the JSON."""

    soft_value: str = "policy"
    beta: float = 0.02
    residual: str = "trajectory"
    num_generations: int = 1
    reward_baseline: str = "none"
    rewards: str = "0/1"

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


TBRM = Variant()
CALIBRATED = Variant(soft_value="calibrated", num_generations=GROUP)
PAIRS = [(name, beta) for beta in (0.2, 0.02, 0.002) for name in ("policy", "calibrated")]


@dataclass(frozen=True)
class Ablation:
    """Variants by label. Each is compared with the first, or with `pairs` the second of each pair with its first."""

    title: str
    published: str
    variants: dict[str, Variant]
    pairs: bool = False

    def base(self, place: int) -> int:
        return place - place % 2 if self.pairs else 0


ABLATIONS = (
    Ablation(
        "(a) The residual of the trajectory or of each token",
        "the token-level residual collapses on language models (arXiv 2505.15311, App. H.3).",
        {"trajectory": TBRM, "token": replace(TBRM, residual="token")},
    ),
    Ablation(
        "(b) V with gradient or frozen",
        "freezing V is worse (arXiv 2505.15311, App. F).",
        {"with gradient": TBRM, "frozen": replace(TBRM, soft_value="frozen")},
    ),
    Ablation(
        "(c) V of the policy or calibrated",
        "calibration matters once R/β no longer dwarfs V; a large β is stiff, a small one collapses in the end on long "
        "runs (arXiv 2603.23355).",
        {f"{name}, β = {beta:g}": Variant(soft_value=name, beta=beta) for name, beta in PAIRS},
        pairs=True,
    ),
    Ablation(
        "(d) The shape of the reward",
        "rewards of ±1 hurt, those centred per group help models that do not reason (arXiv 2603.23355).",
        {
            "0/1": CALIBRATED,
            "±1": replace(CALIBRATED, rewards="±1"),
            "±1, twice β": replace(CALIBRATED, rewards="±1", beta=2 * CALIBRATED.beta),
            "0/1 less group mean": replace(CALIBRATED, reward_baseline="group_mean"),
        },
    ),
)


@dataclass(frozen=True)
class Scale:
    updates: int
    seeds: range
    learning_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    demonstration_steps: int = 300


class Results:
    """The results by run. A missing run is trained when its result is needed."""

    def __init__(self, runs: Store, scale: Scale, models: Path) -> None:
        self.runs, self.scale, self.models = runs, scale, models

    @cache  # noqa: B019  all variants share a starting model
    def task(self, stage: str, seed: int) -> tasks.Task:
        folder = self.models / f"{stage}{seed}"
        return tasks.sorting(folder, seed, self.scale.demonstration_steps, selection=stage == "selection")

    def train(self, variant: Variant, stage: str, learning_rate: float, seed: int) -> dict:
        task, updates = self.task(stage, seed), self.scale.updates
        reward = task.reward
        if variant.rewards == "±1":
            task = replace(task, reward=lambda **given: [2 * earned - 1 for earned in reward(**given)])
        measure = Measure(task, {updates * eighth // 8 for eighth in range(9)})
        more = {name: value for name, value in asdict(variant).items() if name != "rewards"}
        trainer = tasks.train(
            "TBRM", measure, learning_rate=learning_rate, max_steps=updates, seed=seed,
            per_device_train_batch_size=ROWS, logging_strategy="steps", logging_first_step=True, logging_steps=updates,
            **more,
        )  # fmt: skip
        return {
            "points": [[updates, accuracy] for updates, _, accuracy, *_ in measure.points],
            "soft_value": round(trainer.state.log_history[0]["soft_value"] / variant.beta, 3),  # nats, before training
            "seconds": measure.cpu_seconds,
        }

    def run(self, variant: Variant, stage: str, learning_rate: float, seed: int) -> dict:
        key = f"{stage}: {variant} lr={learning_rate:g} updates={self.scale.updates} seed={seed}"
        if key not in self.runs:
            self.runs[key] = self.train(variant, stage, learning_rate, seed)
            print(key, *(f"{accuracy:.3f}" for _, accuracy in self.runs[key]["points"]), flush=True)
        return self.runs[key]

    def selection(self, variant: Variant) -> dict[float, float]:
        """Final accuracy by learning rate, on the seed and words reserved for the selection."""
        runs = {rate: self.run(variant, "selection", rate, SELECTION_SEED) for rate in self.scale.learning_rates}
        return {rate: run["points"][-1][1] for rate, run in runs.items()}

    def learning_rate(self, variant: Variant) -> float:
        rates = self.selection(variant)
        return max(rates, key=rates.__getitem__)

    def final(self, variant: Variant) -> list[dict]:
        return [self.run(variant, "final", self.learning_rate(variant), seed) for seed in self.scale.seeds]

    def curve(self, variant: Variant) -> dict[int, list[float]]:
        """Accuracies over seeds, by updates."""
        along = zip(*(run["points"] for run in self.final(variant)), strict=True)
        return {points[0][0]: [accuracy for _, accuracy in points] for points in along}


def section(ablation: Ablation, results: Results) -> str:
    rates, labels = results.scale.learning_rates, list(ablation.variants)
    curves = [list(results.curve(variant).values()) for variant in ablation.variants.values()]
    rows, found = [], []
    for place, (variant, curve) in enumerate(zip(ablation.variants.values(), curves, strict=True)):
        rate, base = results.learning_rate(variant), ablation.base(place)
        edge, highest = " (edge)" if rate in (rates[0], rates[-1]) else "", max(map(statistics.mean, curve))
        difference, remarks = "", []
        if place != base:
            pairs = [mine - other for mine, other in zip(curve[-1], curves[base][-1], strict=True)]
            mean, error = mean_and_error(pairs)
            difference = f"{mean:+.3f} ± {error:.3f} to {labels[base]}"
            clear = abs(mean) > T_95.get(len(pairs), 2.6) * error
            verdict = ("better" if mean > 0 else "worse") if clear else "no clear difference"
            found.append(f"{labels[place]}: {verdict}")
            remarks.append(f"higher on {sum(pair > 0 for pair in pairs)} of {len(pairs)} seeds")
        if statistics.mean(curve[-1]) < statistics.mean(curve[0]):
            remarks.append("ends below its start")
        cells = [labels[place], f"{rate:g}{edge}", f"{highest:.3f}", show(curve[-1])]
        rows.append([*cells, difference, ", ".join(remarks)])
    header = ["", "learning rate", "highest mean", "final accuracy", "difference, paired by seed", ""]
    here = "; ".join(found)
    return f"## {ablation.title}\n\n- Published: {ablation.published}\n- Here: {here}.\n\n{table(header, rows)}"


def selection_section(results: Results) -> str:
    rows: dict[Variant, list[str]] = {}
    for ablation in ABLATIONS:
        for label, variant in ablation.variants.items():
            best = results.learning_rate(variant)
            cells = [f"**{x:.3f}**" if rate == best else f"{x:.3f}" for rate, x in results.selection(variant).items()]
            rows.setdefault(variant, [f"{ablation.title[:3]} {label}", *cells])
    return table(["", *(f"{rate:g}" for rate in results.scale.learning_rates)], list(rows.values()))


def report(results: Results) -> str:
    sections = "\n\n".join(section(ablation, results) for ablation in ABLATIONS)  # trains missing runs
    base, seeds, updates = results.final(TBRM), len(results.scale.seeds), results.scale.updates
    start, value = (statistics.mean(of) for of in ([r["points"][0][1] for r in base], [r["soft_value"] for r in base]))
    seconds = sum(run["seconds"] for run in results.runs.values())
    compared = sum(ablation.base(i) != i for ablation in ABLATIONS for i in range(len(ablation.variants)))
    return f"""# Ablations on a small model

Written by `python benchmarks/ablations.py`; raw numbers: [ablations.json](ablations.json). {seconds:.0f} CPU seconds of
training on one thread; {listed(VERSIONS)}.

![held-out accuracy during training](ablations.png)

The task is that of [comparison.md](comparison.md): a two-layer Llama of width 32, made from random weights and noisy
demonstrations, sorts the letters of words. Accuracy is the exact probability of the right completion at T = 1 on words
that no run trains on; before training it is {start:.3f}, and V_θ(s_1) is {value:.1f} nats (in real models 15 to 35).
Every run has {updates} updates of {ROWS} fresh trajectories, AdamW, linear decay, gradient norm clipped at 1. Unless
said otherwise: soft value `policy`, β = {TBRM.beta:g}, one rollout per prompt, reward 1 if right, else 0.

± is the standard error over {seeds} seeds, on which all variants share their start. "Highest mean" is that of the
curve. "Better" and "worse": the difference, paired by seed, is significant at 5% (Student's t); {seeds} seeds only
show large effects, and one of {compared} may be by chance. The learning rate is each variant's best on another seed
and other words (below); "edge": at the end of the grid.

{sections}

All of (d) has the soft value `calibrated` and {GROUP} rollouts per prompt. Rewards of ±1 are `2R − 1`: their span is
twice that of R, and at twice β only the shift is left.

## Selection of the learning rate

Final accuracy on seed {SELECTION_SEED} and the other half of the words.

{selection_section(results)}
"""


def draw(results: Results) -> plt.Figure:
    figure, panels = plt.subplots(1, len(ABLATIONS), figsize=(15, 4.4), sharey=True)
    for axes, ablation in zip(panels, ABLATIONS, strict=True):
        for place, (label, variant) in enumerate(ablation.variants.items()):
            curve = results.curve(variant)
            color, style = (place // 2, "--" if place % 2 else "-") if ablation.pairs else (place, "-")
            band(axes, list(curve), curve.values(), style, color=f"C{color}", label=label)
        axes.set(xlabel="updates", ylim=(0, 1))
        axes.set_title(ablation.title, fontsize=10)
        axes.legend(loc="upper left")
    panels[0].set_ylabel("held-out accuracy (mean ± s.e. over seeds)")
    return figure


def main() -> None:
    arguments = parse(
        __doc__,
        quick="one short run of each",
        seeds=dict(type=int, default=3, help="how many (default: 3)"),
        updates=dict(type=int, default=160, help="of each run (default: 160)"),
    )
    scale = Scale(arguments.updates, range(arguments.seeds))
    if arguments.quick:
        scale = Scale(8, range(1), (1e-3,), 100)
    set_up()
    runs = Store(arguments.output / "ablations.json", environment=VERSIONS)
    with tempfile.TemporaryDirectory() as folder:
        results = Results(runs, scale, Path(folder))
        write(arguments.output, "ablations", report(results), figure=draw(results))


if __name__ == "__main__":
    main()
