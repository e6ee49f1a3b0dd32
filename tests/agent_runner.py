# SPDX-License-Identifier: GPL-2.0-or-later
"""For tests of the host agent: a ``qrapd agent`` that can be watched and asked, and a host that may have several."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from qrapd.process import start_time
from qrapd.record import ProcessId
from support import PATIENCE, Run, VmFile, processes_with, write_vm

Status = dict[str, Any]


def patched(code: str) -> list[str]:
    """What to put before ``qrapd`` for one with a defect, made by ``code`` before anything runs."""
    script = f"{code}\nimport sys; sys.argv = sys.argv[1:]; from qrapd.__main__ import main; main()"
    return [sys.executable, "-c", script]


def caller(path: Path, timeout: float = PATIENCE) -> httpx.Client:
    """Asks the API that listens on this socket."""
    # Not httpx' own pool: an agent that ends must not find idle connections of tests to wait for.
    transport = httpx.HTTPTransport(uds=str(path), limits=httpx.Limits(max_keepalive_connections=0))
    return httpx.Client(transport=transport, base_url="http://qrapd", timeout=timeout)


def wait_until(what: Callable[[], bool], words: str) -> None:
    """Look again and again until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE:g} s: {words}")
        time.sleep(0.02)


@dataclass(kw_only=True)
class AgentRun(Run):
    """A ``qrapd agent`` as a process. Leaving it without another word kills it, and its VMs stay."""

    file: Path | None = None
    directory: Path = Path()
    """with ``vms/`` in it"""
    known: dict[int, ProcessId] = field(default_factory=dict)
    """what was started on this host, by whichever agent"""

    def __enter__(self) -> Self:
        command = [*(self.prefix or (sys.executable, "-m")), "qrapd", "agent"]
        places = ["--config-dir", str(self.directory), "--runtime-dir", str(self.base)]
        self.process = subprocess.Popen(
            [*command, *places, *self.options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children = self.known
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if not self._reader.is_alive() or self._ends_soon():
            assert self.process.stderr is not None
            self.process.stderr.close()

    def _ends_soon(self) -> bool:
        self._reader.join(5)
        return not self._reader.is_alive()

    # --- what it says ---------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        """Where the API is."""
        return self.base / "agent.sock"

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Ask the API."""
        with caller(self.socket) as client:
            return client.request(method, path, **more)

    def wait_for_api(self) -> None:
        """It answers before all VMs have been taken over."""

        def listens() -> bool:
            # Not by httpx, which leaves a socket open that it could not connect.
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.connect(str(self.socket))
                return True
            return False

        wait_until(listens, "somebody listens")

    def get(self, path: str) -> Any:
        """What it answers, which has to be a success."""
        answer = self.request("GET", path)
        assert answer.is_success, answer.text
        return answer.json()

    def act(self, name: str, action: str) -> Status:
        """Begin something with a VM."""
        answer = self.request("POST", f"/v1/vms/{name}/{action}")
        assert 202 == answer.status_code, answer.text
        status: Status = answer.json()
        return status

    def status(self, name: str) -> Status:
        """One VM."""
        status: Status = self.get(f"/v1/vms/{name}")
        return status

    def statuses(self) -> dict[str, Status]:
        """All VMs, by their names."""
        return {each["name"]: each for each in self.get("/v1/vms")}

    def wait_state(self, name: str, *states: str) -> Status:
        """Wait until a VM is in one of these states."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.status(name))["state"] not in states:
            if time.monotonic() > deadline:
                pytest.fail(
                    f"{name} is not {states} within {PATIENCE:g} s, but {status}: {self.events[-20:]}"
                )
            time.sleep(0.02)
        return status

    def wait_all(self, state: str, names: Sequence[str]) -> dict[str, Status]:
        """Wait until all these VMs are in a state."""
        return {name: self.wait_state(name, state) for name in names}

    def swap(self, name: str, link: int = 0) -> None:
        """Replace a link's passt, and wait for the new one."""
        before = self.status(name)["links"][link]["generation"]
        self.act(name, f"links/{link}/swap")
        wait_until(
            lambda: (
                (link_of := self.status(name)["links"][link])["state"] == "up"
                and link_of["generation"] > before
            ),
            f"{name} has another passt",
        )

    def wait_for_other_qemu(self, name: str, than: int) -> Status:
        """Wait until a VM runs in another QEMU."""
        wait_until(lambda: self.status(name)["qemu_pid"] not in (None, than), f"{name} has another QEMU")
        return self.wait_state(name, "ready")

    def wait_for_generation(self, name: str, generation: int, link: int = 0) -> None:
        """Wait until a link has been connected that often."""
        wait_until(
            lambda: self.status(name)["links"][link]["generation"] >= generation,
            f"link {link} of {name} has generation {generation}",
        )

    def told(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """All events of this name with these fields, so far."""
        return [each for each in self.events if each["event"] == event and fields.items() <= each.items()]

    def fds(self) -> int:
        """How many files the agent has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def assert_no_bug(self) -> None:
        """Nothing was told that ought not to be possible."""
        assert [] == self.told("bug.found")
        assert [] == self.stray


@dataclass
class AgentHost:
    """A place with VM files, and the agents that are there one after the other."""

    place: Path
    known: dict[int, ProcessId] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The runtime directory."""
        return self.place / "run"

    @property
    def vms(self) -> Path:
        """Where the VMs' files are."""
        return self.place / "vms"

    def agent(self, **more: Any) -> AgentRun:
        """An agent, to be entered."""
        return AgentRun(base=self.base, directory=self.place, known=self.known, **more)

    def write(
        self, name: str, *, autostart: bool = True, qemu: str = "powerdown_timeout = 0.2", **more: Any
    ) -> VmFile:
        """Write a VM's file. Without a guest nobody heeds a power button, so the wait for that is short."""
        vm = write_vm(self.vms, name, qemu=qemu, **more)
        if autostart:
            vm.path.write_text("autostart = true\n" + vm.path.read_text())
        return vm

    def assert_nothing_left(self) -> None:
        """No process that was told of lives, none that was not, and the runtime directory is empty."""
        assert [] == [child for child in self.known.values() if child.alive]
        assert [] == processes_with(str(self.base))
        assert not self.base.exists() or {each.name for each in self.base.iterdir()} <= {
            "agent.lock",
            "autostarted.json",
        }

    def note(self, *pids: int) -> None:
        """Processes that somebody else has started, and that have to go as well."""
        for pid in pids:
            with suppress(ProcessLookupError):
                self.known[pid] = ProcessId(pid, start_time(pid))

    def end_all(self) -> None:
        """Kill whatever is left, stopped ones included."""
        for record in self.base.glob("*/record.json"):
            with suppress(OSError, ValueError, KeyError, ProcessLookupError):
                qemu = json.loads(record.read_text())["qemu"]
                self.known[qemu["pid"]] = ProcessId(qemu["pid"], qemu["start_time"])
        for child in self.known.values():
            if child.alive:
                os.kill(child.pid, signal.SIGKILL)
        # What no event has told of: QEMU has the runtime directory among its words.
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (
                    str(self.place).encode() in (process / "cmdline").read_bytes()
                    and int(process.name) != os.getpid()
                ):
                    os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def agent_host(place: Path) -> Iterator[AgentHost]:
    """A host; at its end nothing is left of it, whatever has happened."""
    host = AgentHost(place)
    host.vms.mkdir()
    try:
        yield host
    finally:
        host.end_all()


def identity(status: Mapping[str, Any]) -> tuple[int, list[tuple[int, int]]]:
    """What may not change while a VM is left alone: QEMU, and each link's passt and generation."""
    return status["qemu_pid"], [(link["passt_pid"], link["generation"]) for link in status["links"]]
