# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line for a VM: the monitors, the console, one hub per link, and then the user's own arguments.

A link's NIC sits behind a hub from the start, because a NIC's own backend cannot be replaced while it runs,
and a hub's port can, without the guest seeing its carrier change (measured with QEMU 7.2 to 11.1)::

    NIC -- hubport linkN-nic -- hub N -- hubport linkN-port1 -- netdev linkN-stream1 -- fd

The number after ``port`` and ``stream`` grows with each new stream. The other modes (:mod:`qrapd.link_modes`) have no
hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qrapd.config import Link, VmConfiguration, chooses_accelerator
from qrapd.guest_memory import shared_memory
from qrapd.hub_mtu import device_property
from qrapd.link_modes import native_netdev, nic_netdev_id, vhost_user_netdev

__all__ = ["FIRST_GENERATION", "Endpoints", "command_line", "monitor", "nic_id", "stream_ids"]

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
) -> list[str]:
    """The whole argv.

    :param kvm: what ``accel = "auto"`` comes to on this host.
    :param passts: program and options of the passts that QEMU is to run itself, by the native links' indices.
    """
    return [
        binary,
        *("-name", f"guest={configuration.name}"),
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
