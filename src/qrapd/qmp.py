# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor: qemu.qmp with the deadlines that it leaves to its callers.

Importing this module costs about 30 ms (qemu.qmp); what starts a QEMU imports it while QEMU comes up.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import anyio
from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    StateError,
)
from qemu.qmp.protocol import Runstate

from qrapd.errors import QmpFailed, QmpRefused

__all__ = ["Command", "Qmp"]

COMMAND_TIMEOUT = 10.0
"""Seconds. QEMU answers in under a millisecond unless its main loop hangs; there is no other sign of that."""

# What qemu.qmp would log itself (a hang-up, a protocol error) reaches its caller as an exception as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


EventHandler = Callable[[str, Mapping[str, Any]], None]

Command = tuple[str, Mapping[str, object]]
"""A command's name and its arguments."""


class Qmp:
    """A session on a monitor. One at a time: QEMU lets a second client wait until the first has left."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._lending = anyio.Lock()

    @classmethod
    async def connect(cls, connection: socket.socket, name: str) -> Qmp:
        """Take over a connected socket and negotiate; waits for QEMU for as long as the caller's scope lets it.

        :raise QmpFailed: QEMU hung up or spoke something else.
        """
        connection.setblocking(False)
        client = QMPClient(name)
        try:
            await client.connect(connection)
        except ConnectError as error:
            raise QmpFailed(
                f"QEMU's monitor did not answer as one does ({type(error.exc).__name__})",
                hint="is `binary` really QEMU? See what it wrote (qemu.output events)",
            ) from error
        except BaseException as error:  # a cancellation
            await cls(client).close()
            if isinstance(error, AssertionError):
                # qemu.qmp takes it for granted that nobody hangs up in the moment in which the negotiation succeeds.
                raise QmpFailed("QEMU hung up as soon as its monitor had answered") from error
            raise
        return cls(client)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Carry out one command and return its result.

        :param timeout: seconds.
        :raise QmpRefused: QEMU refused.
        :raise QmpFailed: it hung up, or did not answer in time.
        """
        try:
            with anyio.fail_after(timeout):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpRefused(f"QEMU refused {command}: {error}") from error
        except TimeoutError:
            raise QmpFailed(f"QEMU did not answer {command} within {timeout:g} s") from None
        except (ExecInterruptedError, StateError) as error:
            raise QmpFailed(f"QEMU hung up while asked to {command}") from error

    async def execute_all(
        self, commands: Sequence[Command], *, refusable: bool = False, then: Command | None = None
    ) -> None:
        """Carry out several commands in this order, sent without waiting for the answers in between.

        QEMU takes one command in a turn of its main loop: under load each answer waited for costs milliseconds.

        :param refusable: that QEMU refuses some of them is no failure.
        :param then: a last command, which must not be refused.
        :raise QmpFailed: of the first that failed; those after it were carried out all the same.
        """
        failures: list[QmpFailed | None] = [None] * (len(commands) + 1)

        async def attempt(index: int, command: Command) -> None:
            try:
                await self.execute(*command)
            except QmpRefused as error:
                failures[index] = None if refusable and index < len(commands) else error
            except QmpFailed as error:
                failures[index] = error

        async with anyio.create_task_group() as tasks:
            # Tasks begin in the order in which they are started, and each sends before it waits.
            for index, command in enumerate([*commands, *([then] if then else [])]):
                tasks.start_soon(attempt, index, command)
        for failure in failures:
            if failure is not None:
                raise failure

    async def lend_fd(self, fd: int, name: str) -> None:
        """Give QEMU a copy of an open file under a name, for a command that takes one.

        :raise QmpFailed: as for :meth:`execute`.
        """
        # QEMU keeps just the fd that came last until a getfd: four pairs of the two at once lost three fds (measured).
        async with self._lending:
            try:
                self._client.send_fd_scm(fd)
            except (OSError, StateError) as error:
                raise QmpFailed("QEMU hung up, or hangs, while it was to be given a stream") from error
            await self.execute("getfd", {"fdname": name})

    async def watch(self, handle: EventHandler) -> None:
        """Give each of QEMU's events (name and data) to ``handle`` until the session ends."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._deliver, handle)
            # A listener stays silent for ever after a kill -9 of QEMU (measured); the run state tells of it.
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()
            tasks.cancel_scope.cancel()
        for message in self._client.events.clear():
            _hand_on(message, handle)

    async def _deliver(self, handle: EventHandler) -> None:
        async for message in self._client.events:
            _hand_on(message, handle)

    async def close(self) -> None:
        """End the session, whatever state it is in."""
        with anyio.move_on_after(1, shield=True), contextlib.suppress(EOFError, OSError, QMPError):
            # Raises what ended the reader (EOFError when QEMU has hung up), which by now is no news.
            await self._client.disconnect()


def _hand_on(message: Message, handle: EventHandler) -> None:
    handle(str(message["event"]), cast("Mapping[str, Any]", message.get("data", {})))
