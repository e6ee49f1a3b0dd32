# SPDX-License-Identifier: GPL-2.0-or-later
"""A link's place in a running QEMU: a port of the hub behind which its NIC sits, and how a new stream gets there.

Two things about the order were found by measuring with QEMU 7.2 to 11.1. The new stream and its port come first, and
the old ones go afterwards: the other way round the NIC's transmit queue can freeze for ever. And the swap ends with an
announcement on that NIC: under traffic QEMU's transmit side is left blocked otherwise (in up to 29 of 30 swaps; with
it in none of 630), and it makes the guest known to the new passt.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio

from qrapd.errors import QmpFailed
from qrapd.qemu_arguments import FIRST_GENERATION, stream_ids

if TYPE_CHECKING:
    from qrapd.qmp import Command, Qmp

__all__ = ["HubPort"]

UNDO_TIMEOUT = 2.0
"""Seconds for what is cleared away after a failure; what remains is cleared away by the next swap."""


class HubPort:
    """Where the streams of one link are plugged in.

    :param link: its index, by which the ids in QEMU are named.
    :param hub: the hub's id.
    :param nic: the id of the NIC's device, or None: all NICs are announced.
    """

    def __init__(self, link: int, hub: int, nic: str | None) -> None:
        self._link = link
        self._hub = hub
        self._nic = nic
        self._last = FIRST_GENERATION
        self._plugged = [*stream_ids(link, FIRST_GENERATION)]
        self._leftovers: list[str] = []

    @property
    def number(self) -> int:
        """Of the last stream that QEMU was given: with the link's index it names the port."""
        return self._last

    def adopt(self, number: int, *, swapping: bool) -> None:
        """Go on where another supervisor was.

        :param swapping: it had begun to give QEMU the next one.
        """
        self._last = number + swapping
        self._plugged = [*stream_ids(self._link, number)]
        self._leftovers = [*stream_ids(self._link, number + 1)] if swapping else []

    async def swap(self, qmp: Qmp, stream: int) -> None:
        """Put a stream under the NIC, in the place of the one that is there, and announce the guest on it.

        :raise QmpFailed: QEMU refused, hung up or did not answer. The next swap clears away what this one has left.
        """
        self._last += 1
        port, netdev = ids = stream_ids(self._link, self._last)
        try:
            await qmp.lend_fd(stream, netdev)
            await qmp.execute_all(
                [
                    ("netdev_add", {"type": "socket", "id": netdev, "fd": netdev}),
                    ("netdev_add", {"type": "hubport", "id": port, "hubid": self._hub, "netdev": netdev}),
                ]
            )
        except QmpFailed:
            self._leftovers += ids
            with contextlib.suppress(QmpFailed), anyio.move_on_after(UNDO_TIMEOUT):
                await qmp.execute_all([("closefd", {"fdname": netdev}), *self._removals()], refusable=True)
                self._leftovers.clear()
            raise
        self._leftovers += self._plugged
        self._plugged = [*ids]
        await qmp.execute_all(self._removals(), refusable=True, then=self._announcement())
        self._leftovers.clear()

    async def announce(self, qmp: Qmp) -> None:
        """Let QEMU send from the guest's MAC address once, and the guest itself where its driver can.

        :raise QmpFailed: as for :meth:`swap`.
        """
        await qmp.execute(*self._announcement())

    def _announcement(self) -> Command:
        # One round, at once: the times are for further rounds, in ms (QEMU's qapi/net.json, AnnounceParameters).
        arguments: dict[str, object] = {"initial": 50, "max": 550, "rounds": 1, "step": 50}
        if self._nic is not None:
            arguments["interfaces"] = [self._nic]
        return "announce-self", arguments

    def _removals(self) -> list[Command]:
        """What is not needed any more; what a failed swap has not got round to making is not there to be removed."""
        return [("netdev_del", {"id": name}) for name in self._leftovers]
