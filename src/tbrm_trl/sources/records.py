"""Reads rollouts that other programs draw: files in a folder, taken in order as they appear.

A record is a Parquet file `<writer>-<number>.parquet` with any number of rows. A writer numbers its files from 0
without gaps. A file appears under its name when it is complete. The reader knows each writer's next file. Of those that
are there, it takes the lowest number first. So no file of a slow writer is lost, and none when the reader is resumed.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..trajectory import Source, Trajectory
from .parquet import REWARD_PREFIX, SCHEMA, from_row
from .returns import unique_names
from .saved_rollouts import ROW_PREFIX, read_rollouts, record_files, record_name

_POLL, _SAY = 0.1, 60.0  # seconds between two looks at the folder, and between two progress lines while waiting
# Trajectory columns that are read from a record. The learner fills the other columns of SCHEMA itself.
_READ = (
    "prompt_ids", "completion_ids", "loss_mask", "reward", "end", "policy_step", "first_policy_step", "policy_version",
    "first_policy_version",
)  # fmt: skip

# Prefixes of columns that are only logged: metrics, and entries of the table of completions.
METRIC_PREFIX, EXTRA_PREFIX = "metrics/", "extra/"

ColumnsOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """The rows of one file from `first` up to but not including `last`."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class Record:
    """One rollout.

    Attributes:
        trajectory: the rollout, without a group.
        row: the values of its row, by column.
        name: its name in error messages.
    """

    trajectory: Trajectory
    row: dict[str, Any]
    name: str

    @property
    def columns(self) -> dict[str, Any]:
        """The row's data set columns, prompt included, without the trajectory's columns and the logged ones."""
        known = {*SCHEMA, "completion"}
        return {
            name.removeprefix(ROW_PREFIX): value
            for name, value in self.row.items()
            if name not in known and not name.startswith((REWARD_PREFIX, METRIC_PREFIX, EXTRA_PREFIX))
        }

    def logged(self, prefix: str) -> dict[str, Any]:
        """The logged values with this column prefix, by name without the prefix."""
        given = {name.removeprefix(ROW_PREFIX): value for name, value in self.row.items()}
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Taken:
    """The rows of a window.

    Attributes:
        parts: the parts of files that hold them, in order.
        functions: the reward functions that the writers name, in column order.
        rows: number of further rows that were waiting in the folder.
        seconds: how long the reader waited for them.
        versions: number of policies that drew them.
    """

    parts: list[Part]
    functions: list[str]
    rows: int
    seconds: float
    versions: int

    def share(self, first: int, last: int) -> list[Part]:
        """The parts that hold the window's rows from `first` up to but not including `last`."""
        shares, place = [], 0
        for part in self.parts:
            begin, end = max(first - place, 0), min(last - place, part.last - part.first)
            if begin < end:
                shares.append(Part(part.file, part.first + begin, part.first + end))
            place += part.last - part.first
        return shares


@dataclass(frozen=True, order=True)
class _File:
    """A file that may be taken, and how many of its rows (`taken`) have been."""

    number: int
    writer: str
    name: str
    rows: int
    taken: int = 0


class RecordFolder:
    """The rollouts in a folder, in the order they are trained on.

    Args:
        folder: where they appear.
        columns_of: returns the columns of a row's trajectory, as `sources.logged.trajectory_columns` does. It raises
            ValueError for a row that cannot be trained on.
        functions: names of the learner's reward functions; empty if R is the column `reward`.
        group_size: number of adjacent rollouts of one prompt.
        needs_steps: whether each row must have a `policy_step`, which a replay buffer needs.
        timeout: seconds to wait for a window before giving up.
        watch: called while waiting. It may raise if it knows that nothing will come.
        last_words: returns what is known about the writer, for errors.
        say: prints a line to the terminal.
    """

    def __init__(
        self,
        folder: Path,
        columns_of: ColumnsOf,
        functions: Sequence[str] = (),
        group_size: int = 1,
        needs_steps: bool = False,
        timeout: float = math.inf,
        watch: Callable[[], None] = lambda: None,
        last_words: Callable[[], str] = str,
        say: Callable[[str], None] = print,
    ):
        self.folder, self.columns_of, self.functions = folder, columns_of, list(functions)
        self.group_size, self.needs_steps, self.timeout = group_size, needs_steps, timeout
        self.watch, self.last_words, self.say = watch, last_words, say
        self._rows: dict[str, int] = {}  # rows per file, for files that are not taken yet
        self.restore({})

    # ---- the cursor

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"next": dict(self._next), "open": self._open, "functions": self._functions}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned. An empty state begins with the first file."""
        self._next: dict[str, int] = dict(state.get("next", {}))  # by writer, the number of the next file to read
        self._open: list[Any] | None = state.get("open")  # writer of a partly taken file, and its rows taken
        # The functions that the first file named. If a resumed run has other functions, its files name others, too.
        self._functions: list[str] | None = None if self.functions else state.get("functions")
        self._passed: set[str] = set()  # names of files before the next ones, which no look at the folder reads again

    def untaken(self) -> list[Path]:
        """The files from which no row has been taken."""
        begun = self._open[0] if self._open is not None else None
        cursor = {writer: number + (writer == begun) for writer, number in self._next.items()}
        named = ((file, *record_name(file)) for file in record_files(self.folder))
        return [file for file, writer, number in named if number >= cursor.get(writer, 0)]

    # ---- waiting

    def take(self, rows: int) -> tuple[Taken, list[Record]]:
        """Wait for the next rows, and return where they are and the rows. The cursor moves only if all are valid.

        Raises:
            TimeoutError: if they do not appear in time. The message says what is missing.
            ValueError: for a file or a row that cannot be trained on. The message names it.
        """
        began = said = time.monotonic()
        while True:
            files = self._waiting()
            waited = time.monotonic() - began
            found = sum(file.rows - file.taken for file in files)
            if found >= rows:
                break
            self.watch()
            if waited > self.timeout:
                raise TimeoutError(
                    f"Waited {waited:.0f} s for rollouts (`follow_timeout`): {self._missing(found, rows)} Does the "
                    "writer still run, and does it write there? Start it again, or raise follow_timeout; the run goes "
                    f"on from its last checkpoint.{self.last_words()}"
                )
            if time.monotonic() - said > _SAY:
                said = time.monotonic()
                missing = self._missing(found, rows)
                self.say(f"Waiting for rollouts since {waited:.0f} s: {missing}{self.last_words()}")
            time.sleep(_POLL)

        following, opened, parts, left = dict(self._next), None, [], rows
        for file in files:
            if not left:
                break
            end = min(file.rows, file.taken + left)
            parts.append(Part(file.name, file.taken, end))
            left -= end - file.taken
            opened = [file.writer, end] if end < file.rows else None
            following[file.writer] = file.number + (opened is None)
        records = self.read(parts)
        self._check_groups(records)
        self._next, self._open = following, opened
        for part in parts:
            del self._rows[part.file]
        drawn = {pair for record in records for pair in _versions_of(record.trajectory)}
        return Taken(parts, self._functions or [], found - rows, waited, len(drawn)), records

    def _waiting(self) -> list[_File]:
        """The files that may be taken, in order. A partly taken file comes first; none may be taken before it."""
        there: dict[str, dict[int, str]] = {}
        for name in sorted(set(os.listdir(self.folder)) - self._passed) if self.folder.is_dir() else ():
            if not name.endswith(".parquet"):
                continue
            writer, number = record_name(self.folder / name)
            if number < self._next.get(writer, 0):
                self._passed.add(name)
            elif (other := there.setdefault(writer, {}).setdefault(number, name)) != name:
                raise ValueError(
                    f"{self.folder} has two files {number} of the writer {writer!r}, {other} and {name}. Rename or "
                    "remove one of them."
                )
        files = []
        for writer, names in there.items():
            for number in takewhile(names.__contains__, count(self._next.get(writer, 0))):
                files.append(_File(number, writer, names[number], self._rows_of(names[number])))
        files.sort()
        if self._open is None:
            return files
        writer, taken = self._open
        begun = [one for one in files if (one.writer, one.number) == (writer, self._next[writer])]
        return [replace(one, taken=taken) for one in begun] + [one for one in files if begun and one not in begun]

    def _rows_of(self, name: str) -> int:
        if name not in self._rows:
            try:
                self._rows[name] = pq.read_metadata(self.folder / name).num_rows
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.folder / name} is no whole Parquet file ({str(error).splitlines()[0]}). A record must be "
                    "written under another name and renamed when it is whole. Write it again, or remove it."
                ) from error
        return self._rows[name]

    def _missing(self, found: int, rows: int) -> str:
        text = f"{found} of the {rows} rows of the next window are in {self.folder.absolute()}."
        there = list(map(record_name, record_files(self.folder)))
        for writer, last in {writer: number for writer, number in there}.items():
            number = self._next.get(writer, 0)
            if last > number and (writer, number) not in there:
                text += f" File {number} of the writer {writer!r} is missing, and its file {last} is there."
        return text

    # ---- reading

    def read(self, parts: Sequence[Part]) -> list[Record]:
        """Read the rows of these parts.

        Raises:
            ValueError: for a file or a row that cannot be trained on. The message names it.
        """
        return [record for part in parts for record in self._read(part)]

    def _read(self, part: Part) -> list[Record]:
        file = self.folder / part.file
        table = read_rollouts(file, rows=range(part.first, part.last))
        try:
            table = _with_types(table)
            self._check_rewards(table)
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
        records = []
        in_json = [field.name for field in table.schema if field.type == pa.json_()]
        for place, row in enumerate(table.to_pylist(), start=part.first):
            row |= {name: json.loads(row[name]) for name in in_json if row[name] is not None}
            name = f"Row {place} of {file}"
            try:
                records.append(Record(self._trajectory(row), row, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return records

    def _trajectory(self, row: Mapping[str, Any]) -> Trajectory:
        for name in ("prompt_ids", "completion_ids"):
            if row[name] is None:
                raise ValueError(f"it has no `{name}`. A rollout is made of the ids that were drawn.")
        for name in ("prompt_ids", "completion_ids", "loss_mask"):
            if None in (row.get(name) or ()):
                raise ValueError(f"`{name}` holds None.")
        for name, reward in row.items():
            if name.startswith(REWARD_PREFIX) and reward is not None and math.isinf(reward):
                raise ValueError(f"`{name}` is {reward}. It must be finite, or None where the function does not apply.")
        given = {name: row.get(name) for name in _READ}
        if given["reward"] is not None and math.isnan(given["reward"]):
            given["reward"] = None
        columns = {**given, **self.columns_of(given), "source": Source.ROLLOUT.value, "group": 0}
        columns |= {
            name: math.nan if row[name] is None else row[name] for name in row if name.startswith(REWARD_PREFIX)
        }
        last, first = columns["policy_step"], columns["first_policy_step"]
        if first is None:
            first = columns["first_policy_step"] = last
        if first is not None and (last is None or not 0 <= first <= last):
            raise ValueError(
                f"`first_policy_step` is {first} and `policy_step` {last}. They count the updates that the policy had "
                "made at the first token and at the last."
            )
        if last is None and self.needs_steps:
            raise ValueError(
                "it has no `policy_step`, from which `replay_buffer_size` counts an age. Write how many updates the "
                "policy had made, or set replay_buffer_size=0."
            )
        if columns["first_policy_version"] is None:
            columns["first_policy_version"] = columns["policy_version"]
        return from_row(columns)

    def rewards_of(
        self, trajectories: Sequence[Trajectory], given: Sequence[str]
    ) -> tuple[list[str], list[list[float]]]:
        """The terms whose weighted sum is R: names, and each trajectory's numbers, NaN where it has none.

        If the writers give rewards by function and the learner has these functions, R is computed from them. Otherwise
        R is the column `reward`, which comes first, and the writers' rewards by function follow it for logging.

        Args:
            trajectories: as they were read.
            given: names of the writers' functions.
        """
        if given and self.functions:
            return self.functions, [[one.rewards[name] for name in self.functions] for one in trajectories]
        rows = [
            [one.reward, *(math.nan if math.isnan(one.reward) else one.rewards[name] for name in given)]
            for one in trajectories
        ]
        return unique_names(["reward", *given]), rows

    def _check_rewards(self, table: pa.Table) -> None:
        names = [name.removeprefix(REWARD_PREFIX) for name in table.column_names if name.startswith(REWARD_PREFIX)]
        if not names and "reward" not in table.column_names:
            raise ValueError("it has neither a column `reward` nor columns `rewards/<function>`. Reward the rollouts.")
        if names and self.functions and set(names) != set(self.functions):
            raise ValueError(
                f"its rewards are those of {', '.join(names)}, and the reward functions of this run are "
                f"{', '.join(self.functions)}. Pass the functions that the writer has; or none, and R is its `reward`."
            )
        if names and not self.functions and "reward" not in table.column_names:
            raise ValueError(
                "it has rewards by function and no column `reward`, and this run has no reward functions whose weights "
                "would make R of them. Add the column, or pass the functions."
            )
        if self._functions is None:
            self._functions = names
        if set(names) != set(self._functions):
            before = ", ".join(self._functions) or "no function"
            raise ValueError(
                f"its rewards are those of {', '.join(names) or 'no function'}, and those of the files before it of "
                f"{before}. All files must have the same columns `rewards/<function>`."
            )

    def _check_groups(self, records: Sequence[Record]) -> None:
        for place, record in enumerate(records):
            first = records[place - place % self.group_size]
            if not record.trajectory.prompt_ids.equal(first.trajectory.prompt_ids):
                raise ValueError(
                    f"{record.name} has another prompt than {first.name}, with which it is compared. The "
                    f"{self.group_size} rollouts of a prompt (num_generations) must follow one another."
                )


def _versions_of(trajectory: Trajectory) -> list[tuple[int | None, str | None]]:
    return [
        (trajectory.first_policy_step, trajectory.first_policy_version),
        (trajectory.policy_step, trajectory.policy_version),
    ]


def _with_types(table: pa.Table) -> pa.Table:
    """Cast the columns that are read to the types that this library writes. Other programs may write others."""
    if twice := [name for name, times in Counter(table.column_names).items() if times > 1]:
        raise ValueError(f"it has the column `{twice[0]}` twice.")
    for name in ("prompt_ids", "completion_ids"):
        if name not in table.column_names:
            raise ValueError(f"it has no column `{name}`. A rollout is made of the ids that were drawn.")
    for place, name in enumerate(table.column_names):
        is_number = name.startswith((REWARD_PREFIX, METRIC_PREFIX))
        wanted = pa.float64() if is_number else SCHEMA.get(name) if name in _READ else None
        if wanted is None or table.schema.field(name).type == wanted:
            continue
        try:
            table = table.set_column(place, pa.field(name, wanted), table[name].cast(wanted))
        except pa.ArrowException as error:
            raise ValueError(
                f"its column `{name}` holds {table.schema.field(name).type}, and must hold {wanted} "
                f"({str(error).splitlines()[0]})."
            ) from error
    return table
