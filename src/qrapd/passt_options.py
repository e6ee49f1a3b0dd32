# SPDX-License-Identifier: GPL-2.0-or-later
"""passt's options as a VM's file has them: what they may be, and the command line that they make.

What can be wrong without asking anybody is found here: ports by passt's own grammar, addresses, MTU, names
of interfaces, host ports that two forwards of one VM would both bind. All other options are passed through;
`check_against_help` says which of them the installed passt has.

The limits were read in passt's conf.c and fwd_rule.c and then tried on the passts of 2023-03, 2025-05 and
2026-10. Where these differ, `command_line` writes the form that all of them take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails

from qrapd.errors import Problem

__all__ = [
    "HIGHEST_PORT",
    "MAXIMUM_MTU",
    "MINIMUM_MTU",
    "OWN_BUSINESS",
    "Forward",
    "PasstOptions",
    "PortRange",
    "PortSpec",
    "check_against_help",
    "command_line",
    "find_clashes",
    "parse_ports",
    "read_help",
]

Address: TypeAlias = IPv4Address | IPv6Address
Interval: TypeAlias = tuple[int, int]

HIGHEST_PORT = 65535
"""The last port of TCP and UDP (RFC 9293, RFC 768)."""

MINIMUM_MTU = 68
"""Bytes; every IPv4 link carries as much (RFC 791). passt of 2023 refuses less, newer ones warn."""

MAXIMUM_MTU = 65521
"""Bytes; passt from 2025 on refuses more (its longest frame less the Ethernet header; measured)."""

_LONGEST_SPEC = 8191
"""Characters; passt copies a spec into a buffer of BUFSIZ = 8192 bytes which cuts it (conf.c)."""

_LONGEST_INTERFACE = 15
"""Bytes; the kernel's IFNAMSIZ is 16 with the NUL (linux/if.h)."""

_SURELY_NOT_EPHEMERAL: Interval = (1, 32767)
"""The ports that `all` takes in every passt: the kernel's ephemeral ports start at 32768 (ip-sysctl)."""

OWN_BUSINESS: Mapping[str, str] = {
    "fd": "qrapd hands passt its socket itself",
    "socket": "qrapd hands passt its socket itself, or takes one from the link's `source`",
    "socket_path": "qrapd hands passt its socket itself, or takes one from the link's `source`",
    "vhost_user": 'the link\'s `mode` decides that: write mode = "vhost-user" in [[link]]',
    "foreground": "qrapd always runs passt in the foreground, in order to see it end",
    "one_off": "qrapd gives every connection a passt of its own",
    "pid": "qrapd started passt and knows its process; `qrapd ps` shows it",
    "conf_path": "qrapd keeps the forwards of a running passt itself",
    "stderr": "passt's lines come as events of qrapd already",
    "log_file": "passt would write there only, and its lines come as events of qrapd",
    "log_size": "there is no log file: passt's lines come as events of qrapd",
    "help": "passt would print its help and end",
    "version": "passt would print its version and end; `qrapd doctor` shows it",
    "print_capabilities": "passt would print its capabilities and end; `qrapd doctor` shows them",
}
"""Options that a VM's file cannot set, each with the reason."""


# Ports, by the grammar of passt's conf_ports()


class PortRange(NamedTuple):
    """Host ports ``first`` to ``last``, forwarded to the guest's from ``target`` on."""

    first: int
    last: int
    target: int

    def __str__(self) -> str:
        source = _interval_text((self.first, self.last))
        if self.target == self.first:
            return source
        return f"{source}:{_interval_text((self.target, self.target + self.last - self.first))}"


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
        chunks = [str(ports) for ports in self.ranges]
        chunks += [f"~{_interval_text(excluded)}" for excluded in self.exclusions]
        if self.all and not chunks:
            chunks = ["~0" if place else "all"]
        ports = ",".join(chunks) or "none"
        return f"{place}/{ports}" if place else ports

    def host_ports(self) -> list[Interval]:
        """Return the host's ports that passt must bind, as sorted (first, last); none for `all`."""
        return _subtract(sorted((ports.first, ports.last) for ports in self.ranges), self.exclusions)


def parse_ports(text: str) -> PortSpec:
    """Return what ``text`` asks passt to forward; raise ValueError that says what is wrong and a right form.

    Stricter than passt in what passt takes by accident: signs and spaces before numbers, an empty address,
    a spec that forwards nothing.
    """
    if text == "none":
        return PortSpec()
    _refuse_odd_text(text)
    place, slash, ports = text.partition("/")
    if not slash:
        return _parse_list(text, None, None)
    if ports in ("tcp", "udp"):
        raise ValueError(f'the key says the protocol: write "{place}" in {ports}_ports')
    return _parse_list(ports, *_parse_place(place))


def _refuse_odd_text(text: str) -> None:
    if not text:
        raise ValueError('is empty: write a port such as "8080:80", or "none"')
    if len(text) > _LONGEST_SPEC:
        raise ValueError(
            f"is {len(text)} characters long and passt reads {_LONGEST_SPEC}: write it as several specs"
        )
    if not text.isprintable() or " " in text:
        raise ValueError('holds a space or an unprintable character: write for example "22,8080:80"')


def _parse_place(place: str) -> tuple[Address | None, str | None]:
    """Split what stands before the slash into address and interface."""
    host, percent, interface = place.partition("%")
    if percent:
        _check_interface(interface)
    elif not host:
        raise ValueError("there is no address before the '/': write for example \"127.0.0.1/2222:22\"")
    # A star for every address, and brackets, are forms of newer passts; see PortSpec.__str__
    address = None if host in ("", "*") else _listening_address(host)
    return address, interface if percent else None


def _listening_address(host: str) -> Address:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
    except ValueError:
        raise ValueError(
            f"{host!r} before the '/' is no IP address: write for example "
            '"127.0.0.1/2222:22", "::1/2222:22" or "%eth0/2222:22"'
        ) from None
    # passt of 2023 cannot bind the IPv6 form of an IPv4 address; newer ones take it as IPv4 (measured)
    return getattr(address, "ipv4_mapped", None) or address


def _parse_list(ports: str, address: Address | None, interface: str | None) -> PortSpec:
    """Parse the comma-separated part."""
    ranges: list[PortRange] = []
    exclusions: list[Interval] = []
    everything = False
    for chunk in ports.split(","):
        if chunk == "all":
            everything = True
        elif chunk.startswith("~"):
            exclusions.append(_parse_interval(chunk[1:], chunk, lowest=0))
        else:
            ranges.append(_parse_range(chunk))
    if everything and ranges:
        raise ValueError('"all" and single ports exclude each other: write "all", or only the ports')
    _refuse_overlap(ranges)
    # Merged, as passt of 2023 and 2025 refuses exclusions that overlap (measured)
    spec = PortSpec(address, interface, tuple(ranges), _merge(exclusions), not ranges)
    if not (spec.host_ports() or (spec.all and _subtract([(1, HIGHEST_PORT)], spec.exclusions))):
        raise ValueError('excludes every port that it forwards: leave some, as in "5-25,~10-20"')
    return spec


def _parse_range(chunk: str) -> PortRange:
    """Parse ``first[-last][:target[-target]]``."""
    if chunk == "auto":
        raise ValueError('"auto" is for pasta only: name the ports, or write "all"')
    if chunk == "none":
        raise ValueError('"none" stands alone: write "none", or only the ports')
    source, colon, target = chunk.partition(":")
    if colon and "." in source and _is_address(source):
        raise ValueError(f"an address ends with '/', not ':': write \"{source}/{target}\"")
    first, last = _parse_interval(source, chunk)
    if not colon:
        return PortRange(first, last, first)
    target_first, target_last = _parse_interval(target, chunk)
    if target_last - target_first != last - first:
        fitting = _interval_text((target_first, target_first + last - first))
        raise ValueError(
            f"{source} and {target} are not equally many ports: "
            + (f'write "{source}:{fitting}"' if target_first + last - first <= HIGHEST_PORT else _HOW_MAPPED)
        )
    return PortRange(first, last, target_first)


_HOW_MAPPED = 'write as many on both sides, as in "22-80:32-90"'


def _parse_interval(text: str, chunk: str, lowest: int = 1) -> Interval:
    """Parse ``first[-last]``; ``chunk`` is what the message quotes."""
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if match is None:
        raise ValueError(
            f"{chunk!r} is no port and no range of ports: write for example "
            '"8080", "8080:80", "22-80:32-90", "5-25,~10-20" or "127.0.0.1/2222:22"'
        )
    first = _parse_port(match[1], lowest)
    last = first if match[2] is None else _parse_port(match[2], lowest)
    if last < first:
        raise ValueError(f'the range {first}-{last} runs backwards: write "{last}-{first}"')
    return first, last


def _parse_port(digits: str, lowest: int) -> int:
    # By length first: Python refuses to convert thousands of digits
    number = int(digits) if len(digits.lstrip("0")) <= len(str(HIGHEST_PORT)) else HIGHEST_PORT + 1
    if not lowest <= number <= HIGHEST_PORT:
        shown = digits if len(digits) <= 10 else f"{digits[:10]}..."
        raise ValueError(f"{shown} is no port: write a number from 1 to {HIGHEST_PORT}")
    return number


def _refuse_overlap(ranges: Iterable[PortRange]) -> None:
    """Every passt refuses a host port that one spec names twice, in its own way (measured)."""
    previous: PortRange | None = None
    for ports in sorted(ranges):
        if previous is not None and ports.first <= previous.last:
            twice = _interval_text((ports.first, min(ports.last, previous.last)))
            raise ValueError(f"forwards host port {twice} twice: name each host port once")
        previous = ports


# Intervals of ports, both ends included


def _interval_text(interval: Interval) -> str:
    first, last = interval
    return str(first) if first == last else f"{first}-{last}"


def _merge(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the same ports, sorted and apart, without port 0, which passt never forwards."""
    merged: list[Interval] = []
    for first, last in sorted((max(first, 1), last) for first, last in intervals if last > 0):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _subtract(intervals: Iterable[Interval], exclusions: Iterable[Interval]) -> list[Interval]:
    """Return ``intervals`` without ``exclusions``."""
    left = list(intervals)
    for exclusion in exclusions:
        left = [piece for interval in left for piece in _cut(interval, exclusion)]
    return left


def _cut(interval: Interval, exclusion: Interval) -> list[Interval]:
    first, last = interval
    if exclusion[1] < first or last < exclusion[0]:
        return [interval]
    pieces = ((first, exclusion[0] - 1), (exclusion[1] + 1, last))
    return [piece for piece in pieces if piece[0] <= piece[1]]


def _intersect(ours: Iterable[Interval], theirs: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the ports in both, sorted and apart."""
    others = list(theirs)
    common = ((max(a[0], b[0]), min(a[1], b[1])) for a in ours for b in others)
    return _merge(piece for piece in common if piece[0] <= piece[1])


# Clashes between forwards

Forward: TypeAlias = tuple[str, str, PortSpec]
"""The key's path (``link[0].passt.tcp_ports[1]``), the protocol (tcp, udp) and what is forwarded."""


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
    for forward in forwards:
        problems += [problem for earlier in seen if (problem := _clash(earlier, forward)) is not None]
        seen.append(forward)
    return problems


def _clash(earlier: Forward, later: Forward) -> Problem | None:
    first_key, first_protocol, first = earlier
    key, protocol, spec = later
    if protocol != first_protocol or not _listeners_meet(first, spec):
        return None
    if first.all or spec.all:
        if _passt_of(first_key) != _passt_of(key):
            return None
        common = _intersect(_all_ports(first), _all_ports(spec))
        how = "exclude them from the wider one with '~', or give one of the two another address"
    else:
        common = _intersect(first.host_ports(), spec.host_ports())
        how = "give one of the two other host ports or another address"
    if not common:
        return None
    ports = ", ".join(_interval_text(piece) for piece in common[:5]) + (", ..." if len(common) > 5 else "")
    return Problem(
        key=key,
        reason=f"{protocol} port {ports} of the host is forwarded by {first_key} already",
        value=str(spec),
        hint=how,
    )


def _passt_of(key: str) -> str:
    """Return the part of a forward's key that names its passt: all but the last name."""
    return key.rpartition(".")[0]


def _all_ports(spec: PortSpec) -> list[Interval]:
    return _subtract([_SURELY_NOT_EPHEMERAL], spec.exclusions) if spec.all else spec.host_ports()


def _listeners_meet(one: PortSpec, other: PortSpec) -> bool:
    if one.interface is not None and other.interface is not None and one.interface != other.interface:
        return False
    if one.address is None or other.address is None or one.address == other.address:
        return True
    if one.address.version != other.address.version:
        return False
    return one.address.is_unspecified or other.address.is_unspecified


# Values of other options


def _check_interface(name: str) -> str:
    """Raise ValueError for a name that no interface can have (dev_valid_name() in Linux's net/core/dev.c)."""
    if not 0 < len(name.encode(errors="surrogateescape")) <= _LONGEST_INTERFACE:
        raise ValueError(
            f'{name!r} is no interface\'s name: write 1 to {_LONGEST_INTERFACE} bytes, as in "eth0"'
        )
    if name in (".", "..") or any(letter in "/:" or letter.isspace() for letter in name):
        raise ValueError(f'{name!r} is no interface\'s name: write one that `ip link` shows, as in "eth0"')
    return name


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _parse_address(text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError('is no IP address: write for example "192.0.2.1" or "2001:db8::1"') from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError(
            'has an interface in it, which passt does not take here: write it without the "%..."'
        )
    return address


def _check_guest_address(text: str) -> str:
    """An address for --address; a prefix length is allowed (passt takes one since 2026)."""
    bare, slash, length = text.partition("/")
    address = _parse_address(bare)
    if slash and not (re.fullmatch(r"[0-9]{1,3}", length) and int(length) <= address.max_prefixlen):
        raise ValueError(
            f'has no good prefix length: write "{bare}/N" with N from 0 to {address.max_prefixlen}'
        )
    if _is_special(address, loopback=True, multicast=True):
        raise ValueError('cannot be a guest\'s address: write a unicast one such as "192.0.2.15"')
    return text


def _check_router(text: str) -> str:
    if _is_special(_parse_address(text), loopback=True, multicast=True):
        raise ValueError(
            "cannot be a router's or a resolver's address: write a unicast one, as \"192.0.2.1\""
        )
    return text


def _check_source(text: str) -> str:
    address = _parse_address(text)
    # passt takes 127.0.0.1 here, but not ::1 (measured)
    if _is_special(address, loopback=address.version == 6, multicast=True):
        raise ValueError('cannot be a source address: write one of the host\'s own, as "192.0.2.1"')
    return text


def _check_resolver(text: str) -> str:
    if text != "none":
        _parse_address(text)
    return text


def _is_special(address: Address, *, loopback: bool, multicast: bool) -> bool:
    """True for what passt refuses: no address at all, broadcast, IPv4 within IPv6, and what is asked for."""
    if address.is_unspecified or (loopback and address.is_loopback) or (multicast and address.is_multicast):
        return True
    if isinstance(address, IPv4Address):
        return address == IPv4Address("255.255.255.255")
    return address.ipv4_mapped is not None or int(address) >> 32 == 0


def _check_domain(text: str) -> str:
    # 254: a name of 253 letters (RFC 1035) with a final dot
    if not 0 < len(text) <= 254 or not text.isprintable() or " " in text:
        raise ValueError('is no domain: write for example "example.org", or "none" for no search list')
    return text


def _netmask(value: object, info: ValidationInfo) -> str:
    if any("/" in text for text in info.data.get("address", ()) if ":" not in text):
        raise ValueError("is said by `address` already: leave out one of the two")
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        if re.fullmatch(r"[0-9]{1,2}", text) and int(text) <= 32:
            return text
        if _is_address(text) and ":" not in text and _is_contiguous(int(IPv4Address(text))):
            return text
    raise ValueError('is no netmask: write "255.255.255.0" or 24')


def _is_contiguous(mask: int) -> bool:
    inverted = mask ^ 0xFFFFFFFF
    return inverted & (inverted + 1) == 0


def _mtu(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 0 or MINIMUM_MTU <= value <= MAXIMUM_MTU:
            return value
        raise ValueError(
            f"is no MTU for passt: write {MINIMUM_MTU} to {MAXIMUM_MTU} bytes, or 0 to announce none"
        )
    raise ValueError("is not a number: write bytes without quotes, as in 1500")


def _mac_address(value: object) -> str:
    text = _text(value)
    if re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text) is None:
        raise ValueError('is no MAC address: write six pairs, as in "52:54:00:12:34:56"')
    if int(text[:2], 16) & 1 or not text.strip("0:"):
        raise ValueError(
            'is a group or null address, not a station\'s: write one such as "52:54:00:12:34:56"'
        )
    return text


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("is a switch: write true or false, without quotes")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError('is not a text: write it in quotes, as in "eth0"')
    if "\0" in value:
        raise ValueError("holds a NUL, which no program's argument can: write it without")
    return value


def _interface(value: object) -> str:
    return _check_interface(_text(value))


def _as_tuple(value: object) -> object:
    """A single value stands for a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _once_per_family(texts: tuple[str, ...]) -> tuple[str, ...]:
    versions = [ip_address(text.partition("/")[0]).version for text in texts]
    for version in (4, 6):
        if versions.count(version) > 1:
            raise ValueError(f"holds several IPv{version} addresses and passt takes one: leave one of them")
    return texts


def _none_alone(texts: tuple[str, ...]) -> tuple[str, ...]:
    if "none" in texts and len(texts) > 1:
        raise ValueError('"none" stands alone: write "none", or only the others')
    return texts


def _split_domains(value: object) -> object:
    return tuple(value.split()) or ("",) if isinstance(value, str) else _as_tuple(value)


def _port_text(value: object, info: ValidationInfo) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('is neither a port nor a text: write 8080 or "8080:80"')
    text = str(value)
    address = parse_ports(text).address
    only = _only_version(info.data)
    if address is not None and only is not None and address.version != only:
        raise ValueError(
            f"needs IPv{address.version} and the link has ipv{only}_only: leave out one of the two"
        )
    return text


def _enabled_ports(texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    protocol = str(info.field_name).partition("_")[0]
    if info.data.get(f"no_{protocol}") and any(text != "none" for text in texts):
        raise ValueError(f"forwards ports while no_{protocol} is true: leave out one of the two")
    return _none_alone(texts)


def _only_version(data: Mapping[str, Any]) -> int | None:
    return 4 if data.get("ipv4_only") else 6 if data.get("ipv6_only") else None


def _not_both(value: bool, info: ValidationInfo) -> bool:
    if value and info.data.get("ipv4_only"):
        raise ValueError("excludes ipv4_only: write one of the two, or neither for both families")
    return value


def _outbound_interface(version: int) -> Callable[[object, ValidationInfo], str]:
    def check(value: object, info: ValidationInfo) -> str:
        if _only_version(info.data) not in (None, version):
            raise ValueError(f"is for IPv{version}, which the link does not have: leave it out")
        return _interface(value)

    return check


def _plain_value(value: object) -> object:
    """Any other option's value: a switch, a number, a text, or a list of the latter two."""
    if isinstance(value, list | tuple):
        if not all(isinstance(item, int | str) and not isinstance(item, bool) for item in value):
            raise ValueError('holds what is neither text nor number: write for example ["one", "two"]')
        return tuple(_text(item) if isinstance(item, str) else item for item in value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return value
    raise ValueError("is no value for an option of passt: write true, a number, a text in quotes, or a list")


# The table of a VM's file

_NAME_SCHEMA: dict[str, Any] = {"pattern": "^[a-z0-9_]+$", "not": {"enum": sorted(OWN_BUSINESS)}}
_TEXT_SCHEMA: dict[str, Any] = {"type": "string"}
_PORT_SCHEMA: dict[str, Any] = {"type": ["string", "integer"], "minimum": 1, "maximum": HIGHEST_PORT}
_OTHER_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": ["boolean", "integer", "string"]},
        {"type": "array", "items": {"type": ["integer", "string"]}},
    ]
}


def _or_list(schema: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [schema, {"type": "array", "items": schema}]})


def _each(check: Callable[[str], str]) -> BeforeValidator:
    return BeforeValidator(lambda value: check(_text(value)))


_Flag: TypeAlias = Annotated[bool, BeforeValidator(_flag)]
_Interface: TypeAlias = Annotated[str, BeforeValidator(_interface)]
_Ports: TypeAlias = Annotated[
    tuple[Annotated[str, BeforeValidator(_port_text)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_enabled_ports),
    _or_list(_PORT_SCHEMA),
]
_GuestAddresses: TypeAlias = Annotated[
    tuple[Annotated[str, _each(_check_guest_address)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_once_per_family),
    _or_list(_TEXT_SCHEMA),
]
_Routers: TypeAlias = Annotated[
    tuple[Annotated[str, _each(_check_router)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_once_per_family),
    _or_list(_TEXT_SCHEMA),
]
_Sources: TypeAlias = Annotated[
    tuple[Annotated[str, _each(_check_source)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_once_per_family),
    _or_list(_TEXT_SCHEMA),
]
_Resolvers: TypeAlias = Annotated[
    tuple[Annotated[str, _each(_check_resolver)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_none_alone),
    _or_list(_TEXT_SCHEMA),
]
_Domains: TypeAlias = Annotated[
    tuple[Annotated[str, _each(_check_domain)], ...],
    BeforeValidator(_split_domains),
    AfterValidator(_none_alone),
    _or_list(_TEXT_SCHEMA),
]
_Netmask: TypeAlias = Annotated[
    str,
    BeforeValidator(_netmask),
    WithJsonSchema({"type": ["string", "integer"], "minimum": 0, "maximum": 32}),
]
_Mtu: TypeAlias = Annotated[
    int,
    BeforeValidator(_mtu),
    WithJsonSchema(
        {"anyOf": [{"const": 0}, {"type": "integer", "minimum": MINIMUM_MTU, "maximum": MAXIMUM_MTU}]}
    ),
]


class PasstOptions(BaseModel):
    """The table ``[link.passt]``: passt(1)'s long options, with underscores.

    Options without a field here are kept as they are (``model_extra``); `check_against_help` judges them.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        strict=True,
        json_schema_extra={"propertyNames": _NAME_SCHEMA},
    )
    __pydantic_extra__: dict[
        str, Annotated[Any, BeforeValidator(_plain_value), WithJsonSchema(_OTHER_SCHEMA)]
    ]

    # In this order on the command line; a field's check sees the fields above it
    ipv4_only: _Flag = Field(False, description="No IPv6")
    ipv6_only: Annotated[_Flag, AfterValidator(_not_both)] = Field(False, description="No IPv4")
    no_tcp: _Flag = Field(False, description="No TCP")
    no_udp: _Flag = Field(False, description="No UDP")
    no_icmp: _Flag = Field(False, description="No ICMP and ICMPv6; implies no_ndp")
    no_dhcp: _Flag = Field(False, description="No DHCP server")
    no_ndp: _Flag = Field(False, description="No answers to NDP")
    no_dhcpv6: _Flag = Field(False, description="No DHCPv6 server")
    no_ra: _Flag = Field(False, description="No router advertisements")
    no_map_gw: _Flag = Field(False, description="The gateway's address does not lead to the host")
    no_dhcp_dns: _Flag = Field(False, description="No resolvers by DHCP, DHCPv6 and NDP")
    no_dhcp_search: _Flag = Field(False, description="No search list by DHCP, DHCPv6 and NDP")
    mtu: _Mtu | None = Field(None, description="MTU for the guest in bytes; 0 announces none")
    address: _GuestAddresses = Field((), description="The guest's address: one of IPv4, one of IPv6, or both")
    netmask: _Netmask | None = Field(None, description="IPv4 netmask, as 255.255.255.0 or 24")
    mac_addr: Annotated[str, BeforeValidator(_mac_address)] | None = Field(
        None, description="The MAC address that passt itself uses towards the guest"
    )
    gateway: _Routers = Field(
        (), description="The guest's default gateway: one of IPv4, one of IPv6, or both"
    )
    interface: _Interface | None = Field(
        None, description="The host's interface to take addresses and routes from"
    )
    outbound: _Sources = Field((), description="Source address of outbound traffic, one per family")
    outbound_if4: Annotated[str, BeforeValidator(_outbound_interface(4))] | None = Field(
        None, description="The host's interface for outbound IPv4"
    )
    outbound_if6: Annotated[str, BeforeValidator(_outbound_interface(6))] | None = Field(
        None, description="The host's interface for outbound IPv6"
    )
    dns: _Resolvers = Field((), description='Resolvers for the guest, or "none"')
    dns_forward: _Routers = Field((), description="Addresses at which the guest finds the host's resolver")
    search: _Domains = Field((), description='Search domains for the guest, or "none"')
    tcp_ports: _Ports = Field((), description='Forwards to the guest, as ["8080:80", "127.0.0.1/2222:22"]')
    udp_ports: _Ports = Field((), description='Forwards to the guest, as ["5353:53"]')

    @model_validator(mode="wrap")
    @classmethod
    def _check_names(cls, data: Any, handler: ModelWrapValidatorHandler[PasstOptions]) -> PasstOptions:
        """Find all wrong names and values at once, each at its own key, in the order of the file.

        A single value that stands for a list keeps the key that the file has, without an index.
        """
        if not isinstance(data, dict):
            return handler(data)
        wrong = {name: reason for name in data if (reason := _wrong_name(str(name))) is not None}
        details = [
            InitErrorDetails(
                type="value_error", loc=(str(name),), input=data[name], ctx={"error": ValueError(reason)}
            )
            for name, reason in wrong.items()
        ]
        try:
            options = handler({name: value for name, value in data.items() if name not in wrong})
        except ValidationError as failure:
            details += [
                InitErrorDetails(
                    type=error["type"],
                    loc=error["loc"] if isinstance(data[error["loc"][0]], list) else error["loc"][:1],
                    input=error["input"],
                    ctx=error.get("ctx", {}),
                )
                for error in failure.errors(include_url=False)
            ]
        if details:
            names = [str(name) for name in data]
            details.sort(key=lambda detail: names.index(str(detail.get("loc", ("",))[0])))
            raise ValidationError.from_exception_data(cls.__name__, details)
        return options

    def forwards(self, key: str) -> Iterator[Forward]:
        """Yield what `find_clashes` needs; ``key`` is the path to this table (``link[0].passt``).

        With one family only, "every address" is that family's.
        """
        wildcard: Address | None = None
        if self.ipv4_only or self.ipv6_only:
            wildcard = IPv4Address(0) if self.ipv4_only else IPv6Address(0)
        for protocol, texts in (("tcp", self.tcp_ports), ("udp", self.udp_ports)):
            for index, text in enumerate(texts):
                spec = parse_ports(text)
                if spec.address is None and wildcard is not None:
                    spec = replace(spec, address=wildcard)
                yield f"{key}.{protocol}_ports[{index}]", protocol, spec


def _wrong_name(name: str) -> str | None:
    """Return why there can be no option of this name, or None."""
    underscored = name.lstrip("-").replace("-", "_")
    if underscored in OWN_BUSINESS:
        return f"{OWN_BUSINESS[underscored]}: leave this out"
    if re.fullmatch(r"[a-z0-9_]+", name):
        return None
    if re.fullmatch(r"[a-z0-9_]+", underscored):
        return f"passt's options are written with underscores here: write {underscored}"
    return "is no name of an option: write one from `passt --help`, with underscores for the dashes"


# The installed passt

_OPTION_LINE = re.compile(
    r"\s+(?:-\w,\s+)?"  # the short form
    r"(?P<names>--[a-z0-9][a-z0-9-]*(?:, --[a-z0-9][a-z0-9-]*)*)"
    r"(?:[ =](?P<value>[^\s-]\S*))?"
    r"\s*?(?:\t| {2,}|$)"
)


def read_help(text: str) -> dict[str, bool]:
    """Return the long options that passt's help names, without dashes, and whether each takes a value.

    ``text`` is what ``passt --help`` said, standard output and standard error together; the 2023 build's
    complaints about the missing system log, between the lines, do no harm.

    passt of 2025-05 leaves without flushing: read through a pipe, its help ends after 4096 bytes, before
    --tcp-ports and --udp-ports (measured). No passt is without these two, so they are always in the result.
    """
    found = {"tcp-ports": True, "udp-ports": True}
    whole_lines, _, _ = text.rpartition("\n")
    for line in whole_lines.splitlines():
        if match := _OPTION_LINE.match(line):
            for name in match["names"].split(", "):
                found[name.removeprefix("--")] = match["value"] is not None
    return found


def check_against_help(
    options: PasstOptions, help_options: Mapping[str, bool], binary: str, key: str
) -> list[Problem]:
    """Return a Problem for each option that ``binary`` lacks or that it takes in another way.

    ``help_options`` is what `read_help` found, ``key`` the path to the table (``link[0].passt``).
    """
    problems: list[Problem] = []
    for name, value in _given(options):
        option = name.replace("_", "-")
        reason: str | None = None
        hint: str | None = None
        if option not in help_options:
            reason = f"{binary} has no option --{option}"
            hint = _nearest_name(name, help_options) or f"`{binary} --help` lists those it has"
        elif value is True and help_options[option]:
            reason = f"--{option} of {binary} takes a value: write {name} = and the value, in quotes"
        elif not isinstance(value, bool) and value != () and not help_options[option]:
            reason = f"--{option} of {binary} takes no value: write {name} = true"
        if reason is not None:
            problems.append(Problem(key=f"{key}.{name}", reason=reason, value=_shown(value), hint=hint))
    return problems


def _nearest_name(name: str, help_options: Mapping[str, bool]) -> str | None:
    import difflib  # only where something is wrong: it costs start-up time

    known = [option.replace("-", "_") for option in help_options]
    near = difflib.get_close_matches(name, [option for option in known if option not in OWN_BUSINESS], 1)
    return f"did you mean {near[0]}?" if near else None


def _shown(value: object) -> str:
    """Return a value as the file would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _given(options: PasstOptions) -> list[tuple[str, Any]]:
    """Return names and values of what the file says, fields first, then the others in the file's order."""
    fields = [(name, getattr(options, name)) for name in type(options).model_fields]
    given = [(name, value) for name, value in fields if name in options.model_fields_set]
    return given + list((options.model_extra or {}).items())


def command_line(options: PasstOptions) -> list[str]:
    """Return the arguments for passt, in long form; the same options always give the same arguments.

    Several ``--tcp-ports`` add up in every passt (measured). Ports, and an address with its prefix length,
    are written in the form that passts without the newer one understand too.
    """
    arguments: list[str] = []
    for name, value in _given(options):
        option = f"--{name.replace('_', '-')}"
        if name == "address":
            arguments += _address_arguments(value)
        elif value is True:
            arguments.append(option)
        elif value is not False and value is not None:
            for item in value if isinstance(value, tuple) else (value,):
                arguments += [
                    option,
                    str(parse_ports(item)) if name in ("tcp_ports", "udp_ports") else str(item),
                ]
    return arguments


def _address_arguments(texts: tuple[str, ...]) -> list[str]:
    """passt takes ADDR/LENGTH since 2026; --netmask does so for IPv4, and IPv6 gets 64 (passt(1))."""
    arguments: list[str] = []
    for text in texts:
        address, _, length = text.partition("/")
        if ":" in address:
            arguments += ["--address", address if length == "64" else text]
        else:
            arguments += ["--address", address, *(["--netmask", length] if length else [])]
    return arguments
