# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for passt's options: the ports' grammar, clashes, values, and what passt's help says."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from qrapd.errors import Problem
from qrapd.passt_options import (
    HIGHEST_PORT,
    MAXIMUM_MTU,
    MINIMUM_MTU,
    OWN_BUSINESS,
    Forward,
    PasstOptions,
    PortRange,
    PortSpec,
    check_against_help,
    command_line,
    find_clashes,
    parse_ports,
    read_help,
)

HELPS = ("2023", "2025", "2026")
V4 = IPv4Address("192.0.2.1")
V6 = IPv6Address("::1")


def help_text(year: str) -> str:
    return (Path(__file__).parent / "data" / f"passt-help-{year}.txt").read_text()


def options(toml: str) -> PasstOptions:
    return PasstOptions.model_validate(tomllib.loads(toml))


def errors_of(toml: str) -> dict[str, str]:
    """Return what is wrong with a table: key to reason, in the order found."""
    with pytest.raises(ValidationError) as caught:
        options(toml)
    return {
        ".".join(str(part) for part in error["loc"]): error["msg"].removeprefix("Value error, ")
        for error in caught.value.errors()
    }


# The ports' grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", PortSpec()),
        ("all", PortSpec(all=True)),
        ("22", PortSpec(ranges=(PortRange(22, 22, 22),))),
        ("022", PortSpec(ranges=(PortRange(22, 22, 22),))),
        ("22:23", PortSpec(ranges=(PortRange(22, 22, 23),))),
        ("22,25", PortSpec(ranges=(PortRange(22, 22, 22), PortRange(25, 25, 25)))),
        ("22-80:32-90", PortSpec(ranges=(PortRange(22, 80, 32),))),
        ("65535:65535", PortSpec(ranges=(PortRange(65535, 65535, 65535),))),
        ("~25", PortSpec(exclusions=((25, 25),), all=True)),
        ("all,~25", PortSpec(exclusions=((25, 25),), all=True)),
        ("~25,~20-30", PortSpec(exclusions=((20, 30),), all=True)),
        ("~0-100", PortSpec(exclusions=((1, 100),), all=True)),
        ("5-25,~10-20", PortSpec(ranges=(PortRange(5, 25, 5),), exclusions=((10, 20),))),
        ("~10-20,5-25", PortSpec(ranges=(PortRange(5, 25, 5),), exclusions=((10, 20),))),
        ("192.0.2.1/5", PortSpec(V4, ranges=(PortRange(5, 5, 5),))),
        ("192.0.2.1%eth0/5", PortSpec(V4, "eth0", (PortRange(5, 5, 5),))),
        ("%eth0/5", PortSpec(None, "eth0", (PortRange(5, 5, 5),))),
        ("*%eth0/5", PortSpec(None, "eth0", (PortRange(5, 5, 5),))),
        ("*/5", PortSpec(ranges=(PortRange(5, 5, 5),))),
        ("::1/5", PortSpec(V6, ranges=(PortRange(5, 5, 5),))),
        ("[::1]/5", PortSpec(V6, ranges=(PortRange(5, 5, 5),))),
        ("[::1]%lo/5", PortSpec(V6, "lo", (PortRange(5, 5, 5),))),
        ("[192.0.2.1]/5", PortSpec(V4, ranges=(PortRange(5, 5, 5),))),
        ("::ffff:192.0.2.1/5", PortSpec(V4, ranges=(PortRange(5, 5, 5),))),
        ("::1/all", PortSpec(V6, all=True)),
    ],
)
def test_a_spec_means_what_passt_makes_of_it(text: str, expected: PortSpec) -> None:
    """Every form of passt's grammar is understood, those of newer versions too."""
    assert expected == parse_ports(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 'is empty: write a port such as "8080:80", or "none"'),
        ("0", "0 is no port: write a number from 1 to 65535"),
        ("22:0", "0 is no port: write a number from 1 to 65535"),
        ("65536", "65536 is no port: write a number from 1 to 65535"),
        ("9" * 5000, "9999999999... is no port: write a number from 1 to 65535"),
        ("80-22", 'the range 80-22 runs backwards: write "22-80"'),
        ("~80-22", 'the range 80-22 runs backwards: write "22-80"'),
        ("22-80:32-91", '22-80 and 32-91 are not equally many ports: write "22-80:32-90"'),
        ("22-23:32", '22-23 and 32 are not equally many ports: write "22-23:32-33"'),
        (
            "1-9:65535",
            '1-9 and 65535 are not equally many ports: write as many on both sides, as in "22-80:32-90"',
        ),
        ("22,22", "forwards host port 22 twice: name each host port once"),
        ("22-30,25-40:5-20", "forwards host port 25-30 twice: name each host port once"),
        ("5-6,~1-9", 'excludes every port that it forwards: leave some, as in "5-25,~10-20"'),
        ("~1-65535", 'excludes every port that it forwards: leave some, as in "5-25,~10-20"'),
        ("all,22", '"all" and single ports exclude each other: write "all", or only the ports'),
        ("22,none", '"none" stands alone: write "none", or only the ports'),
        ("192.0.2.1/none", '"none" stands alone: write "none", or only the ports'),
        ("auto", '"auto" is for pasta only: name the ports, or write "all"'),
        ("192.0.2.1:80:80", "an address ends with '/', not ':': write \"192.0.2.1/80:80\""),
        ("8080:80/tcp", 'the key says the protocol: write "8080:80" in tcp_ports'),
        ("/22", "there is no address before the '/': write for example \"127.0.0.1/2222:22\""),
        ("22, 25", 'holds a space or an unprintable character: write for example "22,8080:80"'),
        ("22\0", 'holds a space or an unprintable character: write for example "22,8080:80"'),
        ("%/22", "'' is no interface's name: write 1 to 15 bytes, as in \"eth0\""),
        ("%sixteen-letters-/22", None),
        ("%../22", "'..' is no interface's name: write one that `ip link` shows, as in \"eth0\""),
        ("22," * 2800, "is 8400 characters long and passt reads 8191: write it as several specs"),
    ],
)
def test_a_wrong_spec_is_explained(text: str, expected: str | None) -> None:
    """The error says what is wrong in the spec and how to write it."""
    with pytest.raises(ValueError, match=r": (write|name|leave) ") as caught:
        parse_ports(text)
    assert expected in (None, str(caught.value))


@pytest.mark.parametrize(
    "text", ["x", "22,", ",22", "22,,23", "22-", "-22", "22:", "+22", "0x16", "22:23:24", "~", "²"]
)
def test_garbage_is_answered_with_examples(text: str) -> None:
    """What fits nowhere in the grammar gets the list of what does."""
    with pytest.raises(
        ValueError, match='is no port and no range of ports: write for example "8080", "8080:80"'
    ):
        parse_ports(text)


@pytest.mark.parametrize("text", ["x/22", "127.1/22", "192.0.2.256/22", "[::1%lo]/22", "[::1/22", "22/23"])
def test_a_wrong_address_is_answered_with_examples(text: str) -> None:
    """What stands before the slash must be an address or an interface."""
    with pytest.raises(ValueError, match="before the '/' is no IP address: write for example "):
        parse_ports(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[::1]/22", "::1/22"),
        ("*/22", "22"),
        ("*%eth0/22", "%eth0/22"),
        ("all,~25", "~25"),
        ("~25,~20-30", "~20-30"),
        ("192.0.2.1/all", "192.0.2.1/~0"),
        ("::ffff:192.0.2.1/22", "192.0.2.1/22"),
    ],
)
def test_newer_forms_are_written_as_old_ones(text: str, expected: str) -> None:
    """passt of 2023 refuses the forms on the left; all passts take those on the right (measured)."""
    assert expected == str(parse_ports(text))


ports = st.integers(1, HIGHEST_PORT)
addresses = st.none() | st.ip_addresses().filter(
    lambda address: getattr(address, "ipv4_mapped", None) is None
)
interfaces = st.none() | st.sampled_from(["lo", "eth0", "br-lan.7", "ünï", "a,b", "x%y", "~1"])


@st.composite
def disjoint(draw: st.DrawFn, highest: int = HIGHEST_PORT) -> list[tuple[int, int]]:
    """Up to four intervals, sorted, with a port or more between them."""
    edges = sorted(draw(st.lists(st.integers(1, highest // 2), unique=True, max_size=8)))
    return [(2 * first, 2 * last - 1) for first, last in zip(edges[::2], edges[1::2], strict=False)]


@st.composite
def specs(draw: st.DrawFn, highest: int = HIGHEST_PORT) -> PortSpec:
    """Any spec in the form that the parser returns."""
    intervals = draw(disjoint(highest))
    ranges = tuple(
        PortRange(first, last, draw(st.integers(1, HIGHEST_PORT - (last - first))))
        for first, last in intervals
    )
    spec = PortSpec(draw(addresses), draw(interfaces), ranges, tuple(draw(disjoint(highest))), not ranges)
    return spec if spec.all or spec.host_ports() else PortSpec()


@given(specs())
def test_a_spec_survives_being_written_and_read(spec: PortSpec) -> None:
    """What is written for passt means the same when it is read again."""
    assert spec == parse_ports(str(spec))


@given(st.text() | st.text("0123456789-:,~/%.[]*al ", max_size=30))
def test_garbage_raises_nothing_but_value_errors(text: str) -> None:
    """Whatever a file holds is either a spec, which can be written again, or a ValueError that says how."""
    spec, error = parsed(text)
    if spec is not None:
        assert spec == parse_ports(str(spec))
    else:
        assert re.search(": (write|name|leave) ", str(error))
        assert not isinstance(error, UnicodeError)


def parsed(text: str) -> tuple[PortSpec | None, ValueError | None]:
    try:
        return parse_ports(text), None
    except ValueError as error:
        return None, error


# Clashes

# Enough of a host to tell all cases apart: addresses of both families, one interface that nobody names
HOST_ADDRESSES = ("127.0.0.1", "192.0.2.1", "10.0.0.1", "::1", "fe80::1")
HOST_INTERFACES = ("lo", "eth0", "eth1")


def endpoints(spec: PortSpec) -> Iterator[tuple[str, str, int]]:
    """Yield every (address, interface, port) of the little host that the spec listens on, one by one."""
    included = {port for ports in spec.ranges for port in range(ports.first, ports.last + 1)}
    excluded = {port for first, last in spec.exclusions for port in range(first, last + 1)}
    for text in HOST_ADDRESSES:
        address = ip_address(text)
        whole_family = ip_address("0.0.0.0" if address.version == 4 else "::")
        for interface in HOST_INTERFACES:
            if spec.address in (None, address, whole_family) and spec.interface in (None, interface):
                yield from ((text, interface, port) for port in included - excluded)


little_specs = st.builds(
    PortSpec,
    st.sampled_from([None, *(ip_address(a) for a in ("0.0.0.0", "::", "127.0.0.1", "192.0.2.1", "::1"))]),
    st.sampled_from([None, "lo", "eth0"]),
    disjoint(24).map(lambda intervals: tuple(PortRange(first, last, first) for first, last in intervals)),
    disjoint(24).map(tuple),
)


@given(st.lists(st.tuples(st.sampled_from(["tcp", "udp"]), little_specs), max_size=5))
def test_clashes_are_those_that_counting_finds(drawn: list[tuple[str, PortSpec]]) -> None:
    """Two forwards clash exactly where some address, interface and port would be bound by both."""
    forwards = [
        (f"link[{i}].passt.{protocol}_ports[0]", protocol, spec) for i, (protocol, spec) in enumerate(drawn)
    ]
    expected = []
    for later, (key, protocol, spec) in enumerate(forwards):
        for first_key, first_protocol, first in forwards[:later]:
            common = {port for *_, port in set(endpoints(first)) & set(endpoints(spec))}
            if protocol == first_protocol and common:
                expected.append((first_key, key, common))
    found = [
        (problem.reason.split()[-2], problem.key, ports_named(problem)) for problem in find_clashes(forwards)
    ]
    assert expected == found


def ports_named(problem: Problem) -> set[int]:
    match = re.match(r"(?:tcp|udp) port ([0-9, -]+) of the host", problem.reason)
    assert match is not None
    pieces = [piece.partition("-") for piece in match[1].split(", ")]
    return {port for first, _, last in pieces for port in range(int(first), int(last or first) + 1)}


def forward(link: int, text: str, protocol: str = "tcp", index: int = 0) -> Forward:
    return f"link[{link}].passt.{protocol}_ports[{index}]", protocol, parse_ports(text)


def test_a_clash_names_both_keys_and_the_ports() -> None:
    """A person sees which two lines collide, and on what."""
    problems = find_clashes([forward(0, "8080-8090"), forward(1, "127.0.0.1/8085-9000:85-1000")])
    assert [
        Problem(
            key="link[1].passt.tcp_ports[0]",
            reason="tcp port 8085-8090 of the host is forwarded by link[0].passt.tcp_ports[0] already",
            value="127.0.0.1/8085-9000:85-1000",
            hint="give one of the two other host ports or another address",
        )
    ] == problems


@pytest.mark.parametrize(
    ("one", "other", "clashes"),
    [
        ("22", "22", True),
        ("22", "23", False),
        ("22:1", "22:2", True),
        ("0.0.0.0/22", "::/22", False),
        ("::/22", "127.0.0.1/22", False),
        ("::/22", "::1/22", True),
        ("127.0.0.1/22", "192.0.2.1/22", False),
        ("%eth0/22", "%lo/22", False),
        ("%eth0/22", "22", True),
        ("%eth0/22", "192.0.2.1/22", True),
        ("192.0.2.1%eth0/22", "192.0.2.1%lo/22", False),
        ("all", "22", False),
        ("none", "22", False),
    ],
)
def test_listeners_meet_as_they_do_in_the_kernel(one: str, other: str, clashes: bool) -> None:
    """Pairs that two real passts could, or could not, have at the same time (measured, 2025 and 2026)."""
    assert clashes == bool(find_clashes([forward(0, one), forward(1, other)]))
    assert clashes == bool(find_clashes([forward(0, other), forward(1, one)]))


@pytest.mark.parametrize(
    ("text", "clashes"), [("22", True), ("40000", False), ("none", False), ("all", True)]
)
def test_all_beside_other_forwards_of_the_same_passt(text: str, clashes: bool) -> None:
    """No passt takes `all` beside a port that `all` includes; ephemeral ones it does not include."""
    assert clashes == bool(find_clashes([forward(0, "all"), forward(0, text, index=1)]))


def test_many_separate_forwards_do_not_clash() -> None:
    """Neighbours in ports, protocols or addresses stay apart."""
    forwards = [forward(0, str(port), index=port) for port in range(1, 200)]
    assert [] == find_clashes([*forwards, forward(0, "1-1000", "udp"), forward(1, "200-1000")])


# Values


def test_the_example_of_the_documentation() -> None:
    """Numbers and texts are ports, alone or in a list."""
    found = options('tcp_ports = [8080, "127.0.0.1/2222:22"]\nudp_ports = 5353')
    assert ("8080", "127.0.0.1/2222:22") == found.tcp_ports
    assert ("5353",) == found.udp_ports


def test_an_empty_table_asks_for_nothing() -> None:
    """All defaults are passt's own."""
    assert [] == command_line(PasstOptions())
    assert [] == list(PasstOptions().forwards("link[0].passt"))


@pytest.mark.parametrize(
    "toml",
    [
        "mtu = 0",
        f"mtu = {MINIMUM_MTU}",
        f"mtu = {MAXIMUM_MTU}",
        'address = "192.0.2.1"',
        'address = ["192.0.2.1/24", "2001:db8::1/64"]',
        "netmask = 24",
        'netmask = "24"',
        'netmask = "255.255.255.0"',
        'netmask = "0.0.0.0"',
        'mac_addr = "9a:55:9A:55:9a:55"',
        'gateway = ["192.0.2.254", "fe80::1"]',
        'interface = "enp0s31f6"',
        'interface = "fifteen-letters"',
        'outbound = "127.0.0.1"',
        'outbound_if4 = "eth0"\nipv4_only = true',
        'dns = "none"',
        'dns = ["192.0.2.5", "127.0.0.1", "2001:db8::5", "2001:db8::6"]',
        'dns_forward = ["192.0.2.7", "fd00::7"]',
        'search = "example.org example.com"',
        'no_tcp = true\ntcp_ports = "none"',
        "no_tcp = false\ntcp_ports = 22",
        "tcp_ports = []",
        'ipv6_only = true\ntcp_ports = "::1/22"',
        'hostname = "guest"',
        "stats = 5",
        'map_host_loopback = ["192.0.2.9", "fd00::9"]',
        "freebind = true",
        'runas = "1000:1000"',
        'pcap = "trace.pcap"',
    ],
)
def test_what_passt_takes_is_taken(toml: str) -> None:
    """Nothing that passt itself takes, in one version or another, is refused here."""
    assert PasstOptions.model_validate(tomllib.loads(toml)) == options(toml)


@pytest.mark.parametrize(
    ("toml", "key", "reason"),
    [
        ("mtu = 67", "mtu", "is no MTU for passt: write 68 to 65521 bytes, or 0 to announce none"),
        ("mtu = 65522", "mtu", "is no MTU for passt"),
        ("mtu = true", "mtu", "is not a number: write bytes without quotes, as in 1500"),
        ('mtu = "1500"', "mtu", "is not a number"),
        ("no_tcp = 1", "no_tcp", "is a switch: write true or false, without quotes"),
        ('no_tcp = "true"', "no_tcp", "is a switch"),
        ("tcp_ports = true", "tcp_ports", 'is neither a port nor a text: write 8080 or "8080:80"'),
        ("tcp_ports = [22, 2.5]", "tcp_ports.1", "is neither a port nor a text"),
        ('tcp_ports = ["22", "80-22"]', "tcp_ports.1", "the range 80-22 runs backwards"),
        ('udp_ports = "0"', "udp_ports", "0 is no port"),
        ('tcp_ports = ["none", "22"]', "tcp_ports", '"none" stands alone'),
        ("no_tcp = true\ntcp_ports = 22", "tcp_ports", "forwards ports while no_tcp is true"),
        ("no_udp = true\nudp_ports = 22", "udp_ports", "forwards ports while no_udp is true"),
        ('ipv4_only = true\ntcp_ports = "::1/22"', "tcp_ports", "needs IPv6 and the link has ipv4_only"),
        (
            'ipv6_only = true\ntcp_ports = "127.0.0.1/22"',
            "tcp_ports",
            "needs IPv4 and the link has ipv6_only",
        ),
        ("ipv4_only = true\nipv6_only = true", "ipv6_only", "excludes ipv4_only"),
        (
            'ipv4_only = true\noutbound_if6 = "eth0"',
            "outbound_if6",
            "is for IPv6, which the link does not have",
        ),
        ('address = "192.0.2.300"', "address", "is no IP address"),
        (
            'address = "192.0.2.1/33"',
            "address",
            'has no good prefix length: write "192.0.2.1/N" with N from 0 to 32',
        ),
        ('address = "127.0.0.1"', "address", "cannot be a guest's address"),
        ('address = "ff02::1"', "address", "cannot be a guest's address"),
        ('address = "::ffff:192.0.2.1"', "address", "cannot be a guest's address"),
        ('address = "fe80::1%eth0"', "address", "has an interface in it"),
        (
            'address = ["192.0.2.1", "192.0.2.2"]',
            "address",
            "holds several IPv4 addresses and passt takes one",
        ),
        ("address = 7", "address", "is not a text"),
        ('address = "192.0.2.1/24"\nnetmask = 24', "netmask", "is said by `address` already"),
        ("netmask = 33", "netmask", 'is no netmask: write "255.255.255.0" or 24'),
        ("netmask = true", "netmask", "is no netmask"),
        ('netmask = "255.0.255.0"', "netmask", "is no netmask"),
        ('netmask = "ffff::"', "netmask", "is no netmask"),
        ('mac_addr = "52:54:0:12:34:56"', "mac_addr", "is no MAC address"),
        ('mac_addr = "01:00:5e:00:00:01"', "mac_addr", "is a group or null address"),
        ('gateway = "127.0.0.1"', "gateway", "cannot be a router's or a resolver's address"),
        ('gateway = ["192.0.2.1", "fe80::1", "fe80::2"]', "gateway", "holds several IPv6 addresses"),
        ('interface = "sixteen-letters-"', "interface", "write 1 to 15 bytes"),
        ('interface = "eth0:1"', "interface", "is no interface's name"),
        ('outbound = "eth0"', "outbound", "is no IP address"),
        ('outbound = "::1"', "outbound", "cannot be a source address"),
        ('dns = ["none", "192.0.2.5"]', "dns", '"none" stands alone'),
        ('dns = ["192.0.2.5", "resolver"]', "dns.1", "is no IP address"),
        ('dns_forward = "none"', "dns_forward", "is no IP address"),
        ('search = ""', "search", "is no domain"),
        ('search = ["example.org", "a b"]', "search.1", "is no domain"),
        ("stats = 1.5", "stats", "is no value for an option of passt"),
        ("dns_host = [true]", "dns_host", "holds what is neither text nor number"),
        ('hostname = "a\\u0000b"', "hostname", "holds a NUL"),
        ("a.b = 1", "a", "is no value for an option of passt"),
        ("tcp-ports = 22", "tcp-ports", "passt's options are written with underscores here: write tcp_ports"),
        ('"x=y" = 22', "x=y", "is no name of an option"),
        ('"" = 22', "", "is no name of an option"),
    ],
)
def test_what_passt_would_refuse_is_refused(toml: str, key: str, reason: str) -> None:
    """The error stands at its key and says why; passt is not started."""
    found = errors_of(toml)
    assert [key] == list(found)
    assert reason in found[key]
    assert re.search(": (write|leave) ", found[key])


@pytest.mark.parametrize("name", OWN_BUSINESS)
def test_what_is_qrapds_own_business_is_refused(name: str) -> None:
    """Such an option is an error with its reason, however it is spelled."""
    for spelled in (name, name.replace("_", "-"), "--" + name.replace("_", "-")):
        assert {spelled: f"{OWN_BUSINESS[name]}: leave this out"} == errors_of(f'"{spelled}" = true')


def test_all_errors_come_at_once_in_the_order_of_the_file() -> None:
    """One run shows all there is to mend, wherever the table stands."""

    class File(BaseModel):
        passt: PasstOptions

    with pytest.raises(ValidationError) as caught:
        File.model_validate({"passt": {"udp_ports": [1, 0], "fd": 3, "mtu": "x", "tcp-ports": 1, "odd": 1.5}})
    expected = [
        ("passt", "udp_ports", 1),
        ("passt", "fd"),
        ("passt", "mtu"),
        ("passt", "tcp-ports"),
        ("passt", "odd"),
    ]
    assert expected == [error["loc"] for error in caught.value.errors()]
    assert [0, 3, "x", 1, 1.5] == [error["input"] for error in caught.value.errors()]


def test_the_schema_knows_fields_and_refused_names() -> None:
    """An editor can offer the fields, with a description each, and mark what is refused."""
    schema = PasstOptions.model_json_schema()
    assert set(PasstOptions.model_fields) == set(schema["properties"])
    assert all(field.description for field in PasstOptions.model_fields.values())
    assert "fd" in schema["propertyNames"]["not"]["enum"]


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
names = st.sampled_from([*PasstOptions.model_fields, "hostname", "fd", "tcp-ports"]) | st.text(max_size=8)


@given(st.dictionaries(names, values | st.lists(values | st.just([]), max_size=3), max_size=4))
def test_no_table_raises_anything_but_a_validation_error(table: dict[str, Any]) -> None:
    """Whatever stands in the table is either taken and makes a command line, or is an error at a key of it."""
    found, wrong = validated(table)
    assert wrong <= set(table)
    assert (found is None) == bool(wrong)
    assert all(isinstance(argument, str) for argument in command_line(found or PasstOptions()))


def validated(table: dict[str, Any]) -> tuple[PasstOptions | None, set[str]]:
    try:
        return PasstOptions.model_validate(table), set()
    except ValidationError as failure:
        return None, {str(error["loc"][0]) for error in failure.errors()}


def test_one_family_only_narrows_the_forwards() -> None:
    """An IPv4-only and an IPv6-only link may share a port."""
    four = options("ipv4_only = true\ntcp_ports = 22")
    six = options("ipv6_only = true\ntcp_ports = 22")
    assert [("link[0].passt.tcp_ports[0]", "tcp", parse_ports("0.0.0.0/22"))] == list(
        four.forwards("link[0].passt")
    )
    assert [] == find_clashes([*four.forwards("link[0].passt"), *six.forwards("link[1].passt")])
    assert 1 == len(find_clashes([*four.forwards("link[0].passt"), *four.forwards("link[1].passt")]))


# The command line


def test_the_command_line_has_long_options_in_a_stable_order() -> None:
    """Fields first, in the model's order, then the others in the file's; lists repeat the option."""
    toml = """
        hostname = "guest"
        dns_host = ["192.0.2.3", "fd00::3"]
        debug = false
        freebind = true
        stats = 5
        udp_ports = 53
        tcp_ports = [80, "[::1]/22"]
        search = "example.org example.com"
        mtu = 0
        no_ra = true
        no_tcp = false
    """
    expected = (
        "--no-ra --mtu 0 --search example.org --search example.com --tcp-ports 80 --tcp-ports ::1/22 --udp-ports 53 "
        "--hostname guest --dns-host 192.0.2.3 --dns-host fd00::3 --freebind --stats 5"
    )
    assert expected.split() == command_line(options(toml))


def test_a_prefix_length_is_written_as_every_passt_takes_it() -> None:
    """ADDR/LENGTH came in 2026; IPv4 has --netmask for it, and 64 is what IPv6 gets anyhow."""
    assert ["--address", "192.0.2.1", "--netmask", "24", "--address", "fd00::1"] == command_line(
        options('address = ["192.0.2.1/24", "fd00::1/64"]')
    )
    assert ["--address", "fd00::1/48"] == command_line(options('address = "fd00::1/48"'))


# passt's help


@pytest.mark.parametrize("year", HELPS)
def test_help_is_read_with_values_and_without(year: str) -> None:
    """The short form, two long ones in a line, odd spacing, and the 2023 build's complaints in between."""
    found = read_help(help_text(year))
    assert {
        "tcp-ports": True,
        "no-tcp": False,
        "runas": True,
        "trace": False,
        "search": True,
        "fd": True,
    }.items() <= (found.items())
    assert found.get("socket-path", year == "2023")
    assert (year == "2026") == ("chroot-fallback" in found)
    assert set(re.findall(r"^ +(?:-\w, )?--([a-z0-9-]+)", help_text(year), re.MULTILINE)) <= set(found)


@pytest.mark.parametrize("year", HELPS)
def test_no_version_lacks_a_typed_field(year: str) -> None:
    """What has a field here is in every passt, so a file with fields only is portable."""
    names = {name.replace("_", "-") for name in PasstOptions.model_fields}
    assert set() == names - set(read_help(help_text(year)))


@pytest.mark.parametrize("year", HELPS)
def test_a_help_cut_short_still_has_the_ports(year: str) -> None:
    """passt of 2025-05 loses what follows 4096 bytes when a pipe reads its help, the ports' options included."""
    cut = read_help(help_text(year)[:4096])
    assert cut["tcp-ports"]
    assert cut["udp-ports"]
    assert cut.items() <= read_help(help_text(year)).items()


def test_no_help_is_no_options() -> None:
    """Another program's output names nothing but what every passt has."""
    assert {"tcp-ports": True, "udp-ports": True} == read_help("usage: something else\nsee --help\n")


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("freebind = true", ("passt has no option --freebind", "true", "`passt --help` lists those it has")),
        ("no_tpc = false", ("passt has no option --no-tpc", "false", "did you mean no_tcp?")),
        (
            'outbound_if = "eth0"',
            ("passt has no option --outbound-if", '"eth0"', "did you mean outbound_if6?"),
        ),
        (
            "runas = true",
            ("--runas of passt takes a value: write runas = and the value, in quotes", "true", None),
        ),
        ("quiet = [1]", ("--quiet of passt takes no value: write quiet = true", "[1]", None)),
        ("quiet = true", None),
        ("quiet = false", None),
        ('pcap = "x"', None),
        ("mtu = 1500\ntcp_ports = 22\nno_ra = true", None),
    ],
)
def test_options_are_compared_with_the_binarys_help(
    toml: str, expected: tuple[str, str, str | None] | None
) -> None:
    """What the binary lacks, or takes in another way, is a problem that names option and binary."""
    found = check_against_help(options(toml), read_help(help_text("2023")), "passt", "link[0].passt")
    assert ([expected] if expected else []) == [
        (problem.reason, problem.value, problem.hint) for problem in found
    ]
    assert all(problem.key == f"link[0].passt.{toml.split()[0]}" for problem in found)


@pytest.mark.parametrize("year", HELPS)
def test_every_example_of_the_help_is_understood(year: str) -> None:
    """passt's own examples of port specs are specs here."""
    check_examples(help_text(year))


def check_examples(text: str) -> None:
    examples = re.findall(r"^ +-t (\S+)", text, re.MULTILINE)
    assert len(examples) >= 8
    for example in examples:
        assert parse_ports(example) == parse_ports(str(parse_ports(example)))


def test_the_installed_passt_has_what_is_assumed() -> None:
    """The real binary knows every field, in the way that `command_line` writes it, and its examples parse."""
    binary = shutil.which("passt")
    if binary is None:
        pytest.skip("passt is not installed")
    # An unknown option brings the usage on standard error, which is whole where --help through a pipe is not
    answer = subprocess.run(
        [binary, "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
        errors="replace",
    )
    text = answer.stdout + answer.stderr
    found = read_help(text)
    for name, field in PasstOptions.model_fields.items():
        assert found[name.replace("_", "-")] == (field.default is not False), name
    assert {"fd", "foreground"} <= set(found)
    check_examples(text)
