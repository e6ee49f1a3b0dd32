# SPDX-License-Identifier: GPL-2.0-or-later
"""Delays between attempts: growing, capped, jittered, and an end to them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.backoff import FIRST_DELAY, JITTER, LONGEST_DELAY, Backoff


def steady(limit: int = 5, window: float = 60) -> Backoff:
    return Backoff(limit, window, chance=lambda: 0.5)


def test_delays_grow_up_to_a_cap() -> None:
    """With the delays that the documentation names."""
    backoff = steady(limit=100, window=1)
    assert pytest.approx([0.05, 0.3, 1.8, 10.8, 30, 30]) == [backoff.fail(10.0 * n) for n in range(6)]


def test_enough_failures_within_the_window() -> None:
    """The limit counts; the last failure is the one that gives up."""
    backoff = steady(limit=3)
    assert [False, False, True] == [backoff.fail(now) is None for now in (0, 1, 2)]


def test_failures_outside_the_window_do_not_count() -> None:
    """A link that fails once in a while is never given up."""
    backoff = steady(limit=2, window=60)
    assert all(backoff.fail(60.0 * n) is not None for n in range(100))


def test_a_success_shortens_the_delay_and_does_not_undo_the_count() -> None:
    """What comes up and fails again and again is given up, too."""
    backoff = steady(limit=3)
    assert 0.05 == backoff.fail(0)
    backoff.succeed()
    assert (0.05, 1) == (backoff.fail(1), backoff.attempts)
    backoff.succeed()
    assert backoff.fail(2) is None


def test_told_to_begin_anew() -> None:
    """As if nothing had happened."""
    backoff = steady(limit=2)
    backoff.fail(0)
    assert backoff.fail(0) is None
    backoff.forget()
    assert (0.05, 1) == (backoff.fail(0), backoff.attempts)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_a_delay_is_never_negative_nor_too_long(pauses: list[float], chance: float) -> None:
    """Whatever the times, and whatever the dice say; and there is always an answer."""
    backoff, now = Backoff(5, 60, chance=lambda: chance), 0.0
    for pause in pauses:
        now += pause
        delay = backoff.fail(now)
        assert delay is None or FIRST_DELAY * (1 - JITTER) <= delay <= LONGEST_DELAY * (1 + JITTER)


@pytest.mark.parametrize("limit", [1, 5])
def test_a_year_of_failures(limit: int) -> None:
    """No number overflows."""
    backoff = Backoff(limit, 1)
    for n in range(2000):
        backoff.fail(n * 100.0)
