# SPDX-License-Identifier: GPL-2.0-or-later
"""Candidates looked at without being touched: who listens, whether that may be asked, and what asking may end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence

from qrapd import unix_sockets
from qrapd.unix_sockets import Kind, Program, Sighting

from .candidates import Candidate, State
from .identity import UNKNOWN, Passts, identify, sort_passts

__all__ = ["HANGS_UP", "HUNG_UP", "STUCK", "Entry", "Lookout"]

STUCK = "accepts nothing: stopped or hung"
"""Of a listener with a connection that waits, and waits, while nobody is connected."""

HUNG_UP = "hung up at once"
"""Of a listener that may have a client: passt accepts a second one and lets it go."""

HANGS_UP = "hangs up at once, though it has no client: perhaps half a frame of its last client is left in it"
"""Of a passt that is poisoned: one that persists, and whose client was killed in the middle of a frame.

That of 2025-05 then takes the beginning of all later clients' data for the rest, and resets them (measured).
"""

_SETTLED = 0.1
"""Seconds after which a passt that has made its socket has also forked, if it does."""

_SCAN_LASTS = 1.0
"""Seconds. See _all_passts."""

_SLICE = 0.005
"""Seconds that a search of fds takes at a time: whoever waits in the same event loop is not to notice."""

_SEARCHES = 4
"""Of fds, for each claim: the first look's, and those of a claim that widens. After that all is taken to be fragile."""

_PLAIN = {
    Kind.ABSENT: State.ABSENT,
    Kind.OTHER: State.UNUSABLE,
    Kind.STALE: State.REFUSED,
    Kind.BOUND: State.REFUSED,
    Kind.DENIED: State.DENIED,
}


class Entry:
    """A path, and how far it has come."""

    def __init__(self, index: int, path: str) -> None:
        self.index = index
        self.path = path
        self.state = State.ABSENT
        self.detail = ""
        self.settled = False  # for good: neither asked nor looked at again
        self.ready = False  # to be asked
        self.sighting = Sighting(path, Kind.ABSENT)
        self.identity = UNKNOWN
        self.uid: int | None = None
        self.pid: int | None = None
        self.latency: float | None = None
        self.again = 0.0  # when a candidate that a rival had locked may be tried again
        self.locked_since: float | None = None
        self.stuck_since: float | None = (
            None  # when a connection was first seen to wait, and nobody to be connected
        )
        self.hung_up_since: float | None = (
            None  # when it first did so, if nobody was seen to be connected since
        )

    def become(self, state: State, detail: str = "", *, settled: bool = False) -> None:
        """Note what it was found to be; it is not to be asked, then."""
        self.state, self.detail, self.settled, self.ready = state, detail, settled, False
        if detail == HUNG_UP and self.hung_up_since is None:
            self.hung_up_since = time.monotonic()

    @property
    def candidate(self) -> Candidate:
        """What is known by now."""
        pid = self.identity.pid or self.pid
        return Candidate(
            self.path, self.state, self.latency, pid, self.uid, self.identity.one_off, self.detail
        )


class Lookout:
    """Looks at entries and judges them."""

    def __init__(self, allowed: Collection[int], say: Callable[[str], None]) -> None:
        self.allowed = allowed
        self._say = say
        self._inquired: set[int] = set()  # inodes of listeners whose holders were searched for
        self._searches = 0
        self._search: Iterator[tuple[int, Program] | None] | None = None
        self._searched_for: dict[int, Entry] = {}

    def look(self, entries: Sequence[Entry]) -> None:
        """See what has become of ``entries``, none of which is settled or under way."""
        novel = []
        for entry, sighting in zip(
            entries, unix_sockets.look_at([each.path for each in entries]), strict=True
        ):
            if (sighting.inode, sighting.file) != (entry.sighting.inode, entry.sighting.file):
                entry.identity = UNKNOWN
                entry.locked_since = None
                entry.stuck_since = None
                entry.hung_up_since = None
                if sighting.kind in {Kind.LISTENING, Kind.HIDDEN}:
                    novel.append(entry)
            elif entry.state is State.VHOST_USER:  # perhaps: the one that it was taken for may have ended
                novel.append(entry)
            entry.sighting = sighting
        if novel:
            passts = _all_passts(max(each.sighting.made or 0.0 for each in novel))
            for entry in novel:
                entry.identity = identify(entry.sighting, passts, trusted=self.allowed)
        self.search_holders(
            [each for each in novel if each.identity.may_be_vhost_user and not each.identity.certain]
        )
        for entry in entries:
            self._judge(entry)

    def _judge(self, entry: Entry) -> None:
        sighting = entry.sighting
        entry.uid = sighting.uid if sighting.uid is not None else sighting.owner
        entry.ready = False
        if sighting.taken:
            entry.hung_up_since = None
        if not sighting.waiting or sighting.connected:
            entry.stuck_since = None
        elif entry.stuck_since is None:
            entry.stuck_since = time.monotonic()
        if sighting.kind not in {Kind.LISTENING, Kind.HIDDEN}:
            entry.become(_PLAIN[sighting.kind], sighting.reason)
        elif entry.uid not in self.allowed:
            self.refuse(entry)
        elif entry.identity.may_be_vhost_user:
            known = entry.identity.certain or entry.identity.pid is not None
            word = "is" if known else "may be"
            # Not for good where it is but a guess: the one that it is taken for may be somewhere else, and end.
            entry.become(State.VHOST_USER, f"{word} a passt with --vhost-user", settled=known)
        elif sighting.connected:
            entry.become(State.BUSY, "has a client")
        elif sighting.waiting:
            entry.become(State.BUSY, "has not accepted the last connection yet")
        else:
            entry.become(State.FREE)
            entry.ready = True

    def refuse(self, entry: Entry) -> None:
        """Have nothing to do with a listener of a user who is not allowed, and say so."""
        entry.become(State.FOREIGN, f"belongs to user {entry.uid}", settled=True)
        self._say(f"{entry.path}: refused: listens as user {entry.uid}, who is not trusted")

    @property
    def searching(self) -> bool:
        """Whether a search of fds is under way."""
        return self._search is not None

    def search_holders(self, entries: Collection[Entry]) -> None:
        """Begin to read processes' fds, once, for those that no command line could tell."""
        if self._search or self._searches >= _SEARCHES:
            return
        missing = {
            each.sighting.inode: each
            for each in entries
            if each.sighting.inode is not None and each.sighting.inode not in self._inquired
        }
        if not missing:
            return
        self._searches += 1
        self._inquired.update(missing)
        self._searched_for = missing
        # A program that is not dumpable looks like root's.
        uids = {
            0,
            *(uid for each in entries for uid in (each.sighting.uid, each.sighting.owner) if uid is not None),
        }
        self._search = unix_sockets.find_holders(missing, "passt", uids)

    def go_on_searching(self) -> None:
        """Search for a few milliseconds, and judge those that were found out about."""
        until = time.monotonic() + _SLICE
        for found in self._search or ():
            if found:
                self._identify_by(*found)
            elif time.monotonic() > until:
                return
        self._search = None

    def _identify_by(self, inode: int, holder: Program) -> None:
        entry = self._searched_for[inode]
        if entry.settled or entry.sighting.inode != inode:
            return
        entry.identity = identify(entry.sighting, Passts({}, []), holder)
        # What is under way, or has been tried, stays what it was found to be.
        if entry.identity.may_be_vhost_user or (entry.state is State.VHOST_USER):
            self._judge(entry)


_scan = (Passts({}, []), 0.0, 0.0)


def _all_passts(made: float) -> Passts:
    """All passts that listened by the time ``made``. Claims of one process share a scan while it says as much."""
    global _scan
    passts, on_clock, monotonic = _scan
    # A passt forks right after it has made its socket: just before that, a scan knows a pid that is soon gone.
    if made + _SETTLED > on_clock or monotonic + _SCAN_LASTS < time.monotonic():
        on_clock, monotonic = time.time(), time.monotonic()
        passts = sort_passts(unix_sockets.find_programs("passt"))
        _scan = passts, on_clock, monotonic
    return passts
