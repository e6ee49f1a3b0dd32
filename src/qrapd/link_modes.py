# SPDX-License-Identifier: GPL-2.0-or-later
"""What the modes of a link ask of QEMU, passt and the VM's file, and QEMU's arguments for them.

``swap`` runs everywhere. The others are refused where the installed parts lack something, before anything starts:

- ``vhost-user``: a passt with ``--vhost-user``, and QEMU 10.0, the first that tells by an event that the link is back.
- ``native``: a QEMU whose ``-netdev`` knows ``passt`` (10.1, where it was built with it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qrapd.config import Link
from qrapd.errors import Problem
from qrapd.guest_memory import check_shared_memory

__all__ = ["Installed", "chardev_id", "check_mode", "native_netdev", "nic_netdev_id", "vhost_user_netdev"]

VHOST_USER_QEMU = (10, 0)
"""The first with NETDEV_VHOST_USER_CONNECTED (QEMU's qapi/net.json)."""

_SWAP_INSTEAD = "use mode = 'swap', the default"


@dataclass(frozen=True)
class Installed:
    """The parts that one link would run on."""

    qemu: str
    """the program"""
    qemu_version: tuple[int, int, int]
    netdevs: frozenset[str]
    """what its -netdev knows"""
    passt: str | None
    """the program, where qrapd starts it"""
    passt_version: str | None
    """None: it does not say"""
    passt_options: Mapping[str, bool]
    """what its --help names"""

    def __str__(self) -> str:
        version = ".".join(map(str, self.qemu_version))
        passt = (
            f"passt {self.passt_version}" if self.passt_version else "a passt that does not tell its version"
        )
        return f"QEMU {version} ({self.qemu}) and {passt} ({self.passt})"


def check_mode(index: int, link: Link, installed: Installed, args: Sequence[str]) -> list[Problem]:
    """Why a link cannot have its mode here; ``args`` are QEMU's, as the file has them."""
    if link.mode == "swap":
        return []
    problems = [*_check_file(index, link)]
    if link.source == "managed" and (lacking := _lacking(link.mode, installed)):
        problems.append(
            Problem(
                f"link[{index}].mode",
                f"needs {lacking}; here are {installed}",
                value=repr(link.mode),
                hint=f"install newer ones, or {_SWAP_INSTEAD}",
            )
        )
    if link.mode == "vhost-user":
        problems += check_shared_memory(args, f"link[{index}] with its mode 'vhost-user'")
    return problems


def _check_file(index: int, link: Link) -> Iterator[Problem]:
    if link.source != "managed":
        yield Problem(
            f"link[{index}].mode",
            "is for a passt that is started for it, and this link takes one that is there already",
            value=repr(link.mode),
            hint=f"remove `source`, or {_SWAP_INSTEAD}",
        )
    if link.guest_addresses:
        yield Problem(
            f"link[{index}].guest_addresses",
            f"cannot be told to passt in mode '{link.mode}', where nothing but the guest speaks to it",
            value=repr(link.guest_addresses),
            hint=f"remove it, or {_SWAP_INSTEAD}",
        )
    model = link.device.partition(",")[0]
    if link.mode == "vhost-user" and not (model == "virtio-net" or model.startswith("virtio-net-")):
        yield Problem(
            f"link[{index}].device",
            "is no virtio device, and with mode 'vhost-user' passt plays the part of one",
            value=repr(link.device),
            hint=f"use virtio-net-pci, the default, or {_SWAP_INSTEAD}",
        )


def _lacking(mode: str, installed: Installed) -> str:
    """What is needed and is not there, in words."""
    lacking = []
    if mode == "native":
        if "passt" not in installed.netdevs:
            lacking.append("a QEMU with `-netdev passt` (10.1 or newer, if it was built with it)")
    else:
        if installed.qemu_version[:2] < VHOST_USER_QEMU:
            lacking.append(f"QEMU {'.'.join(map(str, VHOST_USER_QEMU))} or newer")
        elif "vhost-user" not in installed.netdevs:
            lacking.append("a QEMU that was built with `-netdev vhost-user`")
        if "vhost-user" not in installed.passt_options:
            lacking.append("a passt with --vhost-user (of December 2024 or newer)")
    return " and ".join(lacking)


# --- QEMU's arguments ---------------------------------------------------------------------------------


def nic_netdev_id(index: int) -> str:
    """What a link's NIC is plugged into."""
    return f"link{index}-nic"


def chardev_id(index: int) -> str:
    """The id of the chardev by which QEMU speaks to the passt of a vhost-user link."""
    return f"link{index}-chardev"


def vhost_user_netdev(index: int, path: str) -> list[str]:
    """A vhost-user link; ``path`` is a socket on which its first passt is waited for.

    QEMU would take an open connection for this chardev only after its start: given as ``fd=`` it is refused, "does not
    support FD passing" (10.0, 11.1: measured).
    """
    chardev = chardev_id(index)
    return [
        *("-chardev", f"socket,id={chardev},path={path.replace(',', ',,')}"),
        *("-netdev", f"vhost-user,id={nic_netdev_id(index)},chardev={chardev}"),
    ]


def native_netdev(index: int, passt: Sequence[str]) -> list[str]:
    """A native link, for which QEMU runs ``passt``, program and options.

    QEMU has names of its own for some of the options, and hands on what is in ``param`` as it is: all of them, then.
    """
    program, *options = passt
    netdev = {
        "type": "passt",
        "id": nic_netdev_id(index),
        "path": program,
        "quiet": False,
        "param": [{"str": option} for option in options],
    }
    return ["-netdev", json.dumps(netdev)]
