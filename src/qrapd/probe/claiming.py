# SPDX-License-Identifier: GPL-2.0-or-later
"""One passt claimed: which one wins, how long those that are busy are waited for, and why there is none."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from qrapd import unix_sockets

from .attempts import RAMP, Attempts
from .candidates import State, advise, default_paths, fold, name_span
from .identity import identify, sort_passts
from .looking import HANGS_UP, STUCK, Entry
from .trusted_users import default_uids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qrapd.errors import Unavailable

__all__ = ["LOOK_AGAIN", "PATIENCE", "RIVAL_PATIENCE", "Claim", "Claiming"]

LOOK_AGAIN = 0.050
"""Seconds between two looks at those put off: qrap.c."""

PATIENCE = 2.5
"""Seconds that those put off are looked at again: qrap.c, 50 times 50 ms."""

RIVAL_PATIENCE = 10.0
"""Seconds, at most, that patience grows to while rivals hold candidates."""

_HANGS_UP_FOR = 1.0
"""Seconds, with 20 questions, after which one that always hangs up is not just unlucky with its rivals."""


class Claim(NamedTuple):
    """A connected passt, with the answer to the probe still in the stream."""

    socket: socket.socket
    """In blocking mode, not inheritable; the caller's to close."""
    path: str
    pid: int | None
    """passt's process, where it can be told."""


class Claiming(Attempts):
    """Claims one passt: :meth:`step` until it says that there is nothing to wait for."""

    def __init__(
        self,
        paths: Sequence[str] | None,
        allowed_uids: Collection[int] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        super().__init__(
            default_paths() if paths is None else paths,
            default_uids() if allowed_uids is None else default_uids() | frozenset(allowed_uids),
            say,
        )
        self._started = time.monotonic()
        self._patient_until = self._started + PATIENCE
        self._look_at = 0.0

    def step(self) -> float | None:
        """Do what is due. Returns the seconds to wait at most, or None: :meth:`take` the winner.

        :raise Unavailable: none of the candidates will do.
        """
        now = time.monotonic()
        self._read_all()
        self._deal_with_silent(now)
        # One that may end is not left without knowing: its answer, if it comes, goes before the others'.
        if self._answered and not self._fragile_under_way():
            return None
        if not self._answered:
            if now >= self._look_at and self._some_put_off():
                self._look()
                self._look_at = now + LOOK_AGAIN
                self._notice_rivals(now)
            self._retry_locked(now)
            self._begin_more(now)
        self._lookout.go_on_searching()
        if self._lookout.searching:
            return 0.0
        nothing_left = not self._under_way and not any(each.ready for each in self._entries)
        if nothing_left and not (self._some_busy() and now < self._patient_until):
            raise self._failure()
        return max(0.0, self._next(now) - now)

    def take(self) -> Claim:
        """The winner; all others are let go on leaving the context."""
        self._name_faulty()
        winner = min(self._answered, key=lambda each: (not each.entry.identity.may_end, each.entry.index))
        self._answered.remove(winner)
        if winner.lock:
            winner.lock.close()
        winner.connection.setblocking(True)
        return Claim(winner.connection, winner.entry.path, self._pid(winner.entry))

    def _name_faulty(self) -> None:
        """Say which ones should have answered before. Not what rivals may have been at: then they are busy, no more."""
        if self._has_rivals:
            return
        now = time.monotonic()
        for attempt in self._under_way.values():
            if (age := now - attempt.started) >= RAMP:
                self._say(f"{attempt.entry.path}: passed over: no answer within {age * 1000:.0f} ms")
        hung_up = [each for each in self._entries if each.hung_up_since and each.state is State.BUSY]
        self._lookout.look(hung_up)
        for entry in hung_up:
            if entry.hung_up_since and entry.state is State.FREE and not _is_locked(entry):
                self._say(f"{entry.path}: passed over: {HANGS_UP}")
        for entry in self._entries:
            if entry.state is State.SILENT:
                self._say(f"{entry.path}: passed over: {entry.detail}")

    def _pid(self, entry: Entry) -> int | None:
        """The winner's process now: it may have gone to the background, into another one, since it was looked for."""
        pid = entry.candidate.pid
        if pid and not unix_sockets.read_program(pid):
            passts = sort_passts(unix_sockets.find_programs("passt"))
            pid = identify(entry.sighting, passts, trusted=self._lookout.allowed).pid
        return pid

    def _some_put_off(self) -> bool:
        return self._look_at == 0 or self._some_busy()

    def _some_busy(self) -> bool:
        """Whether there are candidates that may yet become free, or turn out to be no passt with --vhost-user."""
        return any(
            each.state is State.BUSY or (each.state is State.VHOST_USER and not each.settled)
            for each in self._entries
        )

    def _notice_rivals(self, now: float) -> None:
        """A passt that has a client may have it for a moment only: while another claim is asking it."""
        if any(each.state is State.BUSY and _is_locked(each) for each in self._entries):
            self._has_rivals = True
            self._be_patient(now)

    def _be_patient(self, now: float) -> None:
        limit = self._started + RIVAL_PATIENCE
        self._patient_until = max(self._patient_until, min(now + PATIENCE, limit))

    def _retry_locked(self, now: float) -> None:
        for entry in self._entries:
            if entry.locked_since is not None and entry.state is State.BUSY:
                self._be_patient(now)
                entry.ready = now >= entry.again

    def _next(self, now: float) -> float:
        moments = [attempt.due for attempt in self._under_way.values()]
        if self._answered:
            return min(moments)
        if self._some_busy():
            moments.append(self._look_at)
        moments += [each.again for each in self._entries if each.again > now]
        if any(each.ready for each in self._entries):
            moments.append(self._widen_at if self._under_way else now)
        return min(moments, default=now)

    def _failure(self) -> Unavailable:
        from qrapd.errors import Unavailable  # brings dataclasses in

        now = time.monotonic()
        for entry in self._entries:
            if entry.stuck_since and now - entry.stuck_since > PATIENCE / 2:
                entry.become(State.SILENT, STUCK)
            elif entry.hung_up_since and now - entry.hung_up_since > _HANGS_UP_FOR:
                entry.become(State.SILENT, HANGS_UP)
        paths = [each.path for each in self._entries]
        found = [each.candidate for each in self._entries]
        there = [each for each in found if each.state is not State.ABSENT]
        hint = advise(there, paths)
        if not there:
            return Unavailable(f"no passt to be found: nothing is at {name_span(paths)}", hint=hint)
        lines = "; ".join(f"{span}: {words}" for span, words in fold(found) if words != State.ABSENT.value)
        return Unavailable(f"no passt could be claimed. {lines}", hint=hint)


def _is_locked(entry: Entry) -> bool:
    """Whether another claim is asking it."""
    return entry.sighting.file is not None and unix_sockets.is_locked(entry.sighting.file)
