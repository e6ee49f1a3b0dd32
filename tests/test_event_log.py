# SPDX-License-Identifier: GPL-2.0-or-later
"""The ring of events, and those who follow it: real tasks, that read as fast or as slowly as they like."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qrapd.event_log import BYTES_PER_ENTRY, LONGEST_FIELD, Entry, EventLog, Missed
from qrapd.logs import Logs
from qrapd.messages import OUTPUT_EVENTS

DEADLINE = 30
"""Seconds for what takes no time: a test that hangs is to say where."""


async def kept(log: EventLog, after: str | None = None, vm: str | None = None) -> list[Entry | Missed]:
    """What is there to read now."""
    return [each async for each in log.follow(after, vm, wait=False)]


def numbers(found: list[Entry | Missed]) -> list[object]:
    """The field ``generation`` of each entry; of what was missed, how many."""
    return [each.fields["generation"] if isinstance(each, Entry) else each for each in found]


def add(log: EventLog, *generations: int, vm: str | None = "web") -> None:
    """One event each."""
    for generation in generations:
        log.append("link.lost", {"vm": vm, "link": 0, "generation": generation, "reason": "exited"})


async def test_what_is_kept() -> None:
    """In order, with ids of their own and the time."""
    log = EventLog()
    add(log, 1, 2, 3)
    found = await kept(log)
    assert [1, 2, 3] == numbers(found)
    entries = [each for each in found if isinstance(each, Entry)]
    assert 3 == len({each.id for each in entries})
    assert entries[-1].id == log.last_id
    assert timedelta(0) <= datetime.now(UTC) - entries[0].at < timedelta(seconds=DEADLINE)
    fields = {"vm": "web", "link": 0, "generation": 1, "reason": "exited"}
    assert ("link.lost", "web", fields) == (entries[0].event, entries[0].vm, entries[0].fields)


async def test_the_form_is_that_of_the_json_log(tmp_path: Path) -> None:
    """Names, their order, level and the form of the time: what reads the one reads the other."""
    fields = {
        "reason": "exited",
        "link": 1,
        "detail": None,
        "vm": "web",
        "text": "ä\n\udc80",
        "links": [1, 2],
    }
    log = EventLog()
    log.append("link.lost", fields)
    with (tmp_path / "log").open("w+") as stream:
        with Logs("json", stream=stream) as logs:
            logs.emit("link.lost", **fields)
        written = json.loads((tmp_path / "log").read_text())
    (entry,) = await kept(log)
    assert isinstance(entry, Entry)
    read = json.loads(entry.json)
    assert list(written) == list(read)
    assert len(written.pop("timestamp")) == len(read.pop("timestamp"))
    assert written == read


async def test_an_entry_is_one_line_of_utf8() -> None:
    """Server-sent events end at a line's end, and whatever a path holds can be sent."""
    log = EventLog()
    log.append("run.failed", {"vm": "web", "error": "a\r\nb\udcff\x00\u2028", "path": Path("/x")})
    (entry,) = await kept(log)
    assert isinstance(entry, Entry)
    assert 1 == len(entry.json.encode().splitlines())
    assert {"vm": "web", "error": "a\r\nb\udcff\x00\u2028", "path": "/x"} == entry.fields


@pytest.mark.parametrize("event", sorted(OUTPUT_EVENTS))
async def test_output_is_not_kept(event: str) -> None:
    """A guest that floods its console would leave nothing else in the ring."""
    log = EventLog()
    log.append(event, {"vm": "web", "line": "x"})
    assert [] == await kept(log)


async def test_the_ring_is_bounded_in_entries() -> None:
    """The oldest go."""
    log = EventLog(3)
    add(log, *range(10))
    assert [7, 8, 9] == numbers(await kept(log))


async def test_the_ring_is_bounded_in_bytes() -> None:
    """Long fields are cut, so that each entry is bounded; many of them drop the others."""
    log = EventLog(100, most_bytes=10_000)
    for _ in range(50):
        log.append("run.failed", {"vm": "web", "error": "x" * 1_000_000, "links": ["y" * 1_000_000]})
        log.append("run.failed", {"vm": "web", "error": "x" * 1000})
    found = [each for each in await kept(log) if isinstance(each, Entry)]
    assert 2 <= len(found) < 10
    assert LONGEST_FIELD == len(str(found[-2].fields["error"])) == len(str(found[-2].fields["links"]))
    assert 10_000 > sum(len(each.json) for each in found)


async def test_one_entry_is_kept_however_long_it_is() -> None:
    """Else a follower would never hear of it."""
    log = EventLog(100, most_bytes=1)
    add(log, 1, 2)
    assert [2] == numbers(await kept(log))


async def test_memory() -> None:
    """A ring that is full of the longest entries takes what was allowed, and a half for Python."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        log = EventLog(1000)
        for number in range(3000):
            log.append("run.failed", {"vm": f"vm-{number}", "error": f"{number}" + "€" * 10_000})
        assert 1.5 * 1000 * BYTES_PER_ENTRY > tracemalloc.get_traced_memory()[0] - before
        assert [] != await kept(log)
    finally:
        tracemalloc.stop()


# ---- resuming


async def test_resume_by_id() -> None:
    """What comes after the id, no matter how old, as long as it is kept; nothing where there is nothing new."""
    log = EventLog()
    add(log, 1)
    first = log.last_id
    add(log, 2, 3)
    assert [2, 3] == numbers(await kept(log, first))
    assert [] == await kept(log, log.last_id)


async def test_resume_before_anything_has_happened() -> None:
    """An id of an empty ring is good for later."""
    log = EventLog()
    start = log.last_id
    add(log, 1)
    assert [1] == numbers(await kept(log, start))


async def test_resume_after_what_has_been_dropped() -> None:
    """It is told how many are missing."""
    log = EventLog(2)
    add(log, 1)
    first = log.last_id
    add(log, 2)
    assert [2] == numbers(await kept(log, first))
    add(log, 3)
    assert [2, 3] == numbers(await kept(log, first))
    add(log, 4, 5)
    assert [Missed(2), 4, 5] == numbers(await kept(log, first))


async def test_resume_by_an_id_of_an_earlier_process() -> None:
    """What has happened in between nobody knows: that is said, and then comes all that is there."""
    before, log = EventLog(), EventLog()
    for _ in range(2):
        add(before, 1)
        add(log, 1)
    assert [Missed(None), 1, 1] == numbers(await kept(log, before.last_id))


BAD_IDS = ["", "-", "x", "{}", "{}-", "{}-x", "{}--1", "{}-3", "{}-1-1", "{}-²", "{}-" + "9" * 10_000]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda text: text[:9])
async def test_resume_by_what_is_no_id(bad: str) -> None:
    """Clients send what they like: it is as good as another process's."""
    log = EventLog()
    add(log, 1, 2)
    bad = bad.replace("{}", log.last_id.partition("-")[0])
    assert [Missed(None), 1, 2] == numbers(await kept(log, bad))


# ---- one VM of many


async def test_one_vm() -> None:
    """Its own events, and none that is of no VM."""
    log = EventLog()
    add(log, 1)
    add(log, 2, vm="db")
    add(log, 3, vm=None)
    add(log, 4)
    assert [1, 4] == numbers(await kept(log, vm="web"))
    assert [] == await kept(log, vm="other")


async def test_a_quiet_vm_has_missed_nothing_of_others() -> None:
    """That the ring has dropped other VMs' events is no news to who follows one."""
    log = EventLog(2)
    add(log, 1)
    seen = log.last_id
    add(log, *range(10), vm="db")
    assert [] == await kept(log, seen, "web")
    add(log, 2, 3, 4)
    assert [Missed(None), 3, 4] == numbers(await kept(log, seen, "web"))


async def test_names_are_forgotten_on_the_safe_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more VMs than are kept in mind, one may be told to have missed what it has not, never the other way."""
    monkeypatch.setattr("qrapd.event_log.MOST_NAMES", 3)
    log = EventLog(1)
    add(log, 0, vm="before")
    seen = log.last_id
    for number in range(20):
        add(log, number, vm=f"vm-{number}")
        assert 3 >= len(log._dropped)
    for number in range(19):
        assert [Missed(None)] == await kept(log, seen, f"vm-{number}")


# ---- following


class Reader:
    """A task that follows, and keeps what it was told."""

    def __init__(self, log: EventLog, after: str | None = None, vm: str | None = None) -> None:
        self._follow: AsyncIterator[Entry | Missed] = log.follow(after, vm)
        self.found: list[object] = []
        self.more = anyio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        async for each in self._follow:
            self.found += numbers([each])
            self.more.set()

    async def until(self, count: int) -> list[object]:
        """What it was told, once that is so many."""
        with anyio.fail_after(DEADLINE):
            while len(self.found) < count:
                self.more = anyio.Event()
                await self.more.wait()
        return self.found


async def test_many_readers() -> None:
    """Each is told everything, once and in order, those that came late and those that come back included."""
    log = EventLog()
    add(log, 0)
    async with anyio.create_task_group() as tasks:
        readers = [Reader(log) for _ in range(50)]
        for reader in readers:
            tasks.start_soon(reader.run)
        for number in range(1, 20):
            add(log, number)
            if number % 3 == 0:
                await anyio.lowlevel.checkpoint()
        late = Reader(log, log.last_id, "web")
        tasks.start_soon(late.run)
        await anyio.wait_all_tasks_blocked()
        add(log, 20)
        assert [20] == await late.until(1)
        for reader in readers:
            assert list(range(21)) == await reader.until(21)
        tasks.cancel_scope.cancel()


async def test_a_slow_reader_is_told_what_it_has_missed() -> None:
    """It holds up nobody, goes on with what is there, and knows how much is not."""
    log = EventLog(5)
    slow = log.follow()
    add(log, 0)
    assert [0] == numbers([await anext(slow)])
    async with anyio.create_task_group() as tasks:
        quick = Reader(log)
        tasks.start_soon(quick.run)
        for number in range(1, 20):
            add(log, number)
            await quick.until(number + 1)
        tasks.cancel_scope.cancel()
    assert list(range(20)) == quick.found
    assert [Missed(14), 15, 16, 17, 18, 19] == numbers([await anext(slow) for _ in range(6)])


async def test_a_reader_waits_without_waking_up() -> None:
    """What is not news for anybody wakes nobody, and without readers nobody is there to be woken."""
    log = EventLog()
    add(log, 1)
    assert log._news is None
    reader = Reader(log)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.run)
        assert [1] == await reader.until(1)
        await anyio.wait_all_tasks_blocked()
        waited_for = log._news
        assert waited_for is not None
        log.append("guest.console", {"vm": "web", "line": "x"})
        await anyio.wait_all_tasks_blocked()
        assert waited_for is log._news
        assert not waited_for.is_set()
        add(log, 2)
        assert [1, 2] == await reader.until(2)
        tasks.cancel_scope.cancel()
    add(log, 3)
    assert log._news is None


async def test_a_reader_that_goes_leaves_nothing() -> None:
    """Cancelled in the middle of waiting, as by a client that hangs up; the others go on."""
    log = EventLog()
    async with anyio.create_task_group() as tasks:
        stays = Reader(log)
        tasks.start_soon(stays.run)
        async with anyio.create_task_group() as inner:
            goes = Reader(log)
            inner.start_soon(goes.run)
            await anyio.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        add(log, 1)
        assert [1] == await stays.until(1)
        assert [] == goes.found
        tasks.cancel_scope.cancel()


# ---- anything


class Rings(RuleBasedStateMachine):
    """A small ring against a list of all that there was: a reader is told all of it, or how much is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.log = EventLog(4, most_bytes=2_000)
        self.all: list[tuple[str, str]] = []
        """the id and the VM of each entry"""

    @rule(vm=st.sampled_from("abc"), size=st.integers(0, 3_000))
    def append(self, vm: str, size: int) -> None:
        """Something happens."""
        self.log.append("run.failed", {"vm": vm, "error": "x" * size})
        self.all.append((self.log.last_id, vm))

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """From anywhere, for one VM or all."""
        after = data.draw(st.integers(0, len(self.all)))
        vm = data.draw(st.sampled_from(["a", "b", "c", None]))
        wanted = [each for each, of in self.all[after:] if vm in (None, of)]
        id_ = self.all[after - 1][0] if after else self.log.last_id.partition("-")[0] + "-0"
        found = anyio.run(kept, self.log, id_, vm)
        entries = [each.id for each in found if isinstance(each, Entry)]
        assert wanted[len(wanted) - len(entries) :] == entries
        if len(entries) < len(wanted):
            missing = len(wanted) - len(entries) if vm is None else None
            assert Missed(missing) == found[0]
        else:
            assert not any(isinstance(each, Missed) for each in found)

    @invariant()
    def bounded(self) -> None:
        """In both ways; the count of bytes is that of what is there."""
        assert 4 >= len(self.log._entries)
        assert 2_000 >= self.log._bytes or 1 == len(self.log._entries)


Rings.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestRings = Rings.TestCase
