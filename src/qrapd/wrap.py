# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrap command line as a plan: what ``qrapd wrap`` supervises."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qrapd import binaries
from qrapd.errors import Unavailable, UsageError
from qrapd.plan import LinkPlan, Plan
from qrapd.qrap_arguments import Explicit, NoFreeAddress, Patched, qemu_names, read_command_line, strtol
from qrapd.wrap_arguments import wrap

__all__ = ["plan_wrap"]

_FIRST_FREE_FD = 3


def plan_wrap(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    pattern: str,
    allowed_uids: frozenset[int],
    powerdown_timeout: float,
    quit_timeout: float,
) -> Plan:
    """How a command line of qrap(1) comes up under supervision.

    :param pattern: the sockets' paths, with ``{n}`` for their numbers.
    :param allowed_uids: whose listeners are trusted, beside our own, root's and passt's.
    :raise UsageError: nothing in the command line takes the stream.
    :raise Unavailable: there is no QEMU.
    """
    if not arguments:
        raise UsageError(
            "what is to be run is missing",
            hint="qrapd wrap 5 qemu-system-x86_64 ... -netdev socket,fd=5,id=n0 -device virtio-net-pci,netdev=n0",
        )
    try:
        wanted = read_command_line(arguments, environment.get("PATH"), _is_executable)
    except NoFreeAddress:
        raise UsageError(
            "every address at which this machine could have a network device is taken",
            hint="remove a -device, or name the network yourself: qrapd wrap FDNUM QEMU_CMD ...",
        ) from None
    if isinstance(wanted, Patched) and strtol(arguments[0], 0)[0] >= _FIRST_FREE_FD:
        # qrap hands the number to some QEMU as the name of a disk; nobody wants that.
        raise UsageError(
            f"{' '.join(arguments[1:2]) or 'QEMU_CMD'} is no program in a directory of PATH",
            hint=f"after the number {arguments[0]} a program is expected, by its name alone, without a slash",
        )
    wrapped = wrap(wanted, pid=os.getpid())
    qemu = _find_qemu(wanted)
    here = _working_directory()
    return Plan(
        name=wrapped.name,
        qemu=qemu,
        command_line=partial(wrapped.command_line, binary=qemu),
        directory=here,
        passt_directory=here,
        links=(LinkPlan(0, "probe", "", wrapped.hub, None, allowed_uids=allowed_uids, pattern=pattern),),
        powerdown_timeout=powerdown_timeout,
        quit_timeout=quit_timeout,
        console=False,
        inherited_fds=_inherited_fds(),
        advice="options of qrapd come before FDNUM or QEMU's first argument; all that follows is QEMU's",
    )


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise Unavailable(
            "the current directory does not exist any more", hint="go to another one: cd /"
        ) from None


def _find_qemu(wanted: Explicit | Patched) -> str:
    if isinstance(wanted, Explicit):
        return binaries.find_binary(wanted.argv[0])
    missing = None
    for name in qemu_names(os.uname().machine):
        try:
            return binaries.find_binary(name)
        except Unavailable as error:
            # The package of the last but one is that of this host's architecture; none has the name `kvm`.
            missing = error if name.startswith("qemu-system-") else missing
    assert missing is not None
    raise missing


def _inherited_fds() -> tuple[int, ...]:
    """What the caller has passed in for QEMU: all that Python itself opens closes at exec (PEP 446)."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        fd = int(entry.name)
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue  # the directory's own
        if fd > 2 and not flags & fcntl.FD_CLOEXEC:
            found.append(fd)
    return tuple(sorted(found))


def _is_executable(path: str) -> bool:
    return os.access(path, os.X_OK)
