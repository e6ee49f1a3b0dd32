# SPDX-License-Identifier: GPL-2.0-or-later
"""The limit of what others say: below journald's in any stretch of time, fair to each source, nothing uncounted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.rate_limit import BURST, BYTES, HEADROOM, IDLE_SECONDS, RATE, RateLimit

JOURNALD_SECONDS = 30.0
JOURNALD_BURST = 10_000
"""journald.conf(5), RateLimitIntervalSec= and RateLimitBurst=: its defaults, where hardly any space is free."""


def flood(
    limit: RateLimit[str], sources: list[str], start: float, seconds: float, per_second: int = 1000
) -> list[tuple[float, str]]:
    """Each source says so many lines per second, in turns; what went on, and when."""
    moments = (start + step / per_second for step in range(round(seconds * per_second)))
    return [(now, each) for now in moments for each in sources if limit.admit(each, 10, now)]


def most_in(seconds: float, moments: list[float]) -> int:
    """The greatest number of them in any stretch of time."""
    first, most = 0, 0
    for last, moment in enumerate(moments):
        while moments[first] < moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def test_a_quiet_source_is_not_limited() -> None:
    """A boot's messages at once, and a steady trickle after that."""
    limit = RateLimit[str]()
    assert all(limit.admit("a", 80, 0.0) for _ in range(round(BURST)))
    assert all(limit.admit("a", 80, 1 + second / RATE) for second in range(10_000))
    assert {} == limit.take_left_out()


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_floods_stay_below_what_journald_drops(number: int) -> None:
    """In any 30 seconds, however many sources flood at once; half of it is left where it is one VM's."""
    limit = RateLimit[str]()
    moments = [now for now, _ in flood(limit, [*map(str, range(number))], 0.0, 70.0, 400)]
    assert BURST + RATE * JOURNALD_SECONDS + number >= most_in(JOURNALD_SECONDS, moments)
    assert JOURNALD_BURST / 2 >= BURST + RATE * JOURNALD_SECONDS
    # What there is to be had is given out, too.
    assert 0.9 * (BURST + RATE * 69) <= len(moments)


def test_sources_that_come_one_after_the_other_stay_below_it_as_well() -> None:
    """Each begins with a burst: all together they have an end."""
    limit = RateLimit[str]()
    went = [flood(limit, [str(second)], float(second), 1.0, 5000) for second in range(100)]
    moments = [now for now, _ in itertools.chain(*went)]
    most = most_in(JOURNALD_SECONDS, moments)
    assert HEADROOM * (BURST + RATE * JOURNALD_SECONDS) + 1 >= most
    assert most <= 0.8 * JOURNALD_BURST


def test_a_flood_costs_others_nothing() -> None:
    """Neither one who talks all the while, nor one who comes after a minute of it."""
    limit = RateLimit[str]()
    for second in range(120):
        flood(limit, ["loud", "louder"], float(second), 1.0)
        assert all(limit.admit("quiet", 80, second + 0.999) for _ in range(10))
        if second == 60:
            assert all(limit.admit("late", 80, 60.999) for _ in range(200))
    assert {"loud", "louder"} == set(limit.take_left_out())
    # And so it is after one that has had all of the burst.
    limit = RateLimit[str]()
    flood(limit, ["loud"], 0.0, 60.0)
    assert all(limit.admit("late", 80, 60.0) for _ in range(200))


def test_shares_are_equal_and_are_given_back() -> None:
    """Two floods have half each; once one is over, the other has all of it."""
    limit = RateLimit[str]()
    flood(limit, ["a", "b"], 0.0, 60.0)
    went = [each for _, each in flood(limit, ["a", "b"], 60.0, 10.0)]
    for each in "ab":
        assert went.count(each) == pytest.approx(5 * RATE, rel=0.05)
    limit.take_left_out()
    flood(limit, ["a"], 70.0, 2 * IDLE_SECONDS + 1)
    assert len(flood(limit, ["a"], 71.0 + 2 * IDLE_SECONDS, 10.0)) == pytest.approx(10 * RATE, rel=0.05)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 500_000), st.floats(0, 40)), min_size=1, max_size=300
    )
)
def test_every_line_is_admitted_or_counted(said: list[tuple[str, int, float]]) -> None:
    """Whatever is asked in whatever order, no line is lost from the counts."""
    limit, now, admitted, counted = RateLimit[str](2.0, 5.0), 0.0, 0, 0
    for source, size, pause in said:
        now += pause
        admitted += limit.admit(source, size, now)
        if pause > 30:
            counted += sum(limit.take_left_out().values())
    assert len(said) == admitted + counted + sum(limit.take_left_out().values())
    assert {} == limit.take_left_out()


def test_long_lines_count_as_several() -> None:
    """And one that costs more than there ever is goes on after a while of quiet."""
    limit = RateLimit[str]()
    admitted = sum(limit.admit("a", 10 * BYTES, 0.0) for _ in range(1000))
    assert BURST / 11 == pytest.approx(admitted, abs=1)
    assert not limit.admit("a", 10_000_000, 1.0)
    assert limit.admit("a", 10_000_000, 1.0 + BURST / RATE)
    assert not limit.admit("a", 1, 2.0 + BURST / RATE)


def test_sources_that_are_gone_are_forgotten() -> None:
    """VMs come and go in one process: memory does not grow with them."""
    limit = RateLimit[str]()
    for number in range(1000):
        limit.admit(str(number), 80, number * 10.0)
    assert len(limit._sources) < 10
