# SPDX-License-Identifier: GPL-2.0-or-later
"""The signals that reach qrapd, as events that a task waits for."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Iterator

import anyio

__all__ = ["receive_signals"]


@contextlib.contextmanager
def receive_signals(*numbers: signal.Signals) -> Iterator[AsyncIterator[signal.Signals]]:
    """Receive signals. Afterwards they are ignored: all is over, and must not seem to end violently.

    Closing the receiver puts the default actions back, so they are blocked until they can be ignored.
    """
    try:
        with anyio.open_signal_receiver(*numbers) as signals:
            try:
                yield signals
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
