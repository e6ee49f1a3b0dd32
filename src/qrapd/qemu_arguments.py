# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line for a VM: the monitors, the console, one hub per link, and then the user's own arguments.

A link's NIC sits behind a hub from the start, because a NIC's own backend cannot be replaced while it runs,
and a hub's port can, without the guest seeing its carrier change (measured with QEMU 7.2 to 11.1)::

    NIC -- hubport linkN-nic -- hub N -- hubport linkN-port1 -- netdev linkN-stream1 -- fd

The number after ``port`` and ``stream`` grows with each new stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qrapd.config import VmConfiguration, chooses_accelerator

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

    @classmethod
    def placeholders(cls, links: int) -> Endpoints:
        """For ``qrapd plan``: words that say which fd will stand there."""
        return cls("QMP_FD", "USER_QMP_FD", "SERIAL_FD", [f"LINK{n}_FD" for n in range(links)])


def command_line(
    configuration: VmConfiguration, binary: str, endpoints: Endpoints, *, kvm: bool
) -> list[str]:
    """The whole argv. ``kvm`` says what ``accel = "auto"`` comes to on this host."""
    return [
        binary,
        *("-name", f"guest={configuration.name}"),
        *_accelerator(configuration, kvm=kvm),
        # No window and no VNC server that nobody asked for; a later -display or -vnc of the user's wins.
        *("-display", "none"),
        *monitor("qmp", endpoints.qmp),
        *monitor("user-qmp", endpoints.user_qmp),
        *_console(configuration, endpoints.serial),
        *_network(configuration, endpoints.streams),
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


def _network(configuration: VmConfiguration, streams: Sequence[int | str]) -> Iterator[str]:
    if not configuration.links:
        # Without any word on it QEMU would give the guest a NIC on its own user-mode network.
        yield from ("-nic", "none")
    for index, (link, fd) in enumerate(zip(configuration.links, streams, strict=True)):
        port, stream = stream_ids(index, FIRST_GENERATION)
        yield from ("-netdev", f"socket,id={stream},fd={fd}")
        yield from ("-netdev", f"hubport,id={port},hubid={index},netdev={stream}")
        yield from ("-netdev", f"hubport,id=link{index}-nic,hubid={index}")
        model, _, properties = link.device.partition(",")
        own = f"{model},id={nic_id(index)},netdev=link{index}-nic,mac={configuration.mac(index)}"
        yield from ("-device", f"{own},{properties}" if properties else own)
