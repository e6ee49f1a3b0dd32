# SPDX-License-Identifier: GPL-2.0-or-later
"""From one supervisor to the next: fds that came to this process, and this process become a newer qrapd."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import NoReturn

from qrapd.errors import ExitStatus
from qrapd.process import pid_of
from qrapd.signals import pass_on
from qrapd.systemd import take_stored_fds

__all__ = ["AGENT_SOCKET", "OWN_AGENT_SOCKET", "HandedOver", "become_successor", "take_fds"]

VARIABLE = "QRAPD_STREAMS"
"""Fds for the next program in this very process: ``0=12,1=15,qemu=16``, by the names that they have in the fd store. A
link's stream has its index only, as in qrapd's first versions, which hand over nothing else."""

AGENT_SOCKET = "agent"
"""Under which the agent's listening socket comes from its socket unit (FileDescriptorName=)."""

OWN_AGENT_SOCKET = "agent-own"
"""Under which one comes that an agent has made itself."""

_NAME = re.compile(r"([a-z0-9-]{1,63}\.)?((link|passt)[0-9]+|passt[0-9]+-output|qemu(-output)?)|agent(-own)?")

_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass
class HandedOver:
    """What an earlier supervisor has left for this one. What nobody takes is to be closed."""

    fds: dict[str, list[int]] = field(default_factory=dict)
    """by the names that they have in the fd store"""

    def take(self, name: str) -> int | None:
        """The fd of this name, which is the caller's from now on. Of two neither: which one is in use is not known."""
        fds = self.fds.pop(name, [])
        if len(fds) == 1:
            return fds[0]
        _close(fds)
        return None

    def take_pidfd(self, name: str, pid: int) -> int | None:
        """The pidfd of this name that names the process ``pid``, which is the caller's from now on.

        It is proof: a pidfd is never another process's, and one whose process is gone names none.
        """
        found = None
        for fd in self.fds.pop(name, []):
            if found is None and pid_of(fd) == pid:
                found = fd
            else:
                os.close(fd)
        return found

    def of(self, vm: str) -> HandedOver:
        """What is one VM's, where there is more than one; it is the caller's from now on."""
        prefix = f"{vm}."
        names = [name for name in self.fds if name.startswith(prefix)]
        return HandedOver({name.removeprefix(prefix): self.fds.pop(name) for name in names})

    def close(self) -> None:
        """Let go of all that is left."""
        for fds in self.fds.values():
            _close(fds)
        self.fds.clear()


def take_fds(environment: MutableMapping[str, str]) -> HandedOver:
    """What an earlier supervisor has left for this one, by the service manager or in this very process.

    The variables are taken out of the environment, and the fds are not inherited by children.
    """
    handed = HandedOver()
    inherited = environment.pop(VARIABLE, None)
    if inherited is None:
        for name, fd in take_stored_fds(environment, os.getpid()):
            if _NAME.fullmatch(name):
                handed.fds.setdefault(name, []).append(fd)
            else:
                os.close(fd)
        return handed
    for name in _LISTEN:  # what they say was for the program that was here before, and has been taken by it
        environment.pop(name, None)
    for pair in filter(None, inherited.split(",")):
        name, _, number = pair.partition("=")
        name = f"link{name}" if name.isdecimal() else name
        if _NAME.fullmatch(name) and number.isdecimal():
            os.set_inheritable(int(number), False)
            handed.fds.setdefault(name, []).append(int(number))
    return handed


def become_successor(fds: Mapping[str, int], environment: Mapping[str, str]) -> NoReturn:
    """Run the installed qrapd in this process, with the same arguments; it adopts the VM.

    :param fds: what it is given, by the names of the fd store.
    :param environment: as this process was given it.
    """
    for fd in fds.values():
        os.set_inheritable(fd, True)
    pairs = ",".join(f"{re.sub('^link', '', name)}={fd}" for name, fd in fds.items())
    program = sys.argv[0]
    # The script's own path may lead to another version by now: that is what an upgrade is.
    if os.access(program, os.X_OK) and not program.endswith(".py"):
        argv = [program, *sys.argv[1:]]
    else:
        argv = [sys.executable, "-m", "qrapd", *sys.argv[1:]]
    kept = {name: value for name, value in environment.items() if name not in _LISTEN}
    pass_on()
    try:
        os.execve(argv[0], argv, {**kept, VARIABLE: pairs})  # noqa: S606 (no shell, as always)
    except OSError as error:
        # An end in order would end the children: they have been let go of, and the next start adopts them.
        os.write(
            2,
            f"qrapd: cannot run {argv[0]}: {error.strerror}; the VM runs on without a supervisor\n".encode(),
        )
        os._exit(ExitStatus.FAILED)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
