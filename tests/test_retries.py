# SPDX-License-Identifier: GPL-2.0-or-later
"""When the next passt of a link is tried: at once after a kill, later after a crash, never after too many."""

from __future__ import annotations

import pytest

from qrapd.backoff import FACTOR, FIRST_DELAY, Backoff
from qrapd.retries import PATIENCE_WITH_STRANGERS, Retries


def make(limit: int = 5) -> Retries:
    return Retries(Backoff(limit, 60.0, chance=lambda: 0.5))


def test_one_that_is_killed_is_replaced_at_once() -> None:
    """However often, and however soon."""
    retries = make()
    for _ in range(100):
        assert not retries.note_end(lasted=False, crashed=False, ours=True)
        retries.note_up()


def test_a_crash_after_some_time_is_bad_luck() -> None:
    """Only one that ends as soon as it serves would go on like that."""
    retries = make()
    assert not retries.note_end(lasted=True, crashed=True, ours=True)
    assert retries.note_end(lasted=False, crashed=True, ours=True)


def test_a_crash_loop_is_given_up() -> None:
    """Although each of them has come up: that is a success for the delays, and none for the count."""
    retries = make(limit=3)
    for expected in (FIRST_DELAY, FIRST_DELAY, None):
        assert retries.note_end(lasted=False, crashed=True, ours=True)
        assert expected == retries.fail(0.0)
        retries.note_up()


def test_one_that_has_lasted_ends_the_loop() -> None:
    """What failed before counts no more."""
    retries = make(limit=2)
    retries.note_end(lasted=False, crashed=True, ours=True)
    retries.fail(0.0)
    retries.note_end(lasted=True, crashed=False, ours=True)
    assert (0, FIRST_DELAY) == (retries.attempts, retries.fail(0.0))
    retries.note_up()
    assert FIRST_DELAY == retries.fail(0.0)


def test_a_strangers_passt_that_hangs_up_again_and_again() -> None:
    """How it ended is not known; that it did so often is enough, until one lasts."""
    retries = make()

    def hang_up(*, lasted: bool = False) -> bool:
        return retries.note_end(lasted=lasted, crashed=False, ours=False)

    patience = [False] * (PATIENCE_WITH_STRANGERS - 1)
    assert [*patience, True, True] == [hang_up() for _ in range(PATIENCE_WITH_STRANGERS + 1)]
    assert not hang_up(lasted=True)
    assert [*patience, True] == [hang_up() for _ in range(PATIENCE_WITH_STRANGERS)]


def test_somebody_wants_another_attempt() -> None:
    """The count and the delays begin anew; and other limits hold from now on."""
    retries = make(limit=2)
    retries.fail(0.0)
    retries.begin_anew()
    assert FIRST_DELAY == retries.fail(0.0)
    retries.limit(3, 60.0)
    assert pytest.approx(FIRST_DELAY * FACTOR) == retries.fail(0.0)
    assert retries.fail(0.0) is None
