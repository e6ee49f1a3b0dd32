# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for passt's ports: the grammar, the forwards of a table, and clashes between forwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.errors import Problem
from qrapd.ports import (
    HIGHEST_PORT,
    PORTS_PATTERN,
    Forward,
    PortRange,
    PortSpec,
    check_interface,
    find_clashes,
    parse_ports,
    read_forwards,
)

V4 = IPv4Address("192.0.2.1")
V6 = IPv6Address("::1")


# --- the grammar ---------------------------------------------------------------------------------------


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
        ("", 'is empty; write a port such as "8080:80", or "none"'),
        ("0", "has 0, which is no port; write a number from 1 to 65535"),
        ("22:0", "has 0, which is no port; write a number from 1 to 65535"),
        ("65536", "has 65536, which is no port; write a number from 1 to 65535"),
        ("9" * 5000, "has 9999999999..., which is no port; write a number from 1 to 65535"),
        ("80-22", 'has the range 80-22, which runs backwards; write "22-80"'),
        ("~80-22", 'has the range 80-22, which runs backwards; write "22-80"'),
        (
            "22-80:32-91",
            'has 22-80 and 32-91, which are not equally many ports; write as in "22-80:32-90"',
        ),
        ("22-23:32", 'has 22-23 and 32, which are not equally many ports; write as in "22-23:32-33"'),
        ("1-9:65535", 'has 1-9 and 65535, which are not equally many ports; write as in "22-80:32-90"'),
        ("22,22", "forwards host port 22 twice; name each host port once"),
        ("22-30,25-40:5-20", "forwards host port 25-30 twice; name each host port once"),
        ("5-6,~1-9", 'excludes every port that it forwards; leave some, as in "5-25,~10-20"'),
        ("~1-65535", 'excludes every port that it forwards; leave some, as in "5-25,~10-20"'),
        ("all,22", 'has both "all" and single ports; write "all", or only the ports'),
        ("22,none", 'has "none" in it, which stands alone; name the ports, or write "all" or "none"'),
        ("192.0.2.1/none", 'has "none" in it, which stands alone; name the ports, or write "all" or "none"'),
        ("auto", 'has "auto" in it, which is for pasta only; name the ports, or write "all" or "none"'),
        ("192.0.2.1:80:80", "has a ':' after the address; write \"192.0.2.1/80:80\""),
        ("8080:80/tcp", 'names the protocol, as the key does; write "8080:80" in tcp_ports'),
        ("::1/53/udp", 'names the protocol, as the key does; write "::1/53" in udp_ports'),
        ("/22", "has no address before the '/'; write for example \"127.0.0.1/2222:22\""),
        ("22, 25", 'holds a space or an unprintable character; write for example "22,8080:80"'),
        ("22\0", 'holds a space or an unprintable character; write for example "22,8080:80"'),
        ("22," * 2800, "is 8400 characters long and passt reads 8191; write it as several specs"),
    ],
)
def test_a_wrong_spec_is_explained(text: str, expected: str) -> None:
    """The error says what is wrong in the spec and how to write it."""
    with pytest.raises(ValueError, match="; ") as caught:
        parse_ports(text)
    assert expected == str(caught.value)


@pytest.mark.parametrize("name", ["", "sixteen-letters-", "ü" * 8, "..", ".", "eth0:1", "a b", "a/b", "a\0b"])
def test_a_wrong_interface_is_explained(name: str) -> None:
    """The kernel has no interface of such a name: length in bytes, no slash, colon or space, no dots alone."""
    with pytest.raises(ValueError, match="for an interface's name; write one that `ip link` shows"):
        check_interface(name)


@pytest.mark.parametrize("name", ["eth0", "fifteen-letters", "br-lan.7", "a,b", "..."])
def test_a_right_interface_is_taken(name: str) -> None:
    """Whatever the kernel takes is taken, in a spec as well."""
    assert name == check_interface(name)
    assert PortSpec(None, name, (PortRange(5, 5, 5),)) == parse_ports(f"%{name}/5")


@pytest.mark.parametrize(
    "text", ["x", "22,", ",22", "22,,23", "22-", "-22", "22:", "+22", "0x16", "22:23:24", "~", "²"]
)
def test_garbage_is_answered_with_examples(text: str) -> None:
    """What fits nowhere in the grammar gets the list of what does."""
    with pytest.raises(
        ValueError, match='which is no port and no range of ports; write for example "8080", "8080:80"'
    ):
        parse_ports(text)


@pytest.mark.parametrize("text", ["x/22", "127.1/22", "192.0.2.256/22", "[::1%lo]/22", "[::1/22", "22/23"])
def test_a_wrong_address_is_answered_with_examples(text: str) -> None:
    """What stands before the slash must be an address or an interface."""
    with pytest.raises(ValueError, match="before the '/', which is no IP address; write for example "):
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
    return spec if spec.all or spec.bound() else PortSpec()


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
        assert re.search(PORTS_PATTERN, text)
    else:
        assert re.search("; (write|name|leave) ", str(error))
        assert not isinstance(error, UnicodeError)


def parsed(text: str) -> tuple[PortSpec | None, ValueError | None]:
    try:
        return parse_ports(text), None
    except ValueError as error:
        return None, error


# --- clashes ---------------------------------------------------------------------------------------

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
        Forward(f"link[{i}].passt.{protocol}_ports[0]", protocol, spec)
        for i, (protocol, spec) in enumerate(drawn)
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
    match = re.match(r"forwards (?:tcp|udp) port ([0-9, -]+) of the host", problem.reason)
    assert match is not None
    pieces = [piece.partition("-") for piece in match[1].split(", ")]
    return {port for first, _, last in pieces for port in range(int(first), int(last or first) + 1)}


def forward(link: int, text: str, protocol: str = "tcp", index: int = 0) -> Forward:
    return Forward(f"link[{link}].passt.{protocol}_ports[{index}]", protocol, parse_ports(text))


def test_a_clash_names_both_keys_and_the_ports() -> None:
    """A person sees which two lines collide, and on what."""
    problems = find_clashes([forward(0, "8080-8090"), forward(1, "127.0.0.1/8085-9000:85-1000")])
    assert [
        Problem(
            key="link[1].passt.tcp_ports[0]",
            reason="forwards tcp port 8085-8090 of the host, as link[0].passt.tcp_ports[0] does",
            hint="give one of the two another host port or another address",
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


# --- the forwards of a table --------------------------------------------------------------------------


def test_forwards_are_read_from_what_the_file_has() -> None:
    """Numbers and texts, alone or in a list; a single one has no index; what cannot be read is left out."""
    table: dict[str, Any] = {
        "udp_ports": 53,
        "mtu": "wrong",
        "tcp_ports": ["8080:80", 99999, True, None, "::1/22"],
    }
    assert [
        Forward("passt.tcp_ports[0]", "tcp", parse_ports("8080:80")),
        Forward("passt.tcp_ports[4]", "tcp", parse_ports("::1/22")),
        Forward("passt.udp_ports", "udp", parse_ports("53")),
    ] == list(read_forwards(table, "passt"))
    assert [] == list(read_forwards({}, "passt"))


def test_one_family_only_narrows_the_forwards() -> None:
    """An IPv4-only and an IPv6-only link may share a port; two of one family may not."""
    four, six = ({f"ipv{version}_only": True, "tcp_ports": 22} for version in (4, 6))
    assert [Forward("a.tcp_ports", "tcp", parse_ports("0.0.0.0/22"))] == list(read_forwards(four, "a"))
    assert [] == find_clashes([*read_forwards(four, "a"), *read_forwards(six, "b")])
    assert 1 == len(find_clashes([*read_forwards(four, "a"), *read_forwards(four, "b")]))
