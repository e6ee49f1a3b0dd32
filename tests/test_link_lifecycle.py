# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of a link's life: total, convergent, and the same as the one that the documentation shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.link_lifecycle import TABLE, Action, Event, State, advance, describe_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "lifecycle.md"

events = st.lists(st.sampled_from(Event), max_size=60)

# What follows from an action sooner or later, each of them possible.
OUTCOMES = {
    Action.ACQUIRE: (Event.ACQUIRED, Event.ACQUIRE_FAILED),
    Action.REAP: (Event.REAPED, Event.CRASHED),
    Action.SWAP: (Event.SWAPPED, Event.SWAP_FAILED),
    Action.PLAN_RETRY: (Event.DELAY_OVER, Event.GAVE_UP),
    Action.LET_GO: (Event.RELEASED,),
}


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
        assert TABLE[state].get(event, (state, ())) == advance(state, event)


def test_all_states_can_be_reached() -> None:
    """No row of the table is dead: some sequence of events leads to each state."""
    reached = [State.NEW]
    for state in reached:
        reached += {target for target, _ in TABLE[state].values()} - set(reached)
    assert set(State) == set(reached)


@given(events, events)
def test_nothing_is_done_after_the_end(before: list[Event], after: list[Event]) -> None:
    """Once it is released a link starts nothing more, and ENDED is final."""
    state, _ = walk([*before, Event.RELEASE])
    assert state in {State.ENDING, State.ENDED}
    assert [] == walk(after, state)[1]
    assert State.ENDED is walk([*after, Event.RELEASED], state)[0]


@given(events)
def test_a_release_lets_go_once(sequence: list[Event]) -> None:
    """From whatever state it comes in, however often."""
    assert 1 == walk([*sequence, Event.RELEASE, Event.RELEASE])[1].count(Action.LET_GO)


@given(st.data())
def test_what_is_done_is_answered_where_it_is_waited_for(data: st.DataObject) -> None:
    """A life in which each action's outcome comes, and losses, wishes and news come in between: no outcome is
    dropped, so none is waited for in vain, and there is never a second thing under way."""
    state, pending = State.STARTING, Action.ACQUIRE
    disturbances = (Event.LOST, Event.RENEW, Event.VM_READY)
    for _ in range(40):
        working = pending in OUTCOMES
        choices = [*(OUTCOMES[pending] if working else ()), *disturbances]
        event = data.draw(st.sampled_from(choices))
        before, (state, actions) = state, advance(state, event)
        if working and event in OUTCOMES[pending]:
            assert (before, event) != (state, event) or state is State.DOWN
            assert event in TABLE[before], f"{event} is lost in {before}"
            pending = Action.TELL_CONNECTED  # nothing under way
        for action in actions:
            if action in OUTCOMES:
                waiting = pending is Action.PLAN_RETRY
                assert pending not in OUTCOMES or waiting, f"{action} begins while {pending} is under way"
                pending = action


GOOD = {
    Action.ACQUIRE: Event.ACQUIRED,
    Action.REAP: Event.REAPED,
    Action.SWAP: Event.SWAPPED,
    Action.PLAN_RETRY: Event.DELAY_OVER,
}


@given(st.data())
def test_every_path_converges(data: st.DataObject) -> None:
    """Whatever a link has been through: if from now on all goes well, it is up."""
    state, pending = State.STARTING, Action.ACQUIRE

    def step(event: Event) -> None:
        nonlocal state, pending
        if pending in OUTCOMES and event in OUTCOMES[pending]:
            pending = Action.TELL_CONNECTED  # nothing under way
        state, actions = advance(state, event)
        pending = next((action for action in actions if action in OUTCOMES), pending)

    for _ in range(data.draw(st.integers(0, 30))):
        outcomes = OUTCOMES.get(pending, ())
        step(data.draw(st.sampled_from([*outcomes, Event.LOST, Event.RENEW, Event.VM_READY])))
    reached = state
    for _ in range(10):
        # What nobody but the VM, or a person, can bring about: a machine, another attempt.
        step(GOOD.get(pending, Event.RENEW if state is State.FAILED else Event.VM_READY))
        if state is State.UP:
            return
    pytest.fail(f"from {reached} to {state}")


def test_a_new_passt_never_comes_before_the_old_one_is_gone() -> None:
    """A dying passt has its ports still: from UP no way leads to ACQUIRE but by REAPED."""
    for state, row in TABLE.items():
        for event, (_, actions) in row.items():
            if Action.ACQUIRE in actions and state not in {State.NEW, State.WAITING, State.FAILED}:
                assert (state, event) in {
                    (State.REAPING, Event.REAPED),
                    (State.OUTDATED, Event.ACQUIRE_FAILED),  # which has seen its own off
                }


def test_the_documentation_shows_this_table() -> None:
    """docs/lifecycle.md holds what `python -m qrapd.link_lifecycle` prints; between the markers, paste it anew."""
    _, shown, _ = DOCUMENT.read_text("utf-8").split("<!-- link table -->")
    assert describe_table() == shown.strip()


def test_the_documentation_names_every_state() -> None:
    """Each state has its line in docs/lifecycle.md, above the table."""
    words = DOCUMENT.read_text("utf-8").partition("# The life of a link")[2]
    assert [] == [state.value for state in State if f"\n- **{state.value}**: " not in words]
