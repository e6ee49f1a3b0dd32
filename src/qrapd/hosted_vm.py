# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that this process can run, as the API has it: the supervisor of the moment, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qrapd.errors import Conflict, Unknown
from qrapd.hosting import ForwardChange
from qrapd.link import Link
from qrapd.logs import Emit
from qrapd.status_tracker import Measures, StatusTracker
from qrapd.supervisor import Supervisor

if TYPE_CHECKING:
    from qrapd.console import Console
    from qrapd.vm import Vm
    from qrapd.vm_status import VmStatus

__all__ = ["SupervisedVm"]


class SupervisedVm:
    """One VM. It is a :class:`qrapd.hosting.HostedVm`."""

    def __init__(self, tracker: StatusTracker) -> None:
        self.name = tracker.name
        self.tracker = tracker
        self.supervisor: Supervisor | None = None
        """None: nothing runs"""

    def track(self, emit: Emit) -> Emit:
        """An ``emit`` by which this VM's status is known as well."""

        def tell(event: str, /, **fields: object) -> None:
            emit(event, **fields)
            self.tracker.note(event, fields, datetime.now(UTC))

        return tell

    def note_machine(self, vm: Vm) -> None:
        """There is another machine, with the NICs that its file asked for when it was started."""
        self.tracker.set_links((link.plan.index, link.plan.mode) for link in vm.links)

    @property
    def status(self) -> VmStatus:
        vm = self.supervisor.vm if self.supervisor is not None else None
        return self.tracker.status({link.plan.index: link.unread for link in vm.links} if vm else {})

    @property
    def measures(self) -> Measures:
        return self.tracker.measures

    @property
    def console(self) -> Console | None:
        vm = self.supervisor.vm if self.supervisor is not None else None
        return vm.console if vm is not None else None

    async def start(self) -> None:
        raise Conflict(f"{self.name} runs, or is on its way", hint="to start it anew: `qrapd restart`")

    async def stop(self) -> None:
        if self.supervisor is not None:
            self.supervisor.stop()

    async def restart(self) -> None:
        supervisor = self._required
        if not supervisor.plan.can_start:
            await supervisor.read_file()  # what could not come up again must not go down
        supervisor.restart()

    async def kill(self) -> None:
        if self.supervisor is not None:
            self.supervisor.kill()

    async def reload(self) -> None:
        supervisor = self._required
        supervisor.apply(await supervisor.read_file())

    async def swap(self, link: int) -> None:
        self._link(link).renew()

    def forwards(self, link: int) -> Mapping[str, tuple[str, ...]]:
        return self._required.forwards(link)

    async def change_forwards(
        self, link: int, *, add: Iterable[tuple[str, str]] = (), remove: Iterable[tuple[str, str]] = ()
    ) -> ForwardChange:
        self._link(link)
        by = await self._required.change_forwards(link, add, remove)
        return ForwardChange(by, **self._required.forwards(link))

    @property
    def _required(self) -> Supervisor:
        if self.supervisor is None:
            raise Conflict(f"{self.name} does not run", hint=f"start it: qrapd start {self.name}")
        return self.supervisor

    def _link(self, index: int) -> Link:
        vm = self._required.vm
        if vm is None or not vm.ready.is_set():
            raise Conflict(f"{self.name} is not up yet", hint="wait for vm.ready")
        if not 0 <= index < len(vm.links):
            raise Unknown(f"{self.name} has no link {index}", hint=f"it has {len(vm.links)}, counted from 0")
        return vm.links[index]
