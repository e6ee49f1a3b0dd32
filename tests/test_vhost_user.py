# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for ``mode = "vhost-user"`` without real parts: what is refused, QEMU's arguments, and the chardev's part."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from qrapd.config import parse
from qrapd.errors import Problem, QmpFailed, QmpRefused
from qrapd.link_modes import Installed, check_mode
from qrapd.qemu_arguments import Endpoints, command_line
from qrapd.qmp import Qmp
from qrapd.vhost_user import ChardevPort

NEW = Installed(
    qemu="/usr/bin/qemu",
    qemu_version=(10, 0, 13),
    netdevs=frozenset({"socket", "vhost-user"}),
    passt="/usr/bin/passt",
    passt_version="0.0~git20250503",
    passt_options={"fd": True, "vhost-user": False},
)
OLD = replace(NEW, qemu_version=(7, 2, 22), passt_version=None, passt_options={"fd": True})


def problems(lines: str, installed: Installed = NEW, args: tuple[str, ...] = ()) -> list[Problem]:
    """What is wrong with a link of this mode with these further lines."""
    vm = parse(f"[[link]]\nmode = 'vhost-user'\n{lines}", Path("/vms/web.toml"))
    return check_mode(0, vm.links[0], installed, args)


def test_what_it_needs_is_enough() -> None:
    """The version of the passt does not matter, nor whether it is known."""
    assert [] == problems("", replace(NEW, passt_version=None))
    assert [] == problems("device = 'virtio-net-pci,mq=on,vectors=4'", args=("-m", "1G"))
    assert [] == problems("device = 'virtio-net'")


@pytest.mark.parametrize(
    ("installed", "lacking"),
    [
        (OLD, "QEMU 10.0 or newer and a passt with --vhost-user (of December 2024 or newer)"),
        (replace(NEW, qemu_version=(9, 2, 1)), "QEMU 10.0 or newer"),
        (replace(NEW, passt_options={}), "a passt with --vhost-user (of December 2024 or newer)"),
        (replace(NEW, netdevs=frozenset()), "a QEMU that was built with `-netdev vhost-user`"),
    ],
)
def test_older_parts_are_refused_with_their_versions(installed: Installed, lacking: str) -> None:
    """Both versions, whichever is at fault: both are what somebody will ask for."""
    (problem,) = problems("", installed)
    assert ("link[0].mode", "'vhost-user'") == (problem.key, problem.value)
    assert f"needs {lacking}; here are {installed}" == problem.reason
    assert "install newer ones, or use mode = 'swap', the default" == problem.hint


def test_versions_in_words() -> None:
    """passt of Debian 12 says that its version is unknown."""
    assert "QEMU 10.0.13 (/usr/bin/qemu) and passt 0.0~git20250503 (/usr/bin/passt)" == str(NEW)
    assert "QEMU 7.2.22 (/usr/bin/qemu) and a passt that does not tell its version (/usr/bin/passt)" == str(
        OLD
    )


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("device = 'e1000'", "link[0].device"),
        ("guest_addresses = ['192.0.2.9']", "link[0].guest_addresses"),
        ("source = 'probe'", "link[0].mode"),
    ],
)
def test_what_does_not_go_with_it(lines: str, key: str) -> None:
    """A device that is no virtio one, frames from us, somebody else's passt."""
    (problem,) = problems(lines)
    assert key == problem.key
    assert problem.hint is not None
    assert "mode = 'swap'" in problem.hint


def test_memory_that_cannot_be_shared() -> None:
    """Judged by qrapd.guest_memory."""
    (problem,) = problems("", args=("-mem-path", "/hugepages"))
    assert "qemu.args[0]" == problem.key
    assert "link[0] with its mode 'vhost-user' shares it with passt" in problem.reason


def test_qemus_arguments() -> None:
    """Its memory, once; a chardev for the link; a comma in the path is doubled; the NIC is where it always is."""
    text = "[qemu]\nargs = ['-m', '32M']\n[[link]]\nmode = 'vhost-user'\nmac = '52:54:00:00:00:01'\n[[link]]"
    vm = parse(text, Path("/vms/web.toml"))
    argv = command_line(vm, "qemu", Endpoints(3, 4, 5, ["/run/a,b/link0.sock", 6]), kvm=False)
    network = argv[argv.index("-object") : argv.index("-m")]
    assert [
        *("-object", "memory-backend-memfd,id=qrapd-memory,size=33554432,share=on"),
        *("-machine", "memory-backend=qrapd-memory"),
        *("-chardev", "socket,id=link0-chardev,path=/run/a,,b/link0.sock"),
        *("-netdev", "vhost-user,id=link0-nic,chardev=link0-chardev"),
        *("-device", "virtio-net-pci,id=link0,netdev=link0-nic,mac=52:54:00:00:00:01,romfile="),
        *("-netdev", "socket,id=link1-stream1,fd=6"),
    ] == network[:12]


# --- the chardev --------------------------------------------------------------------------------------

DOWN, UP = "NETDEV_VHOST_USER_DISCONNECTED", "NETDEV_VHOST_USER_CONNECTED"


class Monitor:
    """What a ChardevPort needs of a Qmp; ``answer`` is called with each command."""

    def __init__(self, port: ChardevPort, *, refuse: bool = False, dies: bool = False) -> None:
        self.port = port
        self.dies = dies
        self.refuse = refuse
        self.commands: list[str] = []

    async def lend_fd(self, _fd: int, name: str) -> None:
        """Take note."""
        self.commands.append(f"getfd {name}")

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Do as QEMU does: the event comes with the answer."""
        self.commands.append(f"{command} {arguments['fdname']}")
        if command == "add_client":
            if self.refuse:
                raise QmpRefused("QEMU refused add_client")
            self.port.note_event(UP, {"netdev-id": "link0-nic", "chardev-id": "link0-chardev"})
            if self.dies:
                self.port.note_event(DOWN, {"netdev-id": "link0-nic"})


async def swap(port: ChardevPort, monitor: Monitor) -> None:
    """Give it a stream."""
    with socket.socket() as stream:
        await port.swap(cast("Qmp", monitor), stream.fileno())


async def test_a_new_passt_waits_until_qemu_has_noticed_the_end_of_the_old_one() -> None:
    """Before that the chardev would refuse it."""
    port = ChardevPort(0)
    monitor = Monitor(port)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(swap, port, monitor)
        port.note_event(DOWN, {"netdev-id": "link1-nic"})
        port.note_event("NIC_RX_FILTER_CHANGED", {"name": "link0"})
        await anyio.wait_all_tasks_blocked()
        assert [] == monitor.commands
        port.note_event(DOWN, {"netdev-id": "link0-nic"})
    assert ["getfd link0-chardev-1", "add_client link0-chardev-1"] == monitor.commands


async def test_a_late_passt_is_taken_at_once() -> None:
    """However long the link has been down."""
    port = ChardevPort(0)
    monitor = Monitor(port)
    for number in (1, 2):
        port.note_event(DOWN, {"netdev-id": "link0-nic"})
        await anyio.sleep(0.06)  # longer than SHORTEST_DOWN
        await swap(port, monitor)
        assert f"add_client link0-chardev-{number}" == monitor.commands[-1]


async def test_a_refusal_leaves_no_fd_with_qemu() -> None:
    """So that the next attempt finds things as they were."""
    port = ChardevPort(0)
    monitor = Monitor(port, refuse=True)
    port.note_event(DOWN, {"netdev-id": "link0-nic"})
    with pytest.raises(QmpFailed):
        await swap(port, monitor)
    assert "closefd link0-chardev-1" == monitor.commands[-1]


async def test_a_passt_that_ends_at_once_is_no_failure_of_the_swap() -> None:
    """The link was back; that it has gone again is the next loss."""
    port = ChardevPort(0)
    monitor = Monitor(port, dies=True)
    port.note_event(DOWN, {"netdev-id": "link0-nic"})
    with anyio.fail_after(3):  # far less than NOTICE_TIMEOUT
        await swap(port, monitor)
