# SPDX-License-Identifier: GPL-2.0-or-later
"""What a changed file means for a VM that runs: which change needs nothing, which another passt, which a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qrapd.config import VmFile

__all__ = ["Changes", "compare"]

_APPLIED = re.compile(
    r"autostart|restart\..*|qemu\.(powerdown|quit)_timeout|link\[\d+\]\.(stall_timeout|guest_addresses|allow_uids)"
)
"""Keys of which just the next use counts."""

_SWAPPED = re.compile(r"link\[(\d+)\]\.(source|passt_binary|passt\..*)")
"""Keys that are passt's, which can be replaced under a running guest."""


@dataclass(frozen=True)
class Changes:
    """Keys that differ, as a person would say them (``link[0].passt.tcp_ports``), by what it takes to apply them."""

    applied: tuple[str, ...] = ()
    swapped: tuple[str, ...] = ()
    needing_restart: tuple[str, ...] = ()


def compare(running: VmFile, now: VmFile) -> Changes:
    """Sort what differs between two files of one VM."""
    keys = [*_differing(running.model_dump(), now.model_dump(), "")]
    applied = tuple(key for key in keys if _APPLIED.fullmatch(key))
    swapped = tuple(key for key in keys if _SWAPPED.fullmatch(key))
    return Changes(applied, swapped, tuple(key for key in keys if key not in {*applied, *swapped}))


def _differing(before: Any, after: Any, key: str) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _differing(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif key == "link" and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differing(old, new, f"link[{index}]")
    else:
        yield key
