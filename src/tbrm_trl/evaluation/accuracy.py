"""Accuracy of a language model on problems with a verifier: greedy or avg@n, with its standard error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sampling import Request, Sampling, generate, prompt_ids_of, seed_of
from .statistics import accuracy_from_scores


@dataclass(frozen=True)
class Accuracy:
    """Mean score over problems, where a problem's score is the mean over its samples (avg@n), and the samples.

    Attributes:
        mean: mean over problems, in score units (1 = all correct).
        standard_error: standard deviation of the per-problem means divided by the square root of their number. It
            measures the uncertainty from having drawn these problems and not others.
        problems: number of problems.
        samples: completions per problem, n.
        temperature: sampling temperature; 0 is greedy.
        truncated: share of completions cut at the length limit.
        completions: n completions per problem, as text.
        scores: n scores per problem.
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
        model: the policy, adapters included. Its mode (train or eval) is restored.
        tokenizer: the policy's tokenizer, with a chat template if prompts are conversations.
        prompts: strings, or lists of messages.
        score: called with the prompt's index and a completion's text; returns its score.
        samples: completions per prompt, n of avg@n. It must be 1 for greedy decoding.
        temperature: sampling temperature; 0 is greedy. The model's own filters and penalties are not applied.
        max_new_tokens: length limit of a completion. A completion cut there counts as truncated and is scored as it is.
        batch_size: completions generated at once.
        seed: sampling seed. The global random state does not change.
        progress: called after every `batch_size` completions and at the end, with the number done and the total.

    Raises:
        ValueError: if there are no prompts, or several greedy samples of each, which would all be the same.
    """
    if not prompts:
        raise ValueError("No prompts to evaluate on.")
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    sampling.require_distinct(samples)
    places = [index for index in range(len(prompts)) for _ in range(samples)]
    token_ids = [prompt_ids_of(tokenizer, prompt) for prompt in prompts]
    requests = [Request(token_ids[index], seed_of(seed, at)) for at, index in enumerate(places)]
    texts: list[str] = [""] * len(places)
    truncated = 0
    for done, one in enumerate(generate(model, tokenizer, requests, sampling, batch_size), start=1):
        texts[one.request] = tokenizer.decode(one.ids, skip_special_tokens=True)
        truncated += one.truncated
        if done % batch_size == 0 or done == len(places):
            progress(done, len(places))
    completions = [texts[first : first + samples] for first in range(0, len(places), samples)]

    scores = [[score(index, text) for text in row] for index, row in enumerate(completions)]
    mean, standard_error = accuracy_from_scores(scores)
    return Accuracy(
        mean=mean,
        standard_error=standard_error,
        problems=len(prompts),
        samples=samples,
        temperature=temperature,
        truncated=truncated / len(places),
        completions=completions,
        scores=scores,
    )
