# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM through all its runs: claimed, adopted or started, started again if its file wants that, reloaded meanwhile.

Who asks for what is not known here: signals (:mod:`qrapd.foreground`), or callers of an API.
"""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from qrapd import config, forwards, pesto
from qrapd import plan as planning
from qrapd.backoff import Backoff
from qrapd.config import VmFile
from qrapd.errors import ConfigurationError, Conflict, QemuFailed, QrapdError
from qrapd.forwards import Changed, Forward, Ports
from qrapd.handover import HandedOver
from qrapd.left_behind import Left, look_for_left
from qrapd.lifecycle import Reason
from qrapd.link import Link
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.reload import Changes, compare
from qrapd.restart import is_wanted
from qrapd.runtime_directory import VmDirectory
from qrapd.systemd import Keeper
from qrapd.vm import Outcome, Vm

if TYPE_CHECKING:
    from qrapd.record import Asked
    from qrapd.vm_status import Origin

__all__ = ["Companion", "Supervisor", "tell_failure"]

Companion = Callable[[Vm], Coroutine[Any, Any, None]]

_OTHER_NIC = (
    "the machine that runs has another NIC here than the file now wants: that takes a restart of the VM"
)

_OF_NIC = re.compile(r"link(\[\d+\]\.(mode|mac))?")
"""Keys of which the machine itself tells whether it lacks them."""


class Supervisor:
    """Runs one VM. Make it, await :meth:`run`, and call the others from other tasks.

    :param base: the runtime directory, above the VM's own.
    :param reread: makes the plan anew from the VM's file; runs in a thread.
    :param keeper: keeps fds for the supervisor that comes after this one.
    :param origin: what runs this supervisor: that, too, is for the one after it.
    :param handed: the fds that an earlier supervisor has had kept.
    :param only_left: do nothing if no VM was left running.
    :param resume: go on with a stop or restart that the last supervisor was asked for. Without, this one was started
        because somebody wants the VM to run.
    :param note_machine: is told of each machine before anything of it runs: it may have other NICs than the last one.
    """

    def __init__(
        self,
        plan: Plan,
        base: Path,
        emit: Emit,
        *,
        keeper: Keeper,
        origin: Origin,
        reread: Callable[[], Plan] | None = None,
        handed: HandedOver | None = None,
        only_left: bool = False,
        resume: bool = False,
        note_machine: Callable[[Vm], None] = lambda _: None,
    ) -> None:
        self.plan = plan
        """by which the VM is started next time"""
        self.directory = VmDirectory(base, plan.name)
        self.vm: Vm | None = None
        """the run that there is, or was last"""
        self._emit: Emit = partial(emit, vm=plan.name)
        self._tell = emit
        self._keeper = keeper
        self._origin = origin
        self._reread = reread
        self._handed = handed or HandedOver()
        self._only_left = only_left
        self._resume = resume
        self._note_machine = note_machine
        self._tasks: TaskGroup | None = None
        """where what takes a while goes on, for as long as the VM runs"""
        self._reloading = anyio.Lock()
        self._stopped = anyio.Event()
        self._backoff = Backoff(plan.restart.limit, plan.restart.window)
        self._renewed = anyio.Event()
        """set when there is another Vm"""
        self._again = False
        self._hurry = anyio.Event()
        self._leaving = False
        self._over = anyio.Event()
        self._file = plan.file
        """as it was read last"""
        self._begun_by: VmFile | None = None
        """the file as it was when the machine was started or taken over"""

    # --- from outside ---------------------------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        """Whether the VM's end has been asked for, and nothing comes after it."""
        return self._stopped.is_set()

    def stop(self, *, hurry: bool = False) -> None:
        """Ask for an orderly end.

        :param hurry: if one is under way, take the next, rougher step at once.
        """
        under_way = self._stopped.is_set() or self._again
        self._again = False
        self._stopped.set()
        if self.vm is not None:
            self.vm.note_asked("stop")
            if hurry or not under_way:
                self.vm.stop()

    def kill(self) -> None:
        """End the VM at once, without asking the guest."""
        self._again = False
        self._stopped.set()
        if self.vm is not None:
            self.vm.kill()

    def restart(self) -> None:
        """Stop the VM in order, and start it by its file as that is then.

        :raise Conflict: it is to end for good.
        """
        if self._stopped.is_set():
            raise Conflict(f"{self.plan.name} is being stopped", hint="start it once it has ended")
        if self._again:
            return  # it is on its way down already
        self._again = True
        self._hurry.set()
        if self.vm is not None:
            self.vm.note_asked("restart")
            self.vm.stop()

    async def leave(self) -> None:
        """Let the VM be for another qrapd to adopt, as soon as nothing is under way. Returns when its run is over."""
        async with self._reloading:
            self._leaving = True
            self._hurry.set()
            with contextlib.suppress(Conflict):  # it has ended meanwhile
                while not self._over.is_set():
                    vm, renewed = await self.wait_until_ready(), self._renewed
                    await vm.leave()
                    # One that is being stopped is not left; after a restart there is another one.
                    await _first_of(renewed, self._over)

    async def reload(self) -> None:
        """Read the file again and apply what can be applied to a machine that runs.

        :raise QrapdError: the file is wrong, or there is none; all stays as it is. The log says so as well.
        """
        try:
            async with self._reloading:
                await self._apply(await self.read_file())
        except QrapdError as error:
            self._refuse(error)
            raise

    @property
    def file(self) -> VmFile:
        """What the VM goes by now.

        :raise Conflict: it was started from a command line, which has none.
        """
        if self._file is None:
            raise Conflict("this VM was started from a command line, not by a file")
        return self._file

    def differs(self, plan: Plan) -> bool:
        """Whether another plan changes anything, or a passt has been upgraded."""
        links = self.vm.links if self.vm is not None else []
        there = (self.plan.file, self.plan.links)
        return (plan.file, plan.links) != there or any(link.is_outdated for link in links)

    def forwards(self, index: int) -> Ports:
        """What a link forwards now.

        :raise Unknown: there is no such link.
        :raise Conflict: its passt is not qrapd's own, or there is no file.
        """
        ports = forwards.current(self.file, index)
        link = self._find_link(index)
        return ports if link is None else forwards.given(link.plan.passt)

    async def change_forwards(
        self, index: int, add: Iterable[Forward], remove: Iterable[Forward]
    ) -> Literal["pesto", "swap", "nothing"]:
        """Forward other ports, until the VM ends or its file has others. Returns how; ``nothing``: it is so already.

        A swap is begun when this returns; what pesto(1) does is done.

        :raise ConfigurationError: a forward that is not right, or that clashes with another.
        :raise Unknown: there is no such link, or no such forward to remove.
        :raise Conflict: its passt is not qrapd's own, or there is no file, or a port is taken.
        """
        async with self._reloading:
            await self.wait_until_ready()
            now = self.forwards(index)
            link = self._find_link(index)
            if link is None or link.plan.mode == "native":
                raise Conflict(
                    f"QEMU runs the passt of link {index}, and tells it nothing",
                    hint="change the VM's file, and restart the VM; or give the link mode = 'swap'",
                )
            wanted = forwards.change(index, now, add, remove)
            if wanted == now:
                return "nothing"
            await self._check_forwards(index, link, wanted, now)
            changed = Changed.between(forwards.current(self.file, index), wanted)
            plan = planning.forwarding(link.plan, wanted, changed)
            # Whoever has asked may hang up; half a change would be none that is known.
            with anyio.CancelScope(shield=True):
                told = await link.tell(plan)
                if not told:
                    link.reload(plan)
            return "pesto" if told else "swap"

    async def _check_forwards(self, index: int, link: Link, wanted: Ports, now: Ports) -> None:
        """Refuse what cannot be, while nothing is touched."""
        assert self.plan.path is not None
        changed = {
            each.plan.index: each.plan.changed.ports
            for each in (self.vm.links if self.vm is not None else ())
            if each.plan.changed is not None and each.plan.changed.holds(self._file, each.plan.index)
        }
        config.check(forwards.as_data(self.file, {**changed, index: wanted}), self.plan.path)
        only = forwards.family(link.plan.passt)
        if taken := await anyio.to_thread.run_sync(pesto.taken, wanted, now, only):
            raise Conflict(
                f"somebody has it already: {', '.join(taken)}",
                hint="see who: ss -lntup (as root it names the process)",
            )

    def _find_link(self, index: int) -> Link | None:
        links = self.vm.links if self.vm is not None and self.vm.ready.is_set() else []
        return next((link for link in links if link.plan.index == index), None)

    def apply(self, plan: Plan) -> None:
        """Go by another plan, as far as a machine that runs can take it; once it does, if it is not up yet."""
        if self._tasks is not None:
            self._tasks.start_soon(self._apply_in_turn, plan)

    async def _apply_in_turn(self, plan: Plan) -> None:
        try:
            async with self._reloading:
                await self._apply(plan)
        except Exception as error:  # a bug of ours is no reason to end a VM that runs
            trace = traceback.format_exc()
            self._emit("bug.found", where="another file applied", error=repr(error), trace=trace)

    # --- a VM's runs ----------------------------------------------------------------------------------

    async def run(self, companion: Companion | None = None) -> Outcome:
        """Run the VM, and again for as long as its file wants that.

        :param companion: runs beside the VM's first run for as long as both like.
        :raise AlreadySupervised: another process has it, or what was left of it cannot be taken over.
        """
        try:
            with self.directory.claim():
                # Whatever goes wrong: as long as a QEMU may run, what tells of it stays.
                self.directory.leave_as_it_is()
                left = await look_for_left(self.directory, self._handed, self._tell, self._keeper)
                if left is None:
                    self.directory.clear_up()
                    if self._only_left or self._stopped.is_set():
                        return Outcome(Reason.REQUEST)
                    self._again = False  # what is to be started anew has ended
                elif self._resume:
                    self._carry_on(left.record.asked)
                self._begin(self.plan, left)
                async with anyio.create_task_group() as self._tasks:
                    outcome = await self._keep_running(companion)
                    self._tasks.cancel_scope.cancel()
                return outcome
        finally:
            self._over.set()

    def _carry_on(self, asked: Asked | None) -> None:
        if asked == "stop":
            self._stopped.set()
        elif asked == "restart" and not self._stopped.is_set():
            self._again = True

    async def _keep_running(self, companion: Companion | None) -> Outcome:
        while True:
            since = time.monotonic()
            outcome = await self._run_once(companion)
            companion = None
            if outcome.stood_back:
                self.directory.leave_as_it_is()
                return outcome
            self.directory.clear_up()
            if self._stopped.is_set():
                return outcome
            limits = self.plan.restart
            if self._again:
                self._again, self._hurry = False, anyio.Event()
                error = await self._read_again()
                if error is not None and not self.plan.can_start:
                    return Outcome(Reason.FAILED, error)
                self._begin_anew()
                continue
            if self._leaving or not is_wanted(
                limits.policy, outcome.reason, failure=outcome.error is not None
            ):
                return outcome
            self._backoff.limit, self._backoff.window = limits.limit, limits.window
            if time.monotonic() - since > limits.window:
                self._backoff.succeed()
            delay = self._backoff.fail(time.monotonic())
            if delay is None:
                return Outcome(outcome.reason, _too_often(outcome, limits.limit, limits.window))
            self._emit(
                "vm.restarting",
                attempts=self._backoff.attempts,
                delay_ms=round(delay * 1000),
                error=outcome.error and outcome.error.message,
            )
            await self._wait(delay)
            if self._stopped.is_set() or self._leaving:
                if not self._stopped.is_set():
                    # The record says that it ran: by that whoever comes next starts it again.
                    self.directory.leave_as_it_is()
                return Outcome(Reason.REQUEST, stood_back=self._leaving)
            self._again, self._hurry = False, anyio.Event()
            self._begin_anew()

    async def _wait(self, delay: float) -> None:
        with anyio.move_on_after(delay):
            await _first_of(self._stopped, self._hurry)

    async def _read_again(self) -> QrapdError | None:
        """Go by the file as it is now; returns what is wrong with it, where the old plan is what there is."""
        if self._reread is None:
            return None
        try:
            self.plan = replace(await self.read_file(), name=self.plan.name)
            self._file = self.plan.file
        except QrapdError as error:
            self._refuse(error)
            return error
        return None

    def _begin(self, plan: Plan, left: Left | None = None) -> None:
        fitting = left.fit(plan) if left is not None else plan
        for link in _differing(plan, fitting) if plan.can_start else ():
            self._emit("link.notice", link=link, notice=_OTHER_NIC)
        self._begun_by = plan.file
        if left is not None:
            fitting = self._keep_forwards(
                fitting, {link.index: link.changed for link in left.record.links if link.changed is not None}
            )
        self.vm = Vm(fitting, self.directory, self._tell, keeper=self._keeper, origin=self._origin, left=left)
        self._note_machine(self.vm)
        if self._stopped.is_set() or self._again:
            self.vm.note_asked("stop" if self._stopped.is_set() else "restart")
            self.vm.stop()
        renewed, self._renewed = self._renewed, anyio.Event()
        renewed.set()

    def _begin_anew(self) -> None:
        """Make the VM for the next start, by the file as it was read last; but what has proved impossible stays out."""
        fallen_back = self.vm.fallen_back if self.vm is not None else {}
        links = tuple(fallen_back.get(link.index, link) for link in self.plan.links)
        self._begin(replace(self.plan, links=links))

    async def wait_until_ready(self) -> Vm:
        """The VM that runs, or the next one that does.

        :raise Conflict: there is none, and will be none.
        """
        while not self._over.is_set() and (self.vm is None or not self.vm.ready.is_set()):
            events = [self._over, self._renewed] + ([] if self.vm is None else [self.vm.ready])
            await _first_of(*events)
        if self.vm is None or not self.vm.ready.is_set():
            raise Conflict("the VM has ended")
        return self.vm

    async def _run_once(self, companion: Companion | None) -> Outcome:
        assert self.vm is not None
        async with anyio.create_task_group() as tasks:
            if companion is not None:
                tasks.start_soon(companion, self.vm)
            outcome = await self.vm.run()
            tasks.cancel_scope.cancel()
        return outcome

    # --- the file -------------------------------------------------------------------------------------

    async def read_file(self) -> Plan:
        if self._reread is None:
            raise QrapdError("there is no file to read again: this VM was started from a command line")
        # In a thread, which a stop does not wait for: this reads files, and asks passt for its options.
        return await anyio.to_thread.run_sync(self._reread, abandon_on_cancel=True)

    def _refuse(self, error: QrapdError) -> None:
        if isinstance(error, ConfigurationError):
            for problem in error.problems:
                self._emit("config.invalid", file=error.path, problem=str(problem), hint=problem.hint)
        self._emit("vm.reload_refused", error=error.message, hint=error.hint)

    async def _apply(self, plan: Plan) -> None:
        # At once for the next start; a VM that is just starting has to be ready before its links can change.
        self.plan = replace(plan, name=self.plan.name)
        vm = await self.wait_until_ready()
        changes = self._compare(plan, vm)
        changed = {link.plan.index: link.plan.changed for link in vm.links if link.plan.changed is not None}
        renewed = vm.reload(self._keep_forwards(self.plan, changed))
        self._file = plan.file
        self._emit(
            "vm.reloaded",
            links=renewed,
            applied=[*changes.applied, *changes.swapped],
            needs_restart=[*changes.needing_restart],
        )

    def _keep_forwards(self, plan: Plan, changed: Mapping[int, Changed]) -> Plan:
        """What was asked for at run time holds on where the file says what it said then."""
        links = tuple(
            planning.forwarding(link, there.ports, there)
            if (there := changed.get(link.index)) is not None and there.holds(self.plan.file, link.index)
            else link
            for link in plan.links
        )
        return replace(plan, links=links)

    def _compare(self, plan: Plan, vm: Vm) -> Changes:
        """What is new since the file was read last, and what the machine that runs still lacks."""
        if plan.file is None:
            return Changes()
        new = Changes() if self._file is None else compare(self._file, plan.file)
        if vm.plan.file is not None:
            return replace(new, needing_restart=compare(vm.plan.file, plan.file).needing_restart)
        # It was taken over with other NICs than its file had: by what it was started is not known, what it has is.
        then = Changes() if self._begun_by is None else compare(self._begun_by, plan.file)
        others = [key for key in then.needing_restart if not _OF_NIC.fullmatch(key)]
        nics = _differing_keys(plan, vm.plan)
        if "link" in nics:  # of no table is it known which NIC it means: none was touched
            new = Changes(
                *(tuple(k for k in keys if k[:5] != "link[") for keys in (new.applied, new.swapped))
            )
        return replace(new, needing_restart=(*others, *nics))


async def _first_of(*events: anyio.Event) -> None:
    async def wait(event: anyio.Event) -> None:
        await event.wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for each in events:
            tasks.start_soon(wait, each)


def _differing(plan: Plan, fitting: Plan) -> list[int]:
    """The links whose NICs the file now wants otherwise than the machine that runs has them."""
    wanted, there = ({link.index: (link.mode, link.mac) for link in each.links} for each in (plan, fitting))
    return [index for index in sorted({*wanted, *there}) if wanted.get(index) != there.get(index)]


def _differing_keys(plan: Plan, fitting: Plan) -> list[str]:
    """The same as keys of the file."""
    if len(plan.links) != len(fitting.links):
        return ["link"]
    pairs = zip(plan.links, fitting.links, strict=True)
    return [
        f"link[{wanted.index}].{'mac' if wanted.mode == there.mode else 'mode'}"
        for wanted, there in pairs
        if (wanted.mode, wanted.mac) != (there.mode, there.mac)
    ]


def tell_failure(emit: Emit, error: QrapdError, *, vm: str | None) -> None:
    """Log why a VM did not start, or ended badly.

    :param vm: None: it is not known which.
    """
    about = {} if vm is None else {"vm": vm}
    if isinstance(error, ConfigurationError):
        for problem in error.problems:
            emit("config.invalid", **about, file=error.path, problem=str(problem), **_hint(problem.hint))
    else:
        emit("run.failed", **about, error=error.message, **_hint(error.hint))


def _hint(hint: str | None) -> dict[str, str]:
    return {"hint": hint} if hint else {}


def _too_often(outcome: Outcome, limit: int, window: float) -> QrapdError:
    last = outcome.error.message if outcome.error else f"the last time: {outcome.reason.value}"
    return QemuFailed(
        f"the VM has ended {limit} times within {window:g} s: {last}",
        hint=(outcome.error and outcome.error.hint) or "its table [restart] sets the limit",
    )
