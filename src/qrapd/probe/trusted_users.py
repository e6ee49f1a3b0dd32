# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose listeners are trusted without being told so."""

from __future__ import annotations

import os

__all__ = ["default_uids"]

_NOBODY = 65534


def default_uids() -> frozenset[int]:
    """Whose listeners are trusted: our own, root's and passt's, which is nobody's when root starts it (passt(1)).

    In a user namespace that knows no nobody (user_namespaces(7)), that number stands for everyone unknown: not trusted.
    """
    uids = {os.geteuid(), 0}
    # Not by getpwnam(3): where users come from a directory, that would ask the network for one that is not there.
    for line in _read_lines("/etc/passwd"):
        fields = line.split(":")
        if len(fields) > 2 and fields[0] in {"nobody", "passt"} and fields[2].isdecimal():
            uids.add(int(fields[2]))
    uids.add(_NOBODY)
    known = [tuple(map(int, line.split())) for line in _read_lines("/proc/self/uid_map")]
    if known and not any(first <= _NOBODY < first + count for first, _, count in known):
        uids.discard(_NOBODY)
    return frozenset(uids)


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - 9 ms to import
            return file.read().splitlines()
    except OSError:
        return []
