# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that runs under a supervisor elsewhere: who that is, and word sent to it."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from qrapd.errors import Unavailable
from qrapd.process import Hidden, start_time
from qrapd.record import ProcessId
from qrapd.runtime_directory import VmDirectory

__all__ = ["find_supervisor", "tell", "wait_for_end"]


def find_supervisor(base: Path, name: str) -> ProcessId:
    """Who supervises the VM ``name``.

    :param base: the runtime directory that it was started with.
    :raise Unavailable: nobody does, or it cannot be told.
    """
    directory = VmDirectory(base, name)
    try:
        pid = directory.supervisor_pid()
        if pid is not None:
            try:
                return ProcessId(pid, start_time(pid))
            except Hidden:
                return ProcessId(pid, 0)  # it holds the lock, which is proof enough
    except PermissionError:
        raise Unavailable(
            f"the directory {directory.path} of the VM {name} is closed to this user",
            hint="do this as the user who runs the VM",
        ) from None
    except ProcessLookupError:
        pass  # it has just ended
    raise Unavailable(
        f"no VM {name} runs under a supervisor, as far as {base} tells",
        hint="start it: `qrapd run`; or name the runtime directory that it was started with: --runtime-dir DIR",
    )


def wait_for_end(process: ProcessId, timeout: float | None = None) -> bool:
    """Wait until exactly this process has ended. Returns whether it has: False after ``timeout`` seconds."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        return not process.alive or bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


def tell(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to exactly this process.

    :raise Unavailable: it has ended meanwhile, or is another user's.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            # Between the two the pid was not given to another: the pidfd names who has it now, and that is checked.
            if not process.alive:
                raise ProcessLookupError
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        raise Unavailable(f"the supervisor (pid {process.pid}) has just ended") from None
    except PermissionError:
        raise Unavailable(
            f"the supervisor (pid {process.pid}) is another user's", hint="do this as that user, or as root"
        ) from None
