# SPDX-License-Identifier: GPL-2.0-or-later
"""The console's broker, over a socketpair whose other end plays QEMU's serial port."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from qrapd import console
from qrapd.console import Attachment, Console

PATIENCE = 30.0


class Port:
    """QEMU's end of the console."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.supervision = anyio.CancelScope()
        """cancelled when the supervisor lets go of the VM"""

    async def say(self, words: bytes) -> None:
        """Write all of it, however slow the reader is."""
        while words:
            try:
                words = words[self.end.send(words) :]
            except BlockingIOError:
                await anyio.wait_writable(self.end)

    async def hear(self, count: int) -> bytes:
        """Read so many bytes."""
        heard = b""
        while len(heard) < count:
            try:
                heard += self.end.recv(count - len(heard))
            except BlockingIOError:
                await anyio.wait_readable(self.end)
        return heard


@asynccontextmanager
async def running(
    tell: Callable[[str], None] | None = None, history: int = console.HISTORY
) -> AsyncIterator[tuple[Console, Port]]:
    """A console that is read, and the other end of its socket."""
    ours, qemus = socket.socketpair()
    ours.setblocking(False)
    with qemus, anyio.fail_after(PATIENCE):
        broker, port = Console(ours, tell, history), Port(qemus)

        async def run() -> None:
            with port.supervision:
                await broker.run()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            yield broker, port
            port.supervision.cancel()


async def receive(attachment: Attachment, *, until: bytes) -> bytes:
    """What comes, up to some words and what comes with them."""
    heard = b""
    while until not in heard:
        heard += await attachment.receive()
    return heard


async def rest_of(attachment: Attachment) -> bytes:
    """All that still comes."""
    heard = b""
    while True:
        try:
            heard += await attachment.receive()
        except anyio.EndOfStream:
            return heard


async def test_lines_are_told() -> None:
    """Every line is told in order, and the last one without an end of its own when the guest ends."""
    lines: list[str] = []
    async with running(lines.append) as (broker, port):
        await port.say(b"one\r\n\x1b[1mtwo\x1b[0m\r\nlogin: ")
        port.end.close()
        await broker.drained.wait()
        assert ["one", "two", "login:"] == lines
        assert broker.guest_ended


async def test_all_terminals_see_the_same() -> None:
    """Two terminals get the same bytes, unchanged; a later one gets what was said before, and no byte twice."""
    async with running() as (broker, port):
        first, second = broker.attach(history=True), broker.attach(history=False)
        await port.say(b"\x1b[2Jone\r\n\xff\x00")
        assert b"\x1b[2Jone\r\n\xff\x00" == await receive(first, until=b"\x00")
        late, later = broker.attach(history=True), broker.attach(history=False)
        await port.say(b"two\r\n")
        port.end.close()
        assert b"two\r\n" == await rest_of(first)
        assert b"\x1b[2Jone\r\n\xff\x00two\r\n" == await rest_of(second)
        assert b"\x1b[2Jone\r\n\xff\x00two\r\n" == await rest_of(late)
        assert b"two\r\n" == await rest_of(later)
        assert b"" == await rest_of(broker.attach(history=False))
        assert b"\x1b[2Jone\r\n\xff\x00two\r\n" == await rest_of(broker.attach(history=True))


async def test_history_begins_with_a_line() -> None:
    """Only the last bytes are kept, and shown from a line's start on."""
    async with running(history=95) as (broker, port):
        watcher = broker.attach(history=False)
        said = b"".join(b"line %03d\r\n" % n for n in range(50))
        await port.say(said)
        await receive(watcher, until=b"line 049\r\n")
        kept = await broker.attach(history=True).receive()
        assert said.endswith(kept)
        assert kept.startswith(b"line ")
        assert 90 == len(kept)


@pytest.mark.parametrize(
    "question",
    [
        b"\x05",
        b"\x1b[6n",
        b"\x1b[?6n",
        b"\x1b[c",
        b"\x1b[>0c",
        b"\x1b[18t",
        b"\x1b[14;2t",
        b"\x1b]11;?\x1b\\",
        b"\x1b]4;1;?\x07",
        b"\x1b[?2026$p",
        b"\x1b[>q",
        b"\x1b[?u",
        b"\x1bP$qm\x1b\\",
        b"\x1bZ",
    ],
)
async def test_history_asks_no_questions(question: bytes) -> None:
    """A terminal's answers to what was asked long ago would be typed into a shell; what is asked now gets through."""
    async with running() as (broker, port):
        watcher = broker.attach(history=False)
        await port.say(b"\x1b[1;31mred\x1b[0m" + question + b"$ ")
        assert question in await receive(watcher, until=b"$ ")
        assert b"\x1b[1;31mred\x1b[0m$ " == await broker.attach(history=True).receive()


async def test_slow_terminal_loses_bytes() -> None:
    """One that does not read holds nobody up, keeps the newest, and is told how much is missing."""
    lines: list[str] = []
    async with running(lines.append) as (broker, port):
        slow, quick = broker.attach(history=False), broker.attach(history=False)
        said = b"".join(b"line %06d\r\n" % n for n in range(60_000))
        heard = b""

        async def read() -> None:
            nonlocal heard
            heard = await rest_of(quick)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await port.say(said)
            port.end.close()
        assert said == heard
        assert 60_000 == len(lines)
        late = await rest_of(slow)
        notice, _, rest = late.removeprefix(b"\r\n[qrapd: ").partition(b" bytes left out]\r\n")
        assert len(said) - int(notice) == len(rest)
        assert rest.startswith(b"line ")
        assert said.endswith(rest)
        assert console.QUEUE - 20 < len(rest) <= console.QUEUE


async def test_memory_is_bounded() -> None:
    """Many terminals that never read, and a guest that never stops: what is kept is what it says on the tin."""
    async with running() as (broker, port):
        sleepers = [broker.attach(history=True) for _ in range(5)]
        watcher = broker.attach(history=False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(port.say, b"y" * 3_000_000 + b"end")
            await receive(watcher, until=b"end")
        assert [console.QUEUE] * 5 == [len(each._waiting) for each in sleepers]
        assert len(broker._history) == console.HISTORY


async def test_flood_leaves_others_their_turn() -> None:
    """While a guest floods, other tasks get their turn: many times for each piece that is read."""
    turns = told = 0

    def tell(_: str) -> None:
        nonlocal told
        told += 1

    async with running(tell) as (_broker, port):

        async def count() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await port.say(b"y\n" * 200_000)
            port.end.close()
            await _broker.drained.wait()
            tasks.cancel_scope.cancel()
        assert told == 200_000
        assert turns >= told / console.LINES_AT_ONCE


async def test_typing_arrives_in_pieces() -> None:
    """What several terminals type at once follows one another, each piece whole and each terminal's in order."""
    async with running() as (broker, port):

        async def type_in(letter: int) -> None:
            terminal = broker.attach(history=False)
            pick = random.Random(letter)
            for number in range(100):
                await terminal.send(b"<%c%02d%s>" % (letter, number, bytes([letter]) * pick.randrange(5_000)))

        async with anyio.create_task_group() as tasks:
            for letter in b"abc":
                tasks.start_soon(type_in, letter)
            expected = sum(
                100 * len(b"<a00>") + sum(pick.randrange(5_000) for _ in range(100))
                for pick in map(random.Random, b"abc")
            )
            heard = await port.hear(expected)
        pieces = heard.decode().removesuffix(">").split(">")
        for piece in pieces:
            assert 1 == len(set(piece[1]) | set(piece[4:])), piece[:20]
        for name in "abc":
            assert [f"<{name}{n:02d}" for n in range(100)] == [p[:4] for p in pieces if p[1] == name]


async def test_deaf_guest_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input for a guest that does not read its port is dropped with a bell; once it reads again, it is typed to."""
    monkeypatch.setattr(console, "INPUT_PATIENCE", 0.1)
    async with running() as (broker, port):
        terminal, other = broker.attach(history=False), broker.attach(history=False)
        await terminal.send(b"x" * 5_000_000)  # returns
        assert b"\a" == await terminal.receive()
        monkeypatch.setattr(console, "INPUT_PATIENCE", PATIENCE * 2)  # nobody waits a second time
        await other.send(b"y")
        assert b"\a" == await other.receive()
        await port.say(b"still here")
        assert b"still here" == await terminal.receive()
        with contextlib.suppress(BlockingIOError):
            while True:
                assert set(port.end.recv(100_000)) == set(b"x")
        await terminal.send(b"z")
        assert b"z" == await port.hear(1)


@pytest.mark.parametrize("guest_ends", [True, False])
async def test_waiting_input_ends_with_the_guest(guest_ends: bool) -> None:
    """One who waits for a deaf guest does so no longer when QEMU ends, or when the supervisor lets go."""
    async with running() as (broker, port):
        terminal = broker.attach(history=False)
        with anyio.fail_after(console.INPUT_PATIENCE * 0.9):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(terminal.send, b"x" * 5_000_000)
                await anyio.wait_all_tasks_blocked()
                if guest_ends:
                    port.end.close()
                else:
                    port.supervision.cancel()
        assert b"" == await rest_of(terminal)  # no bell


async def test_let_go() -> None:
    """When the supervisor lets go of a VM that runs on, terminals come to their end: not that of the guest."""
    async with running() as (broker, port):
        terminal = broker.attach(history=False)
        await port.say(b"words")
        assert b"words" == await terminal.receive()
    assert broker.over
    assert not broker.guest_ended
    with pytest.raises(anyio.EndOfStream):
        await terminal.receive()
    await terminal.send(b"to nobody")


async def test_leaving() -> None:
    """A terminal that has left gets no more, and keeps no place; who waited for it is woken up."""
    async with running() as (broker, port):
        stays, leaves = broker.attach(history=False), broker.attach(history=False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rest_of, leaves)
            await anyio.wait_all_tasks_blocked()
            leaves.close()
        await port.say(b"words")
        await stays.receive()
        assert 0 == len(leaves._waiting)
        assert [stays] == broker._attachments
        leaves.close()
