# SPDX-License-Identifier: GPL-2.0-or-later
"""One link: a NIC's way to the host. What happens goes through its lifecycle table; the actions are carried out here.

A passt that is lost is replaced under the running NIC: the old one is seen off, a new one comes up on a stream of its
own, and QEMU is given that stream. The guest sees no change of carrier; its connections through the old passt are gone.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from qrapd import pesto, vital_signs
from qrapd.background import Background
from qrapd.backoff import Backoff
from qrapd.connection import Connection, acquire, explain_refusal, refused_by_host
from qrapd.errors import QmpFailed, QrapdError, Unavailable
from qrapd.foreign_passt import Newcomers
from qrapd.hub import HubPort
from qrapd.kept_fds import KeptProcess
from qrapd.left_behind import LeftLink, read_last_words
from qrapd.link_events import LinkEvents
from qrapd.link_lifecycle import Action, Event, State, advance
from qrapd.link_plans import LinkPlans
from qrapd.logs import Emit
from qrapd.loss import Loss
from qrapd.passt import Passt
from qrapd.plan import LinkPlan
from qrapd.qemu_arguments import FIRST_GENERATION
from qrapd.record import LinkRecord, ProcessId
from qrapd.retries import Retries
from qrapd.stall import StallJudge, Verdict
from qrapd.surroundings import Port, Surroundings
from qrapd.systemd import passt_name, stored_name
from qrapd.turns import turn

if TYPE_CHECKING:
    from qrapd.qmp import Qmp

__all__ = ["Link", "LinkState"]

LinkState = State

HANG_UP_GRACE = 0.25
"""Seconds for a passt to end after it has hung up: it takes about a millisecond. One that does not is ended."""

END_GRACE = 1.0
"""Seconds between QEMU's dropping a connection and its end that count as one and the same."""


class Link:
    """One NIC's passt and stream, from :meth:`start` to :meth:`release`. What differs by mode is in subclasses."""

    def __init__(self, plan: LinkPlan, backoff: Backoff, around: Surroundings) -> None:
        self.state = State.NEW
        self.generation = 0
        self._plans = LinkPlans(plan)
        self._around = around
        self._emit: Emit = partial(around.emit, link=plan.index)
        self._events = LinkEvents(self._emit)
        self._retries = Retries(backoff)
        self._port = self._make_port()
        self._qmp: Qmp | None = None
        self._tasks: TaskGroup | None = None
        self._work = Background()
        self._connection: Connection | None = None
        self._loss: Loss | None = None
        self._error: QrapdError | None = None
        self._kept_passt = KeptProcess(around.keeper, passt_name(plan.index))
        self._newcomers = Newcomers(self._emit)
        self._judge = StallJudge(plan.stall_timeout)

    @property
    def plan(self) -> LinkPlan:
        """By which the next passt comes up."""
        return self._plans.wanted

    @property
    def fell_back(self) -> bool:
        """Whether the plan is not the one that was wanted last, as no passt came up by that."""
        return self._plans.fell_back

    # --- the VM's start and end -----------------------------------------------------------------------

    async def start(self, tasks: TaskGroup) -> None:
        """Get a stream to a passt that answers; afterwards the link lives in ``tasks``.

        :raise Unavailable: passt cannot be run, ended (its words are quoted), does not answer, or is not found.
        """
        self._tasks = tasks
        self._post(Event.START)
        await self._work.wait_until_idle()
        if self.state is State.DOWN:
            assert self._error is not None
            raise self._error

    @property
    def stream_fd(self) -> int | None:
        """QEMU's end of the stream, to be inherited by QEMU; held here as well. None: QEMU makes a connection."""
        assert self._connection is not None, "a link that has started has a connection"
        return self._connection.stream.fd

    @property
    def connected(self) -> bool:
        """Whether a passt answers, and QEMU can be started."""
        return self.state is State.CONNECTED

    def serve(self, listener: socket.socket) -> None:
        """Serve a QEMU that makes the connection itself, on a socket that is this link's from now on."""
        raise NotImplementedError(f"a link of mode {self.plan.mode} hands QEMU its stream")

    async def wait_until_idle(self) -> None:
        """Wait for the end of what is under way."""
        await self._work.wait_until_idle()

    def heal_with(self, qmp: Qmp) -> None:
        """The VM is ready: from now on a lost passt is replaced."""
        self._qmp = qmp
        self._post(Event.VM_READY)
        if self.state is State.UP and self._plans.is_on_trial:
            self._events.notice(
                "the file has changed while there was no supervisor: another passt comes up by its new options"
            )
            self.renew()

    def note_qemu_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Take notice of an event of QEMU's; a stream that it was handed it says nothing about."""

    async def release(self) -> None:
        """Let go of the stream and see a passt of ours off. Not cancellable: nothing may be left behind."""
        self._post(Event.RELEASE)
        with anyio.CancelScope(shield=True):
            await self._work.end()
            self._newcomers.forget()
            if self._connection is not None:
                await self._see_off(self._connection)
        self._post(Event.RELEASED)

    # --- from one supervisor to the next --------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether nothing is under way that another supervisor could not go on with."""
        return self.state in {State.UP, State.WAITING, State.FAILED}

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
            argv=self._plans.serving.passt if self._plans.serving else None,
            changed=self.plan.changed,
        )

    @property
    def process_id(self) -> ProcessId | None:
        """The passt of ours that serves this link now."""
        return self._connection.process_id if self._connection else None

    def stand_back(self) -> dict[str, int]:
        """Leave passt as it is, and what QEMU has; returns fds for whoever comes next, by the names of the fd store."""
        connection, self._connection = self._connection, None
        self._newcomers.forget()
        if connection is None:
            return {}
        kept = {}
        if connection.passt is not None:
            kept = self._kept_passt.copies(connection.passt)
            connection.passt.let_go()
        if connection.held:
            kept[stored_name(self.plan.index)] = connection.stream.socket.detach()
        return kept

    def adopt(self, left: LeftLink, tasks: TaskGroup) -> None:
        """Go on where another supervisor was; :meth:`heal_with` comes next."""
        self._tasks = tasks
        record = left.record
        self.generation = record.generation
        self._plans.adopt(record)
        self._port.adopt(record.number, swapping=record.swapping)
        passt = self._adopt_passt(left, tasks)
        try:
            connection = self._connection = self._take_over(record, left.end, passt)
        except OSError:
            if passt is not None:
                passt.let_go()
            raise
        connection.pesto_socket = self._pesto_socket
        self._loss = Loss.while_nobody_watched(
            time.monotonic(),
            hidden=left.hidden,
            died=record.passt is not None and passt is None,
            swapping=record.swapping,
            whole=self._is_whole(connection),
        )
        if self._loss is None:
            self._hold(connection)
        self._post(Event.ADOPTED if self._loss is None else Event.ADOPTED_LOST)

    def _adopt_passt(self, left: LeftLink, tasks: TaskGroup) -> Passt | None:
        """The passt that was left; of one that has ended its last words are handed on."""
        tell = partial(self._emit, "passt.output")
        if left.passt is not None:
            program = (left.record.argv or self.plan.passt or ("",))[0]
            return Passt.adopt(left.passt, program, tasks, lambda line: tell(line=line))
        if left.last_words is not None:
            tasks.start_soon(read_last_words, left.last_words, tell)
        return None

    def _take_over(self, record: LinkRecord, end: socket.socket | None, passt: Passt | None) -> Connection:
        return Connection.adopt(record, end, passt)

    def _is_whole(self, connection: Connection) -> bool:
        """Whether all is there that the link needs to go on."""
        return connection.held

    # --- changes while the VM runs --------------------------------------------------------------------

    def renew(self) -> None:
        """Replace the passt, or try again at once if there is none."""
        self._retries.begin_anew()
        if self.state is State.UP:
            self._loss = Loss("requested", time.monotonic())
        self._post(Event.RENEW)

    def reload(self, plan: LinkPlan) -> bool:
        """Go by another plan from now on, as far as the NIC that is there allows it.

        Returns whether that takes another passt: with other options, from an upgraded program, or after failures.
        If none comes up by the new plan, the one by which the last one served is gone back to.
        """
        if plan.mode != self.plan.mode:
            return False  # another NIC
        if plan.stall_timeout != self.plan.stall_timeout:
            self._judge = StallJudge(plan.stall_timeout)
        self._plans.change(plan)
        self._around.note_change()
        if not (self.state in {State.WAITING, State.FAILED} or self.is_outdated):
            return False
        if self.state is State.UP:
            # What comes next may be changed again before it has served: this is what has.
            self._plans.remember_serving()
        self.renew()
        return self.state not in {State.ENDING, State.ENDED}

    @property
    def is_outdated(self) -> bool:
        """Whether passt is another one than the plan wants, or its program has been upgraded."""
        passt = self._connection.passt if self._connection else None
        return self._plans.is_outdated or (passt is not None and passt.is_outdated)

    def limit(self, limit: int, window: float) -> None:
        """Give up after so many attempts that have failed within ``window`` seconds."""
        self._retries.limit(limit, window)

    async def tell(self, plan: LinkPlan) -> bool:
        """Go by a plan with other forwards from now on by telling passt, which interrupts nothing.

        Returns whether that could be done; if not, :meth:`reload` can do it.

        :raise Conflict: passt has tried, and could not. All is as it was before.
        """
        connection, change = self._connection, self._plans.change_of_forwards(plan)
        if self.state is not State.UP or connection is None or not connection.can_be_told:
            return False
        if plan.pesto is None or change is None:
            return False
        # First what is wanted: should this supervisor end meanwhile, or passt, the next one goes by it.
        before = self._plans.try_out(plan)
        self._around.note_change()
        try:
            await connection.tell_forwards(plan.pesto, *change)
        except pesto.Refused as refusal:
            self._plans.withdraw(before)
            self._around.note_change()
            if not refusal.undone:
                self.renew()  # what it forwards now is not known
            raise explain_refusal(refusal) from refusal
        except Unavailable as error:
            self._events.notice(f"passt could not be told of other forwards: {error.message}")
            return False
        if connection is not self._connection or self.state is not State.UP:
            return False  # lost meanwhile
        self._plans.note_serving()
        self._around.note_change()
        self._events.forwards("pesto", plan.passt)
        return True

    # --- whether passt hangs --------------------------------------------------------------------------

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

    async def _announce(self) -> None:
        """Have something written to passt, to see whether it reads."""
        assert self._qmp is not None
        # A monitor that does not answer is told of where that matters.
        with contextlib.suppress(QmpFailed):
            await self._port.announce(self._qmp)

    @property
    def unread(self) -> tuple[int | None, int | None]:
        """Bytes that wait in the stream: for passt, and for QEMU. None: there is no stream of ours to look at."""
        return self._connection.unread if self._connection else (None, None)

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
        """Do this in the background; what is under way there is cancelled."""
        assert self._tasks is not None
        self._work.begin(self._tasks, work)

    # --- coming up ------------------------------------------------------------------------------------

    def _make_port(self) -> Port:
        return HubPort(self.plan.index, self.plan.hub, self.plan.nic)

    @property
    def _pesto_socket(self) -> Path | None:
        return self._around.pesto_socket and self._around.pesto_socket(self.plan.index)

    async def _get_connection(self, tasks: TaskGroup) -> Connection:
        return await acquire(
            self.plan, self._around.directory, self._emit, tasks, pesto_socket=self._pesto_socket
        )

    async def _acquire(self) -> None:
        assert self._tasks is not None
        self._watch_for_newcomers()
        try:
            if self._loss is None:
                connection = await self._get_connection(self._tasks)
            else:
                async with turn():
                    connection = await self._get_connection(self._tasks)
        except (Unavailable, OSError) as error:
            self._error = failure = error if isinstance(error, Unavailable) else refused_by_host(error)
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
        if connection.passt is not None:
            self._kept_passt.keep(connection.passt)

    def _fall_back(self, error: Unavailable) -> None:
        """A change of the file that does not work must not cost a guest the network that it had."""
        if self._plans.go_back():
            self._events.notice(
                f"passt does not come up with its new options, so the old ones stay: {error.message}"
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
        connection = self._connection
        assert connection is not None
        self.generation = FIRST_GENERATION
        self._plans.note_serving()
        self._keep_passt(connection)
        self._events.connected(self.generation, self.plan.source, connection.pid, connection.path)

    def _tell_restored(self) -> None:
        connection = self._connection
        assert connection is not None
        assert self._loss is not None
        outage = time.monotonic() - self._loss.at
        self.generation += 1
        self._loss = None
        has_other_forwards = self._plans.note_serving()
        self._judge.reset()
        self._retries.note_up()
        self._around.note_change()
        self._events.restored(self.generation, outage, self.plan.source, connection.pid, connection.path)
        if has_other_forwards:
            self._events.forwards("swap", self.plan.passt)
        self._newcomers.forget()

    # --- being lost -----------------------------------------------------------------------------------

    def _note_hang_up(self, connection: Connection) -> None:
        connection.hung_up = True
        self._lose(connection, "hangup")

    def _lose(self, connection: Connection, reason: str, detail: str | None = None) -> None:
        if connection is not self._connection:
            return  # replaced since
        if self._loss is None:
            self._loss = Loss(reason, time.monotonic(), detail)
        self._post(Event.LOST)

    async def _reap(self) -> None:
        if self._around.is_ending():
            # A QEMU that ends drops its connections first: its end is the news, and release() comes next.
            await anyio.sleep(END_GRACE)
        event = Event.REAPED
        if connection := self._connection:
            await self._bury(connection)
            failed = self._retries.note_end(
                lasted=connection.has_proved_itself,
                crashed=connection.crashed,
                ours=connection.passt is not None,
            )
            if failed:
                self._error = connection.explain_end()
                event = Event.CRASHED
        self._post(event)

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
        else:
            loss.note_exit()
        await self._see_off(connection, kill=loss.needs_kill)
        self._tell_lost(loss)

    def _tell_lost(self, loss: Loss) -> None:
        if not loss.told:
            loss.told = True
            self._events.lost(self.generation, loss.reason, loss.detail)

    async def _see_off(self, connection: Connection, *, kill: bool = False) -> None:
        self._around.hang_ups.remove(connection.stream)
        self._around.keeper.forget(stored_name(self.plan.index))
        self._kept_passt.forget()
        # A stream that we do not hold cannot be hung up: its passt would wait for ever.
        await connection.see_off(kill=kill or not connection.held)
        self._connection = None
        if connection.passt is not None and connection.status is not None:
            self._emit("passt.exited", pid=connection.passt.pid, **connection.status.fields)

    def _plan_retry(self) -> None:
        assert self._error is not None
        delay = self._retries.fail(time.monotonic())
        self._watch_for_newcomers()
        self._events.failed(self._retries.attempts, delay, self._error)
        if delay is None:
            self._post(Event.GAVE_UP)
        if delay is not None or self._newcomers.watched:
            self._begin(partial(self._wait, math.inf if delay is None else delay))

    async def _wait(self, delay: float) -> None:
        with anyio.move_on_after(delay):
            await self._newcomers.wait()
            self.renew()
            return
        self._post(Event.DELAY_OVER)

    def _watch_for_newcomers(self) -> None:
        """From before the first attempt on: who comes to listen while it fails is not to be missed."""
        if self._loss is not None:
            self._newcomers.watch(self.plan)
