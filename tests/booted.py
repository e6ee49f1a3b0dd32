# SPDX-License-Identifier: GPL-2.0-or-later
"""A real systemd with journald to try units in, booted over an overlay of this machine: see ``tests/boot-systemd``.

What happens in there stays in there, but for the network, which is the host's: take free ports of 127.0.0.1. It ends
with the test run, however that ends. Needs root, overlayfs, cgroup2 and a systemd; each is named where it is missing.
"""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from qrapd.guest import GuestImage
from support import PATIENCE

__all__ = ["PROJECT", "Booted", "boot", "install", "put"]

PROJECT = Path(__file__).resolve().parent.parent

BOOT_SECONDS = 60.0
"""Until systemd has come up. It takes 1 to 3 s."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HANDED_ON = ("PIP_", "HTTP_", "HTTPS_", "NO_", "http_", "https_", "no_", "SSL_")
"""How package indices are reached: starts of the names of variables that `make install` needs in there as here."""


@dataclass(frozen=True)
class Ended:
    """How a command in there ended."""

    status: int
    stdout: str
    stderr: str


class Booted:
    """The machine that was booted."""

    def __init__(self, holder: subprocess.Popen[str], complaints: IO[str]) -> None:
        self._holder = holder
        self._complaints = complaints
        self._pids: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_pids, daemon=True)
        self._reader.start()
        self.pid = 0
        """systemd's, as seen from here"""
        self.installed = False

    def _read_pids(self) -> None:
        assert self._holder.stdout is not None
        for line in self._holder.stdout:
            self._pids.put(line)
        self._pids.put("")

    def end(self) -> None:
        """End all of it: the end of its stdin is what the script waits for."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(30)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        self._reader.join()
        self._holder.stdout.close()

    def wait_until_up(self) -> None:
        """Wait for systemd to have started all that it starts at boot.

        :raise RuntimeError: it did not come up; the message is what it said.
        """
        try:
            self.pid = int(self._pids.get(timeout=BOOT_SECONDS) or 0)
        except queue.Empty:
            self.pid = 0
        deadline = time.monotonic() + BOOT_SECONDS
        while self.pid and time.monotonic() < deadline:
            with suppress(OSError, subprocess.TimeoutExpired):
                comm = Path(f"/proc/{self.pid}/comm").read_text().strip()
                state = self.run("systemctl", "is-system-running") if comm == "systemd" else None
                if state and state.stdout.strip() in {"running", "degraded"}:
                    return
            if self._holder.poll() is not None or not Path(f"/proc/{self.pid}").exists():
                break
            time.sleep(0.05)
        raise RuntimeError(f"systemd did not come up: {self._said()}")

    def _said(self) -> str:
        # Without moving the offset, which is the writer's as well.
        return os.pread(self._complaints.fileno(), 10_000, 0).decode(errors="replace").strip()[-2000:]

    @property
    def root(self) -> Path:
        """Its file system, from here. An absolute link in it leads astray: to a file of the host."""
        return Path(f"/proc/{self.pid}/root")

    def path(self, path: str | Path) -> Path:
        """A file of its, from here."""
        return self.root / str(path).lstrip("/")

    def run(
        self,
        *command: str | Path,
        user: str | None = None,
        check: bool = False,
        timeout: float = PATIENCE,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> Ended:
        """Run a command in there, as root or as ``user``, who then has what a session of theirs would have.

        :param check: the test fails unless its exit status is 0.
        """
        variables = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "SYSTEMD_PAGER": "cat"}
        become: list[str] = []
        if user is not None:
            uid = self.run("id", "-u", user, check=True).stdout.strip()
            home = self.run("getent", "passwd", user, check=True).stdout.split(":")[5]
            become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            variables |= {"HOME": home, "USER": user, "XDG_RUNTIME_DIR": f"/run/user/{uid}"}
        variables |= {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
        variables |= environment or {}
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "--"]
        assignments = [f"{name}={value}" for name, value in variables.items()]
        done = subprocess.run(
            [*enter, *become, "env", "-i", *assignments, *map(str, command)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd="/",
        )
        ended = Ended(done.returncode, done.stdout, done.stderr)
        if check and ended.status != 0:
            words = " ".join(map(str, command))
            pytest.fail(f"{words}: exit status {ended.status}\n{ended.stdout}{ended.stderr}")
        return ended

    def shell(self, script: str, **options: Any) -> Ended:
        """Run a shell script in there that ends with its first command that fails."""
        return self.run("bash", "-euo", "pipefail", "-c", script, **options)

    def systemctl(self, *arguments: str, check: bool = True, user: str | None = None) -> str:
        """What systemctl says; of the manager of ``user``, if given."""
        scope = ["--user"] if user else []
        return self.run("systemctl", *scope, *arguments, check=check, user=user, timeout=180).stdout.strip()

    def show(self, unit: str, prop: str, user: str | None = None) -> str:
        """The value of one property of a unit."""
        return self.systemctl("show", "--value", "--property", prop, unit, user=user)

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The entries that match, oldest first: ``journal("QRAPD_VM=web")``."""
        self.run("journalctl", "--sync", check=True)
        lines = self.run("journalctl", "--all", "--output=json", "--no-pager", *matches, check=True).stdout
        return [json.loads(line) for line in lines.splitlines()]

    def wait_for(self, what: str, condition: Callable[[], object], unit: str | None = None) -> None:
        """Wait until a condition holds; if it does not, the failure shows the journal, of ``unit`` if given."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                words = ["--unit", unit] if unit else []
                tail = self.run("journalctl", "--no-pager", "-n", "60", *words).stdout
                pytest.fail(f"not within {PATIENCE:g} s: {what}\n{tail}")
            time.sleep(0.1)

    def processes(self, unit: str) -> dict[int, str]:
        """All processes in the unit's cgroup, by their pids as seen in there: what program each runs."""
        group = self.show(unit, "ControlGroup")
        found = {}
        if group:
            script = (
                f"for p in $(cat /sys/fs/cgroup{group}/cgroup.procs); do echo $p $(cat /proc/$p/comm); done"
            )
            for line in self.shell(
                f"[ ! -d /sys/fs/cgroup{group} ] || {script} 2>/dev/null"
            ).stdout.splitlines():
                pid, _, name = line.partition(" ")
                found[int(pid)] = name
        return found

    def reboot(self) -> None:
        """Shut it down in order, and boot it again with the files that it has now."""
        self.run("systemctl", "reboot", check=True)
        deadline = time.monotonic() + 180
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if not select.select([descriptor], [], [], deadline - time.monotonic())[0]:
                    pytest.fail("it does not shut down")
            finally:
                os.close(descriptor)
        assert self._holder.stdin is not None
        self._holder.stdin.write("\n")
        self._holder.stdin.flush()
        self.wait_until_up()


def _missing() -> str | None:
    """What this host lacks for it."""
    if os.geteuid() != 0:
        return "a systemd of its own takes root to boot"
    known = Path("/proc/filesystems").read_text().split()
    for name in ("overlay", "cgroup2"):
        if name not in known:  # a module may bring it
            subprocess.run(["modprobe", "-q", name], capture_output=True, check=False)
            if name not in Path("/proc/filesystems").read_text().split():
                return f"this kernel has no {name}"
    for program in ("systemctl", "journalctl", "dbus-daemon", "nsenter", "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    return None


@contextmanager
def boot() -> Iterator[Booted]:
    """Boot, and end all of it at the end.

    :raise pytest.skip.Exception: that is impossible here; the reason says why.
    """
    if reason := _missing():
        pytest.skip(reason)
    with tempfile.TemporaryFile("w+") as complaints:
        holder = subprocess.Popen(
            [PROJECT / "tests/boot-systemd", PROJECT, *_interpreter()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        machine = Booted(holder, complaints)
        try:
            try:
                machine.wait_until_up()
            except RuntimeError as error:
                pytest.skip(str(error))
            yield machine
        finally:
            machine.end()


def install(machine: Booted, guest: GuestImage) -> Booted:
    """The machine with qrapd installed, from a checkout that everyone may read, as in the documentation; once.

    The guest's files are in /srv there.
    """
    if machine.installed:
        return machine
    checkout = machine.path("/srv/qrapd")
    checkout.mkdir(parents=True)
    for name in ("src", "scripts", "systemd", "docs", "config", "requirements"):
        shutil.copytree(PROJECT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, checkout)
    for file in (guest.kernel, guest.initramfs):
        put(machine, file)
    machine.shell("cd /srv/qrapd && make install", check=True, timeout=300)
    machine.installed = True
    return machine


def put(machine: Booted, file: Path) -> Path:
    """Copy a file to /srv in there, for everyone to read; returns its path in there."""
    shutil.copy(file, machine.path("/srv"))
    machine.path("/srv").joinpath(file.name).chmod(0o644)
    return Path("/srv") / file.name


def _interpreter() -> list[Path]:
    """Where this Python and its packages are: the checkout's .venv may be elsewhere, and be made of another one."""
    places = [Path(sys.prefix), Path(sys.base_prefix)]
    return [place for place in places if place != Path("/usr") and not place.is_relative_to(PROJECT)]
