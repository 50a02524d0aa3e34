"""Logged trajectories: rows of the data set that have a completion already, checked and tokenized."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from .storage import from_row
from .trajectory import End, Source, Trajectory

_COMPLETION_COLUMNS = ("completion_ids", "completion")
PREVIOUS = "previous/"  # begins the `ref_key` of scores by the policy that produced the trajectory
_INDEX = "_row"  # of the row in the training set
# What a row says about its own trajectory; everything else goes to the reward functions.
_OWN_COLUMNS = frozenset(
    ("completion", "prompt_ids", "completion_ids", "loss_mask", "end", "reward", "ref_log_probs", "ref_soft_value")
) | {"ref_end_value", "ref_key", "optimal_value", _INDEX}

_FEATURES = Features(
    {
        _INDEX: Value("int64"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "loss_mask": List(Value("bool")),
        "end": Value("string"),
    }
)


def logged_rows(dataset: Any) -> np.ndarray:
    """`(N,)` bool: which rows of a sized data set have a completion."""
    columns = [name for name in _COMPLETION_COLUMNS if name in (dataset.column_names or ())]
    if not columns:
        return np.zeros(len(dataset), dtype=bool)
    parts = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        parts.append(np.any([table[name].is_valid().to_numpy() for name in columns], axis=0))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def prompt_numbers(dataset: Dataset, logged: np.ndarray) -> np.ndarray:
    """`(N,)` for each logged row a number that rows with the same prompt share; −1 for the others."""
    numbers: dict[str, int] = {}
    of_row = np.full(len(dataset), -1)
    names = [name for name in ("prompt_ids", "prompt") if name in dataset.column_names]
    prompts = dataset.select_columns(names)
    for index in np.flatnonzero(logged).tolist():
        row = prompts[index]
        prompt = next(row[name] for name in names if row[name] is not None)
        of_row[index] = numbers.setdefault(json.dumps(prompt), len(numbers))
    return of_row


def check_logged_rows(dataset: Dataset, logged: np.ndarray, rewarded: bool, scored: bool) -> None:
    """Refuse logged rows that cannot be trained on, before any model is loaded. Each error names the row.

    Args:
        dataset: the training set.
        logged: `(N,)` bool, from `logged_rows`.
        rewarded: whether reward functions are there for rows without a reward of their own.
        scored: whether each row must bring the scores of the policy that produced it.

    Raises:
        ValueError: for an empty completion, ids without prompt ids, a mask of the wrong length or content, an unknown
            end, a reward that is missing or not finite.
    """
    known = [name for name in dataset.column_names if name in _OWN_COLUMNS or name == "prompt"]
    rows = dataset.select_columns(known)
    for index in np.flatnonzero(logged).tolist():
        row = rows[index]
        problem = _problem(row, rewarded) or (_problem_of_scores(row) if scored else None)
        if problem:
            raise ValueError(f"Row {index} of the training set: {problem}")


def _problem(row: Mapping[str, Any], rewarded: bool) -> str | None:
    reward, mask = row.get("reward"), row.get("loss_mask")
    if row.get("completion_ids") is not None:
        if not row["completion_ids"]:
            return "`completion_ids` is empty. Drop the row, or leave it None to have the prompt rolled out."
        if not row.get("prompt_ids"):
            return "`completion_ids` without `prompt_ids`. Give both, or `prompt` and `completion` as text or messages."
        if mask is not None and len(mask) != len(row["completion_ids"]):
            return (
                f"`loss_mask` has {len(mask)} entries for {len(row['completion_ids'])} completion ids. It needs one "
                "per id: 1 where the policy chose the token, 0 where a tool or environment inserted it."
            )
        if mask is not None and not set(mask) <= {0, 1}:
            return "`loss_mask` holds values other than 0 and 1."
    elif row.get("prompt") is None:
        return "`completion` without `prompt`. Give both, or `prompt_ids` and `completion_ids`."
    elif not row["completion"]:
        return "`completion` is empty. Drop the row, or leave it None to have the prompt rolled out."
    elif mask is not None:
        return "`loss_mask` counts tokens, so it needs `prompt_ids` and `completion_ids` beside it, not text."
    if row.get("end") not in (None, *(end.value for end in End)):
        return f"`end` is {row['end']!r}. It may be {', '.join(end.value for end in End)} or None."
    if reward is None and not rewarded:
        return "it has no `reward`, and there is no reward function to give it one. Add the column, or `reward_funcs`."
    if reward is not None and not math.isfinite(reward):
        return f"`reward` is {reward}. It must be a finite number, or None to have the reward functions give it."
    return None


def _problem_of_scores(row: Mapping[str, Any]) -> str | None:
    ids, log_probs, key = row.get("completion_ids"), row.get("ref_log_probs"), row.get("ref_key")
    if key is not None and not key.startswith(PREVIOUS):
        return (
            'with `reference="previous"` a logged row must bring the scores of the policy that produced it, but these '
            'are another reference\'s. Use `reference="initial"`, or rollouts of a run with `reference="previous"`.'
        )
    if ids is None or log_probs is None or len(ids) != len(log_probs) or row.get("ref_soft_value") is None:
        return (
            'with `reference="previous"` a logged row must bring what the policy that produced it said of it: '
            "`completion_ids`, as many `ref_log_probs`, and `ref_soft_value`, as runs with `save_rollouts=True` leave "
            'behind. Use `reference="initial"`, or such rows.'
        )
    return None


@dataclass
class CompletionTokenizer:
    """Tokenizes logged completions into what the policy would have produced after the same prompt.

    Attributes:
        tokenizer: of the policy.
        end_token_ids: tokens that end a completion.
        prompt_ids: prompt (text or messages) → ids, as for generation.
        template: messages → ids by the chat template; second argument: whether to open the assistant's turn.
    """

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: Collection[int]
    prompt_ids: Callable[[Any], list[int]]
    template: Callable[[list[dict[str, Any]], bool], list[int]]

    def __call__(self, prompt: Any, completion: Any, end: End) -> tuple[list[int], list[int], list[bool]]:
        """Prompt ids, completion ids (the end token included, unless cut at the length limit), and loss mask.

        Raises:
            ValueError: where the text cannot be shown to be what the policy would have produced.
        """
        prompt_ids = self.prompt_ids(prompt)
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise ValueError("`prompt` is text but `completion` is messages. Give both in one form.")
            ids = self._text(prompt, completion, prompt_ids)
            if end is not End.LENGTH and ids[-1] not in self.end_token_ids:
                ids = [*ids, self.tokenizer.eos_token_id]
            return prompt_ids, ids, [True] * len(ids)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        ids, mask = self._messages(prompt, completion, prompt_ids, end)
        return prompt_ids, ids, mask

    def _text(self, prompt: str, completion: str, prompt_ids: list[int]) -> list[int]:
        joint = self.tokenizer(text=prompt + completion)["input_ids"]
        if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
            ids = joint[len(prompt_ids) :]
        else:  # a token would span the border, which the policy, given the prompt's ids, cannot produce
            ids = self.tokenizer(text=completion, add_special_tokens=False)["input_ids"]
        if not self.tokenizer.decode([*prompt_ids, *ids]).endswith(completion):
            raise ValueError(
                f"the tokenizer does not give the completion {_short(completion)} back from its own ids. Give "
                "`prompt_ids` and `completion_ids` instead."
            )
        return ids

    def _messages(
        self, prompt: list[dict[str, Any]], completion: list[dict[str, Any]], prompt_ids: list[int], end: End
    ) -> tuple[list[int], list[bool]]:
        if completion[-1].get("role") != "assistant":
            raise ValueError("the last message of `completion` must be the assistant's.")
        ids, mask = list(prompt_ids), [False] * len(prompt_ids)
        for turn, message in enumerate(completion):
            if message["role"] != "assistant":
                continue  # inserted: the next turn's opening holds it
            opening = self.template([*prompt, *completion[:turn]], True)
            through = self.template([*prompt, *completion[: turn + 1]], False)
            if opening[: len(ids)] != ids or through[: len(opening)] != opening:
                raise ValueError(
                    f"the chat template does not write message {turn} of `completion` after what the policy had "
                    "before it (it rewrites earlier turns, or opens the assistant's turn differently). Give "
                    "`prompt_ids` and `completion_ids` instead."
                )
            said = through[len(opening) :]
            ends = [position for position, token in enumerate(said) if token in self.end_token_ids]
            after = said[ends[-1] + 1 :] if ends else said
            if not ends or self.tokenizer.decode(after).strip():
                raise ValueError(
                    "the chat template does not close the assistant's turn with one of the tokens that end a "
                    f"completion ({', '.join(map(str, sorted(self.end_token_ids)))}). Give `prompt_ids` and "
                    "`completion_ids` instead."
                )
            said = said[: ends[-1] + 1]
            content = message.get("content") or ""
            if isinstance(content, str) and content.strip() not in self.tokenizer.decode(said):
                raise ValueError(
                    f"the chat template drops or changes part of the completion {_short(content)}. Give `prompt_ids` "
                    "and `completion_ids` instead."
                )
            if end is End.LENGTH and turn == len(completion) - 1:
                said = said[:-1]
            mask += [False] * (len(opening) - len(ids)) + [True] * len(said)
            ids = [*opening, *said]
        return ids[len(prompt_ids) :], mask[len(prompt_ids) :]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def tokenize_logged_rows(
    dataset: Dataset, logged: np.ndarray, tokenize: CompletionTokenizer, vocabulary: int, context: int | None
) -> Dataset:
    """Give every logged row the columns of its trajectory; rows without a completion get None in all of them.

    Args:
        dataset: the training set, checked by `check_logged_rows`.
        logged: `(N,)` bool, from `logged_rows`.
        tokenize: for completions given as text or messages.
        vocabulary: number of token ids of the model.
        context: most tokens the model can read, None where unlimited.

    Raises:
        ValueError: for ids outside the vocabulary, a trajectory longer than the context, or text that does not
            tokenize into what the policy would have produced. Names the row.
    """

    def columns(row: dict[str, Any], index: int) -> dict[str, Any]:
        if not logged[index]:
            return dict.fromkeys(_FEATURES)
        try:
            return {_INDEX: index, **_trajectory_columns(row, tokenize, vocabulary, context)}
        except ValueError as error:
            raise ValueError(f"Row {index} of the training set: {error}") from error

    return dataset.map(
        columns,
        with_indices=True,
        features=Features({**dataset.features, **_FEATURES}),
        load_from_cache_file=False,  # the checks are the point
        new_fingerprint=generate_random_fingerprint(),
        desc="Tokenizing logged trajectories",
    )


def _trajectory_columns(
    row: Mapping[str, Any], tokenize: CompletionTokenizer, vocabulary: int, context: int | None
) -> dict[str, Any]:
    given_end = End(row["end"]) if row.get("end") is not None else None
    if row.get("completion_ids") is not None:
        prompt_ids, ids = list(row["prompt_ids"]), list(row["completion_ids"])
        mask = [bool(m) for m in row["loss_mask"]] if row.get("loss_mask") is not None else [True] * len(ids)
        end = given_end or (End.EOS if ids[-1] in tokenize.end_token_ids else End.LENGTH)
    else:
        end = given_end or End.EOS
        prompt_ids, ids, mask = tokenize(row["prompt"], row["completion"], end)
    outside = next((token for token in (*prompt_ids, *ids) if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise ValueError(
            f"token id {outside} is outside the model's vocabulary of {vocabulary}. Were these ids made with another "
            "tokenizer?"
        )
    if context is not None and len(prompt_ids) + len(ids) > context:
        raise ValueError(
            f"{len(prompt_ids)} prompt and {len(ids)} completion tokens do not fit the model's context of {context}. "
            "Drop the row; it is never cut."
        )
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "loss_mask": mask,
        "end": end.value,
    }


def logged_trajectory(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row that `tokenize_logged_rows` has been over. Rows of one prompt are one group."""
    prompt = np.asarray(row["prompt_ids"], dtype=np.int64).tobytes()
    origin = {"source": Source.LOGGED.value, "group": xxhash.xxh3_64_intdigest(prompt) >> 1}
    own = {name: row.get(name) for name in _OWN_COLUMNS}
    if own["ref_key"] is None and own["ref_log_probs"] is not None:
        own["ref_key"] = f"{PREVIOUS}unknown"  # the user's own: of the policy that produced it, if of any
    return from_row({**own, **origin})


def row_index(row: Mapping[str, Any]) -> int:
    """Which row of the training set this is."""
    return row[_INDEX]


def completion_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """A logged row's prompt and completion as reward functions expect them: both text, or both messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None:
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    if completion is None:
        completion = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    if not isinstance(prompt, str) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def columns_for_rewards(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what they say about their own trajectory."""
    return [{name: value for name, value in row.items() if name not in _OWN_COLUMNS} for row in rows]
