# SPDX-License-Identifier: GPL-2.0-or-later
"""Who hangs is told in time, who works never, and a guest is not asked more often than it must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, islice
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd import stall
from qrapd.stall import LATE, LOOK_INTERVAL, TICK, Signs, StallJudge, Verdict, next_look_at

FINE, ANNOUNCE, STALLED = Verdict

TIMEOUTS = st.floats(1, 60) | st.sampled_from([1.0, 2.0, 5.0])
AMOUNTS = st.integers(0, 4).map(lambda frames: frames * 2304)
PAUSES = st.floats(0.9, 1.1)  # between two looks of a supervisor that is fit

ALIVE = Signs(unread=0, activity=0)


def any_signs(**fixed: st.SearchStrategy[object]) -> st.SearchStrategy[Signs]:
    """Signs of every kind, but for the fields that are given."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "unread": AMOUNTS,
        "stopped": st.booleans(),
        "activity": st.none() | st.integers(0, 3),
        "waiting": st.integers(0, 2),
        "unread_by_qemu": st.sampled_from([0, 0, 0, 90]),
    }
    return st.builds(Signs, **(fields | fixed))


HISTORIES = st.lists(st.tuples(st.floats(0, 10), any_signs()), max_size=30)


def after(history: Iterable[tuple[float, Signs]], judge: StallJudge, now: float = 100.0) -> float:
    """Let the judge see this; returns when it is over."""
    for pause, signs in history:
        now += pause
        judge.judge(now, signs)
    return now


def verdicts(judge: StallJudge, looks: Iterable[Signs], pause: float = 1.0) -> list[Verdict]:
    """The verdicts on looks at a steady pace."""
    return [judge.judge(number * pause, signs) for number, signs in enumerate(looks)]


def running(signs: Signs = ALIVE) -> Iterator[Signs]:
    """Looks at a process that has run between any two of them."""
    return (replace(signs, activity=number) for number in count())


def seconds_until(
    wanted: Verdict,
    judge: StallJudge,
    look: Callable[[Verdict], Signs],
    start: float = 0.0,
    limit: float = 9999,
) -> float:
    """How long it takes until ``wanted``, looking as often as the judge asks for; ``look`` is told what came before."""
    now, last = start, FINE
    while now - start < limit:
        last = judge.judge(now, look(last))
        if last is wanted:
            return now - start
        now += judge.next_look
    pytest.fail(f"no {wanted} within {limit} s")


# ---- what must never happen


@given(TIMEOUTS, st.data())
def test_a_passt_that_reads_is_never_stalled(timeout: float, data: st.DataObject) -> None:
    """However much waits for it, if some of that goes within every timeout; whether or not its process is known."""
    judge = StallJudge(timeout)
    known = data.draw(st.booleans())
    now, unread, shrunk_at = 0.0, 0, 0.0
    for number in range(60):
        pause = data.draw(PAUSES)
        now += pause
        if now + pause - shrunk_at >= timeout - stall.EARLY - 0.2:
            unread, shrunk_at = max(0, unread - 2304), now
        else:
            unread += data.draw(AMOUNTS)
        shrunk_at = now if not unread else shrunk_at
        signs = Signs(unread, activity=number if known else None, waiting=data.draw(st.integers(0, 2)))
        assert judge.judge(now, signs) is not STALLED


@given(TIMEOUTS, HISTORIES)
def test_questions_keep_their_distance(timeout: float, history: list[tuple[float, Signs]]) -> None:
    """At most one per timeout, whatever is seen."""
    judge = StallJudge(timeout)
    now, asked_at = 0.0, float("-inf")
    for pause, signs in history * 3:
        now += pause
        if judge.judge(now, signs) is ANNOUNCE:
            assert now - asked_at >= timeout
            asked_at = now


@given(HISTORIES)
def test_zero_means_never(history: list[tuple[float, Signs]]) -> None:
    """Neither a verdict nor a question."""
    judge = StallJudge(0)
    assert {FINE} >= {judge.judge(now, signs) for now, (_, signs) in enumerate(history * 3)}
    assert stall.LOOK_INTERVAL == judge.next_look


@given(TIMEOUTS, st.lists(any_signs(stopped=st.just(False), unread_by_qemu=st.integers(1, 9999))))
def test_a_passt_that_may_wait_for_qemu_is_left_alone(timeout: float, looks: list[Signs]) -> None:
    """While QEMU does not read, passt can do nothing about it."""
    assert {FINE} >= set(verdicts(StallJudge(timeout), looks * 9))


@given(TIMEOUTS, st.lists(any_signs(unread=st.integers(1, 9999))))
def test_what_waits_is_question_enough(timeout: float, looks: list[Signs]) -> None:
    """No announcement is added to what passt does not read."""
    assert ANNOUNCE not in verdicts(StallJudge(timeout), looks * 9)


@given(TIMEOUTS, HISTORIES, HISTORIES)
def test_reset_forgets_everything(
    timeout: float, before: list[tuple[float, Signs]], later: list[tuple[float, Signs]]
) -> None:
    """A judge that was reset judges as a new one."""
    used, new = StallJudge(timeout), StallJudge(timeout)
    now = after(before, used)
    used.reset()
    for pause, signs in later:
        now += pause
        assert used.judge(now, signs) is new.judge(now, signs)
        assert (used.reason, used.next_look, used.quiet) == (new.reason, new.next_look, new.quiet)


# ---- what must happen, and when


@given(TIMEOUTS, HISTORIES, any_signs(stopped=st.just(True)), st.tuples(PAUSES, PAUSES))
def test_a_stopped_process_is_stalled_in_time(
    timeout: float, before: list[tuple[float, Signs]], signs: Signs, pauses: tuple[float, float]
) -> None:
    """Whatever went before and whatever else is seen: a timeout after the first look that finds it so."""
    judge = StallJudge(timeout)
    now = found_at = after(before, judge) + 1
    verdict = judge.judge(now, signs)
    for pause in pauses * 35:
        if verdict is STALLED:
            break
        now += pause
        verdict = judge.judge(now, signs)
    assert verdict is STALLED
    assert judge.reason  # of two signs, either
    assert now - found_at <= timeout + 1.1


@given(TIMEOUTS)
def test_a_hung_process_is_found_by_what_the_guest_sends(timeout: float) -> None:
    """A timeout after the first look that finds something unread."""
    judge = StallJudge(timeout)
    judge.judge(0, ALIVE)
    hung = replace(ALIVE, unread=2304)
    assert seconds_until(STALLED, judge, lambda _: hung, start=1) <= timeout + 1
    assert "2304 bytes of buffers not read for " in judge.reason
    assert judge.reason.endswith("in which the process did not run")


@given(TIMEOUTS)
def test_a_hung_process_is_found_below_a_silent_guest(timeout: float) -> None:
    """Asked once, it does not read the question."""
    judge = StallJudge(timeout)
    verdicts_seen: list[Verdict] = []

    def look(last: Verdict) -> Signs:
        verdicts_seen.append(last)
        return replace(ALIVE, unread=2304 if ANNOUNCE in verdicts_seen else 0)

    bound = 2 * ceil(timeout) + 2 - 1  # the first look came up to 1 s after the fact
    assert seconds_until(STALLED, judge, look) <= bound
    assert 1 == verdicts_seen.count(ANNOUNCE)


@given(TIMEOUTS)
def test_a_hung_process_of_unknown_pid_is_found(timeout: float) -> None:
    """Only the stream is seen: it is asked, and then looked at closely, as it may be a busy one."""
    judge = StallJudge(timeout)
    seen: list[Verdict] = []

    def look(last: Verdict) -> Signs:
        seen.append(last)
        return Signs(unread=2304 if ANNOUNCE in seen else 0)

    bound = 2 * timeout + max(timeout, stall.SHORTEST_CLOSE_LOOK) + 4
    assert seconds_until(STALLED, judge, look) <= bound
    assert 1 == seen.count(ANNOUNCE)
    assert "not read for " in judge.reason
    assert "run" not in judge.reason


@given(TIMEOUTS)
def test_connections_that_nobody_accepts(timeout: float) -> None:
    """With no run of the process in all that time, a sure sign, with or without a question in between."""
    judge = StallJudge(timeout)
    judge.judge(0, ALIVE)

    def look(_: Verdict) -> Signs:
        return replace(ALIVE, waiting=2 if judge.quiet else 0)

    assert seconds_until(STALLED, judge, look, start=1) <= timeout + 2
    assert judge.reason.startswith("2 connections not accepted for ")


def test_connections_wait_for_a_passt_that_runs() -> None:
    """It will see to them, or be asked in its turn."""
    assert {FINE} == set(verdicts(StallJudge(5), islice(running(Signs(0, waiting=3)), 40)))


# ---- the silent guest of a passt that lives


def questions(timeout: float, looks: Iterable[Signs], number: int) -> list[int]:
    """The seconds at which a passt is asked that is looked at ``number`` times."""
    judge = StallJudge(timeout)
    seen = verdicts(judge, islice(looks, number))
    assert STALLED not in seen
    return [second for second, verdict in enumerate(seen) if verdict is ANNOUNCE]


def test_how_often_a_passt_is_asked() -> None:
    """One that runs: once per minute. Unknown: once per timeout. One that ran at the question: once per timeout."""
    assert [60, 120, 180] == questions(5, running(), 200)
    assert [5, 10, 15, 20] == questions(5, (Signs(0) for _ in count()), 21)

    def without_timer() -> Iterator[Signs]:  # no passt so far: it sleeps until there is something to do
        for second in count():
            yield replace(ALIVE, activity=second // 6)

    assert [5, 11, 17] == questions(5, without_timer(), 20)


def test_the_pulse_of_an_idle_passt_is_no_sign() -> None:
    """With a short timeout, two looks a second apart may both come between two runs."""

    def beats() -> Iterator[Signs]:
        for second in count():
            yield replace(ALIVE, activity=second // 2)

    assert [12, 24] == questions(1, beats(), 30)


def test_a_guest_that_speaks_makes_questions_needless() -> None:
    """What was seen to be read counts as an answer, also of a passt that is not known."""
    chatty = [Signs(unread=2304 * (second % 4 == 3), activity=second) for second in range(200)]
    assert [] == questions(5, chatty, 200)
    assert [] == questions(5, (replace(signs, activity=None) for signs in chatty), 200)


# ---- the busy passt


@given(TIMEOUTS)
def test_a_busy_passt_is_looked_at_closely(timeout: float) -> None:
    """Its queue looks full again and again. It is in doubt then, not condemned, and one look at less acquits it."""
    judge, activity, now = StallJudge(timeout), count(), 0.0
    while judge.next_look == stall.LOOK_INTERVAL:
        assert judge.judge(now, Signs(213760, activity=next(activity))) is FINE
        now += judge.next_look
    assert now <= timeout + 2
    for _ in range(stall.CLOSE_LOOKS - 2):
        now += judge.next_look
        assert judge.judge(now, Signs(213760, activity=next(activity))) is FINE
    assert judge.judge(now, Signs(213759, activity=next(activity))) is FINE
    assert stall.LOOK_INTERVAL == judge.next_look


@given(TIMEOUTS)
def test_a_loop_gone_wild_is_found(timeout: float) -> None:
    """It runs and runs and reads nothing."""
    judge, activity = StallJudge(timeout), count()
    bound = timeout + max(timeout, stall.SHORTEST_CLOSE_LOOK) + 2
    assert seconds_until(STALLED, judge, lambda _: Signs(213760, activity=next(activity))) <= bound
    assert judge.reason.endswith("though the process runs")


def test_a_caller_in_no_hurry_condemns_later_not_wrongly() -> None:
    """One that looks every second, whatever the judge asks for."""
    looks = islice(running(Signs(213760)), 120)
    assert 5 + stall.CLOSE_LOOKS - 1 == verdicts(StallJudge(5), looks).index(STALLED)


# ---- the supervisor's own troubles


def test_a_supervisor_that_did_not_run_blames_nobody() -> None:
    """Whoever sleeps for an hour finds the same signs as before, and has seen nothing of what was between."""
    for signs in (
        Signs(2304, activity=1),
        Signs(0, stopped=True, activity=1),
        Signs(0, activity=1, waiting=1),
    ):
        judge = StallJudge(1)
        assert [FINE] * 50 == [judge.judge(hour * 3600, signs) for hour in range(50)]


def test_a_stop_that_does_not_last_is_none() -> None:
    """A process that a debugger traces is stopped at every look, and yet runs."""
    traced = Signs(0, stopped=True)
    judge = StallJudge(5)
    looks = islice(running(traced), 50)
    assert {FINE} == set(verdicts(judge, looks))


def test_a_child_that_proc_hides() -> None:
    """Its activity is not known, but that it is stopped is: by waitid()."""
    assert [FINE] * 5 + [STALLED] == verdicts(StallJudge(5), [Signs(0, stopped=True)] * 6)


# ---- when to look

CLOCKS = st.floats(0, 1e7)


@given(CLOCKS, st.floats(0, 1e5), st.floats(0, LOOK_INTERVAL, exclude_max=True))
def test_a_doubt_is_followed_up_exactly(begun: float, later: float, wait: float) -> None:
    """And not rounded to anything."""
    now = begun + later
    assert now + wait == next_look_at(now, wait, begun)


@given(CLOCKS, st.floats(0, 1e5))
def test_without_a_doubt_looks_fall_on_a_tick(begun: float, later: float) -> None:
    """About a second later, so that no look is so late that it would not be counted."""
    now = begun + later
    at = next_look_at(now, LOOK_INTERVAL, begun)
    assert at / TICK == pytest.approx(round(at / TICK), abs=1e-4)
    assert LOOK_INTERVAL / 2 - 1e-6 <= at - now <= 1.5 * LOOK_INTERVAL + 1e-6 < LATE


@given(CLOCKS, st.lists(st.floats(0, 0.49), min_size=1, max_size=50))
def test_a_vm_keeps_its_tick(begun: float, delays: list[float]) -> None:
    """Once per second, however late the loop is each time: those of many VMs do not end up on one."""
    looks = [next_look_at(begun, LOOK_INTERVAL, begun)]
    for delay in delays:
        looks.append(next_look_at(looks[-1] + delay, LOOK_INTERVAL, begun))
    assert looks == pytest.approx([looks[0] + n * LOOK_INTERVAL for n in range(len(looks))], abs=1e-4)
    assert looks[0] - begun == pytest.approx(LOOK_INTERVAL, abs=TICK / 2 + 1e-6)


def test_many_vms_share_ten_moments_in_a_second() -> None:
    """Whenever each of them was begun, and twenty of two hundred the same."""
    looks = Counter(round(10 * next_look_at(1000.0, 1.0, 7 + vm * 0.7)) % 10 for vm in range(200))
    assert dict.fromkeys(range(10), 20) == looks
