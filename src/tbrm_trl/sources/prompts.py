"""Finds prompts that are too long or have only unknown characters, before a model is loaded."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..batch import chunks
from ..context import loading
from ..files import column_parts, is_text
from ..options import TBRMOptions
from .logged import normal_prompt

BYTES_PER_MESSAGE = 64  # more than templates put around a message
_UNUSED = "\U0010fffd"  # a character that no text uses


@dataclass(frozen=True)
class PromptLimit:
    """How long a prompt may be, and what happens to longer ones.

    Attributes:
        tokens: the limit; None if there is none.
        reason: what sets it, for errors.
        policy: "refuse", "drop" or "cut".
    """

    tokens: int | None
    reason: str
    policy: str

    def check(self, length: int, name: str, more: str = "") -> None:
        """Raise ValueError if a prompt of this many tokens is too long. The message calls it `name`."""
        if self.tokens is not None and length > self.tokens:
            advice = (
                "Give its data set to the trainer at construction, where long prompts are dropped"
                if self.policy == "drop"
                else "Drop long prompts (`long_prompts='drop'`), cut them on the left (`long_prompts='cut'`)"
            )
            raise ValueError(
                f"{name} has {length} tokens, more than {self.tokens}, which is {self.reason}.{more} {advice}, or make "
                "room."
            )

    def applied(self, prompts: Sequence[Any], ids: Sequence[list[int]]) -> Sequence[list[int]]:
        """The ids of prompts to roll out. Long ones are cut on the left if the policy is "cut", else refused."""
        if self.tokens is None:
            return ids
        if self.policy == "cut":
            ids = [one[-self.tokens :] for one in ids]
        for prompt, one in zip(prompts, ids, strict=True):
            self.check(len(one), f"The prompt {str(prompt)[:60]!r} of this window")
        return ids


class PromptRenderer:
    """Converts prompts to token ids as generation will, before the model is loaded.

    Args:
        model: id, folder or model.
        processing_class: tokenizer or processor; None loads the model's own, as TRL would.
        args: the options.
        tools: the tools that the chat template gets.
        other: a rollout function or environment factory. Either renders prompts by itself.

    Attributes:
        processing_class: as given or loaded.
        tokenizer: its text tokenizer.
        is_exact: whether generation reads exactly these ids.
    """

    def __init__(self, model: Any, processing_class: Any, args: TBRMOptions, tools: Any, other: Any):
        self.args, self.tools, self.model = args, tools, model
        named = isinstance(model, str)
        self.settings = args.hub_options if named else {**args.hub_options, "revision": None}
        if processing_class is None:
            name = model if named else get_config_model_id(model.config)
            with loading("The model", name):
                processing_class = AutoProcessor.from_pretrained(
                    name, truncation_side="left", padding_side="left", **self.settings
                )
        self.processing_class = processing_class
        self.tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.is_exact = self.tokenizer is self.processing_class and not other

    def __call__(self, prompts: list[Any]) -> Sequence[Sequence[int]]:
        """The ids of prompts that are all text, or all messages."""
        if isinstance(prompts[0], str):
            return self.tokenizer(text=prompts)["input_ids"]
        try:
            return self._templated(prompts)
        except Exception as error:  # a template may raise anything
            for prompt in prompts if len(prompts) > 1 else ():
                self([prompt])  # raises at the prompt that it cannot write
            raise ValueError(
                f"The chat template cannot write the prompt {str(prompts[0])[:80]!r} ({type(error).__name__}: "
                f"{error}). Give its messages the form that the template expects."
            ) from error

    def _templated(self, conversations: list[Any]) -> Sequence[Sequence[int]]:
        return self.processing_class.apply_chat_template(
            conversation=conversations,
            tools=self.tools or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(self.args.chat_template_kwargs or {}),
        )["input_ids"]

    def limit(self, sets: Sequence[Any], generates: bool = True) -> PromptLimit:
        """The smaller of `max_prompt_length` and the room that a completion leaves in the model's context, if known.

        Args:
            sets: the training set and the evaluation sets.
            generates: whether any row of them is rolled out. A log alone needs no room for `max_completion_length`.

        Raises:
            ValueError: if no room is left, or if `long_prompts` cannot be applied here.
        """
        args, policy = self.args, self.args.long_prompts
        if policy != "refuse" and not self.is_exact:
            raise ValueError(
                f"`long_prompts={policy!r}` with images, `rollout_func` or `environment_factory` is refused: what they "
                "draw from is no list of tokens that could be counted beforehand, or cut. Use 'refuse'."
            )
        if policy == "drop" and any(isinstance(one, IterableDataset) for one in sets):
            raise ValueError("`long_prompts='drop'` needs data sets, not a stream. Filter the stream, or use 'cut'.")
        if isinstance(self.model, str):
            with loading("The model", self.model):
                config = AutoConfig.from_pretrained(self.model, **self.settings)
        else:
            config = self.model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest, completion = args.max_prompt_length, args.max_completion_length
        if generates and context is not None and context <= completion:
            raise ValueError(
                f"`max_completion_length={completion}` leaves no room for a prompt in the model's context of {context} "
                "tokens. Lower it."
            )
        taken = completion if generates else 0
        room = None if context is None else context - taken
        if longest is not None and (room is None or longest <= room):
            return PromptLimit(longest, "max_prompt_length", policy)
        less = f" less max_completion_length={completion}" if taken else ""
        return PromptLimit(room, f"the model's context of {context}{less}", policy)


def fitting_prompts(
    dataset: Dataset, title: str, asked: np.ndarray, limit: PromptLimit, renderer: PromptRenderer
) -> Dataset:
    """Drop or refuse prompts that are too long, as the limit says, and return the data set.

    Args:
        dataset: rows with a column `prompt`.
        title: its name in errors.
        asked: `(N,)` bool, the rows that are to be rolled out.
        limit: how long their prompts may be.
        renderer: prompts → ids, as for generation.

    Raises:
        ValueError: for a prompt that has only unknown characters, and for one that is too long if such prompts are
            refused. The message names the row. Also if every row would be dropped.
    """
    _refuse_unknown(dataset, title, asked, renderer.tokenizer)
    if limit.tokens is None or limit.policy == "cut":
        return dataset
    lengths = _lengths_of_suspects(dataset, asked, limit.tokens, renderer)
    long = {row: length for row, length in lengths if length > limit.tokens}
    if not long:
        return dataset
    if limit.policy == "refuse":
        row, length = next(iter(long.items()))
        limit.check(length, f"Row {row} of {title}: its prompt", f" {len(long)} of {len(dataset)} rows are too long.")
    warnings.warn(
        f"{len(long)} of {len(dataset)} rows of {title} are dropped: their prompts have more than {limit.tokens} "
        f"tokens, which is {limit.reason}. They are rows {', '.join(map(str, list(long)[:10]))}"
        f"{', …' if len(long) > 10 else ''}.",
        stacklevel=2,
    )
    kept = np.ones(len(dataset), bool)
    kept[list(long)] = False
    if not kept.any():
        raise ValueError(f"No row of {title} is left: every prompt has more than {limit.tokens} tokens.")
    return dataset.select(np.flatnonzero(kept))


def _lengths_of_suspects(
    dataset: Dataset, asked: np.ndarray, limit: int, renderer: PromptRenderer
) -> Iterator[tuple[int, int]]:
    """Rows that may be too long, with their lengths. A token has at least one byte, so most rows need no tokenizing."""
    rows = dataset.select_columns(["prompt"]).with_format(None)
    around: int | None = None  # tokens that the template puts around the first prompt
    for first, column in column_parts(dataset, "prompt"):
        suspects = asked[first : first + len(column)].copy()
        size = _bytes_of(column)  # (n,)
        if size is not None and suspects.any():
            if around is None:
                one = normal_prompt(rows[first + int(np.flatnonzero(suspects)[0])]["prompt"])
                around = 8 if isinstance(one, str) else len(renderer([one])[0])
            suspects &= size + around > limit
        places = (first + np.flatnonzero(suspects)).tolist()
        for some in chunks(places, 256):
            prompts = [normal_prompt(prompt) for prompt in rows[some]["prompt"]]  # as rollouts get them
            yield from zip(some, map(len, renderer(prompts)), strict=True)


def _bytes_of(column: pa.Array) -> np.ndarray | None:
    """`(n,)` an upper bound on the bytes of text in each prompt; None if they cannot be counted in bulk."""
    if is_text(column):
        return _text_bytes(column)
    inner = column.type.value_type if pa.types.is_list(column.type) else None
    if inner is None or not pa.types.is_struct(inner) or inner.get_field_index("content") < 0:
        return None
    if any(not pa.types.is_string(inner.field(i).type) for i in range(inner.num_fields)):
        return None  # parts of messages and tool calls are rendered too
    texts = [_text_bytes(column.values.field(i)) for i in range(inner.num_fields)]  # reasoning, a name, the content
    sizes = np.sum(texts, axis=0)
    before = np.concatenate([[0], (sizes + BYTES_PER_MESSAGE).cumsum()])
    offsets = column.offsets.to_numpy()
    return before[offsets[1:]] - before[offsets[:-1]]


def _text_bytes(column: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _refuse_unknown(dataset: Dataset, title: str, asked: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts of unknown characters only. A tokenizer that knows every byte needs no check."""
    unknown = unknown_tokens(tokenizer)
    if unknown is None:
        return
    rows = dataset.select_columns(["prompt"]).with_format(None)
    for some in chunks(np.flatnonzero(asked).tolist(), 256):
        texts = [text_of(prompt) for prompt in rows[some]["prompt"]]
        tokenized = tokenizer(text=texts, add_special_tokens=False)["input_ids"]
        for row, text, ids in zip(some, texts, tokenized, strict=True):
            if text.strip() and unknown.issuperset(ids):
                raise ValueError(
                    f"Row {row} of {title}: the tokenizer knows none of the characters of its prompt, {text[:40]!r}. "
                    "Drop the row, or use a tokenizer of its language."
                )


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int] | None:
    """The ids that the tokenizer gives for an unknown character, if any; None if it knows every character."""
    ids = tokenizer(text=_UNUSED, add_special_tokens=False)["input_ids"]
    return None if _UNUSED in tokenizer.decode(ids) else set(ids)


def text_of(prompt: Any) -> str:
    """A prompt's text without a template around it."""
    if isinstance(prompt, str):
        return prompt
    return " ".join(message["content"] for message in prompt or () if isinstance(message.get("content"), str))
