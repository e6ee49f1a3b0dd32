# SPDX-License-Identifier: GPL-2.0-or-later
"""The signals that reach qrapd, as events that a task waits for; and those that are for the qrapd after it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from signal import Signals
from types import FrameType

import anyio

__all__ = ["Received", "pass_on", "receive_signals"]

_held: list[int] = []
"""Signals are the process's, and so is this."""


class Received:
    """Signals, in the order in which they come."""

    def __init__(self, signals: AsyncIterator[Signals], numbers: Sequence[Signals]) -> None:
        self._signals = signals
        self._numbers = numbers
        self.held = False

    def __aiter__(self) -> AsyncIterator[Signals]:
        return self._signals

    def hold(self) -> None:
        """From now on keep them for the program that this process becomes: see :func:`pass_on`."""
        self.held = True
        for number in self._numbers:
            signal.signal(number, _hold)


def _hold(number: int, _: FrameType | None) -> None:
    _held.append(number)


@contextlib.contextmanager
def receive_signals(*numbers: Signals) -> Iterator[Received]:
    """Receive signals. Afterwards they are ignored: all is over, and must not seem to end violently.

    Closing the receiver puts the default actions back, so they are blocked until they can be ignored, or held.
    """
    try:
        with anyio.open_signal_receiver(*numbers) as signals:
            # What came between the program that was here before and this moment.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            received = Received(signals, numbers)
            try:
                yield received
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    finally:
        for number in numbers:
            signal.signal(number, _hold if received.held else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def pass_on() -> None:
    """Have what was held wait for the next program in this process: what is blocked and pending outlives execve(2).

    That one gets it from :func:`receive_signals`.
    """
    numbers = [number for number in Signals if signal.getsignal(number) is _hold]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in _held:
        os.kill(os.getpid(), number)
