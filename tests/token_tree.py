"""A language model small enough to write its optimal policy down: a token tree with a table of logits.

The model is real to TRL (a `PreTrainedModel` in a folder, with a backbone and an output embedding), but its backbone
only looks up which prefix it has read, as a one-hot state, so that its logits are a table: logits[s, a] = W[a, s].
Every trajectory can be enumerated, hence π_θ, π* and V* are known exactly.

Two prompts of different lengths; the policy then says letters until it says <eos>, at most `DEPTH` tokens in all:
40 trajectories per prompt, of lengths 1 to 3, those without <eos> cut at the limit. The actions are <eos> and the
letters. <pad> and <bos> are none: their logits are −10⁴ in policy and reference alike, where the probability is exactly
0 in float32, and so is its gradient. No step moves them (weight decay is off), and the 40 trajectories have all the
probability.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tiny import tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

PAD, EOS, BOS, A, B, C = range(6)
VOCABULARY = 6
LETTERS = (A, B, C)
ACTIONS = (EOS, *LETTERS)
DEPTH = 3
PROMPTS = ([BOS, A], [BOS, B, C])
FORBIDDEN = -1e4

ELSEWHERE, ROOT = 0, 1  # states: outside the tree, and nothing read yet


def completions() -> list[list[int]]:
    """Everything that the policy can say: letters and then <eos>, or `DEPTH` letters."""
    ended = [[*words, EOS] for n in range(DEPTH) for words in itertools.product(LETTERS, repeat=n)]
    return ended + [list(words) for words in itertools.product(LETTERS, repeat=DEPTH)]


COMPLETIONS = completions()


def transitions() -> list[list[int]]:
    """State after each token in each state, (S, vocabulary), for all prefixes of prompts and completions."""
    table = [[ELSEWHERE] * VOCABULARY, [ELSEWHERE] * VOCABULARY]
    for prompt, completion in itertools.product(PROMPTS, COMPLETIONS):
        state = ROOT
        for token in [*prompt, *completion[:-1]]:  # nobody acts after the last token
            if table[state][token] == ELSEWHERE:
                table[state][token] = len(table)
                table.append([ELSEWHERE] * VOCABULARY)
            state = table[state][token]
    return table


class TokenTreeConfig(PreTrainedConfig):
    model_type = "token_tree"

    vocab_size: int = VOCABULARY
    transitions: list[list[int]] | None = None
    use_cache: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = PAD
    eos_token_id: int | None = EOS
    bos_token_id: int | None = BOS
    auto_map: ClassVar[dict] = {}  # TRL reads it of every architecture that transformers does not ship


class TokenTreeModel(PreTrainedModel):
    """The backbone: which prefix was read so far, as a one-hot vector. Padding on either side leaves it where it is."""

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
        self.lm_head = nn.Linear(len(config.transitions), config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask).last_hidden_state))


AutoConfig.register(TokenTreeConfig.model_type, TokenTreeConfig)
AutoModelForCausalLM.register(TokenTreeConfig, TokenTreeForCausalLM)


def save(folder: Path, seed: int = 0) -> str:
    """Save the reference, a random table, and its tokenizer; returns the folder, as a user would pass it."""
    model = TokenTreeForCausalLM(TokenTreeConfig(transitions=transitions()))
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))  # far from uniform
        model.lm_head.weight[[PAD, BOS]] = FORBIDDEN
    model.save_pretrained(folder)
    tokenizer(alphabet="abc").save_pretrained(folder)
    return str(folder)


@dataclass
class Policy:
    """A policy, enumerated. N = 40 completions for each of P = 2 prompts; float64.

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
def enumerate_policy(model: PreTrainedModel) -> Policy:
    """The exact distribution of a model over all trajectories, and its soft values."""
    logits = model.get_output_embeddings().weight.T.double()  # (S, vocabulary)
    log_probs, table = logits.log_softmax(dim=-1), model.config.transitions

    def walk(state: int, tokens: list[int]) -> tuple[int, float]:
        total = 0.0
        for token in tokens:
            total += log_probs[state, token].item()
            state = table[state][token]
        return state, total

    starts = [walk(ROOT, prompt)[0] for prompt in PROMPTS]
    return Policy(
        log_probs=torch.tensor([[walk(start, tau)[1] for tau in COMPLETIONS] for start in starts], dtype=torch.float64),
        soft_value=logits[starts].logsumexp(dim=-1),
    )


def random_rewards(seed: int = 0) -> Tensor:
    """R(τ), `(P, N)`: uniform on [0, 1), one for each trajectory."""
    return torch.rand(len(PROMPTS), len(COMPLETIONS), generator=torch.Generator().manual_seed(seed)).double()


def optimum(reference: Policy, rewards: Tensor, beta: float) -> Policy:
    """π*(τ) = π_ref(τ) exp(R(τ)/β) / Z and V* = log Z, Z = E_ref exp(R/β): the closed form."""
    unnormalised = reference.log_probs + rewards / beta  # (P, N)
    soft_value = unnormalised.logsumexp(dim=1)  # (P,)
    return Policy(unnormalised - soft_value[:, None], soft_value)


def total_variation(policy: Policy, other: Policy) -> float:
    """Half the L1 distance between two distributions over trajectories; of the prompts, the worse."""
    return 0.5 * (policy.probs - other.probs).abs().sum(dim=1).max().item()


def uniform_log(rewards: Tensor, size: int, seed: int = 0) -> list[dict]:
    """Rows of a data set: sampled from a behaviour policy that knows nothing, each action with probability 1/4."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        prompt, completion = rng.randrange(len(PROMPTS)), []
        while len(completion) < DEPTH and EOS not in completion:
            completion.append(rng.choice(ACTIONS))
        reward = rewards[prompt, COMPLETIONS.index(completion)].item()
        rows.append({"prompt_ids": PROMPTS[prompt], "completion_ids": completion, "reward": reward})
    return rows
