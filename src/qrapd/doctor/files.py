# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel and the host's configuration say in files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_setting", "read_text"]


def read_text(path: Path) -> str | None:
    """Return what is in a file; None if it is not there or not for this user to read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def read_setting(name: str) -> int | None:
    """Return the number that a sysctl(8) setting has; None if this kernel has no such setting."""
    try:
        return int(read_text(Path("/proc/sys", *name.split("."))) or "")
    except ValueError:
        return None
