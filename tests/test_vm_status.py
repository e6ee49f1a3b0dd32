# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's events make of its status: the stories that they tell, and any order of them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tracemalloc
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.backoff import FACTOR, FIRST_DELAY
from qrapd.lifecycle import Reason, judge_exit
from qrapd.messages import EVENTS
from qrapd.status_tracker import LONGEST_ERROR, LOSS_REASONS, OUTAGE_BOUNDS, StatusTracker
from qrapd.vm_status import VmStatus
from support import Run, write_vm

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass
class Story:
    """A VM with two links, told event by event, a second apart."""

    at: datetime = START
    seconds: float = 0.0
    state: Any = "starting"
    tracker: StatusTracker = field(init=False)

    def __post_init__(self) -> None:
        links = [(0, "swap"), (1, "native")]
        self.tracker = StatusTracker("web", "agent", links, self.at, state=self.state, clock=self.clock)  # type: ignore[arg-type]

    def clock(self) -> float:
        """The steady one."""
        return self.seconds

    def pass_time(self, seconds: float = 1.0) -> None:
        """By both clocks."""
        self.seconds += seconds
        self.at += timedelta(seconds=seconds)

    def tell(self, event: str, **fields: object) -> VmStatus:
        """A second passes, something happens; returns what is known then."""
        assert event in EVENTS
        self.pass_time()
        self.tracker.note(event, {"vm": "web", **fields}, self.at)
        return self.tracker.status()

    def start(self) -> VmStatus:
        """Until it is ready: 5 s."""
        self.tell("passt.started", link=0, pid=20)
        self.tell("link.connected", link=0, generation=1, source="managed", passt_pid=20, socket=None)
        self.tell("vm.started", qemu_pid=10)
        self.tell("vm.ready", qemu_pid=10, status="running", links=2)
        return self.tell("link.connected", link=1, generation=1, source="managed", passt_pid=21, socket=None)


def test_a_start() -> None:
    """Until the machine runs it is starting; links have their generation and passt."""
    story = Story()
    assert ("starting", START) == (story.tracker.status().state, story.tracker.status().since)
    status = story.start()
    assert ("ready", 10, START + timedelta(seconds=4)) == (status.state, status.qemu_pid, status.since)
    assert [("up", 1, 20), ("up", 1, 21)] == [
        (each.state, each.generation, each.passt_pid) for each in status.links
    ]
    assert 4.0 == story.tracker.start_seconds


def test_a_clock_that_is_put_right_does_not_change_how_long_a_start_took() -> None:
    """The time of day may jump back while a VM starts."""
    story = Story()
    story.at -= timedelta(hours=1)
    story.start()
    assert 4.0 == story.tracker.start_seconds


def test_an_outage() -> None:
    """The VM is degraded as long as a link is down, and what it took is counted."""
    story = Story()
    story.start()
    lost = story.tell("link.lost", link=0, generation=1, reason="exited", detail=None)
    assert ("degraded", "down", None) == (lost.state, lost.links[0].state, lost.links[0].passt_pid)
    assert story.at == lost.since
    failed = story.tell(
        "link.failed", link=0, attempts=1, retry_in_ms=50, error="port 80 is taken", hint=None
    )
    assert ("degraded", "down", "port 80 is taken") == (
        failed.state,
        failed.links[0].state,
        failed.links[0].error,
    )
    back = story.tell("link.restored", link=0, generation=2, outage_ms=34.5, passt_pid=22)
    assert ("ready", story.at) == (back.state, back.since)
    link = back.links[0]
    assert ("up", 2, 22, 1, 34.5, None) == (
        link.state,
        link.generation,
        link.passt_pid,
        link.outages,
        link.last_outage_ms,
        link.error,
    )
    measures = story.tracker.measures.links[0]
    assert (1, 0, 0, 0) == measures.lost
    assert 1 == measures.failed_attempts
    assert {0.05: 1} == {b: n for b, n in zip(OUTAGE_BOUNDS, measures.outage_counts, strict=False) if n}
    assert 0.0345 == pytest.approx(measures.outage_total)


def test_a_link_that_is_given_up() -> None:
    """It has failed, until somebody has it tried again."""
    story = Story()
    story.start()
    story.tell("link.lost", link=1, generation=1, reason="hangup", detail=None)
    status = story.tell("link.failed", link=1, attempts=5, retry_in_ms=None, error="no", hint=None)
    assert ("degraded", "failed") == (status.state, status.links[1].state)
    status = story.tell("link.restored", link=1, generation=2, outage_ms=9e6, passt_pid=5)
    assert ("ready", "up") == (status.state, status.links[1].state)
    assert 1 == story.tracker.outages[1].counts[-1]


def test_a_passt_that_has_ended_is_shown_no_more() -> None:
    """Its pid may soon be another process's; that of the other link's stays."""
    story = Story()
    story.start()
    status = story.tell("passt.exited", link=0, pid=20, exit_code=0)
    assert [None, 21] == [each.passt_pid for each in status.links]


@pytest.mark.parametrize("outage", [float("inf"), float("nan"), -1, None, "34", True])
def test_an_outage_of_no_length(outage: object) -> None:
    """JSON has no infinity, and a sum of NaN is NaN for ever."""
    story = Story()
    story.start()
    status = story.tell("link.restored", link=0, generation=2, outage_ms=outage, passt_pid=5)
    assert ("up", None) == (status.links[0].state, status.links[0].last_outage_ms)
    assert (0, 0.0) == (sum(story.tracker.outages[0].counts), story.tracker.outages[0].total)


def test_two_links_down() -> None:
    """One that is back does not make the VM whole."""
    story = Story()
    story.start()
    for link in (0, 1):
        story.tell("link.lost", link=link, generation=1, reason="exited", detail=None)
    since = story.tracker.status().since
    status = story.tell("link.restored", link=0, generation=2, outage_ms=30, passt_pid=5)
    assert ("degraded", START + timedelta(seconds=6)) == (status.state, since)
    assert since == status.since


def test_a_stop() -> None:
    """Stopping, whatever a link does meanwhile; then nothing is left."""
    story = Story()
    story.start()
    story.tell("link.lost", link=0, generation=1, reason="exited", detail=None)
    status = story.tell("vm.stopping", reason="request", how="power-down")
    since = status.since
    assert ("stopping", 10) == (status.state, status.qemu_pid)
    story.tell("link.restored", link=0, generation=2, outage_ms=30, passt_pid=5)
    assert ("stopping", since) == (
        story.tell("vm.stopping", reason="request", how="quit").state,
        story.tracker.status().since,
    )
    status = story.tell("vm.exited", reason="request", exit_code=0)
    assert ("exited", None, None) == (status.state, status.qemu_pid, status.error)
    assert {("ended", None)} == {(each.state, each.passt_pid) for each in status.links}
    # What comes late is of something that is over.
    assert status == story.tell("link.lost", link=0, generation=2, reason="exited", detail=None)
    assert status == story.tell("link.failed", link=0, attempts=1, retry_in_ms=50, error="x", hint=None)
    assert status == story.tell("link.restored", link=0, generation=3, outage_ms=30, passt_pid=5)


@pytest.mark.parametrize("reason", Reason)
def test_ends(reason: Reason) -> None:
    """What the lifecycle takes for a failure is one here, too."""
    causes: dict[Reason, dict[str, Any]] = {
        Reason.REQUEST: {"exit_code": 0, "signal": None, "stop_requested": True, "shutdown_cause": None},
        Reason.GUEST_SHUTDOWN: {"exit_code": 0, "stop_requested": False, "shutdown_cause": "guest-shutdown"},
        Reason.GUEST_PANIC: {"exit_code": 0, "stop_requested": False, "shutdown_cause": "guest-panic"},
        Reason.FAILED: {"exit_code": 1, "stop_requested": False, "shutdown_cause": None},
        Reason.KILLED: {"exit_code": None, "signal": 9, "stop_requested": False, "shutdown_cause": None},
    }
    verdict = judge_exit(**{"signal": None, **causes[reason]})
    assert reason is verdict.reason
    story = Story()
    story.start()
    status = story.tell("vm.exited", reason=reason.value, exit_code=0)
    assert ("failed" if verdict.failure else "exited") == status.state
    assert verdict.failure == story.tracker.measures.failures


def test_why_it_failed() -> None:
    """The supervisor knows more than the last event says; it is one failure."""
    story = Story()
    story.start()
    status = story.tell("vm.exited", reason="killed", signal=9, error="QEMU ended by SIGKILL")
    assert ("failed", "QEMU ended by SIGKILL") == (status.state, status.error)  # never without a reason
    since = status.since
    story.pass_time()
    story.tracker.note_failure("QEMU was killed", story.at)
    assert ("failed", "QEMU was killed", since) == (
        story.tracker.status().state,
        story.tracker.status().error,
        since,
    )
    assert 1 == story.tracker.measures.failures
    assert "QEMU was killed" == story.tell("run.failed", error="QEMU was killed", hint=None).error
    assert 1 == story.tracker.measures.failures


def test_what_to_do_about_it() -> None:
    """The hint goes with its error: not lost when that is told again, and not kept with another one."""
    story = Story()
    story.start()
    assert None is story.tell("vm.exited", reason="failed", error="no disk").hint
    assert "mend it" == story.tell("run.failed", error="no disk", hint="mend it").hint
    story.tracker.note_failure("no disk", story.at)
    assert "mend it" == story.tracker.status().hint
    story.tracker.note_failure("no room", story.at)
    assert None is story.tracker.status().hint
    story.tracker.note_refusal("no file", story.at, "write one")
    assert "write one" == story.tracker.status().hint
    story.tracker.begin(story.at)
    assert None is story.tracker.status().hint


def test_a_long_error_is_cut() -> None:
    """What a passt writes must not fill the agent's memory."""
    story = Story()
    story.tracker.note_failure("x" * 100_000, story.at)
    story.start()
    story.tell("link.failed", link=0, attempts=1, retry_in_ms=50, error="y" * 100_000, hint=None)
    error = story.tracker.status().links[0].error
    assert error is not None
    assert LONGEST_ERROR == len(error)


def test_a_restart() -> None:
    """Starting again, for the reason that is shown; its delay is no part of the start; what was counted stays."""
    story = Story()
    story.start()
    story.tell("link.lost", link=0, generation=1, reason="stalled", detail="x")
    story.tell("vm.exited", reason="failed", exit_code=1)
    status = story.tell("vm.restarting", attempts=1, delay_ms=10_000, error="QEMU ended with 1")
    assert ("starting", 1, "QEMU ended with 1", None) == (
        status.state,
        status.restarts,
        status.error,
        status.qemu_pid,
    )
    assert [("starting", 0)] * 2 == [(each.state, each.generation) for each in status.links]
    story.pass_time(10)
    status = story.start()
    assert ("ready", 1, None) == (status.state, status.restarts, status.error)
    assert 4.0 == story.tracker.start_seconds
    assert [1, 0] == [each.outages for each in status.links]


def test_a_stop_between_two_starts() -> None:
    """There is no event that says so: nothing runs that could end."""
    story = Story()
    story.tell("vm.exited", reason="guest-shutdown", exit_code=0)
    story.tell("vm.restarting", attempts=1, delay_ms=10, error=None)
    story.tracker.note_end(story.at)
    assert "exited" == story.tracker.status().state


def test_the_end_of_a_vm_that_failed_is_no_other_one() -> None:
    """Only what still seems to run has ended."""
    story = Story()
    story.tell("vm.exited", reason="failed", exit_code=1)
    story.tracker.note_end(story.at)
    assert "failed" == story.tracker.status().state


def test_one_that_nobody_has_started() -> None:
    """Neither of its links has ever been up; a start by other links, and by an event alone."""
    story = Story(state="exited")
    status = story.tracker.status()
    assert ("exited", ["ended", "ended"]) == (status.state, [each.state for each in status.links])
    story.pass_time(100)
    story.tracker.set_links([(0, "vhost-user")])
    assert ["ended"] == [each.state for each in story.tracker.status().links]
    story.tracker.begin(story.at)
    assert ("starting", ["vhost-user"]) == (
        story.tracker.status().state,
        [each.mode for each in story.tracker.status().links],
    )
    story.start()
    assert 4.0 == story.tracker.start_seconds
    story.tell("vm.exited", reason="request", exit_code=0)
    assert "starting" == story.tell("passt.started", link=0, pid=7).state


def test_another_file() -> None:
    """A link that stays keeps its counts; one of another mode is another one."""
    story = Story()
    story.start()
    for link in (0, 1):
        story.tell("link.lost", link=link, generation=1, reason="exited", detail=None)
    story.tracker.begin(story.at, [(0, "swap"), (1, "swap"), (2, "swap")])
    assert [1, 0, 0] == [each.outages for each in story.tracker.status().links]


def test_an_adoption() -> None:
    """Links go on where they were; those that are to be healed say so next."""
    story = Story(state="exited")
    fields: dict[str, Any] = {"qemu_pid": 9, "status": "running", "links": 2, "generations": [3, 1]}
    status = story.tell("vm.adopted", **fields)
    assert ("ready", 9, [3, 1]) == (status.state, status.qemu_pid, [each.generation for each in status.links])
    assert None is story.tracker.start_seconds
    assert "degraded" == story.tell("link.lost", link=1, generation=1, reason="exited", detail="x").state
    status = story.tell("vm.adopted", **fields, passt_pids=[5, None])
    assert [5, None] == [each.passt_pid for each in status.links]


def test_a_passt_that_is_lost_before_the_machine_runs() -> None:
    """That is a start that fails, and no outage."""
    story = Story()
    story.tell("link.connected", link=0, generation=1, source="managed", passt_pid=20, socket=None)
    status = story.tell("link.lost", link=0, generation=1, reason="exited", detail=None)
    assert ("starting", 0) == (status.state, status.links[0].outages)


def test_unread() -> None:
    """What waits in the streams is asked for at the moment."""
    status = Story().tracker.status({0: (4608, 12)})
    assert [(4608, 12), (None, None)] == [
        (each.unread_by_passt, each.unread_by_qemu) for each in status.links
    ]


def test_measures_are_a_copy() -> None:
    """A thread makes text of them while the loop goes on counting."""
    story = Story()
    story.start()
    before = story.tracker.measures
    story.tell("link.lost", link=0, generation=1, reason="exited", detail=None)
    story.tell("link.restored", link=0, generation=2, outage_ms=1, passt_pid=2)
    assert 0 == sum(before.links[0].lost) == sum(before.links[0].outage_counts)
    assert before != story.tracker.measures


def test_buckets_fit_the_backoff() -> None:
    """The attempts of a link by the default limit, 5 failures, end in a bucket of their own."""
    gives_up = sum(FIRST_DELAY * FACTOR**n for n in range(4))
    assert 10 < gives_up < 30
    assert {10.0, 30.0} < set(OUTAGE_BOUNDS)
    assert sorted(OUTAGE_BOUNDS) == list(OUTAGE_BOUNDS)


def test_memory() -> None:
    """A VM of two links costs less than 10 KiB, whatever has happened to it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        stories = []
        for _ in range(20):
            story = Story()
            for number in range(100):
                for link in (0, 1):
                    story.tell("link.lost", link=link, generation=number, reason="exited", detail="z" * 1000)
                    error = f"{number}" + "ü" * 9_000
                    story.tell("link.failed", link=link, attempts=number, retry_in_ms=None, error=error)
                story.tell("vm.exited", reason="failed", exit_code=1)
                story.tell("vm.restarting", attempts=1, delay_ms=10, error="€" * 9_000)
            stories.append(story)
        assert 10 * 1024 > (tracemalloc.get_traced_memory()[0] - before) / len(stories)
    finally:
        tracemalloc.stop()


# ---- a real one


def test_a_real_life(place: Path) -> None:
    """What a real supervisor tells of a real QEMU and a real passt, which is killed, makes the story that it is."""
    vm = write_vm(place, "life", qemu="powerdown_timeout = 1")  # there is no guest to heed the button
    with Run(vm.path, place / "run") as run:
        passt = run.wait_for("link.connected")["passt_pid"]
        run.wait_for("vm.ready")
        os.kill(passt, signal.SIGKILL)
        run.wait_for("link.restored")
        assert 0 == run.stop()
    run.assert_nothing_left()
    begin = datetime.fromisoformat(run.events[0]["timestamp"])
    tracker = StatusTracker("life", "shell", [(0, "swap")], begin)
    told = []
    for event in run.events:
        at = datetime.fromisoformat(event["timestamp"])
        tracker.note(event["event"], event, at)
        told.append(tracker.status())
    states = [state for state, _ in itertools.groupby(status.state for status in told)]
    assert ["starting", "ready", "degraded", "ready", "stopping", "exited"] == states
    ready = [status for status in told if status.state == "ready"]
    assert [passt, run.last("link.restored")["passt_pid"]] == [
        each.links[0].passt_pid for each in (ready[0], ready[-1])
    ]
    assert [1, 2] == [each.links[0].generation for each in (ready[0], ready[-1])]
    assert {run.last("vm.started")["qemu_pid"]} == {each.qemu_pid for each in ready}
    assert run.last("link.restored")["outage_ms"] == told[-1].links[0].last_outage_ms
    assert 1 == sum(tracker.measures.links[0].outage_counts) == told[-1].links[0].outages
    assert 0 == tracker.measures.failures


# ---- any order

NUMBERS = st.one_of(st.none(), st.integers(-1, 3), st.floats(), st.text(max_size=2), st.booleans())
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "link": st.one_of(st.sampled_from([0, 1]), NUMBERS),
        "generation": NUMBERS,
        "qemu_pid": NUMBERS,
        "passt_pid": NUMBERS,
        "pid": NUMBERS,
        "outage_ms": NUMBERS,
        "retry_in_ms": NUMBERS,
        "delay_ms": NUMBERS,
        "generations": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
        "passt_pids": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
        "reason": st.one_of(NUMBERS, st.sampled_from([*Reason, *LOSS_REASONS])),
        "error": st.one_of(NUMBERS, st.text(min_size=LONGEST_ERROR, max_size=LONGEST_ERROR + 5)),
    },
)


@given(st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), FIELDS), max_size=30))
def test_any_events_leave_a_valid_status(events: list[tuple[str, dict[str, Any]]]) -> None:
    """Whatever comes, with whatever fields: there is an answer, it is JSON, and says nothing that cannot be."""
    story = Story()
    for event, fields in events:
        before = story.tracker.status()
        story.tell(event, **fields)
        status = story.tracker.status()
        json.loads(status.model_dump_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert VmStatus.model_validate_json(status.model_dump_json()) == status
        assert (status.since == story.at) or (status.state, status.since) == (before.state, before.since)
        ended = status.state in {"exited", "failed"}
        assert not ended or status.qemu_pid is None
        assert ended == all(link.state == "ended" for link in status.links)
        down = any(link.state in {"down", "failed"} for link in status.links)
        assert status.state not in {"ready", "degraded"} or down == (status.state == "degraded")


# What is told in a life, each with the fields that it always has.
TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "begin": ("passt.started", {"link": 0, "pid": 5}),
    "run": ("vm.ready", {"qemu_pid": 5}),
    "adopt": ("vm.adopted", {"qemu_pid": 5, "generations": [1, 1]}),
    "stop": ("vm.stopping", {"reason": "request", "how": "quit"}),
    "end": ("vm.exited", {"reason": "request"}),
    "fail": ("vm.exited", {"reason": "failed"}),
    "again": ("vm.restarting", {"delay_ms": 5}),
    **{f"lose {n}": ("link.lost", {"link": n, "reason": "exited"}) for n in (0, 1)},
    **{f"try {n}": ("link.failed", {"link": n, "retry_in_ms": 5}) for n in (0, 1)},
    **{f"give up {n}": ("link.failed", {"link": n, "retry_in_ms": None}) for n in (0, 1)},
    **{f"restore {n}": ("link.restored", {"link": n, "generation": 2}) for n in (0, 1)},
    "notice": ("link.notice", {"link": 0, "notice": "x"}),
}


def model(words: list[str]) -> str:
    """The state after so many words: the last one about the machine counts, and then the links that are down."""
    machine, down = "starting", set[str]()
    for word in words:
        verb, _, link = word.rpartition(" ") if word[-1].isdigit() else (word, "", "")
        ended = machine in {"exited", "failed"}
        if verb in {"run", "adopt"}:
            machine = "running"
            down = set() if verb == "adopt" else down
        elif verb in {"end", "fail"}:
            machine, down = {"end": "exited", "fail": "failed"}[verb], set()
        elif verb == "again" or (verb == "begin" and ended):
            machine, down = "starting", set()
        elif verb == "stop" and not ended:
            machine = "stopping"
        elif verb in {"lose", "try", "give up"} and not ended:
            down.add(link)
        elif verb == "restore":
            down.discard(link)
    return machine if machine != "running" else "degraded" if down else "ready"


@given(st.lists(st.sampled_from(sorted(TOLD)), max_size=40))
def test_the_state_follows_the_model(words: list[str]) -> None:
    """In whatever order a life is told."""
    story = Story()
    for number, word in enumerate(words, 1):
        event, fields = TOLD[word]
        assert model(words[:number]) == story.tell(event, **fields).state
