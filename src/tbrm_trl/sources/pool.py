"""Draws completions of later windows in the slots that rows of the current window leave free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class PoolRow:
    """A completion, finished or not.

    Attributes:
        window: number of its window.
        place: its index among the rows of that window on this process.
        prompt_ids: its prompt.
        completion_ids: the tokens drawn so far.
        steps: per completion token, the number of updates the policy had made when it drew the token.
    """

    window: int
    place: int
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class Decoder(Protocol):
    """The interface of `model.decoding.Slots`, which draws the tokens."""

    def has_ended(self, row: PoolRow) -> bool: ...

    def run(self, more: Callable[[int], Sequence[PoolRow]], is_done: Callable[[], bool]) -> None: ...


class RolloutPool:
    """This process's unfinished rows, and rows that finished before their window's turn.

    A window is done when its own rows are. Rows of later windows start in the sampler's order, whatever their length,
    when slots are free and fewer than `ahead` rows of later windows have been started. A row that is unfinished when
    the policy is updated keeps its tokens and continues under the new policy, which reads them again.

    Args:
        ahead: how many rows of later windows may be started, finished ones included.
        prompts_of: returns this process's prompts of a window, as token ids, given the window's number.
        windows: returns the number of windows of the run.
    """

    def __init__(self, ahead: int, prompts_of: Callable[[int], list[list[int]]], windows: Callable[[], int]):
        self.ahead, self.prompts_of, self.windows = ahead, prompts_of, windows
        self.rows: list[PoolRow] = []  # in the order they started
        self._prompts: dict[int, list[list[int]]] = {}  # by window, the current one and later ones

    def draw(self, window: int, prompts: list[list[int]], step: int, decoder: Decoder) -> list[PoolRow]:
        """Draw the completions of a window and return them in its order.

        Args:
            window: its number.
            prompts: its prompts, as token ids.
            step: number of updates the policy has made.
            decoder: draws the tokens.
        """
        self._prompts[window] = prompts
        own = [row for row in self.rows if row.window == window]
        if any(row.prompt_ids != prompts[row.place] for row in own):
            raise RuntimeError(f"The rows of window {window} are not those that the sampler named ahead of it.")
        own += [self._started(window, place) for place in range(len(own), len(prompts))]
        waiting = [row for row in self.rows if not decoder.has_ended(row)]
        waiting.sort(key=lambda row: (row.window, row.place))
        whole = False  # once true, it stays true

        def more(count: int) -> list[PoolRow]:
            while len(waiting) < count and (row := self._next(window)):
                waiting.append(row)
            taken = waiting[:count]
            del waiting[:count]
            return taken

        def is_done() -> bool:
            nonlocal whole
            whole = whole or all(map(decoder.has_ended, own))
            return whole

        decoder.run(more, is_done)
        for row in self.rows:
            row.steps += [step] * (len(row.completion_ids) - len(row.steps))
        self.rows = [row for row in self.rows if row.window > window]
        self._prompts = {number: one for number, one in self._prompts.items() if number > window}
        return own

    def _next(self, window: int) -> PoolRow | None:
        """Start the next row of the later windows and return it, or None if no row may start."""
        later = [row for row in self.rows if row.window > window]
        if len(later) >= self.ahead:
            return None
        number, place = (later[-1].window, later[-1].place + 1) if later else (window + 1, 0)
        if place == len(self._prompts_of(number)):
            number, place = number + 1, 0
        return self._started(number, place) if number < self.windows() else None

    def _prompts_of(self, window: int) -> list[list[int]]:
        if window not in self._prompts:
            self._prompts[window] = self.prompts_of(window) if window < self.windows() else []
        return self._prompts[window]

    def _started(self, window: int, place: int) -> PoolRow:
        self.rows.append(PoolRow(window, place, self._prompts_of(window)[place]))
        return self.rows[-1]

    def state(self) -> list[dict[str, Any]]:
        """Plain values, for a checkpoint."""
        return [dict(vars(row)) for row in self.rows]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state` returned."""
        self.rows, self._prompts = [PoolRow(**values) for values in state], {}
