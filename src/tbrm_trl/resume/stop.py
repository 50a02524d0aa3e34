"""SIGTERM and SIGINT as a request to stop after the current update."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_code(signum: int) -> int:
    """128 plus the number of the signal, as in shells: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


class StopRequest:
    """Remembers that this process was told to stop.

    Args:
        timeout: seconds after the signal, at which the process ends without finishing its update.

    Attributes:
        signum: the signal, 0 if there was none.
    """

    def __init__(self, timeout: float):
        self.timeout, self.signum = timeout, 0
        self._process = os.getpid()
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat the signals as requests inside the block.

        Raises:
            RuntimeError: outside the main thread, the only one that receives signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "`enable_jit_checkpoint=True` needs `train` to be called in the main thread, which alone hears of "
                "signals. Call it there, or leave the option at False."
            )
        before = {signum: signal.signal(signum, self._hear) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            if self._timer is not None:
                self._timer.cancel()

    def _hear(self, signum: int, frame: FrameType | None) -> Any:
        if os.getpid() != self._process:  # a forked child, whose parent uses signals to end it
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self.signum:
            if signum == signal.SIGINT:  # a second Ctrl-C ends the run at once
                raise KeyboardInterrupt
            return
        self.signum = signum
        _say(
            f"{signal.Signals(signum).name}: the run stops, with a checkpoint, after this update, or within "
            f"{self.timeout:g} s without one."
        )
        self._timer = threading.Timer(self.timeout, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        _say(
            f"The update did not end within {self.timeout:g} s of {signal.Signals(self.signum).name} and is dropped. "
            "The run can go on from its last complete checkpoint."
        )
        os._exit(exit_code(self.signum))


def _say(text: str) -> None:
    with suppress(OSError, RuntimeError, ValueError):  # there may be no reader any more; the run stops anyway
        print(text, file=sys.stderr, flush=True)
