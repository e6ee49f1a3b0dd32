# SPDX-License-Identifier: GPL-2.0-or-later
"""A host without VMs for tests of the API: it keeps the contract of qrapd.hosting, and starts nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio.lowlevel

from qrapd.config import VmConfiguration, parse
from qrapd.console import Console
from qrapd.errors import ConfigurationError, Conflict, Problem, Unknown
from qrapd.event_log import EventLog
from qrapd.hosting import ForwardChange, HostVitals
from qrapd.status_tracker import Measures
from qrapd.vm_status import LinkStatus, Origin, VmState, VmStatus

RUNS = ("starting", "ready", "degraded", "stopping")


class PretendedVm:
    """What is asked for is done at once."""

    def __init__(self, host: PretendedHost, configuration: VmConfiguration) -> None:
        self.host = host
        self.configuration = configuration
        self.console: Console | None = None
        self.guest: socket.socket | None = None
        """the guest's end of the console"""
        self.calls: list[str] = []
        self.fault: Exception | None = None
        """is raised by whatever is asked for next"""
        self.state: VmState = "exited"
        self.since = datetime.now(UTC)
        self.ports: list[dict[str, list[str]]] = [
            {"tcp": list(each.passt.tcp_ports or ()), "udp": list(each.passt.udp_ports or ())}
            for each in configuration.links
        ]

    @property
    def status(self) -> VmStatus:
        running = self.state in RUNS
        links = [
            LinkStatus(
                index=index,
                mode=link.mode,
                state="up" if running else "ended",
                passt_pid=101 + index if running else None,
                generation=1,
                outages=0,
                last_outage_ms=None,
                unread_by_passt=0 if running else None,
                unread_by_qemu=0 if running else None,
            )
            for index, link in enumerate(self.configuration.links)
        ]
        return VmStatus(
            name=self.configuration.name,
            state=self.state,
            origin="agent",
            qemu_pid=100 if running else None,
            since=self.since,
            restarts=0,
            links=links,
            error=None,
        )

    @property
    def measures(self) -> Measures:
        return Measures(None, 0, ())

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def _become(self, state: VmState, event: str, **fields: object) -> None:
        self.state, self.since = state, datetime.now(UTC)
        self.host.events.append(event, {"vm": self.configuration.name, **fields})

    def _needs_to_run(self) -> None:
        if self.state not in RUNS:
            raise Conflict(f"the VM {self.configuration.name} does not run", hint="start it")

    async def start(self) -> None:
        self._called("start")
        if self.state in RUNS:
            raise Conflict(f"the VM {self.configuration.name} runs already")
        self._become("ready", "vm.ready", qemu_pid=100, status="running", links=len(self.ports))

    async def stop(self) -> None:
        self._called("stop")
        if self.state in RUNS:
            self._become("exited", "vm.exited", reason="request")

    async def restart(self) -> None:
        self._called("restart")
        self._become("ready", "vm.ready", qemu_pid=100, status="running", links=len(self.ports))

    async def kill(self) -> None:
        self._called("kill")
        if self.state in RUNS:
            self._become("failed", "vm.exited", reason="killed")

    async def reload(self) -> None:
        self._called("reload")

    async def swap(self, link: int) -> None:
        self._called(f"swap {link}")
        self._needs_to_run()

    def forwards(self, link: int) -> Mapping[str, tuple[str, ...]]:
        self._managed(link)
        return {kind: tuple(ports) for kind, ports in self.ports[link].items()}

    def _managed(self, link: int) -> None:
        if self.configuration.links[link].source != "managed":
            raise Conflict(f"link {link}: its passt is not qrapd's own")

    async def change_forwards(
        self, link: int, *, add: Iterable[tuple[str, str]] = (), remove: Iterable[tuple[str, str]] = ()
    ) -> ForwardChange:
        self._called(f"forwards {link}")
        self._managed(link)
        self._needs_to_run()
        new = {kind: list(ports) for kind, ports in self.ports[link].items()}
        for kind, ports in remove:
            if ports not in new[kind]:
                raise Unknown(f"link {link} does not forward {kind} {ports}")
            new[kind].remove(ports)
        for index, (kind, ports) in enumerate(add):
            if not ports.replace(":", "").isdecimal():
                problem = Problem(f"add[{index}].ports", "is no port", ports, "write 8080:80")
                raise ConfigurationError("the change", [problem])
            new[kind].append(ports)
        self.ports[link] = new
        return ForwardChange("pesto", tuple(new["tcp"]), tuple(new["udp"]))

    @contextmanager
    def with_console(self) -> Iterator[Console]:
        """Give it a console; its task is the test's to start."""
        ours, self.guest = socket.socketpair()
        ours.setblocking(False)
        self.guest.setblocking(False)
        self.console = Console(ours, None)
        try:
            yield self.console
        finally:
            self.console = None
            ours.close()
            self.guest.close()


class PretendedHost:
    """Takes files, and keeps them in memory."""

    origin: Origin = "agent"

    def __init__(self, *names: str) -> None:
        self.begin(*names)

    def begin(self, *names: str) -> None:
        """Forget everything, and have VMs of these names."""
        self.events = EventLog()
        self.vms: dict[str, PretendedVm] = {}
        self.texts: dict[str, str] = {}
        self.vitals = HostVitals(loop_lag_seconds=0.001)
        for name in names:
            self._put(name, "[[link]]\n[link.passt]\ntcp_ports = ['8080:80']\n")

    def _put(self, name: str, text: str) -> bool:
        configuration = parse(text, Path(f"/etc/qrapd/vms/{name}.toml"))
        if configuration.name != name:
            problem = Problem("name", f"is not {name}, as its path says", configuration.name)
            raise ConfigurationError(f"{name}.toml", [problem])
        is_new = name not in self.vms
        self.texts[name] = text
        if is_new:
            self.vms[name] = PretendedVm(self, configuration)
        return is_new

    async def look_for(self, name: str) -> None:
        """There are no files."""

    async def put(self, name: str, text: str, *, only_new: bool = False) -> bool:
        await anyio.lowlevel.checkpoint()  # as the agent, who writes in a thread
        if only_new and name in self.texts:
            return False
        return self._put(name, text)

    async def delete(self, name: str) -> None:
        if self.vms[name].state in RUNS:
            raise Conflict(f"the VM {name} runs", hint="stop it")
        del self.vms[name], self.texts[name]
