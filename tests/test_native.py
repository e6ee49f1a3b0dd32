# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for ``mode = "native"`` without real parts: what is refused, QEMU's arguments, and what QEMU tells."""

from __future__ import annotations

import json
from pathlib import Path

from qrapd.config import parse
from qrapd.link_modes import Installed, check_mode
from qrapd.native import connected_pid
from qrapd.qemu_arguments import Endpoints, command_line

OLD = Installed(
    qemu="/usr/bin/qemu",
    qemu_version=(10, 0, 13),
    netdevs=frozenset({"socket"}),
    passt="/usr/bin/passt",
    passt_version="2025",
    passt_options={},
)
NEW = Installed(
    qemu="/usr/bin/qemu",
    qemu_version=(10, 1, 0),
    netdevs=frozenset({"passt"}),
    passt="/usr/bin/passt",
    passt_version="2025",
    passt_options={},
)

# As QEMU 11.1 wrote it.
NETWORK = (
    "link0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33\r\n"
    " \\ link0-nic: index=0,type=passt,stream,connected to pid 22\r\n"
    "link1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:34\r\n"
    " \\ link1-nic: index=0,type=passt,error: Can't set file descriptor 22 non-blocking: Bad file descriptor\r\n"
    "link2: index=0,type=nic,model=e1000,macaddr=52:54:00:11:22:35\r\n"
    " \\ link2-nic: index=0,type=passt,launching passt\r\n"
)


def test_who_serves_a_link() -> None:
    """The one that QEMU is connected to, and nobody while it tries, or after it has failed."""
    assert [22, None, None, None] == [connected_pid(NETWORK, link) for link in range(4)]


def test_it_takes_a_qemu_that_knows_passt() -> None:
    """Whether it was built with it is asked, not looked up by the version."""
    (link,) = parse("[[link]]\nmode = 'native'\ndevice = 'e1000'", Path("/vms/web.toml")).links
    assert [] == check_mode(0, link, NEW, ["-mem-path", "/hugepages"])
    (problem,) = check_mode(0, link, OLD, [])
    assert "link[0].mode" == problem.key
    assert problem.reason.startswith(
        "needs a QEMU with `-netdev passt` (10.1 or newer, if it was built with it)"
    )
    assert problem.reason.endswith(f"here are {OLD}")


def test_somebody_elses_passt_cannot_be_qemus() -> None:
    """QEMU starts its own."""
    (link,) = parse("[[link]]\nmode = 'native'\nsource = '/run/p.sock'", Path("/vms/web.toml")).links
    (problem,) = check_mode(0, link, NEW, [])
    assert "link[0].mode" == problem.key
    assert "a passt that is started for it" in problem.reason


def test_all_of_passts_options_are_handed_on_as_they_are() -> None:
    """QEMU has names of its own for some; `param` takes any."""
    vm = parse("[[link]]\nmode = 'native'\nmac = '52:54:00:00:00:01'", Path("/vms/web.toml"))
    passt = ("/usr/bin/passt", "--tcp-ports", "127.0.0.1/8080:80", "--no-ra")
    argv = command_line(vm, "qemu", Endpoints(3, 4, 5, [""]), kvm=False, passts={0: passt})
    assert {
        "type": "passt",
        "id": "link0-nic",
        "path": "/usr/bin/passt",
        "quiet": False,
        "param": [{"str": "--tcp-ports"}, {"str": "127.0.0.1/8080:80"}, {"str": "--no-ra"}],
    } == json.loads(argv[argv.index("-netdev") + 1])
    assert "virtio-net-pci,id=link0,netdev=link0-nic,mac=52:54:00:00:00:01" in argv
    assert "-object" not in argv
