# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs an agent has started by itself since the host came up: the next agent does not start them once more.

A VM that was stopped, or whose guest has powered down, stays so over a crash and an upgrade of the agent; ``autostart``
is for the host's start, as with libvirt.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Autostarted"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one at each start of the host: random(4)."""


class Autostarted:
    """The names, and the file in the runtime directory that holds them.

    What cannot be read or written is forgotten: then a VM is started once more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(path.read_text())
            if data["boot"] == _boot():
                self._names = {str(name) for name in data["names"]}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """Remember these as well."""
        new = set(names) - self._names
        if new:
            self._names |= new
            self._write()

    def retain(self, names: Iterable[str]) -> None:
        """Forget all but these: the others are gone, and what comes by their names later is another VM."""
        kept = self._names & set(names)
        if kept != self._names:
            self._names = kept
            self._write()

    def clear(self) -> None:
        """Forget all: the host goes down."""
        self._names.clear()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.unlink(
                missing_ok=True
            )  # of an agent that was killed; what somebody has put there is not followed
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 (a Path has no fd to open)
                file.write(json.dumps({"boot": _boot(), "names": sorted(self._names)}) + "\n")
            new.replace(self._path)


def _boot() -> str:
    return BOOT_ID.read_text().strip()
