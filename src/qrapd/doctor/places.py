# SPDX-License-Identifier: GPL-2.0-or-later
"""What VMs find around them: a directory for their sockets, the host's routes, a journal for their logs."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from .. import binaries, runtime_directory
from ..errors import Unavailable
from .files import read_text
from .finding import Finding
from .trial import Trial, has_started

__all__ = [
    "Place",
    "default_routes",
    "default_routes6",
    "examine_journal",
    "examine_network",
    "examine_runtime_directory",
    "judge_journal",
    "judge_network",
    "judge_runtime_directory",
    "longest_name",
    "read_place",
]


@dataclass(frozen=True)
class Place:
    """What was seen of a directory that is to hold the VMs' own."""

    base: Path
    is_directory: bool = True
    """False if something else has the name."""
    writable: bool = True
    """It can be written, or made if it is not there yet."""
    read_only: bool = False
    """It is on a file system mounted read-only."""


def examine_runtime_directory(runtime_dir: Path | None) -> Finding:
    """Find out which directory holds the sockets and records of running VMs, and whether it can."""
    uid = os.geteuid()
    try:
        base = runtime_dir or runtime_directory.default_base(os.environ, uid)
    except Unavailable as error:
        return Finding("runtime directory", "problem", error.message, _other_base(uid))
    return judge_runtime_directory(read_place(base.absolute()), uid)


def read_place(base: Path) -> Place:
    """Look at ``base``, or at the nearest directory above it that is there."""
    nearest = base
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return Place(
        base,
        is_directory=nearest.is_dir(),
        writable=os.access(nearest, os.W_OK | os.X_OK, effective_ids=True),
        read_only=bool(os.statvfs(nearest).f_flag & os.ST_RDONLY),
    )


def longest_name(base: Path) -> int:
    """Return how many characters the name of a VM may have below ``base``, for its sockets' paths."""
    socket = max(len(name) for name in runtime_directory.SOCKETS)
    return runtime_directory.SUN_PATH_MAX - len(os.fsencode(base)) - len("//") - socket


def judge_runtime_directory(place: Place, uid: int) -> Finding:
    """Tell whether VMs can have their directories there, and how long their names may be."""
    subject = "runtime directory"
    base = place.base
    if not place.is_directory:
        return Finding(subject, "problem", f"{base}: part of the path is no directory", _other_base(uid))
    room = longest_name(base)
    if room < 1:
        words = f"{base} is too long: no socket below it keeps to {runtime_directory.SUN_PATH_MAX} bytes"
        return Finding(subject, "problem", words, _other_base(uid))
    if place.read_only:
        words = f"{base} is on a file system that is mounted read-only"
        return Finding(subject, "problem", words, _other_base(uid))
    if not place.writable:
        remedy = binaries.as_root(f"install -d -m 0755 -o {uid} {shlex.quote(str(base))}")
        return Finding(subject, "problem", f"{base} cannot be written by user {uid}", remedy)
    if room < 63:  # the longest name that a VM may have
        words = f"{base} is long: names of VMs may have {room} characters there instead of 63"
        return Finding(subject, "warning", words, _other_base(uid))
    return Finding(subject, "ok", f"{base} can be written, and names of VMs may have all their 63 characters")


def _other_base(uid: int) -> str:
    """Return the command that chooses a short directory where nobody else can make or rename anything.

    Never below a directory that all can write, as /tmp: there its name may become somebody else's.
    """
    if uid == 0:
        return "export RUNTIME_DIRECTORY=/run/qrapd"
    session = f"/run/user/{uid}"
    if os.access(session, os.W_OK):
        return f"export RUNTIME_DIRECTORY={session}/qrapd"
    own = f"/run/qrapd-{uid}"
    return f"{binaries.as_root(f'install -d -m 0700 -o {uid} {own}')} && export RUNTIME_DIRECTORY={own}"


# linux/route.h, linux/ipv6_route.h: columns are hexadecimal.
_RTF_UP = 0x0001
_RTF_REJECT = 0x0200


def default_routes(proc_net_route: str) -> list[str]:
    """Return the interfaces that have a default route for IPv4, from /proc/net/route."""
    rows = [line.split() for line in proc_net_route.splitlines()[1:]]
    return [
        row[0]
        for row in rows
        if len(row) >= 8
        and int(row[1], 16) == int(row[7], 16) == 0
        and int(row[3], 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP
    ]


def default_routes6(proc_net_ipv6_route: str) -> list[str]:
    """Return the interfaces that have a default route for IPv6, from /proc/net/ipv6_route."""
    rows = [line.split() for line in proc_net_ipv6_route.splitlines()]
    return [
        row[9]
        for row in rows
        if len(row) >= 10
        and int(row[0], 16) == int(row[1], 16) == 0
        and int(row[8], 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP
    ]


def examine_network(trial: Trial | None) -> Finding:
    """Find the interfaces whose addresses and routes passt would give to guests."""
    routes = default_routes(read_text(Path("/proc/net/route")) or "")
    routes6 = default_routes6(read_text(Path("/proc/net/ipv6_route")) or "")
    return judge_network(routes, routes6, passt_started=has_started(trial))


def judge_network(routes: list[str], routes6: list[str], *, passt_started: bool) -> Finding:
    """Tell what passt has to copy: the first interface with a default route, for each of IPv4 and IPv6."""
    subject = "host network"
    versions = [f"{name} by {found[0]}" for name, found in (("IPv4", routes), ("IPv6", routes6)) if found]
    if len(versions) == 2:
        return Finding(subject, "ok", f"default routes for {' and '.join(versions)}")
    if versions:
        return Finding(subject, "ok", f"a default route for {versions[0]} only: guests get that one only")
    if passt_started:
        words = "no default route: passt starts all the same, and guests reach this host only"
        return Finding(subject, "warning", words)
    # No command: a route that leads nowhere misleads all other programs of the host. What a link can have instead
    # was measured with passt of 2023 in network namespaces without routes.
    words = "no default route: passt finds no interface to copy addresses from, and a 2023 one then ends."
    words += " It needs a host with a default route, or a link with interface and gateway in [link.passt]:"
    words += " address too if the interface has none, and mac_addr if it is 'lo'"
    return Finding(subject, "problem", words)


def examine_journal() -> Finding:
    """Find the socket that takes structured log entries: systemd's JOURNAL_NATIVE_PROTOCOL."""
    return judge_journal(
        listening=Path("/run/systemd/journal/socket").is_socket(),
        booted=Path("/run/systemd/system").is_dir(),  # sd_booted(3)
    )


def judge_journal(*, listening: bool, booted: bool) -> Finding:
    """Tell where logs can go."""
    if listening:
        return Finding("journal", "ok", "/run/systemd/journal/socket is there")
    if booted:
        remedy = binaries.as_root("systemctl start systemd-journald.socket")
        return Finding("journal", "warning", "systemd runs, but its journal does not listen", remedy)
    return Finding("journal", "ok", "systemd does not run here: logs go to stderr")
