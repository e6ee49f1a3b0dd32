# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor, of a real QEMU: commands, events, and every way in which it can fall silent."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from qrapd.errors import ExitStatus, QmpFailed
from qrapd.process import Process, spawn
from qrapd.qmp import Qmp

PATIENCE = 30.0


@dataclass
class Monitored:
    """A QEMU without a machine, and a connection to its monitor."""

    process: Process
    connection: socket.socket

    async def connect(self) -> Qmp:
        """Start a session."""
        return await Qmp.connect(self.connection, "test")


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Monitored]:
    """A QEMU that is gone afterwards, whatever happens."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
        listener.bind(str(tmp_path / "qmp.sock"))
        listener.listen(1)
        connection.connect(listener.getsockname())
        argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-S", "-nodefaults"]
        argv += ["-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"]
        argv += ["-mon", "chardev=qmp,mode=control"]
        process = await spawn(argv, pass_fds=[listener.fileno()])
        listener.close()
        try:
            with anyio.fail_after(PATIENCE):
                yield Monitored(process, connection)
        finally:
            with anyio.CancelScope(shield=True):
                process.send_signal(signal.SIGKILL)
                await process.wait()
            process.close()
            os.close(process.output)


@asynccontextmanager
async def session(qemu: Monitored) -> AsyncIterator[Qmp]:
    """A session that is closed afterwards."""
    qmp = await qemu.connect()
    try:
        yield qmp
    finally:
        await qmp.close()


async def ask_for_status(connection: socket.socket) -> None:
    """A session of one question."""
    qmp = await Qmp.connect(connection, "test")
    try:
        await qmp.execute("query-status")
    finally:
        await qmp.close()


def ignore(_name: str, _data: Mapping[str, Any]) -> None:
    """An event that is of no interest."""


async def test_commands_and_their_results(tmp_path: Path) -> None:
    """What QEMU returns comes back; arguments go along."""
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        assert "prelaunch" == (await qmp.execute("query-status"))["status"]
        assert {} == await qmp.execute("object-add", {"qom-type": "iothread", "id": "io"})
        assert ["io"] == [thread["id"] for thread in await qmp.execute("query-iothreads")]


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("no-such-command", None, "no-such-command has not been found"),
        ("object-add", {"qom-type": "nothing", "id": "x"}, "nothing"),
        ("object-add", {}, "is missing"),
    ],
)
async def test_a_refused_command(
    command: str, arguments: Mapping[str, object] | None, words: str, tmp_path: Path
) -> None:
    """Command and QEMU's own words; the session goes on."""
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        with pytest.raises(QmpFailed) as caught:
            await qmp.execute(command, arguments)
        assert caught.value.message.startswith(f"QEMU refused {command}: ")
        assert words in caught.value.message
        assert ExitStatus.FAILED == caught.value.exit_status
        assert "prelaunch" == (await qmp.execute("query-status"))["status"]


async def test_commands_of_several_tasks(tmp_path: Path) -> None:
    """Each gets its own answer."""
    answers: list[str] = []

    async def ask(qmp: Qmp, path: str) -> None:
        answers.append(f"{path} {await qmp.execute('qom-get', {'path': path, 'property': 'type'})}")

    async with running(tmp_path) as qemu, session(qemu) as qmp:
        paths = ["/machine", "/machine/peripheral", "/machine/unattached"]
        async with anyio.create_task_group() as tasks:
            for path in paths * 3:
                tasks.start_soon(ask, qmp, path)
    expected = ["/machine none-machine", "/machine/peripheral container", "/machine/unattached container"]
    assert sorted(expected * 3) == sorted(answers)


async def test_events_are_handed_on_to_the_last(tmp_path: Path) -> None:
    """SHUTDOWN says why QEMU ends, just before it does: it must not be lost with the session."""
    seen: list[tuple[str, Mapping[str, Any]]] = []
    async with running(tmp_path) as qemu, session(qemu) as qmp, anyio.create_task_group() as tasks:
        tasks.start_soon(qmp.watch, lambda name, data: seen.append((name, data)))
        await qmp.execute("quit")
        await qemu.process.wait()
    name, data = seen[-1]
    assert ("SHUTDOWN", "host-qmp-quit") == (name, data["reason"])


async def test_a_sigterm_is_told_as_an_event(tmp_path: Path) -> None:
    """By it a QEMU that others have ended is told from a guest that has powered down."""
    seen: dict[str, Mapping[str, Any]] = {}
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        qemu.process.send_signal(signal.SIGTERM)
        await qmp.watch(seen.__setitem__)
    assert "host-signal" == seen["SHUTDOWN"]["reason"]


async def test_a_killed_qemu_ends_the_watch(tmp_path: Path) -> None:
    """kill -9 sends no event; the watch ends nevertheless, and later commands are refused."""
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(qmp.watch, ignore)
            await qmp.execute("query-status")
            qemu.process.send_signal(signal.SIGKILL)
        with pytest.raises(QmpFailed, match=r"^QEMU hung up while asked to query-status$"):
            await qmp.execute("query-status")
        await qmp.watch(ignore)  # returns at once


async def test_a_killed_qemu_ends_a_command(tmp_path: Path) -> None:
    """A command that is under way fails at once, long before its timeout."""
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        qemu.process.send_signal(signal.SIGSTOP)
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                with pytest.raises(QmpFailed, match=r"^QEMU hung up while asked to query-status$"):
                    await qmp.execute("query-status", timeout=PATIENCE * 2)

            tasks.start_soon(ask)
            await anyio.lowlevel.checkpoint()
            qemu.process.send_signal(signal.SIGKILL)


async def test_a_qemu_that_hangs(tmp_path: Path) -> None:
    """No answer within the time given is a failure that says so; once it goes on, so does the session."""
    async with running(tmp_path) as qemu, session(qemu) as qmp:
        qemu.process.send_signal(signal.SIGSTOP)
        before = time.monotonic()
        with pytest.raises(QmpFailed, match=r"^QEMU did not answer query-status within 0\.2 s$"):
            await qmp.execute("query-status", timeout=0.2)
        assert 0.2 <= time.monotonic() - before < PATIENCE / 2
        qemu.process.send_signal(signal.SIGCONT)
        # The late answer is nobody's; the next one is ours.
        assert "qemu" in await qmp.execute("query-version")


async def test_closing_a_session_with_a_qemu_that_hangs(tmp_path: Path) -> None:
    """An end is an end: nothing waits for a QEMU that does not listen."""
    async with running(tmp_path) as qemu:
        qmp = await qemu.connect()
        qemu.process.send_signal(signal.SIGSTOP)
        with anyio.fail_after(PATIENCE / 2):
            await qmp.close()
            await qmp.close()


async def test_a_qemu_that_dies_before_it_greets(tmp_path: Path) -> None:
    """A connection that was waiting is told so instead of waiting on."""
    async with running(tmp_path) as qemu:
        qemu.process.send_signal(signal.SIGKILL)
        with pytest.raises(QmpFailed, match="QEMU's monitor did not answer"):
            await qemu.connect()


async def test_a_qemu_that_dies_once_it_has_negotiated() -> None:
    """At whatever moment the hang-up is seen, it is one, and no bug."""
    greeting = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}'
    negotiated = b'{"return": {}, "id": "__qmp#00000"}'
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"%b\r\n%b\r\n" % (greeting, negotiated))
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(QmpFailed):
                await ask_for_status(ours)


async def test_something_else_than_qemu() -> None:
    """What speaks another language is no monitor."""
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.send(b"220 mail ready\r\n")
        with anyio.fail_after(PATIENCE), pytest.raises(QmpFailed, match="QEMU's monitor did not answer"):
            await Qmp.connect(ours, "test")


async def test_connecting_can_be_cancelled() -> None:
    """A monitor that never greets holds up nobody for longer than they like."""
    ours, peer = socket.socketpair()
    with ours, peer:
        with anyio.move_on_after(0.1) as scope:
            await Qmp.connect(ours, "test")
        assert scope.cancelled_caught
        assert b"" == peer.recv(1)  # and the connection is closed
