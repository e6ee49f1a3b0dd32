# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM, from start to end: what happens goes through the lifecycle table, and its actions are carried out here."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from qrapd import deadlines, record
from qrapd.backoff import Backoff
from qrapd.console import Console
from qrapd.errors import QmpFailed, QrapdError, Unavailable
from qrapd.kept_fds import KeptProcess
from qrapd.left_behind import Left
from qrapd.lifecycle import DEADLINES, TABLE, Action, Event, Reason, State, advance
from qrapd.link import Link
from qrapd.logs import Emit
from qrapd.machine import Machine, has_spoken
from qrapd.native import NativeLink, keep_awake
from qrapd.outcome import Outcome, Seen, failed_adoption, first_error
from qrapd.plan import LinkPlan, Plan
from qrapd.process import ExitStatus
from qrapd.qemu import Qemu
from qrapd.runtime_directory import VmDirectory
from qrapd.stall import next_look_at
from qrapd.stream import HangUpWatch
from qrapd.surroundings import Surroundings
from qrapd.systemd import QEMU, Keeper
from qrapd.vhost_user import VhostUserLink

if TYPE_CHECKING:
    from qrapd.vm_status import Origin

__all__ = ["Outcome", "Vm"]

HANG_UP_GRACE = 1.0
"""Seconds between QEMU's closing its monitor and its end that count as one and the same."""

SETTLE_TIMEOUT = 15.0
"""Seconds to wait for links that are just being healed before a VM is left; it takes some 30 ms."""

SETTLE_INTERVAL = 0.02
"""Seconds between two looks at that."""

_LINKS: Mapping[str, type[Link]] = {"swap": Link, "vhost-user": VhostUserLink, "native": NativeLink}
"""By their modes."""


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
        self._kept_qemu = KeptProcess(keeper, QEMU)
        self._asked: record.Asked | None = None
        self._stood_back = False
        self.handed_over: dict[str, int] = {}
        """after :meth:`leave`: fds for whoever comes next, by the names of the fd store"""
        self._qemu: Qemu | None = None
        self._machine: Machine | None = None
        self._seen = Seen()
        self._send, self._inbox = anyio.create_memory_object_stream[tuple[Event, int | None]](math.inf)
        self._state_number = 0
        self._start_scope = anyio.CancelScope()
        self._start_settled = anyio.Event()
        self.ready = anyio.Event()
        """set once the machine has run"""
        if left is not None:
            # Before anybody can ask for its end, which is not to be the supervisor's alone.
            self._post(Event.ADOPT)

    # --- from outside ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for an orderly end; asked again, take the next, rougher step at once."""
        event = Event.HURRY if self._seen.stop_requested else Event.STOP
        self._seen.stop_requested = True
        self._post(event)

    @property
    def console(self) -> Console | None:
        """The guest's serial console; None where there is no QEMU, or it is not qrapd's business."""
        return self._qemu.console if self._qemu is not None else None

    def kill(self) -> None:
        """End QEMU at once, whatever that does to the guest."""
        self._seen.stop_requested = True
        self._post(Event.KILL)

    def note_asked(self, asked: record.Asked) -> None:
        """Have it on record what the VM is being stopped for, should this supervisor not live to see it through."""
        self._asked = asked
        self._write_record()

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

    def _fail(self, error: QrapdError, event: Event) -> None:
        self._seen.error = error
        self._post(event)

    def _step(self, event: Event, tasks: TaskGroup) -> None:
        before = self.state
        self.state, actions = advance(before, event)
        if self.state is not before:
            self._state_number += 1
            if deadline := DEADLINES.get(self.state):
                tasks.start_soon(self._expire, deadlines.seconds(deadline, self.plan), self._state_number)
        for action in actions:
            self._carry_out(action, tasks)

    def _carry_out(self, action: Action, tasks: TaskGroup) -> None:
        match action:
            case Action.ADOPT:
                tasks.start_soon(self._adopt, tasks)
            case Action.ANNOUNCE_ADOPTED:
                self._announce_adopted(tasks)
            case Action.STAND_BACK:
                self._stand_back()
            case Action.START_LINKS:
                tasks.start_soon(self._start_links, tasks)
            case Action.SPAWN_QEMU:
                tasks.start_soon(self._spawn_qemu, tasks)
            case Action.CONNECT_QMP:
                tasks.start_soon(self._connect_qmp, tasks)
            case Action.ANNOUNCE_READY:
                self._announce_ready(tasks)
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

    def _start_healing(self, tasks: TaskGroup) -> tuple[Qemu, Machine]:
        """The machine runs: from now on a link that hangs is noticed, and one that is lost is healed."""
        assert self._qemu is not None
        assert self._machine is not None
        for link in self.links:
            link.heal_with(self._machine.qmp)
        if self.links:
            tasks.start_soon(self._watch_for_hangs, self._machine)
        self.ready.set()
        return self._qemu, self._machine

    def _announce_ready(self, tasks: TaskGroup) -> None:
        qemu, machine = self._start_healing(tasks)
        self._emit("vm.ready", qemu_pid=qemu.pid, status=machine.status, links=len(self.links))

    def _announce_adopted(self, tasks: TaskGroup) -> None:
        qemu, machine = self._start_healing(tasks)
        self._write_record()
        self._emit(
            "vm.adopted",
            qemu_pid=qemu.pid,
            status=machine.status,
            links=len(self.links),
            generations=[link.generation for link in self.links],
            passt_pids=[link.record.passt_pid for link in self.links],
        )

    async def _expire(self, seconds: float, number: int) -> None:
        await anyio.sleep(seconds)
        if self.state is State.CONNECTING and number == self._state_number:
            self._seen.error = QmpFailed(
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
            self._fail(first_error(group), Event.LINKS_FAILED)
        finally:
            self._start_settled.set()

    def _note_failed_start(self, error: Unavailable) -> None:
        if Event.LINKS_FAILED in TABLE[self.state]:  # else there is a machine by now, and the link is healed
            self._fail(error, Event.LINKS_FAILED)

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
            self._fail(error, Event.SPAWN_FAILED)
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
                    self._asked,
                ),
            )
        except OSError as error:
            # A full /run is no reason to end a VM; what is lost is that a later start would be warned.
            self._emit("record.failed", error=f"{self._directory.record_path}: {error.strerror}")

    async def _watch_qemu(self, qemu: Qemu) -> None:
        self._seen.status = await qemu.wait()
        self._kept_qemu.forget()
        self._post(Event.QEMU_EXITED)

    async def _connect_qmp(self, tasks: TaskGroup, *, greeted: bool = False) -> None:
        # Imported here, while QEMU comes up: nothing before needs it.
        from qrapd.qmp import Qmp

        assert self._qemu is not None
        if any(link.mode == "native" for link in self.plan.links):
            tasks.start_soon(keep_awake, self._directory.socket_path("user-qmp.sock"), self.ready)
        try:
            self._seen.greeted = greeted or await has_spoken(self._qemu.monitor)
            qmp = await Qmp.connect(self._qemu.monitor, self.plan.name)
            self._machine = machine = Machine(qmp)
            tasks.start_soon(qmp.watch, self._note_qemu_event)
            await machine.look()
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
        self._fail(error, Event.QMP_FAILED)

    def _note_qemu_event(self, name: str, data: Mapping[str, Any]) -> None:
        assert self._machine is not None
        self._machine.note_event(name)
        if name == "SHUTDOWN":
            self._seen.shutdown_cause = data.get("reason")
        for link in self.links:
            link.note_qemu_event(name, data)

    async def _watch_for_hangs(self, machine: Machine) -> None:
        """Look at all links at once: about once per second, for as long as there is no doubt about one."""
        begun = anyio.current_time()
        while True:
            wait = min(link.next_look for link in self.links)
            await anyio.sleep_until(next_look_at(anyio.current_time(), wait, begun))
            for link in self.links:
                link.look(paused=machine.paused)

    # --- adopting -------------------------------------------------------------------------------------

    async def _adopt(self, tasks: TaskGroup) -> None:
        """Take over what another supervisor has left.

        Whatever is in the way of that (too few fds, say, or a bug of ours), the guest is not to pay for it.
        """
        try:
            await self._take_over(tasks)
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            failure = QmpFailed(f"this supervisor could not take over all of it: {reason}")
            self._fail(failure, Event.QMP_FAILED)

    async def _take_over(self, tasks: TaskGroup) -> None:
        assert self._left is not None
        record, process = self._left.record, self._left.qemu
        try:
            self._qemu = Qemu.adopt(self.plan, self._directory, process)
        except OSError as error:
            failure = QmpFailed(
                f"the QEMU that was left (pid {process.pid}) cannot be reached by its monitor "
                f"{self._directory.socket_path('qmp.sock')}: {error.strerror}"
            )
            self._fail(failure, Event.QMP_FAILED)
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
        self._kept_qemu.keep(qemu.process)

    def _stand_back(self) -> None:
        self._stood_back = True
        self._write_record()
        if self._qemu is not None:
            self.handed_over |= self._kept_qemu.copies(self._qemu.process)
        for link in self.links:
            self.handed_over |= link.stand_back()
        if self._left is not None:  # what nobody has taken, where the adoption was cut short
            handed = self._left.handed
            rest = {name: handed.take(name) for name in [*handed.fds]}
            self.handed_over |= {name: fd for name, fd in rest.items() if fd is not None}

    # --- stopping -------------------------------------------------------------------------------------

    async def _power_down(self) -> None:
        assert self._machine is not None
        number = self._state_number
        try:
            heard = await self._machine.press_power_button(lambda: self.state is State.POWERING_DOWN)
        except QmpFailed as error:
            await self._note_qmp_failure(error)
        else:
            if not heard:
                self._post(Event.DEADLINE, number)

    async def _quit(self) -> None:
        assert self._machine is not None
        try:
            await self._machine.quit()
        except QmpFailed as error:
            await self._note_qmp_failure(error)

    def _signal(self, number: signal.Signals) -> None:
        if self._qemu is None:  # a stop has come, but what was left could not be reached
            self._stand_back()
            self.state = State.ENDED
            return
        reason = "request" if self._seen.stop_requested else "failed"
        self._emit("vm.stopping", reason=reason, how=number.name)
        self._qemu.process.send_signal(number)

    async def _release_links(self) -> None:
        await self._start_settled.wait()
        async with anyio.create_task_group() as releasing:
            for link in self.links:
                releasing.start_soon(link.release)
        self._post(Event.LINKS_DOWN)

    # --- the end --------------------------------------------------------------------------------------

    def _finish(self) -> None:
        status, outcome = self._seen.status, self._judge()
        error = {} if outcome.error is None else {"error": outcome.error.message, "hint": outcome.error.hint}
        self._emit("vm.exited", reason=outcome.reason.value, **(status.fields if status else {}), **error)

    def _is_ending(self) -> bool:
        return self._seen.shutdown_cause is not None or self.state not in {State.CONNECTING, State.READY}

    def _judge(self) -> Outcome:
        if not self._stood_back:
            return self._seen.judge(self._explain_exit)
        error = None
        if not self.ready.is_set():  # else it is left on purpose
            monitor = self._directory.socket_path("user-qmp.sock")
            error = failed_adoption(self._seen.error, monitor, deadlines.ADOPTION_TIMEOUT)
        return Outcome(Reason.REQUEST, error, True, self.handed_over)

    def _explain_exit(self, status: ExitStatus) -> QrapdError:
        assert self._qemu is not None
        return self._qemu.explain(status, greeted=self._seen.greeted)

    async def _leave_nothing(self) -> None:
        """End whatever still runs: only after a cancellation or a bug of ours is there anything."""
        with anyio.CancelScope(shield=True):
            if self._machine is not None:
                await self._machine.qmp.close()
            if self._stood_back:
                self._let_be()
                return
            if self._left is not None:
                self._left.handed.close()
                if self._seen.status is None and not self._is_ours:
                    self._directory.leave_as_it_is()
                    self._let_be()
                    return
            if self._qemu is not None:
                self._qemu.monitor.close()
                if self._qemu.process.alive:
                    self._seen.status = await self._qemu.process.end(self.plan.quit_timeout)
                self._qemu.process.close()
            for link in self.links:
                await link.release()
            self._hang_ups.close()

    @property
    def _is_ours(self) -> bool:
        """Whether a VM that was left is ours to end: it has been taken over, or it was to be stopped."""
        return self.ready.is_set() or (self._seen.stop_requested and self._qemu is not None)

    def _let_be(self) -> None:
        if self._qemu is not None:
            self._qemu.monitor.close()
            self._qemu.process.let_go()
        self._hang_ups.close()
