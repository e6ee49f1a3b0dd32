# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor writes down about its running VM, for whoever comes after it.

A supervisor that was killed leaves QEMU and passt running. The next one reads here that they are there, and
does not start a second QEMU on the same disks.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from qrapd.process import start_time

__all__ = ["ProcessId", "Record", "read", "write"]

VERSION = 1


@dataclass(frozen=True)
class ProcessId:
    """A process for good: a pid is used again, a pid with its start time (clock ticks since boot) is not."""

    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        try:
            return start_time(self.pid) == self.start_time
        except ProcessLookupError:
            return False

    @classmethod
    def of_this(cls) -> ProcessId:
        """The process that asks."""
        return cls(os.getpid(), start_time(os.getpid()))


@dataclass(frozen=True)
class Record:
    """One running VM."""

    qemu: ProcessId
    passts: tuple[ProcessId, ...] = ()
    supervisor: ProcessId | None = None
    """whoever wrote this"""


def write(path: Path, record: Record) -> None:
    """Replace the record atomically: a reader sees the old one or the new one, never half."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"version": VERSION, **asdict(record)}) + "\n")
    os.replace(temporary, path)  # noqa: PTH105 (says "atomically" to a reader; Path.replace is the same call)


def read(path: Path) -> Record | None:
    """The record, or None where there is none that this version understands."""
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            return None
        return Record(
            qemu=ProcessId(**data["qemu"]),
            passts=tuple(ProcessId(**process) for process in data["passts"]),
            supervisor=ProcessId(**data["supervisor"]) if data.get("supervisor") else None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
