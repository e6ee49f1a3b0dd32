# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for passt's options: values, the command line, and what passt's help says."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qrapd.passt_options import (
    MAXIMUM_MTU,
    MINIMUM_MTU,
    OWN_BUSINESS,
    PasstOptions,
    check_against_help,
    command_line,
    nearest,
    read_help,
    toml_text,
)
from qrapd.ports import parse_ports

HELPS = ("2023", "2025", "2026")


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


# --- values -------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation() -> None:
    """Numbers and texts are ports, alone or in a list."""
    found = options('tcp_ports = [8080, "127.0.0.1/2222:22"]\nudp_ports = 5353')
    assert ("8080", "127.0.0.1/2222:22") == found.tcp_ports
    assert ("5353",) == found.udp_ports


def test_an_empty_table_asks_for_nothing() -> None:
    """All defaults are passt's own."""
    assert [] == command_line(PasstOptions())


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
        ("mtu = 67", "mtu", "is no MTU for passt; write 68 to 65521 bytes, or 0 to announce none"),
        ("mtu = 65522", "mtu", "is no MTU for passt"),
        ("tcp_ports = true", "tcp_ports.0", 'is neither a port nor a text; write 8080 or "8080:80"'),
        ("tcp_ports = [22, 2.5]", "tcp_ports.1", "is neither a port nor a text"),
        ('tcp_ports = ["22", "80-22"]', "tcp_ports.1", "has the range 80-22, which runs backwards"),
        ('udp_ports = "0"', "udp_ports.0", "has 0, which is no port"),
        ('tcp_ports = ["none", "22"]', "tcp_ports", 'has "none" and others'),
        ("no_tcp = true\ntcp_ports = 22", "tcp_ports", "forwards ports while no_tcp is true"),
        ("no_udp = true\nudp_ports = 22", "udp_ports", "forwards ports while no_udp is true"),
        ('ipv4_only = true\ntcp_ports = "::1/22"', "tcp_ports.0", "needs IPv6 and the link has ipv4_only"),
        (
            'ipv6_only = true\ntcp_ports = "127.0.0.1/22"',
            "tcp_ports.0",
            "needs IPv4 and the link has ipv6_only",
        ),
        ("ipv4_only = true\nipv6_only = true", "ipv6_only", "excludes ipv4_only"),
        (
            'ipv4_only = true\noutbound_if6 = "eth0"',
            "outbound_if6",
            "is for IPv6, which the link does not have",
        ),
        ('address = "192.0.2.300"', "address.0", "is not an IP address"),
        (
            'address = "192.0.2.1/33"',
            "address.0",
            'no good prefix length; write "192.0.2.1/N" with N from 0 to 32',
        ),
        ('address = "127.0.0.1"', "address.0", "is no address of a host on the network"),
        ('address = "ff02::1"', "address.0", "is no address of a host on the network"),
        ('address = "255.255.255.255"', "address.0", "is no address of a host on the network"),
        ('address = "::ffff:192.0.2.1"', "address.0", "is no address of a host on the network"),
        ('address = "fe80::1%eth0"', "address.0", "names an interface"),
        (
            'address = ["192.0.2.1", "192.0.2.2"]',
            "address",
            "holds several IPv4 addresses and passt takes one",
        ),
        ('address = "192.0.2.1/24"\nnetmask = 24', "netmask", "is said by `address` already"),
        ("netmask = 33", "netmask", 'is not a netmask; write "255.255.255.0" or 24'),
        ("netmask = true", "netmask", "is not a netmask"),
        ('netmask = "255.0.255.0"', "netmask", "is not a netmask"),
        ('netmask = "ffff::"', "netmask", "is not a netmask"),
        ('mac_addr = "52:54:0:12:34:56"', "mac_addr", "is not a MAC address; write six bytes"),
        ('mac_addr = "01:00:5e:00:00:01"', "mac_addr", "is not a MAC address that one NIC can have"),
        ('mac_addr = "00:00:00:00:00:00"', "mac_addr", "is not a MAC address that one NIC can have"),
        ('gateway = "127.0.0.1"', "gateway.0", "is no address of a host on the network"),
        ('gateway = ["192.0.2.1", "fe80::1", "fe80::2"]', "gateway", "holds several IPv6 addresses"),
        ('interface = "eth0:1"', "interface", "has 'eth0:1' for an interface's name"),
        ('outbound = "eth0"', "outbound.0", "is not an IP address"),
        ('outbound = "::1"', "outbound.0", "is no address of a host on the network"),
        ('dns = ["none", "192.0.2.5"]', "dns", 'has "none" and others'),
        ('dns = ["192.0.2.5", "resolver"]', "dns.1", "is not an IP address"),
        ('dns_forward = "none"', "dns_forward.0", "is not an IP address"),
        ('search = ""', "search.0", "is not a domain"),
        ('search = ["example.org", "a b"]', "search.1", "is not a domain"),
        ("stats = 1.5", "stats", "is no value for an option of passt"),
        ("dns_host = [true]", "dns_host", "is no value for an option of passt"),
        ('hostname = "a\\u0000b"', "hostname", "holds a NUL"),
        ("a.b = 1", "a", "is no value for an option of passt"),
        ("tcp-ports = 22", "tcp-ports", "is written with underscores here; write tcp_ports"),
        ('"x=y" = 22', "x=y", "is no name of an option"),
        ('"" = 22', "", "is no name of an option"),
    ],
)
def test_what_passt_would_refuse_is_refused(toml: str, key: str, reason: str) -> None:
    """The error stands at its key and says why; passt is not started."""
    found = errors_of(toml)
    assert [key] == list(found)
    assert reason in found[key]
    assert re.search("; (write|leave) ", found[key])


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("mtu = true", "mtu"),
        ('mtu = "1500"', "mtu"),
        ("no_tcp = 1", "no_tcp"),
        ('no_tcp = "true"', "no_tcp"),
        ("address = 7", "address.0"),
        ("dns = [7]", "dns.0"),
        ("search = 7", "search.0"),
        ("interface = 7", "interface"),
        ("mac_addr = 7", "mac_addr"),
    ],
)
def test_a_wrong_type_is_refused(toml: str, key: str) -> None:
    """TOML has types, and nothing is guessed."""
    assert [key] == list(errors_of(toml))


@pytest.mark.parametrize("name", OWN_BUSINESS)
def test_what_is_qrapds_own_business_is_refused(name: str) -> None:
    """Such an option is an error with its reason, however it is spelled."""
    for spelled in (name, name.replace("_", "-"), "--" + name.replace("_", "-")):
        assert {spelled: f"is not for a VM's file: {OWN_BUSINESS[name]}; leave this out"} == errors_of(
            f'"{spelled}" = true'
        )


def test_all_errors_come_at_once() -> None:
    """One run shows all there is to mend."""
    toml = 'udp_ports = [1, 0]\nfd = 3\nmtu = "x"\ntcp-ports = 1\nodd = 1.5'
    assert {"udp_ports.1", "fd", "mtu", "tcp-ports", "odd"} == set(errors_of(toml))


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


# --- the command line ---------------------------------------------------------------------------------


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


# --- passt's help -------------------------------------------------------------------------------------


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
        ("freebind = true", ("passt has no option --freebind", None, "`passt --help` lists those it has")),
        ("no_tpc = false", ("passt has no option --no-tpc", None, "did you mean `no_tcp`?")),
        (
            'outbound_if = "eth0"',
            ("passt has no option --outbound-if", None, "did you mean `outbound_if6`?"),
        ),
        (
            "runas = true",
            ("--runas of passt takes a value", "true", "write runas = and the value, in quotes"),
        ),
        ("quiet = [1]", ("--quiet of passt takes no value", "[1]", "write quiet = true")),
        ("quiet = true", None),
        ("quiet = false", None),
        ('pcap = "x"', None),
        ("mtu = 1500\ntcp_ports = 22\nno_ra = true", None),
    ],
)
def test_options_are_compared_with_the_binarys_help(
    toml: str, expected: tuple[str, str | None, str] | None
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


# --- words for people ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False, 7, 1.5, "eth0", [1, "a"], {"a": [True], "\n": 1}])
def test_a_value_is_shown_as_the_file_has_it(value: object) -> None:
    """What is shown can be pasted back."""
    assert {"key": value} == tomllib.loads(f"key = {toml_text(value)}")


def test_the_nearest_name_is_asked_for() -> None:
    """A slip of the finger finds the right name, and nonsense finds nothing."""
    assert "did you mean `tcp_ports`?" == nearest("tcp_prots", ["udp_ports", "tcp_ports"])
    assert nearest("xyz", ["tcp_ports"]) is None
