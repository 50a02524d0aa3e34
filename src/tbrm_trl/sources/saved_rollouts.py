"""Rollouts that a run saves, and their way back as a data set of logged trajectories."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..files import plain_value
from ..trajectory import Trajectory
from .parquet import REWARD_PREFIX, SCHEMA, write_trajectories

ROW_PREFIX = "row/"  # followed by the name of a data set's column that is also the name of a trajectory's
ROLLOUTS_VERSION = 2  # 1: text alone, and none of the data set's columns
_VERSION = "tbrm_trl.rollouts.version"  # in the metadata of a file of rollouts
_DESCRIPTIVE = frozenset(("source", "group", "value", "baseline", "priority"))


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
        taken = name in SCHEMA or name.startswith((REWARD_PREFIX, ROW_PREFIX))
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
