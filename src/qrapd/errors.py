# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can go wrong, whose move it is next, and the exit status that says so.

::

    QrapdError                     1   the base: a message for people and a hint what to do
     +-- UsageError                2   the command line is wrong: the caller's move
     +-- Unavailable              69   something needed is missing or taken: the host's owner's move
     +-- AlreadySupervised        75   this VM has a supervisor (or a QEMU) already: try again later
     +-- ConfigurationError       78   the VM's file is wrong: carries every problem found in it
     +-- QemuFailed                1   QEMU could not start or ended badly: its own words are quoted
     +-- Unknown                  69   there is no VM, link or forward of that name
     +-- Conflict                 75   not as things are: the VM runs already, or does not run
     +-- QmpFailed                 1   QEMU runs, and its monitor refused, hung up or stayed silent
         +-- QmpRefused            1   ... it answered with an error, and is well otherwise

Whatever else reaches the top is a bug in qrapd, and ends with status 70.
The numbers are those of sysexits.h(3head), which systemd.exec(5) knows by name too.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "AlreadySupervised",
    "ConfigurationError",
    "Conflict",
    "ExitStatus",
    "Problem",
    "QemuFailed",
    "QmpFailed",
    "QmpRefused",
    "QrapdError",
    "Unavailable",
    "Unknown",
    "UsageError",
]


class ExitStatus(enum.IntEnum):
    """How the commands end (docs/reference.md lists them for users)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 69
    BUG = 70
    ALREADY_SUPERVISED = 75
    CONFIGURATION = 78
    INTERRUPTED = 130
    """by Ctrl-C: 128 and the number of SIGINT, as shells have it"""


class QrapdError(Exception):
    """A failure with a cause that a person can act on.

    ``message`` says what was tried, on what, and what came back; ``hint`` what to do next.
    """

    exit_status = ExitStatus.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QrapdError):
    """The command line asks for something that there is not."""

    exit_status = ExitStatus.USAGE


class Unavailable(QrapdError):
    """A binary, a port, a directory or an answering passt is not to be had."""

    exit_status = ExitStatus.UNAVAILABLE


class AlreadySupervised(QrapdError):
    """Another process holds this VM's lock, or its QEMU still runs without a supervisor."""

    exit_status = ExitStatus.ALREADY_SUPERVISED


class QemuFailed(QrapdError):
    """QEMU could not start, or ended with an error or by a signal."""

    exit_status = ExitStatus.FAILED


class Unknown(QrapdError):
    """There is no VM, link or forward of that name."""

    exit_status = ExitStatus.UNAVAILABLE


class Conflict(QrapdError):
    """What was asked for is not possible as things are: the VM runs already, or does not run."""

    exit_status = ExitStatus.ALREADY_SUPERVISED


class QmpFailed(QrapdError):
    """A command on QEMU's monitor was refused, cut short, or not answered in time."""

    exit_status = ExitStatus.FAILED


class QmpRefused(QmpFailed):
    """QEMU has answered a command with an error, and is well otherwise."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a VM's file.

    ``key`` is the path to the value as a person would say it (``link[0].passt.tcp_ports[1]``), or "" for
    the file as a whole.
    """

    key: str
    reason: str
    value: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        value = f" (it is {self.value})" if self.value is not None else ""
        return f"{where}{self.reason}{value}"


class ConfigurationError(QrapdError):
    """A VM's file is wrong; ``problems`` holds all that was found, in the order of the file."""

    exit_status = ExitStatus.CONFIGURATION

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path}: {count}")
        self.path = path
        self.problems = tuple(problems)
