# SPDX-License-Identifier: GPL-2.0-or-later
"""Where VMs are found on this host, and what the directory of one tells without anybody's answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrapd import record
from qrapd.elsewhere import describe, is_agent, origin_of
from qrapd.runtime_directory import VmDirectory

__all__ = ["Places", "is_agent", "is_name", "look", "origin_of"]

SYSTEM = Path("/run/qrapd")
"""The runtime directory of the system's units."""

_NAME = re.compile(r"[a-z0-9-]{1,63}")


def is_name(text: str) -> bool:
    """Whether a VM can be called so; anything else would be a path."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Places:
    """A runtime directory, and the sockets of the API in it; or one socket that was named."""

    base: Path
    socket: Path | None = None

    @property
    def agent(self) -> Path:
        """The agent's socket, whether there is one or not."""
        return self.socket or self.base / "agent.sock"

    def control(self, name: str) -> Path:
        """The socket of a VM's own supervisor, whether there is one or not."""
        return self.base / name / "control.sock"

    def names(self) -> list[str]:
        """Those that have a directory here: VMs that run, and what others have left.

        :raise OSError: it may not be read.
        """
        try:
            return sorted(
                each.name for each in self.base.iterdir() if is_name(each.name) and _may_have_one(each)
            )
        except FileNotFoundError:
            return []


def _may_have_one(directory: Path) -> bool:
    """Whether there may be a VM: a start that has failed may leave its directory, with no more than a free lock."""
    try:
        bare = {each.name for each in directory.iterdir()} <= {"lock"}
        return not bare or VmDirectory(directory.parent, directory.name).glance() is not None
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # another user's: nobody can tell


def look(base: Path, name: str, *, silent: bool = False) -> dict[str, Any] | None:
    """A VM's status as its directory tells it; None if there is nothing of a VM in it.

    :param silent: its supervisor was asked and has not answered.
    :raise PermissionError: this user may not look.
    """
    directory = VmDirectory(base, name)
    pid = directory.supervisor_pid()
    try:
        found = record.read(directory.record_path)
    except record.Unusable:
        return describe(directory, pid, None, *_judge(pid, "cannot be read", silent=silent))
    if pid is None and found is None:
        return None
    left = "" if found and found.qemu.alive else "is gone, too"
    status = describe(directory, pid, found, *_judge(pid, left, silent=silent))
    if pid is None and not left:
        status["hint"] = _who_takes_over(base, name, status["origin"])
    return status


def _who_takes_over(base: Path, name: str, origin: str) -> str:
    """What to do about a VM that its supervisor has left."""
    systemctl = "systemctl start" if base == SYSTEM else "systemctl --user start"
    way = {
        "agent": f"start the agent: `{systemctl} qrapd-agent`, or `qrapd agent`",
        "unit": f"start its unit: `{systemctl} qrapd@{name}`",
    }.get(origin, "run its file again: `qrapd run`")
    return f"to have it looked after, {way}; to end it: `qrapd stop {name}`"


def _judge(pid: int | None, left: str, *, silent: bool) -> tuple[str, str]:
    """State and error. ``left``: what is wrong with what a supervisor has left."""
    if pid is None:
        if left == "cannot be read":
            return "failed", f"its supervisor is gone, and its record {left}"
        return "failed", "its supervisor is gone" + (f", and its QEMU {left}" if left else "")
    if silent:
        return "failed", f"its supervisor (pid {pid}) does not answer"
    return "starting", f"its supervisor (pid {pid}) takes no calls yet"
