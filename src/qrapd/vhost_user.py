# SPDX-License-Identifier: GPL-2.0-or-later
"""A vhost-user link: QEMU shares the guest's memory with passt, and each frame is copied once less.

QEMU's chardev does not poll for a passt to come back. A new one is started on a socketpair, asked for a sign of life,
and the other end is given to the chardev by QMP: ``getfd`` and ``add_client`` (40 kills of passt with QEMU 10.0, none
lost: measured). QEMU speaks to a vhost-user backend in its main loop and waits for the answers, so that one that has
answered already is worth the more; and there is no socket in the file system that passt would have to reach.

Only the first connection is one that QEMU makes, to a socket of ours: its chardev refuses ``fd=`` for this purpose
(:func:`qrapd.link_modes.vhost_user_netdev`). A passt has shown by then that the options and the ports are right. It
cannot change its socket, and so another one is started in its place while QEMU waits.

The guest sees its link go down and up. It has to: nobody but the guest can tell a new passt of the guest, as QEMU's
announcements do not reach a vhost-user passt, and what makes a guest speak is that its link is back.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from qrapd.connection import Connection
from qrapd.errors import QmpFailed, Unavailable
from qrapd.link import Link, LinkState
from qrapd.link_modes import chardev_id, nic_netdev_id
from qrapd.logs import Emit
from qrapd.passt import ANSWER_TIMEOUT, Passt
from qrapd.plan import LinkPlan
from qrapd.process import ExitStatus
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import LinkRecord
from qrapd.stream import HangUpWatch, HeldStream
from qrapd.surroundings import Port

if TYPE_CHECKING:
    from qrapd.qmp import Qmp

__all__ = ["ChardevPort", "VhostUserLink"]

SHORTEST_DOWN = 0.05
"""Seconds. A guest that was too slow to see its link go down would see nothing come up either, say nothing, and stay
unknown to the new passt: with 2 ms that happened 3 times in 36, with 15 ms and more not once in 80 (measured)."""

NOTICE_TIMEOUT = 5.0
"""Seconds for QEMU to notice that a connection is there or gone. It takes about a millisecond."""

# The vhost-user protocol's header: request, flags, size; VHOST_USER_GET_FEATURES, version 1, no payload.
_GET_FEATURES = struct.pack("=III", 1, 1, 0)
_ANSWER_SIZE = 12 + 8  # a header and 64 bits of features


@dataclass
class _Connection(Connection):
    """QEMU's connection to a passt that plays the part of its NIC."""

    accepted: bool = False
    """whether ``stream`` is passt's end, of a connection that QEMU made, rather than QEMU's"""

    def watch(self, hang_ups: HangUpWatch, tasks: TaskGroup, tell: Callable[[], None]) -> None:
        """Call ``tell`` when passt has hung up or ended; its own end tells of QEMU only."""
        if self.accepted:
            assert self.passt is not None
            tasks.start_soon(self._watch_process, self.passt, tell)
        else:
            super().watch(hang_ups, tasks, tell)

    @property
    def unread(self) -> tuple[int | None, int | None]:
        """What waits there is QEMU's and passt's talk of the guest's memory, and no frames."""
        return None, None

    def introduce(self, mac: str, addresses: tuple[str, ...]) -> None:
        """Nothing: there are no frames on this socket."""


async def _acquire(plan: LinkPlan, directory: Path, emit: Emit, tasks: TaskGroup) -> Connection:
    """Start a passt that waits for QEMU, and has answered.

    :raise Unavailable: passt cannot be run, ended (its words are quoted), or does not answer.
    """
    ours, passts = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    stream = HeldStream(ours)
    try:
        passt = await _start(plan, passts, directory, emit, tasks)
    except BaseException:
        stream.close()
        raise
    connection = _Connection(stream, passt, passt.pid, None)
    try:
        await _wait_until_alive(passt, ours)
    except BaseException:
        await connection.see_off()
        assert connection.status is not None
        emit("passt.exited", pid=passt.pid, **connection.status.fields)
        raise
    return connection


async def _serve(
    plan: LinkPlan, end: socket.socket, directory: Path, emit: Emit, tasks: TaskGroup
) -> Connection:
    """Start a passt on a connection that QEMU has made.

    :raise Unavailable: passt cannot be run.
    """
    held = HeldStream(end.dup())
    try:
        passt = await _start(plan, end, directory, emit, tasks)
    except BaseException:
        held.close()
        raise
    return _Connection(held, passt, passt.pid, None, accepted=True)


async def _start(plan: LinkPlan, end: socket.socket, directory: Path, emit: Emit, tasks: TaskGroup) -> Passt:
    passt = await Passt.start(
        plan.passt,
        end,
        directory=directory,
        tasks=tasks,
        tell=lambda line: emit("passt.output", line=line),
    )
    emit("passt.started", pid=passt.pid)
    return passt


async def _wait_until_alive(passt: Passt, peer: socket.socket) -> None:
    """Wait until passt answers a question of the protocol that changes nothing."""
    status: ExitStatus | None = None
    answer = b""

    async def watch(scope: anyio.CancelScope) -> None:
        nonlocal status
        status = await passt.wait()
        scope.cancel()

    with anyio.move_on_after(ANSWER_TIMEOUT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            # A passt that ends hangs up as well; `watch` knows how it ended.
            with contextlib.suppress(ConnectionError):
                peer.send(_GET_FEATURES)
                while len(answer) < _ANSWER_SIZE:
                    await anyio.wait_readable(peer)
                    chunk = peer.recv(_ANSWER_SIZE - len(answer))
                    if not chunk:
                        raise ConnectionResetError
                    answer += chunk
                tasks.cancel_scope.cancel()
    if len(answer) == _ANSWER_SIZE:
        return
    if status is not None:
        raise passt.explain_end(status)
    raise Unavailable(
        f"passt (pid {passt.pid}) did not answer as a vhost-user backend within {ANSWER_TIMEOUT:g} s of its start",
        hint="look at what it wrote (passt.output events); try it by hand with the line of `qrapd plan`",
    )


class ChardevPort:
    """A vhost-user link's place in a running QEMU, as :class:`qrapd.hub.HubPort` is that of one with a hub."""

    def __init__(self, link: int) -> None:
        self._chardev = chardev_id(link)
        self._netdev = nic_netdev_id(link)
        self._last = 0
        self._connections = 0
        self._down_since: float | None = None
        self._changed = anyio.Event()

    def note_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Take notice of an event of QEMU's."""
        if data.get("netdev-id") != self._netdev:
            return
        if name == "NETDEV_VHOST_USER_DISCONNECTED":
            self._down_since = time.monotonic()
        elif name == "NETDEV_VHOST_USER_CONNECTED":
            self._down_since = None
            self._connections += 1
        self._changed.set()
        self._changed = anyio.Event()

    async def swap(self, qmp: Qmp, stream: int) -> None:
        """Connect the NIC to a passt, by the other end of its socket, and see the link come back.

        :raise QmpFailed: QEMU refused, hung up, or the link has not come back.
        """
        # Until QEMU has noticed the end of one connection it refuses another.
        with anyio.move_on_after(NOTICE_TIMEOUT):
            while self._down_since is None:
                await self._changed.wait()
        if self._down_since is not None:
            await anyio.sleep(max(0, self._down_since + SHORTEST_DOWN - time.monotonic()))
        self._last += 1
        name, before = f"{self._chardev}-{self._last}", self._connections
        await qmp.lend_fd(stream, name)
        try:
            await qmp.execute("add_client", {"protocol": self._chardev, "fdname": name})
        except QmpFailed:
            with contextlib.suppress(QmpFailed):  # most likely it has been used up
                await qmp.execute("closefd", {"fdname": name})
            raise
        with anyio.move_on_after(NOTICE_TIMEOUT):
            while self._connections == before:
                await self._changed.wait()
        if self._connections == before:
            raise QmpFailed(
                f"QEMU took a new passt for {self._netdev}, and the link is not back after {NOTICE_TIMEOUT:g} s",
                hint="see what QEMU and passt wrote (qemu.output and passt.output events)",
            )

    @property
    def number(self) -> int:
        """Of the last connection that QEMU was given."""
        return self._last

    def adopt(self, number: int, *, swapping: bool) -> None:
        """Go on where another supervisor was."""
        self._last = number + swapping

    async def announce(self, qmp: Qmp) -> None:
        """Nothing: QEMU has no way to announce a NIC whose frames it does not handle."""


class VhostUserLink(Link):
    """One NIC whose part passt plays."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._listener: socket.socket | None = None

    @property
    def stream_fd(self) -> int | None:
        """None: QEMU connects to the socket that `serve` is given."""
        return None

    def _make_port(self) -> Port:
        self._chardev = ChardevPort(self.plan.index)
        return self._chardev

    def note_qemu_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Whether the link is there or gone, QEMU tells."""
        self._chardev.note_event(name, data)

    async def _get_connection(self, tasks: TaskGroup) -> Connection:
        return await _acquire(self.plan, self._around.directory, self._emit, tasks)

    def _tell_connected(self) -> None:
        """Not yet: the passt that has shown that one can be started is not the one that QEMU will have."""
        self.generation = FIRST_GENERATION

    def serve(self, listener: socket.socket) -> None:
        """Wait for QEMU on a socket, and start a passt on the connection that it makes."""
        self._listener = listener
        if self.state is LinkState.CONNECTED:
            self._begin(self._welcome)

    def _take_over(self, record: LinkRecord, end: socket.socket | None, passt: Passt | None) -> Connection:
        connection = _Connection.adopt(record, end, passt)
        assert isinstance(connection, _Connection)
        connection.accepted = True  # passt's own end tells of its loss, and no stream
        if connection.passt is None:
            self._chardev.note_event(
                "NETDEV_VHOST_USER_DISCONNECTED", {"netdev-id": nic_netdev_id(record.index)}
            )
        return connection

    def _is_whole(self, connection: Connection) -> bool:
        return connection.passt is not None

    async def _welcome(self) -> None:
        assert self._listener is not None
        assert self._tasks is not None
        await anyio.wait_readable(self._listener)
        end, _ = self._listener.accept()
        with end:
            self._stop_listening()
            # Let go of before it ends: its end is no loss.
            first, self._connection = self._connection, None
            if first is not None:
                with anyio.CancelScope(shield=True):
                    await self._see_off(first)
            try:
                connection = await _serve(self.plan, end, self._around.directory, self._emit, self._tasks)
            except Unavailable as error:
                self._around.note_failed_start(error)
                return
        self._connection = connection
        connection.watch(self._around.hang_ups, self._tasks, partial(self._note_hang_up, connection))
        super()._tell_connected()
        self._around.note_change()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                Path(self._listener.getsockname()).unlink()
            self._listener.close()
            self._listener = None

    async def release(self) -> None:
        """As every link, and wait for QEMU no more."""
        await super().release()
        self._stop_listening()
