"""How far rollouts may run ahead of the policy that is trained on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Which rollouts may start under which policy.

    Rows are counted from 0 over the whole run. With B rows a window, row k belongs to window w = ⌊k/B⌋. Window w is
    trained on for the first time in the S updates from number w·U on, where U counts the window's later updates too.
    Rows are shuffled within their window, so the last of the S updates decides. The policy has made v updates when it
    is at step v. The staleness of row k, started at step v, is at most

        w·U + S − 1 − v

    updates, and row k may start if that is at most `max_staleness`. With max_staleness M, the rows that may start at
    step v are those of the windows up to ⌊(v + M − S + 1)/U⌋.

    Args:
        rows_per_window: B.
        fresh_updates: S.
        updates_per_window: U ≥ S.
        max_staleness: M.

    Raises:
        ValueError: if M < S − 1. No row of the first window could then ever start.
    """

    rows_per_window: int
    fresh_updates: int
    updates_per_window: int
    max_staleness: int

    def __post_init__(self) -> None:
        if self.max_staleness < self.fresh_updates - 1:
            raise ValueError(
                f"`max_staleness={self.max_staleness}` is refused: the last of the {self.fresh_updates} updates of a "
                f"window (steps_per_generation) comes {self.fresh_updates - 1} updates after its first, so no rollout "
                f"could ever start. Set it to {self.fresh_updates - 1} or more."
            )

    def staleness(self, row: int, step: int) -> int:
        """The most updates the policy makes between starting this row at this step and first training on it."""
        return row // self.rows_per_window * self.updates_per_window + self.fresh_updates - 1 - step

    def may_start(self, row: int, step: int) -> bool:
        """Whether this row may start under the policy of this step."""
        return self.staleness(row, step) <= self.max_staleness

    def last_row(self, step: int) -> int:
        """The last row that may start under the policy of this step."""
        windows = (step + self.max_staleness - self.fresh_updates + 1) // self.updates_per_window + 1
        return windows * self.rows_per_window - 1
