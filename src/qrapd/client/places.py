# SPDX-License-Identifier: GPL-2.0-or-later
"""Where VMs are found on this host, and what the directory of one tells without anybody's answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qrapd import record
from qrapd.runtime_directory import VmDirectory

__all__ = ["Places", "is_agent", "is_name", "look", "origin_of"]

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
            return sorted(each.name for each in self.base.iterdir() if is_name(each.name) and each.is_dir())
        except FileNotFoundError:
            return []


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
        return _status(directory, pid, None, *_judge(pid, "cannot be read", silent=silent))
    if pid is None and found is None:
        return None
    left = "" if found and found.qemu.alive else "is gone, too"
    return _status(directory, pid, found, *_judge(pid, left, silent=silent))


def _judge(pid: int | None, left: str, *, silent: bool) -> tuple[str, str]:
    """State and error. ``left``: what is wrong with what a supervisor has left."""
    if pid is None:
        if left == "cannot be read":
            return "failed", f"its supervisor is gone, and its record {left}"
        return "failed", "its supervisor is gone" + (f", and its QEMU {left}" if left else "")
    if silent:
        return "failed", f"its supervisor (pid {pid}) does not answer"
    return "starting", f"its supervisor (pid {pid}) takes no calls yet"


def _status(
    directory: VmDirectory, pid: int | None, found: record.Record | None, state: str, error: str
) -> dict[str, Any]:
    runs = found is not None and found.qemu.alive
    shown = pid or (found.qemu.pid if found and runs else None)
    return {
        "name": directory.path.name,
        "state": state,
        "origin": (found and found.origin) or origin_of(_read(f"/proc/{shown}/cgroup"), _words(shown)),
        "qemu_pid": found.qemu.pid if found and runs else None,
        "since": _changed(directory),
        "restarts": 0,
        "links": [_link(each, runs=runs) for each in found.links] if found else [],
        "error": error,
    }


def _link(link: record.LinkRecord, *, runs: bool) -> dict[str, Any]:
    passt_runs = link.passt is None or link.passt.alive  # one that is not ours is taken to be there
    state = "ended" if not runs else "up" if passt_runs and not link.swapping else "down"
    return {
        "index": link.index,
        "mode": link.mode,
        "state": state,
        "passt_pid": link.passt_pid if state == "up" else None,
        "generation": link.generation,
        "outages": 0,
        "last_outage_ms": None,
        "unread_by_passt": None,
        "unread_by_qemu": None,
    }


def _changed(directory: VmDirectory) -> str:
    """When the record was written last, or the lock was taken."""
    for path in (directory.record_path, directory.path / "lock", directory.path):
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except OSError:
            continue
        return written.isoformat().replace("+00:00", "Z")
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def origin_of(cgroup: str, words: Sequence[str] = ()) -> str:
    """Who runs it, by the control group (systemd's, or a copy's of its units) and the command line of a process."""
    if _is_agents(words) or "/qrapd-agent.service" in cgroup:
        return "agent"
    return "unit" if re.search(r"/qrapd@[^/]*\.service", cgroup) else "shell"


def is_agent(pid: int) -> bool:
    """Whether this process, which supervises a VM, is an agent with all its VMs: no signal to it is for one VM."""
    return _is_agents(_words(pid))


def _is_agents(words: Sequence[str]) -> bool:
    # python .../qrapd agent, python -m qrapd agent, python .../qrapd/__main__.py agent
    for word, following in itertools.pairwise(words):
        path = Path(word)
        name = path.parent.name if path.name == "__main__.py" else path.name
        if name == "qrapd":
            return following == "agent"
    return False


def _words(pid: int | None) -> list[str]:
    return [] if pid is None else _read(f"/proc/{pid}/cmdline").split("\0")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
