"""Checks of data sets, which refuse too few rows, rows that cannot be trained on, and options that need other rows."""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from ..files import column_parts, is_text
from ..options import TBRMOptions
from ..sources.logged import OWN_COLUMNS, logged_rows, prompt_numbers
from ..sources.sampler import DataPlan, WindowMix, window_mix
from ..trajectory import PREVIOUS, End, largest_return

_KEPT_BY_TRL = ("prompt", "image", "images")  # with `remove_unused_columns`


def check_training_set(
    dataset: Any, args: TBRMOptions, group_size: int, rewarded: bool, evaluated: bool, environment: bool = False
) -> DataPlan:
    """Check the training set before any model is loaded, and return how windows are made of it.

    Args:
        dataset: the training set.
        args: the options.
        group_size: number of trajectories of one prompt that are compared within a window; 1 if none are.
        rewarded: whether there is something to reward completions with.
        evaluated: whether there is an evaluation set.
        environment: whether rollouts come from environments, which may supply prompts, and reward only their own
            rollouts.

    Raises:
        ValueError: for a set that fills no window, a row that cannot be trained on (named by its number), and options
            that need a kind of row that it lacks.
    """
    check_kind(dataset)
    if isinstance(dataset, Dataset) and args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`accelerator_config` with `dispatch_batches=True` is refused: it sends tensors from process to process, "
            "and rows are texts and messages. Leave it out."
        )
    if dataset is not None and not isinstance(dataset, Sized) and args.data_seed is not None:
        raise ValueError(
            f"`data_seed={args.data_seed}` has no effect on a stream, which TRL shuffles by `seed`. Set `seed`, or "
            "load the training set without streaming."
        )
    logged, mix = check_dataset(dataset, args, group_size)
    check_sources(mix, args, group_size, rewarded, evaluated)
    check_prompts(dataset, "the training set", ~logged & (not environment), ~logged | _given_as_text(dataset, logged))
    if not mix.logged:
        check_format(dataset, "the training set")  # rows of others are read as plain values
    else:
        largest = largest_return(args.beta)
        check_logged_rows(dataset, logged, rewarded, args.reference == "previous", largest, environment)
    return DataPlan(logged, mix, check_logged_groups(dataset, logged, mix, args, group_size))


def check_kind(dataset: Any) -> None:
    """Refuse anything but a single data set with rows, or a stream."""
    if isinstance(dataset, Mapping):
        splits = ", ".join(repr(name) for name in dataset)
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__} of several data sets ({splits}). Pass one of them, such as "
            f"`train_dataset[{next(iter(dataset), 'train')!r}]`."
        )
    if isinstance(dataset, Sized) and not isinstance(dataset, Dataset):
        raise TypeError(
            f"`train_dataset` is a {type(dataset).__name__}. Pass a `datasets.Dataset` (of rows in memory: "
            "`Dataset.from_list(rows)`), or a stream."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError("`train_dataset` has no row. Was everything filtered out?")
    if getattr(dataset, "_distributed", None) is not None:  # the only trace of `split_dataset_by_node`
        raise ValueError(
            "`train_dataset` is one node's part of a stream (`split_dataset_by_node`). Every window is divided among "
            "the processes, so pass the whole stream to each of them."
        )


def check_dataset(dataset: Any, args: TBRMOptions, group_size: int) -> tuple[np.ndarray, WindowMix]:
    """Find the logged rows, and divide a generation window between logged rows and prompts.

    Raises:
        ValueError: for a data set that fills no generation window, since TRL would silently train on nothing, and for a
            stream with completions, which cannot be divided into prompts and logged rows.
    """
    if not isinstance(dataset, Sized):
        if isinstance(dataset, IterableDataset):
            # If a stream does not know its columns, its first row is read. Training reads it from the start again.
            first: Mapping[str, Any] = {} if dataset.column_names is not None else next(iter(dataset), {})
            if _COMPLETIONS & set(dataset.column_names or ()) or is_logged(first):
                raise logged_stream()
        return np.zeros(0, dtype=bool), WindowMix(args.generation_batch_size, 0)
    logged = logged_rows(dataset)
    prompts, logs = int((~logged).sum()), int(logged.sum())
    mix = window_mix(prompts, logs, args, group_size)
    if logs and logs < mix.logged:
        raise ValueError(
            f"The training set has {logs} logged trajectories, fewer than the {mix.logged} of one generation window "
            f"of {args.generation_batch_size}. Lower per_device_train_batch_size, steps_per_generation"
            f"{' or logged_fraction' if mix.rollouts else ''}, or add rows."
        )
    needed = mix.rollouts // args.num_generations
    if prompts >= needed:
        return logged, mix
    if logs:
        raise ValueError(
            f"The training set has {prompts} prompts without a completion, fewer than the {needed} of one generation "
            f"window ({mix.rollouts} rollouts, {args.num_generations} per prompt). Raise logged_fraction, lower "
            "per_device_train_batch_size or steps_per_generation, or add prompts."
        )
    unit = args.world_size * args.steps_per_generation  # rollouts per row of per_device_train_batch_size
    fitting = range(prompts * args.num_generations // unit, 0, -1)
    rows = next((rows for rows in fitting if rows * unit % args.num_generations == 0), None)
    advice = (
        f"The largest generation batch that fits is {rows * unit} rollouts: set per_device_train_batch_size={rows} "
        f"(and generation_batch_size={rows * unit}, if you set that), or add prompts."
        if rows
        else f"Not even per_device_train_batch_size=1 fits {args.steps_per_generation} steps per generation: lower "
        "steps_per_generation and gradient_accumulation_steps, or add prompts."
    )
    raise ValueError(
        f"The training set has {prompts} prompts, fewer than the {needed} of one generation batch "
        f"({args.generation_batch_size} rollouts, {args.num_generations} per prompt): no batch would ever be full. "
        f"{advice}"
    )


_COMPLETIONS = {"completion", "completion_ids"}


def is_logged(row: Mapping[str, Any]) -> bool:
    """Whether a row of a stream has a completion."""
    return any(row.get(name) is not None for name in _COMPLETIONS)


def logged_stream() -> ValueError:
    return ValueError(
        "A streamed training set has a column of completions. Logged trajectories need a data set whose rows can be "
        "counted: load it without streaming, or drop the column to have the prompts rolled out."
    )


def check_evaluation_sets(given: Any, needs_prompts: bool, processes: int) -> None:
    """Refuse rows of evaluation sets that cannot be rolled out, by set and row. A stream is checked when it is drawn.

    Args:
        given: an evaluation set, several by name, or None.
        needs_prompts: whether a row without a prompt cannot be rolled out.
        processes: how many share an evaluation. A stream is refused on several.
    """
    for title, dataset in titled_sets(given).items():
        check_evaluation_stream(dataset, title, processes)
        check_format(dataset, title)
        every = np.ones(len(dataset) if isinstance(dataset, Dataset) else 0, dtype=bool)
        check_prompts(dataset, title, every & needs_prompts, every)


def check_format(dataset: Any, title: str) -> None:
    """Refuse a format in which a row is a table, or that leaves out the prompt."""
    if not isinstance(dataset, Dataset):
        return
    kind, columns = dataset.format["type"], dataset.format["columns"]
    if kind in ("arrow", "pandas", "polars"):
        raise ValueError(
            f"{title} has the format {kind!r}, in which a row is a table. Pass `dataset.with_format(None)`."
        )
    prompt = (dataset.features or {}).get("prompt")
    if kind == "numpy" and prompt is not None and not isinstance(prompt, Value):
        raise ValueError(
            f"{title} has the format 'numpy', in which a prompt of messages is an array. Pass "
            "`dataset.with_format(None)`."
        )
    hidden = {"prompt"} & set(dataset.column_names) - set(columns or dataset.column_names)
    if hidden and not dataset.format["output_all_columns"]:
        raise ValueError(
            f"{title} has a format without the column `prompt`, but with {', '.join(columns)}. Pass "
            "`dataset.with_format(None)`, or name `prompt` in the format."
        )


def check_evaluation_stream(dataset: Any, title: str, processes: int) -> None:
    """Refuse a stream on several processes: its last batches are filled up with rows that would count twice."""
    if processes > 1 and not has_length(dataset):
        raise ValueError(
            f"{title} is a stream, which several processes do not evaluate: nothing tells the rows that fill up its "
            "last batches from the others. Load it without streaming, or make a data set of it "
            "(`Dataset.from_list(list(stream))`)."
        )


def best_metric(args: TBRMOptions) -> str | None:
    """The metric by which the Trainer chooses the best model, as evaluations name it; None if it chooses none."""
    name = args.metric_for_best_model
    return None if name is None else f"eval_{name.removeprefix('eval_')}"


def check_best_metric(args: TBRMOptions, eval_dataset: Any, callbacks: Any, column: str | None) -> None:
    """Refuse to choose the best model by a metric that no evaluation of the run will have.

    Args:
        args: the options.
        eval_dataset: an evaluation set, several by name, or None.
        callbacks: the callbacks, some of which may add metrics of their own (`metric_names`).
        column: the column from which the estimator reads a value, if it does.
    """
    metric = best_metric(args)
    if metric is None:
        return
    names = [name for callback in callbacks or () for name in getattr(callback, "metric_names", ())]
    meant = [name for name in names if name.startswith(metric.partition("/")[0] + "/")]  # of the same benchmark
    if metric not in names and (meant or (names and eval_dataset is None)):
        only = "without an evaluation set, there are only the metrics of the benchmarks"
        reason = only if eval_dataset is None else "its benchmark has no such metric"
        raise ValueError(
            f"`metric_for_best_model={args.metric_for_best_model!r}` is refused: {reason}; name one of "
            f"{', '.join(meant or names)}."
        )
    columns = [getattr(one, "column_names", None) or () for one in titled_sets(eval_dataset).values()]
    if column is not None and metric.endswith("loss") and not any(column in names for names in columns):
        raise ValueError(
            f'`metric_for_best_model={args.metric_for_best_model!r}` with `soft_value="{args.soft_value}"` is refused: '
            f"no evaluation set has the column `{column}`, so no loss can be computed there. Choose by "
            "'eval_reward', with `greater_is_better=True`."
        )


def columns_read(dataset: Any, drops_unused: bool, is_formatted: bool) -> list[str] | None:
    """The columns of a data set that reach the reward functions; None if they are unknown, as for some streams.

    Args:
        dataset: a data set, or None.
        drops_unused: whether the Trainer drops the columns that it does not know (`remove_unused_columns`).
        is_formatted: whether rows are read in the data set's own format, which may choose columns.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(dataset, Dataset) and is_formatted and not dataset.format["output_all_columns"]:
        names = dataset.format["columns"]
    return [name for name in names if name in _KEPT_BY_TRL] if names is not None and drops_unused else names


def titled_sets(given: Any) -> dict[str, Any]:
    """Key the evaluation sets (one, several by name, or None) by what errors call them."""
    if isinstance(given, Mapping):
        return {f"the evaluation set {name!r}": dataset for name, dataset in given.items()}
    return {} if given is None else {"the evaluation set": given}


def _given_as_text(dataset: Any, logged: np.ndarray) -> np.ndarray:
    """`(N,)` bool: logged rows whose ids are made from their text or messages."""
    if not logged.any() or "completion_ids" not in dataset.column_names:
        return logged
    return logged & ~logged_rows(dataset.select_columns(["completion_ids"]))


def check_prompts(dataset: Any, title: str, needed: np.ndarray, rendered: np.ndarray) -> None:
    """Refuse prompts from which no policy could begin a completion.

    Args:
        dataset: a data set; a stream is skipped.
        title: what the error calls it.
        needed: `(N,)` bool, rows that need a prompt.
        rendered: `(N,)` bool, rows with prompts that are tokenized.

    Raises:
        ValueError: for a missing column, and by row for a missing prompt or a problem that `problem_of_prompt` finds.
    """
    if not isinstance(dataset, Dataset):
        return
    if "prompt" not in dataset.column_names:
        if needed.any():
            raise ValueError(
                f"{title.capitalize()} has no column `prompt`. Its columns are {', '.join(dataset.column_names)}: "
                "rename the one that holds the prompts (`rename_column`)."
            )
        return
    for index, problem in _problems_of_prompts(dataset, needed, rendered):
        raise ValueError(f"Row {index} of {title}: {problem}")


def _problems_of_prompts(dataset: Dataset, needed: np.ndarray, rendered: np.ndarray) -> Iterator[tuple[int, str]]:
    kind = None  # type of the first prompt
    rows = dataset.select_columns(["prompt"]).with_format(None)
    for first, column in column_parts(dataset, "prompt"):
        given = column.is_valid().to_numpy(zero_copy_only=False)
        for place in np.flatnonzero(needed[first : first + 1000] & ~given).tolist():
            yield first + place, "it has no `prompt`, and is to be rolled out. Drop the row, or give it one."
        suspects = given & rendered[first : first + 1000]
        if is_text(column):
            continue
        if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):  # most are cleared at once
            fields = [column.type.value_type.field(i).name for i in range(column.type.value_type.num_fields)]
            if {"role", "content"} <= set(fields):
                begin, end = (offsets := column.offsets.to_numpy())[:-1], offsets[1:]
                roles, contents = (column.values.field(name) for name in ("role", "content"))
                lacking = pc.or_(roles.is_null(), contents.is_null()).to_numpy(zero_copy_only=False)
                before = np.concatenate([[0], np.cumsum(lacking)])  # such messages before each message of the column
                ends = np.array(roles.to_pylist() or [None], dtype=object)[np.where(end > begin, end - 1, 0)]
                suspects &= (begin == end) | (before[end] > before[begin]) | (ends == "assistant")
        for place in np.flatnonzero(suspects).tolist():
            prompt = rows[first + place]["prompt"]
            kind = kind or type(prompt)
            if problem := problem_of_prompt(prompt):
                yield first + place, problem
            if isinstance(prompt, str) is not issubclass(kind, str):
                yield (
                    first + place,
                    "its prompt is text and others are messages, or the reverse. Give all in one form.",
                )


def check_empty_prompts(dataset: Dataset, title: str, asked: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an empty prompt, by row, if the tokenizer makes no token of it. `asked`, `(N,)`: rows to draw."""
    if tokenizer(text="")["input_ids"]:
        return
    for first, column in column_parts(dataset, "prompt"):
        if not is_text(column):
            return
        empty = pc.equal(column, "").fill_null(False).to_numpy(zero_copy_only=False) & asked[first : first + 1000]
        if empty.any():
            raise ValueError(f"Row {first + empty.argmax()} of {title}: {_EMPTY}")


def check_chat_template(dataset: Any, title: str, template: Any) -> None:
    """Refuse prompts that are messages if there is no chat template to write them with."""
    if template is not None or not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return
    if len(dataset) and not isinstance(dataset[0]["prompt"], (str, type(None))):
        raise ValueError(
            f"The prompts of {title} are messages, and the tokenizer has no chat template to write them by. Give it "
            "one (`tokenizer.chat_template`), or give the prompts as text (tbrm train: --prompt_template 'Question: "
            "{question}\\nAnswer:')."
        )


_EMPTY = (
    "its prompt is empty, and the tokenizer makes no token of it. Drop the row, or begin the prompt with some text or "
    "the tokenizer's BOS token."
)


def problem_of_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """What is wrong with a prompt: it is neither text nor messages, or its last message is the assistant's.

    With a tokenizer, text that gives no token is wrong too.
    """
    if isinstance(prompt, str):
        return _EMPTY if prompt == "" and tokenizer is not None and not tokenizer(text="")["input_ids"] else None
    if problem := _problem_of_messages(prompt, "prompt"):
        return problem
    if prompt[-1]["role"] == "assistant":
        return (
            "its prompt ends in a message of the assistant. The chat template would close that turn and open a second "
            "one, so that nothing continues it. Move the message into `completion` if it is logged; else drop it, or "
            "give the prompt as text that ends where the policy is to go on."
        )
    return None


def _problem_of_messages(value: Any, name: str) -> str | None:
    if isinstance(value, Mapping):
        return f"`{name}` is a single message, a dictionary. Put it into a list: [message]."
    if not isinstance(value, Sequence):
        return f"`{name}` is {value!r}, a {type(value).__name__}. It must be text, or a list of messages."
    if not value:
        return f"`{name}` has no message. Drop the row."
    for place, message in enumerate(value):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            return (
                f"message {place} of `{name}` is {str(message)[:60]!r}. A message is a dictionary with a `role` and a "
                "`content`."
            )
        # A chat template writes it as an empty message, so that the mistake would not show. An assistant may only think
        # or call tools.
        if message.get("content") is None and message["role"] != "assistant":
            keys = ", ".join(f"`{key}`" for key, given in message.items() if given is not None)
            return f"message {place} of `{name}` has no `content`. It has {keys}: rename the key, or drop the row."
    return None


def check_logged_groups(
    dataset: Any, logged: np.ndarray, mix: WindowMix, args: TBRMOptions, group_size: int
) -> np.ndarray | None:
    """Return `(N,)` a number for each logged row, equal for rows of one prompt; None if no logged rows are compared.

    Raises:
        ValueError: for a prompt with fewer logged rows than a group, which would never be full, and if whole groups do
            not fill a window.
    """
    if group_size == 1 or not mix.logged:
        return None
    prompts = prompt_numbers(dataset, logged)
    sizes = np.bincount(prompts[logged])
    if sizes.min() < args.num_generations:
        row = int(np.flatnonzero(prompts == sizes.argmin())[0])
        raise ValueError(
            f"Row {row} of the training set: its prompt has {sizes.min()} logged completions, fewer than a group of "
            f"num_generations={args.num_generations} that are to be compared. Drop it, or lower num_generations."
        )
    usable = int((sizes // args.num_generations).sum()) * args.num_generations
    if usable < mix.logged:
        raise ValueError(
            f"The training set has {usable} logged trajectories in whole groups of num_generations="
            f"{args.num_generations}, fewer than the {mix.logged} of one generation window. Lower "
            "per_device_train_batch_size or steps_per_generation, or add rows."
        )
    return prompts


def check_sources(mix: WindowMix, args: TBRMOptions, group_size: int, rewarded: bool, evaluated: bool) -> None:
    """Refuse options that need a kind of trajectory that the data set does not give."""
    if mix.logged and args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns=True` would drop the columns of the logged trajectories. Leave it at False."
        )
    drawn = mix.rollouts and args.draws_prompts
    if (drawn or evaluated) and not rewarded:
        rows = "Prompts" if drawn else "The prompts of `eval_dataset`"
        raise ValueError(
            f"{rows} are to be rolled out, but no `reward_funcs` are given to reward the completions. Rows that are "
            "logged trajectories have the columns `completion` (or `completion_ids`) and `reward`: rename those that "
            "are called otherwise."
        )
    if not mix.rollouts and args.replay_buffer_size:
        raise ValueError(
            "`replay_buffer_size` keeps rollouts, but every row of the training set has a completion: nothing is "
            "rolled out. Set it to 0; logged trajectories come again in every epoch."
        )
    if not mix.rollouts and args.save_rollouts:
        raise ValueError("`save_rollouts=True`, but every row of the training set has a completion. Leave it False.")
    if evaluated:
        check_evaluation_batches(args, group_size)
    if mix.logged and args.truncation == "bootstrap" and args.reference == "previous":
        raise ValueError(
            '`truncation="bootstrap"` with `reference="previous"` is refused for logged trajectories: they do not '
            'bring the value of their last state under the policy that produced them. Use `reference="initial"`.'
        )
    if args.precompute_ref_log_probs and (mix.rollouts or args.reference == "previous"):
        raise ValueError(
            "`precompute_ref_log_probs=True` is for a training set in which every row has a completion, with "
            '`reference="initial"`: rollouts cannot be scored before they exist. Leave it at None.'
        )


def check_evaluation_batches(args: TBRMOptions, group_size: int) -> None:
    """Refuse evaluation batches that split groups, or in which a reward is its own baseline."""
    per_prompt = args.num_generations_eval or args.num_generations
    if args.reward_baseline == "batch_mean" and args.per_device_eval_batch_size * args.world_size == 1:
        raise ValueError(
            "`reward_baseline='batch_mean'` with evaluation batches of one trajectory is refused: its own reward would "
            "be its baseline. Raise per_device_eval_batch_size, or use 'none'."
        )
    if group_size > 1 and args.per_device_eval_batch_size % per_prompt:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} does not hold whole groups of "
            f"{per_prompt} (num_generations_eval), whose trajectories are compared. Make it a multiple of {per_prompt}."
        )


def check_followed(args: TBRMOptions, dataset: Any, mix: WindowMix, rollout_func: Any) -> None:
    """Refuse to follow rollouts that could not be drawn."""
    option = "rollouts='async'" if args.rollouts == "async" else "follow_rollouts"
    if problem := problem_of_coming_windows(dataset if args.rollouts == "async" else (), mix):
        raise ValueError(f"`{option}` is refused: {problem}. Leave it at its default.")
    if rollout_func is not None:
        raise ValueError(
            f"`{option}` with a `rollout_func` is refused: this run draws nothing, and an actor draws from its server. "
            "Leave one of the two out; what the function draws may be written as records (docs/asynchronous.md)."
        )


def problem_of_coming_windows(dataset: Any, mix: WindowMix) -> str | None:
    """Why the rollouts of coming windows are unknown; None if they are known."""
    if not isinstance(dataset, Sized):
        return "a stream does not tell the rows of coming windows. Load the training set without streaming"
    return None if mix.rollouts else "every row of the training set is logged, and nothing is drawn"


def check_sources_of_vision(args: TBRMOptions, mix: WindowMix) -> None:
    """Refuse sources of trajectories that cannot carry images, for a model that reads images."""
    for name in ("replay_buffer_size", "save_rollouts", "follow_rollouts", "rollouts"):
        if not args.is_default(name):
            raise ValueError(f"`{name}` stores text alone, and this model reads images. Leave it at its default.")
    if args.soft_value == "model":
        raise ValueError('`soft_value="model"` scores text alone, and this model reads images. Use another.')
    if args.token_selection == "cut":
        raise ValueError('`token_selection="cut"` could cut images off, and this model reads them. Use "scatter".')
    if mix.logged:
        raise ValueError(
            "Logged trajectories hold text alone, and this model reads images. For text-only training pass the "
            "tokenizer as `processing_class`; else drop the column of completions."
        )


def check_logged_rows(
    dataset: Dataset, logged: np.ndarray, rewarded: bool, scored: bool, largest: float, environment: bool
) -> None:
    """Refuse logged rows that cannot be trained on, before any model is loaded. Each error names the row.

    Args:
        dataset: the training set.
        logged: `(N,)` bool, from `logged_rows`.
        rewarded: whether there are reward functions for rows without a reward.
        scored: whether each row must bring the scores of the policy that produced it.
        largest: the largest |R| allowed, in reward units, so that float32 can sum the square of R/β.
        environment: whether rollouts come from environments. TRL would take the logged rows for such rollouts.

    Raises:
        ValueError: for an empty completion, ids without prompt ids, a mask of the wrong length or content, an unknown
            end, a reward that is missing or not finite, reference scores that are not finite.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The training set has logged rows and a transform (`set_transform`), which changes rows when they are read "
            "and not when they are checked. Apply it once: `dataset.map(...)`."
        )
    for name in {"prompt_ids", "completion_ids"} & set(dataset.column_names):
        _check_ids(dataset, name)
    known = [name for name in dataset.column_names if name in OWN_COLUMNS or name == "prompt"]
    rows = dataset.select_columns(known).with_format(None)
    for index in np.flatnonzero(logged).tolist():
        row = rows[index]
        problem = _problem_beside_environments(row) if environment else None
        problem = problem or problem_of_logged_row(row, rewarded, largest)
        if problem := problem or (_problem_of_scores(row) if scored else None):
            raise ValueError(f"Row {index} of the training set: {problem}")


def _problem_beside_environments(row: Mapping[str, Any]) -> str | None:
    """Why a logged row fails beside environments, where TRL takes it for a rollout of one; None if it is sound."""
    if row.get("reward") is None:
        return "it has no `reward`, and an environment rewards its own rollouts alone. Add the column."
    if row.get("completion_ids") is None and not isinstance(row["prompt"], str):
        return "its messages would be written with the tools of another row's environment. Give token ids."
    return None


def _check_ids(dataset: Dataset, name: str) -> None:
    """Refuse a column of token ids that holds anything but lists of integers. Sound rows are not read."""
    for first, column in column_parts(dataset, name):
        if pa.types.is_null(column.type):
            continue
        inner = column.type.value_type if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else None
        if inner is None or not (pa.types.is_integer(inner) or pa.types.is_null(inner)):
            raise ValueError(
                f"The column `{name}` of the training set holds {column.type}. It must hold lists of integers: "
                f'`dataset.cast_column("{name}", List(Value("int32")))`.'
            )
        if column.flatten().null_count:
            row = next(place for place, ids in enumerate(column.to_pylist()) if ids is not None and None in ids)
            raise ValueError(f"Row {first + row} of the training set: `{name}` holds None among its token ids.")


def problem_of_logged_row(row: Mapping[str, Any], rewarded: bool, largest: float) -> str | None:
    """What is wrong with a row that has a completion, as far as it shows before a model is loaded."""
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
    elif problem := _problem_of_text(row):
        return problem
    elif mask is not None:
        return "`loss_mask` counts tokens, so it needs `prompt_ids` and `completion_ids` beside it, not text."
    if row.get("end") not in (None, *(end.value for end in End)):
        return f"`end` is {row['end']!r}. It may be {', '.join(end.value for end in End)} or None."
    if reward is None and not rewarded:
        return (
            "it has no `reward`, and there is no reward function to give it one. Add the column (or rename the one "
            "that holds it), or `reward_funcs`."
        )
    if reward is not None and not isinstance(reward, Real):
        return (
            f"`reward` is {reward!r}, a {type(reward).__name__}. It must be a number: convert the column, for example "
            '`dataset.cast_column("reward", Value("float64"))`.'
        )
    if reward is not None and not math.isfinite(reward):
        return f"`reward` is {reward}. It must be a finite number, or None to have the reward functions give it."
    if reward is not None and abs(float(reward)) > largest:
        return (
            f"`reward` is {reward:g}. With this beta it may reach {largest:g}: the residual divides it by beta, and "
            "float32 could not sum its square. Scale the rewards."
        )
    for name in ("ref_log_probs", "ref_soft_value", "ref_end_value"):
        value = row.get(name)
        scores = value if isinstance(value, Sequence) else [value]
        if any(score is not None and not math.isfinite(score) for score in scores):
            return f"`{name}` holds a number that is not finite. Drop the column, so that the row is scored again."
    return None


def _problem_of_text(row: Mapping[str, Any]) -> str | None:
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str) and (problem := _problem_of_messages(row[name], name)):
            return problem
    if isinstance(row["completion"], list) and not any(
        any(value for name, value in message.items() if name != "role")
        for message in row["completion"]
        if message.get("role") == "assistant"
    ):
        return (
            "no message of the assistant in `completion` holds anything. Drop the row, or leave `completion` None to "
            "have the prompt rolled out."
        )
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
