# SPDX-License-Identifier: GPL-2.0-or-later
"""The lifecycle table: total, convergent, and the same as the one that the documentation shows."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.lifecycle import (
    DEADLINES,
    TABLE,
    Action,
    Event,
    Reason,
    State,
    Verdict,
    advance,
    describe_table,
    judge_exit,
)

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "lifecycle.md"

events = st.lists(st.sampled_from(Event), max_size=40)


def walk(sequence: list[Event], state: State = State.NEW) -> tuple[State, list[Action]]:
    """Where a sequence of events leads, and all that is done on the way."""
    done: list[Action] = []
    for event in sequence:
        state, actions = advance(state, event)
        done += actions
    return state, done


@pytest.mark.parametrize("state", State)
def test_every_state_answers_every_event(state: State) -> None:
    """advance() is total; an event without a cell changes nothing and does nothing."""
    for event in Event:
        answer = advance(state, event)
        assert TABLE[state].get(event, (state, ())) == answer
        assert isinstance(answer[0], State)


def test_all_states_can_be_reached() -> None:
    """No row of the table is dead: some sequence of events leads to each state."""
    reached = [State.NEW]
    for state in reached:
        reached += {target for target, _ in TABLE[state].values()} - set(reached)
    assert set(State) == set(reached)


def test_only_the_end_has_no_way_out() -> None:
    """Every state but ENDED can be left."""
    stuck = {state for state, row in TABLE.items() if all(target is state for target, _ in row.values())}
    assert {State.ENDED} == stuck


def test_no_step_stays_where_it_is() -> None:
    """A cell leads to another state: a deadline, which counts from entering a state, is never set anew."""
    assert [] == [(state, event) for state, row in TABLE.items() for event in row if row[event][0] is state]


@given(events, events)
def test_nothing_is_done_after_the_end(before: list[Event], after: list[Event]) -> None:
    """ENDED is final."""
    state, _ = walk(before)
    if state is State.ENDED:
        assert (State.ENDED, []) == walk(after, state)


@given(events)
def test_qemu_is_spawned_once_at_most_and_never_after_a_stop(sequence: list[Event]) -> None:
    """Two QEMUs would destroy a disk; and a stop means that none is started any more."""
    assert walk(sequence)[1].count(Action.SPAWN_QEMU) <= 1
    stops = [i for i, event in enumerate(sequence) if event in {Event.STOP, Event.HURRY}]
    if stops:
        state, _ = walk(sequence[: stops[0] + 1])
        assert Action.SPAWN_QEMU not in walk(sequence[stops[0] + 1 :], state)[1]


@given(events)
def test_links_are_released_once_if_they_were_started(sequence: list[Event]) -> None:
    """Whoever started or adopted links lets go of them exactly once before the end, and nobody else does."""
    state, done = walk(sequence)
    started = done.count(Action.START_LINKS) + done.count(Action.ADOPT)
    let_go = done.count(Action.RELEASE_LINKS) + done.count(Action.STAND_BACK)
    assert started <= 1
    assert let_go <= started
    if state in {State.UNLINKING, State.ENDED}:
        assert started == let_go
    else:
        assert 0 == let_go


@given(events)
def test_the_end_is_announced_once(sequence: list[Event]) -> None:
    """FINISH is the last action of every life, and comes once; but for a VM that another qrapd is to take over."""
    state, done = walk(sequence)
    assert int(state is State.ENDED) == done.count(Action.FINISH) + done.count(Action.STAND_BACK)
    if state is State.ENDED:
        assert done[-1] in {Action.FINISH, Action.STAND_BACK}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("spawned", [Event.QEMU_SPAWNED, Event.SPAWN_FAILED])
def test_every_state_can_be_brought_to_the_end(state: State, spawned: Event) -> None:
    """A stop and impatience lead to the end from anywhere, whether or not a spawn under way succeeds."""
    closing = [Event.STOP, spawned, *[Event.HURRY] * 5, Event.QEMU_EXITED, Event.LINKS_DOWN]
    assert State.ENDED is walk(closing, state)[0]


@pytest.mark.parametrize("state", [State.CONNECTING, State.READY])
def test_a_qemu_that_does_nothing_is_killed_by_deadlines_alone(state: State) -> None:
    """One stop is enough: deadlines escalate to SIGKILL without another event."""
    assert State.KILLING is walk([Event.STOP, *[Event.DEADLINE] * 3], state)[0]


def test_deadlines_are_answered() -> None:
    """A state has a deadline if and only if its row says what happens then."""
    assert {state for state, row in TABLE.items() if Event.DEADLINE in row} == set(DEADLINES)


@pytest.mark.parametrize("state", [state for state in State if Event.QEMU_EXITED in TABLE[state]])
def test_qemus_end_releases_the_links_in_every_state_with_a_qemu(state: State) -> None:
    """Once QEMU is gone there is nothing left to do but to see the passts off."""
    assert (State.UNLINKING, (Action.RELEASE_LINKS,)) == advance(state, Event.QEMU_EXITED)


@pytest.mark.parametrize(
    ("exit_code", "signal", "cause", "expected"),
    [
        (0, None, "guest-shutdown", Verdict(Reason.GUEST_SHUTDOWN, failure=False)),
        (0, None, "guest-reset", Verdict(Reason.GUEST_SHUTDOWN, failure=False)),  # -no-reboot
        (0, None, None, Verdict(Reason.GUEST_SHUTDOWN, failure=False)),
        (0, None, "host-qmp-quit", Verdict(Reason.REQUEST, failure=False)),
        (0, None, "host-ui", Verdict(Reason.REQUEST, failure=False)),
        (0, None, "host-signal", Verdict(Reason.KILLED, failure=True)),
        (0, None, "host-error", Verdict(Reason.FAILED, failure=True)),
        (0, None, "guest-panic", Verdict(Reason.GUEST_PANIC, failure=True)),
        (1, None, "guest-panic", Verdict(Reason.GUEST_PANIC, failure=True)),
        (1, None, None, Verdict(Reason.FAILED, failure=True)),
        (1, None, "host-qmp-quit", Verdict(Reason.FAILED, failure=True)),
        (None, 9, None, Verdict(Reason.KILLED, failure=True)),
        (None, 11, "guest-shutdown", Verdict(Reason.KILLED, failure=True)),
    ],
)
def test_the_end_of_a_qemu_that_nobody_stopped(
    exit_code: int | None, signal: int | None, cause: str | None, expected: Verdict
) -> None:
    """The reason is what came from outside first: a signal, a panic, QEMU's own failure, then the guest."""
    assert expected == judge_exit(
        exit_code=exit_code, signal=signal, stop_requested=False, shutdown_cause=cause
    )


@pytest.mark.parametrize(
    ("end", "cause"),
    list(itertools.product([(0, None), (1, None), (None, 9)], [None, "guest-shutdown", "host-signal"])),
)
def test_a_requested_end_is_no_failure(end: tuple[int | None, int | None], cause: str | None) -> None:
    """Whatever it took to end a VM that was to end, it has."""
    verdict = judge_exit(exit_code=end[0], signal=end[1], stop_requested=True, shutdown_cause=cause)
    assert Verdict(Reason.REQUEST, failure=False) == verdict


def test_the_documentation_shows_this_table() -> None:
    """docs/lifecycle.md holds what `python -m qrapd.lifecycle` prints; between the markers, paste it anew."""
    _, shown, _ = DOCUMENT.read_text("utf-8").split("<!-- table -->")
    assert describe_table() == shown.strip()


def test_the_documentation_names_every_state() -> None:
    """Each state has its line in docs/lifecycle.md, above the table."""
    words = DOCUMENT.read_text("utf-8").partition("<!-- table -->")[0]
    assert [] == [state.value for state in State if f"\n- **{state.value}**: " not in words]


def test_the_module_prints_its_table() -> None:
    """`python -m qrapd.lifecycle` prints the table and nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "qrapd.lifecycle"], capture_output=True, text=True, timeout=30, check=True
    )
    assert (describe_table() + "\n", "") == (done.stdout, done.stderr)
