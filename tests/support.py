# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of running VMs share: VM files, a ``qrapd run`` that can be watched, and a look at what is left."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from qrapd.guest import GuestImage
from qrapd.process import start_time
from qrapd.record import ProcessId

NOBODY = 65534

PATIENCE = 60.0
"""Seconds after which a test gives up waiting: what takes 3 on an idle machine, and a lot of room for a busy one."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that other users can reach, unlike pytest's tmp_path."""
    with tempfile.TemporaryDirectory(prefix="qrapd-test-", dir="/tmp", ignore_cleanup_errors=True) as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@dataclass
class VmFile:
    """A VM file for a test, and what the test needs to know of it."""

    path: Path
    ports: list[int]


def write_vm(
    directory: Path,
    name: str,
    *,
    guest: GuestImage | None = None,
    links: int = 1,
    append: str = "",
    args: Sequence[str] = (),
    qemu: str = "",
    link_lines: str = "",
    passt_lines: str = "",
    host: str = "127.0.0.1",
) -> VmFile:
    """Write NAME.toml: with the tiny guest, or with a machine that has nothing to boot.

    :param append: more words for the guest's kernel command line.
    :param qemu: more lines for the table [qemu].
    :param link_lines: more lines for each table [[link]].
    :param passt_lines: more lines for each table [link.passt].
    :param host: the host's address at which the guest's HTTP can be had.
    """
    ports = [free_port() for _ in range(links)]
    argv = ["-machine", "q35", "-no-reboot", *args]
    if guest is None:
        argv += ["-m", "32M"]
    else:
        argv += ["-m", "128M", "-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)]
        argv += ["-append", f"{guest.command_line} {append}"]
    text = f"[qemu]\nargs = {json.dumps(argv)}\n{qemu}\n"
    for port in ports:
        text += f'[[link]]\n{link_lines}\n[link.passt]\ntcp_ports = ["{host}/{port}:80"]\n{passt_lines}\n'
    path = directory / f"{name}.toml"
    path.write_text(text)
    return VmFile(path, ports)


def fetch(port: int, path: str = "/", patience: float = PATIENCE) -> str:
    """GET a page from the guest. Until a guest has sent its first frame, connections to it are lost: try again."""
    deadline = time.monotonic() + patience
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
            assert response.status == 200, f"{path}: {response.status}"
            return body
        except (OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        finally:
            connection.close()


@dataclass
class Run:
    """A ``qrapd run`` as a process. Its events are read as they come; leaving it ends all that it started."""

    file: Path | None
    base: Path
    prefix: Sequence[str] = ()
    """what goes before ``qrapd``: Python with its ``-m``, behind whatever changes the user"""
    options: Sequence[str] = ("--log-format", "json")
    wrap: Sequence[str] = ()
    """for ``qrapd wrap`` instead of ``run FILE``: its options and arguments"""
    pass_fds: Sequence[int] = ()
    events: list[dict[str, Any]] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    """lines of stderr that are no events"""

    def __enter__(self) -> Self:
        command = [*(self.prefix or (sys.executable, "-m")), "qrapd", "run" if self.file else "wrap"]
        options = ["--runtime-dir", str(self.base), *self.options]
        self.process = subprocess.Popen(
            [*command, *options, *([str(self.file)] if self.file else self.wrap)],
            pass_fds=self.pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children: dict[int, ProcessId] = {}
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                self.stray.append(line.rstrip())
                continue
            pid = {"passt.started": "pid", "vm.started": "qemu_pid"}.get(event["event"])
            if pid is not None:
                with suppress(ProcessLookupError):
                    self.children[event[pid]] = ProcessId(event[pid], start_time(event[pid]))
            self.events.append(event)
            self._news.put(event)
        self._news.put(None)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGKILL):
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(3)
                    break
        self.process.wait()
        # What is still there is a defect that the test has told already, or the test's own doing (kill -9).
        for child in self.children.values():
            if child.alive:
                os.kill(child.pid, signal.SIGKILL)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """The next event of this name with these fields; what comes before it is passed over."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                news = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {event} {fields} within {PATIENCE:g} s, only {self.events}")
            if news is None:
                pytest.fail(f"qrapd ended before {event} {fields}: {self.events} {self.stray}")
            if news["event"] == event and fields.items() <= news.items():
                return news

    def wait_for_line(self, text: str) -> str:
        """The next line of the guest's console that holds ``text``."""
        while True:
            line = str(self.wait_for("guest.console")["line"])
            if text in line:
                return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end, and for all that was written; returns the exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def names(self) -> list[str]:
        """The events' names, without what guest and children say."""
        return [e["event"] for e in self.events if not e["event"].endswith((".console", ".output"))]

    def last(self, event: str) -> dict[str, Any]:
        """The last event of this name."""
        return [e for e in self.events if e["event"] == event][-1]

    def assert_nothing_left(self) -> None:
        """No process that was told of lives, none that was not, and the runtime directory is empty."""
        assert [] == [child for child in self.children.values() if child.alive]
        assert [] == processes_with(str(self.base))
        assert not self.base.exists() or [] == list(self.base.iterdir())


def processes_with(words: str) -> list[str]:
    """Command lines of running processes that hold ``words``, this one's excepted."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words in command and int(directory.name) != os.getpid():
                found.append(command)
    return found
