# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a passt hangs: judged by signs that cost the guest nothing, and by a question where these say nothing.

Sure signs, each of which must last for the whole timeout:

- The process is stopped.
- Data waits for passt, none of it has been read, and the process has not run at all. That is the guest that speaks
  to a hung passt.
- Connections wait for passt to accept them, and the process has not run at all.

A guest that is silent would hide a hung passt. A living one runs about once per second even then, as its loop has a
timer (2023-03, 2025-05, 2026-10: measured). One that has not run for the timeout is asked: QEMU announces the NIC,
which puts a few frames into the stream, and either they are read or they are the first of the signs above. The same
question suits a passt of which no more than the stream is known, once per timeout, and one that runs but reads
nothing, such as a loop gone wild, far less often.

A passt that runs while data waits is the hard case: one under full traffic finds its queue full at three of four
looks (measured), so equal looks once per second prove nothing. Such a passt is looked at closely before it is
condemned. One look that finds less than the one before acquits it.

Where QEMU leaves data unread itself (a guest without a driver, a QEMU that is held up), passt may wait for QEMU and
not run at all: it finishes a frame that it could send in part with a call that blocks (measured with 2023-03, under a
download). Nothing but a stopped process counts then.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CLOSE_LOOKS", "SHORTEST_CLOSE_LOOK", "Signs", "StallJudge", "Verdict", "next_look_at"]

LOOK_INTERVAL = 1.0
"""Seconds between two looks."""

TICK = 0.1
"""Seconds. Looks that may wait fall on whole ticks of the monotonic clock: :func:`next_look_at`."""

CLOSE_LOOK_INTERVAL = 0.02
"""Seconds between two looks at a passt that is in doubt."""

CLOSE_LOOKS = 100
"""Equal looks, at least, before a passt that runs is condemned. A passt under full traffic, on two cores shared by
five busy processes, gave up to 34 at intervals of 10 ms, as it had no processor for a third of a second (measured)."""

SHORTEST_CLOSE_LOOK = 2.0
"""Seconds for these, at least; else as long as the timeout."""

PULSE = 1.5
"""Seconds without any run that say something about an idle passt: its loop goes round after 1.0 (measured)."""

RARE = 12
"""Timeouts between two questions to a passt that runs: one per minute by default. It is fine as a rule, and a
guest that sends anything at all within that time makes the question needless."""

LATE = 2.0
"""Seconds between two looks from which on they are not counted: what kept the supervisor may have kept passt."""

EARLY = 0.05
"""Seconds by which a timer may be early: else the judgement would have to wait for the next look."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What one look at a passt finds."""

    unread: int
    """Of TIOCOUTQ on a copy of QEMU's end: the memory, in bytes, of what passt has not read. It is the buffers' size,
    not the data's, and one that is read in part counts whole; 0 if and only if everything is read."""
    stopped: bool = False
    """The process is stopped: state T or t of proc_pid_stat(5)."""
    activity: int | None = None
    """Differs from the last look's if the process has run in between, or wants to; None: not known."""
    waiting: int = 0
    """Connections to passt's listening sockets that it has not accepted."""
    unread_by_qemu: int = 0
    """Of FIONREAD: bytes that QEMU has not read."""


class Verdict(enum.Enum):
    """What follows from a look."""

    FINE = "fine"
    ANNOUNCE = "announce"  # have QEMU announce the NIC; whether passt reads that, the next looks tell
    STALLED = "stalled"


@dataclass(slots=True)
class _Lasting:
    """How long something has lasted; for an amount, without any of it going."""

    since: float | None = None
    peak: int = 0

    def note(self, clock: float, amount: int, since: float | None = None) -> float:
        """Seconds up to now; 0 if there is nothing, it has just begun, or some of it has gone.

        :param since: what has just begun began then.
        """
        if amount == 0:
            self.since = None
        elif self.since is None or amount < self.peak:
            self.since = clock if self.since is not None or since is None else since
            self.peak = amount
        self.peak = max(self.peak, amount)
        return 0.0 if self.since is None else clock - self.since


class StallJudge:
    """Judges one stream to one passt. The caller looks and calls :meth:`judge` about every :attr:`next_look` seconds.

    A process that hangs is told after ``timeout`` to ``timeout`` + 1 seconds if it is stopped or the guest speaks, and
    after 2 timeouts + 2 seconds otherwise, with timeouts rounded up to whole seconds.

    :param timeout: seconds; 0: nothing is ever stalled.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.reset()

    def reset(self) -> None:
        """Forget everything: there is a new stream, or the guest is paused, which is no fault of passt's."""
        self._now: float | None = None
        self._clock = self._last_clock = 0.0  # seconds that count, now and at the look before
        self._stopped, self._unread, self._waiting = _Lasting(), _Lasting(), _Lasting()
        self._activity: int | None = None
        self._ran_at = self._read_at = 0.0
        self._announced_at: float | None = None
        self._doubted_at: float | None = None
        self._close_looks = 0
        self._reason = ""

    @property
    def reason(self) -> str:
        """What the last STALLED was for, in words."""
        return self._reason

    @property
    def next_look(self) -> float:
        """Seconds until the next look is worth its while. Whoever always waits a second condemns late, not wrongly."""
        return LOOK_INTERVAL if self._doubted_at is None else CLOSE_LOOK_INTERVAL

    @property
    def quiet(self) -> bool:
        """Whether the process had not run at the last look since the one before: what waits for it matters now."""
        return self._activity is not None and self._ran_at < self._clock

    def judge(self, now: float, signs: Signs) -> Verdict:
        """What follows from ``signs``, seen at ``now`` (seconds of a monotonic clock)."""
        if not self._timeout:
            return Verdict.FINE
        self._tick(now)
        if signs.activity is None or signs.activity != self._activity:
            self._ran_at = self._clock
            if signs.activity is not None:
                self._stopped = _Lasting()  # one that is traced stops all the time, and runs
        self._activity = signs.activity
        stopped_for = self._stopped.note(self._clock, signs.stopped)
        if self._lasts(stopped_for):
            return self._stall(f"the process has been stopped for {stopped_for:.0f} s")
        if signs.unread_by_qemu:
            self._begin_again()
            return Verdict.FINE
        waiting_for = self._waiting.note(self._clock, signs.waiting if self.quiet else 0)
        if self._lasts(self._note_unread(signs.unread)):
            return self._judge_unread(signs.unread)
        self._doubted_at = None
        if self._lasts(waiting_for):
            what = f"{signs.waiting} connection{'s' * (signs.waiting > 1)}"
            return self._stall(
                f"{what} not accepted for {waiting_for:.0f} s, in which the process did not run"
            )
        if signs.unread or signs.stopped or not self._should_ask():
            return Verdict.FINE
        self._announced_at = self._clock
        return Verdict.ANNOUNCE

    def _tick(self, now: float) -> None:
        passed = 0.0 if self._now is None else now - self._now
        self._now, self._last_clock = now, self._clock
        if passed < LATE:
            self._clock += passed

    def _lasts(self, seconds: float) -> bool:
        return seconds > 0 and seconds + EARLY >= self._timeout

    def _stall(self, reason: str) -> Verdict:
        self._reason = reason
        return Verdict.STALLED

    def _begin_again(self) -> None:
        self._unread, self._waiting = _Lasting(), _Lasting()
        self._ran_at = self._read_at = self._clock
        self._doubted_at = None

    def _note_unread(self, unread: int) -> float:
        """How long nothing has been read of what waits; what a question brought waits since the question."""
        before = self._unread.peak if self._unread.since is not None else 0
        asked_just_now = self.quiet and self._announced_at == self._last_clock
        unread_for = self._unread.note(
            self._clock, unread, since=self._last_clock if asked_just_now else None
        )
        if unread < before:
            self._read_at = self._clock
        return unread_for

    def _judge_unread(self, unread: int) -> Verdict:
        what = f"{unread} bytes of buffers not read for {self._clock - (self._unread.since or 0):.0f} s"
        if self._activity is not None and self._lasts(self._clock - self._ran_at):
            return self._stall(f"{what}, in which the process did not run")
        if self._doubted_at is None:
            self._doubted_at, self._close_looks = self._clock, 0
        self._close_looks += 1
        enough = self._clock - self._doubted_at >= max(self._timeout, SHORTEST_CLOSE_LOOK)
        if enough and self._close_looks >= CLOSE_LOOKS:
            return self._stall(what if self._activity is None else f"{what}, though the process runs")
        return Verdict.FINE

    def _should_ask(self) -> bool:
        asked_for = self._clock - (self._announced_at or 0.0)
        if asked_for < self._timeout:
            return False
        if self._activity is None:
            return self._clock - self._read_at >= self._timeout
        if self._clock - self._ran_at >= max(self._timeout, PULSE):
            return True
        return min(asked_for, self._clock - self._read_at) >= RARE * self._timeout


def next_look_at(now: float, wait: float, begun: float) -> float:
    """When to look at the passts of a VM, in seconds of the clock that ``now`` and ``begun`` are of.

    A doubt is followed up after exactly ``wait`` seconds. Else the look falls on the VM's own tick, once per second:
    the looks at all VMs of a process are at no more than ten moments of a second. With 200 VMs that were each looked at
    at a moment of their own, an idle agent woke up 55.9 times per second and took 27.9 ms of CPU (`make bench-agent`).
    In a pair of runs without guests it was 51.8 times and 22.9 ms, and 18.1 times and 14.5 ms with ticks. A look takes
    0.14 ms, so that a tick with 20 of them holds the event loop up for less than 3 ms.

    :param wait: :attr:`StallJudge.next_look`, the least of all that are looked at together.
    :param begun: when the VM was first looked after: that decides upon its tick, for good. Were it the time of the last
        look, each delay of the loop would move a few VMs to a later tick, and none back, until all had the same one.
    """
    if wait < LOOK_INTERVAL:
        return now + wait
    tick = round(begun / TICK) * TICK
    return tick + (round((now - tick) / LOOK_INTERVAL) + 1) * LOOK_INTERVAL
