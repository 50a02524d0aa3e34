"""Which rows of which windows are drawn, on disk: what was generated outlasts the actor."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import plain_value, writing

UNFINISHED = "unfinished"  # folder, of a file for each window that is under way


class Ledger:
    """Rows as they are done. A window's file is written when its last row is.

    A row that is done is a line of JSON in `unfinished/<window>.jsonl`. An actor that is started again goes on from
    these lines and from the windows' files. A line that a kill has cut short counts as never written.

    Args:
        folder: of the unfinished windows.
        records: of the files of whole windows.
        rows: in a window.
        windows: numbers of those that are to be written, in order.
        finish: writes the file of a window, given its number and its rows in order.
    """

    def __init__(
        self,
        folder: Path,
        records: Path,
        rows: int,
        windows: range,
        finish: Callable[[Path, int, list[dict[str, Any]]], None],
    ):
        self.folder, self.records, self.rows, self.windows, self.finish = folder, records, rows, windows, finish
        self._lock = threading.Lock()
        self._done: dict[int, dict[int, dict[str, Any]]] = {}  # by window, by place

    def pending(self) -> Iterator[int]:
        """The rows that are to be drawn, by their number in the run, in order."""
        for window in self.windows:
            if window_file(self.records, window).is_file():
                self._file(window).unlink(missing_ok=True)
                continue
            done = self._read(window)
            with self._lock:
                self._done[window] = done
            if len(done) == self.rows:  # the kill came between the last row and the window's file
                self._finish(window)
            yield from (window * self.rows + place for place in range(self.rows) if place not in done)

    def add(self, row: int, said: dict[str, Any]) -> None:
        """Keep a row that is done, as JSON holds it, and write its window if it was the last one."""
        window, place = divmod(row, self.rows)
        content = json.dumps(said, default=plain_value)
        line = f'{{"row": {row}, {content[1:]}\n'
        with self._lock:
            with writing(self._file(window)):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._file(window).open("a") as file:
                    file.write(line)
            done = self._done[window]
            done[place] = json.loads(content)
            whole = len(done) == self.rows
        if whole:
            self._finish(window)

    def _finish(self, window: int) -> None:
        with self._lock:
            done = self._done.pop(window)
        self.finish(window_file(self.records, window), window, [done[place] for place in range(self.rows)])
        self._file(window).unlink(missing_ok=True)

    def _read(self, window: int) -> dict[int, dict[str, Any]]:
        """The whole lines of a window; what follows the last of them is cut off."""
        file = self._file(window)
        if not file.is_file():
            return {}
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with file.open("rb+") as opened:
                opened.truncate(len(whole))
        rows = {}
        for line in whole.splitlines():
            with suppress(ValueError):  # two lines in one, since a full disk cut the first short: both are drawn again
                row = json.loads(line)
                rows[row.pop("row") % self.rows] = row
        return rows

    def _file(self, window: int) -> Path:
        return self.folder / f"{window:08d}.jsonl"


def window_file(records: Path, window: int) -> Path:
    """Where a learner finds the rows of a window."""
    return records / f"window-{window:08d}.parquet"
