# SPDX-License-Identifier: GPL-2.0-or-later
"""The held stream: a copy of QEMU's end, by which a link sees passt hang up without ever taking a byte.

The copy keeps the stream open: passt sees its client hang up only when QEMU *and* the holder have let go.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable

import anyio

__all__ = ["HangUpWatch", "HeldStream", "widen"]

BUFFER_SIZE = 4 * 1024 * 1024
"""Bytes. With the default, 208 KiB, a guest behind a hub sent at 0.43 of the speed that it has without one, and
received at 0.45; with this at 0.79 to 1.00, and at 0.38 to 0.94 (QEMU 7.2, several runs: see
benchmarks/README.md)."""

_SO_SNDBUFFORCE = 32
"""As SO_SNDBUF, beyond net.core.wmem_max, for whoever has CAP_NET_ADMIN: Linux' asm-generic/socket.h, socket(7)."""


def widen(end: socket.socket) -> None:
    """Let more wait in a stream for the other end to read it. Without privilege net.core.wmem_max is the most."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_SIZE)
    except OSError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)


class HeldStream:
    """QEMU's end of a stream, held beside QEMU."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    @property
    def fd(self) -> int:
        """To be inherited by QEMU, or lent to it."""
        return self.socket.fileno()

    @property
    def inode(self) -> int:
        """The same for all copies of this end, in whatever process."""
        return os.fstat(self.fd).st_ino

    def hang_up(self) -> None:
        """End the stream for everybody: passt sees its client go, whatever copies of this end are still open."""
        with contextlib.suppress(OSError):  # the other end has gone already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go."""
        self.socket.close()


class HangUpWatch:
    """One epoll for any number of held streams. EPOLLRDHUP tells within 6 ms and consumes nothing (measured)."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}

    def add(self, stream: HeldStream, tell: Callable[[], None]) -> None:
        """Call ``tell``, once, when the other end of ``stream`` has hung up."""
        self._told[stream.fd] = tell
        self._epoll.register(stream.fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def remove(self, stream: HeldStream) -> None:
        """Must come before the stream is closed: QEMU's copy would keep it in the epoll, under a number used anew."""
        if self._told.pop(stream.fd, None) is not None:
            self._epoll.unregister(stream.fd)

    async def run(self) -> None:
        """Watch, until cancelled."""
        while True:
            await anyio.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0):
                if tell := self._told.get(fd):
                    tell()

    def close(self) -> None:
        """Give back the epoll."""
        self._epoll.close()
