"""Draw many rows at once, within the bounds: from the plan to the windows' files."""

import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json
from ..model import publisher
from ..model.publisher import Version, read_latest
from ..sources.parquet import from_row, to_row
from ..sources.saved_rollouts import save_rollouts
from .child import STATUS
from .drawer import Finished, RowDrawer
from .ledger import UNFINISHED, Ledger
from .plan import FOLDER, Plan
from .server import Places, Server, ServerError

LOG_PROBS = "sampler_log_probs"  # column of the windows' files
PER_REQUEST = 4  # rows under way per request at the server: the other rows are in tools and rewards
LOOK_EVERY = 0.05  # seconds


class LatestPolicy:
    """Returns the version that the run published last, and reads the file again only when it has changed."""

    def __init__(self, folder: Path, patience: float):
        self.folder, self.patience = folder, patience
        self._read: tuple[tuple[int, int], Version] | None = None

    def __call__(self) -> Version:
        """The latest version. Raises `ServerError` if none is published within `patience` seconds."""
        file, began = self.folder / publisher.LATEST, time.monotonic()
        while True:
            try:
                status = file.stat()
                changed = status.st_mtime_ns, status.st_ino  # with a coarse clock, two files can have the same time
                if self._read is None or self._read[0] != changed:
                    self._read = (changed, read_latest(self.folder))
                return self._read[1]
            except FileNotFoundError:
                if time.monotonic() - began > self.patience:
                    raise ServerError(f"No policy was published in {self.folder}. Is the run under way?") from None
                time.sleep(LOOK_EVERY)


class Actor:
    """Draws the rows of a run in the sampler's order, as early as the bounds allow.

    Args:
        output_dir: the run's output directory.
        url: the server's address; None takes the plan's.
        concurrency: how many requests are at the server at once.
        say: prints a line.
    """

    def __init__(self, output_dir: Path, url: str | None, concurrency: int, say: Callable[[str], None] = print):
        self.folder, self.say, self.concurrency = output_dir / FOLDER, say, concurrency
        self.plan = Plan.read(output_dir)
        url = url or self.plan.server
        if url is None:
            raise ValueError("No server is named: give --server, or the run's option async_server.")
        policy = output_dir / publisher.FOLDER
        self.latest = LatestPolicy(policy, self.plan.patience)
        server = Server(url, policy, self.latest, self.plan.patience, self.plan.base, say)
        self._drawer = RowDrawer(self.plan, server, Places(concurrency), str(self.folder / "trainer"))
        self._ledger = Ledger(
            self.folder / UNFINISHED, self.plan.records, self.plan.per_window, self.plan.windows, self._write
        )
        self._pending = self._ledger.pending()
        self._taking, self._saying = threading.Lock(), threading.Lock()
        self._window: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._drawn, self._waited, self._began = 0, 0.0, time.monotonic()

    def run(self) -> None:
        """Draw until the run's last window is written.

        Raises:
            Exception: the first error that ended a worker.
        """
        count = min(PER_REQUEST * self.concurrency, len(self.plan.windows) * self.plan.per_window)
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and not self._ended.wait(1.0):
            self._write_status()
        self._write_status()
        if self._error is not None:
            raise self._error
        self.say(f"All {len(self.plan.windows)} windows are written.")

    def _work(self) -> None:
        try:
            drawer = self._drawer.for_one_thread()
            while (taken := self._next()) is not None:
                number, row = taken
                self._ledger.add(number, _by_name(drawer.draw(number, row)))
                self._drawn += 1
        except BaseException as error:
            self._error = self._error or error
            self._ended.set()

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        """The next row's number and columns, once it may start; None at the end.

        A row that may not start yet holds up the rows after it, which may not start either.
        """
        with self._taking:
            number = next(self._pending, None)
            if number is None or self._ended.is_set():
                return None
            began = time.monotonic()
            while not self.plan.bounds.may_start(number, self.latest().step):
                time.sleep(LOOK_EVERY)
            self._waited += time.monotonic() - began
            window, place = divmod(number, self.plan.per_window)
            if self._window[0] != window:
                self._window = (window, self.plan.rows(window))
            return number, self._window[1][place]

    def _write(self, file: Path, window: int, done: list[dict[str, Any]]) -> None:
        self._write_status()  # the run must not see the window before the status
        logged = [said.get("logged", {}) for said in done]
        columns = dict.fromkeys(name for one in logged for name in one)
        rows = [
            {**row, **columns, **one, LOG_PROBS: said["log_probs"]}
            for row, one, said in zip(self.plan.rows(window), logged, done, strict=True)
        ]
        trajectories = [from_row(said["trajectory"]) for said in done]
        save_rollouts(
            file, trajectories, rows, [said["prompt"] for said in done], [said["completion"] for said in done]
        )

    def _write_status(self) -> None:
        """Write the numbers about the actor from which the run logs metrics."""
        with self._saying:
            status = {"drawn": self._drawn, "waited": self._waited, "running": time.monotonic() - self._began}
            write_json(self.folder / STATUS, status)


def _by_name(finished: Finished) -> dict[str, Any]:
    """The fields of a finished row that the ledger keeps."""
    return {
        "trajectory": to_row(finished.trajectory),
        "log_probs": finished.log_probs,
        "prompt": finished.prompt,
        "completion": finished.completion,
        "logged": finished.logged,
    }


def describe(error: BaseException, draws: bool) -> str:
    """An error in one line, after its traceback unless the message itself says what to change.

    Args:
        error: the error that ended the actor.
        draws: whether it had begun to draw. From then on an error may come from the user's functions.
    """
    if isinstance(error, ServerError) or (not draws and isinstance(error, (OSError, ValueError, TypeError))):
        return f"The actor stops: {error}"
    return "".join(traceback.format_exception(error)) + f"The actor stops: {type(error).__name__}: {error}"
