# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor that is gone has left running, and whether it can be taken over."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from qrapd import record
from qrapd.errors import AlreadySupervised
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.process import ExitStatus, Process
from qrapd.regain import regain_socket
from qrapd.runtime_directory import VmDirectory
from qrapd.stream import HeldStream
from qrapd.systemd import Notifier, stored_name

__all__ = ["Left", "look_for_left"]

ORPHAN_GRACE = 0.5
"""Seconds for a passt without a client to go by itself, which takes it a millisecond."""


@dataclass(frozen=True)
class Left:
    """A VM that another supervisor has left running."""

    record: record.Record
    streams: Mapping[int, int]
    """held streams that came to us, as fds by the links' indices"""

    def find_stream(self, link: int) -> socket.socket | None:
        """A link's held stream: the one that came to us, or a copy of QEMU's."""
        if link in self.streams:
            return socket.socket(fileno=self.streams[link])
        for each in self.record.links:
            if each.index == link and each.inode is not None:
                return regain_socket(self.record.qemu.pid, each.inode)
        return None


async def look_for_left(
    directory: VmDirectory, streams: Mapping[int, int], emit: Emit, notifier: Notifier
) -> Left | None:
    """What a supervisor that is gone has left running. Two QEMUs on the same disks would destroy them.

    :raise AlreadySupervised: there is a QEMU, and it cannot be taken over.
    """
    vm = directory.path.name
    try:
        found = record.read(directory.record_path)
    except record.Unusable as error:
        if directory.is_answered("qmp.sock"):
            directory.leave_as_it_is()
            raise AlreadySupervised(
                f"a QEMU of this VM still runs, left by a supervisor that is gone, and {error}",
                hint=f"power it down by its monitor {directory.socket_path('user-qmp.sock')}, or go back to the qrapd "
                "that has started it",
            ) from None
        emit("record.failed", vm=vm, error=str(error))
        found = None
    if found is not None and found.qemu.alive:
        return Left(found, streams)
    for index, fd in streams.items():
        notifier.forget(stored_name(index))
        # For all copies of it: the service manager may still have one.
        stream = HeldStream(socket.socket(fileno=fd))
        stream.hang_up()
        stream.close()
    if found is not None:
        for link in found.links:
            await _see_off(link.passt)
        emit("vm.exited", vm=vm, reason=Reason.KILLED.value, **ExitStatus().fields)
    return None


async def _see_off(passt: record.ProcessId | None) -> None:
    """End a passt whose QEMU is gone: its ports are wanted again."""
    if passt is None:
        return
    try:
        process = Process.adopt(passt.pid, passt.start_time)
    except ProcessLookupError:
        return
    await process.end(ORPHAN_GRACE)
    process.close()
