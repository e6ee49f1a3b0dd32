# SPDX-License-Identifier: GPL-2.0-or-later
"""From a command line of qrap(1) to that of a QEMU under qrapd's care: a hub before the stream, and two monitors.

The netdev that takes the stream is replaced, where it stands. What NICs and filters call it stays::

    NIC -- hubport with the netdev's id -- hub 100 -- hubport link0-port1 -- netdev link0-stream1 -- fd

A stream that sits behind a hub already stays on that hub: that of ``-net`` (number 0, on which QEMU lets
``-netdev hubport`` join in: tried with 7.2), or one of the caller's own. All other arguments stay as they are, in their
order, the serial ports too. Only QEMU's default monitor is gone, as wherever a command line asks for any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qrapd.config import option_name
from qrapd.errors import UsageError
from qrapd.hub_mtu import LARGEST_MTU
from qrapd.qemu_arguments import FIRST_GENERATION, Endpoints, monitor
from qrapd.qrap_arguments import Explicit, Patched, strtol

__all__ = ["Wrapped", "wrap"]

_FIRST_HUB = 100  # far from hub 0, which `-net` makes, and from those that people number

_NIC = "link0"
_NIC_PORT = "link0-nic"
_STREAM = f"link0-stream{FIRST_GENERATION}"
_STREAM_PORT = f"link0-port{FIRST_GENERATION}"
# Not just the first generation's: a later one must find its names free, too.
_OUR_IDS = r"link0-(stream|port)\d+|qrapd-(user-)?qmp"

# The options that are looked at, and what the first part of their value is if it has no name: QEMU's implied_opt_name
_IMPLIED = {
    "-M": "type",
    "-chardev": "backend",
    "-device": "driver",
    "-machine": "type",
    "-name": "guest",
    "-net": "type",
    "-netdev": "type",
    "-nic": "type",
    "-set": "",
}
_TAKES_JSON = ("-device", "-netdev")


@dataclass(frozen=True)
class Wrapped:
    """A command line that awaits the numbers of its descriptors.

    :ivar name: the VM's, by the rules for such names.
    :ivar hub: the id of the hub behind which the stream sits; its port there is link0-port1.
    :ivar before, after: the arguments around the stream's netdev.
    :ivar port: what the NIC has in place of that netdev, if anything.
    :ivar lonely_port: the id of the hubport that lacks a NIC, if one does.
    :ivar machine: the value of ``-machine``, up to its first comma; "" is QEMU's default.
    """

    name: str
    hub: int
    before: tuple[str, ...]
    port: tuple[str, ...]
    after: tuple[str, ...]
    lonely_port: str | None
    machine: str

    def command_line(self, endpoints: Endpoints, binary: str) -> list[str]:
        """The whole argv. ``endpoints`` has one stream; its ``serial`` is not used."""
        (stream,) = endpoints.streams
        return [
            binary,
            *monitor("qrapd-qmp", endpoints.qmp),
            *monitor("qrapd-user-qmp", endpoints.user_qmp),
            # All virtio NICs: which of them is on the stream's hub is for QEMU to find out.
            *("-global", f"virtio-net-device.host_mtu={LARGEST_MTU}"),
            *self.before,
            *("-netdev", f"socket,id={_STREAM},fd={stream}"),
            *("-netdev", f"hubport,id={_STREAM_PORT},hubid={self.hub},netdev={_STREAM}"),
            *self.port,
            *self.after,
            *self._nic(binary),
        ]

    def _nic(self, binary: str) -> Iterator[str]:
        """At the end, so that no device loses the place on its bus that it would have without us."""
        if self.lonely_port is not None:
            yield from ("-device", f"{_nic_model(self.machine, binary)},netdev={self.lonely_port},id={_NIC}")


def wrap(wanted: Explicit | Patched, *, pid: int) -> Wrapped:
    """Prepare a command line of qrap's.

    :param pid: names a VM that QEMU's ``-name`` does not name.
    :raise UsageError: no network of the command line takes the stream, or more than one does; it uses ids that
        are ours; or it asks QEMU to go into the background.
    """
    arguments = wanted.argv[1:] if isinstance(wanted, Explicit) else wanted.arguments
    _refuse_daemon(arguments)
    options = [*_read(arguments)]
    stream = _find_stream(options, wanted.fd)
    joint = _find_joint(stream, options)
    others = [each for each in options if each is not stream and each is not joint]
    hub = _choose_hub(stream, joint, others)
    port, lonely = _attach(stream, joint, hub, others)
    keeps_its_id = stream.name != "-net" and joint is None
    _refuse_our_ids([*others, *([stream] if keeps_its_id else [])], with_nic=lonely is not None)
    left_out = {i for each in (stream, joint) if each is not None for i in (each.position, each.position + 1)}
    kept = [(i, word) for i, word in enumerate(arguments) if i not in left_out]
    return Wrapped(
        name=_name(options) or f"wrap-{pid}",
        hub=hub,
        before=tuple(word for i, word in kept if i < stream.position),
        port=port,
        after=tuple(word for i, word in kept if i > stream.position),
        lonely_port=lonely,
        machine=_machine(options),
    )


# --- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    """An option that is looked at, with its value; ``position`` is that of its name among the arguments."""

    position: int
    name: str
    value: str
    properties: Mapping[str, str]

    @property
    def id(self) -> str | None:
        return self.properties.get("id")

    @property
    def hub(self) -> int | None:
        """Of a hubport: its hub."""
        if self.name not in ("-netdev", "-nic") or self.properties.get("type") != "hubport":
            return None
        return strtol(self.properties.get("hubid", ""), 0)[0]


def _read(arguments: Sequence[str]) -> Iterator[_Option]:
    words = iter(range(len(arguments) - 1))
    for i in words:
        name = option_name(arguments[i])
        if name in _IMPLIED:
            next(words, None)
            value = arguments[i + 1]
            yield _Option(i, name, value, _properties(name, value))


def _properties(name: str, value: str) -> dict[str, str]:
    if name in _TAKES_JSON and value.startswith("{"):
        return dict(_flatten(_read_json(value)))
    properties: dict[str, str] = {}
    for key, text in _pairs(name, value):
        if (
            key != "id" or "id" not in properties
        ):  # the first id counts; of all else, the last (tried with 7.2)
            properties[key] = text
    return properties


def _pairs(name: str, value: str) -> Iterator[tuple[str, str]]:
    """What stands between commas; a doubled one is part of a value."""
    for n, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = part.replace("\0", ",").partition("=")
        if equals:
            yield key, text
        else:
            yield (_IMPLIED[name], key) if n == 0 else (key, "on")


_JSON_STRING = re.compile(r"""("(?:[^"\\]|\\.)*")|'((?:[^'\\]|\\.)*)'""")


def _read_json(text: str) -> object:
    """QEMU's JSON, which may have strings in single quotes. None for what is no JSON: QEMU will say so."""

    def requote(string: re.Match[str]) -> str:
        if string[1] is not None:
            return string[1]
        inner = re.sub(r'\\(.)|"', lambda each: {"\\'": "'", '"': '\\"'}.get(each[0], each[0]), string[2])
        return f'"{inner}"'

    try:
        return json.loads(_JSON_STRING.sub(requote, text))
    except (ValueError, RecursionError):
        return None


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """An object's members as QEMU's other notation has them: ``addr.type`` for the type in addr."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _flatten(member, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, str(value)


def _name(options: Iterable[_Option]) -> str | None:
    """QEMU's name for the VM, made to fit; None if it has none, or nothing of it fits."""
    names = [
        each.properties["guest"] for each in options if "guest" in each.properties and each.name == "-name"
    ]
    fitting = re.sub(r"[^a-z0-9]", "-", names[-1].lower()) if names else ""
    return fitting.strip("-")[:63].rstrip("-") or None


def _machine(options: Iterable[_Option]) -> str:
    types = (each.properties.get("type") for each in options if each.name in ("-machine", "-M"))
    return [each for each in ("", *types) if each is not None][-1]


# --- the stream ----------------------------------------------------------------------------------------


def _find_stream(options: Iterable[_Option], fd: int) -> _Option:
    """The option that makes a netdev on the stream."""
    found = [each for each in options if each.name in ("-netdev", "-nic", "-net") and _takes(each, fd)]
    if not found:
        raise UsageError(
            f"nothing in QEMU's arguments takes the stream from descriptor {fd}",
            hint=f"add `-netdev socket,id=net0,fd={fd} -device virtio-net-pci,netdev=net0`; "
            "a program that takes the stream in another way can be started by `qrap`, without supervision",
        )
    if len(found) > 1:
        words = " and ".join(f"`{each.name} {each.value}`" for each in found)
        raise UsageError(f"descriptor {fd} has one stream, and {words} all take it", hint="leave one of them")
    (stream,) = found
    if stream.name == "-netdev" and not stream.id:
        raise UsageError(f"`-netdev {stream.value}` has no id, and so no NIC can use it", hint="add id=net0")
    return stream


def _takes(option: _Option, fd: int) -> bool:
    properties = option.properties
    match properties.get("type"):
        case "socket":
            number = properties.get("fd", "")
        case "stream" if option.name == "-netdev" and properties.get("addr.type") == "fd":
            number = properties.get("addr.str", "")
        case _:
            return False
    return re.fullmatch(r"[0-9]+", number) is not None and strtol(number, 10) == (fd, False)


def _find_joint(stream: _Option, options: Iterable[_Option]) -> _Option | None:
    """The hubport that has brought the stream behind a hub of the caller's, if one has."""
    return next(
        (
            each
            for each in options
            if stream.name == "-netdev"
            and each.hub is not None
            and each.properties.get("netdev") == stream.id
        ),
        None,
    )


def _choose_hub(stream: _Option, joint: _Option | None, others: Collection[_Option]) -> int:
    if stream.name == "-net":
        return 0
    if joint is not None and joint.hub is not None:
        return joint.hub
    taken = {each.hub for each in others}
    hub = _FIRST_HUB
    while hub in taken:
        hub += 1
    return hub


def _attach(
    stream: _Option, joint: _Option | None, hub: int, others: Collection[_Option]
) -> tuple[tuple[str, ...], str | None]:
    """What gives the NIC its port on the hub, and the port that still lacks a NIC."""
    if stream.name == "-nic":
        return ("-nic", _as_hubport(stream, hub)), None
    if stream.name == "-net" or joint is not None:
        if _has_nic(hub, others):
            return (), None
        return ("-netdev", f"hubport,id={_NIC_PORT},hubid={hub}"), _NIC_PORT
    lonely = None if stream.id in _used_by_nics(others) else stream.id
    return ("-netdev", _as_hubport(stream, hub)), lonely


def _as_hubport(stream: _Option, hub: int) -> str:
    """A hubport that takes a netdev's place: with its id, and of ``-nic`` with all that is the NIC's."""
    if stream.value.startswith("{") or stream.properties["type"] == "stream":
        # QEMU makes those in JSON before those in its older notation, and with them what refers to them: stay there.
        return json.dumps({"type": "hubport", "id": stream.id, "hubid": hub}, separators=(",", ":"))
    kept = [
        f"{key}={text}".replace(",", ",,")
        for key, text in _pairs(stream.name, stream.value)
        if key not in ("type", "fd")
    ]
    return ",".join(["hubport", *kept, f"hubid={hub}"])


def _used_by_nics(options: Iterable[_Option]) -> set[str]:
    """The ids of netdevs that have a NIC."""
    used = set()
    for each in options:
        netdev = each.properties.get("netdev")
        if netdev is not None and (each.name == "-device" or _is_nic_option(each)):
            used.add(netdev)
        elif each.name == "-set" and (setting := re.fullmatch(r"device\.[^.]+\.netdev=(.*)", each.value)):
            used.add(setting[1])
    return used


def _has_nic(hub: int, options: Collection[_Option]) -> bool:
    """Whether there is a NIC on a hub, or on one that is joined to it."""
    if hub == 0 and any(_is_nic_option(each) and "netdev" not in each.properties for each in options):
        return True
    ports = [each for each in options if each.hub is not None]
    ids = {each.id for each in ports}
    peers = {each.properties["netdev"] for each in ports if "netdev" in each.properties}
    used = peers | _used_by_nics(options)
    return any(
        each.name == "-nic" or each.id in used or each.properties.get("netdev") in ids
        for each in ports
        if each.hub == hub
    )


def _is_nic_option(option: _Option) -> bool:
    return option.name == "-net" and option.properties.get("type") == "nic"


def _nic_model(machine: str, binary: str) -> str:
    if machine.startswith("s390-ccw") or "s390x" in binary.rpartition("/")[2]:
        return "virtio-net-ccw"
    return (
        "virtio-net-device" if machine == "microvm" else "virtio-net-pci"
    )  # a microvm has no PCI by default


# --- refusals ------------------------------------------------------------------------------------------


def _refuse_daemon(arguments: Iterable[str]) -> None:
    if "-daemonize" in map(option_name, arguments):
        raise UsageError(
            "-daemonize would take QEMU out of qrapd's hands",
            hint="remove it; to run in the background, run qrapd there (systemd, or your shell's &)",
        )


def _refuse_our_ids(options: Iterable[_Option], *, with_nic: bool) -> None:
    ours = re.compile(f"{_OUR_IDS}|{_NIC}|{_NIC_PORT}" if with_nic else _OUR_IDS)
    for each in options:
        if each.id is not None and ours.fullmatch(each.id):
            raise UsageError(
                f"`{each.name} {each.value}` has an id that qrapd needs for its own: {each.id}",
                hint="give it another id, and change what refers to it",
            )
