"""Settings that hold inside a `with` block and are undone after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporarily(target: Any, **attributes: Any) -> Iterator[None]:
    """Give `target` other values of some attributes inside the block."""
    before = {name: getattr(target, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def in_evaluation(module: Any) -> Iterator[None]:
    """Have a module in its evaluation mode inside the block, and in the mode it came in after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def replaced(target: Any, name: str, method: Any) -> Iterator[None]:
    """Give one object, and not its class, another method inside the block."""
    own = vars(target).get(name)
    setattr(target, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(target, name)
        else:
            setattr(target, name, own)
