# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards that change while a VM runs, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qrapd import config, forwards
from qrapd.config import VmFile
from qrapd.errors import ConfigurationError, Conflict, Unknown
from qrapd.forwards import Changed, Ports

PORTS: Ports = {"tcp": ("8080:80", "127.0.0.1/2222:22"), "udp": ("53",)}


def make(*passts: dict[str, Any], **link: Any) -> VmFile:
    """A VM's file with these tables [link.passt]."""
    return VmFile.model_validate({"link": [{**link, "passt": passt} for passt in passts]})


def test_what_a_file_forwards() -> None:
    """In one form, whatever the file's."""
    file = make({"tcp_ports": ["8080:80"], "udp_ports": 53}, {})
    assert {"tcp": ("8080:80",), "udp": ("53",)} == forwards.current(file, 0)
    assert {"tcp": (), "udp": ()} == forwards.current(file, 1)
    assert {"tcp": (), "udp": ()} == forwards.current(make({"tcp_ports": "none"}), 0)
    with pytest.raises(Unknown, match="no link 2"):
        forwards.current(file, 2)
    with pytest.raises(Conflict, match="not qrapd's own"):
        forwards.current(make({}, source="probe"), 0)


def test_a_change() -> None:
    """Removed first, then added; what is there is not added again; the order stays."""
    changed = forwards.change(0, PORTS, [("udp", "54"), ("tcp", "2222"), ("tcp", "8080:80")], [("udp", "53")])
    assert {"tcp": ("8080:80", "127.0.0.1/2222:22", "2222"), "udp": ("54",)} == changed
    assert PORTS == forwards.change(0, PORTS, [("tcp", "8080:80")], [])
    moved = forwards.change(0, PORTS, [("tcp", "8080:81")], [("tcp", "8080:80")])
    assert ("127.0.0.1/2222:22", "8080:81") == moved["tcp"]


def test_what_is_not_there_cannot_be_removed() -> None:
    """And what is there is told."""
    with pytest.raises(Unknown, match="does not forward udp 54") as caught:
        forwards.change(0, PORTS, [], [("udp", "54")])
    assert "it forwards 53" == caught.value.hint


@pytest.mark.parametrize(
    ("forward", "words"),
    [(("tcp", "none"), "is none"), (("sctp", "1"), "write tcp or udp"), (("tcp", "http"), "http")],
)
def test_what_is_no_forward(forward: tuple[str, str], words: str) -> None:
    """It is refused in words."""
    with pytest.raises(ConfigurationError) as caught:
        forwards.change(0, PORTS, [forward], [])
    assert words in str(caught.value.problems[0])


def test_it_is_checked_as_a_file_is(tmp_path: Path) -> None:
    """The other links' forwards, and those that were changed before, may clash with it."""
    file = make({"tcp_ports": "8080:80"}, {"no_udp": True})
    data = forwards.as_data(file, {0: PORTS, 1: {"tcp": ("8081",), "udp": ()}})
    assert PORTS == forwards.current(config.check(data, tmp_path / "vm.toml").file, 0)
    for other in ({"tcp": ("8080",), "udp": ()}, {"tcp": (), "udp": ("54",)}):
        with pytest.raises(ConfigurationError):
            config.check(forwards.as_data(file, {0: PORTS, 1: other}), tmp_path / "vm.toml")


def test_a_command_line() -> None:
    """Its forwards are known, taken out and put in; all else stays."""
    argv = ("/usr/bin/passt", "--ipv4-only", "--tcp-ports", "8080:80", "--mtu", "1500", "--udp-ports", "none")
    assert {"tcp": ("8080:80",), "udp": ()} == forwards.given(argv)
    assert ("/usr/bin/passt", "--ipv4-only", "--mtu", "1500") == forwards.without(argv)
    put = forwards.put(argv, PORTS)
    assert PORTS == forwards.given(put)
    assert forwards.without(argv) == forwards.without(put)
    assert [4, 6, None] == [forwards.family(each) for each in (argv, ("passt", "--ipv6-only"), ("passt",))]


def test_how_long_a_change_holds() -> None:
    """Until the file says other ports for this link; what is changed back is no change."""
    file = make({"tcp_ports": "22"}, {})
    changed = Changed.between(forwards.current(file, 0), PORTS)
    assert changed is not None
    assert PORTS == changed.ports
    assert changed.holds(file, 0)
    assert changed.holds(make({"tcp_ports": ["22"], "mtu": 1500}), 0)
    assert not changed.holds(make({"tcp_ports": "23"}), 0)
    assert not changed.holds(file, 1)
    assert not changed.holds(file, 2)
    assert not changed.holds(make({"tcp_ports": "22"}, source="probe"), 0)
    assert not changed.holds(None, 0)
    assert Changed.between(PORTS, {"tcp": (*reversed(PORTS["tcp"]),), "udp": ("53",)}) is None
