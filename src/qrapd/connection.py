# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream to a passt that answers: a passt of our own, started for it, or one that somebody else runs."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from qrapd import foreign_passt, frames, pesto, vital_signs
from qrapd.errors import Conflict, Unavailable
from qrapd.forwards import Ports
from qrapd.logs import Emit
from qrapd.passt import Passt, suggest
from qrapd.plan import LinkPlan
from qrapd.process import ExitStatus
from qrapd.record import LinkRecord, ProcessId
from qrapd.stream import HangUpWatch, HeldStream, widen

__all__ = ["Connection", "acquire", "explain_refusal", "refused_by_host"]

SHORT_LIFE = 1.0
"""Seconds. A passt that crashes sooner than this would do so again and again."""


@dataclass
class Connection:
    """QEMU's end of a stream, and who serves the other one."""

    stream: HeldStream
    passt: Passt | None
    """one of our own"""
    pid: int | None
    """passt's, where it can be told"""
    path: str | None
    """of the socket of a passt that is not ours"""
    status: ExitStatus | None = None
    """how our passt has ended"""
    hung_up: bool = False
    pesto_socket: Path | None = None
    """where our passt listens for pesto(1)"""
    held: bool = True
    """whether ``stream`` is the one that is in use: it may be lost with the supervisor that had it"""
    _since: float = field(default_factory=time.monotonic)

    @classmethod
    def adopt(cls, record: LinkRecord, end: socket.socket | None, passt: Passt | None) -> Connection:
        """What another supervisor has left: its passt, if that lives, and its stream, if it could be regained."""
        held = end is not None
        if end is None:
            end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            other.close()
        return cls(HeldStream(end), passt, record.passt_pid, record.socket, held=held)

    @property
    def process_id(self) -> ProcessId | None:
        """The passt of ours."""
        if self.passt is None:
            return None
        return ProcessId(self.passt.pid, self.passt.start_time)

    @property
    def crashed(self) -> bool:
        """Whether our passt has come to grief by itself."""
        return self.status is not None and self.status.is_crash

    @property
    def has_proved_itself(self) -> bool:
        """Whether it has lasted for some time."""
        return time.monotonic() >= self._since + SHORT_LIFE

    @property
    def unread(self) -> tuple[int | None, int | None]:
        """Bytes that wait in the stream: for passt, and for QEMU. None: there is no stream of ours to look at."""
        if not self.held:
            return None, None
        try:
            fd = self.stream.fd
            return vital_signs.unread_by_peer(fd), vital_signs.unread_by_us(fd)
        except (OSError, ValueError):  # it is closed, or being closed
            return None, None

    @property
    def can_be_told(self) -> bool:
        """Whether a passt of ours listens for pesto(1)."""
        return self.passt is not None and self.pesto_socket is not None and self.pesto_socket.is_socket()

    async def tell_forwards(self, pesto_program: str, wanted: Ports, now: Ports) -> None:
        """Have our passt forward other ports, which interrupts nothing.

        :raise pesto.Refused: it has tried, and could not: see :func:`explain_refusal`.
        :raise Unavailable: it could not be told; whether it has heard of it is not known.
        """
        assert self.passt is not None
        hear = partial(self.passt.hear_out, self.passt.count)
        await pesto.change(pesto_program, str(self.pesto_socket), wanted, now, hear)

    def explain_end(self) -> Unavailable:
        """Why it is over, in passt's own words where we have them."""
        if self.passt is not None and self.status is not None:
            return self.passt.explain_end(self.status)
        who = f"the passt at {self.path}" if self.path else "passt"
        return Unavailable(
            f"{who} hung up", hint="see why, in its own log; `qrapd probe` says what listens now"
        )

    def watch(self, hang_ups: HangUpWatch, tasks: TaskGroup, tell: Callable[[], None]) -> None:
        """Call ``tell`` when the other end has hung up, and when our passt has ended: perhaps twice."""
        hang_ups.add(self.stream, tell)
        if self.passt is not None:
            tasks.start_soon(self._watch_process, self.passt, tell)

    async def _watch_process(self, passt: Passt, tell: Callable[[], None]) -> None:
        self.status = await passt.wait()
        tell()

    async def wait_for_end(self, seconds: float) -> None:
        """Give our passt so long to end by itself."""
        if self.passt is not None:
            with anyio.move_on_after(seconds):
                self.status = await self.passt.wait()

    async def see_off(self, *, kill: bool = False) -> None:
        """Hang up, whoever else holds this end, and see our passt to its end. Not cancellable: nothing may be left.

        :param kill: without asking it first.
        """
        self.stream.hang_up()
        self.stream.close()
        if self.passt is not None:
            with anyio.CancelScope(shield=True):
                self.status = await self.passt.end(kill=kill)

    def introduce(self, mac: str, addresses: tuple[str, ...]) -> None:
        """Make a guest known that does not use its lease. Only before QEMU has the stream: their bytes would mix."""
        with contextlib.suppress(OSError):  # a passt that has gone meanwhile is noticed by its hang-up
            for frame in frames.introductions(frames.parse_mac(mac), addresses):
                self.stream.socket.send(frame)


def refused_by_host(error: OSError) -> Unavailable:
    """Why there is no connection, where it is for want of fds, say."""
    hint = "raise the limit with: ulimit -n 1024" if error.errno == errno.EMFILE else None
    return Unavailable(f"the host refused what a link needs: {error.strerror or error}", hint=hint)


def explain_refusal(refusal: pesto.Refused) -> Conflict:
    """Why passt does not forward what it was told to, and what to do about it."""
    # As root, passt gives up more than we have: what we might bind is denied to it.
    denied = "Permission denied" in str(refusal) or None
    return Conflict(f"passt could not do it: {refusal}", hint=suggest(str(refusal), unprivileged=denied))


_deaf: set[str] = set()
"""Programs that may not have a socket for pesto(1) on this host."""


async def acquire(
    plan: LinkPlan, directory: Path, emit: Emit, tasks: TaskGroup, *, pesto_socket: Path | None = None
) -> Connection:
    """Get a stream to a passt that answers.

    :param directory: where a passt of ours works.
    :param tasks: where the task runs that hands on what it writes.
    :param pesto_socket: where a passt of ours is to listen for pesto(1), if it can.
    :raise Unavailable: passt cannot be run, ended (its words are quoted), does not answer, or is not found.
    """
    if plan.source != "managed":
        return await _claim_passt(plan, emit)
    program = plan.passt[0]
    if pesto_socket is None or plan.pesto is None or program in _deaf:
        return await _start_passt(plan, directory, emit, tasks, None)
    try:
        return await _start_passt(plan, directory, emit, tasks, pesto_socket)
    except Unavailable as error:
        # AppArmor's profile of passt, for one, allows sockets in no place of ours. Better none than no passt.
        if not _is_about_socket(error.message):
            raise
        _deaf.add(program)
        emit(
            "link.notice",
            notice="its forwards change by a swap, as passt may not listen for pesto(1) at "
            f"{pesto_socket}: {error.message}",
        )
    return await _start_passt(plan, directory, emit, tasks, None)


def _unlink(path: Path) -> None:
    """Of the last passt, which leaves it."""
    with contextlib.suppress(OSError):
        path.unlink()


def _is_about_socket(words: str) -> bool:
    """Whether passt ended for the path of its --conf-path: what it says of that, in 2026-10."""
    return any(each in words for each in ("UNIX domain socket", "Socket path", "configuration path"))


async def _start_passt(
    plan: LinkPlan, directory: Path, emit: Emit, tasks: TaskGroup, pesto_socket: Path | None
) -> Connection:
    try:
        ours, passts = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(
            f"no socketpair could be made for passt: {error.strerror}",
            hint="raise the limit with: ulimit -n 1024",
        ) from error
    widen(ours)
    widen(passts)
    stream = HeldStream(ours)
    try:
        if pesto_socket is not None:
            _unlink(pesto_socket)
        passt = await Passt.start(
            plan.passt,
            passts,
            directory=directory,
            tasks=tasks,
            tell=lambda line: emit("passt.output", line=line),
            conf_path=pesto_socket,
        )
    except BaseException:
        stream.close()
        raise
    connection = Connection(stream, passt, passt.pid, None, pesto_socket=pesto_socket)
    emit("passt.started", pid=passt.pid)
    try:
        await passt.wait_until_alive(ours, plan.mac)
    except BaseException:
        await connection.see_off()
        assert connection.status is not None
        emit("passt.exited", pid=passt.pid, **connection.status.fields)
        raise
    return connection


async def _claim_passt(plan: LinkPlan, emit: Emit) -> Connection:
    found = await foreign_passt.claim(plan, emit)
    found.socket.setblocking(False)
    widen(found.socket)
    return Connection(HeldStream(found.socket), None, found.pid, found.path)
