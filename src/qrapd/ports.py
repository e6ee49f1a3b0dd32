# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports that passt forwards: its grammar of them, and host ports that two forwards would both bind.

The grammar was read in passt's conf.c and fwd_rule.c, and then tried on the passts of 2023-03, 2025-05 and
2026-10. Where these differ, ``str()`` of a spec is the form that all of them take.

An error is a ValueError that says "what is wrong; what to write".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple, TypeAlias

from qrapd.errors import Problem

__all__ = [
    "HIGHEST_PORT",
    "PORTS_PATTERN",
    "Address",
    "Forward",
    "PortRange",
    "PortSpec",
    "check_interface",
    "find_clashes",
    "one_family",
    "parse_ports",
    "read_forwards",
]

Address: TypeAlias = IPv4Address | IPv6Address
Interval: TypeAlias = tuple[int, int]
"""First and last, both included."""

HIGHEST_PORT = 65535
"""The last port of TCP and UDP (RFC 9293, RFC 768)."""

_LONGEST_SPEC = 8191
"""Characters; passt copies a spec into a buffer of BUFSIZ = 8192 bytes which cuts it (conf.c)."""

_LONGEST_INTERFACE = 15
"""Bytes; the kernel's IFNAMSIZ is 16 with the NUL (linux/if.h)."""

_SURELY_NOT_EPHEMERAL: Interval = (1, 32767)
"""The ports that `all` takes in every passt: the kernel's ephemeral ports start at 32768 (ip-sysctl)."""

_RANGE = r"([0-9]+)(?:-([0-9]+))?"
_LISTED = r"(all|~N|N(:N)?)".replace("N", "[0-9]+(-[0-9]+)?")

PORTS_PATTERN = rf"^(none|([^/]*/)?{_LISTED}(,{_LISTED})*)$"
"""What an editor can check of a spec: every right one matches."""


class PortRange(NamedTuple):
    """Host ports ``first`` to ``last``, forwarded to the guest's from ``target`` on."""

    first: int
    last: int
    target: int

    def __str__(self) -> str:
        source, length = _text((self.first, self.last)), self.last - self.first
        return (
            source if self.target == self.first else f"{source}:{_text((self.target, self.target + length))}"
        )


@dataclass(frozen=True)
class PortSpec:
    """What one ``--tcp-ports`` or ``--udp-ports`` asks for. Neither ranges nor ``all`` means ``none``.

    ``address`` None is every address, IPv4 and IPv6; ``interface`` None is every interface. ``all`` takes
    what is free of the non-ephemeral ports. ``exclusions`` are (first, last), sorted, apart from each other.
    """

    address: Address | None = None
    interface: str | None = None
    ranges: tuple[PortRange, ...] = ()
    exclusions: tuple[Interval, ...] = ()
    all: bool = False

    def __str__(self) -> str:
        """Return the spec in the form that every passt takes.

        Exclusions alone mean `all` without them. passt of 2023 and 2025 takes the word `all` only by itself;
        excluding port 0, which is never forwarded, says the same after an address.
        """
        place = "" if self.address is None else str(self.address)
        if self.interface is not None:
            place += f"%{self.interface}"
        chunks = [*map(str, self.ranges), *(f"~{_text(excluded)}" for excluded in self.exclusions)]
        if self.all and not chunks:
            chunks = ["~0" if place else "all"]
        ports = ",".join(chunks) or "none"
        return f"{place}/{ports}" if place else ports

    def bound(self, everything: Interval = _SURELY_NOT_EPHEMERAL) -> int:
        """Return the host's ports that passt binds, as bits: ``1 << port``. ``everything`` is what `all` stands for."""
        wanted = [everything] if self.all else [ports[:2] for ports in self.ranges]
        return _bits(wanted) & ~_bits(self.exclusions)


# --- sets of ports, as the bits of one number, with Python's own operators for union and the like -----


def _bits(intervals: Iterable[Interval]) -> int:
    bits = 0
    for first, last in intervals:
        bits |= (1 << last + 1) - (1 << first)
    return bits & ~1  # passt never forwards port 0


def _intervals(bits: int) -> tuple[Interval, ...]:
    return tuple((run.start(), run.end() - 1) for run in re.finditer("1+", f"{bits:b}"[::-1]))


def _text(interval: Interval) -> str:
    first, last = interval
    return str(first) if first == last else f"{first}-{last}"


# --- the grammar of passt's conf_ports() --------------------------------------------------------------


def parse_ports(text: str) -> PortSpec:
    """Return what ``text`` asks passt to forward, or raise ValueError.

    Stricter than passt in what passt takes by accident: signs and spaces before numbers, an empty address,
    a spec that forwards nothing.
    """
    if text == "none":
        return PortSpec()
    if not text:
        raise ValueError('is empty; write a port such as "8080:80", or "none"')
    if len(text) > _LONGEST_SPEC:
        raise ValueError(
            f"is {len(text)} characters long and passt reads {_LONGEST_SPEC}; write it as several specs"
        )
    if not text.isprintable() or " " in text:
        raise ValueError('holds a space or an unprintable character; write for example "22,8080:80"')
    place, slash, ports = text.rpartition("/")
    if place and ports in ("tcp", "udp"):
        raise ValueError(f'names the protocol, as the key does; write "{place}" in {ports}_ports')
    address, interface = _parse_place(place) if slash else (None, None)
    return _parse_list(ports, address, interface)


def _parse_place(place: str) -> tuple[Address | None, str | None]:
    """Split what stands before the slash into address and interface."""
    host, percent, interface = place.partition("%")
    if percent:
        check_interface(interface)
    elif not host:
        raise ValueError("has no address before the '/'; write for example \"127.0.0.1/2222:22\"")
    # A star for every address, and brackets, are forms of newer passts; see PortSpec.__str__
    address = None if host in ("", "*") else _parse_listener(host)
    return address, interface if percent else None


def _parse_listener(host: str) -> Address:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
    except ValueError:
        raise ValueError(
            f"has {host!r} before the '/', which is no IP address; "
            'write for example "127.0.0.1/2222:22", "::1/2222:22" or "%eth0/2222:22"'
        ) from None
    # passt of 2023 cannot bind the IPv6 form of an IPv4 address; newer ones take it as IPv4 (measured)
    return getattr(address, "ipv4_mapped", None) or address


def check_interface(name: str) -> str:
    """Return ``name``, or raise ValueError: no interface can have it (dev_valid_name() in Linux's net/core/dev.c)."""
    length = len(name.encode(errors="surrogateescape"))
    letters_fit = all(letter not in "/:\0" and not letter.isspace() for letter in name)
    if not 0 < length <= _LONGEST_INTERFACE or name in (".", "..") or not letters_fit:
        raise ValueError(
            f"has {name!r} for an interface's name; "
            f'write one that `ip link` shows, 1 to {_LONGEST_INTERFACE} bytes, as in "eth0"'
        )
    return name


def _parse_list(ports: str, address: Address | None, interface: str | None) -> PortSpec:
    """Parse the comma-separated part."""
    chunks = ports.split(",")
    ranges = [_parse_range(chunk) for chunk in chunks if chunk != "all" and not chunk.startswith("~")]
    exclusions = [_parse_interval(chunk[1:], chunk, 0) for chunk in chunks if chunk.startswith("~")]
    if "all" in chunks and ranges:
        raise ValueError('has both "all" and single ports; write "all", or only the ports')
    _refuse_overlap(ranges)
    # Merged, as passt of 2023 and 2025 refuses exclusions that overlap (measured)
    spec = PortSpec(address, interface, tuple(ranges), _intervals(_bits(exclusions)), not ranges)
    if not spec.bound(everything=(1, HIGHEST_PORT)):
        raise ValueError('excludes every port that it forwards; leave some, as in "5-25,~10-20"')
    return spec


def _refuse_overlap(ranges: Iterable[PortRange]) -> None:
    """Every passt refuses a host port that one spec names twice, in its own way (measured)."""
    bound = 0
    for ports in ranges:
        bits = _bits([ports[:2]])
        if twice := _intervals(bound & bits):
            raise ValueError(f"forwards host port {_text(twice[0])} twice; name each host port once")
        bound |= bits


def _parse_range(chunk: str) -> PortRange:
    """Parse ``first[-last][:target[-target]]``."""
    if chunk in ("auto", "none"):
        why = "which is for pasta only" if chunk == "auto" else "which stands alone"
        raise ValueError(f'has "{chunk}" in it, {why}; name the ports, or write "all" or "none"')
    host, colon, guest = chunk.partition(":")
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host) and colon:
        raise ValueError(f"has a ':' after the address; write \"{host}/{guest}\"")
    first, last = _parse_interval(host, chunk)
    target, target_last = _parse_interval(guest, chunk) if colon else (first, last)
    if target_last - target != last - first:
        fitting = (target, target + last - first)
        example = f"{host}:{_text(fitting)}" if fitting[1] <= HIGHEST_PORT else "22-80:32-90"
        raise ValueError(f'has {host} and {guest}, which are not equally many ports; write as in "{example}"')
    return PortRange(first, last, target)


def _parse_interval(text: str, chunk: str, lowest: int = 1) -> Interval:
    """Parse ``first[-last]``; ``chunk`` is what the message quotes."""
    match = re.fullmatch(_RANGE, text)
    if match is None:
        raise ValueError(
            f"has {chunk!r}, which is no port and no range of ports; write for example "
            '"8080", "8080:80", "22-80:32-90", "5-25,~10-20" or "127.0.0.1/2222:22"'
        )
    first = _parse_port(match[1], lowest)
    last = _parse_port(match[2] or match[1], lowest)
    if last < first:
        raise ValueError(f'has the range {text}, which runs backwards; write "{last}-{first}"')
    return first, last


def _parse_port(digits: str, lowest: int) -> int:
    # By length first: Python refuses to convert thousands of digits
    if len(digits.lstrip("0")) > len(str(HIGHEST_PORT)) or not lowest <= int(digits) <= HIGHEST_PORT:
        shown = digits if len(digits) <= 10 else f"{digits[:10]}..."
        raise ValueError(f"has {shown}, which is no port; write a number from 1 to {HIGHEST_PORT}")
    return int(digits)


# --- clashes between forwards -------------------------------------------------------------------------


class Forward(NamedTuple):
    """The key's path (``link[0].passt.tcp_ports[1]``), the protocol (tcp, udp) and what is forwarded."""

    key: str
    protocol: str
    spec: PortSpec


def read_forwards(table: Mapping[str, Any], key: str) -> Iterator[Forward]:
    """Yield the forwards of a table of passt's options as the file has it, but for those that cannot be read.

    ``key`` is the path to the table (``link[0].passt``). With one family only, "every address" is that family's.
    """
    wildcards = {None: None, 4: IPv4Address(0), 6: IPv6Address(0)}
    wildcard = wildcards[one_family(table)]
    for protocol in ("tcp", "udp"):
        value = table.get(f"{protocol}_ports", [])
        for index, text in enumerate(value if isinstance(value, list) else [value]):
            try:
                spec = parse_ports(str(text))
            except ValueError:
                continue
            path = f"{key}.{protocol}_ports" + (f"[{index}]" if isinstance(value, list) else "")
            yield Forward(path, protocol, replace(spec, address=spec.address or wildcard))


def one_family(table: Mapping[str, Any]) -> int | None:
    """Return 4 or 6 if passt's options leave one family only, else None."""
    return 4 if table.get("ipv4_only") is True else 6 if table.get("ipv6_only") is True else None


def find_clashes(forwards: Iterable[Forward]) -> list[Problem]:
    """Return a Problem for each pair of forwards that would bind the same host port, at the later key.

    Two listeners meet where the kernel says so: same protocol, addresses that overlap (no address is all of
    IPv4 and IPv6; 0.0.0.0 is all of IPv4 and :: all of IPv6, as passt makes its IPv6 sockets IPv6-only), and
    not bound to two different interfaces. For UDP this is the only place to notice: passt sets SO_REUSEADDR,
    so the second passt binds the port too, and takes it over in silence (measured, all versions).

    `all` skips ports that are taken, so it never clashes with another link's forwards; beside other forwards
    of the same passt it does, as passt itself refuses that.
    """
    problems: list[Problem] = []
    seen: list[Forward] = []
    for later in forwards:
        problems += [problem for earlier in seen if (problem := _clash(earlier, later)) is not None]
        seen.append(later)
    return problems


def _clash(earlier: Forward, later: Forward) -> Problem | None:
    if later.protocol != earlier.protocol or not _listeners_meet(earlier.spec, later.spec):
        return None
    skips = earlier.spec.all or later.spec.all
    if skips and _passt_of(earlier) != _passt_of(later):
        return None
    common = _intervals(earlier.spec.bound() & later.spec.bound())
    if not common:
        return None
    ports = ", ".join(map(_text, common[:5])) + (", ..." if len(common) > 5 else "")
    return Problem(
        later.key,
        f"forwards {later.protocol} port {ports} of the host, as {earlier.key} does",
        hint="exclude it from the wider one with '~', or give one of the two another address"
        if skips
        else "give one of the two another host port or another address",
    )


def _passt_of(forward: Forward) -> str:
    """Return the part of a forward's key that names its passt: all but the last name."""
    return forward.key.rpartition(".")[0]


def _listeners_meet(one: PortSpec, other: PortSpec) -> bool:
    if one.interface is not None and other.interface is not None and one.interface != other.interface:
        return False
    if one.address is None or other.address is None or one.address == other.address:
        return True
    if one.address.version != other.address.version:
        return False
    return one.address.is_unspecified or other.address.is_unspecified
