# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM, from start to end: what happens goes through the lifecycle table, and its actions are carried out here."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from qrapd import record
from qrapd.backoff import Backoff
from qrapd.console import Console
from qrapd.errors import AlreadySupervised, QmpFailed, QrapdError, Unavailable
from qrapd.left_behind import Left
from qrapd.lifecycle import DEADLINES, TABLE, Action, Deadline, Event, Reason, State, advance, judge_exit
from qrapd.link import Link, Surroundings, copies
from qrapd.logs import Emit
from qrapd.native import NativeLink, keep_awake
from qrapd.plan import LinkPlan, Plan
from qrapd.process import ExitStatus
from qrapd.qemu import Qemu
from qrapd.runtime_directory import VmDirectory
from qrapd.stream import HangUpWatch
from qrapd.systemd import QEMU, Keeper, output_name
from qrapd.vhost_user import VhostUserLink

if TYPE_CHECKING:
    from qrapd.qmp import Qmp
    from qrapd.vm_status import Origin

__all__ = ["Outcome", "Vm"]

QMP_TIMEOUT = 120.0
"""Seconds for a started QEMU to answer on its monitor: it sets up the guest's memory first, huge pages included."""

PRESS_AGAIN_SECONDS = 5.0
"""The power button is pressed again this often: a guest that still boots has no ear for it yet, and loses it."""

HANG_UP_GRACE = 1.0
"""Seconds between QEMU's closing its monitor and its end that count as one and the same."""

ADOPTION_TIMEOUT = 30.0
"""Seconds for a QEMU that was left to answer on its monitor; it has run for a while and does so in milliseconds."""

SETTLE_TIMEOUT = 15.0
"""Seconds to wait for links that are just being healed before a VM is left; it takes some 30 ms."""

SETTLE_INTERVAL = 0.02
"""Seconds between two looks at that."""

# QEMU's qapi/run-state.json, RunState: nobody is awake in there to obey a power button.
_PAUSED = frozenset({"paused", "prelaunch", "inmigrate", "io-error"})


_PAUSING = {"STOP": True, "SUSPEND": True, "RESUME": False, "WAKEUP": False}
"""QEMU's events that tell of it, and whether the guest runs no more."""

_LINKS: Mapping[str, type[Link]] = {"swap": Link, "vhost-user": VhostUserLink, "native": NativeLink}
"""By their modes."""


@dataclass(frozen=True)
class Outcome:
    """How a VM ended; ``error`` says what went wrong, if anything did."""

    reason: Reason
    error: QrapdError | None = None
    stood_back: bool = False
    """the VM runs on, for another qrapd"""
    fds: Mapping[str, int] = field(default_factory=dict)
    """of a VM that runs on: what its next supervisor is given, by the names of the fd store"""


class Vm:
    """One QEMU and its links. Make it, await :meth:`run`, and call :meth:`stop` from another task."""

    def __init__(
        self,
        plan: Plan,
        directory: VmDirectory,
        emit: Emit,
        *,
        keeper: Keeper,
        origin: Origin,
        left: Left | None = None,
    ) -> None:
        self.plan = plan
        self._origin = origin
        self.state = State.NEW
        self._directory = directory
        self._emit: Emit = partial(emit, vm=plan.name)
        self._hang_ups = HangUpWatch()
        around = Surroundings(
            directory=plan.passt_directory,
            emit=self._emit,
            hang_ups=self._hang_ups,
            note_change=self._write_record,
            keeper=keeper,
            is_ending=self._is_ending,
            note_failed_start=self._note_failed_start,
            pesto_socket=directory.pesto_socket,
        )
        limits = plan.restart
        self.links = [
            _LINKS[link.mode](link, Backoff(limits.limit, limits.window), around) for link in plan.links
        ]
        self._left = left
        self._all_taken = left is None
        """whether what was left is all in our hands: before that, the record that was found knows more than we do"""
        self._keeper = keeper
        self._stood_back = False
        self.handed_over: dict[str, int] = {}
        """after :meth:`leave`: fds for whoever comes next, by the names of the fd store"""
        self._qemu: Qemu | None = None
        self._qmp: Qmp | None = None
        self._status: ExitStatus | None = None
        self._error: QrapdError | None = None
        self._shutdown_cause: str | None = None
        self._stop_requested = False
        self._send, self._inbox = anyio.create_memory_object_stream[tuple[Event, int | None]](math.inf)
        self._state_number = 0
        self._start_scope = anyio.CancelScope()
        self._start_settled = anyio.Event()
        self._machine = "unknown"
        self._paused = False
        self._greeted = False
        self.ready = anyio.Event()
        """set once the machine has run"""
        if left is not None:
            self._post(
                Event.ADOPT
            )  # before anybody can ask for its end, which is not to be the supervisor's alone

    # --- from outside ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for an orderly end; asked again, take the next, rougher step at once."""
        event = Event.HURRY if self._stop_requested else Event.STOP
        self._stop_requested = True
        self._post(event)

    @property
    def console(self) -> Console | None:
        """The guest's serial console; None where there is no QEMU, or it is not qrapd's business."""
        return self._qemu.console if self._qemu is not None else None

    def kill(self) -> None:
        """End QEMU at once, whatever that does to the guest."""
        self._stop_requested = True
        self._post(Event.KILL)

    async def leave(self) -> None:
        """Let the VM be for another qrapd to adopt, as soon as no link is in the middle of something."""
        with anyio.move_on_after(SETTLE_TIMEOUT):
            while not all(link.settled for link in self.links):  # noqa: ASYNC110 (for some 30 ms, once)
                await anyio.sleep(SETTLE_INTERVAL)
        self._post(Event.LEAVE)

    def reload(self, plan: Plan) -> list[int]:
        """Apply what another version of the VM's file changes and a machine that runs can take.

        Returns the links that get another passt for it.
        """
        self.plan = replace(
            self.plan,
            powerdown_timeout=plan.powerdown_timeout,
            quit_timeout=plan.quit_timeout,
        )
        if len(plan.links) != len(self.links):
            return []  # which NIC a table now means is not for us to guess
        limits = plan.restart
        for link in self.links:
            link.limit(limits.limit, limits.window)
        return [link.plan.index for link, new in zip(self.links, plan.links, strict=True) if link.reload(new)]

    @property
    def fallen_back(self) -> dict[int, LinkPlan]:
        """The plans that links have gone back to, by their indices, as no passt came up by the file's."""
        return {link.plan.index: link.plan for link in self.links if link.fell_back}

    async def run(self) -> Outcome:
        """Live the VM's whole life. When this returns or is cancelled, nothing of the VM is left."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._hang_ups.run)
                if self._left is None:
                    self._post(Event.START)
                while self.state is not State.ENDED:
                    event, number = await self._inbox.receive()
                    if number in (None, self._state_number):
                        self._step(event, tasks)
                tasks.cancel_scope.cancel()
        finally:
            # Only now: a spawn that was under way when a cancellation came has ended, and left its process to us.
            await self._leave_nothing()
        return self._judge()

    # --- the table's servant --------------------------------------------------------------------------

    def _post(self, event: Event, number: int | None = None) -> None:
        self._send.send_nowait((event, number))

    def _step(self, event: Event, tasks: TaskGroup) -> None:
        before = self.state
        self.state, actions = advance(before, event)
        if self.state is not before:
            self._state_number += 1
            if deadline := DEADLINES.get(self.state):
                tasks.start_soon(self._expire, self._seconds(deadline), self._state_number)
        for action in actions:
            self._carry_out(action, tasks)

    def _carry_out(self, action: Action, tasks: TaskGroup) -> None:
        match action:
            case Action.ADOPT:
                tasks.start_soon(self._adopt, tasks)
            case Action.ANNOUNCE_ADOPTED:
                self._announce_adopted()
                if self.links:
                    tasks.start_soon(self._watch_for_hangs)
            case Action.STAND_BACK:
                self._stand_back()
            case Action.START_LINKS:
                tasks.start_soon(self._start_links, tasks)
            case Action.SPAWN_QEMU:
                tasks.start_soon(self._spawn_qemu, tasks)
            case Action.CONNECT_QMP:
                tasks.start_soon(self._connect_qmp, tasks)
            case Action.ANNOUNCE_READY:
                self._announce_ready()
                if self.links:
                    tasks.start_soon(self._watch_for_hangs)
            case Action.POWER_DOWN:
                self._emit("vm.stopping", reason="request", how="power-down")
                tasks.start_soon(self._power_down)
            case Action.QUIT:
                self._emit("vm.stopping", reason="request", how="quit")
                tasks.start_soon(self._quit)
            case Action.TERMINATE:
                self._signal(signal.SIGTERM)
            case Action.KILL:
                self._signal(signal.SIGKILL)
            case Action.RELEASE_LINKS:
                self._start_scope.cancel()
                tasks.start_soon(self._release_links)
            case Action.FINISH:
                self._finish()

    def _announce_ready(self) -> None:
        assert self._qemu is not None
        assert self._qmp is not None
        for link in self.links:
            link.heal_with(self._qmp)
        self.ready.set()
        self._emit("vm.ready", qemu_pid=self._qemu.pid, status=self._machine, links=len(self.links))

    def _announce_adopted(self) -> None:
        assert self._qemu is not None
        assert self._qmp is not None
        for link in self.links:
            link.heal_with(self._qmp)
        self.ready.set()
        self._write_record()
        self._emit(
            "vm.adopted",
            qemu_pid=self._qemu.pid,
            status=self._machine,
            links=len(self.links),
            generations=[link.generation for link in self.links],
            passt_pids=[link.record.passt_pid for link in self.links],
        )

    def _seconds(self, deadline: Deadline) -> float:
        match deadline:
            case Deadline.QMP:
                return QMP_TIMEOUT
            case Deadline.ADOPTION:
                return ADOPTION_TIMEOUT
            case Deadline.POWERDOWN:
                return self.plan.powerdown_timeout
            case Deadline.QUIT:
                return self.plan.quit_timeout

    async def _expire(self, seconds: float, number: int) -> None:
        await anyio.sleep(seconds)
        if self.state is State.CONNECTING and number == self._state_number:
            self._error = QmpFailed(
                f"QEMU's monitor did not answer within {seconds:g} s of its start",
                hint="see what QEMU wrote (qemu.output events); is the host out of memory?",
            )
        self._post(Event.DEADLINE, number)

    # --- starting -------------------------------------------------------------------------------------

    async def _start_links(self, tasks: TaskGroup) -> None:
        try:
            with self._start_scope:
                async with anyio.create_task_group() as starting:
                    for link in self.links:
                        starting.start_soon(link.start, tasks)
                self._post(Event.LINKS_UP)
        except* QrapdError as group:
            self._error = _first(group)
            self._post(Event.LINKS_FAILED)
        finally:
            self._start_settled.set()

    def _note_failed_start(self, error: Unavailable) -> None:
        if Event.LINKS_FAILED in TABLE[self.state]:  # else there is a machine by now, and the link is healed
            self._error = error
            self._post(Event.LINKS_FAILED)

    async def _spawn_qemu(self, tasks: TaskGroup) -> None:
        if not all(link.connected for link in self.links):
            # One was lost while another came up: what it died of will be the reason.
            for link in self.links:
                await link.wait_until_idle()
            self._post(Event.SPAWN_FAILED)
            return
        try:
            streams = [link.stream_fd for link in self.links]
            self._qemu = qemu = await Qemu.spawn(self.plan, self._directory, streams)
        except QrapdError as error:
            self._error = error
            self._post(Event.SPAWN_FAILED)
            return
        self._listen(qemu, tasks)
        for index, listener in qemu.link_listeners.items():
            self.links[index].serve(listener)
        self._write_record()
        self._emit("vm.started", qemu_pid=qemu.pid)
        self._post(Event.QEMU_SPAWNED)

    def _write_record(self) -> None:
        if self._qemu is None or not self._all_taken:
            return  # it will be written when there is one
        try:
            record.write(
                self._directory.record_path,
                record.Record(
                    record.ProcessId(self._qemu.pid, self._qemu.process.start_time),
                    tuple(link.record for link in self.links),
                    record.ProcessId.of_this(),
                    self._origin,
                ),
            )
        except OSError as error:
            # A full /run is no reason to end a VM; what is lost is that a later start would be warned.
            self._emit("record.failed", error=f"{self._directory.record_path}: {error.strerror}")

    async def _watch_qemu(self, qemu: Qemu) -> None:
        self._status = await qemu.wait()
        for name in (QEMU, output_name(QEMU)):
            self._keeper.forget(name)
        self._post(Event.QEMU_EXITED)

    async def _connect_qmp(self, tasks: TaskGroup, *, greeted: bool = False) -> None:
        # Imported here, while QEMU comes up: nothing before needs it.
        from qrapd.qmp import Qmp

        assert self._qemu is not None
        if any(link.mode == "native" for link in self.plan.links):
            tasks.start_soon(keep_awake, self._directory.socket_path("user-qmp.sock"), self.ready)
        try:
            self._greeted = greeted or await _has_spoken(self._qemu.monitor)
            self._qmp = qmp = await Qmp.connect(self._qemu.monitor, self.plan.name)
            tasks.start_soon(qmp.watch, self._note_qemu_event)
            self._machine = await self._machine_status()
            self._paused = self._machine in _PAUSED
        except QmpFailed as error:
            await self._note_qmp_failure(error)
        else:
            self._post(Event.QMP_UP)

    async def _note_qmp_failure(self, error: QmpFailed) -> None:
        """A QEMU that ends hangs up first: only where it goes on is the monitor's silence the news."""
        assert self._qemu is not None
        with anyio.move_on_after(HANG_UP_GRACE):
            await self._qemu.process.wait()
            return
        self._error = error
        self._post(Event.QMP_FAILED)

    def _note_qemu_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_cause = data.get("reason")
        elif name in _PAUSING:
            self._paused = _PAUSING[name]
        for link in self.links:
            link.note_qemu_event(name, data)

    async def _machine_status(self) -> str:
        assert self._qmp is not None
        return str((await self._qmp.execute("query-status"))["status"])

    async def _watch_for_hangs(self) -> None:
        """Look at all links at once: about once per second, for as long as there is no doubt about one."""
        while True:
            await anyio.sleep(min(link.next_look for link in self.links))
            for link in self.links:
                link.look(paused=self._paused)

    # --- adopting -------------------------------------------------------------------------------------

    async def _adopt(self, tasks: TaskGroup) -> None:
        """Take over what another supervisor has left.

        Whatever is in the way of that (too few fds, say, or a bug of ours), the guest is not to pay for it.
        """
        try:
            await self._take_over(tasks)
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            self._error = QmpFailed(f"this supervisor could not take over all of it: {reason}")
            self._post(Event.QMP_FAILED)

    async def _take_over(self, tasks: TaskGroup) -> None:
        assert self._left is not None
        record, process = self._left.record, self._left.qemu
        try:
            self._qemu = Qemu.adopt(self.plan, self._directory, process)
        except OSError as error:
            self._error = QmpFailed(
                f"the QEMU that was left (pid {process.pid}) cannot be reached by its monitor "
                f"{self._directory.socket_path('qmp.sock')}: {error.strerror}"
            )
            self._post(Event.QMP_FAILED)
            return
        self._start_settled.set()
        self._listen(self._qemu, tasks)
        known = {link.index: link for link in record.links}
        for link in self.links:
            link.adopt(self._left.take_link(known[link.plan.index]), tasks)
        self._left.handed.close()
        self._all_taken = True
        await self._connect_qmp(tasks, greeted=True)

    def _listen(self, qemu: Qemu, tasks: TaskGroup) -> None:
        tasks.start_soon(self._watch_qemu, qemu)  # first: whatever fails below, its end must be noticed
        qemu.listen(
            tasks,
            lambda line: self._emit("qemu.output", line=line),
            lambda line: self._emit("guest.console", line=line),
        )
        for name, fd in self._fds_to_keep(qemu).items():
            self._keeper.store(name, [fd])

    def _fds_to_keep(self, qemu: Qemu) -> dict[str, int]:
        """What tells the next supervisor who QEMU is, and what QEMU says meanwhile."""
        fds = {QEMU: qemu.process.pidfd, output_name(QEMU): qemu.process.output}
        return {name: fd for name, fd in fds.items() if fd >= 0}

    def _stand_back(self) -> None:
        self._stood_back = True
        self._write_record()
        if self._qemu is not None:
            self.handed_over |= copies(self._fds_to_keep(self._qemu))
        for link in self.links:
            self.handed_over |= link.stand_back()
        if self._left is not None:  # what nobody has taken, where the adoption was cut short
            handed = self._left.handed
            rest = {name: handed.take(name) for name in [*handed.fds]}
            self.handed_over |= {name: fd for name, fd in rest.items() if fd is not None}

    # --- stopping -------------------------------------------------------------------------------------

    async def _power_down(self) -> None:
        try:
            assert self._qmp is not None
            number = self._state_number
            if await self._machine_status() in _PAUSED:
                self._post(Event.DEADLINE, number)
                return
            while self.state is State.POWERING_DOWN:
                await self._qmp.execute("system_powerdown")
                await anyio.sleep(PRESS_AGAIN_SECONDS)
        except QmpFailed as error:
            await self._note_qmp_failure(error)

    async def _quit(self) -> None:
        try:
            assert self._qmp is not None
            await self._qmp.execute("quit")
        except QmpFailed as error:
            await self._note_qmp_failure(error)

    def _signal(self, number: signal.Signals) -> None:
        if self._qemu is None:  # a stop has come, but what was left could not be reached
            self._stand_back()
            self.state = State.ENDED
            return
        self._emit("vm.stopping", reason="request" if self._stop_requested else "failed", how=number.name)
        self._qemu.process.send_signal(number)

    async def _release_links(self) -> None:
        await self._start_settled.wait()
        async with anyio.create_task_group() as releasing:
            for link in self.links:
                releasing.start_soon(link.release)
        self._post(Event.LINKS_DOWN)

    # --- the end --------------------------------------------------------------------------------------

    def _finish(self) -> None:
        outcome = self._judge()
        self._emit("vm.exited", reason=outcome.reason.value, **(self._status.fields if self._status else {}))

    def _is_ending(self) -> bool:
        return self._shutdown_cause is not None or self.state not in {State.CONNECTING, State.READY}

    def _judge(self) -> Outcome:
        if self._stood_back:
            return Outcome(Reason.REQUEST, self._explain_failed_adoption(), True, self.handed_over)
        if self._status is None:
            if self._stop_requested and self._error is None:
                return Outcome(Reason.REQUEST)
            return Outcome(Reason.FAILED, self._error)
        verdict = judge_exit(
            exit_code=self._status.exit_code,
            signal=self._status.signal,
            stop_requested=self._stop_requested,
            shutdown_cause=self._shutdown_cause,
            greeted=self._greeted,
        )
        if not verdict.failure:
            return Outcome(verdict.reason)
        assert self._qemu is not None
        # Where we ended it ourselves, the reason for that is what counts.
        ended_by_us = self._error is not None and self._status.exit_code in (0, None)
        return Outcome(
            Reason.FAILED if ended_by_us else verdict.reason,
            self._error if ended_by_us else self._qemu.explain(self._status, greeted=self._greeted),
        )

    def _explain_failed_adoption(self) -> QrapdError | None:
        """Why a VM that was left could not be taken over; None where it is left on purpose."""
        if self.ready.is_set():
            return None
        monitor = self._directory.socket_path("user-qmp.sock")
        return AlreadySupervised(
            "a QEMU of this VM still runs, left by a supervisor that is gone, and it could not be taken over: "
            + (
                self._error.message
                if self._error
                else f"its monitor did not answer within {ADOPTION_TIMEOUT:g} s"
            ),
            hint=f"it was left as it is. Try again, power it down by its monitor {monitor}, or end it: `qrapd stop`",
        )

    async def _leave_nothing(self) -> None:
        """End whatever still runs: only after a cancellation or a bug of ours is there anything."""
        with anyio.CancelScope(shield=True):
            if self._qmp is not None:
                await self._qmp.close()
            if self._stood_back:
                self._let_be()
                return
            if self._left is not None:
                self._left.handed.close()
                if self._status is None and not self._is_ours:
                    self._directory.leave_as_it_is()
                    self._let_be()
                    return
            if self._qemu is not None:
                self._qemu.monitor.close()
                if self._qemu.process.alive:
                    self._status = await self._qemu.process.end(self.plan.quit_timeout)
                self._qemu.process.close()
            for link in self.links:
                await link.release()
            self._hang_ups.close()

    @property
    def _is_ours(self) -> bool:
        """Whether a VM that was left is ours to end: it has been taken over, or it was to be stopped."""
        return self.ready.is_set() or (self._stop_requested and self._qemu is not None)

    def _let_be(self) -> None:
        if self._qemu is not None:
            self._qemu.monitor.close()
            self._qemu.process.let_go()
        self._hang_ups.close()


async def _has_spoken(monitor: socket.socket) -> bool:
    """Wait for the monitor's first byte; false if it hung up without one."""
    await anyio.wait_readable(monitor)
    try:
        return bool(monitor.recv(1, socket.MSG_PEEK))
    except ConnectionError:
        return False


def _first(group: BaseExceptionGroup[QrapdError]) -> QrapdError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, QrapdError)
    return error
