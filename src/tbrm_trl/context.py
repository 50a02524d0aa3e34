"""Settings that hold inside a `with` block and are undone after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporarily(target: Any, **attributes: Any) -> Iterator[None]:
    """Give `target` other values of some attributes inside the block: its own, not those of its class."""
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
    """Have a module in its evaluation mode inside the block, and in the mode it came in after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
