# SPDX-License-Identifier: GPL-2.0-or-later
"""From one supervisor to the next: held streams that came to this process, and this process become a newer qrapd."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import NoReturn

from qrapd.errors import ExitStatus
from qrapd.systemd import take_stored_fds

__all__ = ["become_successor", "take_streams"]

VARIABLE = "QRAPD_STREAMS"
"""Held streams for the next program in this very process: ``0=12,1=15``, fds by the links' indices."""


def take_streams(environment: MutableMapping[str, str]) -> dict[int, int]:
    """The held streams that an earlier supervisor has left for this one: fds by the links' indices.

    The variables are taken out of the environment. Of two for one link none is taken: which one is in use is not known.
    """
    streams: dict[int, list[int]] = {}
    for pair in filter(None, environment.pop(VARIABLE, "").split(",")):
        index, _, number = pair.partition("=")
        if index.isdecimal() and number.isdecimal():
            os.set_inheritable(int(number), False)
            streams.setdefault(int(index), []).append(int(number))
    for name, fd in take_stored_fds(environment, os.getpid()):
        index = name.removeprefix("link")
        if index.isdecimal() and not streams.get(int(index)):
            streams.setdefault(int(index), []).append(fd)
        else:
            os.close(fd)
    return {index: fds[0] for index, fds in streams.items() if len(fds) == 1}


def become_successor(streams: Mapping[int, int], environment: Mapping[str, str]) -> NoReturn:
    """Run the installed qrapd in this process, with the same arguments; it adopts the VM.

    :param environment: as this process was given it.
    """
    for fd in streams.values():
        os.set_inheritable(fd, True)
    pairs = ",".join(f"{index}={fd}" for index, fd in streams.items())
    program = sys.argv[0]
    # The script's own path may lead to another version by now: that is what an upgrade is.
    if os.access(program, os.X_OK) and not program.endswith(".py"):
        argv = [program, *sys.argv[1:]]
    else:
        argv = [sys.executable, "-m", "qrapd", *sys.argv[1:]]
    try:
        os.execve(argv[0], argv, {**environment, VARIABLE: pairs})  # noqa: S606 (no shell, as always)
    except OSError as error:
        # An end in order would end the children: they have been let go of, and the next start adopts them.
        os.write(
            2,
            f"qrapd: cannot run {argv[0]}: {error.strerror}; the VM runs on without a supervisor\n".encode(),
        )
        os._exit(ExitStatus.FAILED)
