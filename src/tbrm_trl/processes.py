"""What the processes of a run agree on."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object


@contextmanager
def failing_together() -> Iterator[None]:
    """An error that is raised inside on one process is raised on every process, when all have left the block.

    Processes must not wait for one another inside: one that has failed would be missing.
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
    """The error, or its text if its class cannot be built again from what it holds."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
