# SPDX-License-Identifier: GPL-2.0-or-later
"""One passt: started in the foreground on one end of a socketpair, asked for a sign of life, seen off.

With ``--fd`` there is no socket in the file system that anyone could take, no race for it, and no path that an
AppArmor profile could deny; and passt has its client before the first connection from outside can arrive.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import select
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from qrapd import frames
from qrapd.errors import Unavailable
from qrapd.process import ExitStatus, Process, cannot_run, read_lines, spawn

__all__ = ["Passt", "command_line", "is_noise", "suggest"]

ANSWER_TIMEOUT = 10.0
"""Seconds for the first answer. passt answers 13 to 20 ms after its start (measured); this is for a host that swaps."""

END_GRACE = 1.0
"""Seconds for a passt to end when its client has hung up, and again after SIGTERM. It takes about a millisecond."""

HEARING_TIMEOUT = 1.0
"""Seconds to read what passt has written, which is there already."""

_REMEMBERED_LINES = 20
_REST_OF_FRAME = 0.001  # seconds until another look at a frame of which a part is there
_PEEK_SIZE = 128 * 1024  # more than passt's largest frame, 65535 bytes and its length word


def command_line(argv: Sequence[str], fd: int | str, conf_path: Path | str | None = None) -> list[str]:
    """The whole command line of a passt that serves the stream on ``fd``; ``argv`` is program and options.

    :param conf_path: where it listens for pesto(1).
    """
    conf = [] if conf_path is None else ["--conf-path", str(conf_path)]
    return [*argv, *conf, "--foreground", "--fd", str(fd)]


class Passt:
    """A running passt. ``words`` holds the last lines that it wrote."""

    def __init__(self, process: Process, program: Path) -> None:
        self._process = process
        self._program = program
        self._identity = _identify(program)
        self._silent = anyio.Event()
        self.words: collections.deque[str] = collections.deque(maxlen=_REMEMBERED_LINES)
        self.count = 0
        """of lines that it wrote"""

    @property
    def pid(self) -> int:
        """passt's process id."""
        return self._process.pid

    @property
    def start_time(self) -> int:
        """Clock ticks since boot, to tell this process from a later one with the same pid."""
        return self._process.start_time

    @property
    def is_outdated(self) -> bool:
        """Whether the program has been replaced since this process was started from it."""
        now = _identify(self._program)
        return now is not None and now != self._identity

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        stream: socket.socket,
        *,
        directory: Path,
        tasks: TaskGroup,
        tell: Callable[[str], None],
        conf_path: Path | None = None,
    ) -> Passt:
        """Start passt on ``stream``, which is closed here once passt has it.

        :param argv: the program and its options, without those that are ours.
        :param tasks: where the task runs that hands each line of output to ``tell``.
        :param conf_path: where it listens for pesto(1).
        :raise Unavailable: the program cannot be run.
        """
        fd = stream.fileno()
        with stream:
            try:
                process = await spawn(command_line(argv, fd, conf_path), pass_fds=[fd], directory=directory)
            except OSError as error:
                raise cannot_run(argv[0], directory, error) from error
        passt = cls(process, Path(argv[0]))
        tasks.start_soon(passt._listen, tell)
        return passt

    async def wait_until_alive(self, peer: socket.socket, mac: str) -> None:
        """Wait until passt answers on the other end of its stream: its ports are bound and its loop runs.

        Must be called before QEMU has ``peer``: whole frames are taken from it.

        :raise Unavailable: passt ended, with its own words, or stayed silent.
        """
        ended: ExitStatus | None = None
        garbage: frames.GarbageError | None = None

        async def watch(scope: anyio.CancelScope) -> None:
            nonlocal ended
            ended = await self._process.wait()
            scope.cancel()

        with anyio.move_on_after(ANSWER_TIMEOUT) as patience:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch, tasks.cancel_scope)
                # A passt that ends hangs up as well; `watch` knows how it ended.
                with contextlib.suppress(ConnectionError):
                    try:
                        await _ask_for_answer(peer, mac)
                    except frames.GarbageError as error:
                        garbage = error
                    tasks.cancel_scope.cancel()
        if ended is not None:
            with anyio.move_on_after(END_GRACE):
                await self._silent.wait()
            raise self.explain_end(ended)
        if garbage is not None:
            raise Unavailable(
                f"what was started as passt (pid {self.pid}) speaks something else on its stream: {garbage}",
                hint="is `passt_binary` really passt? See the line of `qrapd plan`",
            )
        if patience.cancelled_caught:
            raise Unavailable(
                f"passt (pid {self.pid}) did not answer within {ANSWER_TIMEOUT:g} s of its start",
                hint="look at what it wrote (passt.output events); try it by hand with the line of `qrapd plan`",
            )

    async def wait(self) -> ExitStatus:
        """Wait for the end of the process and of what it wrote."""
        status = await self._process.wait()
        with anyio.move_on_after(END_GRACE):
            await self._silent.wait()
        return status

    async def end(self, *, kill: bool = False) -> ExitStatus:
        """See passt off. It goes by itself when its client has hung up.

        :param kill: do not wait for that, as one that hangs does not.
        """
        status = await self._process.end(END_GRACE, kill=kill)
        self._process.close()
        with anyio.move_on_after(END_GRACE):
            await self._silent.wait()
        return status

    @classmethod
    def adopt(cls, process: Process, program: str, tasks: TaskGroup, tell: Callable[[str], None]) -> Passt:
        """Take over one that another qrapd has started.

        :param tasks: where the task runs that hands each line of output to ``tell``, if its output was kept.
        """
        passt = cls(process, Path(program))
        if process.output >= 0:
            tasks.start_soon(passt._listen, tell)
        else:
            passt._silent.set()
        return passt

    @property
    def pidfd(self) -> int:
        """Names this process and never another one."""
        return self._process.pidfd

    @property
    def output(self) -> int:
        """The read end of what it writes; -1: there is none."""
        return self._process.output

    def let_go(self) -> None:
        """Let it run on for another qrapd."""
        self._process.let_go()

    async def hear_out(self, count: int) -> list[str]:
        """All that it has written up to now, from its line ``count`` on, of the last lines that are remembered."""
        with anyio.move_on_after(HEARING_TIMEOUT):
            while self.output >= 0 and _waits(self.output):  # noqa: ASYNC110 (for a millisecond)
                await anyio.sleep(_REST_OF_FRAME)
        return [*self.words][max(0, len(self.words) - (self.count - count)) :]

    async def _listen(self, tell: Callable[[str], None]) -> None:
        try:
            async for line in read_lines(self._process.output):
                if not is_noise(line):
                    self.words.append(line)
                    self.count += 1
                    tell(line)
        finally:
            self._process.output = -1  # closed: nobody is to be given it
            self._silent.set()

    def explain_end(self, status: ExitStatus) -> Unavailable:
        """Why passt ended before the VM was up, in its own words."""
        if status.signal is not None and not status.is_crash:
            return Unavailable(
                f"passt was {status}",
                hint="see who sent that; `journalctl -k` says whether memory had run out",
            )
        last = self.words[-1].strip() if self.words else "(nothing)"
        return Unavailable(f"passt ended at once ({status}). It wrote: {last}", hint=suggest(last))


def _waits(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _identify(program: Path) -> tuple[int, ...] | None:
    """What changes when a package puts another file in a program's place; None where there is none."""
    try:
        status = program.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


async def _ask_for_answer(peer: socket.socket, mac: str) -> None:
    peer.setblocking(False)
    peer.send(frames.sign_of_life_request(frames.parse_mac(mac)))
    while True:
        await anyio.wait_readable(peer)
        waiting = peer.recv(_PEEK_SIZE, socket.MSG_PEEK)
        if not waiting:
            raise ConnectionResetError
        answered = frames.AnswerFinder().feed(waiting)
        # Only whole frames may be taken: what is left is where QEMU begins to read.
        whole = sum(frames.LENGTH_SIZE + len(frame) for frame in frames.split_frames(waiting))
        peer.recv(whole)
        if answered:
            return
        if not whole:
            # Part of a frame: to wait until the stream is readable would not be to wait.
            await anyio.sleep(_REST_OF_FRAME)


_NOISE = re.compile(r"Failed to send \d+ bytes to syslog")


def is_noise(line: str) -> bool:
    """Whether a line is only about passt's second copy of it: 2023-03 says so for each line without a /dev/log."""
    return _NOISE.search(line) is not None


def suggest(
    words: str, *, unprivileged: bool | None = None, first_free_port: int | None = None
) -> str | None:
    """What to do about passt's last words.

    :param unprivileged: whether low ports are closed to this process; default: whether it is not root.
    :param first_free_port: net.ipv4.ip_unprivileged_port_start; default: read from /proc.
    """
    if re.search(r"\b(bind|listen)\b", words.lower()):  # passt says "listen" since 2026
        unprivileged = os.geteuid() != 0 if unprivileged is None else unprivileged
        limit = _unprivileged_port_start() if first_free_port is None else first_free_port
        low = [port for port in _host_ports(words) if 0 < port < limit]
        if unprivileged and low:
            return (
                f"ports below {limit} are root's on this host; forward a higher one, "
                f"or allow it: sudo sysctl net.ipv4.ip_unprivileged_port_start={min(low)}"
            )
        return "see who has the port: ss -lntup (as root it names the process); forward another one, or end that one"
    if "namespace" in words.lower() or "sandbox" in words.lower():
        return "passt needs user namespaces to shut itself in: `qrapd doctor` says what is in their way"
    return "try it by hand with the line that `qrapd plan` prints"


def _host_ports(words: str) -> list[int]:
    """The ports of this host that a complaint is about: 81 for ``… for option '-t 127.0.0.1/81:80', exiting``."""
    if named := re.search(r"\bport (?:[^\s/]+/)?(\d+)", words):
        return [int(named[1])]
    option = re.search(r"-[tu] ([^\s']+)", words)
    specs = option[1].rpartition("/")[2].split(",") if option else []
    wanted = [spec.partition(":")[0] for spec in specs if not spec.startswith("~")]
    return [int(port) for ports in wanted for port in re.findall(r"\d+", ports)]


def _unprivileged_port_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024
