"""Logged trajectories: rows of the data set that already have a completion, tokenized and rewarded."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from ..files import require_writable
from ..trajectory import PREVIOUS, End, Source, Trajectory
from .parquet import from_row

_COMPLETION_COLUMNS = ("completion_ids", "completion")
_INDEX = "_row"  # column with the number of the row in the training set
# Columns that describe a logged row's own trajectory. All others go to the reward functions. In a data set without
# logged rows they are ordinary columns.
OWN_COLUMNS = frozenset(
    """
    completion prompt_ids completion_ids loss_mask end reward ref_log_probs ref_soft_value ref_end_value ref_key
    """.split()
) | {_INDEX}

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
    prompts = dataset.select_columns(names).with_format(None)
    for index in np.flatnonzero(logged).tolist():
        row = prompts[index]
        prompt = next(row[name] for name in names if row[name] is not None)
        of_row[index] = numbers.setdefault(json.dumps(normal_prompt(prompt)), len(numbers))
    return of_row


def without_none(value: Any) -> Any:
    """Remove the keys that hold None from all dictionaries in the value, at any depth.

    Arrow gives all dictionaries of a column the same keys and fills missing ones with None. A None of the row itself
    then looks the same as a filled one. A JSON column keeps each row's own keys. This makes both alike.
    """
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def normal_prompt(prompt: Any) -> Any:
    """A prompt or a completion in a form that does not depend on how its data set was stored.

    Messages lose the keys that hold None, and a message without content gets the content "". Text stays as it is.
    """
    if not isinstance(prompt, list):
        return prompt
    return [{"content": "", **without_none(one)} if isinstance(one, dict) else one for one in prompt]


@dataclass
class CompletionTokenizer:
    """Tokenizes logged completions into what the policy would have produced after the same prompt.

    Attributes:
        tokenizer: the policy's.
        end_token_ids: tokens that end a completion, those at which generation stops.
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
            if self._decoded(joint).endswith(completion):
                return ids
        else:  # a token spans the border: the policy, given the prompt's ids, cannot produce it
            whole = self._decoded(prompt_ids) + completion
            for ids in self._alone(completion):
                if self._decoded([*prompt_ids, *ids]) == whole:
                    return ids
        raise ValueError(
            f"the tokenizer does not give the completion {_short(completion)} back from its own ids. Give "
            "`prompt_ids` and `completion_ids` instead."
        )

    def _alone(self, text: str) -> Iterator[list[int]]:
        """The ids of a text: as such, and within a line, since some tokenizers put a space before any text."""
        as_such, line, both = self.tokenizer(text=[text, "\n", "\n" + text], add_special_tokens=False)["input_ids"]
        yield as_such
        if both[: len(line)] == line:
            yield both[len(line) :]

    def _decoded(self, ids: list[int]) -> str:
        """The text of ids as it was tokenized. Some tokenizers would remove spaces before punctuation."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _messages(
        self, prompt: list[dict[str, Any]], completion: list[dict[str, Any]], prompt_ids: list[int], end: End
    ) -> tuple[list[int], list[bool]]:
        if completion[-1].get("role") != "assistant":
            raise ValueError("the last message of `completion` must be the assistant's.")
        ids, mask = list(prompt_ids), [False] * len(prompt_ids)
        for turn, message in enumerate(completion):
            if message["role"] != "assistant":  # an inserted message: the next turn's opening contains it
                if self._render([*prompt, *completion[:turn]]) == self._render([*prompt, *completion[: turn + 1]]):
                    raise ValueError(
                        f"the chat template drops message {turn} of `completion`, whose role is "
                        f"{message['role']!r}: the policy would not have read it. Drop the row, use a template that "
                        "writes such messages, or give `prompt_ids` and `completion_ids` instead."
                    )
                continue
            try:
                opening = self.template([*prompt, *completion[:turn]], True)
                through = self.template([*prompt, *completion[: turn + 1]], False)
            except Exception as error:  # a template may raise anything
                raise ValueError(
                    f"the chat template cannot write message {turn} of `completion` ({type(error).__name__}: {error}). "
                    "Give the message the form that it expects, or `prompt_ids` and `completion_ids` instead."
                ) from error
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
            if isinstance(content, str) and content.strip() not in self._decoded(turn_ids):
                raise ValueError(
                    f"the chat template drops or changes part of the completion {_short(content)}. Give `prompt_ids` "
                    "and `completion_ids` instead."
                )
            self._check_parts([*prompt, *completion[:turn]], turn, message, through)
            if end is End.LENGTH and turn == len(completion) - 1:
                turn_ids = turn_ids[:-1]
            mask += [False] * (len(opening) - len(ids)) + [True] * len(turn_ids)
            ids = [*opening, *turn_ids]
        return ids[len(prompt_ids) :], mask[len(prompt_ids) :]

    def _check_parts(
        self, before: list[dict[str, Any]], turn: int, message: dict[str, Any], through: list[int]
    ) -> None:
        """Refuse a message if the template renders the same without one of its parts, or one element of a part."""
        for name, part in message.items():
            if name == "role" or not part or (name == "content" and isinstance(part, str)):
                continue
            lesser: list[tuple[str, Any]] = [(f"`{name}`", None)]
            if isinstance(part, list) and len(part) > 1:
                lesser += [(f"`{name}[{i}]`", [*part[:i], *part[i + 1 :]]) for i in range(len(part))]
            for what, rest in lesser:
                without = {key: value for key, value in message.items() if key != name}
                without |= {name: rest} if rest is not None else {"content": ""} if name == "content" else {}
                if self._render([*before, without]) == through:
                    raise ValueError(
                        f"the chat template drops {what} of message {turn} of `completion`: the completion would be "
                        "trained on as if the policy had not written it. Remove it from the message if the policy "
                        "did not write it (an id, a name); else drop the row, use a template that writes it, or "
                        "give `prompt_ids` and `completion_ids` instead."
                    )

    def _render(self, messages: list[dict[str, Any]]) -> list[int] | None:
        """Token ids of messages, rendered by the chat template; None if it refuses them."""
        try:
            return self.template(messages, False)
        except Exception:  # a template may raise anything
            return None

    def refuse_impossible(
        self, prompt_ids: list[int], ids: list[int], mask: list[bool], end: End, drawn_here: bool
    ) -> None:
        """Refuse ids that no policy could have produced: padding, and anything it chose after an end token.

        Args:
            prompt_ids: the prompt's ids.
            ids: the completion's ids.
            mask: which of the completion's ids the policy chose.
            end: how the completion ended, according to the row.
            drawn_here: whether this library drew and unpadded the completion. Padding is then not refused: the policy
                may have chosen the padding token.

        Raises:
            ValueError: if there are such ids. The message says where, and what to change.
        """
        ends, pad = self.end_token_ids, self.tokenizer.pad_token_id
        for place, token in enumerate(ids[:-1]):
            if token in ends and mask[place] and mask[place + 1]:
                raise ValueError(
                    f"token {place} of {len(ids)} in the completion is {self._named(token)}, which ends a completion, "
                    f"and the policy is said to have chosen {self._named(ids[place + 1])} after it. Cut the "
                    "completion after its end token; if a tool or an environment inserted what follows, say so by "
                    "`loss_mask`."
                )
        if end is End.LENGTH and ids[-1] in ends and mask[-1]:
            raise ValueError(
                f'`end` is "length", but the completion ends with {self._named(ids[-1])}, which ends a completion. '
                'Set `end` to "eos", or cut the token off if it was added.'
            )
        if pad is None or drawn_here:
            return
        strip = (
            "No policy could have produced that: strip the padding (`ids[attention_mask == 1]`) from `prompt_ids`, "
            "`completion_ids` and `loss_mask`."
        )
        before = _run(prompt_ids, pad)
        if before > self._opening_padding or before == len(prompt_ids) > 1:
            raise ValueError(f"`prompt_ids` begins with {before} × the padding token {self._named(pad)}. {strip}")
        after = _run(prompt_ids[::-1], pad)
        if before < len(prompt_ids) and after > (pad in ends):
            raise ValueError(f"`prompt_ids` ends with {after} × the padding token {self._named(pad)}. {strip}")
        after = _run(ids[::-1], pad)
        if after and (pad not in ends or not mask[-1]):
            raise ValueError(f"the completion ends with {after} × the padding token {self._named(pad)}. {strip}")
        if pad in ends or pad == self.tokenizer.bos_token_id:
            return
        for place, token in enumerate(ids):
            if token == pad and (mask[place] or ids[place - 1 : place] == [pad] or place == 0):
                raise ValueError(
                    f"token {place} of {len(ids)} in the completion is the padding token {self._named(pad)}. {strip}"
                )

    @cached_property
    def _opening_padding(self) -> int:
        """How many padding tokens may begin a prompt, because the tokenizer uses one token for several purposes."""
        pad = self.tokenizer.pad_token_id
        return max(int(pad == self.tokenizer.bos_token_id), _run(self.tokenizer(text="a")["input_ids"], pad))

    def _named(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)!r} (id {token})"


def _run(ids: list[int], token: int | None) -> int:
    """How many times the token is repeated at the beginning of the ids."""
    return next((place for place, other in enumerate(ids) if other != token), len(ids))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def scratch_folder(dataset: Dataset) -> TemporaryDirectory | None:
    """A folder for a data set's tokenized rows, deleted with the returned object; None if they stay in memory.

    Raises:
        OSError: if the data set's cache cannot be written to.
    """
    if not dataset.cache_files:
        return None
    folder = Path(dataset.cache_files[0]["filename"]).parent
    require_writable(folder, "the training set's cache (to be moved by HF_DATASETS_CACHE)")
    return TemporaryDirectory(prefix="tbrm-logged-", dir=folder)


def tokenize_logged_rows(
    dataset: Dataset,
    logged: np.ndarray,
    tokenize: CompletionTokenizer,
    vocabulary: int,
    context: int | None,
    scratch: TemporaryDirectory | None = None,
) -> Dataset:
    """Add the columns of its trajectory to every logged row. Rows without a completion get None in these columns.

    Args:
        dataset: the training set, checked by `check_logged_rows`.
        logged: `(N,)` bool, from `logged_rows`.
        tokenize: tokenizes completions that are text or messages.
        vocabulary: number of token ids of the model.
        context: largest number of tokens that the model can read; None if unlimited.
        scratch: where the result is kept on disk, from `scratch_folder`.

    Raises:
        ValueError: for ids outside the vocabulary, ids that no policy could have produced, a trajectory longer than the
            context, or text that does not tokenize into what the policy would have produced. The error names the row.
    """

    def columns(row: dict[str, Any], index: int) -> dict[str, Any]:
        if not logged[index]:
            return dict.fromkeys(_FEATURES)
        try:
            return {_INDEX: index, **trajectory_columns(row, tokenize, vocabulary, context)}
        except ValueError as error:
            raise ValueError(f"Row {index} of the training set: {error}") from error

    return dataset.map(
        columns,
        with_indices=True,
        features=Features({**dataset.features, **_FEATURES}),
        load_from_cache_file=False,  # a cached result would skip the checks
        cache_file_name=str(Path(scratch.name) / "rows.arrow") if scratch is not None else None,
        new_fingerprint=generate_random_fingerprint(),
        desc="Tokenizing logged trajectories",
    )


def trajectory_columns(
    row: Mapping[str, Any], tokenize: CompletionTokenizer, vocabulary: int, context: int | None
) -> dict[str, Any]:
    """The columns of `_FEATURES` for a row with a completion. The arguments are those of `tokenize_logged_rows`."""
    given_end = End(row["end"]) if row.get("end") is not None else None
    if row.get("completion_ids") is not None:
        prompt_ids, ids = list(row["prompt_ids"]), list(row["completion_ids"])
        mask = [bool(m) for m in row["loss_mask"]] if row.get("loss_mask") is not None else [True] * len(ids)
        end = given_end or (End.EOS if ids[-1] in tokenize.end_token_ids else End.LENGTH)
    else:
        end = given_end or End.EOS
        prompt_ids, ids, mask = tokenize(normal_prompt(row["prompt"]), normal_prompt(row["completion"]), end)
    if not (prompt_ids and ids):
        raise ValueError(
            f"its {'completion' if prompt_ids else 'prompt'} has no token, and a policy needs one to begin with. Drop "
            "the row, or begin the prompt with some text or the tokenizer's BOS token."
        )
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
    tokenize.refuse_impossible(prompt_ids, ids, mask, end, drawn_here=row.get("policy_step") is not None)
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
    if own["reward"] is not None:
        own["reward"] = float(own["reward"])  # a verdict may be true or false
    if own["ref_key"] is None and own["ref_log_probs"] is not None:
        own["ref_key"] = f"{PREVIOUS}unknown"  # the user's scores: of the policy that produced the trajectory
    return from_row({**own, **origin})


def completion_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """A logged row's prompt and completion as reward functions expect them: both text, or both messages."""
    prompt, completion = normal_prompt(row.get("prompt")), normal_prompt(row.get("completion"))
    if prompt is None:
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    if completion is None:
        completion = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    return (prompt, completion) if isinstance(prompt, str) else as_messages(prompt, completion)


def as_messages(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """A prompt and its completion as messages: text becomes a message of the user, and one of the assistant."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def own_columns(some_logged: bool, of_estimator: str | None) -> frozenset[str]:
    """The columns that reward functions do not get.

    Args:
        some_logged: whether the data set has logged rows. Without any, `reward`, `end`, … are ordinary columns.
        of_estimator: the column that the estimator of the soft value reads, if it reads one.
    """
    return (OWN_COLUMNS if some_logged else frozenset((_INDEX,))) | ({of_estimator} if of_estimator else set())


def columns_for_rewards(rows: Sequence[Mapping[str, Any]], hidden: Collection[str]) -> list[dict[str, Any]]:
    """The columns that generation and the reward functions get, independent of how the data set was stored.

    Args:
        rows: of a training set or an evaluation set.
        hidden: columns to leave out, those of `own_columns`.
    """
    return [
        {
            name: normal_prompt(value) if name == "prompt" else without_none(value)
            for name, value in row.items()
            if name not in hidden
        }
        for row in rows
    ]


def rewarded_rows(dataset: Dataset, logged: np.ndarray) -> np.ndarray:
    """`(N,)` bool: which of the logged rows have a reward."""
    if "reward" not in dataset.column_names:
        return np.zeros_like(logged)
    column = dataset.select_columns(["reward"]).with_format("arrow")[:]["reward"]
    return logged & column.is_valid().to_numpy()


def some_unrewarded(dataset: Dataset, logged: np.ndarray) -> bool:
    """Whether any logged row has no reward."""
    return bool((logged & ~rewarded_rows(dataset, logged)).any())


RewardRows = Callable[[Sequence[Mapping[str, Any]], Sequence[Trajectory]], Sequence[float]]


class LoggedRows:
    """The logged rows of a training set, as trajectories.

    Args:
        dataset: the training set, with the columns that `tokenize_logged_rows` adds.
        logged: `(N,)` bool, which rows are logged.
        scored: whether the rows already have all reference scores that they need.
        reward: returns the rewards of rows and their trajectories. It gets those without a reward, which may be none.
    """

    def __init__(self, dataset: Dataset, logged: np.ndarray, scored: bool, reward: RewardRows):
        self.scored, self.reward = scored, reward
        self.some_unrewarded = some_unrewarded(dataset, logged)
        self._by_row: dict[int, Trajectory] = {}  # of rows taken so far; they keep the scores they are given

    def take(self, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        """The trajectories of these rows. A row's trajectory is the same object whenever the row comes up again."""
        if self.scored:  # the data set holds everything
            trajectories = [logged_trajectory(row) for row in rows]
        else:
            for row in rows:
                if row[_INDEX] not in self._by_row:
                    self._by_row[row[_INDEX]] = logged_trajectory(row)
            trajectories = [self._by_row[row[_INDEX]] for row in rows]
            # A stream that restarts within a window may give a row twice, in two groups.
            first = {id(one): place for place, one in reversed(list(enumerate(trajectories)))}
            trajectories = [one if first[id(one)] == i else replace(one) for i, one in enumerate(trajectories)]
        if self.some_unrewarded:
            lacking = [place for place, row in enumerate(rows) if row.get("reward") is None]
            rewards = self.reward([rows[place] for place in lacking], [trajectories[place] for place in lacking])
            for place, reward in zip(lacking, rewards, strict=True):
                trajectories[place].reward = reward
        return trajectories

    def state(self) -> tuple[list[int], list[Trajectory]]:
        """Numbers and trajectories of the rows taken so far, with the scores they were given."""
        return list(self._by_row), list(self._by_row.values())

    def restore(self, rows: Sequence[int], trajectories: Sequence[Trajectory]) -> None:
        """Continue from what `state` returned."""
        self._by_row = dict(zip(rows, trajectories, strict=True))
