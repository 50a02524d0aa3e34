"""Read golds before training: find their column, and report or refuse the rows with unreadable golds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import reading
from .mathematics import read_gold
from .quantities import number
from .units import split_unit

# Names that columns of answers have, the likeliest first. The content decides; the order only breaks ties.
_NAMES = (
    "final_answer", "answer", "ground_truth", "gold", "target", "expected_answer", "reward_model", "solution", "label",
    "result", "extra_info",
)  # fmt: skip
_SAMPLE = 200  # rows read to find the column
_SHOWN = 10


@dataclass(frozen=True)
class Golds:
    """The golds of a data set: their column, the text for each row, and the rows that need a gold but have none."""

    column: str
    texts: list[str | None]
    unreadable: dict[int, Any]  # row: content of its cell
    needed: int  # rows that need one

    def __str__(self) -> str:
        readable = self.needed - len(self.unreadable)
        said = f"{readable} of {self.needed} answers in the column {self.column!r} can be read."
        if self.unreadable:
            some = list(self.unreadable.items())[:_SHOWN]
            more = len(self.unreadable) - len(some)
            said += " Rows without: " + ", ".join(f"{row} ({_short(value)})" for row, value in some)
            said += f" and {more} more." if more else "."
        return said


def read_golds(
    rows: Any, column: str | None = None, unreadable: str = "refuse", needed: Sequence[bool] | None = None
) -> Golds:
    """Read the golds of a data set.

    Args:
        rows: a data set, or a sequence of mappings.
        column: the golds' column. `reward_model.ground_truth` is a key in a column of mappings, unless a column has
            that whole name. By default the column most readable as answers, among those with a likely name.
        unreadable: what to do with rows whose answer cannot be read. "refuse" raises an error that names them.
            "leave_out" only lists them in the result's `unreadable`, for the caller to leave out.
        needed: which rows need a gold; by default all. Logged rows that bring their reward need none.

    Returns:
        The golds, each with its text for `mathematics.verdict`.

    Raises:
        ValueError: if there is no such column, no column can be read as answers, or `unreadable` is "refuse" and an
            answer cannot be read.
    """
    if unreadable not in ("refuse", "leave_out"):
        raise ValueError(f'unreadable must be "refuse" or "leave_out", not {unreadable!r}.')
    if column is None and (column := find_column(rows)) is None:
        raise ValueError(
            f"No column holds answers that can be read. Columns: {', '.join(_columns(rows))}. Name the right one."
        )
    if _place(rows, column)[0] not in _columns(rows):
        raise ValueError(f"There is no column {column!r}. Columns: {', '.join(_columns(rows))}.")
    cells = list(cells_of(rows, column))
    texts = [reading.gold_text(cell) if read_gold(cell) is not None else None for cell in cells]
    needs = [True] * len(texts) if needed is None else list(needed)
    without = {row: cells[row] for row, text in enumerate(texts) if text is None and needs[row]}
    golds = Golds(column, texts, without, sum(needs))
    if golds.unreadable and unreadable == "refuse":
        raise ValueError(f"{golds} Leave them out, or correct them.")
    return golds


def find_column(rows: Any) -> str | None:
    """The column most readable as answers, among those with a likely name; None if none is readable enough."""
    best, best_score = None, 0.0
    for column in sorted(_candidates(rows), key=_rank):
        cells = [cell for cell, _ in zip(cells_of(rows, column), range(_SAMPLE), strict=False)]
        score = sum(map(_clarity, cells)) / max(1, len(cells))
        if score > best_score + 0.05:
            best, best_score = column, score
    return best if best_score >= 0.2 else None


def cells_of(rows: Any, column: str) -> Iterable[Any]:
    """The cells of a column, or of a key within a column of mappings."""
    name, key = _place(rows, column)
    for row in rows:
        cell = row[name]
        yield cell.get(key) if key and isinstance(cell, Mapping) else cell


def _place(rows: Any, column: str) -> tuple[str, str]:
    """The column, and the key in it or "". The longest match is the column, as flattened data has dots in names."""
    columns, parts = _columns(rows), column.split(".")
    end = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in columns), 1)
    return ".".join(parts[:end]), ".".join(parts[end:])


def _columns(rows: Any) -> list[str]:
    names = getattr(rows, "column_names", None)
    return list(names) if isinstance(names, Sequence) else list(rows[0]) if len(rows) else []


def _candidates(rows: Any) -> list[str]:
    found: list[str] = []
    for name in _columns(rows):
        if _rank(name) == len(_NAMES):
            continue
        first = rows[0][name] if len(rows) else None
        if isinstance(first, Mapping):
            found += [f"{name}.{key}" for key in first if _rank(key) < len(_NAMES)]
        else:
            found.append(name)
    return found


def _rank(name: str) -> int:
    name = name.rpartition(".")[2].lower()
    return next(
        (at for at, known in enumerate(_NAMES) if known == name or known in re.split(r"[^a-z_]", name)), len(_NAMES)
    )


def _clarity(cell: Any) -> float:
    """How much a cell looks like an answer: 1 for a number, formula or choice, little for long text without a mark."""
    text, gold = reading.gold_text(cell), read_gold(cell)
    if text is None or gold is None:
        return 0.0
    raw = cell if isinstance(cell, str) else text
    marked = "\\boxed" in raw or "####" in raw
    if number(split_unit(gold)[0]) is not None:
        return 1.0
    if (
        len(text) > 150
        or "\n" in text.strip()
        or len(re.findall(r"[a-zA-Z]{3,}", re.sub(r"\\[a-zA-Z]+", "", text))) > 6
    ):
        return 0.9 if marked else 0.05
    return 1.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
