"""Language models small enough to write their optimal policy down: token trees with a table of logits.

The model is real to TRL (a `PreTrainedModel` in a folder, with a backbone and an output embedding), but its backbone
only looks up which prefix it has read, as a one-hot state. So its logits are a table: logits[s, a] = W[a, s]. Every
trajectory can be enumerated, and π_θ, π* and V* are known exactly.

After a prompt the policy emits letters and then <eos>, at most `depth` tokens in all; completions without <eos> are cut
at that limit. The actions are <eos> and the letters. <pad> and <bos> are not: their logits are −10⁴ in policy and
reference alike, so that their probability and its gradient are exactly 0 in float32. No step moves these logits (weight
decay is off), and the enumerated trajectories have all the probability.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from common.tiny import tokenizer
from tbrm_trl import TBRMConfig, TBRMTrainer

PAD, EOS, BOS = range(3)  # then the letters
FORBIDDEN = -1e4

ELSEWHERE, ROOT = 0, 1  # states: outside the tree, and nothing read yet

# A behaviour policy: (prompt, completion so far) → an urn, from which the next action is drawn. Its probabilities are
# fractions of small integers, so a finite log can hold every trajectory in exactly its proportion.
Urn = Callable[[int, list[int]], Sequence[int]]


# ---- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """P prompts, and N completions that may follow each. Tensors over trajectories are `(P, N)`, in this order.

    Attributes:
        depth: most tokens of a completion.
        letters: what the policy may emit besides <eos>.
        prompts: texts, which follow <bos>; none begins with another.
    """

    depth: int = 3
    letters: str = "abc"
    prompts: tuple[str, ...] = ("a", "bc")

    def ids(self, word: str) -> list[int]:
        return [BOS + 1 + self.letters.index(letter) for letter in word]

    @cached_property
    def actions(self) -> tuple[int, ...]:
        return (EOS, *self.ids(self.letters))

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        return [[BOS, *self.ids(prompt)] for prompt in self.prompts]

    @cached_property
    def completions(self) -> list[list[int]]:
        """Every possible completion: letters and then <eos>, or `depth` letters."""
        letters = self.actions[1:]
        ended = [[*words, EOS] for n in range(self.depth) for words in itertools.product(letters, repeat=n)]
        return ended + [list(words) for words in itertools.product(letters, repeat=self.depth)]

    @cached_property
    def trajectories(self) -> list[tuple[int, int]]:
        """All (prompt, completion), by number."""
        return list(itertools.product(range(len(self.prompts)), range(len(self.completions))))

    def random_rewards(self, seed: int = 0) -> Tensor:
        """R(τ), `(P, N)`: uniform on [0, 1), one for each trajectory."""
        shape = len(self.prompts), len(self.completions)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()

    def save(self, folder: Path, seed: int = 0) -> str:
        """Save the reference, a random table, and its tokenizer; returns the folder, as a user would pass it."""
        model = TokenTreeForCausalLM(
            TokenTreeConfig(vocab_size=BOS + 1 + len(self.letters), transitions=self._transitions())
        )
        with torch.no_grad():
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))  # far from uniform
            model.lm_head.weight[[PAD, BOS]] = FORBIDDEN
        model.save_pretrained(folder)
        tokenizer(alphabet=self.letters).save_pretrained(folder)
        return str(folder)

    def _transitions(self) -> list[list[int]]:
        """State after each token in each state, (S, vocabulary), for all prefixes of prompts and completions."""
        nowhere = [ELSEWHERE] * (BOS + 1 + len(self.letters))
        table = [list(nowhere), list(nowhere)]
        for prompt, completion in itertools.product(self.prompt_ids, self.completions):
            state = ROOT
            for token in [*prompt, *completion[:-1]]:  # nobody acts after the last token
                if table[state][token] == ELSEWHERE:
                    table[state][token] = len(table)
                    table.append(list(nowhere))
                state = table[state][token]
        return table

    # ---- data --------------------------------------------------------------------------------------------------------

    def uniform(self, prompt: int, said: list[int]) -> Sequence[int]:
        """The urn of a uniform behaviour policy."""
        return self.actions

    def bad(self, rewards: Tensor) -> Urn:
        """A behaviour policy that prefers actions with low rewards and takes all actions.

        Half the time it draws the action with the lowest reward, averaged over all continuations. It draws each of the
        A − 1 others with probability 1 / (2A − 2).
        """

        def average(prompt: int, begin: list[int]) -> float:
            follow = [n for n, completion in enumerate(self.completions) if completion[: len(begin)] == begin]
            return rewards[prompt, follow].mean().item()

        def urn(prompt: int, said: list[int]) -> Sequence[int]:
            worst = min(self.actions, key=lambda action: average(prompt, [*said, action]))
            return [*self.actions, *[worst] * (len(self.actions) - 2)]

        return urn

    def counts(self, urn: Urn) -> Tensor:
        """`(P, N)` copies of each trajectory in a log that has the exact proportions of a behaviour policy."""

        def count(prompt: int, completion: list[int]) -> int:
            urns = [urn(prompt, completion[:h]) for h in range(len(completion))]
            said = math.prod(urn.count(token) for urn, token in zip(urns, completion, strict=True))
            return said * len(urns[0]) ** (self.depth - len(completion))  # all urns hold the same number

        return torch.tensor([[count(p, tau) for tau in self.completions] for p in range(len(self.prompts))])

    def row(self, prompt: int, completion: int, rewards: Tensor) -> dict[str, Any]:
        """A logged trajectory as a row of a data set."""
        return {
            "prompt_ids": self.prompt_ids[prompt],
            "completion_ids": self.completions[completion],
            "reward": rewards[prompt, completion].item(),
        }

    def exact_log(self, rewards: Tensor, counts: Tensor) -> list[dict[str, Any]]:
        """Every trajectory, as often as `counts` `(P, N)` says."""
        return [self.row(p, n, rewards) for p, n in self.trajectories for _ in range(int(counts[p, n]))]

    def sampled_log(self, rewards: Tensor, urn: Urn, size: int, seed: int = 0) -> list[dict[str, Any]]:
        """`size` trajectories drawn from a behaviour policy, prompts uniformly."""
        rng = random.Random(seed)
        rows = []
        for _ in range(size):
            prompt, said = rng.randrange(len(self.prompts)), list[int]()
            while len(said) < self.depth and EOS not in said:
                said.append(rng.choice(urn(prompt, said)))
            rows.append(self.row(prompt, self.completions.index(said), rewards))
        return rows

    def prompt_rows(self, size: int) -> list[dict[str, Any]]:
        """Prompts to roll out, as rows of a data set."""
        return [{"prompt": f"<bos>{self.prompts[i % len(self.prompts)]}"} for i in range(size)]

    def reward_function(self, rewards: Tensor) -> Callable[..., list[float]]:
        def reward(prompts: list[str], completion_ids: list[list[int]], **kwargs) -> list[float]:
            indices = [self.prompts.index(prompt.removeprefix("<bos>")) for prompt in prompts]
            return [
                rewards[p, self.completions.index(said)].item() for p, said in zip(indices, completion_ids, strict=True)
            ]

        return reward


# ---- the model -------------------------------------------------------------------------------------------------------


class TokenTreeConfig(PreTrainedConfig):
    model_type = "token_tree"

    vocab_size: int = 0
    transitions: list[list[int]] | None = None
    use_cache: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = PAD
    eos_token_id: int | None = EOS
    bos_token_id: int | None = BOS
    auto_map: ClassVar[dict] = {}  # TRL reads it for every architecture that transformers does not ship


class TokenTreeModel(PreTrainedModel):
    """The backbone: the prefix read so far, as a one-hot vector. Padding on either side does not change it."""

    config_class = TokenTreeConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        table = torch.tensor(self.config.transitions, device=input_ids.device)  # (S, vocabulary)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        state = torch.full_like(input_ids[:, 0], ROOT)  # (B,)
        states = []
        for token, is_real in zip(input_ids.unbind(dim=1), real.bool().unbind(dim=1), strict=True):
            state = torch.where(is_real, table[state, token], state)
            states.append(state)
        one_hot = nn.functional.one_hot(torch.stack(states, dim=1), len(table))  # (B, T, S)
        return BaseModelOutput(last_hidden_state=one_hot.float())


class TokenTreeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TokenTreeConfig
    base_model_prefix = "model"

    def __init__(self, config: TokenTreeConfig):
        super().__init__(config)
        self.model = TokenTreeModel(config)
        self.lm_head = nn.Linear(len(config.transitions or []), config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask).last_hidden_state))


AutoConfig.register(TokenTreeConfig.model_type, TokenTreeConfig)
AutoModelForCausalLM.register(TokenTreeConfig, TokenTreeForCausalLM)


# ---- policies, enumerated --------------------------------------------------------------------------------------------


@dataclass
class Policy:
    """A policy, enumerated: N completions for each of P prompts; float64.

    Attributes:
        log_probs: `(P, N)` log π(τ|s_1).
        soft_value: `(P,)` V(s_1), nats.
    """

    log_probs: Tensor
    soft_value: Tensor

    @property
    def probs(self) -> Tensor:
        return self.log_probs.exp()  # (P, N)


@torch.no_grad()
def logits_after(model: PreTrainedModel, read: list[int]) -> Tensor:
    """`(vocabulary,)` the logits, that is the soft Q-values, in the state after these tokens; float64."""
    state = ROOT
    for token in read:
        state = model.config.transitions[state][token]
    return model.get_output_embeddings().weight[:, state].double()


def enumerate_policy(model: PreTrainedModel, tree: Tree) -> Policy:
    """The exact distribution of a model over all trajectories, and its soft values."""

    def log_prob(prompt: list[int], said: list[int]) -> Tensor:
        steps = [logits_after(model, [*prompt, *said[:h]]).log_softmax(dim=0)[token] for h, token in enumerate(said)]
        return torch.stack(steps).sum()

    return Policy(
        torch.stack([torch.stack([log_prob(prompt, tau) for tau in tree.completions]) for prompt in tree.prompt_ids]),
        torch.stack([logits_after(model, prompt).logsumexp(dim=0) for prompt in tree.prompt_ids]),
    )


def optimum(reference: Policy, rewards: Tensor, beta: float) -> Policy:
    """π*(τ) = π_ref(τ) exp(R(τ)/β) / Z and V* = log Z, Z = E_ref exp(R/β): the closed form."""
    unnormalised = reference.log_probs + rewards / beta  # (P, N)
    soft_value = unnormalised.logsumexp(dim=1)  # (P,)
    return Policy(unnormalised - soft_value[:, None], soft_value)


def total_variation(policy: Policy, other: Policy) -> float:
    """Half the L1 distance between two distributions over trajectories, for the prompt where it is largest."""
    return 0.5 * (policy.probs - other.probs).abs().sum(dim=1).max().item()


# ---- training --------------------------------------------------------------------------------------------------------


class Task:
    """A tree with random rewards, a random reference, and β.

    Attributes:
        start: the model of π_ref.
        reference: π_ref, enumerated.
        best: π* and V*.
        trainer: the trainer of the last `train`.
    """

    def __init__(self, tree: Tree, beta: float, folder: Path, seed: int = 0):
        self.tree, self.beta, self.folder = tree, beta, folder
        self.rewards = tree.random_rewards(seed)  # (P, N)
        self.model = tree.save(folder / "model", seed)
        self.start = TokenTreeForCausalLM.from_pretrained(self.model)
        self.reference = enumerate_policy(self.start, tree)
        self.best = optimum(self.reference, self.rewards, beta)

    def with_values(
        self, rows: list[dict[str, Any]], values: Tensor, column: str = "optimal_value"
    ) -> list[dict[str, Any]]:
        """The rows with a column of their prompts' values in reward units: numbers from `(P,)`, lists from `(P, N)`."""
        by_prompt: dict[Any, Any] = {}
        for ids, text, value in zip(self.tree.prompt_ids, self.tree.prompts, values.tolist(), strict=True):
            by_prompt[tuple(ids)] = by_prompt[tuple(f"<bos>{text}")] = value
        return [{**row, column: by_prompt[tuple(row.get("prompt_ids") or row["prompt"])]} for row in rows]

    def trainer_on(
        self, rows: list[dict[str, Any]], trainer_class: Any = TBRMTrainer, config_class: Any = TBRMConfig,
        rollout_func: Callable | None = None, callbacks: Sequence[TrainerCallback] = (), **options: Any,
    ) -> Any:  # fmt: skip
        """A trainer on prompts or logged rows. Options set neither here nor in `options` keep the library's default."""
        settings = dict(
            beta=self.beta, learning_rate=0.3, lr_scheduler_type="linear", max_grad_norm=0.0,
            per_device_train_batch_size=128, max_completion_length=self.tree.depth,
            gradient_checkpointing=False, bf16=False, use_cpu=True,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        return trainer_class(
            model=self.model,
            reward_funcs=self.tree.reward_function(self.rewards),
            args=config_class(output_dir=str(self.folder / "out"), **{**settings, **options}),
            train_dataset=Dataset.from_list(rows),
            rollout_func=rollout_func,
            callbacks=list(callbacks),
        )

    def train(self, rows: list[dict[str, Any]], **options: Any) -> Policy:
        """Train, and enumerate the trained policy."""
        self.trainer = self.trainer_on(rows, **options)
        self.trainer.train()
        return enumerate_policy(self.trainer.model, self.tree)
