# SPDX-License-Identifier: GPL-2.0-or-later
"""When a link that has lost its passt tries the next one: at once, after a delay, or not at all any more.

A passt that was killed is replaced at once, however often. One that ends by itself as soon as it serves would do so
again and again, and counts as an attempt that failed, although it came up.
"""

from __future__ import annotations

from qrapd.backoff import Backoff

__all__ = ["PATIENCE_WITH_STRANGERS", "Retries"]

PATIENCE_WITH_STRANGERS = 5
"""Passts of somebody else's in a row that have not served for a second; the next ones are waited for."""


class Retries:
    """The failures of one link's passts. Time is what the caller says it is, in seconds."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._short_lives = 0
        self._crashing = False
        """the last passt has crashed as soon as it served: the next one has to prove itself first"""

    @property
    def attempts(self) -> int:
        """That have failed since the last success."""
        return self._backoff.attempts

    def limit(self, limit: int, window: float) -> None:
        """Give up after so many attempts that have failed within ``window`` seconds."""
        self._backoff.limit, self._backoff.window = limit, window

    def fail(self, now: float) -> float | None:
        """Count an attempt that has failed. Returns the seconds until the next one, or None: there have been enough."""
        return self._backoff.fail(now)

    def note_up(self) -> None:
        """A passt serves."""
        if self._crashing:
            self._backoff.succeed()
        else:
            self._backoff.forget()

    def note_end(self, *, lasted: bool, crashed: bool, ours: bool) -> bool:
        """A passt that served does so no more. Returns whether that is to be counted as an attempt that failed.

        :param lasted: it has served for some time.
        :param ours: what ended is a process of ours, so that ``crashed`` can be told.
        """
        if lasted:
            self._crashing = False
            self._short_lives = 0
            self._backoff.forget()
            return False
        if not crashed:
            self._short_lives += 1
            if ours or self._short_lives < PATIENCE_WITH_STRANGERS:
                return False
        self._crashing = True
        return True

    def begin_anew(self) -> None:
        """Somebody wants another attempt: what has failed counts no more."""
        self._backoff.forget()
