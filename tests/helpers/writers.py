"""Writers of rollouts that do not use this library: they write the format of `docs/asynchronous.md` with pyarrow.

python writers.py FOLDER ROWS.json SIZES SEED SECONDS    # a process that writes rows in files of uneven sizes
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_record(
    folder: Path, writer: str, number: int, rows: list[dict[str, Any]], metadata: dict | None = None
) -> Path:
    """Write one record. Its file appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{writer}-{number:06d}.parquet"
    partial = file.with_suffix(f".writing-{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), partial)
    os.replace(partial, file)
    return file


def made_rows(count: int, seed: int = 0, group_size: int = 1, vocabulary: int = 90) -> list[dict[str, Any]]:
    """Rows that hold their number: the completion of row k begins with k as two digits to the base 60."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        if number % group_size == 0:
            prompt = [2, *(rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 6)))]
        tail = [rng.randrange(3, vocabulary) for _ in range(rng.randint(0, 5))]
        rows.append(
            {
                "prompt_ids": prompt,
                "completion_ids": [3 + number // 60, 3 + number % 60, *tail, 1],
                "reward": round(rng.uniform(-1, 1), 3),
                "policy_step": 0,
            }
        )
    return rows


def number_of(completion_ids: Any) -> int:
    """The k of a row of `made_rows`."""
    first, second = map(int, completion_ids[:2])
    return (first - 3) * 60 + second - 3


def write_slowly(
    folder: Path, rows: list[dict], largest: int, seed: int, seconds: float = 0.0, whole: bool = False
) -> None:
    """Write rows in files of 1 to `largest`. A writer that is started again goes on after its last file.

    With `whole` it holds back rows that do not fill their file, since there will be more.
    """
    rng, number, done = random.Random(seed), 0, 0
    while done < len(rows):
        size = rng.randint(1, largest)
        if whole and done + size > len(rows):
            return
        if not (folder / f"other-{number:06d}.parquet").exists():
            write_record(folder, "other", number, rows[done : done + size])
            time.sleep(seconds)
        number, done = number + 1, done + size


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    write_slowly(Path(sys.argv[1]), given, int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), whole=True)
