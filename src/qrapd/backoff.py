# SPDX-License-Identifier: GPL-2.0-or-later
"""When to try again what has failed, and when to give up: growing delays, and a limit within a window of time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

__all__ = ["Backoff"]

FIRST_DELAY = 0.05
"""Seconds after the first failure, which may have been no more than bad luck: twice what a passt takes to come up."""

FACTOR = 6.0
"""With the default limit, 5 failures in 60 s, the last attempt comes 13 s after the first: a port that someone else has
for a few seconds, or a program that is being upgraded, is outlasted."""

LONGEST_DELAY = 30.0
"""Seconds. A person who has mended the cause waits no longer than this."""

JITTER = 0.2
"""Each delay is up to this much shorter or longer, so that many that failed together do not try again together."""


class Backoff:
    """The failures of one thing. Time is what the caller says it is, in seconds.

    :param limit: so many failures within ``window`` seconds, and it is given up.
    :param chance: a random number from 0 to 1.
    """

    def __init__(self, limit: int, window: float, *, chance: Callable[[], float] = random.random) -> None:
        self.limit = limit
        self.window = window
        self.attempts = 0
        """Failures since the last success."""
        self._chance = chance
        self._failures: deque[float] = deque()

    def fail(self, now: float) -> float | None:
        """Count a failure. Returns the seconds until the next attempt, or None: there have been enough."""
        self.attempts += 1
        self._failures.append(now)
        while self._failures[0] <= now - self.window:
            self._failures.popleft()
        if len(self._failures) >= self.limit:
            return None
        # The exponent is bounded: a float cannot hold what a year of failures would come to.
        delay = min(FIRST_DELAY * FACTOR ** min(self.attempts - 1, 10), LONGEST_DELAY)
        return delay * (1 + JITTER * (2 * self._chance() - 1))

    def succeed(self) -> None:
        """It works, for how long is not known: the delays begin anew, and what has failed lately still counts."""
        self.attempts = 0

    def forget(self) -> None:
        """Begin anew: it has worked for some time, or somebody said so."""
        self.attempts = 0
        self._failures.clear()
