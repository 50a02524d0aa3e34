"""Trajectories as Parquet, one row each. Saved rollouts, logged data and checkpoints share this form."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ..files import plain_value, write_table
from ..trajectory import End, Source, Trajectory

REWARD_PREFIX = "rewards/"  # followed by the name of a reward function
ROW_PREFIX = "row/"  # followed by the name of a data set's column that is also the name of a trajectory's
ROLLOUTS_VERSION = 2  # 1: text alone, and none of the data set's columns
_VERSION = "tbrm_trl.rollouts.version"  # in the metadata of a file of rollouts
_DESCRIPTIVE = frozenset(("source", "group", "value", "baseline", "priority"))

_SCHEMA = {
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.bool_()),
    "reward": pa.float64(),
    "end": pa.string(),
    "source": pa.string(),
    "group": pa.int64(),
    "policy_step": pa.int64(),
    "ref_log_probs": pa.list_(pa.float32()),
    "ref_soft_value": pa.float64(),
    "ref_end_value": pa.float64(),
    "ref_key": pa.string(),
    "value": pa.float64(),
    "baseline": pa.float64(),
    "priority": pa.float64(),
}


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The columns of a trajectory, as plain values by name. Vision inputs are left out."""
    log_probs = trajectory.ref_log_probs
    return {
        "prompt_ids": trajectory.prompt_ids.numpy(),
        "completion_ids": trajectory.completion_ids.numpy(),
        "loss_mask": trajectory.loss_mask.numpy(),
        "reward": None if np.isnan(trajectory.reward) else trajectory.reward,
        "end": trajectory.end.value,
        "source": trajectory.source.value,
        "group": trajectory.group_id,
        "policy_step": trajectory.policy_step,
        "ref_log_probs": None if log_probs is None else log_probs.numpy(),
        "ref_soft_value": trajectory.ref_soft_value,
        "ref_end_value": trajectory.ref_end_value,
        "ref_key": trajectory.ref_key,
        "value": trajectory.value,
        "baseline": trajectory.baseline,
        "priority": trajectory.priority,
        **{REWARD_PREFIX + name: reward for name, reward in trajectory.rewards.items()},
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The inverse of `to_row`; columns that are not a trajectory's are ignored."""
    log_probs = row.get("ref_log_probs")
    return Trajectory(
        prompt_ids=torch.as_tensor(np.asarray(row["prompt_ids"]), dtype=torch.long),
        completion_ids=torch.as_tensor(np.asarray(row["completion_ids"]), dtype=torch.long),
        loss_mask=torch.as_tensor(np.asarray(row["loss_mask"]), dtype=torch.bool),
        reward=np.nan if row["reward"] is None else row["reward"],
        end=End(row["end"]),
        source=Source(row["source"]),
        rewards={
            name.removeprefix(REWARD_PREFIX): value
            for name, value in row.items()
            if name.startswith(REWARD_PREFIX) and value is not None
        },
        group_id=row["group"],
        policy_step=row.get("policy_step"),
        ref_log_probs=None if log_probs is None else torch.as_tensor(np.asarray(log_probs, dtype=np.float32)),
        ref_soft_value=row.get("ref_soft_value"),
        ref_end_value=row.get("ref_end_value"),
        ref_key=row.get("ref_key"),
        value=row.get("value"),
        baseline=row.get("baseline") or 0.0,
        priority=row.get("priority"),
    )


def write_trajectories(
    path: Path,
    trajectories: Sequence[Trajectory],
    extra: Mapping[str, pa.Array] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write trajectories without their vision inputs, and `extra` columns of the same length, to one Parquet file.

    The file appears under its name only when it is whole.
    """
    rows = [to_row(trajectory) for trajectory in trajectories]
    by_function = sorted({name for row in rows for name in row if name.startswith(REWARD_PREFIX)})
    columns = {name: pa.array([row[name] for row in rows], type) for name, type in _SCHEMA.items()}
    columns |= {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in by_function}
    write_table(path, pa.table({**columns, **(extra or {})}).replace_schema_metadata(metadata))


def save_rollouts(
    file: Path,
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> None:
    """Write the rollouts of one window on one process with all that they were made of.

    Args:
        file: from `rollouts_file`.
        trajectories: the rollouts.
        rows: what the reward functions were given of the data set's rows.
        prompts: text or messages, as the reward functions were given them.
        completions: text or messages, as the reward functions were given them.
    """
    extra = {"prompt": column_of(prompts), "completion": column_of(completions)}
    for name in {name: None for row in rows for name in row if name not in extra}:
        taken = name in _SCHEMA or name.startswith((REWARD_PREFIX, ROW_PREFIX))
        extra[ROW_PREFIX + name if taken else name] = column_of([row.get(name) for row in rows])
    write_trajectories(file, trajectories, extra, {_VERSION: str(ROLLOUTS_VERSION)})


def rollouts_file(folder: Path, step: int, process: int) -> Path:
    """Where `load_rollouts` finds the rollouts of a window on one process."""
    return folder / f"step-{step:08d}-process-{process}.parquet"


def column_of(values: Sequence[Any]) -> pa.Array:
    """A column of plain values, or of JSON where they are nested or of several types."""
    if not any(map(_is_nested, values)):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass
    texts = [None if value is None else json.dumps(value, default=plain_value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(map(_is_nested, value)))


def read_trajectories(path: Path) -> list[Trajectory]:
    """The trajectories of one file, as they were written."""
    return [from_row(row) for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist()]


def load_rollouts(folder: str | Path | Iterable[str | Path], unrewarded: bool = False) -> Dataset:
    """Read the rollouts that runs with `save_rollouts=True` wrote, as a data set of logged trajectories.

    Pass it, or a selection of its rows, as `train_dataset`. Nothing is generated again. To have other reward functions
    score the rollouts, drop the column `reward`: the functions get prompts and completions in the form that they had,
    and the columns of the data set that the prompts came from. Such a column with the name of one of the trajectory's
    own comes back under its name, in place of `source`, `group`, `value`, `baseline`, `priority` or `rewards/…`, and
    else as `row/<name>`.

    Args:
        folder: an output directory, its `rollouts` folder, or several of either.
        unrewarded: whether to keep rollouts that no reward function scored.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: for files of a later version of this library.
    """
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(one) for one in folder]
    files = []
    for one in folders:
        inner = one / "rollouts" if (one / "rollouts").is_dir() else one
        found = sorted(inner.glob("step-*.parquet"))
        if not found:
            raise FileNotFoundError(
                f"No saved rollouts (step-*.parquet) in {inner}. Were they saved: save_rollouts=True?"
            )
        files += found
    tables = [_read_rollouts(file) for file in files]
    as_json = {field.name for table in tables for field in table.schema if field.type == pa.json_()}
    tables = [_with_json(table, as_json) for table in tables]
    rollouts = Dataset(pa.concat_tables(tables, promote_options="permissive"))
    rewarded = [index for index, reward in enumerate(rollouts["reward"]) if reward is not None]
    if unrewarded or len(rewarded) == len(rollouts):
        return rollouts
    warnings.warn(
        f"{len(rollouts) - len(rewarded)} of {len(rollouts)} saved rollouts have no reward and are left out.",
        stacklevel=2,
    )
    return rollouts.select(rewarded)


def _read_rollouts(file: Path) -> pa.Table:
    table = pq.read_table(file)
    version = int((table.schema.metadata or {}).get(_VERSION.encode(), 1))
    if version > ROLLOUTS_VERSION:
        raise ValueError(
            f"{file} was written by a later version of tbrm-trl (rollouts of version {version}, known up to "
            f"{ROLLOUTS_VERSION}). Update tbrm-trl."
        )
    table = table.replace_schema_metadata(None)
    for name in [name for name in table.column_names if name.startswith(ROW_PREFIX)]:
        own = name.removeprefix(ROW_PREFIX)
        if own in _DESCRIPTIVE or own.startswith(REWARD_PREFIX):  # a logged row is read without these
            table = table.drop_columns([own]) if own in table.column_names else table
            table = table.rename_columns([own if other == name else other for other in table.column_names])
    return table


def _with_json(table: pa.Table, as_json: Set[str]) -> pa.Table:
    """The table with these columns as JSON. Another file may have held values of one plain type there."""
    for place, field in enumerate(table.schema):
        if field.name in as_json and field.type != pa.json_():
            texts = [None if value is None else json.dumps(value) for value in table[field.name].to_pylist()]
            array = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
            table = table.set_column(place, pa.field(field.name, pa.json_()), array)
    return table
