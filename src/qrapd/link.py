# SPDX-License-Identifier: GPL-2.0-or-later
"""One link: a NIC's way to the host. It starts or finds its passt, holds the stream, and tells when it is lost."""

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
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import ProcessId
from qrapd.stream import HeldStream

__all__ = ["Link", "LinkState"]


class LinkState(enum.Enum):
    """Where a link is in its life."""

    NEW = "new"
    STARTING = "starting"
    UP = "up"
    LOST = "lost"
    ENDED = "ended"


class Link:
    """One NIC's passt and stream, from start to release.

    :param directory: where a passt of ours works.
    :param on_loss: called when the link, once up, has lost its passt, with the reason.
    """

    def __init__(
        self, plan: LinkPlan, directory: Path, emit: Emit, on_loss: Callable[[Unavailable], None]
    ) -> None:
        self.plan = plan
        self.state = LinkState.NEW
        self.generation = 0
        self._directory = directory
        self._emit: Emit = partial(emit, link=plan.index)
        self._on_loss = on_loss
        self._passt: Passt | None = None
        self._stream: HeldStream | None = None
        self._watching = anyio.CancelScope()

    @property
    def stream_fd(self) -> int:
        """QEMU's end of the stream, to be inherited by QEMU; held here as well until the release."""
        assert self._stream is not None, "a link that is up has a stream"
        return self._stream.fd

    @property
    def process_id(self) -> ProcessId | None:
        """The passt of ours that serves this link now."""
        if self._passt is None or self.state is not LinkState.UP:
            return None
        return ProcessId(self._passt.pid, self._passt.start_time)

    async def start(self, tasks: TaskGroup) -> None:
        """Get a stream to a passt that answers; afterwards the link is watched by a task in ``tasks``.

        :raise Unavailable: passt cannot be run, ended (its words are quoted), does not answer, or is not found.
        """
        self.state = LinkState.STARTING
        if self.plan.source == "managed":
            await self._start_passt(tasks)
        else:
            await self._claim_passt(tasks)

    async def _start_passt(self, tasks: TaskGroup) -> None:
        ours, passts = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stream = HeldStream(ours)
        passt = self._passt = await Passt.start(
            self.plan.passt,
            passts,
            directory=self._directory,
            tasks=tasks,
            tell=lambda line: self._emit("passt.output", line=line),
        )
        self._emit("passt.started", pid=passt.pid)
        await passt.wait_until_alive(ours, self.plan.mac)
        self._be_up(passt_pid=passt.pid)
        tasks.start_soon(self._watch_process, passt)

    async def _claim_passt(self, tasks: TaskGroup) -> None:
        # A supervisor whose passts are all its own has no use for what this imports.
        from qrapd import probe

        if self.plan.source != "probe":
            paths = [self.plan.source]
        elif self.plan.pattern is not None:
            paths = probe.default_paths(self.plan.pattern)
        else:
            paths = probe.default_paths()
        found = await probe.claim(
            paths,
            allowed_uids=self.plan.allowed_uids,
            say=lambda text: self._emit("link.notice", notice=text),
        )
        self._stream = HeldStream(found.socket)
        self._be_up(passt_pid=found.pid, path=found.path)
        tasks.start_soon(self._watch_stream, self._stream, found.path)

    def _be_up(self, *, passt_pid: int | None, path: str | None = None) -> None:
        self.state = LinkState.UP
        self.generation = FIRST_GENERATION
        self._emit(
            "link.connected",
            generation=self.generation,
            source=self.plan.source,
            passt_pid=passt_pid,
            socket=path,
        )

    async def _watch_process(self, passt: Passt) -> None:
        status = await passt.wait()
        if self.state is not LinkState.UP:
            return  # being released: an end that is wanted
        self._emit("passt.exited", pid=passt.pid, **status.fields)
        self._be_lost("exited", passt.explain_end(status))

    async def _watch_stream(self, stream: HeldStream, path: str) -> None:
        with self._watching:
            await stream.wait_until_hung_up()
            gone = Unavailable(
                f"the passt at {path} hung up before the VM was ready",
                hint="see why it ended, in its own log; `qrapd probe` says what listens now",
            )
            self._be_lost("hangup", gone)

    def _be_lost(self, reason: str, error: Unavailable) -> None:
        self.state = LinkState.LOST
        self._emit("link.lost", generation=self.generation, reason=reason)
        self._on_loss(error)

    async def release(self) -> None:
        """Let go of the stream and see a passt of ours off. Not cancellable: nothing may be left behind."""
        lost = self.state is LinkState.LOST
        self.state = LinkState.ENDED
        self._watching.cancel()
        if self._stream is not None:
            self._stream.close()
        if self._passt is None:
            return
        with anyio.CancelScope(shield=True):
            status = await self._passt.end()
        if not lost:
            self._emit("passt.exited", pid=self._passt.pid, **status.fields)
        self._passt = None
