# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM in the foreground: its runtime directory, the signals that reach qrapd, and the VM between them."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio

from qrapd import record
from qrapd.errors import AlreadySupervised
from qrapd.logs import Emit
from qrapd.plan import Plan
from qrapd.runtime_directory import VmDirectory
from qrapd.vm import Outcome, Vm

__all__ = ["supervise"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def supervise(
    plan: Plan, base: Path, emit: Emit, companion: Callable[[Vm], Coroutine[Any, Any, None]] | None = None
) -> Outcome:
    """Run a VM until it ends. SIGTERM or SIGINT end it in order; each further one takes the next, rougher step.

    :param base: the runtime directory, above the VM's own.
    :param companion: runs beside the VM for as long as both like.
    :raise QrapdError: the VM could not start, or ended badly.
    """
    _collect_garbage()
    directory = VmDirectory(base, plan.name)
    # Signals first: from here on none can end qrapd between two steps and leave something behind.
    with _receive_signals() as signals, directory.claim():
        _refuse_second_qemu(directory)
        vm = Vm(plan, directory, emit)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_obey, signals, vm, emit)
            if companion is not None:
                tasks.start_soon(companion, vm)
            outcome = await vm.run()
            tasks.cancel_scope.cancel()
    if outcome.error is not None:
        raise outcome.error
    return outcome


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


async def _obey(signals: AsyncIterator[signal.Signals], vm: Vm, emit: Emit) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            emit("vm.reload_refused", vm=vm.plan.name)
        else:
            vm.stop()


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
