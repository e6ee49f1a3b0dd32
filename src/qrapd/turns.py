# SPDX-License-Identifier: GPL-2.0-or-later
"""Links of one process that are healed at the same time take turns: together all of them would be up last.

Fifty passts that are killed at once were back after 1.0 to 1.4 s (median) when all new ones started together, and after
0.5 to 1.1 s with four at a time on two processors (three pairs of runs of benchmarks/agent.py; without the deadline for
a turn that is below).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from anyio.lowlevel import RunVar

__all__ = ["Turns", "turn"]

SECONDS = 0.25
"""That one may keep others waiting: a passt starts in 10 to 40 ms, and one that hangs must not hold up the rest."""


def _at_a_time() -> int:
    return max(4, 2 * (os.cpu_count() or 1))


class Turns:
    """So many at a time; who takes longer than ``seconds`` goes on, and counts no more."""

    def __init__(self, at_a_time: int, seconds: float) -> None:
        self._free = at_a_time
        self._seconds = seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn, in the order of asking."""
        loop = asyncio.get_running_loop()
        if self._free > 0:
            self._free -= 1
        else:
            given = loop.create_future()
            self._waiting.append(given)
            try:
                await given
            except BaseException:
                if given.done() and not given.cancelled():
                    self._give_back()
                elif given in self._waiting:  # else a turn has just passed it by
                    self._waiting.remove(given)
                raise
        counts = True

        def give_back() -> None:
            nonlocal counts
            if counts:
                counts = False
                self._give_back()

        deadline = loop.call_later(self._seconds, give_back)
        try:
            yield
        finally:
            deadline.cancel()
            give_back()

    def _give_back(self) -> None:
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_result(None)
                return
        self._free += 1


_TURNS: RunVar[Turns] = RunVar("qrapd-turns")


def turn() -> AbstractAsyncContextManager[None]:
    """A turn among all links of this event loop."""
    try:
        turns = _TURNS.get()
    except LookupError:
        turns = Turns(_at_a_time(), SECONDS)
        _TURNS.set(turns)
    return turns.take()
