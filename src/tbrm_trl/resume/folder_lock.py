"""A lock on an output directory: two runs in one folder would take each other's checkpoints for their own."""

import fcntl
import json
import os
import socket
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

NAME = "_run.lock"  # the underscore keeps it out of what the Trainer pushes to the hub


class FolderLock:
    """A lock that a process holds until it releases it or ends, however it ends: the operating system keeps it.

    The lock file names the holder. `release` removes the file. After a crash it stays, which does no harm.

    Args:
        folder: the output directory.
    """

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / NAME
        self._descriptor: int | None = None
        os.register_at_fork(after_in_child=self._forget)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RuntimeError: if another run holds it. The message says which.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise RuntimeError(
                    f"{self.file.parent} belongs to a run that is under way: {self._holder()}. Give this run another "
                    "output_dir, or end that one first."
                ) from error
            except OSError as error:  # a file system without locks
                os.close(descriptor)
                warnings.warn(
                    f"{self.file.parent} cannot be locked ({error}). Nothing keeps a second run out of it.",
                    stacklevel=2,
                )
                return
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its holder removed the file meanwhile
        self._descriptor = descriptor
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}).encode(), 0
        )

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is not None:
            with suppress(OSError):  # a file left behind does no harm, and an error would hide the one that led here
                if self._is_current(self._descriptor):
                    self.file.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _holder(self) -> str:
        try:
            return "process {process} on {host}, since {since}".format(**json.loads(self.file.read_text()))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet, or damaged
            return f"its process holds {self.file}"

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _forget(self) -> None:
        """Close the file in a forked child, which would otherwise keep the lock after this process ends."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
