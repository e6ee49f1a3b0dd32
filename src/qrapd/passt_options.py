# SPDX-License-Identifier: GPL-2.0-or-later
"""passt's options as a VM's file has them: what they may be, and the command line that they make.

What can be wrong without asking anybody is found here. All other options are passed through;
`check_against_help` says which of them the installed passt has.

The limits were read in passt's conf.c and then tried on the passts of 2023-03, 2025-05 and 2026-10. Where these
differ, `command_line` writes the form that all of them take. An error says "what is wrong; what to write".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

from qrapd.errors import Problem
from qrapd.ports import HIGHEST_PORT, PORTS_PATTERN, Address, check_interface, one_family, parse_ports

__all__ = [
    "MAC_PATTERN",
    "MAXIMUM_MTU",
    "MINIMUM_MTU",
    "OWN_BUSINESS",
    "Mac",
    "PasstOptions",
    "Text",
    "check_against_help",
    "check_unicast",
    "command_line",
    "nearest",
    "read_help",
    "toml_key",
    "toml_text",
]

MINIMUM_MTU = 68
"""Bytes; every IPv4 link carries as much (RFC 791). passt of 2023 refuses less, newer ones warn."""

MAXIMUM_MTU = 65521
"""Bytes; passt from 2025 on refuses more (its longest frame less the Ethernet header; measured)."""

OWN_BUSINESS: Mapping[str, str] = {
    "fd": "qrapd hands passt its socket itself",
    "socket": "qrapd hands passt its socket itself, or takes one from the link's `source`",
    "socket_path": "qrapd hands passt its socket itself, or takes one from the link's `source`",
    "vhost_user": "the link's `mode` decides that",
    "foreground": "qrapd always runs passt in the foreground, in order to see it end",
    "one_off": "qrapd gives every connection a passt of its own",
    "pid": "qrapd started passt and knows its process",
    "conf_path": "qrapd keeps the forwards of a running passt itself",
    "stderr": "passt's lines come as events of qrapd already",
    "log_file": "passt would write there only, and its lines come as events of qrapd",
    "log_size": "there is no log file: passt's lines come as events of qrapd",
    "help": "passt would print its help and end",
    "version": "passt would print its version and end",
    "print_capabilities": "passt would print its capabilities and end",
}
"""Options that a VM's file cannot set, each with the reason."""


# --- values -------------------------------------------------------------------------------------------


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no argument of a program can; leave it out")
    return text


def _check_mac(text: str) -> str:
    if re.fullmatch(MAC_PATTERN, text) is None:
        raise ValueError("is not a MAC address; write six bytes like 52:54:00:12:34:56")
    if int(text[:2], 16) & 1 or not text.strip("0:"):
        raise ValueError(
            "is not a MAC address that one NIC can have; write one with an even first byte, not all zero"
        )
    return text.lower()


def _parse_address(text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError('is not an IP address; write for example "192.0.2.1" or "2001:db8::1"') from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError(
            'names an interface, which passt does not take here; leave out the "%" and what follows'
        )
    return address


def check_unicast(text: str, *, loopback: bool = False) -> str:
    """Return ``text``, or raise ValueError: it is no address that one host can have towards others.

    The rules are passt's, which takes 127.0.0.1 in some places (``loopback``), but ::1 in none (measured).
    """
    address = _parse_address(text)
    if isinstance(address, IPv4Address):
        wrong = address == IPv4Address("255.255.255.255") or (address.is_loopback and not loopback)
    else:
        # An IPv4 address within an IPv6 one, in the mapped or in the older form; :: and ::1 are of the latter
        wrong = address.ipv4_mapped is not None or int(address) >> 32 == 0
    if wrong or address.is_unspecified or address.is_multicast:
        raise ValueError('is no address of a host on the network; write one such as "192.0.2.15"')
    return text


def _check_guest_address(text: str) -> str:
    """An address for --address; a prefix length is allowed (passt takes one since 2026)."""
    bare, slash, length = text.partition("/")
    check_unicast(bare)
    longest = _parse_address(bare).max_prefixlen
    if slash and not (re.fullmatch(r"[0-9]{1,3}", length) and int(length) <= longest):
        raise ValueError(f'has no good prefix length; write "{bare}/N" with N from 0 to {longest}')
    return text


def _check_source(text: str) -> str:
    return check_unicast(text, loopback=True)


def _check_resolver(text: str) -> str:
    return text if text == "none" else str(_parse_address(text))


def _check_domain(text: str) -> str:
    # 254: a name of 253 letters (RFC 1035) with a final dot
    if not 0 < len(text) <= 254 or not text.isprintable() or " " in text:
        raise ValueError('is not a domain; write for example "example.org", or "none" for no search list')
    return text


def _check_netmask(value: object, info: ValidationInfo) -> str:
    if any("/" in text for text in info.data.get("address", ()) if ":" not in text):
        raise ValueError("is said by `address` already; leave out one of the two")
    masks = {str(form) for length in range(33) for form in (length, IPv4Network((0, length)).netmask)}
    if isinstance(value, bool) or not isinstance(value, int | str) or str(value) not in masks:
        raise ValueError('is not a netmask; write "255.255.255.0" or 24')
    return str(value)


def _check_mtu(value: int) -> int:
    if value != 0 and not MINIMUM_MTU <= value <= MAXIMUM_MTU:
        raise ValueError(
            f"is no MTU for passt; write {MINIMUM_MTU} to {MAXIMUM_MTU} bytes, or 0 to announce none"
        )
    return value


def _check_ports(value: object, info: ValidationInfo) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('is neither a port nor a text; write 8080 or "8080:80"')
    address, only = parse_ports(str(value)).address, one_family(info.data)
    if address is not None and only not in (None, address.version):
        raise ValueError(
            f"needs IPv{address.version} and the link has ipv{only}_only; leave out one of the two"
        )
    return str(value)


def _check_other(value: object) -> object:
    """The value of an option without a field: a switch, or one or several numbers and texts."""
    items = value if isinstance(value, list | tuple) else [] if isinstance(value, bool) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise ValueError(
            "is no value for an option of passt; write true, a number, a text in quotes, or a list"
        )
    for text in items:
        _without_nul(str(text))
    return tuple(items) if isinstance(value, list) else value


def _check_name(name: str) -> str:
    underscored = name.lstrip("-").replace("-", "_")
    if underscored in OWN_BUSINESS:
        raise ValueError(f"is not for a VM's file: {OWN_BUSINESS[underscored]}; leave this out")
    if not re.fullmatch(r"[a-z0-9_]+", underscored):
        raise ValueError(
            "is no name of an option; write one from `passt --help`, with underscores for the dashes"
        )
    if name != underscored:
        raise ValueError(f"is written with underscores here; write {underscored}")
    return name


# --- values that depend on others: a field's check sees the fields above it --------------------------


def _check_family(version: int) -> Callable[[str, ValidationInfo], str]:
    def check(value: str, info: ValidationInfo) -> str:
        if one_family(info.data) not in (None, version):
            raise ValueError(f"is for IPv{version}, which the link does not have; leave it out")
        return value

    return check


def _not_both(value: bool, info: ValidationInfo) -> bool:
    if value and info.data.get("ipv4_only"):
        raise ValueError("excludes ipv4_only; write one of the two, or neither for both families")
    return value


def _once_per_family(texts: tuple[str, ...]) -> tuple[str, ...]:
    versions = [_parse_address(text.partition("/")[0]).version for text in texts]
    for version in (4, 6):
        if versions.count(version) > 1:
            raise ValueError(f"holds several IPv{version} addresses and passt takes one; leave one of them")
    return texts


def _none_alone(texts: tuple[str, ...]) -> tuple[str, ...]:
    if "none" in texts and len(texts) > 1:
        raise ValueError('has "none" and others; write "none", or only the others')
    return texts


def _enabled_ports(texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    protocol = str(info.field_name).partition("_")[0]
    if info.data.get(f"no_{protocol}") and any(text != "none" for text in texts):
        raise ValueError(f"forwards ports while no_{protocol} is true; leave out one of the two")
    return _none_alone(texts)


# --- the table of a VM's file -------------------------------------------------------------------------


@dataclass(frozen=True)
class _OneOrMore:
    """Marks a tuple for which the file has a list, or a single value in place of a list of one."""

    split: bool = False
    """whether a single value may be several, with spaces between them"""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._as_tuple, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        several = handler(schema)
        return {"anyOf": [several["items"], several]}

    def _as_tuple(self, value: object) -> tuple[object, ...]:
        if isinstance(value, list | tuple):
            return tuple(value)
        return tuple(value.split()) if self.split and isinstance(value, str) and value.strip() else (value,)


MAC_PATTERN = r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"
_NAME_SCHEMA: dict[str, Any] = {"pattern": "^[a-z0-9_]+$", "not": {"enum": sorted(OWN_BUSINESS)}}
_NUMBER_OR_TEXT = {"type": ["integer", "string"]}
_OTHER_SCHEMA = {"anyOf": [{"type": "boolean"}, _NUMBER_OR_TEXT, {"type": "array", "items": _NUMBER_OR_TEXT}]}
_PORTS_SCHEMA = {**_NUMBER_OR_TEXT, "minimum": 1, "maximum": HIGHEST_PORT, "pattern": PORTS_PATTERN}
_NETMASK_SCHEMA = {**_NUMBER_OR_TEXT, "minimum": 0, "maximum": 32}
_MTU_SCHEMA = {"type": "integer", "anyOf": [{"const": 0}, {"minimum": MINIMUM_MTU, "maximum": MAXIMUM_MTU}]}

Text: TypeAlias = Annotated[str, AfterValidator(_without_nul)]
"""A text that can be a program's argument."""

Mac: TypeAlias = Annotated[str, AfterValidator(_check_mac), Field(json_schema_extra={"pattern": MAC_PATTERN})]
"""A MAC address of one NIC, in lower case."""

_Interface: TypeAlias = Annotated[
    str, AfterValidator(check_interface), Field(json_schema_extra={"pattern": r"^[^/:\s]{1,15}$"})
]
_Ports: TypeAlias = Annotated[
    tuple[Annotated[str, BeforeValidator(_check_ports), WithJsonSchema(_PORTS_SCHEMA)], ...],
    _OneOrMore(),
    AfterValidator(_enabled_ports),
]
_GuestAddresses: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_guest_address)], ...],
    _OneOrMore(),
    AfterValidator(_once_per_family),
]
_Hosts: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(check_unicast)], ...], _OneOrMore(), AfterValidator(_once_per_family)
]
_Sources: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_source)], ...], _OneOrMore(), AfterValidator(_once_per_family)
]
_Resolvers: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_resolver)], ...], _OneOrMore(), AfterValidator(_none_alone)
]
_Domains: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_domain)], ...],
    _OneOrMore(split=True),
    AfterValidator(_none_alone),
]
_Netmask: TypeAlias = Annotated[str, BeforeValidator(_check_netmask), WithJsonSchema(_NETMASK_SCHEMA)]
_Mtu: TypeAlias = Annotated[int, AfterValidator(_check_mtu), WithJsonSchema(_MTU_SCHEMA)]


class PasstOptions(BaseModel):
    """The table [link.passt]: passt(1)'s long options, with underscores."""

    # Options without a field are kept as they are, in model_extra; `check_against_help` judges them
    model_config = ConfigDict(
        frozen=True, extra="allow", strict=True, json_schema_extra={"propertyNames": _NAME_SCHEMA}
    )
    __pydantic_extra__: dict[
        Annotated[str, AfterValidator(_check_name)],
        Annotated[Any, BeforeValidator(_check_other), WithJsonSchema(_OTHER_SCHEMA)],
    ]

    # In this order on the command line
    ipv4_only: bool = Field(False, description="no IPv6")
    ipv6_only: Annotated[bool, AfterValidator(_not_both)] = Field(False, description="no IPv4")
    no_tcp: bool = Field(False, description="no TCP")
    no_udp: bool = Field(False, description="no UDP")
    no_icmp: bool = Field(False, description="no ICMP and ICMPv6; implies no_ndp")
    no_dhcp: bool = Field(False, description="no DHCP server")
    no_ndp: bool = Field(False, description="no answers to NDP")
    no_dhcpv6: bool = Field(False, description="no DHCPv6 server")
    no_ra: bool = Field(False, description="no router advertisements")
    no_map_gw: bool = Field(False, description="the gateway's address does not lead to the host")
    no_dhcp_dns: bool = Field(False, description="no resolvers by DHCP, DHCPv6 and NDP")
    no_dhcp_search: bool = Field(False, description="no search list by DHCP, DHCPv6 and NDP")
    mtu: _Mtu | None = Field(None, description="MTU for the guest in bytes; 0 announces none")
    address: _GuestAddresses = Field((), description="the guest's address: one of IPv4, one of IPv6, or both")
    netmask: _Netmask | None = Field(None, description="IPv4 netmask, as 255.255.255.0 or 24")
    mac_addr: Mac | None = Field(None, description="the MAC address that passt itself uses towards the guest")
    gateway: _Hosts = Field((), description="the guest's default gateway: one of IPv4, one of IPv6, or both")
    interface: _Interface | None = Field(
        None, description="the host's interface to take addresses and routes from"
    )
    outbound: _Sources = Field(
        (), description="source address of outbound traffic: one of IPv4, one of IPv6, or both"
    )
    outbound_if4: Annotated[_Interface, AfterValidator(_check_family(4))] | None = Field(
        None, description="the host's interface for outbound IPv4"
    )
    outbound_if6: Annotated[_Interface, AfterValidator(_check_family(6))] | None = Field(
        None, description="the host's interface for outbound IPv6"
    )
    dns: _Resolvers = Field((), description='resolvers for the guest, or "none"')
    dns_forward: _Hosts = Field((), description="addresses at which the guest finds the host's resolver")
    search: _Domains = Field((), description='search domains for the guest, or "none"')
    tcp_ports: _Ports = Field(
        (), description='TCP forwards to the guest, as ["8080:80", "127.0.0.1/2222:22"]'
    )
    udp_ports: _Ports = Field((), description='UDP forwards to the guest, as ["5353:53"]')


# --- the installed passt ------------------------------------------------------------------------------

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
    names = {option.replace("-", "_") for option in help_options}
    problems: list[Problem] = []
    for name, value in _given(options):
        option = name.replace("_", "-")
        takes_value = help_options.get(option)
        if takes_value is None:
            hint = nearest(name, sorted(names - set(OWN_BUSINESS))) or f"`{binary} --help` lists those it has"
            problem = Problem(f"{key}.{name}", f"{binary} has no option --{option}", hint=hint)
        elif value is True and takes_value:
            reason = f"--{option} of {binary} takes a value"
            problem = Problem(
                f"{key}.{name}", reason, toml_text(value), f"write {name} = and the value, in quotes"
            )
        elif not isinstance(value, bool) and value != () and not takes_value:
            reason = f"--{option} of {binary} takes no value"
            problem = Problem(f"{key}.{name}", reason, toml_text(value), f"write {name} = true")
        else:
            continue
        problems.append(problem)
    return problems


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return a question for somebody who may have meant one of ``known``, or None if none is near."""
    import difflib  # only where something is wrong: it costs start-up time

    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean `{near[0]}`?" if near else None


def toml_text(value: object) -> str:
    """Return a value as a VM's file would have it, in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_key(key)} = {toml_text(item)}' for key, item in value.items())}}}"
    return repr(value) if isinstance(value, str) else str(value)


def toml_key(name: str) -> str:
    """Return a key as a VM's file would have it: with quotes where it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


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
        if value is True:
            arguments.append(option)
        elif value is not False and value is not None:
            for item in value if isinstance(value, tuple) else (value,):
                arguments += [option, *_written(name, str(item))]
    return arguments


def _written(name: str, text: str) -> list[str]:
    """Return an option's value, and the further options that it needs in older passts."""
    if name in ("tcp_ports", "udp_ports"):
        return [str(parse_ports(text))]
    if name != "address":
        return [text]
    # ADDR/LENGTH is taken since 2026; --netmask does it for IPv4, and IPv6 gets 64 anyhow (passt(1))
    address, _, length = text.partition("/")
    if ":" in address:
        return [address if length == "64" else text]
    return [address, *(["--netmask", length] if length else [])]
