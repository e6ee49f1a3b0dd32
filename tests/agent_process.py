# SPDX-License-Identifier: GPL-2.0-or-later
"""A real ``qrapd agent`` for tests: with real QEMUs and passts, directories of its own, and nothing left at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from nursery import Nursery, Running
from qrapd.runtime_directory import SOCKETS
from support import PATIENCE, open_directory

T = TypeVar("T")

MACHINE = ("-machine", "q35", "-m", "32M")
"""One that has nothing to boot: it is up at once and asks for little."""


def vm_text(*, links: int = 0, tcp_ports: Sequence[str] = (), top: str = "", mtu: int | None = None) -> str:
    """A VM's file. Its guest heeds no power button, so that a stop does not wait for it.

    :param tcp_ports: of the first link.
    :param top: more lines, before the tables.
    """
    text = f"{top}\n[qemu]\nargs = {json.dumps(MACHINE)}\npowerdown_timeout = 0\n"
    for index in range(links):
        text += "[[link]]\n[link.passt]\n"
        text += f"tcp_ports = {json.dumps(list(tcp_ports))}\n" if tcp_ports and index == 0 else ""
        text += f"mtu = {mtu}\n" if mtu is not None else ""
    return text


class AgentProcess:
    """An agent, and the ones after it in the same directories."""

    def __init__(self, directory: Path, nursery: Nursery) -> None:
        self.base = directory / "run"
        self.files = directory / "vms"
        self.files.mkdir()
        self.log = directory / "log"
        self.log.touch()
        self.pid: int | None = None
        """None: none runs"""
        self._nursery = nursery
        transport = httpx.HTTPTransport(uds=str(self.base / "agent.sock"))
        self.client = httpx.Client(transport=transport, base_url="http://qrapd", timeout=PATIENCE)

    # --- the agent ------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> None:
        """Start one, and wait until it has taken over what there is, if that is wanted."""
        assert self.pid is None
        before = self._count_ready()
        self.pid = self._nursery.start()
        if wait:
            self.wait_ready(before)

    def end(self, number: signal.Signals) -> None:
        """End the one that runs."""
        assert self.pid is not None
        os.kill(self.pid, number)
        self._nursery.wait_for_end(self.pid)
        self.pid = None

    def become_newer(self) -> None:
        """SIGUSR2: the same process, another agent."""
        assert self.pid is not None
        before = self._count_ready()
        os.kill(self.pid, signal.SIGUSR2)
        self.wait_ready(before)

    def read_again(self) -> None:
        """SIGHUP."""
        assert self.pid is not None
        before = self._count("agent.reloaded")
        os.kill(self.pid, signal.SIGHUP)
        eventually(lambda: self._count("agent.reloaded") > before, f"no agent.reloaded: {self.tail()}")

    def wait_ready(self, before: int = 0) -> None:
        """Wait for as many ``agent.ready`` as there have been, and one."""
        eventually(lambda: self._count_ready() > before, f"no agent.ready: {self.tail()}")

    def _count_ready(self) -> int:
        return self._count("agent.ready")

    def _count(self, event: str) -> int:
        return sum(each["event"] == event for each in self.events())

    def events(self) -> list[dict[str, Any]]:
        """What agents have told; a line that is being written is not among it."""
        return [json.loads(line) for line in self._lines() if line.startswith("{")]

    def stray(self) -> list[str]:
        """Lines of stderr that are no events: warnings and tracebacks, say."""
        return [line for line in self._lines() if not line.startswith("{")]

    def _lines(self) -> list[str]:
        return self.log.read_text().split("\n")[:-1]

    def tail(self) -> str:
        """The end of the log."""
        return "\n".join(self._lines()[-30:])

    # --- its VMs --------------------------------------------------------------------------------------

    def vms(self) -> dict[str, dict[str, Any]]:
        """What the API says, by the names."""
        return {each["name"]: each for each in self.client.get("/v1/vms").raise_for_status().json()}

    def vm(self, name: str) -> dict[str, Any]:
        """What the API says of one."""
        found: dict[str, Any] = self.client.get(f"/v1/vms/{name}").raise_for_status().json()
        return found

    def wait_for_state(self, name: str, *states: str) -> dict[str, Any]:
        """Wait until a VM is in one of these states."""
        eventually(
            lambda: self.vm(name)["state"] in states,
            lambda: f"{name} is not {states}: {self.vm(name)}\n{self.tail()}",
        )
        return self.vm(name)

    def running(self) -> list[Running]:
        """All that runs of it, and of the ones before it: agent, QEMUs, passts."""
        return self._nursery.running()

    def assert_nothing_left(self) -> None:
        """No process, and an empty runtime directory but for the agent's lock."""
        eventually(lambda: not self.running(), lambda: f"still there: {self.running()}")
        left = {path.name for path in self.base.iterdir()} if self.base.exists() else set()
        # An agent that is killed while a VM is on its way up leaves the VM's directory, with no record in it: the next
        # start takes it, and nothing runs by it.
        left -= {name for name in left if _is_of_a_start_cut_short(self.base / name)}
        assert left <= {"agent.lock", "autostarted.json"}, left


@contextmanager
def agent_process() -> Iterator[AgentProcess]:
    """An agent's directories, and none that runs yet. Whatever was started is ended with the block."""
    with open_directory() as directory:
        options = ["--config-dir", str(directory), "--runtime-dir", str(directory / "run")]
        command = [sys.executable, "-m", "qrapd", "agent", *options, "--log-format", "json"]
        with Nursery(command, directory / "log") as nursery:
            agent = AgentProcess(directory, nursery)
            try:
                yield agent
            except BaseException as error:
                with suppress(OSError):
                    error.add_note(f"the agent's log:\n{agent.tail()}")
                raise
            finally:
                agent.client.close()


def eventually(holds: Callable[[], T], message: str | Callable[[], str]) -> T:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(message if isinstance(message, str) else message())
        time.sleep(0.02)
    return found


def _is_of_a_start_cut_short(directory: Path) -> bool:
    return directory.is_dir() and not {each.name for each in directory.iterdir()} - {"lock", *SOCKETS}
