# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine inside a QEMU, by its monitor: whether the guest runs, its power button, its end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from qrapd.qmp import Qmp

__all__ = ["Machine", "has_spoken"]

PRESS_AGAIN_SECONDS = 5.0
"""The power button is pressed again this often: a guest that still boots has no ear for it yet, and loses it."""

# QEMU's qapi/run-state.json, RunState: nobody is awake in there to obey a power button.
_PAUSED = frozenset({"paused", "prelaunch", "inmigrate", "io-error"})

_PAUSING = {"STOP": True, "SUSPEND": True, "RESUME": False, "WAKEUP": False}
"""QEMU's events that tell of it, and whether the guest runs no more."""


class Machine:
    """One that answers on its monitor, ``qmp``. What asks or tells QEMU something raises QmpFailed where that fails."""

    def __init__(self, qmp: Qmp) -> None:
        self.qmp = qmp
        self.status = "unknown"
        """of the last :meth:`look`: ``running``, ``paused`` and so on, RunState in QEMU's words"""
        self.paused = False
        """whether the guest does not run, by that look and the events since"""

    async def look(self) -> None:
        """Ask how it is."""
        self.status = await self._ask_status()
        self.paused = self.status in _PAUSED

    def note_event(self, name: str) -> None:
        """Take notice of an event of QEMU's."""
        self.paused = _PAUSING.get(name, self.paused)

    async def press_power_button(self, is_wanted: Callable[[], bool]) -> bool:
        """Press it again and again for as long as that is wanted; False: nobody is awake in there to hear it."""
        if await self._ask_status() in _PAUSED:
            return False
        while is_wanted():
            await self.qmp.execute("system_powerdown")
            await anyio.sleep(PRESS_AGAIN_SECONDS)
        return True

    async def quit(self) -> None:
        """End QEMU, whatever the guest does."""
        await self.qmp.execute("quit")

    async def _ask_status(self) -> str:
        return str((await self.qmp.execute("query-status"))["status"])


async def has_spoken(monitor: socket.socket) -> bool:
    """Wait for the first byte of a QEMU's monitor; false if it hung up without one."""
    await anyio.wait_readable(monitor)
    try:
        return bool(monitor.recv(1, socket.MSG_PEEK))
    except ConnectionError:
        return False
