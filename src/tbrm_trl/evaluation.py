"""Accuracy of a language model on problems with a verifier: greedy, or avg@n with its standard error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Accuracy:
    """Mean score over problems, each the mean of its own samples (avg@n), with the samples behind it.

    Attributes:
        mean: mean over problems, in score units (1 = all correct).
        standard_error: standard deviation of the per-problem means over the square root of their number: the
            uncertainty from having drawn these problems and not others.
        problems: number of problems.
        samples: completions per problem, n.
        temperature: sampling temperature; 0 is greedy.
        truncated: share of completions cut at the length limit.
        completions: per problem, its n completions as text.
        scores: per problem, their n scores.
    """

    mean: float
    standard_error: float
    problems: int
    samples: int
    temperature: float
    truncated: float
    completions: list[list[str]]
    scores: list[list[float]]

    def __str__(self) -> str:
        name = "greedy" if self.temperature == 0 else f"avg@{self.samples} at T={self.temperature:g}"
        return f"{name}: {self.mean:.3f} ± {self.standard_error:.3f} over {self.problems} problems"


def accuracy_from_scores(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over problems of each problem's mean score, and the standard error of that mean over problems.

    Raises:
        ValueError: if there is no problem, or one without a sample.
    """
    if not scores or not all(scores):
        raise ValueError("Every problem needs at least one score, and there must be at least one problem.")
    per_problem = [sum(row) / len(row) for row in scores]
    n = len(per_problem)
    mean = sum(per_problem) / n
    if n == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in per_problem) / (n - 1)
    return mean, math.sqrt(variance / n)


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # a chat template writes its own


@torch.no_grad()
def evaluate_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    score: Callable[[int, str], float],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Generate `samples` completions for every prompt and score them.

    Args:
        model: the policy, adapters included. It is left in the mode (train or eval) that it came in.
        tokenizer: the policy's, with a chat template if prompts are conversations.
        prompts: strings, or lists of messages.
        score: called with the prompt's index and a completion's text; returns its score.
        samples: completions per prompt, n of avg@n. Greedy needs just 1.
        temperature: of sampling, with no filter or penalty, whatever the model ships with; 0 is greedy.
        max_new_tokens: length limit of a completion; what is cut there counts as truncated and is scored as it is.
        batch_size: completions generated at once. With sampling, the draws depend on it.
        seed: seed of the sampling. The global random state is left unchanged.
        progress: called after each batch with the completions done and their total.

    Raises:
        ValueError: for no prompts, or several greedy samples of each (they would all be the same).
    """
    if not prompts:
        raise ValueError("No prompts to evaluate on.")
    if temperature == 0 and samples != 1:
        raise ValueError(f"{samples} greedy samples of a prompt are all the same: set temperature, or samples=1.")
    token_ids = [_tokenize(tokenizer, prompt) for prompt in prompts]
    # Longest first: batches of equal lengths, and running out of memory shows at once.
    order = sorted((index for index in range(len(prompts)) for _ in range(samples)), key=lambda i: -len(token_ids[i]))
    shipped = model.generation_config
    ends = shipped.eos_token_id if isinstance(shipped.eos_token_id, list) else [shipped.eos_token_id]
    end_ids = {*ends, tokenizer.eos_token_id} - {None}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}

    completions: list[list[str]] = [[] for _ in prompts]
    truncated = 0
    was_training = model.training
    model.eval()
    # Settings that a model ships with, such as a repetition penalty, would make it another policy. None is taken.
    model.generation_config = GenerationConfig(
        **sampling, max_new_tokens=max_new_tokens, eos_token_id=sorted(end_ids), pad_token_id=tokenizer.pad_token_id
    )
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                inputs = tokenizer.pad(
                    {"input_ids": [token_ids[index] for index in chunk]}, padding_side="left", return_tensors="pt"
                ).to(model.device)
                output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
                for index, ids in zip(chunk, output.tolist(), strict=True):
                    truncated += not end_ids.intersection(ids)
                    completions[index].append(tokenizer.decode(ids, skip_special_tokens=True))
                progress(start + len(chunk), len(order))
    finally:
        model.generation_config = shipped
        model.train(was_training)

    scores = [[score(index, text) for text in row] for index, row in enumerate(completions)]
    mean, standard_error = accuracy_from_scores(scores)
    return Accuracy(
        mean=mean,
        standard_error=standard_error,
        problems=len(prompts),
        samples=samples,
        temperature=temperature,
        truncated=truncated / len(order),
        completions=completions,
        scores=scores,
    )
