# SPDX-License-Identifier: GPL-2.0-or-later
"""Candidates that are being asked: which, how many at a time, what they answer, and when they are given up.

Nothing waits here, so that one state machine serves programs with an event loop and without.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Self

from qrapd import unix_sockets
from qrapd.frames import AnswerFinder, GarbageError, probe_request, sign_of_life_request

from .candidates import State
from .looking import HUNG_UP, Entry, Lookout

__all__ = [
    "ANSWER_TIMEOUT",
    "LOCK_AGAIN",
    "LOCK_PATIENCE",
    "RAMP",
    "RIVAL_RAMP",
    "SECOND_QUESTION",
    "Attempt",
    "Attempts",
]

ANSWER_TIMEOUT = 0.5
"""Seconds that a candidate has to answer: qrap.c."""

SECOND_QUESTION = 0.1
"""Seconds without an answer after which a candidate is asked in another way: a hundred times what most take.

passt since 2024 drops what comes from ::1, qrap's own question among it, so that one without IPv4 is silent
(passt 2025-05: measured). From a link-local address all versions answer.
"""

RAMP = 0.010
"""Seconds without an answer after which the number of attempts under way doubles."""

RIVAL_RAMP = 0.100
"""The same where rivals are at it: then it is they who let an answer wait, and they wait for what is held here.

Three herds of 64 qraps at once on two processors take 7 to 12 s with this, and 10 to 18 s with RAMP (measured).
"""

LOCK_PATIENCE = 1.0
"""Seconds after which a rival's lock is ignored: twice what an attempt takes."""

LOCK_AGAIN = 0.010
"""Seconds until another try at a candidate that a rival has locked: most attempts take 1 to 3 ms."""

_WIDEST = 64
_PEEK_SIZE = 256 * 1024
"""Bytes; more than an unread stream holds by default (net.core.wmem_default is 212992, with the kernel's own share)."""
_BROADCAST = b"\xff" * 6


class Attempt:
    """A candidate that was connected to and asked."""

    def __init__(self, entry: Entry, connection: socket.socket, lock: socket.socket | None) -> None:
        self.entry = entry
        self.connection = connection
        self.lock = lock
        self.finder = AnswerFinder()
        self.started = time.monotonic()
        self.asked_twice = False

    @property
    def due(self) -> float:
        """When something is to be done about it even if it stays silent."""
        return self.started + (ANSWER_TIMEOUT if self.asked_twice else SECOND_QUESTION)

    def close(self) -> None:
        """Let it go."""
        self.connection.close()
        if self.lock:
            self.lock.close()


class Attempts:
    """The attempts under way. It does not wait: ``step`` does what is due and says until when to wait.

    Waiting is for :attr:`events`, an epoll: its edges tell of new bytes behind those that were peeked at and left.
    """

    def __init__(
        self, paths: Sequence[str], allowed: Collection[int], say: Callable[[str], None] | None
    ) -> None:
        self._say = say or _say_nothing
        self._lookout = Lookout(allowed, self._say)
        self._entries = [Entry(index, path) for index, path in enumerate(dict.fromkeys(paths))]
        self._under_way: dict[int, Attempt] = {}
        self._answered: list[Attempt] = []
        self._has_rivals = False
        self._width = 1
        self._widen_at = 0.0
        self._request = probe_request()
        self.events = select.epoll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for attempt in [*self._under_way.values(), *self._answered]:
            attempt.close()
        self._under_way.clear()
        self._answered.clear()
        self.events.close()

    def step(self) -> float | None:
        """Do what is due. Returns the seconds to wait at most, or None: there is nothing to wait for."""
        raise NotImplementedError

    def _look(self) -> None:
        """See what has become of all that are neither settled nor under way."""
        busy = {attempt.entry.index for attempt in [*self._under_way.values(), *self._answered]}
        self._lookout.look([each for each in self._entries if not each.settled and each.index not in busy])

    def _search_doubtful(self) -> None:
        """Find out by their fds about those that may end, as far as is known."""
        under_way = {attempt.entry.index for attempt in self._under_way.values()}
        self._lookout.search_holders(
            [
                each
                for each in self._entries
                if (each.ready or each.index in under_way)
                and each.identity.may_end
                and not each.identity.certain
            ]
        )

    def _begin_more(self, now: float) -> None:
        """Ask as many as the ramp lets us, the lowest first, and of those that may end one at a time."""
        ramp = RIVAL_RAMP if self._has_rivals else RAMP
        if not self._under_way:
            self._width, self._widen_at = 1, now + ramp
        elif now >= self._widen_at:
            # Once for each step, however late that comes: a busy host is no reason to touch more.
            self._width, self._widen_at = min(self._width * 2, _WIDEST), now + ramp
            self._search_doubtful()
        for entry in self._entries:
            if len(self._under_way) >= self._width:
                return
            if not entry.ready or (entry.identity.may_end and self._fragile_under_way()):
                continue
            self._begin(entry, now)

    def _fragile_under_way(self) -> bool:
        return any(attempt.entry.identity.may_end for attempt in self._under_way.values())

    def _begin(self, entry: Entry, now: float) -> None:
        """Connect, check whom to, and ask. What goes wrong becomes the entry's state."""
        entry.ready = False
        lock = self._lock(entry, now)
        if lock is None and entry.again > now:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        attempt = Attempt(entry, connection, lock)
        self._under_way[connection.fileno()] = attempt
        try:
            connection.connect(entry.path)
            entry.pid, entry.uid = unix_sockets.peer_credentials(connection)
            entry.pid = entry.pid if _still_listens(entry.pid, entry.sighting.made) else None
            if entry.uid not in self._lookout.allowed:
                self._lookout.refuse(entry)
                self._drop(attempt)
                return
            # One frame cut in two would spoil the stream for good: 128 bytes into an empty stream go whole.
            connection.send(self._request, socket.MSG_NOSIGNAL)
            self.events.register(connection, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        except OSError as error:
            self._drop(attempt)
            entry.become(*_explain(error))

    def _lock(self, entry: Entry, now: float) -> socket.socket | None:
        """The lock on a candidate. Without one, ``entry.again`` is in the future, or else do without."""
        if entry.sighting.file is None:
            return None
        try:
            lock = unix_sockets.lock_path(entry.sighting.file)
        except OSError:  # not to be had here at all
            return None
        if lock:
            entry.locked_since = None
            return lock
        self._has_rivals = True
        if entry.locked_since is None:
            entry.locked_since = now
        if now - entry.locked_since < LOCK_PATIENCE:
            entry.again = now + LOCK_AGAIN
            entry.become(State.BUSY, "another program is asking it")
        else:
            entry.again = 0.0
        return None

    def _drop(self, attempt: Attempt) -> None:
        del self._under_way[attempt.connection.fileno()]
        attempt.close()

    def _read_all(self) -> None:
        while ready := self.events.poll(0):
            for fd, events in ready:
                if fd in self._under_way:
                    self._read(self._under_way[fd], events)

    def _read(self, attempt: Attempt, events: int) -> None:
        entry, finder = attempt.entry, attempt.finder
        try:
            waiting = attempt.connection.recv(_PEEK_SIZE, socket.MSG_PEEK)
            answered = finder.feed(waiting[finder.seen :])
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(attempt)
            entry.become(*_explain(error))
            return
        except GarbageError as error:
            self._drop(attempt)
            entry.become(State.GARBAGE, f"announces {error}, so it is no passt", settled=True)
            return
        if not waiting or events & (select.EPOLLRDHUP | select.EPOLLHUP):
            self._drop(attempt)
            entry.become(State.BUSY, HUNG_UP)
        elif answered:
            del self._under_way[attempt.connection.fileno()]
            self.events.unregister(attempt.connection)
            entry.become(State.ANSWERING)
            entry.latency = time.monotonic() - attempt.started
            self._answered.append(attempt)
        elif len(waiting) == _PEEK_SIZE:
            self._drop(attempt)
            entry.become(State.GARBAGE, "sends without end, and no answer", settled=True)

    def _deal_with_silent(self, now: float) -> None:
        """Ask them once more in another way, and in the end give them up."""
        for attempt in list(self._under_way.values()):
            if now - attempt.started >= ANSWER_TIMEOUT:
                self._drop(attempt)
                spoke = "spoke, but gave" if attempt.finder.seen else "gave"
                attempt.entry.become(
                    State.SILENT, f"{spoke} no answer within {ANSWER_TIMEOUT:g} s", settled=True
                )
            elif now >= attempt.due:
                attempt.asked_twice = True
                try:
                    # There is room for it whole, with no more than the first 128 bytes before it.
                    attempt.connection.send(sign_of_life_request(_BROADCAST), socket.MSG_NOSIGNAL)
                except OSError as error:
                    self._drop(attempt)
                    attempt.entry.become(*_explain(error))


def _say_nothing(_: str) -> None:
    pass


def _explain(error: OSError) -> tuple[State, str]:
    """What an error of connect, send or recv says of a candidate."""
    if error.errno in {errno.ECONNRESET, errno.EPIPE}:
        return State.BUSY, HUNG_UP
    if error.errno == errno.EAGAIN:
        return State.BUSY, "accepts no connection at present"
    if error.errno == errno.ECONNREFUSED:
        return State.REFUSED, ""
    if error.errno in {errno.EACCES, errno.EPERM}:
        return State.DENIED, "its permissions do not let this user"
    if error.errno == errno.ENOENT:
        return State.ABSENT, ""
    if error.errno == errno.EPROTOTYPE:
        return State.UNUSABLE, "a socket that is no stream"
    raise error


def _still_listens(pid: int, made: float | None) -> bool:
    """Whether the process that called listen(2) is still there, and not another one by its number."""
    program = unix_sockets.read_program(pid) if pid else None
    return program is not None and (made is None or program.started < made + 0.05)
