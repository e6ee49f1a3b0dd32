# SPDX-License-Identifier: GPL-2.0-or-later
"""All candidates told of: those that a question cannot harm are asked, all at once."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from .attempts import Attempts
from .candidates import Candidate, State

__all__ = ["Survey"]


class Survey(Attempts):
    """Tells of all candidates: :meth:`step` until it says that there is nothing to wait for."""

    def __init__(self, paths: Sequence[str], allowed: Collection[int], *, ask_all: bool) -> None:
        super().__init__(paths, allowed, None)
        self._ask_all = ask_all
        self._begun = False

    def step(self) -> float | None:
        """Do what is due. Returns the seconds to wait at most, or None: all is known."""
        now = time.monotonic()
        if not self._begun:
            self._begun = True
            self._look()
            self._search_doubtful()
        self._read_all()
        for attempt in self._answered:
            attempt.close()
        self._answered.clear()
        self._deal_with_silent(now)
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
        if not self._under_way:
            return None
        return max(0.0, min(each.due for each in self._under_way.values()) - now)

    def result(self) -> list[Candidate]:
        """All candidates, in their order."""
        return [each.candidate for each in self._entries]
