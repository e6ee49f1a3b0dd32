# SPDX-License-Identifier: GPL-2.0-or-later
"""All candidates told of: those that a question cannot harm are asked, all at once."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from .attempts import ANSWER_TIMEOUT, Attempts
from .candidates import Candidate, State
from .looking import STUCK, Entry

__all__ = ["Survey"]

LOOK_AGAIN = 0.050
"""Seconds between two looks at those that have not accepted a connection yet."""

_LOCK_PATIENCE = 0.050
"""Seconds that those are tried again which another look, or a claim, is asking: most are asked for 1 to 3 ms."""


class Survey(Attempts):
    """Tells of all candidates: :meth:`step` until it says that there is nothing to wait for."""

    def __init__(self, paths: Sequence[str], allowed: Collection[int], *, ask_all: bool) -> None:
        super().__init__(paths, allowed, None)
        self._ask_all = ask_all
        self._begun = False
        self._began = 0.0
        self._searched = False

    def step(self) -> float | None:
        """Do what is due. Returns the seconds to wait at most, or None: all is known."""
        now = time.monotonic()
        if not self._begun:
            self._begun = True
            self._began = now
            self._look()
        if not self._searched:
            self._lookout.go_on_searching()
            if self._lookout.searching:
                return 0.0
            self._search_doubtful()  # nothing new the second time
            self._searched = not self._lookout.searching
            if not self._searched:
                return 0.0
        self._read_all()
        for attempt in self._answered:
            attempt.close()
        self._answered.clear()
        self._deal_with_silent(now)
        self._come_again(now)
        for entry in [each for each in self._entries if each.ready]:
            if not entry.identity.may_end:
                self._begin(entry, now)
            elif not self._ask_all:
                doubt = "is" if entry.identity.one_off else "may be"
                entry.become(
                    State.FREE, f"not asked: it {doubt} a passt with --one-off, which a question would end"
                )
            elif not self._fragile_under_way():
                self._begin(entry, now)
        moments = [each.due for each in self._under_way.values()]
        moments += [each.again for each in self._entries if self._is_locked(each, now)]
        if self._stuck():
            moments.append(now + LOOK_AGAIN)
        return max(0.0, min(moments) - now) if moments else None

    def _come_again(self, now: float) -> None:
        """To those that another look asks, which takes it a millisecond or two, and those that accept nothing."""
        for entry in self._entries:
            if self._is_locked(entry, now) and now >= entry.again:
                entry.ready = True
        if stuck := self._stuck():
            if now - self._began < ANSWER_TIMEOUT:
                self._lookout.look(stuck)
            else:
                for entry in stuck:
                    entry.become(State.SILENT, STUCK, settled=True)

    def _is_locked(self, entry: Entry, now: float) -> bool:
        return (
            entry.locked_since is not None
            and entry.state is State.BUSY
            and now - self._began < _LOCK_PATIENCE
        )

    def _stuck(self) -> list[Entry]:
        return [each for each in self._entries if each.stuck_since is not None and each.state is State.BUSY]

    def result(self) -> list[Candidate]:
        """All candidates, in their order."""
        return [each.candidate for each in self._entries]
