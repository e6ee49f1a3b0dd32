# SPDX-License-Identifier: GPL-2.0-or-later
"""The fds of what this supervisor runs, for the one that comes next: in the fd store, or handed over as copies.

The store is for a supervisor that dies and the copies for one that leaves in order, whose successor is given them in
its own process. Both go by the names that :mod:`qrapd.systemd` has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Protocol

from qrapd.systemd import Keeper, output_name

__all__ = ["KeptProcess", "copies"]


def copies(fds: Mapping[str, int]) -> dict[str, int]:
    """Copies for whoever comes next, as far as the host has fds for them: what is not handed over is regained."""
    made = {}
    for name, fd in fds.items():
        with contextlib.suppress(OSError):
            made[name] = os.dup(fd)
    return made


class _Process(Protocol):
    """What there is of a process; -1 where that is not to be had."""

    @property
    def pidfd(self) -> int: ...

    @property
    def output(self) -> int: ...


class KeptProcess:
    """A process as the next supervisor knows it: its pidfd tells who it is, and its output what it says meanwhile.

    :param name: of the pidfd in the fd store.
    """

    def __init__(self, keeper: Keeper, name: str) -> None:
        self._keeper = keeper
        self._name = name

    def keep(self, process: _Process) -> None:
        """Have the fds of this one stored."""
        for name, fd in self._fds(process).items():
            self._keeper.store(name, [fd])

    def forget(self) -> None:
        """Have them stored no more: it has ended."""
        for name in (self._name, output_name(self._name)):
            self._keeper.forget(name)

    def copies(self, process: _Process) -> dict[str, int]:
        """Copies of the fds of this one, by their names."""
        return copies(self._fds(process))

    def _fds(self, process: _Process) -> dict[str, int]:
        fds = {self._name: process.pidfd, output_name(self._name): process.output}
        return {name: fd for name, fd in fds.items() if fd >= 0}
