# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM of the agent: a file, and now and then a supervisor that runs it. Whatever becomes of it stays with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.abc import TaskGroup

from qrapd import plan as planning
from qrapd import record, running, vm_files
from qrapd.elsewhere import Elsewhere
from qrapd.errors import ConfigurationError, Conflict, Problem, QrapdError, Unavailable
from qrapd.handover import HandedOver
from qrapd.hosted_vm import SupervisedVm
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.restart import is_wanted
from qrapd.runtime_directory import VmDirectory
from qrapd.status_tracker import StatusTracker
from qrapd.supervisor import Supervisor, tell_failure
from qrapd.systemd import Keeper

if TYPE_CHECKING:
    from qrapd.vm_status import VmStatus

__all__ = ["AgentVm", "Shared"]

PLACE_SECONDS = 10.0
"""For which a start may keep others waiting: it takes 0.3 s, on a busy host a few. What takes longer waits for
something else than a processor, maybe for nothing (QEMU has 120 s to say a word), and a few of those must not keep all
others down."""


@dataclass(frozen=True)
class Shared:
    """What all VMs of an agent have in common."""

    base: Path
    """the runtime directory, above the VMs' own"""
    emit: Emit
    tasks: TaskGroup
    starting: anyio.CapacityLimiter
    """VMs that may be on their way up at the same time"""
    planning: anyio.CapacityLimiter
    """files that may be read at the same time, each in a thread"""
    ending: anyio.Event
    """set when the agent is on its way out, and starts nothing any more"""
    note_start: Callable[[str], None]
    """called when a VM is up, or is not to be: no later agent starts it by itself"""
    keeper: Callable[[str], Keeper]
    """keeps a VM's fds for the agent after this one"""


class AgentVm(SupervisedVm):
    """A VM as the agent has it, whether it runs or not."""

    def __init__(self, path: Path, shared: Shared) -> None:
        super().__init__(StatusTracker(path.stem, "agent", [], datetime.now(UTC), state="exited"))
        self.path = path
        self.settled = anyio.Event()
        """set once it runs, or does not"""
        self.left: Mapping[str, int] = {}
        """after :meth:`leave`: fds for whoever comes next, by their names in the fd store"""
        self.is_new = True
        """nobody has started it yet"""
        self._shared = shared
        self._elsewhere = Elsewhere(shared.base, self.name)
        self._emit = self.track(self._tell)
        self._ended = anyio.Event()
        self._ended.set()
        self._preparing = anyio.CancelScope()
        self._asked: Callable[[Supervisor], None] | None = None
        """for the supervisor that is to come: what runs has to be taken over before it can be ended"""

    @property
    def runs(self) -> bool:
        """Whether anything of it runs, or is on its way up or down."""
        return not self._ended.is_set()

    @property
    def was_left(self) -> bool:
        """Whether another supervisor has left it, and is gone: one of a unit's or a shell's is not for us."""
        directory = VmDirectory(self._shared.base, self.name)
        try:
            return directory.record_path.exists() and directory.glance() is None
        except OSError:
            return False  # another user's

    @property
    def status(self) -> VmStatus:
        """How it is now; where a unit or a shell has it, as far as its directory tells."""
        status = super().status
        if self.runs or status.state not in ("exited", "failed"):  # the latter: it is being left
            return status
        try:
            seen = self._elsewhere.look()
        except OSError as error:
            words = f"whether a unit or a shell runs it cannot be seen: {error.strerror}: {error.filename}"
            return status if status.error else status.model_copy(update={"error": words})
        if seen is None:
            return status
        if seen.state == "failed" and status.state == "failed":
            # Of what is left, the attempt to take it over has told more.
            return status.model_copy(update={"qemu_pid": seen.qemu_pid})
        return seen

    # --- from outside ---------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.runs:
            await super().start()
        self.refuse_if_elsewhere()
        self._refuse_if_ending()
        self.begin(HandedOver())

    def begin(self, handed: HandedOver, *, only_left: bool = False) -> None:
        """Start it, or take it over if it runs already.

        :param handed: the fds of it that an earlier agent has had kept.
        :param only_left: if it does not run any more, start it only where its file wants that after an end like this.
        """
        if self.runs:
            return
        self.is_new = False
        self._ended, self.settled = anyio.Event(), anyio.Event()
        self._preparing, self._asked = anyio.CancelScope(), None
        self.tracker.begin(datetime.now(UTC))
        self._shared.tasks.start_soon(self._live, handed, only_left)

    def refuse_if_elsewhere(self) -> None:
        """:raise Conflict: a unit or a shell has it, whose supervisor is the one to be asked."""
        where = VmDirectory(self._shared.base, self.name)
        try:
            if self.runs or where.glance() is None:
                return
        except PermissionError:
            raise Conflict(
                f"{self.name} may have a supervisor of its own: {where.path} is closed to the agent",
                hint=f"see whose it is: ls -ld {where.path}",
            ) from None
        except OSError:
            return  # for want of an fd, say: who goes on will find out
        raise Conflict(
            f"{self.name} has a supervisor of its own, a unit's or a shell's",
            hint=f"ask that one, as the commands do: {where.socket_path('control.sock')}",
        )

    async def stop(self) -> None:
        self.refuse_if_elsewhere()
        self._shared.note_start(self.name)
        if self._is_left:
            self._begin_again()
        self._give_up_start(Supervisor.stop)
        await super().stop()

    async def kill(self) -> None:
        self.refuse_if_elsewhere()
        self._shared.note_start(self.name)
        if self._is_left:
            self._kill_left()
            self._begin_again()
        self._give_up_start(Supervisor.kill)
        await super().kill()

    def _give_up_start(self, how: Callable[[Supervisor], None]) -> None:
        if self.runs and self.supervisor is None and self.was_left:
            self._asked = how
        else:
            self._preparing.cancel()

    @property
    def _is_left(self) -> bool:
        """Whether somebody has left it whom this agent has not followed: a unit or a shell, later than it began."""
        return not self.runs and self.was_left

    def _begin_again(self) -> None:
        """Take over what is to end: nobody else would do that."""
        self._refuse_if_ending()
        self.begin(HandedOver(), only_left=True)

    def _kill_left(self) -> None:
        with contextlib.suppress(record.Unusable, Unavailable):  # who takes it over will say so
            found = record.read(VmDirectory(self._shared.base, self.name).record_path)
            if found is not None and found.qemu.alive:
                running.tell(found.qemu, signal.SIGKILL)

    async def restart(self) -> None:
        self._refuse_if_ending()
        self.refuse_if_elsewhere()
        if self.supervisor is not None:
            await super().restart()
        elif self._is_left:
            # What could not come up again must not go down.
            await anyio.to_thread.run_sync(self._read, limiter=self._shared.planning)
            await self.start()
            self._asked = Supervisor.restart
        elif not self.runs:
            await self.start()
        # else it is on its way up, by its file as that is now

    @property
    def _required(self) -> Supervisor:
        self.refuse_if_elsewhere()
        return super()._required

    async def leave(self) -> None:
        """Let it be for another agent to adopt, as soon as nothing is under way; what is not up yet is waited for."""
        self._preparing.cancel()
        async with anyio.create_task_group() as leaving:
            if self.supervisor is not None:
                leaving.start_soon(self.supervisor.leave)
            await self._ended.wait()
            leaving.cancel_scope.cancel()

    @property
    def stop_seconds(self) -> float:
        """How long an orderly end may take."""
        plan = self.supervisor.plan if self.supervisor is not None else None
        if plan is None and self.runs:
            plan = planning.unreadable(self.path)  # its file is just being read: so long as a rule
        return plan.powerdown_timeout + 2 * plan.quit_timeout if plan is not None else 0.0

    async def power_down(self) -> None:
        """Stop it, and wait for its end. If it has been left just now, it is taken over for that."""
        for _ in range(2):  # it may be left in the very moment
            if not self.runs:
                if not self.was_left:
                    return
                left, self.left = self.left, {}
                self.begin(HandedOver({name: [fd] for name, fd in left.items()}), only_left=True)
            await self.stop()
            await self._ended.wait()

    def refuse(self, error: QrapdError) -> None:
        """Its file is wrong."""
        tell_failure(self._shared.emit, error, vm=self.name)
        if not self.runs:
            self.tracker.note_refusal(_words(error), datetime.now(UTC), _hint(error))

    def accept_file(self) -> None:
        """Its file is right; if it was not before, that is no news any more."""
        if not self.runs:
            self.tracker.note_acceptance(datetime.now(UTC))

    async def refresh(self) -> bool:
        """Read its file again and apply what has changed; returns whether anything has.

        :raise QrapdError: the file is wrong; all stays as it is.
        """
        supervisor = self.supervisor
        if supervisor is None:
            return False
        plan = await anyio.to_thread.run_sync(self._read, limiter=self._shared.planning)
        if not supervisor.differs(plan):
            return False
        supervisor.apply(plan)
        return True

    # --- its life -------------------------------------------------------------------------------------

    async def _live(self, handed: HandedOver, only_left: bool) -> None:
        """From a start to its end. A failure, and a bug even, is told and goes no further: there are other VMs."""
        try:
            with self._preparing:
                plan = await self._make_plan()
                await anyio.lowlevel.checkpoint_if_cancelled()  # what a thread does is not cut short
                supervisor = Supervisor(
                    plan,
                    self._shared.base,
                    self._emit,
                    keeper=self._shared.keeper(self.name),
                    origin="agent",
                    reread=self._read,
                    handed=handed,
                    only_left=not plan.can_start or (only_left and not _is_wanted_again(plan)),
                    resume=only_left,
                    note_machine=self.note_machine,
                )
                self.tracker.set_links((link.index, link.mode) for link in plan.links)
                if not self.was_left:  # what runs already needs no place in the queue
                    await self._shared.starting.acquire_on_behalf_of(self)
                self.supervisor = supervisor
                if self._asked is not None:
                    self._asked(supervisor)
            if self.supervisor is not None:
                await self._supervise(self.supervisor)
            else:
                self.tracker.note_end(datetime.now(UTC))
        except QrapdError as error:
            self._fail(error)
        except Exception as error:
            self._emit(
                "bug.found", vm=self.name, where="a VM", error=repr(error), trace=traceback.format_exc()
            )
            self.tracker.note_failure(f"a bug in qrapd: {error!r}", datetime.now(UTC))
        finally:
            self._release_place()
            handed.close()
            self.supervisor = None
            self.settled.set()
            self._ended.set()

    async def _make_plan(self) -> Plan:
        """By the file; where that is wrong, what runs is taken over all the same: nobody else would look after it."""
        try:
            return await anyio.to_thread.run_sync(self._read, limiter=self._shared.planning)
        except QrapdError as error:
            if not self.was_left:
                raise
            tell_failure(self._shared.emit, error, vm=self.name)
            return planning.unreadable(self.path)

    async def _supervise(self, supervisor: Supervisor) -> None:
        # What takes longer than this must not keep others down.
        deadline = asyncio.get_running_loop().call_later(PLACE_SECONDS, self._release_place)
        try:
            outcome = await supervisor.run()
        finally:
            deadline.cancel()
        self.left = outcome.fds
        if outcome.error is not None:
            self._fail(outcome.error)
        elif not outcome.stood_back:
            self.tracker.note_end(datetime.now(UTC))

    def _tell(self, event: str, /, **fields: object) -> None:
        self._shared.emit(event, **fields)
        if event in {"vm.ready", "vm.adopted"}:
            self._release_place()
            self._shared.note_start(self.name)
            self.settled.set()

    def _refuse_if_ending(self) -> None:
        if self._shared.ending.is_set():
            raise Unavailable("the agent is on its way out, and starts nothing", hint="ask the next one")

    def _release_place(self) -> None:
        if self in self._shared.starting.statistics().borrowers:
            self._shared.starting.release_on_behalf_of(self)

    def _fail(self, error: QrapdError) -> None:
        tell_failure(self._emit, error, vm=self.name)
        self.tracker.note_failure(_words(error), datetime.now(UTC), _hint(error))

    def _read(self) -> Plan:
        plan = planning.resolve(vm_files.read(self.path))
        if plan.name != self.name:
            problem = Problem(
                "name",
                "is not the file's own, by which the agent knows the VM",
                value=repr(plan.name),
                hint=f"leave it out, or call the file {plan.name}.toml",
            )
            raise ConfigurationError(str(self.path), [problem])
        return plan


def _is_wanted_again(plan: Plan) -> bool:
    """Whether a VM is to be started whose QEMU has gone while there was nobody to see it: somebody has killed it."""
    return is_wanted(plan.restart.policy, Reason.KILLED, failure=True)


def _words(error: QrapdError) -> str:
    """What went wrong, in one line: of a wrong file what is wrong with it, not how much."""
    if not isinstance(error, ConfigurationError):
        return error.message
    return f"{error.path}: {'; '.join(str(problem) for problem in error.problems)}"


def _hint(error: QrapdError) -> str | None:
    """What to do about it; of a wrong file about the first mistake."""
    return error.problems[0].hint if isinstance(error, ConfigurationError) else error.hint
