"""Saves a run's rollouts and loads them as a data set of logged trajectories.

A window is one file per process, `step-<step>-process-<process>.parquet`. The main process merges every `MERGED`
windows into one file, `step-<first>-to-<last>.parquet`, every `MERGED` such files into one again, and so on. So there
are few files after any number of windows. A resumed run can split the file that reaches past its checkpoint.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..files import plain_value, read_table, write_tables
from ..trajectory import Trajectory
from .parquet import REWARD_PREFIX, SCHEMA, write_trajectories

ROW_PREFIX = "row/"  # before the name of a data set's column if a trajectory's column has the same name
ROLLOUTS_VERSION = 2  # 1: text only, without the data set's columns
_VERSION = "tbrm_trl.rollouts.version"  # in the metadata of a file of rollouts
_PARTS = b"tbrm_trl.rollouts.parts"  # in the metadata of a merged file: the files it was made from, a row group each
MERGED = 32
_NAME = re.compile(r"step-(\d+)-(?:process-\d+|to-(\d+))\.parquet")
_RECORD = re.compile(r"(?!step-)([^-]+)-(\d+)\.parquet")
_DESCRIPTIVE = frozenset(("source", "group", "value", "baseline", "priority"))


def save_rollouts(
    file: Path,
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> None:
    """Write one process's rollouts of a window, with everything they were made from.

    Args:
        file: from `rollouts_file`.
        trajectories: the rollouts.
        rows: the data set's rows, as the reward functions were given them.
        prompts: text or messages, as the reward functions were given them.
        completions: text or messages, as the reward functions were given them.
    """
    extra = {"prompt": column_of(prompts), "completion": column_of(completions)}
    for name in {name: None for row in rows for name in row if name not in extra}:
        taken = name in SCHEMA or name.startswith((REWARD_PREFIX, ROW_PREFIX))
        extra[ROW_PREFIX + name if taken else name] = column_of([row.get(name) for row in rows])
    write_trajectories(file, trajectories, extra, {_VERSION: str(ROLLOUTS_VERSION)})


def rollouts_file(folder: Path, step: int, process: int) -> Path:
    """The file in which `load_rollouts` finds one process's rollouts of a window."""
    return folder / f"step-{step:08d}-process-{process}.parquet"


def rollout_files(folder: Path) -> list[Path]:
    """The files of rollouts in a folder, in the order of their steps.

    A kill during merging or splitting leaves files next to the one that holds their rows. Those files are left out.
    """
    files = sorted(folder.glob("step-*.parquet"))
    merged = [(file, *_steps(file)) for file in files if _is_merged(file)]
    return [
        file
        for file in files
        if not any(
            other != file and first <= _steps(file)[0] and _steps(file)[1] <= last for other, first, last in merged
        )
    ]


def record_files(folder: Path) -> list[Path]:
    """The files of a folder of records (`sources.records`), in the order of their numbers."""
    return sorted(folder.glob("*.parquet"), key=lambda file: record_name(file)[::-1])


def record_name(file: Path) -> tuple[str, int]:
    """Writer and number of a record."""
    if (name := _RECORD.fullmatch(file.name)) is None:
        raise ValueError(
            f"{file} is not named as records are, <writer>-<number>.parquet with a writer without a hyphen. Move it "
            "away."
        )
    return name[1], int(name[2])


def merge_rollouts(folder: Path, before: int) -> None:
    """Merge every `MERGED` windows into one file, and every `MERGED` files with equally many windows into one.

    Args:
        folder: the folder of the rollouts.
        before: the step of the window that processes may be writing now. Only earlier windows are merged.
    """
    files = [file for file in rollout_files(folder) if _steps(file)[0] < before]
    if not files or _is_merged(files[-1]):
        return
    windows = [list(window) for _, window in groupby(filter(lambda file: not _is_merged(file), files), _steps)]
    while len(windows) >= MERGED:
        windows, made = windows[MERGED:], [file for window in windows[:MERGED] for file in window]
        _merge(made)
        size = MERGED
        while len(alike := _merged_of_size(folder, size)) >= MERGED:
            _merge(alike[:MERGED])
            size *= MERGED


def rewind_rollouts(folder: Path, step: int) -> None:
    """Restore the rollouts to what they were at this step's checkpoint: remove the windows from this step on."""
    kept = rollout_files(folder)
    for file in set(folder.glob("step-*.parquet")) - set(kept):
        file.unlink()
    for file in kept:
        first, last = _steps(file)
        if first < step <= last:
            _take_apart(file, _parts(file), step)
        if step <= last:
            file.unlink()


def _steps(file: Path) -> tuple[int, int]:
    """The steps of the first and the last window in a file."""
    if (name := _NAME.fullmatch(file.name)) is None:
        raise ValueError(f"{file} is not named as saved rollouts are. Move it away.")
    return int(name[1]), int(name[2] or name[1])


def _is_merged(file: Path) -> bool:
    return "-to-" in file.name


def _parts(file: Path) -> list[Path]:
    """The window files that a file was made from, a row group each."""
    names = (pq.read_metadata(file).metadata or {}).get(_PARTS)
    return [file.with_name(name) for name in json.loads(names)] if names else [file]


def _merged_of_size(folder: Path, windows: int) -> list[Path]:
    return [file for file in rollout_files(folder) if _is_merged(file) and len({*map(_steps, _parts(file))}) == windows]


def _merge(files: Sequence[Path]) -> None:
    """Merge these files into one, then remove them."""
    parts = [part for file in files for part in _parts(file)]
    target = files[0].with_name(f"step-{_steps(files[0])[0]:08d}-to-{_steps(files[-1])[1]:08d}.parquet")
    schemas = [pq.read_schema(file) for file in files]
    version = max(int((schema.metadata or {}).get(_VERSION.encode(), 1)) for schema in schemas)
    schemas = [schema.remove_metadata() for schema in schemas]
    as_json = _json_columns(schemas)
    empty = [_with_json(schema.empty_table(), as_json) for schema in schemas]
    unified = pa.concat_tables(empty, promote_options="permissive")
    metadata = {_VERSION: str(version), _PARTS: json.dumps([part.name for part in parts])}
    tables = (_with_json(group, as_json) for file in files for group in _row_groups(file))
    alike = (pa.concat_tables([unified, table], promote_options="permissive").combine_chunks() for table in tables)
    write_tables(target, unified.schema.with_metadata(metadata), alike)
    for file in files:
        file.unlink()


def _row_groups(file: Path) -> Iterator[pa.Table]:
    """The tables of the windows in a file. It is opened once: opening reads what is known of all of its groups."""
    with pq.ParquetFile(file) as opened:
        for group in range(len(_parts(file))):
            yield opened.read_row_group(group).replace_schema_metadata(None)


def _take_apart(file: Path, parts: Sequence[Path], step: int) -> None:
    """Split a merged file: write again the files that it was made from, for windows before a step."""
    opened, place = pq.ParquetFile(file), {part: group for group, part in enumerate(_parts(file))}
    metadata = {name: value for name, value in (opened.schema_arrow.metadata or {}).items() if name != _PARTS}
    windows = [list(window) for _, window in groupby(parts, _steps)]
    size = len(windows) // MERGED
    for first in range(0, len(windows), size):
        inner = [part for window in windows[first : first + size] for part in window]
        begins, ends = _steps(inner[0])[0], _steps(inner[-1])[1]
        tables = (opened.read_row_group(place[part]) for part in inner)
        if begins < step <= ends:
            _take_apart(file, inner, step)
        elif ends < step and size > 1:
            named = {**metadata, _PARTS: json.dumps([part.name for part in inner])}
            schema = opened.schema_arrow.with_metadata(named)
            write_tables(file.with_name(f"step-{begins:08d}-to-{ends:08d}.parquet"), schema, tables)
        elif ends < step:
            for part, table in zip(inner, tables, strict=True):
                write_tables(part, opened.schema_arrow.with_metadata(metadata), [table])


def column_of(values: Sequence[Any]) -> pa.Array:
    """A column of plain values, or of JSON where they are nested, of several types, or text that is not Unicode.

    JSON holds integers of more than 64 bits as text.
    """
    if not any(map(_is_nested, values)):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
            pass
    return _as_json(values)


def _as_json(values: Iterable[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(_readable(value), default=plain_value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _readable(value: Any) -> Any:
    """The value with text in place of integers which `datasets` cannot read from JSON: below -2^63, from 2^64 on."""
    if isinstance(value, Mapping):
        return {name: _readable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(one) for one in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(map(_is_nested, value)))


def load_rollouts(folder: str | Path | Iterable[str | Path], unrewarded: bool = False) -> Dataset:
    """Read the rollouts that runs with `save_rollouts=True` wrote, or records, as a data set of logged trajectories.

    Pass it, or a selection of its rows, as `train_dataset`. Nothing is generated again. To have other reward functions
    score the rollouts, drop the column `reward`. The functions get prompts and completions in the form that they had,
    and the columns of the data set that the prompts came from. A data set column with the name of a trajectory's column
    replaces it if it is `source`, `group`, `value`, `baseline`, `priority` or `rewards/…`. Otherwise it is named
    `row/<name>`.

    Args:
        folder: an output directory, its `rollouts` or `records` folder, or several of these. If an output directory has
            both, `rollouts` is read: it holds what was trained on.
        unrewarded: whether to keep rollouts that no reward function scored.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: for files of a later version of this library.
    """
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(one) for one in folder]
    tables = [table for one in folders for table in _tables_in(_folder_in(one))]
    as_json = _json_columns([table.schema for table in tables])
    tables = [_with_json(table, as_json) for table in tables]
    rollouts = Dataset(pa.concat_tables(tables, promote_options="permissive"))
    if "reward" not in rollouts.column_names:  # the writer gives rewards by function only
        return rollouts
    rewards = enumerate(rollouts["reward"][:])
    rewarded = [index for index, reward in rewards if reward is not None and not math.isnan(reward)]
    if unrewarded or len(rewarded) == len(rollouts):
        return rollouts
    warnings.warn(
        f"{len(rollouts) - len(rewarded)} of {len(rollouts)} saved rollouts have no reward and are left out.",
        stacklevel=2,
    )
    return rollouts.select(rewarded)


def _folder_in(folder: Path) -> Path:
    return next((folder / name for name in ("rollouts", "records") if (folder / name).is_dir()), folder)


def read_files(folder: Path, read: Callable[[list[Path]], list[Any]]) -> list[Any]:
    """Apply `read` to the files of rollouts in a folder. The result is an empty list if there are none.

    A run may merge its files while they are read. They are then read again.
    """
    while files := rollout_files(folder):
        try:
            return read(files)
        except FileNotFoundError:
            if rollout_files(folder) == files:
                raise
    return []


def _tables_in(folder: Path) -> list[pa.Table]:
    """The rollouts of each file in a folder."""
    if tables := read_files(folder, lambda files: [_as_logged(read_rollouts(file)) for file in files]):
        return tables
    if files := record_files(folder):
        return [_as_logged(read_rollouts(file)) for file in files]
    raise FileNotFoundError(f"No saved rollouts (step-*.parquet) in {folder}. Were they saved: save_rollouts=True?")


def read_rollouts(file: Path, columns: list[str] | None = None, rows: range | None = None) -> pa.Table:
    """Read the table of a file, without metadata.

    Args:
        file: of saved rollouts or of records.
        columns: the columns to read, by default all. The file must have each of them.
        rows: the rows to read, by default all.

    Raises:
        ValueError: for a file of a later version of this library, or a damaged one.
    """
    table = read_table(file, columns, rows)
    version = int((table.schema.metadata or {}).get(_VERSION.encode(), 1))
    if version > ROLLOUTS_VERSION:
        raise ValueError(
            f"{file} was written by a later version of tbrm-trl (rollouts of version {version}, known up to "
            f"{ROLLOUTS_VERSION}). Update tbrm-trl."
        )
    return table.replace_schema_metadata(None)


def _as_logged(table: pa.Table) -> pa.Table:
    """Rename `row/<name>` to `<name>` where a logged row does not need the trajectory's column of that name."""
    for name in [name for name in table.column_names if name.startswith(ROW_PREFIX)]:
        own = name.removeprefix(ROW_PREFIX)
        if own in _DESCRIPTIVE or own.startswith(REWARD_PREFIX):  # a logged row is read without these
            table = table.drop_columns([own]) if own in table.column_names else table
            table = table.rename_columns([own if other == name else other for other in table.column_names])
    return table


def _json_columns(schemas: Sequence[pa.Schema]) -> set[str]:
    """Columns that are JSON in some file, or have types in several files that cannot be unified."""
    types: dict[str, set[pa.DataType]] = {}
    for field in (field for schema in schemas for field in schema):
        types.setdefault(field.name, set()).add(field.type)
    return {name for name, some in types.items() if pa.json_() in some or not _have_one_type(some)}


def _have_one_type(types: Iterable[pa.DataType]) -> bool:
    try:
        pa.unify_schemas([pa.schema([("", one)]) for one in types], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return False
    return True


def _with_json(table: pa.Table, as_json: Set[str]) -> pa.Table:
    """Convert these columns of the table to JSON. In some files they hold values of one plain type."""
    for place, field in enumerate(table.schema):
        if field.name in as_json and field.type != pa.json_():
            table = table.set_column(place, pa.field(field.name, pa.json_()), _as_json(table[field.name].to_pylist()))
    return table
