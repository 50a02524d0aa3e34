"""Errors that all processes of a run raise together."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise an error that one process raised inside the block on every process, once all have left the block.

    Processes must not wait for one another inside the block: a process that has failed would never arrive.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    everywhere = gather_object([failure and _sendable(failure)])
    if first := failure or next((error for error in everywhere if error is not None), None):
        raise first


def _sendable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
