# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a guest's frames may be behind a hub, so that QEMU never writes part of one.

A NIC behind a hub of two ports is not safe with longer ones. When QEMU's socket netdev could write only part of a
frame, and can write again, the hub hands it the NIC's next frame before the rest of the first: what goes out is the
head of one and the tail of another, or QEMU aborts on an assertion (net/net.c, qemu_flush_queued_packets: the hub's
queue comes before the netdev's own). Measured with a guest sending at full speed, MTU 65520, QEMU 7.2 and 10.0: wrong
bytes at the receiver in 6 of 18 runs of 8 s, and an abort in 1 of 26; without a hub none. With a third port to the
hub the frames stay whole, but nobody tells passt to slow down any more.

A frame that the kernel takes whole or not at all has no rest. A UNIX stream's buffer holds at least 32768 bytes in
one piece (net/unix/af_unix.c, UNIX_SKB_FRAGS_SZ; 33000 were whole and 40000 were not, with Linux 6.18), and of these
QEMU's length word takes 4 and the Ethernet header 14: with an MTU of 32000 or 32750, 0 of 16 runs showed anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from qrapd.config import Link
from qrapd.errors import Problem
from qrapd.passt_options import PasstOptions

__all__ = ["LARGEST_MTU", "check_mtu", "device_property", "limit_mtu"]

LARGEST_MTU = 32768 - 4 - 14
"""Bytes."""


def limit_mtu(options: PasstOptions) -> PasstOptions:
    """The options of a passt that announces no more than that, where they say nothing about it."""
    return options if options.mtu is not None else options.model_copy(update={"mtu": LARGEST_MTU})


def device_property(device: str, options: PasstOptions) -> str | None:
    """What a virtio NIC is to be told: a guest cannot set a larger MTU then. Other NICs have no frames so long."""
    model = device.partition(",")[0]
    is_virtio = model == "virtio-net" or model.startswith("virtio-net-")
    if not is_virtio or _host_mtu(device) is not None:
        return None
    return f"host_mtu={options.mtu or LARGEST_MTU}"


def check_mtu(index: int, link: Link) -> Iterator[Problem]:
    """Why a link of mode swap cannot have the MTU that the file gives it."""
    places = {f"link[{index}].passt.mtu": link.passt.mtu, f"link[{index}].device": _host_mtu(link.device)}
    for key, mtu in places.items():
        if mtu is not None and mtu > LARGEST_MTU:
            yield Problem(
                key,
                f"is an MTU of more than {LARGEST_MTU}, beyond which QEMU may mix up the guest's frames in mode 'swap'",
                value=str(mtu),
                hint=f"leave it out, which gives {LARGEST_MTU}, or write a smaller one, or use mode = 'vhost-user'",
            )


def _host_mtu(device: str) -> int | None:
    for each in device.split(",")[1:]:
        key, _, value = each.partition("=")
        if key == "host_mtu" and value.isdecimal():
            return int(value)
    return None
