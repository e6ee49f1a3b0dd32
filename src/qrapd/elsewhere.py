# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's directory tells of it without anybody's answer, to those who do not run it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrapd.record import LinkRecord, Record, Unusable
from qrapd.record import read as read_record
from qrapd.runtime_directory import VmDirectory

if TYPE_CHECKING:
    from qrapd.vm_status import VmStatus

__all__ = ["Elsewhere", "describe", "is_agent", "origin_of"]


class Elsewhere:
    """A VM that this process does not run, seen again and again.

    Cheap enough for an event loop that looks at hundreds: of 200 VMs without a directory it takes 0.5 ms, of 200 that
    have supervisors 28 ms the first time and 9 ms from then on (measured; by supervisor_pid() it would be 90).
    """

    def __init__(self, base: Path, name: str) -> None:
        self._directory = VmDirectory(base, name)
        self._path = str(self._directory.path)
        self._record: tuple[object, Record | None] = None, None
        self._status: tuple[object, VmStatus] | None = None

    def look(self) -> VmStatus | None:
        """How it is as far as that can be seen; None: there is nothing of a VM.

        :raise OSError: this user may not look, or cannot just now.
        """
        from qrapd.vm_status import VmStatus  # for those who ask: as in the tracker

        if not _exists(self._path):
            return None
        pid, found = self._directory.glance(), self._read_record()
        if pid is None:
            if self._record[0] is None:
                return None
            return VmStatus.model_validate(
                describe(self._directory, None, found, "failed", self._left(found))
            )
        takes_calls = self._directory.socket_path("control.sock").exists()
        runs = found is None or found.qemu.alive  # between two runs there is a record of the one before
        key = (pid, self._record[0], takes_calls, runs)
        if self._status is None or self._status[0] != key:
            state, error = self._supervised(found, runs=runs, takes_calls=takes_calls)
            # A supervisor that lives keeps its record true, but for QEMU's end.
            made = describe(self._directory, pid, found, state, error, links_are_true=True)
            self._status = (key, VmStatus.model_validate(made))
        return self._status[1]

    def _read_record(self) -> Record | None:
        """None: there is none, or none that can be read; ``self._record`` tells which."""
        path = self._directory.record_path
        try:
            status = path.stat()
        except FileNotFoundError:
            self._record = None, None
            return None
        key = (status.st_ino, status.st_mtime_ns)  # it is never written twice into the same file
        if self._record[0] != key:
            try:
                self._record = key, read_record(path)
            except Unusable:
                self._record = key, None
        return self._record[1]

    def _supervised(self, found: Record | None, *, runs: bool, takes_calls: bool) -> tuple[str, str]:
        """State and error."""
        own = "it has a supervisor of its own"
        if not takes_calls:
            return "starting", f"{own}, which takes no calls yet"
        error = f"{own}, which tells more: {self._directory.socket_path('control.sock')}"
        if not runs:
            return "starting", error
        is_degraded = found is not None and any(link.swapping for link in found.links)
        return "degraded" if is_degraded else "ready", error

    def _left(self, found: Record | None) -> str:
        """The error of one that nobody has."""
        if found is None:
            return "its supervisor is gone, and its record cannot be read"
        if not found.qemu.alive:
            return "its supervisor is gone, and its QEMU is gone, too"
        name = self._directory.path.name
        return f"its supervisor is gone, and its QEMU runs on: `qrapd start {name}` has it looked after again"


def _exists(path: str) -> bool:
    """Not by pathlib, which takes three times as long."""
    try:
        os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return False
    return True


def describe(
    directory: VmDirectory,
    pid: int | None,
    found: Record | None,
    state: str,
    error: str,
    *,
    hint: str | None = None,
    links_are_true: bool = False,
) -> dict[str, Any]:
    """A VM's status, in the form of the API's answers.

    :param pid: its supervisor's.
    :param links_are_true: what the record tells of links is; else it is looked at which passts still run.
    """
    runs = found is not None and found.qemu.alive
    shown = pid or (found.qemu.pid if found and runs else None)
    return {
        "name": directory.path.name,
        "state": state,
        "origin": (found and found.origin) or origin_of(_read(f"/proc/{shown}/cgroup"), _words(shown)),
        "qemu_pid": found.qemu.pid if found and runs else None,
        "since": _changed(directory),
        "restarts": 0,
        "links": [_link(each, runs=runs, is_true=links_are_true) for each in found.links] if found else [],
        "error": error,
        "hint": hint,
    }


def _link(link: LinkRecord, *, runs: bool, is_true: bool) -> dict[str, Any]:
    # One that is not ours is taken to be there.
    passt_runs = is_true or link.passt is None or link.passt.alive
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
