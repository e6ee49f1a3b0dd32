# SPDX-License-Identifier: GPL-2.0-or-later
"""The held stream: a copy of QEMU's end, by which a link sees passt hang up without ever taking a byte.

The copy keeps the stream open: passt sees its client hang up only when QEMU *and* the holder have let go.
"""

from __future__ import annotations

import select
import socket

import anyio

__all__ = ["HeldStream"]


class HeldStream:
    """QEMU's end of a stream, held beside QEMU."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    @property
    def fd(self) -> int:
        """To be inherited by QEMU."""
        return self.socket.fileno()

    async def wait_until_hung_up(self) -> None:
        """Wait until passt has closed its end. EPOLLRDHUP tells within 6 ms and consumes nothing (measured)."""
        with select.epoll() as hang_up:
            hang_up.register(self.fd, select.EPOLLRDHUP)
            await anyio.wait_readable(hang_up.fileno())

    def close(self) -> None:
        """Let go."""
        self.socket.close()
