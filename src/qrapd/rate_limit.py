# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of what guests and children write goes into the journal: a token bucket, shared fairly.

journald lets a unit write 10,000 entries of a priority in 30 seconds and drops what is beyond (journald.conf(5),
RateLimitBurst=; with more than a few MiB free it allows more, never less). It cannot tell a guest's lines from qrapd's:
behind a guest that floods its console, the word that a link was lost or that the VM has ended would be gone.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["BURST", "BYTES", "HEADROOM", "IDLE_SECONDS", "RATE", "RateLimit"]

Source = TypeVar("Source")
"""What tells sources apart: hashable."""

RATE = 100.0
"""Lines per second for good, shared by all sources. With the burst that makes 5,000 in any 30 s: half of what journald
takes of a unit. The other half is for qrapd's own, and for a second VM of a user: journald counts all of a user's
units as one (user@UID.service)."""

BURST = 2_000.0
"""Lines at once after a while of quiet, shared by all sources: a Linux that boots with all its messages writes about
1,000 in some ten seconds, and has half of the burst while its passt is talking, too."""

HEADROOM = 1.5
"""The whole has so much more of both than the shares add up to (7,500 in 30 s): it is there for sources that had
nothing to say until now, when others have used up what is theirs."""

BYTES = 256
"""A longer line counts as several: so many bytes each. The journal's size is limited, too, and what is too much there
takes the place of the host's older entries."""

IDLE_SECONDS = 30.0
"""A source that has been quiet for so long has no share. Its bucket is full again by then: BURST / RATE is less."""


class _Bucket:
    """Tokens, and when they were counted last."""

    __slots__ = ("counted", "left_out", "tokens")

    def __init__(self, tokens: float, now: float) -> None:
        self.tokens = tokens
        self.counted = now
        self.left_out = 0

    def refill(self, now: float, rate: float, burst: float) -> None:
        self.tokens = min(burst, self.tokens + (now - self.counted) * rate)
        self.counted = now


class RateLimit(Generic[Source]):
    """Which lines of which source may go on, and how many of each did not.

    Each source that has said something of late has an equal share of :data:`RATE` and :data:`BURST`, so that one that
    floods costs the others nothing. All of them together are limited as well: however many sources take turns,
    what comes out stays below what journald drops.
    """

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._whole = _Bucket(burst * HEADROOM, 0.0)
        self._sources: dict[Source, _Bucket] = {}
        self._looked = 0.0

    def admit(self, source: Source, size: int, now: float) -> bool:
        """Whether a line of ``size`` bytes may go on; if not, it is counted."""
        bucket = self._sources.get(source)
        if bucket is None:
            self._forget_idle(now)
            bucket = self._sources[source] = _Bucket(self._burst / (len(self._sources) + 1), now)
        elif now - self._looked > IDLE_SECONDS:
            self._forget_idle(now, but=source)
        share = len(self._sources)
        burst = self._burst / share
        bucket.refill(now, self._rate / share, burst)
        self._whole.refill(now, self._rate * HEADROOM, self._burst * HEADROOM)
        cost = 1 + size // BYTES
        # What costs more than there ever is goes when all of it is there, and is a debt then.
        if min(cost, burst) > bucket.tokens or min(cost, burst) > self._whole.tokens:
            bucket.left_out += 1
            return False
        bucket.tokens -= cost
        self._whole.tokens -= cost
        return True

    def take_left_out(self) -> dict[Source, int]:
        """How many lines were left out since the last call, by their sources."""
        found = {source: bucket.left_out for source, bucket in self._sources.items() if bucket.left_out}
        for source in found:
            self._sources[source].left_out = 0
        return found

    def _forget_idle(self, now: float, but: Source | None = None) -> None:
        self._looked = now
        for source, bucket in list(self._sources.items()):
            if source != but and not bucket.left_out and now - bucket.counted > IDLE_SECONDS:
                del self._sources[source]
