# SPDX-License-Identifier: GPL-2.0-or-later
"""A native link: QEMU starts passt itself, and again when it is lost, once. Here it is watched, and told of.

QEMU's ``-netdev passt`` tells of nothing by events (11.1: measured). Its ``info network`` names passt's pid, and a
pidfd tells of that one's end. What QEMU makes of it is asked for, again and again for a few seconds, and then no more.

With this netdev QEMU 11.1.3 sometimes hangs at its start, without qrapd as well: 6 of 16 starts on a busy machine, and
none of 8 with another netdev (measured). Those whose monitor had greeted went on with whatever came next on one of
their sockets (4 of 4), and :func:`keep_awake` sees to that. With it 5 of 32 starts under qrapd still failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from qrapd.errors import QmpFailed, QrapdError, Unavailable
from qrapd.left_behind import LeftLink
from qrapd.link import Link, LinkState
from qrapd.link_modes import nic_netdev_id
from qrapd.plan import LinkPlan
from qrapd.process import start_time
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import ProcessId

if TYPE_CHECKING:
    from qrapd.qmp import Qmp

__all__ = ["NativeLink", "connected_pid", "keep_awake"]

RESTART_PATIENCE = 5.0
"""Seconds for QEMU to have another passt: it took 20 to 560 ms (measured). It tries once."""

END_GRACE = 1.0
"""Seconds for a QEMU that does not answer to have ended, which is not the link's news."""

NUDGE_INTERVAL = 0.5
"""Seconds. A start takes less, as a rule; one that hangs is held up by no more."""

LOOK_INTERVAL = 0.02
"""Seconds between two questions, while there is no passt."""


def connected_pid(network: str, link: int) -> int | None:
    """The pid of the passt that serves a link, from QEMU's ``info network``; None: none does."""
    line = rf"^.*\b{re.escape(nic_netdev_id(link))}: .*type=passt,.*\bconnected to pid (\d+)\s*$"
    match = re.search(line, network, re.MULTILINE)
    return int(match[1]) if match else None


async def keep_awake(listener: Path, ready: anyio.Event) -> None:
    """Let something come to one of QEMU's listening sockets now and then, until the machine is ready."""
    while not ready.is_set():
        with anyio.move_on_after(NUDGE_INTERVAL):
            await ready.wait()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nudge, contextlib.suppress(OSError):
            nudge.setblocking(False)
            nudge.connect(str(listener))


class NativeLink(Link):
    """One NIC whose passt is QEMU's own affair."""

    @property
    def stream_fd(self) -> int | None:
        """None: QEMU makes the stream itself."""
        return None

    @property
    def process_id(self) -> ProcessId | None:
        """The passt that serves this link now, as far as is known."""
        # After an adoption it is not looked at yet, and whoever comes next must still know it.
        return self._served_by if self.state is LinkState.UP else self._left_with

    _served_by: ProcessId | None = None

    async def start(self, tasks: TaskGroup) -> None:
        """Wait for QEMU, which does it all."""
        self._tasks = tasks
        self.state = LinkState.CONNECTED

    def adopt(self, left: LeftLink, tasks: TaskGroup) -> None:
        """Go on watching."""
        if left.end is not None:
            left.end.close()
        if left.passt is not None:
            left.passt.close()
        self._tasks = tasks
        self.generation = left.record.generation
        self._left_with = left.record.passt
        self._lost_at = time.monotonic()
        self.state = LinkState.CONNECTED

    _left_with: ProcessId | None = None
    """the passt that served it when another supervisor was there"""

    def heal_with(self, qmp: Qmp) -> None:
        """The VM is ready: from now on its passt is watched."""
        if self.state is LinkState.CONNECTED:
            self._qmp = qmp
            self._begin(self._watch)

    def reload(self, plan: LinkPlan) -> bool:
        """Whatever has changed takes another QEMU."""
        if plan != self.plan:
            self._events.notice(
                "QEMU runs this link's passt (mode 'native'): what has changed takes a restart of the VM"
            )
        return False

    def renew(self) -> None:
        """Nothing: QEMU cannot be told to start another passt."""

    async def release(self) -> None:
        """Stop watching."""
        with anyio.CancelScope(shield=True):
            await self._work.end()
        self.state = LinkState.ENDED

    async def _watch(self) -> None:
        pid = None
        try:
            while (pid := await self._find_passt(pid)) is not None:
                self._tell_of(pid)
                await _wait_for_end(pid)
                self._lost_at = time.monotonic()
                await self._connected_pid()  # a QEMU that ends takes its passt along, and answers no more
                self._tell_lost_passt()
        except QmpFailed as error:
            await anyio.sleep(END_GRACE)
            if self.state is LinkState.UP:
                self._tell_lost_passt()
            self._give_up(error)
        else:
            self._give_up(
                Unavailable(
                    f"QEMU has had no passt for this link for {RESTART_PATIENCE:g} s, and does not try again",
                    hint="see what passt wrote (qemu.output events) and restart the VM; "
                    "mode = 'swap' heals such a loss",
                )
            )

    def _tell_lost_passt(self) -> None:
        self.state = LinkState.ACQUIRING
        self._events.lost(self.generation, "exited", None)

    def _give_up(self, error: QrapdError) -> None:
        self.state = LinkState.FAILED
        self._events.failed(1, None, error)

    _lost_at: float = 0.0

    async def _find_passt(self, last: int | None) -> int | None:
        """The pid of the passt that QEMU has, another one than the last."""
        deadline = time.monotonic() + RESTART_PATIENCE
        while time.monotonic() < deadline:
            pid = await self._connected_pid()
            if pid not in (None, last):
                return pid
            await anyio.sleep(LOOK_INTERVAL)
        return None

    async def _connected_pid(self) -> int | None:
        assert self._qmp is not None
        network = await self._qmp.execute("human-monitor-command", {"command-line": "info network"})
        return connected_pid(str(network), self.plan.index)

    def _tell_of(self, pid: int) -> None:
        known, self._left_with = self._left_with, None
        if known is not None and known.pid == pid and known.alive:
            self.state, self._served_by = LinkState.UP, known
            self._around.note_change()
            return
        first = self.generation < FIRST_GENERATION
        self.generation += 1
        self.state = LinkState.UP
        try:
            self._served_by = ProcessId(pid, start_time(pid))
        except ProcessLookupError:  # which its pidfd will tell
            self._served_by = ProcessId(pid, 0)
        self._around.note_change()
        if first:
            self._events.connected(self.generation, self.plan.source, pid, None)
        else:
            outage = time.monotonic() - self._lost_at
            self._events.restored(self.generation, outage, self.plan.source, pid, None)


async def _wait_for_end(pid: int) -> None:
    """Wait for the end of a process that is nobody's child of ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)
