# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's root file system: what is in it, and how it is packed.

The format is "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. It is written
here, not by cpio(1), because device nodes need no root this way, and the same input gives the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from .modules import module_name, read_module

__all__ = ["Entry", "contents", "pack"]

APPLETS = (
    "awk",
    "cat",
    "dd",
    "echo",
    "hostname",
    "httpd",
    "insmod",
    "ip",
    "kill",
    "logger",
    "mkfifo",
    "mount",
    "mv",
    "nc",
    "nsenter",
    "ping",
    "poweroff",
    "rm",
    "seq",
    "setsid",
    "sh",
    "sleep",
    "stty",
    "syslogd",
    "udhcpc",
    "unshare",
    "yes",
)
"""What of busybox the scripts call. A static busybox of Debian finds its own applets without these links;
others need them."""

DIRECTORIES = ("bin", "dev", "etc", "lib", "lib/modules", "proc", "run", "sys", "tmp")

DEVICES = {"dev/console": (5, 1), "dev/null": (1, 3)}
"""Needed before devtmpfs is mounted; numbers: the kernel's Documentation/admin-guide/devices.txt."""


@dataclass(frozen=True)
class Entry:
    """``mode`` has the type bits too (stat(2)); ``data`` is a file's bytes or a link's target."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def contents(busybox: Path, modules: Sequence[Path]) -> list[Entry]:
    """All that the guest needs; ``modules`` in load order.

    Raises OSError, and Unavailable for a module that cannot be decompressed.
    """
    entries = [Entry(path, stat.S_IFDIR | 0o755) for path in DIRECTORIES]
    entries += [Entry(path, stat.S_IFCHR | 0o600, device=device) for path, device in DEVICES.items()]
    entries.append(Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries += [Entry(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS]
    for place, path in enumerate(modules):
        name = f"lib/modules/{place:02}-{module_name(path.name)}.ko"
        entries.append(Entry(name, stat.S_IFREG | 0o644, read_module(path)))
    entries += _scripts(resources.files(__package__) / "rootfs", "")
    return entries


def _scripts(directory: Traversable, prefix: str) -> Iterator[Entry]:
    """The tree rootfs/ beside this file; its files are programs, whatever mode an unpacker gave them."""
    for item in directory.iterdir():
        path = prefix + item.name
        if item.is_dir():
            if path not in DIRECTORIES:
                yield Entry(path, stat.S_IFDIR | 0o755)
            yield from _scripts(item, f"{path}/")
        else:
            yield Entry(path, stat.S_IFREG | 0o755, item.read_bytes())


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive, sorted by path and without times or owners: the same entries, the same bytes."""
    archive = bytearray()
    # By the parts of the path, so that each directory comes before what is in it.
    for number, entry in enumerate(sorted(entries, key=lambda entry: entry.path.split("/")), start=1):
        _append(archive, number, entry)
    _append(archive, 0, Entry("TRAILER!!!", 0))
    return bytes(archive)


def _append(archive: bytearray, number: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    fields = (
        number,  # inode: different ones, or the kernel takes files for hard links
        entry.mode,
        0,  # uid
        0,  # gid
        2 if stat.S_ISDIR(entry.mode) else 1,  # links
        0,  # mtime
        len(entry.data),
        0,  # the device it was on, major and minor
        0,
        *entry.device,
        len(name),
        0,  # checksum: none in newc
    )
    archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    archive += bytes(-len(archive) % 4)
    archive += entry.data
    archive += bytes(-len(archive) % 4)
