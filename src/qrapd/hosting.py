# SPDX-License-Identifier: GPL-2.0-or-later
"""What the API needs from whoever has VMs: the agent, with many, or the supervisor of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from qrapd.status_tracker import Measures

if TYPE_CHECKING:
    from qrapd.console import Console
    from qrapd.event_log import EventLog
    from qrapd.vm_status import Origin, VmStatus

__all__ = ["ForwardChange", "Host", "HostVitals", "HostedVm"]


@dataclass(frozen=True)
class ForwardChange:
    """What came of a change of forwarded ports."""

    by: Literal["pesto", "swap", "nothing"]
    """``pesto``: passt was told, and nothing was interrupted; ``swap``: another passt takes its place;
    ``nothing``: it was so already"""
    tcp: tuple[str, ...]
    udp: tuple[str, ...]
    """what is forwarded now, in passt's own words"""


@dataclass(frozen=True)
class HostVitals:
    """What is measured of the serving process itself."""

    loop_lag_seconds: float | None
    """how late the event loop was, at worst, since it was last asked; None: that is not measured"""
    adoption_seconds: float | None = None
    """from the start of this process to the last VM taken over; None: there was none"""


class HostedVm(Protocol):
    """One VM as its host offers it. What is asked for is begun, not waited for: events tell of its end."""

    @property
    def status(self) -> VmStatus:
        """How it is now."""

    @property
    def measures(self) -> Measures:
        """What is counted of it, for metrics."""

    @property
    def console(self) -> Console | None:
        """The guest's serial console; None where it is not qrapd's business, or the VM does not run."""

    async def start(self) -> None:
        """:raise Conflict: it runs, or is on its way."""

    async def stop(self) -> None:
        """Have the guest power down; nothing happens to a VM that does not run."""

    async def restart(self) -> None:
        """Stop it in order and start it by its file as that is then."""

    async def kill(self) -> None:
        """End QEMU at once, by SIGKILL."""

    async def reload(self) -> None:
        """Read its file again and apply what can be applied.

        :raise ConfigurationError: the file is wrong; all stays as it is.
        """

    async def swap(self, link: int) -> None:
        """Replace a link's passt under the running NIC.

        :raise Unknown: there is no such link.
        :raise Conflict: the VM does not run.
        """

    def forwards(self, link: int) -> Mapping[str, tuple[str, ...]]:
        """What a link forwards now: ``tcp`` and ``udp``, in passt's own words.

        :raise Unknown: there is no such link.
        :raise Conflict: its passt is not qrapd's own.
        """

    async def change_forwards(
        self, link: int, *, add: Iterable[tuple[str, str]] = (), remove: Iterable[tuple[str, str]] = ()
    ) -> ForwardChange:
        """Forward other ports, until the VM ends or its file has others: pairs of ``tcp`` or ``udp`` and passt's words.

        :raise ConfigurationError: a forward that is not right, or that clashes with another.
        :raise Unknown: there is no such link, or no such forward to remove.
        :raise Conflict: its passt is not qrapd's own, or the VM does not run, or somebody else has a port.
        """


class Host(Protocol):
    """Who has the VMs."""

    origin: Origin
    events: EventLog

    @property
    def vms(self) -> Mapping[str, HostedVm]:
        """By their names, in order."""

    @property
    def vitals(self) -> HostVitals:
        """Of this process."""

    async def look_for(self, name: str) -> None:
        """See whether there is a file of this name by now: then :attr:`vms` has the VM."""

    async def put(self, name: str, text: str, *, only_new: bool = False) -> bool:
        """Write a VM's file; returns whether it is a new one. A VM that runs goes on by the old one until a reload.

        When this returns, :attr:`vms` has the VM.

        :param only_new: leave alone a file that is there: then nothing was written if this returns False.
        :raise ConfigurationError: it is wrong, or has another ``name`` in it; nothing was written.
        :raise Conflict: whoever has this VM takes no files.
        """

    async def delete(self, name: str) -> None:
        """Remove the file of a VM that does not run.

        :raise Unknown: there is none.
        :raise Conflict: it runs, or whoever has this VM takes no files.
        """
