# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes: spawned whole or not at all, watched by pidfd, their output read as lines.

No output of a child can block it: the write end of its pipe is non-blocking, so a line that nobody takes is
lost to the child instead of stopping it. SIGPIPE stays ignored in children, as Python has it: passt 2023-03
dies of it at the next DHCP request once the reader of its stderr is gone (measured), and QEMU ignores it anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.lowlevel

from qrapd.errors import Unavailable
from qrapd.lines import LineSplitter

__all__ = [
    "ExitStatus",
    "Hidden",
    "Process",
    "cannot_run",
    "has_ended",
    "open_pidfd",
    "pid_of",
    "read_lines",
    "spawn",
    "start_time",
]

_PIPE_SIZE = 256 * 1024
"""Bytes; room for a burst of output while the event loop is busy. pipe(7): at most 1 MiB without privilege."""

_READ_SIZE = 64 * 1024


class Hidden(ProcessLookupError):
    """There is such a process, and /proc does not show it to us: proc(5), hidepid; systemd.exec(5), ProtectProc=.

    Those are hidden that may not be traced: what is not dumpable, as passt, or in another user namespace.
    """


_SIGNALS_OF_A_CRASH = frozenset(
    {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
)
"""What a process gets for its own doing: signal(7), and seccomp(2) for SIGSYS."""


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: by an exit code, or by a signal; by neither where nobody could tell us."""

    exit_code: int | None = None
    signal: int | None = None

    @classmethod
    def from_returncode(cls, returncode: int) -> ExitStatus:
        """``returncode`` as :mod:`subprocess` has it: negative for a signal."""
        if returncode < 0:
            return cls(signal=-returncode)
        return cls(exit_code=returncode)

    @property
    def is_crash(self) -> bool:
        """Whether the process came to grief by itself: a signal such as SIGKILL or SIGTERM is somebody's wish."""
        if self.signal is not None:
            return self.signal in _SIGNALS_OF_A_CRASH
        return self.exit_code not in (0, None)

    @property
    def fields(self) -> dict[str, int | None]:
        """As log fields: ``exit_code`` or ``signal``; an exit code of None is not known."""
        if self.signal is not None:
            return {"signal": self.signal}
        return {"exit_code": self.exit_code}

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "how is not known" if self.exit_code is None else f"exit status {self.exit_code}"


class Process:
    """A running process: a child, or one that another qrapd has left. Both are watched by pidfd.

    :ivar start_time: clock ticks since boot, to tell it from a later one with the same pid; 0: not known.
    :ivar output: the read end of its stdout and stderr, for :func:`read_lines`; -1 where that is not to be had.
    """

    def __init__(self, pid: int, pidfd: int, started: int, output: int) -> None:
        self.pid = pid
        self.start_time = started
        self.output = output
        self._pidfd = pidfd

    @classmethod
    def adopt(cls, pid: int, started: int, *, pidfd: int | None = None, output: int | None = None) -> Process:
        """Take over a process by its pid and start time, which together name it for good.

        :param pidfd: a pidfd of it, which proves who it is by itself; belongs to the process from now on.
        :param output: the read end of its output, if it was kept.
        :raise Hidden: without a pidfd, who has the pid cannot be told.
        :raise ProcessLookupError: without a pidfd, it has ended.
        """
        if pidfd is None:
            pidfd = open_pidfd(pid)
            try:
                # The pid may have become another's before the pidfd was made: then the start time is another, too.
                if start_time(pid) != started:
                    raise ProcessLookupError(pid)
            except BaseException:
                os.close(pidfd)
                raise
        return _Adopted(pid, pidfd, started, -1 if output is None else output)

    @property
    def pidfd(self) -> int:
        """Names this process and never another one; -1 once it is closed."""
        return self._pidfd

    @property
    def alive(self) -> bool:
        """Whether the end of the process has not been noticed yet."""
        raise NotImplementedError

    async def wait(self) -> ExitStatus:
        """Wait for the end; may be called by several tasks, and again afterwards."""
        raise NotImplementedError

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended (a pidfd never names another one)."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def end(self, grace: float, *, kill: bool = False) -> ExitStatus:
        """See the process off: up to ``grace`` seconds to go by itself, as long again after SIGTERM, then SIGKILL.

        :param kill: begin with SIGKILL.
        """
        if kill:
            self.send_signal(signal.SIGKILL)
            return await self.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with anyio.move_on_after(grace):
                return await self.wait()
            self.send_signal(number)
        return await self.wait()

    def close(self) -> None:
        """Give back the pidfd. The output belongs to whoever reads it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def let_go(self) -> None:
        """Watch it no more, and let it run on, even when this program ends."""
        self.close()


_LET_GO: list[asyncio.subprocess.Process] = []


class _Child(Process):
    """A process that was started here."""

    def __init__(self, child: asyncio.subprocess.Process, output: int) -> None:
        started, pidfd = 0, -1
        # If asyncio has collected it in the meantime, its pid can be anyone's by now.
        if child.returncode is None:
            try:
                with contextlib.suppress(ProcessLookupError):
                    pidfd = open_pidfd(child.pid)
                    # A passt that was quick to shut itself in may be hidden already (ProtectProc=), and runs.
                    started = start_time(child.pid)
            except BaseException:
                if pidfd >= 0:
                    os.close(pidfd)
                raise
        super().__init__(child.pid, pidfd, started, output)
        self._child = child

    @property
    def alive(self) -> bool:
        return self._child.returncode is None

    async def wait(self) -> ExitStatus:
        return ExitStatus.from_returncode(await self._child.wait())

    def let_go(self) -> None:
        # asyncio's transport kills its child when it is collected.
        _LET_GO.append(self._child)
        if sys.version_info < (3, 12):
            asyncio.get_event_loop_policy().get_child_watcher().remove_child_handler(self.pid)
        super().let_go()


class _Adopted(Process):
    """A process that was started by another qrapd, or by this one before it was another program.

    How it ends is known only in the latter case, where it is still a child.
    """

    def __init__(self, pid: int, pidfd: int, started: int, output: int) -> None:
        super().__init__(pid, pidfd, started, output)
        self._status: ExitStatus | None = None
        self._ended = anyio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def alive(self) -> bool:
        if self._status is None and has_ended(self._pidfd):
            self._collect()
        return self._status is None

    async def wait(self) -> ExitStatus:
        if self._loop is None and self.alive:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._pidfd, self._collect)
        if self._status is None:
            await self._ended.wait()
        assert self._status is not None
        return self._status

    def _collect(self) -> None:
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            ended = None
        if ended is None:
            self._status = ExitStatus()
        elif ended.si_code == os.CLD_EXITED:
            self._status = ExitStatus(exit_code=ended.si_status)
        else:
            self._status = ExitStatus(signal=ended.si_status)
        self._stop_watching()
        self._ended.set()

    def _stop_watching(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._pidfd)
            self._loop = None

    def close(self) -> None:
        self._stop_watching()
        if self._status is None:  # nobody may ask a pidfd that is gone
            self._status = ExitStatus()
        super().close()


async def spawn(
    argv: Sequence[str],
    *,
    pass_fds: Iterable[int] = (),
    directory: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start a program with just the fds it is given, stdin from /dev/null, in a session of its own.

    A session of its own keeps a terminal's Ctrl-C, which goes to the whole foreground process group, from
    ending QEMU before qrapd could ask the guest to power down.

    Cancellation waits until the process exists, so that none is ever left without an owner.

    :raise OSError: the program or the directory cannot be used.
    """
    _watch_children_by_pidfd()
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # Refused when this user's pipes have reached fs.pipe-user-pages-soft: the default size serves, too.
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    try:
        with anyio.CancelScope(shield=True):
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=tuple(pass_fds),
                cwd=directory,
                env=environment,
                start_new_session=True,
                restore_signals=False,
            )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    try:
        return _Child(child, read_end)
    except BaseException:  # for want of an fd, say: a child that nobody watches must not stay
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        with anyio.CancelScope(shield=True):
            await child.wait()
        raise


def cannot_run(program: str, directory: str | Path, error: OSError) -> Unavailable:
    """What :func:`spawn` raised, for people: the directory may be at fault as well as the program."""
    hints = {
        errno.ENOEXEC: f"{program} is no program for this machine: for which one does `file {program}` say?",
        errno.EACCES: f"may this user enter {directory} and execute {program}? See: ls -ld {directory} {program}",
        errno.ENOENT: f"is the directory {directory} still there, and the interpreter that a script begins with?",
        errno.EMFILE: "this process may not have more open files: raise the limit with ulimit -n",
    }
    return Unavailable(
        f"cannot run {program} in {directory}: {error.strerror}", hint=hints.get(error.errno or 0)
    )


async def read_lines(fd: int) -> AsyncIterator[str]:
    """The lines that come out of a non-blocking pipe or socket until its end; closes ``fd``."""
    splitter = LineSplitter()
    try:
        while True:
            try:
                chunk = os.read(fd, _READ_SIZE)
            except BlockingIOError:
                await anyio.wait_readable(fd)
                continue
            except ConnectionResetError:
                break
            if not chunk:
                break
            for line in splitter.feed(chunk):
                yield line
            # A writer without pauses keeps the fd readable for ever; all other tasks want their turn, too.
            await anyio.lowlevel.checkpoint()
        for line in splitter.finish():
            yield line
    finally:
        os.close(fd)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid it names a process for good.

    proc_pid_stat(5), fields 3 and 22. The second field is the program's name: any bytes, parentheses among them.

    :raise Hidden: there is one, and /proc does not show it.
    :raise ProcessLookupError: there is no such process, or it has ended and nobody has collected it yet.
    """
    path = Path(f"/proc/{pid}/stat")
    try:
        stat = path.read_bytes()
    except (FileNotFoundError, PermissionError):
        pidfd = open_pidfd(pid)
        try:
            # While this process lives nobody else has its pid: if it is not hidden, it is to be seen now.
            stat = path.read_bytes()
        except (FileNotFoundError, PermissionError):
            raise (ProcessLookupError if has_ended(pidfd) else Hidden)(pid) from None
        finally:
            os.close(pidfd)
    state, *numbers = stat.rpartition(b")")[2].split()
    if state in {b"Z", b"X"}:
        raise ProcessLookupError(pid)
    return int(numbers[18])


def open_pidfd(pid: int) -> int:
    """A pidfd of the process that has this pid now.

    :raise ProcessLookupError: there is none.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # A pid that is only a thread's by now: EINVAL, and ENOENT in newer kernels (pidfd_open(2)).
        if error.errno in {errno.EINVAL, errno.ENOENT}:
            raise ProcessLookupError(pid) from None
        raise


def pid_of(pidfd: int) -> int:
    """Which process a pidfd names: a pid, -1 if that process is gone, 0 if this is no pidfd.

    proc_pid_fdinfo(5). One's own fds are shown whatever /proc hides.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    return 0


def has_ended(pidfd: int) -> bool:
    """Whether the process that a pidfd names has ended, collected or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _watch_children_by_pidfd() -> None:
    """Python 3.11 would start a thread per child; from 3.12 on pidfds are the default."""
    if sys.version_info >= (3, 12):
        return
    policy = asyncio.get_event_loop_policy()
    watcher = getattr(policy, "_watcher", None)
    if not isinstance(watcher, asyncio.PidfdChildWatcher):
        watcher = asyncio.PidfdChildWatcher()
        policy.set_child_watcher(watcher)
    # Attaching again would forget the children that are being watched.
    if not watcher.is_active():
        watcher.attach_loop(asyncio.get_running_loop())
