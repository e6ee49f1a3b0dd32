# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor that is gone has left running, and whether it can be taken over."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio

from qrapd.errors import AlreadySupervised
from qrapd.handover import HandedOver
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.passt import is_noise
from qrapd.plan import LinkPlan, Plan
from qrapd.process import ExitStatus, Hidden, Process, has_ended, open_pidfd, read_lines
from qrapd.qemu_arguments import nic_id
from qrapd.record import LinkRecord, ProcessId, Record, Unusable
from qrapd.record import read as read_record
from qrapd.regain import regain_socket
from qrapd.runtime_directory import VmDirectory
from qrapd.stream import HeldStream
from qrapd.systemd import QEMU, Keeper, output_name, passt_name, stored_name

__all__ = ["Left", "LeftLink", "look_for_left", "read_last_words"]

ORPHAN_GRACE = 0.5
"""Seconds for a passt without a client to go by itself, which takes it a millisecond."""

GREETING_TIMEOUT = 10.0
"""Seconds for QEMU to greet a client of its monitor, which takes it a millisecond; this is for a host that swaps."""

_MONITOR = "qmp.sock"

LAST_WORDS_TIMEOUT = 1.0
"""Seconds to wait for the rest of what ended processes wrote: a child of theirs may hold the pipe."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred, unix(7): pid, uid, gid."""

_SOME_MAC = "52:54:00:00:00:00"
"""In whose name a passt is asked for a sign of life, where the guest's is not known: it answers anyone."""


@dataclass(frozen=True)
class LeftLink:
    """A link of a VM that another supervisor has left running."""

    record: LinkRecord
    end: socket.socket | None = None
    """its held stream, if that could be regained"""
    passt: Process | None = None
    """its passt, if that is one of qrapd's and lives"""
    hidden: bool = False
    """a passt of qrapd's may live, and cannot be told from other processes"""
    last_words: int | None = None
    """the rest of what its passt wrote before it ended, to be read"""


@dataclass(frozen=True)
class Left:
    """A VM that another supervisor has left running."""

    record: Record
    qemu: Process
    handed: HandedOver
    """fds that came to us"""

    def fit(self, plan: Plan) -> Plan:
        """The plan with the links that the machine has: no NIC comes or goes with a file while it runs."""
        planned = {link.index: link for link in plan.links}
        links = tuple(_fit(known, planned.get(known.index)) for known in self.record.links)
        # What the machine was started by is not known then.
        return plan if links == plan.links else replace(plan, links=links, file=None)

    def take_link(self, known: LinkRecord) -> LeftLink:
        """All that there is of a link; it is the caller's from now on."""
        end, name = self._find_stream(known), passt_name(known.index)
        if known.passt is None:
            return LeftLink(known, end)
        try:
            return LeftLink(known, end, _take_process(known.passt, name, self.handed))
        except Hidden:
            return LeftLink(known, end, hidden=True)
        except ProcessLookupError:
            return LeftLink(known, end, last_words=self.handed.take(output_name(name)))

    def _find_stream(self, known: LinkRecord) -> socket.socket | None:
        """The held stream: the one that came to us, or a copy of QEMU's."""
        if (fd := self.handed.take(stored_name(known.index))) is not None:
            return socket.socket(fileno=fd)
        return None if known.inode is None else regain_socket(self.record.qemu.pid, known.inode)


def _fit(known: LinkRecord, planned: LinkPlan | None) -> LinkPlan:
    if planned is not None and planned.mode == known.mode:
        return planned if known.mac is None else replace(planned, mac=known.mac)
    return LinkPlan(
        index=known.index,
        source="managed" if known.argv else known.socket or "probe",
        mac=known.mac or (planned.mac if planned else _SOME_MAC),
        hub=known.index,
        nic=nic_id(known.index),
        passt=known.argv or (),
        mode=known.mode,
    )


def _take_process(known: ProcessId, name: str, handed: HandedOver) -> Process:
    """Take over a process, by the pidfd that was kept of it or by its start time; its output comes with it.

    :param name: under which its pidfd was kept.
    :raise Hidden: whether it is the one that was left cannot be told.
    :raise ProcessLookupError: it has ended.
    """
    pidfd = handed.take_pidfd(name, known.pid)
    if pidfd is not None and has_ended(pidfd):
        os.close(pidfd)
        raise ProcessLookupError(known.pid)
    try:
        process = Process.adopt(known.pid, known.start_time, pidfd=pidfd)
    except Hidden:
        # QEMU has better evidence to give: _identify_by_monitor.
        if name == QEMU or (pidfd := _open_if_of_this_unit(known.pid)) is None:
            raise
        process = Process.adopt(known.pid, known.start_time, pidfd=pidfd)
    process.output = _or_none(handed.take(output_name(name)))
    return process


def _open_if_of_this_unit(pid: int) -> int | None:
    """A pidfd of a process of the unit qrapd@NAME.service in which we run; None: it is not of it.

    No other VM's are in there, and none of ours yet: what is, was left. cgroups(7)
    """
    pidfd = open_pidfd(pid)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0" and path.rpartition("/")[2].startswith("qrapd@"):
                inside = Path(f"/sys/fs/cgroup{path}/cgroup.procs").read_text().split()
                if str(pid) in inside and pid != os.getpid() and not has_ended(pidfd):
                    return pidfd
    os.close(pidfd)
    return None


def _or_none(fd: int | None) -> int:
    return -1 if fd is None else fd


async def look_for_left(
    directory: VmDirectory, handed: HandedOver, emit: Emit, keeper: Keeper
) -> Left | None:
    """What a supervisor that is gone has left running. Two QEMUs on the same disks would destroy them.

    :raise AlreadySupervised: there is a QEMU, and it cannot be taken over; or whether there is one cannot be told.
    """
    try:
        return await _look(directory, handed, emit, keeper)
    except OSError as error:  # for want of an fd, say, which is no reason to take a QEMU for ended
        directory.leave_as_it_is()
        hint = "raise the limit with: ulimit -n 1024" if error.errno == errno.EMFILE else "try again"
        raise AlreadySupervised(
            "what a supervisor that is gone may have left of this VM cannot be looked at: "
            f"{error.strerror or error}",
            hint=f"all was left as it is: {hint}",
        ) from error


async def _look(directory: VmDirectory, handed: HandedOver, emit: Emit, keeper: Keeper) -> Left | None:
    vm = directory.path.name
    try:
        found = read_record(directory.record_path)
    except Unusable as error:
        if directory.is_answered(_MONITOR):
            raise _refuse(directory, f"and {error}", "go back to the qrapd that has started it") from None
        emit("record.failed", vm=vm, error=str(error))
        found = None
    if found is None and directory.is_answered(_MONITOR):
        raise _refuse(
            directory,
            "and its record is not there (was /run full?)",
            "kill it: `fuser -v` names who listens there",
        )
    if found is not None and (qemu := await _find_qemu(found.qemu, directory, handed)) is not None:
        return Left(found, qemu, handed)
    await _clear_up(found.links if found else (), handed, partial(emit, vm=vm), keeper)
    if found is not None:
        emit("vm.exited", vm=vm, reason=Reason.KILLED.value, **ExitStatus().fields)
    return None


# ---- QEMU


async def _find_qemu(known: ProcessId, directory: VmDirectory, handed: HandedOver) -> Process | None:
    """The QEMU of the record; None: it has ended.

    :raise AlreadySupervised: that cannot be told.
    """
    try:
        qemu: Process | None = _take_process(known, QEMU, handed)
    except Hidden:
        qemu = await _identify_by_monitor(known, directory)
    except ProcessLookupError:
        qemu = None
    if qemu is None and directory.is_answered(_MONITOR):
        raise _refuse(
            directory,
            f"and its record tells of another one (pid {known.pid}), which has ended",
            f"see who it is: `fuser -v {directory.socket_path(_MONITOR)}`",
        )
    if qemu is not None and qemu.output < 0:
        qemu.output = _or_none(handed.take(output_name(QEMU)))
    return qemu


async def _identify_by_monitor(known: ProcessId, directory: VmDirectory) -> Process | None:
    """The QEMU of the record, where /proc hides whoever has its pid; None: it has ended.

    On a monitor's socket that was left only QEMU can listen, and the kernel tells who greets.
    """
    try:
        pidfd = open_pidfd(known.pid)
    except ProcessLookupError:
        return None
    try:
        greeter = await _ask_who_greets(str(directory.socket_path(_MONITOR)))
    except ConnectionRefusedError:
        os.close(pidfd)
        return None  # nobody listens: the pid is another process's by now
    except OSError as error:
        os.close(pidfd)
        raise _refuse(
            directory,
            f"most likely as pid {known.pid}, which /proc hides, and cannot be asked: {_MONITOR}: {error.strerror}",
            f"see as root who it is: `ps -fp {known.pid}`; once it has ended, a start will do",
        ) from None
    # It had this pid before the greeting and still has it: so it is the one that has greeted.
    if greeter == known.pid and not has_ended(pidfd):
        return Process.adopt(known.pid, known.start_time, pidfd=pidfd)
    os.close(pidfd)
    who = "nobody" if greeter is None else f"pid {greeter}"
    raise _refuse(
        directory,
        f"most likely as pid {known.pid}, which /proc hides, but it is {who} that answers on {_MONITOR}",
        f"see as root who it is: `ps -fp {known.pid}`; once it has ended, a start will do",
    )


async def _ask_who_greets(path: str) -> int | None:
    """The pid of whoever is the first to speak on a socket; None: nobody does.

    What SO_PEERCRED tells is who has made the socket listen: a qrapd. SCM_CREDENTIALS is of the writer: unix(7).

    :raise ConnectionRefusedError: nobody listens.
    :raise OSError: the socket is not there, or its listener has no time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        caller.connect(path)
        with anyio.move_on_after(GREETING_TIMEOUT):
            await anyio.wait_readable(caller)
            first, ancillary, _, _ = caller.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            for level, kind, data in ancillary:
                if first and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    return int(_CREDENTIALS.unpack(data)[0])
    return None


def _refuse(directory: VmDirectory, why: str, way_out: str) -> AlreadySupervised:
    directory.leave_as_it_is()
    return AlreadySupervised(
        f"a QEMU of this VM still runs, left by a supervisor that is gone, {why}",
        hint=f"power it down by its monitor {directory.socket_path('user-qmp.sock')}, or {way_out}",
    )


# ---- what is left where QEMU has ended


async def _clear_up(links: Sequence[LinkRecord], handed: HandedOver, emit: Emit, keeper: Keeper) -> None:
    """End the passts, and hand on the last words of all."""
    for name in [*handed.fds]:
        keeper.forget(name)
        if name.startswith("link"):
            for fd in handed.fds.pop(name):
                # For all copies of it: the service manager may still have one.
                stream = HeldStream(socket.socket(fileno=fd))
                stream.hang_up()
                stream.close()
    for link in links:
        if link.passt is not None:
            await _see_off(link.passt, passt_name(link.index), handed, partial(emit, link=link.index))
    if (words := handed.take(output_name(QEMU))) is not None:
        await read_last_words(words, partial(emit, "qemu.output"))
    handed.close()


async def _see_off(known: ProcessId, name: str, handed: HandedOver, emit: Emit) -> None:
    """End a passt whose QEMU is gone: its ports are wanted again."""
    try:
        process = _take_process(known, name, handed)
    except ProcessLookupError:
        words = _or_none(handed.take(output_name(name)))
    else:
        words = process.output
        await process.end(ORPHAN_GRACE)
        process.close()
    if words >= 0:
        await read_last_words(words, partial(emit, "passt.output"))


async def read_last_words(fd: int, tell: Callable[..., None]) -> None:
    """Hand on what an ended process has written and nobody has read."""
    with anyio.move_on_after(LAST_WORDS_TIMEOUT):
        async for line in read_lines(fd):
            if not is_noise(line):
                tell(line=line)
