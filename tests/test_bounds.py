"""How far rollouts may run ahead, compared with a run that is simulated update by update."""

from __future__ import annotations

import itertools

import pytest

from tbrm_trl.sources.bounds import Bounds


def last_use(row: int, rows: int, fresh: int, updates: int) -> int:
    """The latest update that may be the first to take a row, found by a loop over updates."""
    uses = [
        number
        for number in range(40)
        if number // updates == row // rows and number % updates < fresh  # a fresh update of its window
    ]
    return uses[-1]


@pytest.mark.parametrize(("rows", "fresh", "updates"), [(1, 1, 1), (4, 1, 1), (3, 2, 2), (4, 1, 3), (2, 2, 4)])
def test_no_row_starts_that_could_be_older_than_allowed(rows, fresh, updates):
    for allowed in range(fresh - 1, 7):
        bounds = Bounds(rows, fresh, updates, allowed)
        for row, step in itertools.product(range(5 * rows), range(12)):
            age = last_use(row, rows, fresh, updates) - step
            assert bounds.staleness(row, step) == age
            assert bounds.may_start(row, step) is (age <= allowed) is (row <= bounds.last_row(step))


def test_on_policy_and_one_window_ahead_by_hand():
    """Windows of 8 rows, two updates each. With M = 1 only the current window may start; M = 3 allows the next one."""
    assert [Bounds(8, 2, 2, 1).last_row(step) for step in (0, 1, 2, 3, 4)] == [7, 7, 15, 15, 23]
    assert [Bounds(8, 2, 2, 3).last_row(step) for step in (0, 1, 2)] == [15, 15, 23]
    assert Bounds(8, 2, 2, 3).staleness(15, 0) == 3


def test_a_bound_under_which_nothing_could_start_is_refused():
    with pytest.raises(ValueError, match="Set it to 2 or more"):
        Bounds(8, 3, 3, 1)
