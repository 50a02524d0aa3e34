"""Draw completions from a model, each with its own seed. Evaluations with transformers generate here.

A completion is a function of the model, its prompt and its seed. Which rows share a batch, and whether the evaluation
was interrupted, changes only rounding.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import xxhash
from accelerate.utils import is_peft_model
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..context import in_evaluation, temporarily
from ..files import first_line
from ..model.caches import can_select_rows, empty_cache
from ..model.decoding import Slots, frozen_casts_kept
from ..model.rotary import rotary_limit
from ..rewards.reading import content_text

REFILL = 1 / 8  # share of the places that must be free before new prompts are read into them


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The model's own penalties and filters are not applied.

    Attributes:
        temperature: softmax temperature; 0 is greedy.
        top_p: draw from the fewest likeliest tokens that hold at least this share of the probability.
        top_k: the number of likeliest tokens to draw from; 0 for all.
        max_new_tokens: length limit of a completion. A completion that reaches it counts as truncated.

    Raises:
        ValueError: if a value is out of range; it names all such values.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature={self.temperature} must be 0 (greedy) or positive, and finite.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be in (0, 1].")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (all tokens) or positive.")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if problems:
            raise ValueError("\n".join(problems))

    def require_distinct(self, samples: int) -> None:
        """Refuse several samples of a prompt that would all be the same."""
        if self.temperature == 0 and samples != 1:
            raise ValueError(f"{samples} greedy samples of a prompt are all the same: set temperature, or samples=1.")


class Request(NamedTuple):
    """A prompt, as token ids, and the seed of its completion."""

    prompt_ids: list[int]
    seed: int


class Completion(NamedTuple):
    """The completion of a request: its number, its token ids with the end token, and whether the limit cut it."""

    request: int
    ids: list[int]
    truncated: bool


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from a hash of these parts."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 1


def prompt_ids_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, variables: dict[str, Any] | None = None
) -> list[int]:
    """A prompt's token ids. The chat template renders messages, with the variables; text is taken as it is."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = rendered(tokenizer, prompt, variables)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: Any, variables: dict[str, Any] | None = None) -> str:
    """A prompt as text. The chat template renders messages, with the variables.

    Raises:
        ValueError: in one line, if the template refuses the messages, or leaves the question out.
    """
    if isinstance(prompt, str):
        return prompt
    question = content_text(prompt[-1].get("content")).strip()
    parts = [{**one, "content": [{"type": "text", "text": content_text(one.get("content"))}]} for one in prompt]
    try:
        for asked in (prompt, parts):  # the templates of some models with images pass over content that is text
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **(variables or {}))
            if question in text:
                return text
        raise ValueError(f"The chat template leaves out what is asked: {question!r} is not in {text!r}.")
    except TemplateError as error:
        raise ValueError(
            f"The chat template refuses the prompt ({first_line(error)}). If it takes no system prompt, give "
            "--system_prompt ''."
        ) from error


def end_ids_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: the tokenizer's end token, and those of the model's generation config."""
    shipped = model.generation_config.eos_token_id
    return {*(shipped if isinstance(shipped, list) else [shipped]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Iterator[Completion]:
    """Yield the completions of all requests as they finish. At each yield the model is back in its original mode.

    With a dtype for `autocast`, forward passes are in this mixed precision.
    """
    ends = end_ids_of(model, tokenizer)

    # Longest prompts first, so that the peak of memory shows at once. Equal prompts are neighbours and are read once.
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids))
    inside = model.get_base_model() if is_peft_model(model) else model
    longest = max((len(one.prompt_ids) for one in requests), default=0) + sampling.max_new_tokens
    if rotary_limit(inside, longest) is not None:
        batch_size = 1  # one long row would change the rows beside it
    if can_select_rows(empty_cache(inside)):
        waiting = deque(_Row(index, requests[index], sampling) for index in order)
        yield from _in_places(inside, waiting, sampling, batch_size, ends, autocast)
    else:
        yield from _in_batches(model, inside, tokenizer, requests, order, sampling, batch_size, ends, autocast)


@contextmanager
def _in_use(model: Any, autocast: torch.dtype | None) -> Iterator[None]:
    """The model in evaluation mode and in its precision, until the block's end."""
    with ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        if autocast is not None:
            stack.enter_context(torch.autocast(model.device.type, autocast))
            stack.enter_context(frozen_casts_kept(model))
        yield


class _Row:
    """A request under way, with the random numbers for drawing its tokens."""

    def __init__(self, request: int, asked: Request, sampling: Sampling) -> None:
        self.request = request
        self.prompt_ids = asked.prompt_ids
        self.completion_ids: list[int] = []
        self._seed, self._length = asked.seed, sampling.max_new_tokens

    @cached_property
    def numbers(self) -> Tensor:
        return _numbers(self._seed, self._length)


class _SeededSlots(Slots):
    """Slots in which each row draws its tokens with its own random numbers."""

    rows: list[Any]

    def __init__(self, model: Any, sampling: Sampling, size: int, ends: set[int]) -> None:
        config = GenerationConfig(do_sample=False, max_new_tokens=sampling.max_new_tokens)
        config._eos_token_tensor = torch.tensor(sorted(ends))
        super().__init__(model, config, size)
        self.sampling = sampling

    def tokens(self) -> list[int]:
        if not self.sampling.temperature:
            return self.logits.argmax(dim=-1).tolist()
        numbers = torch.stack([row.numbers[len(row.completion_ids)] for row in self.rows])  # (n,)
        return draw(self.logits, numbers.to(self.logits.device), self.sampling).tolist()

    def _processors_of(self, row: Any) -> LogitsProcessorList:
        return LogitsProcessorList()


def _in_places(
    model: Any,
    waiting: deque[_Row],
    sampling: Sampling,
    batch_size: int,
    ends: set[int],
    autocast: torch.dtype | None,
) -> Iterator[Completion]:
    """Generate with a full batch: a row that ends gives its place to a waiting one. No row is kept after its end."""
    slots = _SeededSlots(model, sampling, batch_size, ends)
    started = list[_Row]()

    def more(free: int) -> list[_Row]:
        if slots.rows and free < REFILL * batch_size:  # reading prompts costs a forward pass of its own
            return []
        some = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        started.extend(some)
        return some

    while waiting or slots.rows:
        with _in_use(model, autocast):
            slots.run(more, lambda: len(slots.rows) < len(started))
        under_way = set(map(id, slots.rows))
        ended = [row for row in started if id(row) not in under_way]
        started[:] = slots.rows
        for row in ended:
            yield Completion(row.request, row.completion_ids, row.completion_ids[-1] not in ends)


def _in_batches(
    model: Any,
    inside: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    order: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    ends: set[int],
    autocast: torch.dtype | None,
) -> Iterator[Completion]:
    """Generate batch by batch, for a cache without selectable rows. Each batch waits for its longest row."""
    # The model's own generation config would fill in what is not set here, so it is replaced. That must be done on the
    # model inside, since an adapter's `generate` calls the inner one.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [requests[index].prompt_ids for index in chunk]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        draws = LogitsProcessorList([_Draw([requests[index].seed for index in chunk], sampling)])
        with _in_use(model, autocast), temporarily(inside, generation_config=config):
            output = model.generate(**inputs, logits_processor=draws)[:, inputs["input_ids"].shape[1] :]
        for index, row in zip(chunk, output.tolist(), strict=True):
            length = next((at + 1 for at, token in enumerate(row) if token in ends), None)
            yield Completion(index, row[:length], length is None)


class _Draw(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and masks all other tokens."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        self.step = 0
        if sampling.temperature:
            self.numbers = torch.stack([_numbers(seed, sampling.max_new_tokens) for seed in seeds])  # (B, T)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.sampling.temperature:
            return scores
        chosen = draw(scores, self.numbers[:, self.step].to(scores.device), self.sampling)  # (B,)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _numbers(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Draw tokens by where numbers in [0, 1) fall in the cumulative distributions: `(B, V)`, `(B,)` → `(B,)`."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        limit = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < limit, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(descending=True)
        chances = ordered.softmax(-1)
        before = _summed(chances) - chances  # probability of all likelier tokens
        logits = logits.masked_fill(torch.zeros_like(logits).scatter(1, places, before).ge(sampling.top_p), -torch.inf)
    cumulative = _summed(logits.softmax(-1).double())  # in float64: it ends at 1
    return torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)[:, 0]


def _summed(chances: Tensor) -> Tensor:
    """Cumulative sums over the vocabulary: `(B, V)` → `(B, V)`. On a GPU torch has no deterministic ones."""
    if torch.are_deterministic_algorithms_enabled():
        return chances.cpu().cumsum(-1).to(chances.device)
    return chances.cumsum(-1)
