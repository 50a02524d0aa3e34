"""Run the demo at three seeds and write docs/demo.md and docs/demo.png from what it measured.

    make slow        # or: python benchmarks/demo_seeds.py

A seed whose metrics.json is already in the output folder is not run again.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from common.report import ROOT, listed, parse, plt, table, versions, write


def run(seed: int, output: Path) -> dict:
    folder = output / f"seed{seed}"
    if not (folder / "metrics.json").exists():
        demo = ROOT / "examples/reasoning_gym_demo.py"
        subprocess.run([sys.executable, str(demo), "--seed", str(seed), "--output", str(folder)], check=True)
    return json.loads((folder / "metrics.json").read_text())


def draw(runs: dict[int, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 4))
    for color, (seed, metrics) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        history = metrics["history"]
        steps = [row["step"] for row in history]
        axes.plot(steps, [row["reward"] for row in history], color=color, alpha=0.3)
        held_out = metrics["held_out"]["sampled"]
        axes.errorbar(
            [0, steps[-1]],
            [held_out["before"]["mean"], held_out["after"]["mean"]],
            yerr=[held_out["before"]["standard_error"], held_out["after"]["standard_error"]],
            fmt="o--",
            color=color,
            capsize=4,
            label=f"seed {seed}",
        )
    axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1))
    axes.set_title(
        "SmolLM2-135M, sums of two digits: held out before and after (points ± s.e.), training reward (lines)",
        fontsize=9,
    )
    axes.legend(loc="upper left")
    return figure


def report(runs: dict[int, dict]) -> str:
    first = next(iter(runs.values()))
    settings, sampled = first["settings"], first["held_out"]["sampled"]["before"]
    rows = []
    for seed, metrics in runs.items():
        cells = [
            f"{result[when]['mean']:.3f} ± {result[when]['standard_error']:.3f}"
            for result in (metrics["held_out"]["sampled"], metrics["held_out"]["greedy"])
            for when in ("before", "after")
        ]
        rows.append([str(seed), *cells, f"{metrics['seconds']:.0f}"])
    header = ["seed", f"sampled (avg@{sampled['samples']}, T = 1) before", "after", "greedy before", "after", "seconds"]
    before, after = (
        statistics.median(metrics["held_out"]["sampled"][when]["mean"] for metrics in runs.values())
        for when in ("before", "after")
    )
    packages = listed(versions("torch", "transformers", "trl", "reasoning-gym"))
    return f"""# The demo, measured

Written by `make slow` on {datetime.date.today()}; {first["device"]}, {platform.machine()}, {packages}.

{settings["model"]} on `{settings["task"]}` of reasoning-gym, {settings["difficulty"]}:
{settings["train_problems"]} training and {sampled["problems"]} held-out problems, distinct by question, split before
anything is sampled. Prompt: the question in the model's chat template, with the system message
"{first["system_prompt"]}". Answer: the last whole number of the completion, judged by the task's own verifier.
{settings["steps"]} steps of {settings["rollouts_per_step"]} rollouts, one per prompt; β = {settings["beta"]},
{settings["soft_value"]} soft value, learning rate {settings["learning_rate"]}, at most
{settings["max_completion_length"]} tokens, temperature {first["temperature"]}.

{table(header, rows)}

Median of the sampled accuracy: {before:.3f} before, {after:.3f} after. ± is the standard error over problems.
Seconds are of the whole script, both evaluations included, and depend on what else the machine is doing.

![learning curves](demo.png)
"""


def main() -> None:
    seeds = dict(type=int, nargs="+", default=[0, 1, 2])
    arguments = parse(__doc__, output=ROOT / "outputs/demo_seeds", seeds=seeds)
    runs = {seed: run(seed, arguments.output) for seed in arguments.seeds}
    write(ROOT / "docs", "demo", report(runs), figure=draw(runs))


if __name__ == "__main__":
    main()
