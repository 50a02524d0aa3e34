"""Calls the user's reward functions: limits their time, warns when they are slow, and keeps their failures."""

import asyncio
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from trl.trainer.utils import is_async_callable

from ..rewards.returned import NotRewardsError, rewards_of
from ..rewards.workers import RewardError, WorkerError

logger = get_logger(__name__)

SLOW_AFTER = 60.0  # seconds in one call before a warning is logged
SHOWN = 3  # failures that are logged with their completion; later ones are only counted
REASONS = ("raised", "late")


@dataclass
class Failure:
    """A call that gave no rewards.

    Attributes:
        function: the function's name.
        reason: "raised", "late", or "wrong" for a return value that is not a list of rewards, and for a function that
            cannot run at all.
        error: what was raised.
        completions: number of completions in the call.
    """

    function: str
    reason: str
    error: Exception
    completions: int


class LateError(TimeoutError):
    """A reward function took longer than its time limit."""


@dataclass
class RewardCalls:
    """Calls reward functions so that a failure does not end one process while the others wait for it.

    If a call fails, all its completions get the same reward, and the failure is kept in `failures`. The caller agrees
    on failures with the other processes.

    Args:
        limit: seconds that one call may take, or None. A late synchronous function continues in its thread, and nothing
            waits for it. An asynchronous one is cancelled where it awaits. Only a worker process can be ended
            (`tbrm_trl.rewards.InWorkers`).
        failed: reward of each completion in a failed call; NaN is an unknown verdict.
    """

    limit: float | None = None
    failed: float = math.nan
    failures: list[Failure] = field(default_factory=list)
    _unknown: dict[str, list[bool]] = field(default_factory=dict)  # by function: whether each verdict is unknown
    _shown: int = 0

    def guarded(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function so that it returns a list of one number or None per completion even if it fails.

        A reward model is returned unchanged, since TRL runs it.
        """
        if isinstance(function, torch.nn.Module):
            return function
        if is_async_callable(function):

            @functools.wraps(function)
            async def call(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
                with self._kept(name, completions) as rewards:
                    async with asyncio.timeout(self.limit) as scope:
                        try:
                            returned = await function(*args, completions=completions, **kwargs)
                        except asyncio.CancelledError:
                            if scope.expired():
                                raise LateError from None
                            raise
                        ends = scope.when()
                        if ends is not None and asyncio.get_running_loop().time() > ends:
                            raise LateError  # it has not awaited since, so nothing could cancel it
                    rewards[:] = rewards_of(returned, len(completions), name)
                return rewards

        else:

            @functools.wraps(function)
            def call(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
                with self._kept(name, completions) as rewards:
                    run = functools.partial(function, *args, completions=completions)
                    returned = run(**kwargs) if self.limit is None else _within(self.limit, run, kwargs)
                    rewards[:] = rewards_of(returned, len(completions), name)
                return rewards

        return call

    def unknown(self, rows: int, names: Sequence[str], weights: Sequence[float]) -> list[bool]:
        """Per row of the last calls, whether a function with a weight could not judge it, and forget these calls.

        Args:
            rows: number of completions in each call.
            names: names of the F functions.
            weights: their F weights. A function without weight only watches.
        """
        verdicts, self._unknown = self._unknown, {}
        none = [False] * rows
        counting = [verdicts.get(name, none) for name, weight in zip(names, weights, strict=True) if weight]
        return [any(one[row] for one in counting) for row in range(rows)]

    def taken(self) -> list[Failure]:
        """Return the failures since the last call of this method, and forget them."""
        failures, self.failures = self.failures, []
        return failures

    @contextmanager
    def _kept(self, name: str, completions: Sequence[Any]) -> Iterator[list[float | None]]:
        rewards: list[float | None] = [self.failed] * len(completions)
        try:
            with _said_if_slow(name, len(completions)), ended_within():
                yield rewards
        except Exception as error:
            reason = "wrong" if isinstance(error, NotRewardsError | WorkerError) else "raised"
            if isinstance(error, LateError):
                reason = "late"
                error.args = (
                    f"Reward function {name!r} took longer than reward_timeout={self.limit:g} seconds for "
                    f"{len(completions)} completions.",
                )
            self.failures.append(Failure(name, reason, error, len(completions)))
            if self._shown < SHOWN:
                self._shown += 1
                shows_it = isinstance(error, RewardError | NotRewardsError)
                first = "" if shows_it else f" The first of them: {str(completions[0])[:400]!r}"
                logger.warning(
                    f"Reward function {name!r} failed on {len(completions)} completions with {type(error).__name__}: "
                    f"{str(error).rstrip('.')}.{first}",
                    main_process_only=False,
                )
        self._unknown[name] = [reward is not None and math.isnan(reward) for reward in rewards]


def _within(limit: float, run: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Call a function in its own thread, and wait for it at most `limit` seconds."""
    result: Future[Any] = Future()
    given_up = threading.Event()

    def in_time(log: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: None if given_up.is_set() else log(*args, **named)

    kwargs = {n: in_time(value) if n in ("log_extra", "log_metric") else value for n, value in kwargs.items()}

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def target() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread starts on the first device
            result.set_result(run(**kwargs))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(target,), daemon=True).start()
    if not wait([result], limit).done:
        given_up.set()
        raise LateError
    return result.result()


@contextmanager
def ended_within() -> Iterator[None]:
    """Turn an exit of the function, and a cancellation that began in it, into a RuntimeError.

    Neither is an `Exception`, so it would end this process alone, or TRL's event loop, for which all would wait.
    """
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it called sys.exit({'' if error.code is None else repr(error.code)})") from error
    except asyncio.CancelledError as error:
        with suppress(RuntimeError):  # outside of an event loop, nothing can cancel the call
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
        raise RuntimeError("a task that it waited for was cancelled") from error


@contextmanager
def _said_if_slow(name: str, completions: int) -> Iterator[None]:
    def say() -> None:
        logger.warning(
            f"Reward function {name!r} has been running for {SLOW_AFTER:g} seconds, on {completions} completions.",
            main_process_only=False,
        )

    timer = threading.Timer(SLOW_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
