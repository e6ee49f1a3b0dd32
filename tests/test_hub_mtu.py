# SPDX-License-Identifier: GPL-2.0-or-later
"""The MTU behind a hub: never so large that QEMU could write part of a frame."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrapd.config import Link, parse
from qrapd.hub_mtu import LARGEST_MTU, check_mtu, device_property, limit_mtu


def link(text: str) -> Link:
    return parse(f"[[link]]\n{text}", Path("web.toml")).links[0]


def test_a_frame_of_that_size_fits_into_one_piece() -> None:
    """With its Ethernet header and QEMU's length word, into the least that the kernel takes whole."""
    assert 32768 == LARGEST_MTU + 14 + 4


@pytest.mark.parametrize(
    ("text", "announced", "device"),
    [
        ("", LARGEST_MTU, "host_mtu=32750"),
        ("[link.passt]\nmtu = 1500", 1500, "host_mtu=1500"),
        ("[link.passt]\nmtu = 0", 0, "host_mtu=32750"),  # passt announces none: the guest finds out by itself
        ("device = 'virtio-net-pci,host_mtu=9000'", LARGEST_MTU, None),
        ("device = 'e1000'", LARGEST_MTU, None),  # has no frames so long
    ],
)
def test_what_passt_and_the_nic_are_told(text: str, announced: int, device: str | None) -> None:
    """What the file says wins, as long as it is not more."""
    made = link(text)
    assert (announced, device) == (limit_mtu(made.passt).mtu, device_property(made.device, made.passt))
    assert [] == [*check_mtu(0, made)]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[link.passt]\nmtu = 32751", "link[0].passt.mtu"),
        ("device = 'virtio-net-pci,mq=on,host_mtu=65520'", "link[0].device"),
    ],
)
def test_more_is_refused(text: str, key: str) -> None:
    """With the reason, and what to do."""
    (problem,) = check_mtu(0, link(text))
    assert (key, True) == (problem.key, "32750" in problem.reason)
    assert "vhost-user" in str(problem.hint)
