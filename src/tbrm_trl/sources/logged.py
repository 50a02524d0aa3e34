"""Logged trajectories: rows of the data set that already have a completion, tokenized and rewarded."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from ..trajectory import PREVIOUS, End, Source, Trajectory
from .parquet import from_row

_COMPLETION_COLUMNS = ("completion_ids", "completion")
_INDEX = "_row"  # column with the number of the row in the training set
# Columns that describe the row's own trajectory. All others go to the reward functions.
OWN_COLUMNS = frozenset(
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
    """`(N,)` bool: which rows of the data set have a completion."""
    columns = [name for name in _COMPLETION_COLUMNS if name in (dataset.column_names or ())]
    if not columns:
        return np.zeros(len(dataset), dtype=bool)
    parts = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        parts.append(np.any([table[name].is_valid().to_numpy() for name in columns], axis=0))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def prompt_numbers(dataset: Dataset, logged: np.ndarray) -> np.ndarray:
    """`(N,)` a number for each logged row, equal for rows with the same prompt; −1 for rows that are not logged."""
    numbers: dict[str, int] = {}
    of_row = np.full(len(dataset), -1)
    names = [name for name in ("prompt_ids", "prompt") if name in dataset.column_names]
    prompts = dataset.select_columns(names)
    for index in np.flatnonzero(logged).tolist():
        row = prompts[index]
        prompt = next(row[name] for name in names if row[name] is not None)
        of_row[index] = numbers.setdefault(json.dumps(prompt), len(numbers))
    return of_row


@dataclass
class CompletionTokenizer:
    """Tokenizes logged completions into what the policy would have produced after the same prompt.

    Attributes:
        tokenizer: the policy's.
        end_token_ids: tokens that end a completion.
        prompt_ids: prompt (text or messages) → ids, as generation makes them.
        template: messages → ids by the chat template. The second argument says whether to open the assistant's turn.
    """

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: Collection[int]
    prompt_ids: Callable[[Any], list[int]]
    template: Callable[[list[dict[str, Any]], bool], list[int]]

    def __call__(self, prompt: Any, completion: Any, end: End) -> tuple[list[int], list[int], list[bool]]:
        """Prompt ids, completion ids with their end token (without one if cut at the length limit), and loss mask.

        Raises:
            ValueError: if the text cannot be shown to be what the policy would have produced.
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
        else:  # a token spans the border: the policy, given the prompt's ids, cannot produce it
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
                continue  # an inserted message: the opening of the next turn holds it
            opening = self.template([*prompt, *completion[:turn]], True)
            through = self.template([*prompt, *completion[: turn + 1]], False)
            if opening[: len(ids)] != ids or through[: len(opening)] != opening:
                raise ValueError(
                    f"the chat template does not write message {turn} of `completion` after what the policy had "
                    "before it (it rewrites earlier turns, or opens the assistant's turn differently). Give "
                    "`prompt_ids` and `completion_ids` instead."
                )
            turn_ids = through[len(opening) :]
            ends = [position for position, token in enumerate(turn_ids) if token in self.end_token_ids]
            after = turn_ids[ends[-1] + 1 :] if ends else turn_ids
            if not ends or self.tokenizer.decode(after).strip():
                raise ValueError(
                    "the chat template does not close the assistant's turn with one of the tokens that end a "
                    f"completion ({', '.join(map(str, sorted(self.end_token_ids)))}). Give `prompt_ids` and "
                    "`completion_ids` instead."
                )
            turn_ids = turn_ids[: ends[-1] + 1]
            content = message.get("content") or ""
            if isinstance(content, str) and content.strip() not in self.tokenizer.decode(turn_ids):
                raise ValueError(
                    f"the chat template drops or changes part of the completion {_short(content)}. Give `prompt_ids` "
                    "and `completion_ids` instead."
                )
            if end is End.LENGTH and turn == len(completion) - 1:
                turn_ids = turn_ids[:-1]
            mask += [False] * (len(opening) - len(ids)) + [True] * len(turn_ids)
            ids = [*opening, *turn_ids]
        return ids[len(prompt_ids) :], mask[len(prompt_ids) :]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def tokenize_logged_rows(
    dataset: Dataset, logged: np.ndarray, tokenize: CompletionTokenizer, vocabulary: int, context: int | None
) -> Dataset:
    """Give every logged row the columns of its trajectory. Rows without a completion get None in these columns.

    Args:
        dataset: the training set, checked by `check_logged_rows`.
        logged: `(N,)` bool, from `logged_rows`.
        tokenize: tokenizes completions that are text or messages.
        vocabulary: number of token ids of the model.
        context: largest number of tokens that the model can read; None if unlimited.

    Raises:
        ValueError: for ids outside the vocabulary, a trajectory longer than the context, or text that does not
            tokenize into what the policy would have produced. The error names the row.
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
    """The trajectory of a row with the columns of `tokenize_logged_rows`. Rows of one prompt share a `group_id`."""
    prompt = np.asarray(row["prompt_ids"], dtype=np.int64).tobytes()
    origin = {"source": Source.LOGGED.value, "group": xxhash.xxh3_64_intdigest(prompt) >> 1}
    own = {name: row.get(name) for name in OWN_COLUMNS}
    if own["ref_key"] is None and own["ref_log_probs"] is not None:
        own["ref_key"] = f"{PREVIOUS}unknown"  # scores that the user brings: the policy's that produced the trajectory
    return from_row({**own, **origin})


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
    """The rows without the columns that describe their own trajectory."""
    return [{name: value for name, value in row.items() if name not in OWN_COLUMNS} for row in rows]


RewardRows = Callable[[Sequence[Mapping[str, Any]], Sequence[Trajectory]], Sequence[float]]


class LoggedRows:
    """The logged rows of a training set, as trajectories.

    Args:
        dataset: the training set, with the columns that `tokenize_logged_rows` adds.
        logged: `(N,)` bool, which rows are logged.
        scored: whether the rows bring all reference scores that they need.
        reward: gives the rewards of rows and their trajectories, for rows that bring none.
    """

    def __init__(self, dataset: Dataset, logged: np.ndarray, scored: bool, reward: RewardRows):
        self.scored, self.reward = scored, reward
        rewards = dataset["reward"] if "reward" in dataset.column_names else [None] * len(dataset)
        self.some_unrewarded = any(value is None for value, mine in zip(rewards, logged, strict=True) if mine)
        self._by_row: dict[int, Trajectory] = {}  # those taken so far, which keep the scores they are given

    def take(self, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        """The trajectories of these rows. A row's trajectory is the same object whenever the row comes up again."""
        if self.scored:  # the data set holds all there is to know
            trajectories = [logged_trajectory(row) for row in rows]
        else:
            for row in rows:
                if row[_INDEX] not in self._by_row:
                    self._by_row[row[_INDEX]] = logged_trajectory(row)
            trajectories = [self._by_row[row[_INDEX]] for row in rows]
            # A stream that begins anew within a window may give a row twice, in two groups.
            first = {id(one): place for place, one in reversed(list(enumerate(trajectories)))}
            trajectories = [one if first[id(one)] == i else replace(one) for i, one in enumerate(trajectories)]
        if self.some_unrewarded:
            for row, trajectory, reward in zip(rows, trajectories, self.reward(rows, trajectories), strict=True):
                if row.get("reward") is None:
                    trajectory.reward = reward
        return trajectories

    def state(self) -> tuple[list[int], list[Trajectory]]:
        """Numbers and trajectories of the rows taken so far, with the scores that they were given."""
        return list(self._by_row), list(self._by_row.values())

    def restore(self, rows: Sequence[int], trajectories: Sequence[Trajectory]) -> None:
        """Go on from what `state` returned."""
        self._by_row = dict(zip(rows, trajectories, strict=True))
