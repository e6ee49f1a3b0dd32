# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM in the foreground: its runtime directory, the signals that reach qrapd, and the VM between them.

The VM may be started several times (the table [restart]), and its file may be read again while it runs (SIGHUP).
"""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from qrapd.backoff import Backoff
from qrapd.errors import ConfigurationError, QemuFailed, QrapdError
from qrapd.left_behind import Left, look_for_left
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.reload import Changes, compare
from qrapd.restart import is_wanted
from qrapd.runtime_directory import VmDirectory
from qrapd.systemd import Notifier, Reporter
from qrapd.vm import Outcome, Vm

__all__ = ["supervise"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

STOP_MARGIN = 15.0
"""Seconds beyond the VM's own timeouts that a stop may take: a busy host, and the passts' end."""

Companion = Callable[[Vm], Coroutine[Any, Any, None]]


async def supervise(
    plan: Plan,
    base: Path,
    emit: Emit,
    *,
    reread: Callable[[], Plan] | None = None,
    companion: Companion | None = None,
    notifier: Notifier | None = None,
    watchdog: float | None = None,
    streams: Mapping[int, int] | None = None,
    only_left: bool = False,
) -> Outcome:
    """Run a VM until it ends for good. SIGTERM or SIGINT end it in order; each further one takes the next step.

    :param base: the runtime directory, above the VM's own.
    :param reread: makes the plan anew from the VM's file, on SIGHUP; runs in a thread.
    :param companion: runs beside the VM for as long as both like.
    :param notifier: tells the service manager.
    :param watchdog: seconds between two signs of life to it.
    :param streams: held streams that an earlier supervisor has had kept, as fds by the links' indices.
    :param only_left: do nothing if no VM was left running.
    :raise QrapdError: the VM could not start, or ended badly.
    """
    _collect_garbage()
    directory = VmDirectory(base, plan.name)
    # Signals first: from here on none can end qrapd between two steps and leave something behind.
    with _receive_signals() as signals, directory.claim():
        notifier = notifier or Notifier(None)
        reporter = Reporter(notifier, plan.powerdown_timeout + 2 * plan.quit_timeout + STOP_MARGIN)

        def tell(event: str, /, **fields: object) -> None:
            emit(event, **fields)
            reporter.note(event, **fields)

        left = await look_for_left(directory, streams or {}, tell, notifier)
        if left is None and only_left:
            return Outcome(Reason.REQUEST)
        supervisor = _Supervisor(plan, directory, tell, reread, notifier, reporter, left)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.obey, signals, tasks)
            if watchdog is not None:
                tasks.start_soon(_be_alive, notifier, watchdog)
            outcome = await supervisor.run(companion)
            tasks.cancel_scope.cancel()
        if outcome.stood_back:
            directory.leave_as_it_is()
    if outcome.error is not None:
        raise outcome.error
    return outcome


async def _wait_and_cancel(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _be_alive(notifier: Notifier, seconds: float) -> None:
    """From the loop that does the work: a thread would go on when that hangs."""
    while True:
        notifier.tell(WATCHDOG=1)
        await anyio.sleep(seconds)


class _Supervisor:
    """Starts the VM, and again where its file wants that; applies what has changed in the file."""

    def __init__(
        self,
        plan: Plan,
        directory: VmDirectory,
        emit: Emit,
        reread: Callable[[], Plan] | None,
        notifier: Notifier,
        reporter: Reporter,
        left: Left | None,
    ) -> None:
        self._plan = plan
        """by which the VM is started next time"""
        self._directory = directory
        self._emit: Emit = partial(emit, vm=plan.name)
        self._tell = emit
        self._reread = reread
        self._reloading = anyio.Lock()
        self._stopped = anyio.Event()
        self._backoff = Backoff(plan.restart.limit, plan.restart.window)
        self._renewed = anyio.Event()
        """set when there is another Vm"""
        self._notifier = notifier
        self._reporter = reporter
        self._vm = Vm(plan, directory, emit, keeper=notifier, left=left)
        self._file = plan.file
        """as it was read last"""

    async def obey(self, signals: AsyncIterator[signal.Signals], tasks: TaskGroup) -> None:
        """Do what the signals say."""
        async for number in signals:
            if number == signal.SIGHUP:
                tasks.start_soon(self._reload)
            elif number == signal.SIGUSR2:
                tasks.start_soon(self._leave)
            else:
                self._stopped.set()
                self._vm.stop()

    async def run(self, companion: Companion | None) -> Outcome:
        """Run the VM, and again for as long as its file wants that."""
        while True:
            since = time.monotonic()
            outcome = await self._run_once(companion)
            failure = outcome.error is not None
            limits = self._plan.restart
            wanted = is_wanted(limits.policy, outcome.reason, failure=failure)
            if outcome.stood_back or self._stopped.is_set() or not wanted:
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
            with anyio.move_on_after(delay):
                await self._stopped.wait()
            if self._stopped.is_set():
                return Outcome(Reason.REQUEST)
            self._begin_anew()
            companion = None

    def _begin_anew(self) -> None:
        """Make the VM for the next start, by the file as it was read last; but what has proved impossible stays out."""
        fallen_back = self._vm.fallen_back
        links = tuple(fallen_back.get(link.index, link) for link in self._plan.links)
        self._vm = Vm(replace(self._plan, links=links), self._directory, self._tell, keeper=self._notifier)
        renewed, self._renewed = self._renewed, anyio.Event()
        renewed.set()

    async def _wait_until_ready(self) -> Vm:
        """The VM that runs, or the next one that does."""
        while not self._vm.ready.is_set():
            async with anyio.create_task_group() as tasks:
                for event in (self._vm.ready, self._renewed):
                    tasks.start_soon(_wait_and_cancel, event, tasks.cancel_scope)
        return self._vm

    async def _run_once(self, companion: Companion | None) -> Outcome:
        async with anyio.create_task_group() as tasks:
            if companion is not None:
                tasks.start_soon(companion, self._vm)
            outcome = await self._vm.run()
            tasks.cancel_scope.cancel()
        return outcome

    async def _leave(self) -> None:
        """Make room for another qrapd, in this very process."""
        async with self._reloading:
            await (await self._wait_until_ready()).leave()

    async def _reload(self) -> None:
        """Read the file again and apply what can be applied to a machine that runs."""
        if self._reread is None:
            self._emit(
                "vm.reload_refused",
                error="there is no file to read again: this VM was started from a command line",
                hint=None,
            )
            return
        async with self._reloading:
            self._reporter.note_reload()
            try:
                # In a thread, which a stop does not wait for: this reads files, and asks passt for its options.
                plan = await anyio.to_thread.run_sync(self._reread, abandon_on_cancel=True)
            except QrapdError as error:
                self._refuse(error)
            else:
                await self._apply(plan)

    def _refuse(self, error: QrapdError) -> None:
        if isinstance(error, ConfigurationError):
            for problem in error.problems:
                self._emit("config.invalid", file=error.path, problem=str(problem), hint=problem.hint)
        self._emit("vm.reload_refused", error=error.message, hint=error.hint)

    async def _apply(self, plan: Plan) -> None:
        # At once for the next start; a VM that is just starting has to be ready before its links can change.
        self._plan = replace(plan, name=self._plan.name)
        vm = await self._wait_until_ready()
        changes = self._compare(plan, vm)
        renewed = vm.reload(self._plan)
        self._file = plan.file
        self._emit(
            "vm.reloaded",
            links=renewed,
            applied=[*changes.applied, *changes.swapped],
            needs_restart=[*changes.needing_restart],
        )

    def _compare(self, plan: Plan, vm: Vm) -> Changes:
        """What is new since the file was read last, and what the machine that runs still lacks."""
        started_by = vm.plan.file
        if started_by is None or self._file is None or plan.file is None:
            return Changes()
        lacking = compare(started_by, plan.file).needing_restart
        return replace(compare(self._file, plan.file), needing_restart=lacking)


def _too_often(outcome: Outcome, limit: int, window: float) -> QrapdError:
    last = outcome.error.message if outcome.error else f"the last time: {outcome.reason.value}"
    return QemuFailed(
        f"the VM has ended {limit} times within {window:g} s: {last}",
        hint=(outcome.error and outcome.error.hint) or "its table [restart] sets the limit",
    )


@contextlib.contextmanager
def _receive_signals() -> Iterator[AsyncIterator[signal.Signals]]:
    """The signals that are for the VM. Afterwards they are ignored: all is over, and must not seem to end violently.

    Closing the receiver puts the default actions back, so they are blocked until they can be ignored.
    """
    try:
        with anyio.open_signal_receiver(*_SIGNALS) as signals:
            try:
                yield signals
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _collect_garbage() -> None:
    """From here on there is garbage. What was imported is none, and no collection needs to walk it."""
    if not gc.isenabled():  # as qrapd.__main__ has left it
        gc.freeze()
        gc.enable()
