# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line for a VM: the monitors, the console, one hub per link, and then the user's own arguments.

A link's NIC sits behind a hub from the start, because a NIC's own backend cannot be replaced while it runs,
and a hub's port can, without the guest seeing its carrier change (measured with QEMU 7.2 to 11.1)::

    NIC -- hubport linkN-nic -- hub N -- hubport linkN-port1 -- netdev linkN-stream1 -- fd

The number after ``port`` and ``stream`` grows with each new stream. The other modes (:mod:`qrapd.link_modes`) have no
hub.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qrapd.config import Link, VmConfiguration, chooses_accelerator, option_name
from qrapd.guest_memory import shared_memory
from qrapd.hub_mtu import device_property
from qrapd.link_modes import native_netdev, nic_netdev_id, vhost_user_netdev

__all__ = [
    "FIRST_GENERATION",
    "Endpoints",
    "command_line",
    "disk_files",
    "monitor",
    "nic_id",
    "sandbox",
    "stream_ids",
]

FIRST_GENERATION = 1


def nic_id(link: int) -> str:
    """The id of a link's NIC."""
    return f"link{link}"


def stream_ids(link: int, number: int) -> tuple[str, str]:
    """The ids of a link's hub port and of the netdev behind it, in the order in which they can be deleted.

    :param number: of the streams that this QEMU was given for the link, from FIRST_GENERATION on.
    """
    return f"link{link}-port{number}", f"link{link}-stream{number}"


@dataclass(frozen=True)
class Endpoints:
    """What QEMU inherits, as fd numbers, or as words where only the form of a command line is wanted."""

    qmp: int | str
    user_qmp: int | str
    serial: int | str | None
    """None for a QEMU whose console is not qrapd's business"""
    streams: Sequence[int | str]
    """one for each link; for a vhost-user link it is the path of a socket"""

    @classmethod
    def placeholders(cls, links: int) -> Endpoints:
        """For ``qrapd plan``: words that say which fd will stand there."""
        return cls("QMP_FD", "USER_QMP_FD", "SERIAL_FD", [f"LINK{n}_FD" for n in range(links)])


def command_line(
    configuration: VmConfiguration,
    binary: str,
    endpoints: Endpoints,
    *,
    kvm: bool,
    passts: Mapping[int, Sequence[str]] | None = None,
    seccomp: bool = False,
) -> list[str]:
    """The whole argv.

    :param kvm: what ``accel = "auto"`` comes to on this host.
    :param passts: program and options of the passts that QEMU is to run itself, by the native links' indices.
    :param seccomp: whether this QEMU has a -sandbox.
    """
    return [
        binary,
        *("-name", f"guest={configuration.name}"),
        *(sandbox(configuration) if seccomp else ()),
        *_accelerator(configuration, kvm=kvm),
        # No window and no VNC server that nobody asked for; a later -display or -vnc of the user's wins.
        *("-display", "none"),
        *monitor("qmp", endpoints.qmp),
        *monitor("user-qmp", endpoints.user_qmp),
        *_console(configuration, endpoints.serial),
        *_network(configuration, endpoints.streams, passts or {}),
        *configuration.qemu.args,
    ]


def _accelerator(configuration: VmConfiguration, *, kvm: bool) -> Iterator[str]:
    accel = configuration.qemu.accel
    if accel == "args" or chooses_accelerator(configuration.qemu.args):
        return
    if accel == "auto":
        accel = "kvm" if kvm else "tcg"
    yield from ("-accel", accel)


# --- QEMU's sandbox -----------------------------------------------------------------------------------

_USER_OPTIONS = {"-runas": "", "-run-with": r"(?:^|,)user="}
"""Options that make QEMU change its user, and what their values then hold."""

_WINDOWLESS = ("none", "vnc", "curses", "egl-headless", "dbus")
"""Values of -display. gtk, sdl and spice-app make windows, and desktop libraries start programs as they like."""


def sandbox(configuration: VmConfiguration) -> list[str]:
    """QEMU's arguments for a filter of its system calls that fits the VM; none where none does.

    Where the filter is broken, QEMU 7.2 is killed by SIGSYS, and 10.0 and 11.1 get EPERM from a fork (measured).
    """
    args = configuration.qemu.args
    if not configuration.qemu.sandbox or any(option_name(each) == "-sandbox" for each in args):
        return []
    # A program that QEMU starts has QEMU's filter, and even the plain one forbids mount(), which passt cannot do
    # without: passt dies of SIGSYS (11.1: measured). Nor do set-user-ID programs work below it, as no_new_privs is set.
    if any(link.mode == "native" for link in configuration.links) or _starts_programs(args):
        return []
    changes_user = any(
        name in _USER_OPTIONS and re.search(_USER_OPTIONS[name], value) for name, value in _with_values(args)
    )
    privileges = "allow" if changes_user else "deny"
    rules = f"on,obsolete=deny,elevateprivileges={privileges},spawn=deny,resourcecontrol=deny"
    return ["-sandbox", rules]


def _with_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option's name, and what follows it."""
    for index, argument in enumerate(args):
        if (name := option_name(argument)) is not None:
            yield name, args[index + 1] if index + 1 < len(args) else ""


def _starts_programs(args: Sequence[str]) -> bool:
    """Whether QEMU's arguments want it to fork or to start programs, by itself or by a library of a desktop."""
    for name, value in _with_values(args):
        match name:
            case "-netdev" | "-nic" | "-net":
                starts = _netdev_starts_programs(value)
            case "-incoming":
                starts = value.startswith("exec:") or '"exec"' in value
            case "-async-teardown":
                starts = True  # a fork frees the guest's memory in the end
            case "-run-with":
                starts = "async-teardown=on" in value
            case "-display":
                starts = _kind(value) not in _WINDOWLESS
            case _:
                starts = False
        if starts:
            return True
    return False


def _kind(value: str) -> str:
    """The type of a display or a network, which may be written as JSON."""
    match = re.match(r'\s*\{.*?"type"\s*:\s*"([^"]*)"|(?:type=)?([^,=]*)', value, re.DOTALL)
    return (match[1] or match[2] or "") if match else ""


def _netdev_starts_programs(value: str) -> bool:
    match _kind(value):
        case "bridge" | "passt":
            return True
        case "tap":
            # It runs /etc/qemu-ifup and -ifdown, unless it is told not to or given an open device.
            without = re.findall(r'\b(?:down)?script"?\s*[=:]\s*"?no\b', value)
            return len(without) < 2 and re.search(r'\bfds?"?\s*[=:]', value) is None
        case _:
            return re.search(r"\bsmb\b|\bcmd:", value) is not None  # of type user


_FILE_OF_A_DISK = {
    "-drive": r"(?:^|,)file(?:\.filename)?=((?:[^,]|,,)+)",
    "-blockdev": r"(?:^|,)(?:file\.)?filename=((?:[^,]|,,)+)",
    **dict.fromkeys(("-hda", "-hdb", "-hdc", "-hdd", "-cdrom"), r"(.+)"),
}


def disk_files(args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The files of disks that QEMU's arguments name: the index of the argument, and the path.

    What is no plain file is left out: ``nbd:host:1``, ``json:{...}``, ``-blockdev`` as JSON.
    """
    for index, (option, value) in enumerate(itertools.pairwise(args), start=1):
        match = re.search(_FILE_OF_A_DISK.get(option_name(option) or "", "(?!)"), value)
        if match and not re.match(r"[A-Za-z0-9+_-]+:", match[1]) and not value.startswith("{"):
            yield index, match[1].replace(",,", ",")


def monitor(name: str, fd: int | str) -> Iterator[str]:
    """A QMP monitor on a listening socket; ``name`` is its chardev's id."""
    # The socket is bound by us and handed over, so that it can be connected to before QEMU has started.
    yield from ("-chardev", f"socket,id={name},fd={fd},server=on,wait=off")
    yield from ("-mon", f"chardev={name},mode=control")


def _console(configuration: VmConfiguration, fd: int | str | None) -> Iterator[str]:
    if configuration.qemu.console == "none" or fd is None:
        return
    yield from ("-chardev", f"socket,id=console,fd={fd},server=on,wait=off")
    yield from ("-serial", "chardev:console")


def _network(
    configuration: VmConfiguration, streams: Sequence[int | str], passts: Mapping[int, Sequence[str]]
) -> Iterator[str]:
    if not configuration.links:
        # Without any word on it QEMU would give the guest a NIC on its own user-mode network.
        yield from ("-nic", "none")
    if any(link.mode == "vhost-user" for link in configuration.links):
        yield from shared_memory(configuration.qemu.args)
    for index, (link, stream) in enumerate(zip(configuration.links, streams, strict=True)):
        match link.mode:
            case "swap":
                yield from _hub(index, stream)
            case "vhost-user":
                path = str(stream)
                yield from vhost_user_netdev(index, path if "/" in path else f"LINK{index}_SOCKET")
            case "native":
                yield from native_netdev(index, passts[index])
        model, _, properties = link.device.partition(",")
        own = f"{model},id={nic_id(index)},netdev={nic_netdev_id(index)},mac={configuration.mac(index)}"
        yield from ("-device", ",".join(filter(None, [own, _own_property(link), properties])))


def _own_property(link: Link) -> str | None:
    """What a NIC is to be told because of its mode."""
    if link.mode == "swap":
        return device_property(link.device, link.passt)
    model = link.device.partition(",")[0]
    if link.mode == "vhost-user" and model.startswith("virtio-net-pci") and "romfile=" not in link.device:
        # No booting by network: passt 2025-05 dies of the requests that iPXE makes, again and again (measured).
        return "romfile="
    return None


def _hub(index: int, fd: int | str) -> Iterator[str]:
    port, stream = stream_ids(index, FIRST_GENERATION)
    yield from ("-netdev", f"socket,id={stream},fd={fd}")
    yield from ("-netdev", f"hubport,id={port},hubid={index},netdev={stream}")
    yield from ("-netdev", f"hubport,id={nic_netdev_id(index)},hubid={index}")
