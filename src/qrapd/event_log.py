# SPDX-License-Identifier: GPL-2.0-or-later
"""The last events of all VMs of this process, and those to come, for whoever follows them.

One ring for all, bounded in entries and in bytes. A reader has a place in it and nothing else: it copies nothing, and
wakes up when there is news. One that is slow loses what the ring drops, is told so, and holds up nobody.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import anyio

from qrapd.messages import EVENTS, OUTPUT_EVENTS

__all__ = ["Entry", "EventLog", "Missed"]

LONGEST_FIELD = 2_000
"""Characters of one field. An error that quotes what passt wrote may be longer; the log has all of it."""

BYTES_PER_ENTRY = 1_000
"""On the average, for the ring's bound in bytes. Most entries have 150 to 300."""

MOST_NAMES = 1_000
"""VMs of which is known when the ring has dropped something of theirs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One event."""

    id: str
    """by which to resume after it"""
    at: datetime
    event: str
    vm: str | None
    json: str
    """as in the JSON log, on one line: timestamp, level, event, vm, link, and the event's own fields"""

    @property
    def fields(self) -> Mapping[str, object]:
        """The event's fields, ``vm`` and ``link`` among them."""
        data: dict[str, object] = json.loads(self.json)
        return {name: value for name, value in data.items() if name not in {"timestamp", "level", "event"}}


@dataclass(frozen=True, slots=True)
class Missed:
    """Entries between the last one and the next are gone: the reader was slow, or its id is another process's."""

    count: int | None
    """how many; None: not known"""


class EventLog:
    """The ring. All of its methods are for the event loop's thread.

    :param size: so many entries at most.
    :param most_bytes: so much memory for their text at most; the last one is kept however long it is.
    """

    def __init__(self, size: int = 1000, *, most_bytes: int | None = None) -> None:
        self._size = size
        self._most_bytes = size * BYTES_PER_ENTRY if most_bytes is None else most_bytes
        # Of this process: ids of an earlier one are not to be taken for numbers of this ring.
        self._epoch = secrets.token_hex(4)
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._next = 1
        """the number that the next entry gets"""
        self._dropped: dict[str, int] = {}
        """by VMs, the number of the last entry that the ring has dropped"""
        self._dropped_of_any = 0
        """the same for VMs that are not in there"""
        self._news: anyio.Event | None = None
        """there if anybody waits for it"""

    @property
    def last_id(self) -> str:
        """Follow after this to see what happens from now on."""
        return f"{self._epoch}-{self._next - 1}"

    def append(self, event: str, fields: Mapping[str, object]) -> None:
        """Keep an event, unless it is output of a guest or a child; wake those who follow."""
        if event in OUTPUT_EVENTS:
            return
        at, vm = datetime.now(UTC), fields.get("vm")
        entry = Entry(
            id=f"{self._epoch}-{self._next}",
            at=at,
            event=event,
            vm=None if vm is None else str(vm),
            json=_to_json(at, event, fields),
        )
        self._entries.append(entry)
        self._bytes += sys.getsizeof(entry.json)
        self._next += 1
        while len(self._entries) > self._size or (self._bytes > self._most_bytes and len(self._entries) > 1):
            self._drop()
        if self._news is not None:
            self._news.set()
            self._news = None

    def _drop(self) -> None:
        number, entry = self._first, self._entries.popleft()
        self._bytes -= sys.getsizeof(entry.json)
        if entry.vm is None:
            return
        if len(self._dropped) >= MOST_NAMES and entry.vm not in self._dropped:
            self._dropped.clear()
            self._dropped_of_any = number
        self._dropped[entry.vm] = number

    async def follow(
        self, after: str | None = None, vm: str | None = None, *, wait: bool = True
    ) -> AsyncIterator[Entry | Missed]:
        """Tell what is kept and then what comes, for as long as the reader likes.

        :param after: the id of the last entry that is known already. One that is not of this process, or is no id
            at all, is told to have missed something. None: all that is kept.
        :param vm: only of this VM.
        :param wait: go on with what comes, instead of ending there.
        """
        place = self._first
        if after is not None:
            known = self._number(after)
            if known is None:
                yield Missed(None)
            else:
                place = known + 1
        while True:
            if place < self._first:
                missed, place = self._count_missed(place, vm), self._first
                if missed is not None:
                    yield missed
            elif place < self._next:
                entry = self._entries[place - self._first]
                place += 1
                if vm in (None, entry.vm):
                    yield entry
            elif wait:
                await self._wait()
            else:
                return

    @property
    def _first(self) -> int:
        """The number of the oldest entry that is kept, or of the next one."""
        return self._next - len(self._entries)

    def _number(self, id_: str) -> int | None:
        """Which entry of this process it is; None: none."""
        epoch, _, digits = id_.partition("-")
        # Not any longer than a number can be, before it is taken for one.
        if epoch != self._epoch or not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            return None
        number = int(digits)
        return number if number < self._next else None

    def _count_missed(self, place: int, vm: str | None) -> Missed | None:
        if vm is None:
            return Missed(self._first - place)
        # Of how many that VM's were is not kept, but of whether any: a VM that is quiet has missed nothing.
        return Missed(None) if self._dropped.get(vm, self._dropped_of_any) >= place else None

    async def _wait(self) -> None:
        if self._news is None:
            self._news = anyio.Event()
        await self._news.wait()


def _to_json(at: datetime, event: str, fields: Mapping[str, object]) -> str:
    kind = EVENTS.get(event)
    data: dict[str, object] = {
        "timestamp": at.isoformat().replace("+00:00", "Z"),
        "level": kind.level if kind is not None else "info",
        "event": event,
    }
    data |= {name: fields[name] for name in ("vm", "link") if name in fields}
    data |= dict(_cut(fields))
    # Bytes of a path that UTF-8 cannot hold become \udcXX, which is JSON's own way to write them.
    return json.dumps(data, default=str, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _cut(fields: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if value is None or isinstance(value, int | float):
            yield name, value
        elif isinstance(value, str):
            yield name, value if len(value) <= LONGEST_FIELD else value[: LONGEST_FIELD - 1] + "…"
        else:
            text = json.dumps(value, default=str, ensure_ascii=False)
            yield name, value if len(text) <= LONGEST_FIELD else text[: LONGEST_FIELD - 1] + "…"
