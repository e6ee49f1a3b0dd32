# SPDX-License-Identifier: GPL-2.0-or-later
"""One link: a NIC's way to the host. It brings up its passt, holds a copy of the stream, and tells when it is lost.

The copy of QEMU's end that is held here is what lets a later version of a link look at the stream and replace
it; it also means that passt sees its client hang up only when QEMU *and* the link have let go.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from qrapd.errors import Unavailable
from qrapd.logs import Emit
from qrapd.passt import Passt
from qrapd.plan import LinkPlan
from qrapd.process import ExitStatus
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import ProcessId

__all__ = ["Link", "LinkState"]


class LinkState(enum.Enum):
    """Where a link is in its life."""

    NEW = "new"
    STARTING = "starting"
    UP = "up"
    LOST = "lost"
    ENDED = "ended"


class Link:
    """One NIC's passt and stream, from start to release."""

    def __init__(
        self,
        plan: LinkPlan,
        directory: Path,
        emit: Emit,
        on_loss: Callable[[Link, ExitStatus], None],
    ) -> None:
        self.plan = plan
        self.state = LinkState.NEW
        self.generation = 0
        self._directory = directory
        self._emit: Emit = partial(emit, link=plan.index)
        self._on_loss = on_loss
        self._passt: Passt | None = None
        self._stream: socket.socket | None = None

    @property
    def stream_fd(self) -> int:
        """QEMU's end of the stream, to be inherited by QEMU; held here as well until the release."""
        assert self._stream is not None, "a link that is up has a stream"
        return self._stream.fileno()

    @property
    def process_id(self) -> ProcessId | None:
        """The passt that serves this link now."""
        if self._passt is None or self.state is not LinkState.UP:
            return None
        return ProcessId(self._passt.pid, self._passt.start_time)

    async def start(self, tasks: TaskGroup) -> None:
        """Start passt and wait until it answers; afterwards the link is watched by a task in ``tasks``.

        :raise Unavailable: passt cannot be run, ended (its words are quoted), or does not answer.
        """
        self.state = LinkState.STARTING
        self._stream, passts_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        passt = self._passt = await Passt.start(
            self.plan.passt,
            passts_end,
            directory=self._directory,
            tasks=tasks,
            tell=lambda line: self._emit("passt.output", line=line),
        )
        self._emit("passt.started", pid=passt.pid)
        await passt.wait_until_alive(self._stream, self.plan.mac)
        self.state = LinkState.UP
        self.generation = FIRST_GENERATION
        self._emit("link.connected", generation=self.generation, source=self.plan.source, passt_pid=passt.pid)
        tasks.start_soon(self._watch, passt)

    async def _watch(self, passt: Passt) -> None:
        status = await passt.wait()
        if self.state is not LinkState.UP:
            return  # being released: an end that is wanted
        self.state = LinkState.LOST
        self._emit("passt.exited", pid=passt.pid, **status.fields)
        self._emit("link.lost", generation=self.generation, reason="exited")
        self._on_loss(self, status)

    def explain(self, status: ExitStatus) -> Unavailable:
        """Why the link was lost, in passt's own words."""
        assert self._passt is not None
        return self._passt.explain_end(status)

    async def release(self) -> None:
        """Let go of the stream and see passt off. Not cancellable: nothing may be left behind."""
        lost = self.state is LinkState.LOST
        self.state = LinkState.ENDED
        if self._stream is not None:
            self._stream.close()
        if self._passt is None:
            return
        with anyio.CancelScope(shield=True):
            status = await self._passt.end()
        if not lost:
            self._emit("passt.exited", pid=self._passt.pid, **status.fields)
        self._passt = None
