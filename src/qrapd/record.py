# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor writes down about its running VM, for whoever comes after it.

A supervisor that was killed leaves QEMU and passt running. The next one reads here that they are there, and takes them
over; it never starts a second QEMU on the same disks.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qrapd.forwards import Changed
from qrapd.process import Hidden, start_time

if TYPE_CHECKING:
    from qrapd.vm_status import Origin

__all__ = ["Asked", "LinkRecord", "ProcessId", "Record", "Unusable", "of_agents", "read", "write"]

VERSION = 2
"""Counted up where an older qrapd would understand a record wrongly; what it does not look for may come in."""

Asked = Literal["stop", "restart"]


class Unusable(ValueError):
    """There is a record, and this version cannot make sense of it."""


@dataclass(frozen=True)
class ProcessId:
    """A process for good: a pid is used again, a pid with its start time (clock ticks since boot) is not."""

    pid: int
    start_time: int
    """0: it was hidden from the first"""

    @property
    def alive(self) -> bool:
        """Whether exactly this process still runs. One that /proc hides does, for all that can be known."""
        try:
            return start_time(self.pid) == self.start_time
        except Hidden:
            return True
        except ProcessLookupError:
            return False

    @classmethod
    def of_this(cls) -> ProcessId:
        """The process that asks."""
        return cls(os.getpid(), start_time(os.getpid()))


@dataclass(frozen=True)
class LinkRecord:
    """One link of it."""

    index: int
    mode: Literal["swap", "vhost-user", "native"]
    generation: int
    number: int
    """of the streams that QEMU was given for it: names its port in QEMU"""
    swapping: bool = False
    """QEMU was being given another one: which it has is not known"""
    passt: ProcessId | None = None
    """a passt of qrapd's own"""
    passt_pid: int | None = None
    """any passt, where it can be told"""
    socket: str | None = None
    """the path of a passt's that is not qrapd's"""
    inode: int | None = None
    """of QEMU's end of the stream, by which it is found again in QEMU"""
    mac: str | None = None
    """the guest's"""
    argv: tuple[str, ...] | None = None
    """program and options by which passt goes; None: not known"""
    changed: Changed | None = None
    """its forwards, where they were changed at run time"""


@dataclass(frozen=True)
class Record:
    """One running VM."""

    qemu: ProcessId
    links: tuple[LinkRecord, ...] = ()
    supervisor: ProcessId | None = None
    """whoever wrote this"""
    origin: Origin | None = None
    """what that is; None: written by a qrapd that did not say"""
    asked: Asked | None = None
    """what it was asked for and had not done yet, for one that goes on in its place"""


def write(path: Path, record: Record) -> None:
    """Replace the record atomically: a reader sees the old one or the new one, never half."""
    temporary = path.with_suffix(".new")
    data = {"version": VERSION, **asdict(record)}
    for link in data["links"]:
        if link["changed"] is None:
            del link["changed"]  # which an older qrapd, gone back to, does not know
    temporary.write_text(json.dumps(data) + "\n")
    os.replace(temporary, path)  # noqa: PTH105 (says "atomically" to a reader; Path.replace is the same call)


def read(path: Path) -> Record | None:
    """The record, or None where there is none.

    :raise Unusable: it is another version's, or damaged.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} cannot be read: {error}") from None
    try:
        data = json.loads(text)
        version = data["version"]
        if version != VERSION:
            raise Unusable(f"{path} is of version {version!r}, and this qrapd writes version {VERSION}")
        return Record(
            qemu=ProcessId(**data["qemu"]),
            links=tuple(_link(link) for link in data["links"]),
            supervisor=_process(data["supervisor"]),
            origin=data.get("origin"),
            asked=data.get("asked"),
        )
    except Unusable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"{path} is damaged") from None


def of_agents(base: Path) -> list[str]:
    """The VMs that an agent runs, or has left running: whose records in the runtime directory ``base`` say so.

    Another user's are passed over: that may be a directory made to lead astray whoever looks into it.
    """
    found = []
    for directory in sorted(base.iterdir()) if base.is_dir() else ():
        with contextlib.suppress(OSError, Unusable):
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            there = read(directory / "record.json")
            if there is not None and there.origin == "agent":
                found.append(directory.name)
    return found


def _link(data: dict[str, Any]) -> LinkRecord:
    argv = data.get("argv")
    return LinkRecord(
        **{
            **data,
            "passt": _process(data["passt"]),
            "argv": None if argv is None else tuple(argv),
            "changed": _changed(data.get("changed")),
        }
    )


def _changed(data: dict[str, Any] | None) -> Changed | None:
    if data is None:
        return None
    now, file = (tuple((str(a), str(b)) for a, b in data[name]) for name in ("now", "file"))
    return Changed(now, file)


def _process(data: dict[str, Any] | None) -> ProcessId | None:
    return None if data is None else ProcessId(**data)
