# SPDX-License-Identifier: GPL-2.0-or-later
"""One link: a NIC's way to the host. What happens goes through its lifecycle table; the actions are carried out here.

A passt that is lost is replaced under the running NIC: the old one is seen off, a new one comes up on a stream of its
own, and QEMU is given that stream. The guest sees no change of carrier; its connections through the old passt are gone.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.abc import TaskGroup

from qrapd import forwards, pesto, vital_signs
from qrapd.backoff import Backoff
from qrapd.connection import Connection, acquire, watch_listeners
from qrapd.errors import Conflict, QmpFailed, QrapdError, Unavailable
from qrapd.hub import HubPort
from qrapd.left_behind import LeftLink, read_last_words
from qrapd.link_lifecycle import Action, Event, State, advance
from qrapd.logs import Emit
from qrapd.passt import Passt, suggest
from qrapd.plan import LinkPlan
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import LinkRecord, ProcessId
from qrapd.stall import StallJudge, Verdict
from qrapd.stream import HangUpWatch
from qrapd.systemd import Keeper, output_name, passt_name, stored_name
from qrapd.turns import turn

if TYPE_CHECKING:
    from qrapd.listeners import ListenerWatch
    from qrapd.qmp import Qmp

__all__ = ["Link", "LinkState", "Surroundings", "copies"]

LinkState = State

HANG_UP_GRACE = 0.25
"""Seconds for a passt to end after it has hung up: it takes about a millisecond. One that does not is ended."""


_PASSTS = ("source", "passt", "pattern", "listen_addresses")
"""What of a plan is passt's; another one takes another passt."""

_RELOADABLE = (*_PASSTS, "allowed_uids", "stall_timeout", "guest_addresses", "pesto", "changed")


def _but_for_forwards(plan: LinkPlan) -> object:
    """What of a plan is passt's and cannot change while passt runs."""
    return plan.source, plan.pattern, forwards.without(plan.passt)


def _is_same_passt(plan: LinkPlan, other: LinkPlan) -> bool:
    """Whether a passt by one plan serves by the other. Where its forwards stand among its options is all the same."""
    return _but_for_forwards(plan) == _but_for_forwards(other) and forwards.given(
        plan.passt
    ) == forwards.given(other.passt)


def _serving_plan(plan: LinkPlan, record: LinkRecord) -> LinkPlan:
    """The plan by which a passt that was left had been started, as far as that is known."""
    if record.argv:
        return replace(plan, source="managed", passt=record.argv)
    if record.argv is not None and plan.source != "probe" and record.socket is not None:
        return replace(plan, source=record.socket, passt=())
    return plan


END_GRACE = 1.0
"""Seconds between QEMU's dropping a connection and its end that count as one and the same."""

PATIENCE_WITH_STRANGERS = 5
"""Passts of somebody else's in a row that have not served for a second; the next ones are waited for."""


def copies(fds: Mapping[str, int]) -> dict[str, int]:
    """Copies for whoever comes next, as far as the host has fds for them: what is not handed over is regained."""
    made = {}
    for name, fd in fds.items():
        with contextlib.suppress(OSError):
            made[name] = os.dup(fd)
    return made


def _refused_by_host(error: OSError) -> Unavailable:
    hint = "raise the limit with: ulimit -n 1024" if error.errno == errno.EMFILE else None
    return Unavailable(f"the host refused what a link needs: {error.strerror or error}", hint=hint)


@dataclass(frozen=True)
class Surroundings:
    """What a link has in common with the other links of its VM."""

    directory: Path
    """where passts of ours work"""
    emit: Emit
    hang_ups: HangUpWatch
    note_change: Callable[[], None]
    """called when another passt serves a link"""
    keeper: Keeper
    is_ending: Callable[[], bool]
    """whether the machine is on its way out"""
    note_failed_start: Callable[[Unavailable], None]
    """called when a link has lost its passt before the VM was ready, with the reason"""
    pesto_socket: Callable[[int], Path] | None = None
    """where a link's passt is to listen for pesto(1)"""


@dataclass
class _Loss:
    """Why and when a passt was lost."""

    reason: str
    """``hangup``, ``exited``, ``stalled`` or ``requested``"""
    at: float
    """monotonic seconds"""
    detail: str | None = None
    told: bool = False


class Port(Protocol):
    """A link's place in a running QEMU, such as a :class:`HubPort`."""

    @property
    def number(self) -> int:
        """Of the last stream that QEMU was given."""

    def adopt(self, number: int, *, swapping: bool) -> None:
        """Go on where another supervisor was."""

    async def swap(self, qmp: Qmp, stream: int) -> None:
        """Put a stream under the NIC, in the place of the one that is there."""

    async def announce(self, qmp: Qmp) -> None:
        """Have something sent that a living passt reads."""


class Link:
    """One NIC's passt and stream, from :meth:`start` to :meth:`release`. What differs by mode is in subclasses."""

    def __init__(self, plan: LinkPlan, backoff: Backoff, around: Surroundings) -> None:
        self.plan = plan
        self.state = State.NEW
        self.generation = 0
        self._around = around
        self._emit: Emit = partial(around.emit, link=plan.index)
        self._backoff = backoff
        self._port = self._make_port()
        self._qmp: Qmp | None = None
        self._tasks: TaskGroup | None = None
        self._work = anyio.CancelScope()
        self._idle = anyio.Event()
        self._idle.set()
        self._connection: Connection | None = None
        self._loss: _Loss | None = None
        self._error: QrapdError | None = None
        self._serving_plan: LinkPlan | None = None
        """the plan by which the last passt served"""
        self._fallback: LinkPlan | None = None
        """the plan to go back to, if no passt comes up by the new one"""
        self.fell_back = False
        """whether the plan is not the one that was wanted last"""
        self._listeners: ListenerWatch | None = None
        self._listened_for: LinkPlan | None = None
        self._judge = StallJudge(plan.stall_timeout)
        self._short_lives = 0
        self._crashing = False
        """the last passt has crashed as soon as it served: the next one has to prove itself first"""

    # --- from outside ---------------------------------------------------------------------------------

    @property
    def stream_fd(self) -> int | None:
        """QEMU's end of the stream, to be inherited by QEMU; held here as well. None: QEMU makes a connection."""
        assert self._connection is not None, "a link that has started has a connection"
        return self._connection.stream.fd

    @property
    def process_id(self) -> ProcessId | None:
        """The passt of ours that serves this link now."""
        return self._connection.process_id if self._connection else None

    async def start(self, tasks: TaskGroup) -> None:
        """Get a stream to a passt that answers; afterwards the link lives in ``tasks``.

        :raise Unavailable: passt cannot be run, ended (its words are quoted), does not answer, or is not found.
        """
        self._tasks = tasks
        self._post(Event.START)
        await self._idle.wait()
        if self.state is State.DOWN:
            assert self._error is not None
            raise self._error

    def adopt(self, left: LeftLink, tasks: TaskGroup) -> None:
        """Go on where another supervisor was; :meth:`heal_with` comes next."""
        self._tasks = tasks
        record = left.record
        self.generation = record.generation
        self._serving_plan = _serving_plan(self.plan, record)
        if self.is_outdated:
            self._fallback = self._serving_plan
        self._port.adopt(record.number, swapping=record.swapping)
        tell = partial(self._emit, "passt.output")
        passt = None
        if left.passt is not None:
            program = (record.argv or self.plan.passt or ("",))[0]
            passt = Passt.adopt(left.passt, program, tasks, lambda line: tell(line=line))
        elif left.last_words is not None:
            tasks.start_soon(read_last_words, left.last_words, tell)
        try:
            connection = self._connection = self._take_over(record, left.end, passt)
        except OSError:
            if passt is not None:
                passt.let_go()
            raise
        connection.pesto_socket = self._pesto_socket
        if left.hidden:
            loss = _Loss("requested", time.monotonic(), "its passt cannot be told from other processes")
        elif record.passt is not None and passt is None:
            loss = _Loss("exited", time.monotonic(), "while there was no supervisor")
        elif record.swapping or not self._is_whole(connection):
            loss = _Loss("requested", time.monotonic(), "its stream could not be taken over")
        else:
            self._hold(connection)
            self._post(Event.ADOPTED)
            return
        self._loss = loss
        self._post(Event.ADOPTED_LOST)

    def _take_over(self, record: LinkRecord, end: socket.socket | None, passt: Passt | None) -> Connection:
        return Connection.adopt(record, end, passt)

    def _is_whole(self, connection: Connection) -> bool:
        """Whether all is there that the link needs to go on."""
        return connection.held

    @property
    def record(self) -> LinkRecord:
        """What another supervisor would need to know to go on from here."""
        connection = self._connection
        return LinkRecord(
            index=self.plan.index,
            mode=self.plan.mode,
            generation=self.generation,
            number=self._port.number,
            swapping=self.state not in {State.CONNECTED, State.UP},
            passt=self.process_id,
            passt_pid=connection.pid if connection else None,
            socket=connection.path if connection else None,
            inode=connection.stream.inode if connection else None,
            mac=self.plan.mac,
            argv=self._serving_plan.passt if self._serving_plan else None,
            changed=self.plan.changed,
        )

    @property
    def settled(self) -> bool:
        """Whether nothing is under way that another supervisor could not go on with."""
        return self.state in {State.UP, State.WAITING, State.FAILED}

    def stand_back(self) -> dict[str, int]:
        """Leave passt as it is, and what QEMU has; returns fds for whoever comes next, by the names of the fd store."""
        connection, self._connection = self._connection, None
        self._forget_listeners()
        if connection is None:
            return {}
        kept = copies(self._fds_to_keep(connection))
        if connection.passt is not None:
            connection.passt.let_go()
        if connection.held:
            kept[stored_name(self.plan.index)] = connection.stream.socket.detach()
        return kept

    def serve(self, listener: socket.socket) -> None:
        """Serve a QEMU that makes the connection itself, on a socket that is this link's from now on."""
        raise NotImplementedError(f"a link of mode {self.plan.mode} hands QEMU its stream")

    def note_qemu_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Take notice of an event of QEMU's; a stream that it was handed it says nothing about."""

    def heal_with(self, qmp: Qmp) -> None:
        """The VM is ready: from now on a lost passt is replaced."""
        self._qmp = qmp
        self._post(Event.VM_READY)
        if self.state is State.UP and self._fallback is not None:
            self._emit(
                "link.notice",
                notice="the file has changed while there was no supervisor: another passt comes up by its new options",
            )
            self.renew()

    @property
    def connected(self) -> bool:
        """Whether a passt answers, and QEMU can be started."""
        return self.state is State.CONNECTED

    async def wait_until_idle(self) -> None:
        """Wait for the end of what is under way."""
        await self._idle.wait()

    async def tell(self, plan: LinkPlan) -> bool:
        """Go by a plan with other forwards from now on by telling passt, which interrupts nothing.

        Returns whether that could be done; if not, :meth:`reload` can do it.

        :raise Conflict: passt has tried, and could not. All is as it was before.
        """
        connection, serving, before = self._connection, self._serving_plan, self.plan
        if (
            self.state is not State.UP
            or connection is None
            or connection.passt is None
            or connection.pesto_socket is None
            or not connection.pesto_socket.is_socket()
            or plan.pesto is None
            or serving is None
            or _but_for_forwards(serving) != _but_for_forwards(plan)
        ):
            return False
        # First what is wanted: should this supervisor end meanwhile, or passt, the next one goes by it.
        self.plan, self._fallback = plan, serving
        self._around.note_change()
        hear = partial(connection.passt.hear_out, connection.passt.count)
        told, old = (forwards.given(each.passt) for each in (plan, serving))
        try:
            await pesto.change(plan.pesto, str(connection.pesto_socket), told, old, hear)
        except pesto.Refused as refusal:
            self.plan, self._fallback = before, None
            self._around.note_change()
            if not refusal.undone:
                self.renew()  # what it forwards now is not known
            # As root, passt gives up more than we have: what we might bind is denied to it.
            denied = "Permission denied" in str(refusal) or None
            hint = suggest(str(refusal), unprivileged=denied)
            raise Conflict(f"passt could not do it: {refusal}", hint=hint) from refusal
        except Unavailable as error:
            self._emit("link.notice", notice=f"passt could not be told of other forwards: {error.message}")
            return False
        if connection is not self._connection or self.state is not State.UP:
            return False  # lost meanwhile
        self._serving_plan, self._fallback = plan, None
        self._around.note_change()
        self._tell_forwards("pesto")
        return True

    def _tell_forwards(self, how: str) -> None:
        now = forwards.given(self.plan.passt)
        self._emit("link.forwards", by=how, tcp=now["tcp"], udp=now["udp"])

    @property
    def _pesto_socket(self) -> Path | None:
        return self._around.pesto_socket and self._around.pesto_socket(self.plan.index)

    def reload(self, plan: LinkPlan) -> bool:
        """Go by another plan from now on, as far as the NIC that is there allows it.

        Returns whether that takes another passt: with other options, from an upgraded program, or after failures.
        If none comes up by the new plan, the one by which the last one served is gone back to.
        """
        if plan.mode != self.plan.mode:
            return False  # another NIC
        if plan.stall_timeout != self.plan.stall_timeout:
            self._judge = StallJudge(plan.stall_timeout)
        self.plan = replace(self.plan, **{name: getattr(plan, name) for name in _RELOADABLE})
        self._around.note_change()
        self.fell_back = False
        if not (self.state in {State.WAITING, State.FAILED} or self.is_outdated):
            return False
        if self.state is State.UP:
            # What comes next may be changed again before it has served: this is what has.
            self._fallback = self._serving_plan
        self.renew()
        return self.state not in {State.ENDING, State.ENDED}

    def limit(self, limit: int, window: float) -> None:
        """Give up after so many attempts that have failed within ``window`` seconds."""
        self._backoff.limit, self._backoff.window = limit, window

    @property
    def is_outdated(self) -> bool:
        """Whether passt is another one than the plan wants, or its program has been upgraded."""
        if self._serving_plan is not None and not _is_same_passt(self._serving_plan, self.plan):
            return True
        passt = self._connection.passt if self._connection else None
        return passt is not None and passt.is_outdated

    @property
    def next_look(self) -> float:
        """Seconds until :meth:`look` is worth its while."""
        return self._judge.next_look

    def look(self, *, paused: bool) -> None:
        """Judge whether passt hangs.

        :param paused: the guest does not run, and that nothing moves is no fault of passt's.
        """
        connection = self._connection
        if paused or connection is None or self.state is not State.UP:
            self._judge.reset()
            return
        addresses = self.plan.listen_addresses if self._judge.quiet else ()
        signs = vital_signs.read(connection.pid, connection.stream.fd, addresses)
        match self._judge.judge(time.monotonic(), signs):
            case Verdict.STALLED:
                self._lose(connection, "stalled", self._judge.reason)
            case Verdict.ANNOUNCE:
                assert self._tasks is not None
                self._tasks.start_soon(self._announce)

    @property
    def unread(self) -> tuple[int | None, int | None]:
        """Bytes that wait in the stream: for passt, and for QEMU. None: there is no stream of ours to look at."""
        connection = self._connection
        if connection is None or not connection.held or self.plan.mode != "swap":
            return None, None
        try:
            fd = connection.stream.fd
            return vital_signs.unread_by_peer(fd), vital_signs.unread_by_us(fd)
        except (OSError, ValueError):  # it is closed, or being closed
            return None, None

    async def _announce(self) -> None:
        """Have something written to passt, to see whether it reads."""
        assert self._qmp is not None
        # A monitor that does not answer is told of where that matters.
        with contextlib.suppress(QmpFailed):
            await self._port.announce(self._qmp)

    def renew(self) -> None:
        """Replace the passt, or try again at once if there is none."""
        self._backoff.forget()
        if self.state is State.UP:
            self._loss = _Loss("requested", time.monotonic())
        self._post(Event.RENEW)

    async def release(self) -> None:
        """Let go of the stream and see a passt of ours off. Not cancellable: nothing may be left behind."""
        self._post(Event.RELEASE)
        with anyio.CancelScope(shield=True):
            self._work.cancel()
            await self._idle.wait()
            self._forget_listeners()
            if self._connection is not None:
                await self._see_off(self._connection)
        self._post(Event.RELEASED)

    # --- the table's servant --------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        self.state, actions = advance(self.state, event)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Action.ACQUIRE:
                self._begin(self._acquire)
            case Action.REAP:
                self._begin(self._reap)
            case Action.SWAP:
                self._begin(self._swap)
            case Action.PLAN_RETRY:
                self._plan_retry()
            case Action.TELL_CONNECTED:
                self._tell_connected()
            case Action.TELL_RESTORED:
                self._tell_restored()
            case Action.REPORT:
                self._begin(self._report_loss)
            case Action.LET_GO:
                pass  # release() does so, which must work where no task can be started any more

    def _begin(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do one thing in the background, after the one that is under way, which is cancelled."""
        assert self._tasks is not None
        before = self._idle
        self._work.cancel()
        self._work, self._idle = anyio.CancelScope(), anyio.Event()
        self._tasks.start_soon(self._do, work, before, self._work, self._idle)

    async def _do(
        self,
        work: Callable[[], Awaitable[None]],
        before: anyio.Event,
        scope: anyio.CancelScope,
        idle: anyio.Event,
    ) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await before.wait()
            with scope:
                await work()
        finally:
            idle.set()

    # --- coming up ------------------------------------------------------------------------------------

    def _make_port(self) -> Port:
        return HubPort(self.plan.index, self.plan.hub, self.plan.nic)

    async def _get_connection(self, tasks: TaskGroup) -> Connection:
        return await acquire(
            self.plan, self._around.directory, self._emit, tasks, pesto_socket=self._pesto_socket
        )

    async def _acquire(self) -> None:
        assert self._tasks is not None
        self._watch_listeners()
        try:
            if self._loss is None:
                connection = await self._get_connection(self._tasks)
            else:
                async with turn():
                    connection = await self._get_connection(self._tasks)
        except (Unavailable, OSError) as error:
            self._error = failure = error if isinstance(error, Unavailable) else _refused_by_host(error)
            self._fall_back(failure)
            self._post(Event.ACQUIRE_FAILED)
            return
        connection.introduce(self.plan.mac, self.plan.guest_addresses)
        self._connection = connection
        self._hold(connection)
        self._post(Event.ACQUIRED)

    def _hold(self, connection: Connection) -> None:
        assert self._tasks is not None
        connection.watch(self._around.hang_ups, self._tasks, partial(self._note_hang_up, connection))
        if self.plan.mode == "swap" and connection.held:
            self._around.keeper.store(stored_name(self.plan.index), [connection.stream.fd])
        self._keep_passt(connection)

    def _keep_passt(self, connection: Connection) -> None:
        for name, fd in self._fds_to_keep(connection).items():
            self._around.keeper.store(name, [fd])

    def _fds_to_keep(self, connection: Connection) -> dict[str, int]:
        """What tells the next supervisor who passt is, and what passt says meanwhile."""
        name = passt_name(self.plan.index)
        if connection.passt is None:
            return {}
        fds = {name: connection.passt.pidfd, output_name(name): connection.passt.output}
        return {name: fd for name, fd in fds.items() if fd >= 0}

    def _fall_back(self, error: Unavailable) -> None:
        """A change of the file that does not work must not cost a guest the network that it had."""
        if self._fallback is None:
            return
        back = {name: getattr(self._fallback, name) for name in (*_PASSTS, "changed")}
        self.plan, self._fallback = replace(self.plan, **back), None
        self.fell_back = True
        self._emit(
            "link.notice",
            notice=f"passt does not come up with its new options, so the old ones stay: {error.message}",
        )
        self._post(Event.RENEW)

    async def _swap(self) -> None:
        connection, qmp = self._connection, self._qmp
        assert connection is not None
        assert qmp is not None
        self._around.note_change()
        try:
            await self._port.swap(qmp, connection.stream.fd)
        except QmpFailed as error:
            self._error = error
            self._post(Event.SWAP_FAILED)
        else:
            self._post(Event.SWAPPED)

    def _tell_connected(self) -> None:
        assert self._connection is not None
        self.generation = FIRST_GENERATION
        self._serving_plan = self.plan
        self._keep_passt(self._connection)
        self._emit(
            "link.connected",
            generation=self.generation,
            source=self.plan.source,
            passt_pid=self._connection.pid,
            socket=self._connection.path,
        )

    def _tell_restored(self) -> None:
        assert self._connection is not None
        assert self._loss is not None
        outage = time.monotonic() - self._loss.at
        self.generation += 1
        self._loss = None
        served, self._serving_plan, self._fallback = self._serving_plan, self.plan, None
        self._judge.reset()
        if self._crashing:
            self._backoff.succeed()
        else:
            self._backoff.forget()
        self._around.note_change()
        self._emit(
            "link.restored",
            generation=self.generation,
            outage_ms=round(outage * 1000, 1),
            source=self.plan.source,
            passt_pid=self._connection.pid,
            socket=self._connection.path,
        )
        if served is not None and forwards.given(served.passt) != forwards.given(self.plan.passt):
            self._tell_forwards("swap")
        self._forget_listeners()

    # --- being lost -----------------------------------------------------------------------------------

    def _note_hang_up(self, connection: Connection) -> None:
        connection.hung_up = True
        self._lose(connection, "hangup")

    def _lose(self, connection: Connection, reason: str, detail: str | None = None) -> None:
        if connection is not self._connection:
            return  # replaced since
        if self._loss is None:
            self._loss = _Loss(reason, time.monotonic(), detail)
        self._post(Event.LOST)

    async def _reap(self) -> None:
        if self._around.is_ending():
            # A QEMU that ends drops its connections first: its end is the news, and release() comes next.
            await anyio.sleep(END_GRACE)
        event = Event.REAPED
        if connection := self._connection:
            await self._bury(connection)
            if connection.has_proved_itself:
                self._crashing = False
                self._short_lives = 0
                self._backoff.forget()
            elif connection.crashed or self._is_unreliable(connection):
                self._error = connection.explain_end()
                self._crashing = True
                event = Event.CRASHED
        self._post(event)

    def _is_unreliable(self, connection: Connection) -> bool:
        """Whether somebody else's passt has hung up at once, several times in a row: it would go on like that."""
        self._short_lives += 1
        return connection.passt is None and self._short_lives >= PATIENCE_WITH_STRANGERS

    async def _report_loss(self) -> None:
        connection = self._connection
        assert connection is not None
        await self._bury(connection)
        self._around.note_failed_start(connection.explain_end())

    async def _bury(self, connection: Connection) -> None:
        """See a passt off, and tell of its loss: first, where its end is still to come, for that may take a while."""
        loss = self._loss
        assert loss is not None
        if connection.hung_up:
            await connection.wait_for_end(HANG_UP_GRACE)
        if connection.status is None:
            self._tell_lost(loss)
        elif loss.reason == "hangup":
            loss.reason = "exited"
        # Whoever hangs, or has hung up and stays, is not asked to go.
        await self._see_off(connection, kill=loss.reason in {"stalled", "hangup"})
        self._tell_lost(loss)

    def _tell_lost(self, loss: _Loss) -> None:
        """Once for each outage: a new passt that is lost again before the NIC had it prolongs the outage."""
        if not loss.told:
            loss.told = True
            self._emit("link.lost", generation=self.generation, reason=loss.reason, detail=loss.detail)

    async def _see_off(self, connection: Connection, *, kill: bool = False) -> None:
        self._around.hang_ups.remove(connection.stream)
        name = passt_name(self.plan.index)
        for kept in (stored_name(self.plan.index), name, output_name(name)):
            self._around.keeper.forget(kept)
        # A stream that we do not hold cannot be hung up: its passt would wait for ever.
        await connection.see_off(kill=kill or not connection.held)
        self._connection = None
        if connection.passt is not None and connection.status is not None:
            self._emit("passt.exited", pid=connection.passt.pid, **connection.status.fields)

    def _plan_retry(self) -> None:
        assert self._error is not None
        delay = self._backoff.fail(time.monotonic())
        self._watch_listeners()
        self._emit(
            "link.failed",
            attempts=self._backoff.attempts,
            retry_in_ms=None if delay is None else round(delay * 1000),
            error=self._error.message,
            hint=self._error.hint,
        )
        if delay is None:
            self._post(Event.GAVE_UP)
        if delay is not None or self._listeners is not None:
            self._begin(partial(self._wait, math.inf if delay is None else delay))

    async def _wait(self, delay: float) -> None:
        with anyio.move_on_after(delay):
            if self._listeners is None:
                await anyio.sleep_forever()
            else:
                await self._listeners.wait()
                self.renew()
                return
        self._post(Event.DELAY_OVER)

    def _watch_listeners(self) -> None:
        """From before the first attempt on: who comes to listen while it fails is not to be missed."""
        if self._loss is None or self._listened_for is self.plan:
            return
        self._forget_listeners()
        if self.plan.source != "managed":
            self._listeners = watch_listeners(self.plan, self._emit).__enter__()
            self._listened_for = self.plan

    def _forget_listeners(self) -> None:
        if self._listeners is not None:
            self._listeners.__exit__()
        self._listeners = self._listened_for = None
