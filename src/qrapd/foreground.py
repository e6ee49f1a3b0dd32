# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM in the foreground: the signals that reach qrapd, the service manager, and the VM's own API beside it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import AsyncIterable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR2, Signals
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from qrapd.backoff import LONGEST_DELAY, Backoff
from qrapd.errors import Conflict, QrapdError, Unavailable
from qrapd.event_log import EventLog
from qrapd.garbage import collect_garbage
from qrapd.handover import HandedOver
from qrapd.hosted_vm import SupervisedVm
from qrapd.hosting import HostedVm, HostVitals
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.signals import receive_signals
from qrapd.status_tracker import StatusTracker
from qrapd.supervisor import Companion, Supervisor
from qrapd.systemd import Notifier, Reporter
from qrapd.vm import Outcome

if TYPE_CHECKING:
    from qrapd.vm_status import Origin

__all__ = ["supervise"]

BACKLOG = 64
"""Callers that may wait to be let in."""

STOP_MARGIN = 15.0
"""Seconds beyond the VM's own timeouts that a stop may take: a busy host, and the passts' end."""


async def supervise(
    plan: Plan,
    base: Path,
    emit: Emit,
    *,
    origin: Origin = "shell",
    reread: Callable[[], Plan] | None = None,
    companion: Companion | None = None,
    notifier: Notifier | None = None,
    watchdog: float | None = None,
    handed: HandedOver | None = None,
    only_left: bool = False,
) -> Outcome:
    """Run a VM until it ends for good. SIGTERM or SIGINT end it in order; each further one takes the next step.

    :param base: the runtime directory, above the VM's own.
    :param origin: whether a unit runs it, or a shell.
    :param reread: makes the plan anew from the VM's file, on SIGHUP; runs in a thread.
    :param companion: runs beside the VM for as long as both like.
    :param notifier: tells the service manager.
    :param watchdog: seconds between two signs of life to it.
    :param handed: the fds that an earlier supervisor has had kept.
    :param only_left: do nothing if no VM was left running.
    :raise QrapdError: the VM could not start, or ended badly.
    """
    collect_garbage()
    # Signals first: from here on none can end qrapd between two steps and leave something behind.
    with receive_signals(SIGTERM, SIGINT, SIGHUP, SIGUSR2) as signals:
        notifier = notifier or Notifier(None)
        async with anyio.create_task_group() as tasks:
            if watchdog is not None:
                tasks.start_soon(_be_alive, notifier, watchdog)
            foreground = _Foreground(
                plan, base, emit, origin, notifier, tasks, reread, handed, only_left=only_left
            )
            tasks.start_soon(foreground.obey, signals)
            outcome = await foreground.run(companion)
            if outcome.stood_back:
                signals.hold()
            tasks.cancel_scope.cancel()
    if outcome.error is not None:
        raise outcome.error
    return outcome


async def _be_alive(notifier: Notifier, seconds: float) -> None:
    """From the loop that does the work: a thread would go on when that hangs."""
    while True:
        notifier.tell(WATCHDOG=1)
        await anyio.sleep(seconds)


class _Foreground:
    """What is around one supervisor. For the API of its VM it is the :class:`qrapd.hosting.Host`."""

    def __init__(
        self,
        plan: Plan,
        base: Path,
        emit: Emit,
        origin: Origin,
        notifier: Notifier,
        tasks: TaskGroup,
        reread: Callable[[], Plan] | None,
        handed: HandedOver | None,
        *,
        only_left: bool,
    ) -> None:
        self.origin = origin
        self.events = EventLog()
        self._emit = emit
        self._tasks = tasks
        self._reporter = Reporter(
            notifier,
            plan.powerdown_timeout + 2 * plan.quit_timeout + STOP_MARGIN,
            lambda: self._supervisor.is_stopping,
        )
        links = [(link.index, link.mode) for link in plan.links]
        tracker = StatusTracker(plan.name, origin, links, datetime.now(UTC))
        self._vm = SupervisedVm(tracker)
        self._supervisor = Supervisor(
            plan,
            base,
            self._vm.track(self._tell),
            keeper=notifier,
            origin=origin,
            reread=reread,
            handed=handed,
            only_left=only_left,
            note_machine=self._vm.note_machine,
        )
        self._vm.supervisor = self._supervisor
        self._was_told_to_stop = False

    def _tell(self, event: str, /, **fields: object) -> None:
        self._emit(event, **fields)
        self._reporter.note(event, **fields)
        self.events.append(event, fields)

    # --- its life -------------------------------------------------------------------------------------

    async def obey(self, signals: AsyncIterable[Signals]) -> None:
        """Do what the signals say."""
        async for number in signals:
            if number == SIGHUP:
                self._tasks.start_soon(self._reload)
            elif number == SIGUSR2:
                self._tasks.start_soon(self._supervisor.leave)
            else:
                self._reporter.note_stop()
                # The second signal takes the next, rougher step; a stop that somebody else has asked for is none.
                self._supervisor.stop(hurry=self._was_told_to_stop)
                self._was_told_to_stop = True

    async def _reload(self) -> None:
        self._reporter.note_reload()
        with contextlib.suppress(QrapdError):  # the log says so
            await self._supervisor.reload()

    async def run(self, companion: Companion | None) -> Outcome:
        """Run the VM until it ends for good, with its API beside it."""
        self._tasks.start_soon(self._serve)
        try:
            return await self._supervisor.run(companion)
        except QrapdError as error:
            return Outcome(Reason.FAILED, error)

    # --- the API --------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Once the VM is up, for as long as it runs. A bug in the API must not end it."""
        try:
            await self._supervisor.wait_until_ready()
        except Conflict:
            return
        backoff = Backoff(sys.maxsize, window=1)  # no limit: the VM outlasts a full /run, or a lack of fds
        is_told = False
        while True:
            began = time.monotonic()
            try:
                from qrapd.api.server import serve_on_demand  # only now: no start waits for it (3 ms)

                with self._supervisor.directory.listen("control.sock", backlog=BACKLOG) as listener:
                    if is_told:
                        self._notice("takes calls again: `qrapd ps` and others see all of this VM")
                        is_told = False
                    await serve_on_demand(listener, self._make_app, report=self._report)
            except (Unavailable, OSError) as error:
                if time.monotonic() - began > LONGEST_DELAY:
                    backoff.succeed()
                if not is_told:
                    words = error.message if isinstance(error, Unavailable) else str(error)
                    self._notice(
                        f"takes no calls, and tries again: {words}; `qrapd ps` sees less of this VM until then"
                    )
                is_told = True
            except Exception as error:
                self._report("the API ended", error)
                return
            await anyio.sleep(backoff.fail(time.monotonic()) or LONGEST_DELAY)

    def _notice(self, words: str) -> None:
        self._tell("link.notice", vm=self._vm.name, notice=words)

    def _make_app(self) -> Any:
        from qrapd.api.access import Policy
        from qrapd.api.app import make_app

        return make_app(self, Policy(own_uid=os.geteuid()), report=self._report)

    def _report(self, where: str, error: BaseException) -> None:
        self._tell("bug.found", vm=self._vm.name, where=where, error=repr(error), trace=_trace(error))

    @property
    def vms(self) -> Mapping[str, HostedVm]:
        return {self._vm.name: self._vm}

    @property
    def vitals(self) -> HostVitals:
        return HostVitals(loop_lag_seconds=None)

    async def look_for(self, name: str) -> None:
        """There is this one VM."""

    async def put(self, name: str, text: str, *, only_new: bool = False) -> bool:  # noqa: ARG002 (as the agent has it)
        raise _takes_no_files(name)

    async def delete(self, name: str) -> None:
        raise _takes_no_files(name)


def _takes_no_files(name: str) -> Conflict:
    return Conflict(
        f"this is the supervisor of one VM: it neither writes nor removes files, not {name}'s either",
        hint="ask the agent, or edit the file and reload",
    )


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
