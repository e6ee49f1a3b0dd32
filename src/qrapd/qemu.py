# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU process: spawned with its streams, its monitors and its console handed over by fd.

Its sockets are bound here and connected to before QEMU runs: the monitor's greeting and the guest's first
words come as soon as there are any, and nobody has to poll for a socket to appear.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from qrapd.console import Console
from qrapd.errors import QemuFailed
from qrapd.plan import Plan
from qrapd.process import ExitStatus, Process, cannot_run, read_lines, spawn
from qrapd.qemu_arguments import Endpoints
from qrapd.runtime_directory import VmDirectory

__all__ = ["Qemu"]

_REMEMBERED_LINES = 20

_DRAIN_SECONDS = 1.0
"""How long to wait for the rest of what an ended QEMU and its guest wrote: a child of QEMU may hold the pipe."""


class Qemu:
    """A running QEMU. ``words`` holds the last lines that it wrote itself, ``monitor`` its QMP connection."""

    def __init__(
        self,
        plan: Plan,
        process: Process,
        monitor: socket.socket,
        console: socket.socket | None,
        listeners: Mapping[int, socket.socket],
    ) -> None:
        self.process = process
        self.link_listeners = listeners
        """sockets to which QEMU connects on its own, by the index of the link; they belong to whoever takes them"""
        self.monitor = monitor
        self.words: collections.deque[str] = collections.deque(maxlen=_REMEMBERED_LINES)
        self._console = console
        self.console: Console | None = None
        """the guest's serial console, from :meth:`listen` on; None where it is not qrapd's business"""
        self._plan = plan
        self._drained: list[anyio.Event] = []

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.process.pid

    @classmethod
    async def spawn(cls, plan: Plan, directory: VmDirectory, streams: Sequence[int | None]) -> Qemu:
        """Start QEMU with one stream for each link, or None where it makes a connection itself.

        :raise Unavailable: the program cannot be run, or its sockets cannot be made.
        """
        with contextlib.ExitStack() as ours:
            names = ("qmp.sock", "user-qmp.sock", *(("serial.sock",) if plan.console else ()))
            listeners = [ours.enter_context(directory.listen(name)) for name in names]
            qmp, user_qmp, *serial = (listener.fileno() for listener in listeners)
            with contextlib.ExitStack() as unless_started:
                monitor = unless_started.enter_context(_connect(listeners[0]))
                console = unless_started.enter_context(_connect(listeners[2])) if plan.console else None
                link_listeners = {
                    link.index: unless_started.enter_context(directory.listen(f"link{link.index}.sock"))
                    for link in plan.links
                    if link.mode == "vhost-user"
                }
                ends: list[int | str] = ["" if stream is None else stream for stream in streams]
                for index, listener in link_listeners.items():
                    ends[index] = str(listener.getsockname())
                argv = plan.command_line(Endpoints(qmp, user_qmp, serial[0] if serial else None, ends))
                try:
                    process = await spawn(
                        argv,
                        pass_fds=[
                            *(qmp, user_qmp, *serial),
                            *(stream for stream in streams if stream is not None),
                            *plan.inherited_fds,
                        ],
                        directory=plan.directory,
                    )
                except OSError as error:
                    raise cannot_run(argv[0], plan.directory, error) from error
                unless_started.pop_all()
        return cls(plan, process, monitor, console, link_listeners)

    @classmethod
    def adopt(cls, plan: Plan, directory: VmDirectory, process: Process) -> Qemu:
        """Take over a QEMU that another supervisor has left, by the sockets that it listens on.

        :raise OSError: it does not listen there, and the process is closed.
        """
        try:
            monitor = _connect_to(str(directory.socket_path("qmp.sock")))
            console = None
            if plan.console:
                with contextlib.suppress(OSError):  # not vital: somebody may have connected to it meanwhile
                    console = _connect_to(str(directory.socket_path("serial.sock")))
        except BaseException:
            process.close()
            raise
        return cls(plan, process, monitor, console, {})

    def listen(
        self, tasks: TaskGroup, tell: Callable[[str], None], tell_console: Callable[[str], None]
    ) -> None:
        """Hand on the lines that QEMU writes, and those of the guest's console, until both have ended."""

        def remember(line: str) -> None:
            self.words.append(line)
            tell(line)

        if self.process.output >= 0:
            self._hand_on(tasks, self.process.output, remember)
        if self._console is not None:
            self.console = Console(self._console, tell_console)
            self._drained.append(self.console.drained)
            tasks.start_soon(self.console.run)

    def _hand_on(self, tasks: TaskGroup, fd: int, tell: Callable[[str], None]) -> None:
        self._drained.append(anyio.Event())
        tasks.start_soon(self._drain, fd, tell, self._drained[-1])

    async def _drain(self, fd: int, tell: Callable[[str], None], drained: anyio.Event) -> None:
        try:
            async for line in read_lines(fd):
                tell(line)
        finally:
            if fd == self.process.output:
                self.process.output = -1  # closed: nobody is to be given it
            drained.set()

    async def wait(self) -> ExitStatus:
        """Wait for the end of the process and of what it wrote."""
        status = await self.process.wait()
        with anyio.move_on_after(_DRAIN_SECONDS):
            for drained in self._drained:
                await drained.wait()
        return status

    def explain(self, status: ExitStatus, *, greeted: bool) -> QemuFailed:
        """Why QEMU ended badly, in its own words; ``greeted`` is whether its monitor had said anything."""
        words = " / ".join(list(self.words)[-3:])
        when = "" if greeted or status.exit_code != 0 else " before its monitor said a word"
        said = f". It wrote: {words}" if words else " and wrote nothing"
        return QemuFailed(
            f"QEMU (pid {self.pid}) ended{when}: {status}{said}",
            hint=_suggest(words, status, self._plan) or self._plan.advice,
        )


def _connect(listener: socket.socket) -> socket.socket:
    return _connect_to(str(listener.getsockname()))


def _connect_to(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # there is room in the queue of one that has no client
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


_SEE_DOCTOR = "see what is in KVM's way with `qrapd doctor`, or let QEMU emulate the processor (tcg)"


def _tell_of_permission(words: str) -> str:
    import pwd  # only here: most QEMUs may read their files

    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    if "'/home/" in words and not os.access("/home", os.X_OK):  # ProtectHome=
        return 'the unit does not see /home: move the file, or see "Images elsewhere" in docs/systemd.md'
    return (
        f"QEMU runs as user {user}, who has to own the file (chown {user} FILE, or install -o {user}) and be let "
        "into the directories above it"
    )


def _suggest(words: str, status: ExitStatus, plan: Plan) -> str | None:
    # QEMU begins its lines with its own name, which may be `kvm`.
    words = words.replace(f"{Path(plan.qemu).name}: ", "")
    if (
        "KVM kernel module" in words or "failed to initialize kvm" in words
    ):  # whatever QEMU gives for the reason
        return _SEE_DOCTOR
    if "Permission denied" in words:
        return _tell_of_permission(words)
    if "No such file" in words or "could not load kernel" in words or "Could not open" in words:
        return f"correct the path in QEMU's arguments: relative ones start at {plan.directory}"
    if "lock" in words:
        return "another QEMU has this disk open: see who it is with `fuser -v FILE`"
    if "KVM" in words or "kvm" in words:
        return _SEE_DOCTOR
    if "option group 'sandbox'" in words or "seccomp" in words:
        return "this kernel or container allows no filter of system calls: write sandbox = false in [qemu]"
    if status.signal == signal.SIGSYS:
        return (
            "its filter of system calls ended it: if it has to start programs or to change its user, "
            "write sandbox = false in [qemu]"
        )
    if status.signal is not None:
        return "see `journalctl -k` for the kernel's reason (out of memory?), or who sent the signal"
    return None
