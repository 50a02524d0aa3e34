"""Context managers: settings that hold inside a `with` block, and errors that name what was loaded in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def temporarily(target: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes on `target` itself, not on its class, inside the block, and restore them after it."""
    own = {name: vars(target)[name] for name in attributes if name in vars(target)}
    try:
        for name, value in attributes.items():
            setattr(target, name, value)
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(target, name, own[name])
            else:
                delattr(target, name)


@contextmanager
def in_evaluation(module: Any) -> Iterator[None]:
    """Put a module into evaluation mode inside the block, and restore its mode after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def loading(what: str, name: str | None) -> Iterator[None]:
    """Name what could not be loaded inside the block. Errors of the Hub do not always say it.

    Raises:
        OSError: for any OSError in the block.
    """
    try:
        yield
    except OSError as error:
        absent = "" if Path(str(name)).exists() else ", no folder here,"
        raise OSError(f"{what} {name!r}{absent} cannot be loaded: {error}") from error
