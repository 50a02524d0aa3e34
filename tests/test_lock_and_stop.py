"""The lock on an output directory and the request to stop, without a run: forks play other processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from tbrm_trl.resume.folder_lock import NAME, FolderLock
from tbrm_trl.resume.stop import StopRequest


def status_of(work: Callable[[], None]) -> int:
    """Call a function in a fork. Returns the exit code (99 if the function ends), or minus the signal of a kill."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_one_at_a_time(tmp_path):
    """The folder need not exist. A refusal says who holds the lock. A released lock can be taken."""
    folder = tmp_path / "deep" / "out"
    first, second = FolderLock(folder), FolderLock(folder)
    begun = datetime.now(UTC).replace(microsecond=0)
    first.acquire()
    with pytest.raises(RuntimeError, match="belongs to a run that is under way") as error:
        second.acquire()
    who, _, since = str(error.value).partition(", since ")
    assert who.endswith(f"process {os.getpid()} on {socket.gethostname()}")
    since, _, advice = since.partition(". ")
    assert begun <= datetime.fromisoformat(since) <= datetime.now(UTC) and "." not in since  # to the second
    assert advice == "Give this run another output_dir, or end that one first."
    second.release()  # it does not hold the lock
    assert (folder / NAME).exists()
    first.release()
    assert not (folder / NAME).exists()
    second.acquire()
    first.release()
    assert (folder / NAME).exists()
    second.release()
    assert list(folder.iterdir()) == []


def test_what_a_crash_left_behind_does_no_harm(tmp_path):
    """A longer file of an earlier holder is written over."""
    (tmp_path / NAME).write_text("x" * 1000)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
        second.acquire()
    first.release()


def test_a_forked_child_does_not_keep_it(tmp_path):
    """The child outlives its parent. Closing the parent's descriptor plays the parent's death."""
    lock, (end, begun) = FolderLock(tmp_path), os.pipe()
    lock.acquire()
    child = os.fork()
    if not child:
        os.write(begun, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(end, 1)
    lock._forget()
    other = FolderLock(tmp_path)
    other.acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    other.release()


def test_a_file_that_its_holder_just_removed_is_no_lock(tmp_path, monkeypatch):
    """If the holder releases it between opening and locking, the lock must be on the new file."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / NAME).unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    first = FolderLock(tmp_path)
    first.acquire()
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="belongs to a run"):
        FolderLock(tmp_path).acquire()
    first.release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """It gives a warning and no error. The file stays, since another run may use the folder."""

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = FolderLock(tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*No locks.*Nothing keeps a second run out of it"):
        lock.acquire()
    lock.release()
    assert (tmp_path / NAME).exists() and len(os.listdir("/proc/self/fd")) == open_files


def test_a_folder_that_has_become_read_only_is_released(tmp_path, monkeypatch):
    """The error of the write that failed there is the one to see, not one of the lock."""
    lock = FolderLock(tmp_path)
    lock.acquire()

    def refused(path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", refused)
        lock.release()
    FolderLock(tmp_path).acquire()


def test_refusals_and_releases_leave_no_file_open(tmp_path):
    lock = FolderLock(tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    lock.acquire()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            FolderLock(tmp_path).acquire()
    lock.release()
    assert len(os.listdir("/proc/self/fd")) == open_files


# ---- the request to stop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_until_the_time_is_over(signum, monkeypatch, capsys):
    """The process goes on, and ends after the limit with code 128 plus the signal's number."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    request, name = StopRequest(timeout=0.3), signal.Signals(signum).name
    with request.listening():
        assert request.signum == 0
        begun = time.monotonic()
        os.kill(os.getpid(), signum)
        assert request.signum == signum
        while not codes and time.monotonic() < begun + 30:
            time.sleep(0.01)
    assert codes == [{signal.SIGTERM: 143, signal.SIGINT: 130}[signum]] and time.monotonic() >= begun + 0.3
    said = capsys.readouterr().err
    assert f"{name}: the run stops, with a checkpoint, after this update, or within 0.3 s without one." in said
    assert f"The update did not end within 0.3 s of {name} and is dropped. The run can go on from its last" in said


def test_a_stop_that_nobody_reads_of_is_one():
    """The reader of stderr is gone, as that of a pipe is after Ctrl-C."""

    def work() -> None:
        reads, writes = os.pipe()
        os.close(reads)
        sys.stderr = os.fdopen(writes, "w")
        with StopRequest(timeout=0.2).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert status_of(work) == 143


def test_one_that_stops_in_time_is_not_ended():
    def work() -> None:
        with StopRequest(timeout=0.2).listening():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os._exit(7)

    assert status_of(work) == 7


def test_a_forked_child_is_ended_by_a_signal():
    """A loader's worker has its parent's handlers, and its parent ends it by SIGTERM."""
    request = StopRequest(timeout=60)
    with request.listening():
        assert status_of(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert request.signum == 0
