"""Files that appear under their name only when they are complete, and digests of files, data sets and functions."""

import errno
import functools
import glob
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from datasets import Dataset, load_dataset
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file."""
    write_tables(path, table.schema, [table])


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a Parquet file with one row group per table. One table is in memory at a time.

    Arrow reads a row group's lists as one array, which may hold 2^31 values at most.
    """
    with appearing(path) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=max(len(table), 1))


def map_table(path: Path, columns: list[str]) -> Path:
    """Decode columns of a Parquet file into an Arrow file beside it, which is mapped into memory instead of read.

    Raises:
        ValueError: if the file is damaged, or is not a Parquet file.
    """
    target = path.with_suffix(".arrow")
    with _damage_named(path):
        stored = pq.read_schema(path)
    schema = pa.schema([stored.field(name) for name in columns])
    with appearing(target) as partial, pa.ipc.new_stream(str(partial), schema) as writer:
        for table in _row_groups(path, columns):
            writer.write_table(table)
    return target


def _row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    with _damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as stored:
        for group in range(stored.num_row_groups):
            yield stored.read_row_group(group, columns).select(columns).replace_schema_metadata(None)


def read_table(path: str | Path, columns: list[str] | None = None, rows: range | None = None) -> pa.Table:
    """Read a Parquet file, and check its pages against their checksums where it has some.

    Args:
        path: of the file.
        columns: the columns to read, by default all.
        rows: the rows to read, by default all. Only their row groups are read.

    Raises:
        ValueError: if the file is damaged, or is not a Parquet file.
        FileNotFoundError: if the file does not exist.
    """
    with _damage_named(path):
        if rows is None:
            return pq.read_table(path, columns=columns, page_checksum_verification=True)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            begins = [0, *itertools.accumulate(sizes)]
            groups = [
                g for g, (first, end) in enumerate(itertools.pairwise(begins)) if first < rows.stop and rows.start < end
            ]
            table = file.read_row_groups(groups, columns)
            return table.slice(rows.start - begins[groups[0]] if groups else 0, len(rows))


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Say which Parquet file cannot be read, and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, or is no Parquet file ({reason}). Remove it, or restore it.") from error


def write_json(path: Path, value: Any, durably: bool = False) -> None:
    """Write a JSON file, with NaN and Infinity as in the Trainer's own file. Tensors and arrays become lists."""
    with appearing(path, durably) as partial:
        partial.write_text(json.dumps(value, default=plain_value))


@contextmanager
def appearing(path: Path, durably: bool = False) -> Iterator[Path]:
    """Give the block a path to write to. The file appears as `path` when the block has ended.

    Args:
        path: final path of the file. Its folder is created if needed.
        durably: whether the file survives a power failure: what this process wrote to the file is on the disk before
            the file gets its name.

    Raises:
        OSError: if the file cannot be written. The message names the path and says what to do.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        yield partial
        if durably:
            with partial.open("rb+") as written:
                os.fsync(written.fileno())
        os.replace(partial, path)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Give the block a folder to write into. It appears as `path` when the block has ended. `path` must be new."""
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that a kill leaves no part of it under its name.

    What an earlier kill left of folders beside it is removed too.
    """
    if folder.exists():
        folder.rename(folder.with_name(f"{_REMOVED}{folder.name}"))
    for gone in folder.parent.glob(f"{_REMOVED}*"):
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a disk error into an OSError that names the path and says what to do.

    Libraries report a full disk in their own words ("iostream error"). So after an error this function tests the disk.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and str(error.strerror).startswith(_CANNOT):
            raise
        cause = error if isinstance(error, OSError) and error.errno in _DISK else _write_error(path.parent)
        if cause is None:
            raise
        raise OSError(cause.errno, f"{_CANNOT} {path}: {cause.strerror}. {_advice(path, cause)}") from error


def require_writable(folder: Path, what: str) -> None:
    """Check that a folder is writable by writing a small file and removing it. The folder is created if needed.

    Raises:
        OSError: if that fails. The message names the folder and calls it `what`.
    """
    if error := _write_error(folder):
        raise OSError(error.errno, f"{_CANNOT} {what}, {folder.absolute()}: {error.strerror}. {_advice(folder, error)}")


_CANNOT = "Cannot write to"
_REMOVED = "removed-"  # before the name of a folder that is being removed
_PROBE = 1 << 16  # bytes
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _write_error(folder: Path) -> OSError | None:
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _advice(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        return f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free there. Free space, or choose another folder."
    return "Make the folder writable, or choose another one."


def plain_value(value: Any) -> Any:
    """Convert a value that JSON cannot hold: a deque, tensor or array to its values, anything else to text."""
    if isinstance(value, deque):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)  # a user may log anything


def plain(value: Any, digits: int | None = None) -> Any:
    """Convert a value to JSON values. NaN counts as no value and becomes None; infinity becomes "inf" or "-inf".

    Args:
        value: any value. `plain_value` converts what JSON cannot represent.
        digits: significant digits of floats; all by default.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(one, digits) for name, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(one, digits) for one in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None if math.isnan(value) else str(float(value))
        return float(value) if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Enum):  # of text or numbers, such as transformers' optimizer names
        return plain(value.value, digits)
    if isinstance(value, (str, int, type(None))):
        return value
    return plain(plain_value(value), digits)


# The endings that a file of rows may have, each with the name of its format in `datasets`.
ROW_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def rows_of_file(path: str | Path) -> Dataset:
    """Load the rows of a file. Raises a one-line ValueError if the file cannot be read."""
    kind = ROW_FILES.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"{str(path)!r} is no {', '.join(list(ROW_FILES)[:-1])} or {list(ROW_FILES)[-1]} file.")
    if not Path(path).is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        if not Path(path).stat().st_size:
            raise ValueError("it is empty")
        as_written = dict(keep_default_na=False, na_values=[""]) if kind == "csv" else {}  # "None" may be an answer
        literal = glob.escape(str(path))  # `data_files` are patterns
        dataset = load_dataset(kind, data_files=literal, split="train", **as_written)
        if kind == "csv" and "__index_level_0__" in dataset.column_names:  # pandas would shift every column
            raise ValueError("its rows have more fields than its first line has names: quote text with commas")
        return _with_dates_as_text(dataset, Path(path)) if kind == "json" else dataset
    except Exception as error:  # many classes: from the file format, from datasets, from the disk
        reason = first_line(error.__cause__ or error)
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise ValueError(f"{path} cannot be read ({reason}).") from None


def _with_dates_as_text(dataset: Dataset, path: Path) -> Dataset:
    """The data set with the file's own text where pyarrow reads JSON text as a time, such as "2024-01-05"."""
    dated = [field.name for field in dataset.features.arrow_schema if _holds_times(field.type)]
    if not dated:
        return dataset
    text = path.read_text(encoding="utf-8-sig").strip()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows) or len(rows) != len(dataset):
        raise ValueError(f"it has dates in {', '.join(dated)}, which are text only in a list of objects, or one a line")
    names = dataset.column_names
    for name in dated:
        dataset = dataset.remove_columns(name).add_column(name, [row.get(name) for row in rows])
    return dataset.select_columns(names)


def _holds_times(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or any(_holds_times(kind.field(at).type) for at in range(kind.num_fields))


def rows_of_hub(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load the rows of a data set of the Hub. Raises a one-line ValueError if it cannot be loaded."""
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # many classes: from the Hub's client, from datasets, from the network
        raise ValueError(f"{name} cannot be loaded from the Hub ({first_line(error)}).") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """All lines of an error as one. Those of transformers say in the second line what to do."""
    return " ".join(str(error).split()) or type(error).__name__


_CHUNK = 1 << 20  # bytes per read: few enough to stay in a core's cache until they are digested
# Values that their repr tells apart.
_SHOWN = (bytes, complex, Decimal, Fraction, date, time, timedelta, PurePath, range, slice)
_LISTED = 1000  # largest number of array values that are listed; a longer array is represented by its digest


def sizes_and_digests(folder: Path, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield size in bytes and digest of each of these files. Files are read in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda name: _digest_of_file(folder / name), names)


def _digest_of_file(file: Path) -> tuple[int, str]:
    digest, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK)), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


def column_parts(dataset: Dataset, name: str) -> Iterator[tuple[int, pa.Array]]:
    """Yield a column in parts of a thousand rows, each with the number of its first row. Rows are not read singly."""
    arrow = dataset.select_columns([name]).with_format("arrow")
    for first in range(0, len(dataset), 1000):
        yield first, arrow[first : first + 1000][name].combine_chunks()


def is_text(column: pa.Array) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def dataset_digest(dataset: Any) -> str | None:
    """Digest of a data set's rows in their order; None for a stream, which cannot be read twice."""
    if not isinstance(dataset, Dataset):
        return None
    digest = xxhash.xxh3_64(json.dumps(dataset.column_names).encode())
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            for batch in table.combine_chunks().to_batches():
                writer.write_batch(batch.replace_schema_metadata(None))
        digest.update(sink.getvalue())
    return digest.hexdigest()


def source_of(thing: Any) -> Any:
    """Describe the behaviour of a function, class or callable object by JSON-able values that change with it.

    The description contains the source of the function or class, and what the source does not show: values of the
    closure, defaults, arguments bound by `functools.partial`, attributes of a callable object, and the globals that
    the code names. Among these, numbers, text, None, lists, sets, dictionaries, NumPy arrays and tensors are described
    by value. Functions and classes are described in the same way as the first one.

    An object with a method `source_parts` is described by its type and by what that method returns alone.

    A list that the function itself fills is described by value too. So a function that counts or caches in a list has
    a new description after each call. It should use an object of another kind for that.

    Limits: other objects are described only by their type, modules by their name, installed packages by the names of
    their functions, and a model by its name or folder. The description does not cover what a function reads from a
    file, the environment or a server.
    """
    return _describe(thing, {})


def _describe(thing: Any, seen: dict[int, Any]) -> Any:
    """Describe a value. `seen` has what was described so far, by id, each with its number. Nothing is described twice.

    No description has an address or an order of hashes in it, which differ from process to process.
    """
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if id(thing) in seen:
        return f"described as number {seen[id(thing)][0]}"
    seen[id(thing)] = len(seen), thing
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, Enum):
        return [kind, thing.name, _describe(thing.value, seen)]
    if isinstance(thing, re.Pattern):  # whose repr is cut
        return [kind, _describe(thing.pattern, seen), thing.flags]
    if isinstance(thing, _SHOWN):
        return [kind, repr(thing)]
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, functools.partial):
        return [kind, *(_describe(part, seen) for part in (thing.func, thing.args, thing.keywords))]
    if isinstance(thing, MethodType):
        return [kind, _describe(thing.__func__, seen), _describe(thing.__self__, seen)]
    if isinstance(thing, FunctionType):
        return _describe_function(thing, seen)
    if isinstance(thing, type):
        return _describe_class(thing, seen)
    if parts := getattr(type(thing), "source_parts", None):
        return [kind, *(_describe(part, seen) for part in parts(thing))]
    if name := getattr(getattr(thing, "config", None), "_name_or_path", None):
        return name
    if isinstance(thing, PreTrainedTokenizerBase):  # calls change its attributes
        return [kind, thing.name_or_path, len(thing), _describe(thing.chat_template, seen)]
    if hasattr(thing, "tolist") and hasattr(thing, "dtype"):
        is_short = math.prod(thing.shape) <= _LISTED
        return [kind, str(thing.dtype), _describe(thing.tolist(), seen) if is_short else _digest(thing)]
    content = _content(thing, seen)
    if callable(thing) and not isinstance(thing, BuiltinFunctionType):
        attributes = {name: getattr(thing, name) for name in _slots(type(thing)) if hasattr(thing, name)}
        attributes |= getattr(thing, "__dict__", {})
        return [_describe(type(thing), seen), _describe(attributes, seen), content]
    return getattr(thing, "__qualname__", kind) if content is None else [kind, *content]


def _content(thing: Any, seen: dict[int, Any]) -> list[Any] | None:
    """What a collection holds; None for anything else, and for the variables of the environment."""
    if isinstance(thing, os._Environ):
        return None
    if isinstance(thing, Mapping):
        return [[_describe(name, seen), _describe(value, seen)] for name, value in thing.items()]
    if isinstance(thing, (set, frozenset)):  # each as if it were the only one: their order is that of hashes
        return sorted(json.dumps(_describe(value, dict(seen))) for value in thing)
    if isinstance(thing, (list, tuple, deque)):
        return [_describe(value, seen) for value in thing]
    return None


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _digest(array: Any) -> list[Any]:
    shape = list(array.shape)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    array = np.ascontiguousarray(array)
    content = json.dumps(_describe(array.tolist(), {})).encode() if array.dtype.hasobject else array.tobytes()
    return [shape, xxhash.xxh3_128_hexdigest(content)]


def _describe_function(function: FunctionType, seen: dict[int, Any]) -> Any:
    names = f"{function.__module__}.{function.__qualname__}"
    if len(seen) > 1 and _is_installed(function.__code__.co_filename):
        return names
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # without empty cells
    named = _names_in(function.__code__)
    return {
        "source": _text_of(function.__code__),
        "defaults": _describe([function.__defaults__, function.__kwdefaults__], seen),
        "closure": _describe(cells, seen),
        "globals": {
            name: _describe(function.__globals__[name], seen) for name in named if name in function.__globals__
        },
        # Values that the function reads from modules by attribute, such as `settings.THRESHOLD`.
        "attributes": {
            f"{module}.{name}": _describe(vars(value)[name], seen)
            for module in named
            if isinstance(value := function.__globals__.get(module), ModuleType)
            and not _is_installed(getattr(value, "__file__", None) or "")
            for name in named
            if name in vars(value)
        },
    }


def _describe_class(one: type, seen: dict[int, Any]) -> Any:
    if one.__module__ == "builtins" or _is_installed(getattr(sys.modules.get(one.__module__), "__file__", None) or ""):
        try:
            return inspect.getsource(one) if len(seen) == 1 else f"{one.__module__}.{one.__qualname__}"
        except (TypeError, OSError):
            return f"{one.__module__}.{one.__qualname__}"
    members = {}
    for base in reversed([base for base in one.__mro__ if base.__module__ != "builtins"]):
        for name, value in vars(base).items():
            if isinstance(value, (classmethod, staticmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, functools.cached_property):
                value = value.func
            if not name.startswith("__") or isinstance(value, FunctionType):
                members[f"{base.__qualname__}.{name}"] = _describe(value, seen)
    return [f"{one.__module__}.{one.__qualname__}", members]


def _names_in(code: CodeType) -> list[str]:
    """The globals and attributes that code and the functions inside it name."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names_in(part)]
    return sorted({*code.co_names, *inner})


def _text_of(code: CodeType) -> str:
    try:
        return inspect.getsource(code)
    except (TypeError, OSError):  # typed interactively: use the bytecode, without addresses of inner functions
        return f"{code.co_code.hex()} {code.co_names} {[*map(_text_of_constant, code.co_consts)]}"


def _text_of_constant(part: Any) -> Any:
    if isinstance(part, CodeType):
        return _text_of(part)
    return sorted(map(repr, part)) if isinstance(part, frozenset) else repr(part)


@functools.cache
def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python or to an installed package, which a run does not change.

    Packages may also lie in a user's folder, or in one that the interpreter does not know as its own.
    """
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    is_own = any(file.startswith(folder + os.sep) for folder in folders if folder) or file.startswith("<frozen")
    return is_own or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
