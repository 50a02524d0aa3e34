"""Files that appear under their name only when they are whole, and digests by which they are found again."""

import inspect
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Dataset


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, with NaN and Infinity as the Trainer's own file has them. Tensors and arrays become lists."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, default=_plain))
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, deque):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)  # a user may log anything


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


def source_of(thing: Any) -> str | None:
    """The source text of a function or class. A model, or a function without source, gives its name."""
    try:
        return inspect.getsource(thing)
    except (TypeError, OSError):
        return getattr(getattr(thing, "config", thing), "_name_or_path", None) or getattr(thing, "__name__", None)
