# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM in the foreground: its runtime directory, the signals that reach qrapd, and the VM between them.

The VM may be started several times (the table [restart]), and its file may be read again while it runs (SIGHUP).
"""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from qrapd import record
from qrapd.backoff import Backoff
from qrapd.errors import AlreadySupervised, ConfigurationError, QemuFailed, QrapdError
from qrapd.lifecycle import Reason
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.reload import Changes, compare
from qrapd.restart import is_wanted
from qrapd.runtime_directory import VmDirectory
from qrapd.vm import Outcome, Vm

__all__ = ["supervise"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Companion = Callable[[Vm], Coroutine[Any, Any, None]]


async def supervise(
    plan: Plan,
    base: Path,
    emit: Emit,
    *,
    reread: Callable[[], Plan] | None = None,
    companion: Companion | None = None,
) -> Outcome:
    """Run a VM until it ends for good. SIGTERM or SIGINT end it in order; each further one takes the next step.

    :param base: the runtime directory, above the VM's own.
    :param reread: makes the plan anew from the VM's file, on SIGHUP; runs in a thread.
    :param companion: runs beside the VM for as long as both like.
    :raise QrapdError: the VM could not start, or ended badly.
    """
    _collect_garbage()
    directory = VmDirectory(base, plan.name)
    # Signals first: from here on none can end qrapd between two steps and leave something behind.
    with _receive_signals() as signals, directory.claim():
        _refuse_second_qemu(directory)
        supervisor = _Supervisor(plan, directory, emit, reread)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.obey, signals, tasks)
            outcome = await supervisor.run(companion)
            tasks.cancel_scope.cancel()
    if outcome.error is not None:
        raise outcome.error
    return outcome


class _Supervisor:
    """Starts the VM, and again where its file wants that; applies what has changed in the file."""

    def __init__(
        self, plan: Plan, directory: VmDirectory, emit: Emit, reread: Callable[[], Plan] | None
    ) -> None:
        self._plan = plan
        """by which the VM is started next time"""
        self._directory = directory
        self._emit: Emit = partial(emit, vm=plan.name)
        self._tell = emit
        self._reread = reread
        self._reloading = anyio.Lock()
        self._stopped = anyio.Event()
        self._vm = Vm(plan, directory, emit)
        self._file = plan.file
        """as it was read last"""

    async def obey(self, signals: AsyncIterator[signal.Signals], tasks: TaskGroup) -> None:
        """Do what the signals say."""
        async for number in signals:
            if number == signal.SIGHUP:
                tasks.start_soon(self._reload)
            else:
                self._stopped.set()
                self._vm.stop()

    async def run(self, companion: Companion | None) -> Outcome:
        """Run the VM, and again for as long as its file wants that."""
        limits = self._plan.restart
        backoff = Backoff(limits.limit, limits.window)
        while True:
            since = time.monotonic()
            outcome = await self._run_once(companion)
            policy = self._plan.restart.policy
            failure = outcome.error is not None
            if self._stopped.is_set() or not is_wanted(policy, outcome.reason, failure=failure):
                return outcome
            if time.monotonic() - since > limits.window:
                backoff.succeed()
            delay = backoff.fail(time.monotonic())
            if delay is None:
                return Outcome(outcome.reason, _too_often(outcome, limits.limit, limits.window))
            self._emit(
                "vm.restarting",
                attempts=backoff.attempts,
                delay_ms=round(delay * 1000),
                error=outcome.error and outcome.error.message,
            )
            with anyio.move_on_after(delay):
                await self._stopped.wait()
                return Outcome(Reason.REQUEST)
            self._vm = Vm(self._plan, self._directory, self._tell)
            companion = None

    async def _run_once(self, companion: Companion | None) -> Outcome:
        async with anyio.create_task_group() as tasks:
            if companion is not None:
                tasks.start_soon(companion, self._vm)
            outcome = await self._vm.run()
            tasks.cancel_scope.cancel()
        return outcome

    async def _reload(self) -> None:
        """Read the file again and apply what can be applied to a machine that runs."""
        if self._reread is None:
            self._emit(
                "vm.reload_refused",
                error="there is no file to read again: this VM was started from a command line",
                hint=None,
            )
            return
        await self._vm.ready.wait()
        async with self._reloading:
            await self._reload_from(self._reread)

    async def _reload_from(self, reread: Callable[[], Plan]) -> None:
        try:
            # In a thread: this reads files, and asks passt for its options.
            plan = await anyio.to_thread.run_sync(reread)
        except QrapdError as error:
            if isinstance(error, ConfigurationError):
                for problem in error.problems:
                    self._emit("config.invalid", file=error.path, problem=str(problem), hint=problem.hint)
            self._emit("vm.reload_refused", error=error.message, hint=error.hint)
            return
        changes = self._compare(plan)
        renewed = self._vm.reload(plan)
        self._plan = replace(plan, name=self._plan.name)
        self._file = plan.file
        self._emit(
            "vm.reloaded",
            links=renewed,
            applied=[*changes.applied, *changes.swapped],
            needs_restart=[*changes.needing_restart],
        )

    def _compare(self, plan: Plan) -> Changes:
        """What is new since the file was read last, and what the machine that runs still lacks."""
        started_by = self._vm.plan.file
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


def _refuse_second_qemu(directory: VmDirectory) -> None:
    """Two QEMUs on the same disks destroy them; a supervisor that was killed leaves its QEMU running."""
    left = record.read(directory.record_path)
    if left is None or not left.qemu.alive:
        return
    directory.leave_as_it_is()
    raise AlreadySupervised(
        f"a QEMU of this VM (pid {left.qemu.pid}) still runs, left by a supervisor that is gone",
        hint=f"power it down by its monitor {directory.socket_path('user-qmp.sock')}, "
        f"or end it at once, and its passt with it: kill {left.qemu.pid}",
    )
