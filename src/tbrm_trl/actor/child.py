"""The actor as a child process of the run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState

from ..processes import failing_together
from .ledger import UNFINISHED
from .plan import FOLDER, Plan

logger = get_logger(__name__)

LOG = "log.txt"  # in the actor's folder
STATUS = "status.json"  # beside it
RESTARTS = 3  # how often an actor that has died is started again
SHOWN = 15  # how many of the log's last lines an error shows
READ_AT_MOST = 65536  # bytes at the log's end: a week's log may be longer than the memory
PARENT = "TBRM_TRL_ACTOR_PARENT"  # environment variable: the id of the process with which the actor ends
# Environment variables by which a launcher tells a process that it belongs to a launch.
_OF_THE_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
                  "ROLE_RANK", "ROLE_WORLD_SIZE", "FSDP_VERSION")  # fmt: skip
_PREFIXES_OF_THE_LAUNCH = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_",
                           "MV2_COMM_WORLD_", "MPI_LOCAL")  # fmt: skip


class ActorProcess(TrainerCallback):
    """Starts, watches and ends `python -m tbrm_trl.actor OUTPUT_DIR` from the run's main process.

    The actor is a separate process without a GPU. It ends when this process ends, even if this process is killed.

    Args:
        output_dir: the run's output directory.
        records: folder of the windows.
        plan: returns the actor's plan, given the run's number of updates and how many of them it has made.
        starts: whether to start the actor too. If not, the plan is still written, for an actor started by hand.
    """

    def __init__(self, output_dir: Path, records: Path, plan: Callable[[int, int], Plan], starts: bool):
        self.output_dir, self.records, self.plan, self.starts = output_dir, records, plan, starts
        self.log = output_dir / FOLDER / LOG
        self.unfinished_folder = output_dir / FOLDER / UNFINISHED
        self.restarts = 0
        self._left = False  # whether it was seen to have ended without an error
        self._said_before = 0  # bytes of the log that are of earlier actors
        self._waited = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        with failing_together():
            if state.is_world_process_zero:
                self._write_plan(state)
                if self.starts:
                    (self.log.parent / STATUS).unlink(missing_ok=True)  # of an earlier actor
                    self.start()
                else:
                    self.waited()  # an actor started by hand may have waited before this run went on

    def _write_plan(self, state: TrainerState) -> None:
        try:
            self.plan(state.max_steps, state.global_step).write(self.output_dir)
        except TypeError as error:
            if self.starts:
                raise
            logger.warning(f"No plan for an actor is written: {error}")  # the run may not need an actor

    def require_own_folder(self, anew: bool) -> None:
        """Refuse to start a run in a folder that holds another run's windows.

        Args:
            anew: whether the user allowed the run to start over if it ended before its first checkpoint.

        Raises:
            ValueError: if the folder holds windows, `anew` is false and this run starts an actor.
        """
        if self.starts and not anew and any(self.records.glob("*.parquet")):
            raise ValueError(
                f"{self.records} holds rollouts of another run, and no checkpoint to go on from is beside it. "
                '`resume_from_checkpoint="auto"` starts that run anew and drops them. To keep them, name the folder by '
                "follow_rollouts, or `load_rollouts` it as a data set; or give the new run another output_dir."
            )

    @property
    def unfinished(self) -> list[Path]:
        """The files of windows of which some rows are drawn."""
        return [*self.unfinished_folder.glob("*.jsonl")]

    def drop(self, windows: Iterable[Path]) -> None:
        """Remove the rollouts drawn ahead: the files of these windows, and every unfinished window."""
        for file in [*windows, *self.unfinished]:
            file.unlink(missing_ok=True)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        taken = {name: value for name, value in os.environ.items() if not _is_of_the_launch(name)}
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._left = False
        with self.log.open("ab") as log:
            self._said_before = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tbrm_trl.actor", str(self.output_dir)],
                env={**taken, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # With its own session, the actor gets no interrupt from the terminal: only the run handles it, and may
                # write a checkpoint first. Processes that tools and environments start are in the actor's group and end
                # with it.
                start_new_session=True,
            )

    def check(self) -> None:
        """Start the actor again if it has ended while rollouts are missing.

        Raises:
            RuntimeError: if it has already been started again `RESTARTS` times. The error shows its last lines.
        """
        if self._process is None or not self._has_ended():
            return
        if not self._process.returncode and not self._left:
            self._left = True  # the missing rollouts may be there by the next look
            return
        died = (
            f"The actor has ended (exit code {self._process.returncode}). Its last lines, of {self.log}:\n"
            f"{self.tail() or 'none'}"
        )
        if self.restarts == RESTARTS:
            raise RuntimeError(f"{died}\nIt was started again {RESTARTS} times before.")
        self.restarts += 1
        logger.warning(f"{died}\nIt is started again ({self.restarts} of {RESTARTS}).")
        self.start()

    def waited(self) -> float | None:
        """Seconds the actor has waited for the policy since the last call; None if it has written no status."""
        try:
            total = json.loads((self.log.parent / STATUS).read_text())["waited"]
        except FileNotFoundError:
            return None
        since, self._waited = total - self._waited, total
        return since if since >= 0 else total  # a restarted actor counts from 0

    def end(self) -> None:
        if self._process is not None:
            if not self._has_ended():
                self._end_group()  # nothing is lost: the rows it has drawn are on disk
            self._process.wait()
            self._process = None

    def _has_ended(self) -> bool:
        """Whether the actor has ended. The processes that it has left behind are ended when this is first seen."""
        assert self._process is not None
        if self._process.returncode is None and self._process.poll() is not None:
            self._end_group()  # at once: later, its number may be another process's
        return self._process.returncode is not None

    def _end_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The last line of the actor's log as a sentence, for the error of a process that waits for the actor."""
        said = self.tail().splitlines() if self.starts and self.log.is_file() else []
        return f" The actor said last, in {self.log}: {said[-1]}" if said else ""

    def tail(self) -> str:
        """The last lines that the latest actor has written to its log."""
        with self.log.open("rb") as log:
            log.seek(max(self._said_before, log.seek(0, os.SEEK_END) - READ_AT_MOST))
            said = log.read().decode(errors="replace")
        return "\n".join(said.splitlines()[-SHOWN:])


def _is_of_the_launch(name: str) -> bool:
    return name in _OF_THE_LAUNCH or name.startswith(_PREFIXES_OF_THE_LAUNCH)
