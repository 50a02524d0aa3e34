"""Why the first updates are slow: what the gradient at step 0 is made of, with and without a baseline.

    python benchmarks/slow_start.py                    # the tiny model and SmolLM2-135M; half an hour on two cores
    python benchmarks/slow_start.py --tasks sorting     # a minute
    python benchmarks/slow_start.py --quick            # 64 rollouts of the tiny model, to a temporary folder

The untrained model answers 125 prompts 8 times each; if the task has fewer, some come again. At θ_ref the calibrated
residual is −R/β, so the gradient of a trajectory is −2β R (∇V + ∇log π): REINFORCE without a baseline, and a push on V.
Each part is computed in blocks of 16 trajectories, as many as in an update: 16 prompts once, or 2 prompts 8 times. The
gradients are written out here, without the library.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import tasks
from common.measure import quiet, set_up
from common.report import listed, parse, processor, table, versions, wrapped, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PROMPTS, EACH, BLOCK = 125, 8, 16
BETAS = {"sorting": 0.05, "sums": 0.02}
NAMES = {"sorting": "Tiny model, sorting letters", "sums": "SmolLM2-135M, one-digit sums"}


@dataclass
class Rollouts:
    """Completions of P prompts, E of each, with their rewards. Prompts come again where there are fewer than P."""

    ids: list[Tensor]  # prompt and completion of each rollout
    starts: list[int]  # prompt length of each rollout
    rewards: Tensor  # (P, E)


@torch.no_grad()
def sample(model: PreTrainedModel, task: tasks.Task, prompts: int) -> Rollouts:
    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")
    rows = task.train.shuffle(seed=0)
    ids, starts, rewards = [], [], []
    for row in (rows[number % len(rows)] for number in range(prompts)):
        chat = isinstance(row["prompt"], list)
        of = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True) if chat else (
            tokenizer(row["prompt"])
        )  # fmt: skip
        prompt = torch.tensor([of["input_ids"]]).expand(EACH, -1)
        drawn = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=task.options["max_completion_length"], pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for one in drawn:
            completion = one[prompt.shape[1] :].tolist()
            if tokenizer.eos_token_id in completion:
                completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
            text = tokenizer.decode(completion, skip_special_tokens=True)
            given = {name: [value] for name, value in row.items() if name != "prompt"}
            said = [{"role": "assistant", "content": text}] if chat else text
            rewards += task.reward(prompts=[row["prompt"]], completions=[said], completion_ids=[completion], **given)
            ids.append(torch.tensor(prompt[0].tolist() + completion))
            starts.append(prompt.shape[1])
    return Rollouts(ids, starts, torch.tensor(rewards).view(-1, EACH))


def log_probs_and_values(model: PreTrainedModel, rollouts: Rollouts, rows: list[int]) -> tuple[Tensor, Tensor]:
    """`(B,)` log π(τ) and V(s_1) of some rollouts."""
    length = max(len(rollouts.ids[row]) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    is_action = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for i, row in enumerate(rows):
        one = rollouts.ids[row]
        ids[i, : len(one)], mask[i, : len(one)] = one, 1
        is_action[i, rollouts.starts[row] - 1 : len(one) - 1] = True
    logits = model(input_ids=ids, attention_mask=mask).logits  # (B, T, A) right padding: positions need no shift
    last = torch.tensor([rollouts.starts[row] - 1 for row in rows])
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T − 1)
    return torch.where(is_action, each, 0.0).sum(1), logits[torch.arange(len(rows)), last].logsumexp(-1)


@dataclass
class Signal:
    """Sums over blocks of one kind of gradient, for unbiased estimates of its mean and its noise."""

    total: Tensor
    squares: list[float] = field(default_factory=list)

    def add(self, gradient: Tensor) -> None:
        self.total += gradient
        self.squares.append(gradient.square().sum().item())

    def ratio(self) -> float:
        """‖E g‖² / E‖g − E g‖² of a block's gradient g. ‖E g‖² is the mean of ⟨g_a, g_b⟩ over pairs a ≠ b."""
        n, mean_square = len(self.squares), statistics.mean(self.squares)
        signal = (self.total.square().sum().item() - sum(self.squares)) / (n * (n - 1))
        return signal / (mean_square - signal)


def flat_gradient(of: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in torch.autograd.grad(of, parameters, retain_graph=True)])


def measure(name: str, task: tasks.Task, prompts: int) -> dict[str, Any]:
    beta = BETAS[name]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    rollouts = sample(model, task, prompts)
    rewards = rollouts.rewards  # (P, E)
    parameters = [one for one in model.parameters() if one.requires_grad]
    size = sum(one.numel() for one in parameters)
    kinds = ("no baseline", "mean reward", "∇V", "TBRM", "TBRM with an offset", "group mean", "GRPO")
    signals = {kind: Signal(torch.zeros(size)) for kind in kinds}
    mean, flips, shares, cosines, norms = rewards.mean().item(), [], [], [], []

    rows = torch.arange(rewards.numel()).view(rewards.shape)
    for block in rows.T.reshape(-1).split(BLOCK):  # each prompt once before any comes again
        if len(block) < BLOCK:
            continue
        log_probs, values = log_probs_and_values(model, rollouts, block.tolist())
        earned = rewards.view(-1)[block]  # (B,)
        ones = torch.ones_like(earned)
        policy, policy_1 = (flat_gradient((c * log_probs).mean(), parameters) for c in (earned, ones))
        value, value_1 = (flat_gradient((c * values).mean(), parameters) for c in (earned, ones))
        signals["no baseline"].add(policy)
        signals["mean reward"].add(policy - mean * policy_1)
        signals["∇V"].add(value)
        signals["TBRM"].add(policy + value)
        signals["TBRM with an offset"].add(policy - mean * policy_1 + value - mean * value_1)
        if earned.any():
            shares.append((value.norm() / (policy + value).norm()).item())
            cosines.append(torch.cosine_similarity(value, policy, dim=0).item())
            flips.append(((policy + value).sign() != policy.sign()).double().mean().item())
            norms.append(2 * beta * (policy + value).norm().item())
    # GRPO's blocks: 2 prompts, 8 completions of each.
    for block in rows.reshape(-1).split(BLOCK):
        if len(block) < BLOCK:
            continue
        log_probs, _ = log_probs_and_values(model, rollouts, block.tolist())
        earned = rewards.view(-1)[block].view(-1, EACH)
        centred = earned - earned.mean(1, keepdim=True)
        scaled = centred / (earned.std(1, keepdim=True) + 1e-4)
        for kind, coefficients in (("group mean", centred), ("GRPO", scaled)):
            signals[kind].add(flat_gradient((coefficients.flatten() * log_probs).mean(), parameters))

    optimal = beta * (torch.logsumexp(rewards.double() / beta, dim=1) - math.log(EACH))  # (P,)
    everywhere = beta * (torch.logsumexp(rewards.double().flatten() / beta, dim=0) - math.log(rewards.numel()))
    return {
        "rollouts": rewards.numel(),
        "mean reward": mean,
        "β log mean exp(R/β)": everywhere.item(),
        "of it by prompt": optimal.mean().item(),
        "β": beta,
        "signal to noise": {kind: signal.ratio() for kind, signal in signals.items()},
        "share of ∇V": statistics.median(shares),
        "cosine of ∇V with the policy's": statistics.median(cosines),
        "signs changed by ∇V": statistics.median(flips),
        "gradient norm": statistics.median(norms),
        "blocks clipped at 1": statistics.mean(norm > 1 for norm in norms),
        "blocks without a reward": 1 - len(norms) / (rewards.numel() // BLOCK),
    }


def section(name: str, found: dict[str, Any]) -> str:
    ratios = found["signal to noise"]
    base = ratios["no baseline"]
    prompts, cosine = {"group mean": "2 × 8", "GRPO": "2 × 8"}, "cosine of ∇V with the policy's"
    rows = [[kind, prompts.get(kind, "16 × 1"), f"{one:.4f}", f"{one / base:.2f}"] for kind, one in ratios.items()]
    numbers = [
        ["mean reward", f"{found['mean reward']:.3f}"],
        [f"β log mean exp(R/β), β = {found['β']}, over all", f"{found['β log mean exp(R/β)']:.3f}"],
        ["the same over the completions of a prompt, mean", f"{found['of it by prompt']:.3f}"],
        ["norm of ∇V's part / norm of the whole gradient", f"{found['share of ∇V']:.2f}"],
        ["cosine of ∇V's part and the policy's", f"{found[cosine]:+.2f}"],
        ["parameters whose gradient changes its sign by ∇V", f"{found['signs changed by ∇V']:.0%}"],
        ["norm of the gradient of a block, median", f"{found['gradient norm']:.2f}"],
        ["blocks that `max_grad_norm=1` clips", f"{found['blocks clipped at 1']:.0%}"],
        ["blocks without any reward", f"{found['blocks without a reward']:.0%}"],
    ]
    return f"""## {NAMES[name]}

{found["rollouts"]:,} rollouts of the untrained model.

{table(["gradient of a block", "prompts × completions", "signal to noise", "of no baseline"], rows)}

{table(["", "median over blocks"], numbers)}
"""


def report(results: dict[str, Any], facts: str) -> str:
    explained = wrapped(
        "Signal to noise is ‖E g‖² / E‖g − E g‖² of the gradient g of a block of 16 trajectories. *No baseline* and "
        "*mean reward* are the policy's part alone, with R and with R less its mean. *TBRM* is the whole gradient of "
        "the calibrated residual at θ_ref, *with an offset* the same with δ shifted by its mean. *Group mean* and "
        "*GRPO* have the rewards of a prompt less their mean, and GRPO's are divided by their standard deviation."
    )
    sections = "\n".join(section(name, results[name]) for name in NAMES if name in results)
    return f"""# What the first gradient is made of

Written by `python benchmarks/slow_start.py`. {facts}. Raw numbers: [slow_start.json](slow_start.json).

{explained}

{sections}"""


def main() -> None:
    arguments = parse(
        __doc__, "64 rollouts of the tiny model", tasks=dict(nargs="+", default=list(NAMES), choices=list(NAMES))
    )
    set_up(torch.get_num_threads())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["sorting"] if arguments.quick else arguments.tasks:
            results[name] = measure(name, tasks.named(name, 0, Path(folder)), 8 if arguments.quick else PROMPTS)
    facts = f"{processor()}; {listed(versions('torch', 'transformers'))}"
    write(arguments.output, "slow_start", report(results, facts), results)


if __name__ == "__main__":
    main()
