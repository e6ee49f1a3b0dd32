# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's serial console: one socket of QEMU's, read by the log and by any number of terminals.

QEMU takes one client on it, and whoever does not empty it holds up the guest's writes. So it is read here, always and
at once, and what a terminal does not take in time is that terminal's loss.
"""

from __future__ import annotations

import re
import select
import socket
from collections.abc import Callable

import anyio
import anyio.lowlevel

from qrapd.lines import LineSplitter

__all__ = ["Attachment", "Console"]

HISTORY = 64 * 1024
"""Bytes that are kept for whoever attaches later: a Linux that boots with all its messages says about as much."""

QUEUE = 256 * 1024
"""Bytes that wait for a terminal that does not read: all of the history, and a second's flood of a serial port."""

PIECE = 16 * 1024
"""Bytes at once, either way. A flood's lines are told in between: at two bytes a line a larger piece takes too long."""

LINES_AT_ONCE = 64
"""Lines that are told before other tasks have their turn: at some 20 µs a line, that is about a millisecond."""

INPUT_PATIENCE = 5.0
"""Seconds that input waits for a guest that does not read its serial port: as long as that terminal's next input, and
the news that it has gone, may wait, too."""

BELL = b"\a"

# What a terminal answers by itself, as if it were typed: ECMA-48 and xterm's control sequences. That was asked by a
# program which has had its answer, or has gone; a second one would end up in a shell or at a login prompt.
_QUESTIONS = re.compile(
    rb"\x05|\x1bZ"  # ENQ, DECID
    rb"|\x1b\[(?:\??[0-9;]*n|[>=]?[0-9;]*c|[01]?x)"  # device status, attributes, parameters
    rb"|\x1b\[(?:\??[0-9;]*\$p|>[0-9]*q|\?u)"  # modes, version, keyboard
    rb"|\x1b\[(?:1[1345689]|2[01])[0-9;]*t"  # the window's state, place and size
    rb"|\x1b\][0-9;]*\?(?:\x07|\x1b\\)"  # colours
    rb"|\x1bP[+$]q[^\x1b]*\x1b\\"  # settings
)


class _Tail:
    """The last ``limit`` bytes of what was added and not yet taken."""

    __slots__ = ("_bytes", "_left_out", "_limit")

    def __init__(self, limit: int) -> None:
        self._bytes = bytearray()
        self._limit = limit
        self._left_out = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, chunk: bytes) -> None:
        self._bytes += chunk
        excess = len(self._bytes) - self._limit
        if excess > 0:
            self._drop(excess)

    def _drop(self, count: int) -> None:
        del self._bytes[:count]  # moves a pointer: CPython copies it but now and then
        self._left_out += count

    def look(self) -> bytes:
        """All of it, from a line's start on if the beginning is lost."""
        start = self._bytes.find(b"\n") + 1 if self._left_out else 0
        return bytes(self._bytes[start:])

    def take(self) -> bytes:
        """The oldest :data:`PIECE`; if something before it is lost, the piece says how much and starts a line."""
        notice = b""
        if self._left_out:
            self._drop(self._bytes.find(b"\n") + 1)
            notice = b"\r\n[qrapd: %d bytes left out]\r\n" % self._left_out
            self._left_out = 0
        piece = notice + self._bytes[:PIECE]
        del self._bytes[:PIECE]
        return piece


class Attachment:
    """One terminal at a console. Made by :meth:`Console.attach`; one task may receive and another send."""

    def __init__(self, console: Console, said: bytes) -> None:
        self._console = console
        self._waiting = _Tail(QUEUE)
        self._waiting.add(said)
        self._news = anyio.Event()
        self._closed = False

    async def receive(self) -> bytes:
        """What the guest says next. One who is slow gets less, with a notice where something is missing.

        :raise anyio.EndOfStream: nothing comes any more: see :attr:`Console.guest_ended`.
        """
        while not self._waiting:
            if self._closed or self._console.over:
                raise anyio.EndOfStream
            self._news = anyio.Event()
            await self._news.wait()
        return self._waiting.take()

    async def send(self, data: bytes) -> None:
        """Type it. What several terminals send at once follows one another in pieces of up to :data:`PIECE`.

        If the guest has no ear for it, the rest of it is dropped, and the terminal hears a bell.
        """
        for start in range(0, len(data), PIECE):
            if not await self._console.write(data[start : start + PIECE]):
                self.hear(BELL)
                return

    def hear(self, chunk: bytes) -> None:
        """For the console: here is something to show."""
        self._waiting.add(chunk)
        self._news.set()

    def wake(self) -> None:
        """For the console: there is nothing more to wait for."""
        self._news.set()

    def close(self) -> None:
        """Leave; what waits to be received is still there."""
        self._closed = True
        self._console.detach(self)
        self.wake()


class Console:
    """A guest's serial console, for as long as its QEMU runs or this supervisor has it."""

    def __init__(
        self, end: socket.socket, tell: Callable[[str], None] | None, history: int = HISTORY
    ) -> None:
        """
        :param end: connected and non-blocking; :meth:`run` closes it.
        :param tell: gets every line, made fit for the log; None: no log of it is wanted.
        :param history: bytes that are kept for whoever attaches later.
        """
        self.drained = anyio.Event()
        """set when all that the guest has said is told"""
        self.guest_ended = False
        """whether :attr:`over` came by QEMU's end: otherwise this supervisor has let go of it, and it runs on"""
        self.over = False
        """whether nothing comes any more"""
        self._end = end
        self._tell = tell
        self._history = _Tail(history)
        self._attachments: list[Attachment] = []
        self._typing: anyio.Lock | None = None  # most consoles never have a terminal
        self._deaf = False

    def attach(self, *, history: bool) -> Attachment:
        """A terminal more. ``history``: it first gets what the guest said before, without the questions to terminals.

        Nothing is lost or comes twice between what was said before and what is said from now on.
        """
        said = _QUESTIONS.sub(b"", self._history.look()) if history else b""
        attachment = Attachment(self, said)
        self._attachments.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """For the attachment: it has left."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)

    async def run(self) -> None:
        """Read until QEMU's end. When this returns or is cancelled, every terminal comes to its end."""
        try:
            splitter = LineSplitter()
            while chunk := await self._read():
                self._history.add(chunk)
                for attachment in self._attachments:
                    attachment.hear(chunk)
                if self._tell is not None:
                    for number, line in enumerate(splitter.feed(chunk), start=1):
                        self._tell(line)
                        if number % LINES_AT_ONCE == 0:
                            await anyio.lowlevel.checkpoint()
                # A guest without pauses keeps the socket readable for ever; all other tasks want their turn, too.
                await anyio.lowlevel.checkpoint()
            self.guest_ended = True
            if self._tell is not None:
                for line in splitter.finish():
                    self._tell(line)
        finally:
            self.over = True
            anyio.notify_closing(self._end)  # whoever waits to write to it
            self._end.close()
            for attachment in self._attachments:
                attachment.wake()
            self.drained.set()

    async def _read(self) -> bytes:
        while True:
            try:
                return self._end.recv(PIECE)
            except BlockingIOError:
                await anyio.wait_readable(self._end)
            except ConnectionResetError:
                return b""

    async def write(self, piece: bytes) -> bool:
        """For the attachments: type ``piece`` in one go. False: the guest is deaf, and it was dropped.

        The socket's own buffer is all there is (by default some 200 KiB: socket(7), wmem_default). When it has been
        full for :data:`INPUT_PATIENCE`, nobody waits again before there is room.
        """
        if self.over:
            return True
        if self._deaf and not self._has_room():
            return False
        if self._typing is None:
            self._typing = anyio.Lock()
        with anyio.move_on_after(INPUT_PATIENCE):
            async with self._typing:
                await self._send(piece)
                self._deaf = False
                return True
        self._deaf = True
        return False

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self._end, select.POLLOUT)
        return bool(poll.poll(0))

    async def _send(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest and not self.over:
            try:
                rest = rest[self._end.send(rest) :]
            except BlockingIOError:
                try:
                    await anyio.wait_writable(self._end)
                except anyio.ClosedResourceError:
                    return
            except OSError:
                return  # QEMU has ended, and run() will see it
