"""Where TBRM and GRPO end on one log of off-policy trajectories, compared with the optimum in closed form.

    python benchmarks/exact_optimum.py        # writes docs/benchmarks/exact_optimum.{md,png}

The task and its log are those of tests/test_exact_optimum.py; nothing is downloaded.
"""

import datetime
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.measure import quiet, set_up
from common.report import listed, parse, plt, table, versions, write
from common.trees import Policy, Task, Tree, enumerate_policy, total_variation
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

BETAS = (0.5, 0.1)
LOG_SIZE, STEPS, BATCH, GROUP = 2048, 300, 128, 8
TBRM_LEARNING_RATES = (1.0,)
GRPO_LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)

TREE = Tree()
LOG = TREE.sampled_log(TREE.random_rewards(), TREE.uniform, LOG_SIZE)
BEHAVIOUR_LOG_PROB = -math.log(len(TREE.actions))  # of every logged token


class BehaviourAsOldPolicy(GRPOTrainer):
    """GRPO with the importance ratio π_θ/π_behaviour: the sampler's log-probabilities replace the old policy's.

    TRL keeps the log-probabilities that a `rollout_func` returns, but corrects for them only when vLLM samples.
    """

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]  # (B, T)
        return output


def from_log() -> Callable[..., dict[str, list]]:
    """A `rollout_func` for GRPO: each prompt gets its logged completions in random order, all before any repeats."""
    rng = random.Random(0)

    def deck(prompt: list[int]) -> Iterator[list[int]]:
        while True:
            cards = [row["completion_ids"] for row in LOG if row["prompt_ids"] == prompt]
            rng.shuffle(cards)
            yield from reversed(cards)

    decks = [deck(prompt) for prompt in TREE.prompt_ids]

    def roll_out(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        indices = [TREE.prompts.index(prompt.removeprefix("<bos>")) for prompt in prompts]
        drawn = [next(decks[index]) for index in indices]
        return {
            "prompt_ids": [TREE.prompt_ids[index] for index in indices],
            "completion_ids": drawn,
            "logprobs": [[BEHAVIOUR_LOG_PROB] * len(ids) for ids in drawn],
        }

    return roll_out


# By method, the arguments of `Task.trainer_on` besides the learning rate.
GRPO: dict[str, Any] = dict(
    rows=TREE.prompt_rows(len(TREE.prompts) * BATCH // GROUP), trainer_class=GRPOTrainer, config_class=GRPOConfig,
    num_generations=GROUP, scale_rewards="none",
)  # fmt: skip
RATIO = GRPO | {"trainer_class": BehaviourAsOldPolicy}
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "TBRM, `policy`": lambda: {"rows": LOG, "soft_value": "policy"},
    "TBRM, `calibrated`": lambda: {"rows": LOG, "soft_value": "calibrated"},
    "GRPO, log taken for its own rollouts": lambda: GRPO | {"rollout_func": from_log()},
    "GRPO, ratio to the behaviour policy, clipped": lambda: RATIO | {"rollout_func": from_log()},
    "GRPO, ratio to the behaviour policy, not clipped": lambda: RATIO | {"rollout_func": from_log(), "epsilon": 1e6},
    "GRPO, on-policy: no log, its own rollouts": lambda: GRPO,
}


@dataclass
class Outcome:
    """A policy, measured exactly. The distance is the worse prompt's; the others are means over prompts."""

    distance: float
    reward: float
    objective: float  # E[R] − β KL(π‖π_ref)


def outcome_of(policy: Policy, task: Task) -> Outcome:
    reward = (policy.probs * task.rewards).sum(dim=1).mean().item()
    kl = (policy.probs * (policy.log_probs - task.reference.log_probs)).sum(dim=1).mean().item()
    return Outcome(total_variation(policy, task.best), reward, reward - task.beta * kl)


@dataclass
class Run:
    learning_rate: float
    outcome: Outcome
    curve: dict[int, float]  # total variation by step


class Distance(TrainerCallback):
    """Records the total variation to π* at every tenth step."""

    def __init__(self, best: Policy):
        self.best = best
        self.curve: dict[int, float] = {}

    def measure(self, args, state, control, model: PreTrainedModel, **kwargs):
        if state.global_step % 10 == 0:
            self.curve[state.global_step] = total_variation(enumerate_policy(model, TREE), self.best)

    on_train_begin = on_step_end = measure


def best_run(name: str, beta: float, folder: Path) -> Run:
    """Train once per learning rate, and return the run that ends nearest to π*. TBRM has one rate."""
    task, runs = Task(TREE, beta, folder), []
    for rate in TBRM_LEARNING_RATES if "TBRM" in name else GRPO_LEARNING_RATES:
        distance = Distance(task.best)
        with quiet():
            policy = task.train(**METHODS[name](), learning_rate=rate, max_steps=STEPS, callbacks=[distance])
        runs.append(Run(rate, outcome_of(policy, task), distance.curve))
        print(f"beta {beta:g}, {name}, learning rate {rate:g}: {runs[-1].outcome}", flush=True)
    return min(runs, key=lambda run: run.outcome.distance)


def draw(runs: dict[float, dict[str, Run]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(runs), figsize=(10, 4), sharey=True)
    for axis, (beta, by_name) in zip(axes, runs.items(), strict=True):
        for name, run in by_name.items():
            axis.semilogy(
                *zip(*run.curve.items(), strict=True), "-" if "TBRM" in name else "--", label=name.replace("`", "")
            )
        axis.axhline(0.01, color="gray", linewidth=0.8)
        axis.set(title=f"β = {beta:g}", xlabel="optimizer step")
    axes[0].set_ylabel("total variation to π*")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def outcomes(runs: dict[float, dict[str, Run]], folder: Path) -> str:
    rows = []
    for beta, by_name in runs.items():
        task = Task(TREE, beta, folder)
        exact = {"π_ref, where all start": task.reference, "π*": task.best}
        measured = {name: (outcome_of(policy, task), "") for name, policy in exact.items()}
        measured |= {name: (run.outcome, f"{run.learning_rate:g}") for name, run in by_name.items()}
        for name, (outcome, rate) in measured.items():
            far = f"{outcome.distance:.3f}" if outcome.distance >= 0.001 or name in exact else f"{outcome.distance:.0e}"
            rows.append([f"{beta:g}", name, far, f"{outcome.reward:.3f}", f"{outcome.objective:.4f}", rate])
    return table(["β", "", "total variation to π*", "E[R]", "E[R] − β KL(π‖π_ref)", "learning rate"], rows)


def report(runs: dict[float, dict[str, Run]], folder: Path) -> str:
    packages = listed(versions("torch", "transformers", "trl"))
    return f"""# Off-policy, to the exact optimum

Written by `python benchmarks/exact_optimum.py` on {datetime.date.today()}; CPU, {packages}.
That TBRM comes within 0.01 of π* is a test ([test_exact_optimum.py](../../tests/test_exact_optimum.py)); the rest is
reported, not asserted.

The policy is a table of logits on a token tree: {len(TREE.prompts)} prompts, {len(TREE.actions)} actions (letters and
`<eos>`), at most {TREE.depth} tokens, hence {len(TREE.completions)} trajectories per prompt, each with a random reward
in [0, 1). The reference is a random table. So `π* ∝ π_ref exp(R/β)` and every number below are exact sums, not
estimates; only training is sampled. The data are {LOG_SIZE:,} trajectories of a policy that takes every action with
probability {1 / len(TREE.actions):g}. {STEPS} steps of {BATCH} trajectories, Adam, learning rate falling linearly to 0,
no gradient clipping. GRPO is TRL's own, in groups of {GROUP}, with KL weight β and `scale_rewards="none"`, all else at
its defaults; of its learning rates {", ".join(f"{rate:g}" for rate in GRPO_LEARNING_RATES)} the one that ends nearest
to π*. TBRM has one.

{outcomes(runs, folder)}

Total variation is that of the worse prompt, the others are means over prompts. `E[R] − β KL` is what both methods set
out to maximise, and π* is its maximum.

![total variation during training](exact_optimum.png)

- **Log taken for its own rollouts**: what TRL does with logged completions that a `rollout_func` returns. It corrects
  for their log-probabilities only where vLLM samples; else, with one update per generation as here, the old policy is
  the current one and the ratio 1.
- **Ratio to the behaviour policy**: TRL has no option for it. A small subclass puts the behaviour's
  log-probabilities where the loss reads the old policy's; clipped at TRL's default ε = {GRPOConfig.epsilon:g}, and not
  clipped. The ratio is that of each token, without those of the tokens before it, so even unclipped its expectation is
  not the policy gradient.
- **On-policy** is GRPO on its own ground, for comparison: it draws {STEPS * BATCH:,} fresh rollouts.
"""


def main() -> None:
    output = parse(__doc__).output
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        runs = {beta: {name: best_run(name, beta, Path(folder)) for name in METHODS} for beta in BETAS}
        write(output, "exact_optimum", report(runs, Path(folder)), figure=draw(runs))


if __name__ == "__main__":
    main()
