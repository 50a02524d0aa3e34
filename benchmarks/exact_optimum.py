"""Where TBRM and GRPO end on one log of off-policy trajectories, against the optimum in closed form.

    python benchmarks/exact_optimum.py        # writes docs/benchmarks/exact_optimum.{md,png}

The task and its log are those of tests/test_exact_optimum.py; nothing is downloaded.
"""

from __future__ import annotations

import datetime
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.measure import QUIET, quiet, set_up
from common.report import listed, new_parser, parse, plt, table, versions, write
from common.trees import Policy, TokenTreeForCausalLM, Tree, enumerate_policy, optimum, total_variation
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tbrm_trl import TBRMConfig, TBRMTrainer

BETAS = (0.5, 0.1)
LOG_SIZE, STEPS, BATCH, GROUP = 2048, 300, 128, 8
TBRM_LEARNING_RATES = (1.0,)
GRPO_LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)

TREE = Tree()
REWARDS = TREE.random_rewards()  # (P, N)
LOG = TREE.sampled_log(REWARDS, TREE.uniform, LOG_SIZE)
BEHAVIOUR_LOG_PROB = -math.log(len(TREE.actions))  # of every logged token


class BehaviourAsOldPolicy(GRPOTrainer):
    """GRPO with the importance ratio π_θ/π_behaviour: the sampler's log-probabilities replace the old policy's.

    TRL keeps the log-probabilities that a `rollout_func` returns, but corrects for them only when vLLM samples.
    """

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]  # (B, T)
        return output


@dataclass
class Method:
    name: str
    trainer: type[GRPOTrainer]
    options: dict
    on_log: bool = True


METHODS = (
    Method("TBRM, `policy`", TBRMTrainer, {"soft_value": "policy"}),
    Method("TBRM, `calibrated`", TBRMTrainer, {"soft_value": "calibrated"}),
    Method("GRPO, log taken for its own rollouts", GRPOTrainer, {}),
    Method("GRPO, ratio to the behaviour policy, clipped", BehaviourAsOldPolicy, {}),
    Method("GRPO, ratio to the behaviour policy, not clipped", BehaviourAsOldPolicy, {"epsilon": 1e6}),
    Method("GRPO, on-policy: no log, its own rollouts", GRPOTrainer, {}, on_log=False),
)


@dataclass
class Outcome:
    """A policy, measured exactly. The distance is the worse prompt's; the others are means over prompts."""

    distance: float
    reward: float
    objective: float  # E[R] − β KL(π‖π_ref)

    @classmethod
    def of(cls, policy: Policy, reference: Policy, beta: float) -> Outcome:
        reward = (policy.probs * REWARDS).sum(dim=1).mean().item()
        kl = (policy.probs * (policy.log_probs - reference.log_probs)).sum(dim=1).mean().item()
        best = optimum(reference, REWARDS, beta)
        return cls(total_variation(policy, best), reward, reward - beta * kl)


@dataclass
class Run:
    learning_rate: float
    outcome: Outcome
    curve: list[tuple[int, float]]  # step, total variation


class Distance(TrainerCallback):
    """Keeps the total variation to π* every tenth step."""

    def __init__(self, reference: Policy, beta: float):
        self.best = optimum(reference, REWARDS, beta)
        self.curve: list[tuple[int, float]] = []

    def measure(self, step: int, model: PreTrainedModel) -> None:
        self.curve.append((step, total_variation(enumerate_policy(model, TREE), self.best)))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 10 == 0:
            self.measure(state.global_step, model)


def from_log() -> Callable[..., dict[str, list]]:
    """GRPO's `rollout_func`: for each prompt its next logged completion, in random order, all before any again."""
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


def train(method: Method, beta: float, learning_rate: float, folder: Path) -> Run:
    options = QUIET | dict(
        output_dir=str(folder / "out"), beta=beta, learning_rate=learning_rate, max_steps=STEPS, max_grad_norm=0.0,
        per_device_train_batch_size=BATCH, max_completion_length=TREE.depth, bf16=False, use_cpu=True, **method.options,
    )  # fmt: skip
    model = TREE.save(folder / "model")
    if method.trainer is TBRMTrainer:
        trainer: GRPOTrainer = TBRMTrainer(
            model=model, args=TBRMConfig(**options), train_dataset=Dataset.from_list(LOG)
        )
    else:
        prompts = TREE.prompt_rows(len(TREE.prompts) * BATCH // GROUP)
        trainer = method.trainer(
            model=model,
            reward_funcs=TREE.reward_function(REWARDS),
            args=GRPOConfig(num_generations=GROUP, scale_rewards="none", **options),
            train_dataset=Dataset.from_list(prompts),
            rollout_func=from_log() if method.on_log else None,
        )
    reference = enumerate_policy(trainer.model, TREE)
    distance = Distance(reference, beta)
    trainer.add_callback(distance)
    trainer.train()
    return Run(learning_rate, Outcome.of(enumerate_policy(trainer.model, TREE), reference, beta), distance.curve)


def best_run(method: Method, beta: float, folder: Path) -> Run:
    """The run that ends nearest to π*, of one for each learning rate. TBRM has one rate."""
    rates = TBRM_LEARNING_RATES if method.trainer is TBRMTrainer else GRPO_LEARNING_RATES
    runs = []
    for rate in rates:
        with quiet():
            run = train(method, beta, rate, folder)
        print(f"beta {beta:g}, {method.name}, learning rate {rate:g}: {run.outcome}", flush=True)
        runs.append(run)
    return min(runs, key=lambda run: run.outcome.distance)


def draw(runs: dict[float, dict[str, Run]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(runs), figsize=(10, 4), sharey=True)
    for axis, (beta, by_name) in zip(axes, runs.items(), strict=True):
        for name, run in by_name.items():
            steps, distances = zip(*run.curve, strict=True)
            axis.semilogy(steps, distances, "-" if "TBRM" in name else "--", label=name.replace("`", ""))
        axis.axhline(0.01, color="gray", linewidth=0.8)
        axis.set(title=f"β = {beta:g}", xlabel="optimizer step")
    axes[0].set_ylabel("total variation to π*")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def outcomes(runs: dict[float, dict[str, Run]], reference: Policy) -> str:
    rows = []
    for beta, by_name in runs.items():
        exact = {"π_ref, where all start": reference, "π*": optimum(reference, REWARDS, beta)}
        measured = {name: (Outcome.of(policy, reference, beta), "") for name, policy in exact.items()}
        measured |= {name: (run.outcome, f"{run.learning_rate:g}") for name, run in by_name.items()}
        for name, (outcome, rate) in measured.items():
            far = f"{outcome.distance:.3f}" if outcome.distance >= 0.001 or name in exact else f"{outcome.distance:.0e}"
            rows.append([f"{beta:g}", name, far, f"{outcome.reward:.3f}", f"{outcome.objective:.4f}", rate])
    return table(["β", "", "total variation to π*", "E[R]", "E[R] − β KL(π‖π_ref)", "learning rate"], rows)


def report(runs: dict[float, dict[str, Run]], reference: Policy) -> str:
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

{outcomes(runs, reference)}

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
    arguments = parse(new_parser(__doc__))
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        runs = {beta: {m.name: best_run(m, beta, Path(folder)) for m in METHODS} for beta in BETAS}
        reference = enumerate_policy(TokenTreeForCausalLM.from_pretrained(TREE.save(Path(folder) / "model")), TREE)
    write(arguments.output, "exact_optimum", report(runs, reference), figure=draw(runs))


if __name__ == "__main__":
    main()
