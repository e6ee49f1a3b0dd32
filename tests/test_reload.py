# SPDX-License-Identifier: GPL-2.0-or-later
"""What a changed file means for a VM that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrapd.config import VmFile, parse
from qrapd.reload import Changes, compare

BEFORE = """
[qemu]
args = ["-m", "1G"]
[restart]
limit = 5
[[link]]
mac = "52:54:00:00:00:01"
[link.passt]
tcp_ports = ["8080:80"]
[[link]]
"""


def file(text: str) -> VmFile:
    return parse(text, Path("web.toml")).file


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", Changes()),
        ("8080:80", "8081:80", Changes(swapped=("link[0].passt.tcp_ports",))),
        ("[link.passt]", "[link.passt]\nmtu = 1500", Changes(swapped=("link[0].passt.mtu",))),
        ("limit = 5", "limit = 6", Changes(applied=("restart.limit",))),
        ("[qemu]", "[qemu]\npowerdown_timeout = 1", Changes(applied=("qemu.powerdown_timeout",))),
        ("mac =", "stall_timeout = 1\nmac =", Changes(applied=("link[0].stall_timeout",))),
        ("1G", "2G", Changes(needing_restart=("qemu.args",))),
        ("00:01", "00:02", Changes(needing_restart=("link[0].mac",))),
        ("mac =", "device = 'e1000'\nmac =", Changes(needing_restart=("link[0].device",))),
        ("[qemu]", "name = 'other'\n[qemu]", Changes(needing_restart=("name",))),
    ],
)
def test_one_change(old: str, new: str, expected: Changes) -> None:
    """Each key is named as it stands in the file."""
    assert expected == compare(file(BEFORE), file(BEFORE.replace(old, new) if old else BEFORE))


def test_another_number_of_links() -> None:
    """NICs are the machine's."""
    assert Changes(needing_restart=("link",)) == compare(file(BEFORE), file(BEFORE + "[[link]]\n"))


def test_every_key_is_one_of_the_three() -> None:
    """Nothing that differs is left unsaid."""
    text = BEFORE.replace("8080", "8081").replace("1G", "2G").replace("limit = 5", "limit = 6")
    changes = compare(file(BEFORE), file(text))
    assert (("restart.limit",), ("link[0].passt.tcp_ports",), ("qemu.args",)) == (
        changes.applied,
        changes.swapped,
        changes.needing_restart,
    )
