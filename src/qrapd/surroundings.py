# SPDX-License-Identifier: GPL-2.0-or-later
"""What a link has around it: its VM, of which it knows no more than this, and its place in QEMU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qrapd.errors import Unavailable
from qrapd.logs import Emit
from qrapd.stream import HangUpWatch
from qrapd.systemd import Keeper

if TYPE_CHECKING:
    from qrapd.qmp import Qmp

__all__ = ["Port", "Surroundings"]


@dataclass(frozen=True)
class Surroundings:
    """What a link has in common with the other links of its VM."""

    directory: Path
    """where passts of ours work"""
    emit: Emit
    hang_ups: HangUpWatch
    note_change: Callable[[], None]
    """called when another passt serves a link"""
    keeper: Keeper
    is_ending: Callable[[], bool]
    """whether the machine is on its way out"""
    note_failed_start: Callable[[Unavailable], None]
    """called when a link has lost its passt before the VM was ready, with the reason"""
    pesto_socket: Callable[[int], Path] | None = None
    """where a link's passt is to listen for pesto(1)"""


class Port(Protocol):
    """A link's place in a running QEMU, such as a :class:`qrapd.hub.HubPort`."""

    @property
    def number(self) -> int:
        """Of the last stream that QEMU was given."""

    def adopt(self, number: int, *, swapping: bool) -> None:
        """Go on where another supervisor was."""

    async def swap(self, qmp: Qmp, stream: int) -> None:
        """Put a stream under the NIC, in the place of the one that is there."""

    async def announce(self, qmp: Qmp) -> None:
        """Have something sent that a living passt reads."""
