"""Rollouts that others draw: files in a folder, taken in order as they come.

A record is a Parquet file `<writer>-<number>.parquet`, of any number of rows. A writer numbers its files from 0 on and
leaves none out. Each appears under its name when it is whole. Of every writer the next file is known; the one of the
lowest number that is there is taken first. So a slow writer loses nothing, and neither does a reader that is resumed.
"""

import json
import math
import time
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

_POLL, _SAY = 0.1, 60.0  # seconds between two looks at the folder, and between two lines of a reader that waits
# What a record says of a trajectory. Other columns of SCHEMA are the learner's own to fill.
_READ = (
    "prompt_ids", "completion_ids", "loss_mask", "reward", "end", "policy_step", "first_policy_step", "policy_version",
    "first_policy_version",
)  # fmt: skip

# Columns of what is logged of a rollout: numbers, and what the table of completions shows.
METRIC_PREFIX, EXTRA_PREFIX = "metrics/", "extra/"

ColumnsOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """Rows of one file: from `first` on, up to the one before `last`."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class Record:
    """One rollout.

    Attributes:
        trajectory: the rollout, without a group.
        row: what its row said, by column.
        name: what an error calls it.
    """

    trajectory: Trajectory
    row: dict[str, Any]
    name: str

    @property
    def columns(self) -> dict[str, Any]:
        """What the row says beside the trajectory: columns of a data set, the prompt among them."""
        known = {*SCHEMA, "completion"}
        return {
            name.removeprefix(ROW_PREFIX): value
            for name, value in self.row.items()
            if name not in known and not name.startswith((REWARD_PREFIX, METRIC_PREFIX, EXTRA_PREFIX))
        }

    def logged(self, prefix: str) -> dict[str, Any]:
        """What is logged of it, by name."""
        given = {name.removeprefix(ROW_PREFIX): value for name, value in self.row.items()}
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Taken:
    """The rows of a window.

    Attributes:
        parts: where they stand, in order.
        functions: the reward functions that the writers name, in the order of the columns.
        rows: how many there are of them in the folder beyond these.
        seconds: how long they were waited for.
        versions: how many policies drew them.
    """

    parts: list[Part]
    functions: list[str]
    rows: int
    seconds: float
    versions: int

    def share(self, first: int, last: int) -> list[Part]:
        """The parts that hold these rows of the window."""
        shares, place = [], 0
        for part in self.parts:
            begin, end = max(first - place, 0), min(last - place, part.last - part.first)
            if begin < end:
                shares.append(Part(part.file, part.first + begin, part.first + end))
            place += part.last - part.first
        return shares


@dataclass(frozen=True, order=True)
class _File:
    """A file that may be taken. `taken` of its rows are."""

    number: int
    writer: str
    name: str
    rows: int
    taken: int = 0


class RecordFolder:
    """The rollouts in a folder, in the order in which they are trained on.

    Args:
        folder: where they appear.
        columns_of: gives the columns of a row's trajectory, as `sources.logged.trajectory_columns`. It raises
            ValueError for a row that cannot be trained on.
        functions: names of the learner's reward functions; none if R is what the column `reward` says.
        group_size: rollouts of one prompt that follow one another.
        needs_steps: whether each row must say when its policy was made, as a replay buffer needs it.
        timeout: seconds after which waiting for a window is given up.
        watch: called while it waits; it may raise, when it knows that nothing will come.
        last_words: what is known of the writer, for errors.
        say: takes a line for the terminal.
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
        self._rows: dict[str, int] = {}  # by file, of those that are not taken
        self.restore({})

    # ---- the cursor

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"next": dict(self._next), "open": self._open, "functions": self._functions}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; from nothing, begin with the first file."""
        self._next: dict[str, int] = dict(state.get("next", {}))  # by writer, number of the file that is read next
        self._open: list[Any] | None = state.get("open")  # writer of the file that is taken in part, and how many rows
        # What the first file named. In a resumed run the learner's functions may be others, and then the files' are.
        self._functions: list[str] | None = None if self.functions else state.get("functions")

    def untaken(self) -> list[Path]:
        """The files of which no row is taken."""
        begun = self._open[0] if self._open is not None else None
        cursor = {writer: number + (writer == begun) for writer, number in self._next.items()}
        named = ((file, *record_name(file)) for file in record_files(self.folder))
        return [file for file, writer, number in named if number >= cursor.get(writer, 0)]

    # ---- waiting

    def take(self, rows: int) -> tuple[Taken, list[Record]]:
        """The next rows, once they are there, and where they stand. Only then does the cursor move.

        Raises:
            TimeoutError: if they are not there in time; it says what is missing.
            ValueError: for a file or a row that cannot be trained on, by its name.
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
        """The files that may be taken, in order. Others wait for one that is taken in part."""
        there: dict[str, dict[int, str]] = {}
        for file in record_files(self.folder):
            writer, number = record_name(file)
            there.setdefault(writer, {})[number] = file.name
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
        """The rows of these parts.

        Raises:
            ValueError: for a file or a row that cannot be trained on, by its name.
        """
        return [record for part in parts for record in self._read(part)]

    def _read(self, part: Part) -> list[Record]:
        file = self.folder / part.file
        table = read_rollouts(file)
        try:
            table = _with_types(table)
            self._check_rewards(table)
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
        records = []
        in_json = [field.name for field in table.schema if field.type == pa.json_()]
        for place, row in enumerate(table.slice(part.first, part.last - part.first).to_pylist(), start=part.first):
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
            columns["first_policy_step"] = last
        elif last is None or not 0 <= first <= last:
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
        """What R is the weighted sum of: names, and numbers for each trajectory, NaN where there is none.

        If the writers give rewards by function, and the learner has these functions, R is made of them anew. Else it is
        the column `reward`, which comes first. What it was made of stands beside it, to be logged.

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
    """The table with the columns that are read in the types that they are written in here. Writers have others."""
    for name in ("prompt_ids", "completion_ids"):
        if name not in table.column_names:
            raise ValueError(f"it has no column `{name}`. A rollout is made of the ids that were drawn.")
    for place, name in enumerate(table.column_names):
        wanted = pa.float64() if name.startswith(REWARD_PREFIX) else SCHEMA.get(name) if name in _READ else None
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
