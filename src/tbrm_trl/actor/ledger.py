"""Keeps drawn rows on disk until their window is whole, so that they outlast the actor."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import plain_value, writing

UNFINISHED = "unfinished"  # folder with a file for each window under way


class Ledger:
    """Keeps each finished row, and writes a window's file when its last row is done.

    A finished row is a line of JSON in `unfinished/<window>.jsonl`. A restarted actor continues from these lines and
    from the windows' files. A line that a kill cut short counts as never written.

    Args:
        folder: holds the unfinished windows.
        records: holds the files of whole windows.
        rows: number of rows in a window.
        windows: numbers of the windows to write, in order.
        finish: writes a window to a file, given the path, the window's number and its rows in order.
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
        """The numbers, in the run, of the rows still to draw, in order."""
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
        """Keep a finished row as JSON, and write its window's file if it was the window's last row."""
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
        """Read the whole lines of a window, and cut the file off after the last of them."""
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
            with suppress(ValueError):  # a full disk cut a line short and the next follows it: both are drawn again
                row = json.loads(line)
                rows[row.pop("row") % self.rows] = row
        return rows

    def _file(self, window: int) -> Path:
        return self.folder / f"{window:08d}.jsonl"


def window_file(records: Path, window: int) -> Path:
    """The file in which the run finds the rows of a window."""
    return records / f"window-{window:08d}.parquet"
