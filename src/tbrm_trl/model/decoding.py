"""Draw tokens with the model's own forward, for unfinished rows only.

`sample` replaces the loop of transformers' `generate`: it draws the same tokens, but a finished row leaves the forward
pass. `Slots` is a batch in which another row takes the place of a finished one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode, StoppingCriteriaList

from .caches import can_select_rows, closed_up, empty_cache, equally_wide, give_room, joined, trim

_BY_ROW = ("attention_mask", "position_ids", "token_type_ids")  # forward arguments with one entry per row, (B, W)


def draws_one_token(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether `generate` would follow one candidate for each row, as `sample` does."""
    mode = model._prepare_generation_config(config)[0].get_generation_mode()
    return mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


def draw(scores: Tensor, config: GenerationConfig) -> Tensor:
    """Draw a token for each row as `generate` does: `(B, V)` → `(B,)`."""
    if not config.do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


@contextmanager
def frozen_casts_kept(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its copies of frozen float32 weights, as it does those of trained ones. For use without grad.

    PyTorch's autocast keeps a cast weight until the block's end only if the weight requires a gradient.
    """
    frozen = [one for one in model.parameters() if one.dtype == torch.float32 and not one.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """A `custom_generate` that does not compute finished rows: `(B, P)` → `(B, P + C)`.

    Processors, criteria and random draws get all rows, so they work as in `generate`. The loop of `generate` runs
    instead if rows cannot be taken out of the cache or the arguments, or if more than the tokens is to be returned.

    Args:
        model: the policy, unwrapped.
        input_ids: `(B, P)` prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` has prepared them.
        synced_gpus: whether every process must run as many forwards as the others.
    """
    cache: Any = model_kwargs.get("past_key_values")
    given = {name: value for name, value in model_kwargs.items() if torch.is_tensor(value)}
    plain = all(name in _BY_ROW and value.dim() == 2 for name, value in given.items())
    if not (plain and can_select_rows(cache)) or generation_config.return_dict_in_generate:
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
        )
    give_room(cache)
    device, filler = input_ids.device, generation_config._pad_token_tensor
    is_live = torch.ones(len(input_ids), dtype=torch.bool, device=device)  # (B,)
    live = is_live.nonzero().squeeze(1)  # (n,) rows of the cache
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        if is_live.any():
            logits = outputs.logits[:, -1].float()  # (n, V)
            scores = _at(live, logits, len(input_ids))  # (B, V)
            tokens = draw(logits_processor(input_ids, scores), generation_config)  # (B,)
            tokens = tokens if filler is None else torch.where(is_live, tokens, filler)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
            is_live = is_live & ~stopping_criteria(input_ids, None)
            kept = is_live[live]  # (n,)
            if kept.any() and not kept.all():
                places = torch.tensor(closed_up(kept.nonzero().squeeze(1).tolist()), device=device)
                live = live[places]
                cache.batch_select_indices(places)
                model_kwargs |= {name: model_kwargs[name][places] for name in given}
        if not model._has_unfinished_sequences(not is_live.any(), synced_gpus, device):
            return input_ids
        inputs = model.prepare_inputs_for_generation(input_ids[live], next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


class Row(Protocol):
    """A row to decode: a prompt, and the tokens drawn so far."""

    prompt_ids: list[int]
    completion_ids: list[int]


class Slots:
    """A batch in which a finished row frees its place for another one, which is read in one forward pass.

    Each row has its own logits processors. They get its prompt and completion without padding, so a processor that
    counts from the end of the prompt counts correctly, whenever the row is drawn.

    Args:
        model: the policy, unwrapped.
        config: as `generate` has prepared it.
        size: number of places.
        any_of: returns for each flag whether it is true on any process. A sharded model needs equally many forward
            passes on every process.
        device: where the model computes; by default where its weights are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        size: int,
        any_of: Callable[[list[bool]], list[bool]] = lambda flags: flags,
        device: torch.device | None = None,
    ):
        self.model, self.config, self.size, self.any_of = model, config, size, any_of
        self.ends = set(config._eos_token_tensor.tolist()) if config._eos_token_tensor is not None else set()
        self.rows: list[Row] = []  # unfinished, in the order of the cache
        self.places: list[int] = []  # one per row
        self.processors: list[LogitsProcessorList] = []  # one list per row
        self.cache = empty_cache(model, size)
        device = model.device if device is None else device
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=device)  # (n, W)
        self.logits = torch.zeros(0, 0, device=device)  # (n, V)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._keeps_logits = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def has_ended(self, row: Row) -> bool:
        drawn = row.completion_ids
        return bool(drawn) and (drawn[-1] in self.ends or len(drawn) >= self.config.max_new_tokens)

    def run(self, more: Callable[[int], Sequence[Row]], is_done: Callable[[], bool]) -> None:
        """Draw tokens until `is_done()` on every process; `more(n)` returns at most n further rows."""
        while True:
            undone, reads = self.any_of([not is_done(), bool(self.rows)])
            if not undone:
                return
            if reads:
                self._advance()
            rows = more(self.size - len(self.rows))
            if self.any_of([bool(rows)])[0]:
                self._start(rows)
            self._draw()

    def _start(self, rows: Sequence[Row]) -> None:
        """Read rows into free places: their prompts, and the tokens already drawn."""
        if not rows:
            return self._idle()
        known = [(*row.prompt_ids, *row.completion_ids) for row in rows]
        distinct = {one: number for number, one in enumerate(dict.fromkeys(known))}  # equal ones are read once
        width, device = max(map(len, known)), self.mask.device
        ids = torch.tensor([[0] * (width - len(one)) + [*one] for one in distinct], device=device)  # (d, L)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in distinct], device=device)
        cache = empty_cache(self.model, 0 if self.rows else self.size)
        logits = self._forward(ids, mask, cache)
        if len(distinct) < len(rows):
            of_row = torch.tensor([distinct[one] for one in known], device=device)  # (k,)
            cache.batch_select_indices(of_row)
            mask, logits = mask[of_row], logits[of_row]
        free = [place for place in range(self.size) if place not in self.places]
        self.cache = joined(self.cache, cache) if self.rows else cache
        self.mask = torch.cat(equally_wide(self.mask, mask)) if self.rows else mask
        self.logits = torch.cat([self.logits, logits]) if self.rows else logits
        self.rows += rows
        self.places += free[: len(rows)]
        self.processors += [self._processors_of(row) for row in rows]

    def _draw(self) -> None:
        """Give every row its next token, and remove the rows that end with it."""
        if not self.rows:
            return
        for row, token in zip(self.rows, self.tokens(), strict=True):
            row.completion_ids.append(token)
        kept = closed_up([number for number, row in enumerate(self.rows) if not self.has_ended(row)])
        if len(kept) < len(self.rows):
            self.rows, self.places = [self.rows[n] for n in kept], [self.places[n] for n in kept]
            self.processors = [self.processors[n] for n in kept]
            self.cache.batch_select_indices(torch.tensor(kept, dtype=torch.long, device=self.mask.device))
            self.mask = self.mask[kept]
            self._trim()

    def tokens(self) -> list[int]:
        """Draw the next token of every row."""
        places = torch.tensor(self.places, device=self.mask.device)
        given = zip(self.rows, self.processors, self.logits, strict=True)
        logits = torch.stack([self._processed(*one) for one in given])  # (n, V)
        return draw(_at(places, logits, self.size), self.config)[places].tolist()  # (n,)

    def _trim(self) -> None:
        """Drop the leading columns that are padding in every row, after the longest rows have left."""
        used = self.mask.any(dim=0).nonzero()  # (W', 1)
        first = int(used[0]) if len(used) else 0
        if first and trim(self.cache, first):
            self.mask = self.mask[:, first:]

    def _advance(self) -> None:
        """Read the last drawn token of every row."""
        if not self.rows:
            return self._idle()
        ids = torch.tensor([row.completion_ids[-1:] for row in self.rows], device=self.mask.device)  # (n, 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        self.logits = self._forward(ids, self.mask, self.cache)

    def _idle(self) -> None:
        """Run a forward pass on a process that has nothing to read, because other processes run one."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.mask.device)
        self._forward(one, one, empty_cache(self.model))

    def _forward(self, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Return the logits `(k, V)` after the last of `ids` `(k, L)`; `mask` `(k, W)` covers all tokens, these too."""
        given: dict[str, Any] = {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
        given |= self._keeps_logits
        if self._takes_positions:
            given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=not cache.get_seq_length(), **given)
        return self.model(**inputs, return_dict=True).logits[:, -1].float()

    def _processors_of(self, row: Row) -> LogitsProcessorList:
        config, prompt = copy.copy(self.config), len(row.prompt_ids)
        config.max_length = prompt + config.max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = prompt + config.min_new_tokens
        return self.model._get_logits_processor(config, prompt, device=self.mask.device, model_kwargs={})

    def _processed(self, row: Row, processors: LogitsProcessorList, logits: Tensor) -> Tensor:
        if not processors:
            return logits
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=logits.device)  # (1, L)
        return processors(ids, logits.unsqueeze(0)).squeeze(0)


def _at(places: Tensor, logits: Tensor, size: int) -> Tensor:
    """Put logits at their rows' places in a batch, `(n, V)` → `(size, V)`. Tokens drawn in other places are unused."""
    return logits.new_zeros(size, logits.shape[1]).index_copy(0, places, logits)
