# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for a VM's file: its defaults, every kind of mistake in it, and the words in which mistakes are told."""

from __future__ import annotations

import datetime
import itertools
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from qrapd import config
from qrapd.config import Link, Qemu, Restart, VmConfiguration, VmFile, parse
from qrapd.errors import ConfigurationError, Problem
from qrapd.passt_options import PasstOptions

TABLES: dict[str, type[BaseModel]] = {
    "": VmFile,
    "[qemu]": Qemu,
    "[restart]": Restart,
    "[[link]]": Link,
    "[[link]]\n[link.passt]": PasstOptions,
}
"""How the file begins each table, and its model."""


def read(text: str, path: str = "/vms/web.toml") -> VmConfiguration:
    return parse(text, Path(path))


def problems_of(text: str, path: str = "/vms/web.toml") -> list[Problem]:
    with pytest.raises(ConfigurationError) as caught:
        read(text, path)
    assert path == caught.value.path
    return list(caught.value.problems)


def problem_of(text: str, path: str = "/vms/web.toml") -> Problem:
    """The one problem of a file that has just one."""
    (problem,) = problems_of(text, path)
    return problem


# --- defaults -----------------------------------------------------------------------------------------


def test_an_empty_file_is_a_vm() -> None:
    """Everything has a default; without a [[link]] there is no network."""
    vm = read("")
    assert ("web", Path("/vms"), ()) == (vm.name, vm.directory, vm.links)
    assert not vm.autostart
    assert {
        "binary": None,
        "accel": "auto",
        "directory": ".",
        "args": [],
        "console": "journal",
        "sandbox": True,
        "powerdown_timeout": 60,
        "quit_timeout": 5,
    } == vm.qemu.model_dump()
    assert {"policy": "never", "limit": 5, "window": 60} == vm.restart.model_dump()


def test_an_empty_link_is_a_link() -> None:
    """A bare [[link]] is a NIC on a passt that qrapd manages."""
    (link,) = read("[[link]]").links
    assert {
        "mode": "swap",
        "source": "managed",
        "device": "virtio-net-pci",
        "mac": None,
        "guest_addresses": [],
        "stall_timeout": 5,
        "allow_uids": [],
        "passt_binary": "passt",
    } == link.model_dump(exclude={"passt"})
    assert set() == link.passt.model_fields_set


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("source = 'probe'\n[link.passt]\ntcp_ports = [80]", "link[0].passt"),
        ("source = '/tmp/p.sock'\npasst_binary = 'passt'", "link[0].passt_binary"),
        ("allow_uids = [7]", "link[0].allow_uids"),
        ("source = 'a/p.sock'\n[[link]]\nsource = 'a/p.sock'", "link[1].source"),
        ("source = '~/p.sock'", "link[0].source"),
    ],
)
def test_what_has_no_effect_is_told(text: str, key: str) -> None:
    """A passt that is there already obeys no options, and serves one NIC; one of our own has no stranger's socket."""
    with pytest.raises(ConfigurationError) as caught:
        read(f"[[link]]\n{text}")
    assert [key] == [problem.key for problem in caught.value.problems]


def test_the_file_says_where_qemu_works() -> None:
    """Relative paths are relative to the file, absolute ones are themselves."""
    assert Path("/vms/disks") == read("[qemu]\ndirectory = 'disks'").directory
    assert Path("/srv") == read("[qemu]\ndirectory = '/srv'").directory


@pytest.mark.parametrize("name", ["a", "web", "web-2", "0", "a" * 63])
def test_a_name_is_the_files_or_its_stem(name: str) -> None:
    """What the file says goes before what it is called."""
    assert name == read("", f"/vms/{name}.toml").name
    assert name == read(f"name = '{name}'", "/vms/Not A Name.toml").name


# --- MAC addresses ------------------------------------------------------------------------------------


def test_a_derived_mac_is_stable() -> None:
    """The guest finds the same NIC after an update of qrapd: these values must never change."""
    vm = read("[[link]]\n[[link]]")
    assert ["52:54:00:6e:02:e5", "52:54:00:1f:01:da"] == [vm.mac(0), vm.mac(1)]


def test_derived_macs_differ_and_are_unicast() -> None:
    """VMs on one network do not share an address, nor do the links of one VM."""
    names = [f"vm{number}" for number in range(20)]
    vms = [read("[[link]]\n" * 4, f"/vms/{name}.toml") for name in names]
    macs = [vm.mac(index) for vm in vms for index in range(4)]
    assert len(macs) == len(set(macs))
    assert all(re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac) for mac in macs)


def test_a_given_mac_is_taken() -> None:
    """In lower case, as QEMU's monitor shows it."""
    assert "52:54:00:ab:cd:ef" == read("[[link]]\nmac = '52:54:00:AB:CD:EF'").mac(0)


# --- mistakes: what is not TOML -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[qemu]\nargs = oops\n", "line 2, column 8"),
        ("name = 'web'\nname = 'web'\n", "line 2, column 13"),
        ("[qemu\n", "line 1, column 6"),
        ("\n\nargs = ['a',", "line 3, column 13"),
        ("name = '", "line 1, column 9"),
    ],
)
def test_broken_toml_names_line_and_column(text: str, where: str) -> None:
    """Also where the parser says no more than that the file ended."""
    problem = problem_of(text)
    assert "" == problem.key
    assert problem.reason.startswith("is not TOML: ")
    assert where in problem.reason
    assert "see https://toml.io" == problem.hint


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a = " + "[" * 50 + "]" * 50, "[link.passt]\n" + ".".join("x" * 5000) + " = 1"],
)
def test_deep_nesting_is_refused(text: str) -> None:
    """Whether Python's parser gives up first or takes it."""
    assert "has tables or lists nested too deeply" == problem_of(text).reason


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, "-9223372036854775809"])
def test_integers_end_where_tomls_do(number: str) -> None:
    """No number is so large that telling of it would fail."""
    assert problem_of(f"[restart]\nlimit = {number}").reason.startswith("is not TOML: ")


# --- mistakes: keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("nmae = 'web'", "nmae", "did you mean `name`?"),
        ("[qmeu]", "qmeu", "did you mean `qemu`?"),
        ("[[links]]", "links", "did you mean `link`?"),
        ("[[network]]", "network", "a NIC is written as a table [[link]]"),
        ("[qemu]\narg = []", "qemu.arg", "did you mean `args`?"),
        ("[restart]\npolcy = 'always'", "restart.polcy", "did you mean `policy`?"),
        ("[[link]]\n[[link]]\nmacc = ''", "link[1].macc", "did you mean `mac`?"),
        ("args = []", "args", "it belongs into [qemu]"),
        ("[qemu]\nname = 'web'", "qemu.name", "it belongs into the top of the file, above all tables"),
        ("[[link]]\ntcp_ports = 22", "link[0].tcp_ports", "it belongs into [link.passt]"),
        ("[restart]\nx = 1", "restart.x", "known here: policy, limit, window"),
        ('"a.b c" = 1', '"a.b c"', "known here: name, autostart, qemu, restart, link"),
    ],
)
def test_an_unknown_key_gets_a_hint(text: str, key: str, hint: str) -> None:
    """The nearest known one, the table that has it, or all that there are."""
    assert Problem(key, "is not a known key", hint=hint) == problem_of(text)


@pytest.mark.parametrize(
    ("text", "key", "reason", "hint"),
    [
        ("tcp-ports = 22", "tcp-ports", "is written with underscores here", "write tcp_ports"),
        ("fd = 3", "fd", "is not for a VM's file: qrapd hands passt its socket itself", "leave this out"),
        (
            '"a b" = 1',
            '"a b"',
            "is no name of an option",
            "write one from `passt --help`, with underscores for the dashes",
        ),
    ],
)
def test_a_wrong_name_of_an_option_gets_a_hint(text: str, key: str, reason: str, hint: str) -> None:
    """What passt may have, only passt knows; what no passt can have is told at once."""
    problem = problem_of(f"[[link]]\n[link.passt]\n{text}")
    assert (f"link[0].passt.{key}", reason, hint) == (problem.key, problem.reason, problem.hint)


# --- mistakes: types and values -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qemu = 5", Problem("qemu", "must be a table", "5", "write it as [qemu]")),
        ("restart = 'on'", Problem("restart", "must be a table", "'on'", "write it as [restart]")),
        ("[[qemu]]", Problem("qemu", "must be a table", "[{}]", "write it as [qemu]")),
        (
            "[link]\nmode = 'swap'",
            Problem("link", "must be a list: [ ... ]", "{mode = 'swap'}", "write it as [[link]]"),
        ),
        ("link = [true]", Problem("link[0]", "must be a table", "true", "write it as [[link]]")),
        ("[[link]]\npasst = 5", Problem("link[0].passt", "must be a table", "5", "write it as [link.passt]")),
        (
            "[[link]]\n[[link.passt]]",
            Problem("link[0].passt", "must be a table", "[{}]", "write it as [link.passt]"),
        ),
        ("autostart = 1", Problem("autostart", "must be true or false, without quotes", "1")),
        ("[qemu]\nargs = '-m 1G'", Problem("qemu.args", "must be a list: [ ... ]", "'-m 1G'")),
        ("[qemu]\nargs = ['-m', 512]", Problem("qemu.args[1]", "must be a string, in quotes", "512")),
        ("[qemu]\nbinary = ''", Problem("qemu.binary", "must not be empty", "''")),
        ("[qemu]\naccel = 'hax'", Problem("qemu.accel", "must be 'auto', 'kvm', 'tcg' or 'args'", "'hax'")),
        (
            "[qemu]\npowerdown_timeout = '60'",
            Problem("qemu.powerdown_timeout", "must be a number, without quotes", "'60'"),
        ),
        (
            "[qemu]\npowerdown_timeout = -1",
            Problem("qemu.powerdown_timeout", "must be 0 or more", "-1"),
        ),
        (
            "[qemu]\npowerdown_timeout = 1e9",
            Problem("qemu.powerdown_timeout", "must be 86400 or less", "1000000000.0"),
        ),
        ("[qemu]\nquit_timeout = 0", Problem("qemu.quit_timeout", "must be more than 0", "0")),
        ("[restart]\nwindow = inf", Problem("restart.window", "must be a finite number", "inf")),
        ("[restart]\nlimit = 1.5", Problem("restart.limit", "must be a whole number, without quotes", "1.5")),
        (
            "[[link]]\nsource = 'passt'",
            Problem(
                "link[0].source",
                "is neither managed nor probe nor a socket's path",
                "'passt'",
                "a path has a slash in it",
            ),
        ),
        (
            "[[link]]\nguest_addresses = ['192.0.2.1/24']",
            Problem(
                "link[0].guest_addresses[0]",
                "is not an IP address",
                "'192.0.2.1/24'",
                'write for example "192.0.2.1" or "2001:db8::1"',
            ),
        ),
        (
            "[[link]]\n[link.passt]\nmtu = 9",
            Problem(
                "link[0].passt.mtu",
                "is no MTU for passt",
                "9",
                "write 68 to 65521 bytes, or 0 to announce none",
            ),
        ),
    ],
)
def test_a_wrong_value_is_explained(text: str, expected: Problem) -> None:
    """Key, value, what it must be, and for a table how it is written."""
    assert expected == problem_of(text)


@pytest.mark.parametrize("name", ["", "Web", "a.b", "a" * 64, "a\\n", "web_2", "ü"])
def test_a_bad_name_is_told_the_pattern(name: str) -> None:
    """Whether it is the file's word or the file's own name."""
    problem = problem_of(f'name = "{name}"')
    assert ("name", "must be 1 to 63 characters of a-z, 0-9 and -") == (problem.key, problem.reason)


@pytest.mark.parametrize("stem", ["Web", "my vm", "web_2", "a" * 64, "web\n"])
def test_a_file_whose_name_cannot_serve_needs_a_name(stem: str) -> None:
    """The hint says what to add, and the pattern is told."""
    problem = problem_of("", f"/vms/{stem}.toml")
    assert "name" == problem.key
    assert "1 to 63 characters of a-z, 0-9 and -" in problem.reason
    assert repr(stem) == problem.value
    assert "add a line like name = 'web' at the top" == problem.hint


def test_a_wrong_name_is_not_missing_too() -> None:
    """One mistake is one problem."""
    assert "must be a string, in quotes" == problem_of("name = 5", "/vms/Not A Name.toml").reason


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("qemu.binary", "[qemu]\nbinary = '{}'"),
        ("qemu.directory", "[qemu]\ndirectory = '{}'"),
        ("qemu.args[0]", "[qemu]\nargs = ['{}']"),
        ("link[0].source", "[[link]]\nsource = '/{}'"),
        ("link[0].device", "[[link]]\ndevice = 'e1000,{}'"),
        ("link[0].passt_binary", "[[link]]\npasst_binary = '{}'"),
        ("link[0].passt.hostname", "[[link]]\n[link.passt]\nhostname = '{}'"),
    ],
)
def test_what_no_argument_can_hold_is_refused(key: str, text: str) -> None:
    """A NUL would make exec fail, long after the file was found right."""
    problem = problem_of(text.replace("'", '"').format("\\u0000"))
    assert (key, "leave it out") == (problem.key, problem.hint)


# --- mistakes: the NIC --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mac",
    [
        "52:54:00:12:34",
        "52-54-00-12-34-56",
        "52:54:00:12:34:5g",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
        "",
    ],
)
def test_a_bad_mac_is_explained(mac: str) -> None:
    """Form, group addresses and the null address."""
    problem = problem_of(f"[[link]]\nmac = '{mac}'")
    assert ("link[0].mac", repr(mac)) == (problem.key, problem.value)
    assert problem.reason.startswith("is not a MAC address")
    assert str(problem.hint).startswith("write ")


def test_a_mac_belongs_to_one_link() -> None:
    """However it is written."""
    problem = problem_of("[[link]]\nmac = '52:54:00:AA:00:01'\n[[link]]\n[[link]]\nmac = '52:54:00:aa:00:01'")
    assert ("link[2].mac", "is that of link[0] too", "'52:54:00:aa:00:01'") == (
        problem.key,
        problem.reason,
        problem.value,
    )


@pytest.mark.parametrize("device", ["virtio-net-pci", "e1000", "virtio-net-pci,mq=on,vectors=4", "rtl8139"])
def test_a_device_may_have_properties(device: str) -> None:
    """They are QEMU's and are not looked at."""
    assert device == read(f"[[link]]\ndevice = '{device}'").links[0].device


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("virtio-net-pci,netdev=net0", "sets netdev=, which qrapd sets itself"),
        ("virtio-net-pci,mq=on,mac=52:54:00:12:34:56", "sets mac=, which qrapd sets itself"),
        ("e1000,id=nic", "sets id=, which qrapd sets itself"),
        ("", "does not begin with a QEMU device's name"),
        ("-device e1000", "does not begin with a QEMU device's name"),
        (",mq=on", "does not begin with a QEMU device's name"),
    ],
)
def test_a_device_leaves_to_qrapd_what_is_qrapds(device: str, reason: str) -> None:
    """What would tear the NIC off its hub is refused, with the key that serves instead."""
    problem = problem_of(f"[[link]]\ndevice = '{device}'")
    assert ("link[0].device", reason, repr(device)) == (problem.key, problem.reason, problem.value)
    assert problem.hint


# --- mistakes: QEMU's arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-netdev", "--netdev", "-nic", "-net", "--net"])
def test_a_network_in_args_and_a_link_exclude_each_other(option: str) -> None:
    """Two networks would be a surprise; without links the arguments may make one."""
    args = f"[qemu]\nargs = ['-m', '1G', '{option}', 'user']\n"
    problem = problem_of(f"{args}[[link]]")
    assert ("qemu.args[2]", repr(option)) == (problem.key, problem.value)
    assert "[[link]]" in problem.reason
    assert "remove it and what follows it" in str(problem.hint)
    assert [] == [*read(args).links]


def test_a_link_that_is_no_list_hides_nothing() -> None:
    """[link] for [[link]] is told, and so is what is wrong in it, and what does not go with a link."""
    text = "[qemu]\nargs = ['-nic', 'user']\n[link]\nmca = 1\n[link.passt]\ntcp_ports = [0]"
    problems = problems_of(text)
    assert ["qemu.args[0]", "link", "link[0].mca", "link[0].passt.tcp_ports[0]"] == [
        each.key for each in problems
    ]
    assert "write it as [[link]]" == problems[1].hint


def test_a_link_that_is_no_list_is_told_alone_if_all_else_is_right() -> None:
    """It is wrong all the same."""
    assert "link" == problem_of("[link]\nmac = '52:54:00:12:34:56'").key


def test_an_option_and_its_value_are_two_arguments() -> None:
    """A line of a shell, copied whole, is told as what it is, with the words to write."""
    problem = problem_of("[qemu]\nargs = ['-enable-kvm', '-m 1G  -smp 2']")
    assert "qemu.args[1]" == problem.key
    assert "several arguments in one" in problem.reason
    assert "'-m 1G  -smp 2'" == problem.value
    assert "give each its own quotes: '-m', '1G', '-smp', '2'" == problem.hint


@pytest.mark.parametrize(
    "args",
    [
        ["-name", "my web server"],
        ["-append", "-- -v verbose"],
        ["--append", "--x y"],
        ["-drive", "file=my disk.img"],
    ],
)
def test_values_may_have_blanks(args: list[str]) -> None:
    """A kernel's command line may even begin with a dash."""
    assert args == read(f"[qemu]\nargs = {args}").qemu.args


@pytest.mark.parametrize("option", ["-daemonize", "--daemonize"])
def test_qemu_stays_in_the_foreground(option: str) -> None:
    """A daemon would leave qrapd without a child."""
    problem = problem_of(f"[qemu]\nargs = ['{option}']")
    assert ("qemu.args[0]", "would take QEMU out of qrapd's hands") == (problem.key, problem.reason)


@pytest.mark.parametrize(
    "args",
    [
        ["-accel", "tcg"],
        ["--accel", "tcg"],
        ["-enable-kvm"],
        ["-machine", "q35,accel=kvm"],
        ["-M", "accel=tcg"],
        ["--machine", "accel=kvm:tcg"],
    ],
)
def test_the_accelerator_is_said_once(args: list[str]) -> None:
    """By the key or by the arguments; `auto` and `args` leave it to the latter."""
    text = f"[qemu]\naccel = '{{}}'\nargs = {args}"
    for accel in ("kvm", "tcg"):
        problem = problem_of(text.format(accel))
        assert ("qemu.accel", repr(accel)) == (problem.key, problem.value)
        assert "remove one of the two, or say accel = 'args'" == problem.hint
    for accel in ("auto", "args"):
        assert args == read(text.format(accel)).qemu.args


@pytest.mark.parametrize(
    "args", [[], ["-machine", "q35"], ["-machine"], ["-append", "accel=kvm"], ["-M", "noaccel=1"]]
)
def test_arguments_that_choose_no_accelerator(args: list[str]) -> None:
    """A word that looks like it, elsewhere, is none of it."""
    assert not config.chooses_accelerator(args)


# --- mistakes: ports ----------------------------------------------------------------------------------


def test_a_bad_port_is_explained() -> None:
    """At its place in the list, with passt's grammar in examples."""
    assert Problem(
        "link[0].passt.tcp_ports[1]",
        "has 99999, which is no port",
        "'8080:99999'",
        "write a number from 1 to 65535",
    ) == problem_of("[[link]]\n[link.passt]\ntcp_ports = [80, '8080:99999']")


LINK = "[[link]]\n[link.passt]\n"


@pytest.mark.parametrize(
    ("text", "key", "reason", "value"),
    [
        (
            f"{LINK}tcp_ports = ['8080:80', '8000-8100']",
            "link[0].passt.tcp_ports[1]",
            "forwards tcp port 8080 of the host, as link[0].passt.tcp_ports[0] does",
            "'8000-8100'",
        ),
        (
            f"{LINK}udp_ports = 53\n{LINK}udp_ports = ['127.0.0.1/53']",
            "link[1].passt.udp_ports[0]",
            "forwards udp port 53 of the host, as link[0].passt.udp_ports does",
            "'127.0.0.1/53'",
        ),
        (
            f"{LINK}tcp_ports = 22\nipv4_only = true\n{LINK}tcp_ports = 22",
            "link[1].passt.tcp_ports",
            "forwards tcp port 22 of the host, as link[0].passt.tcp_ports does",
            "22",
        ),
    ],
)
def test_two_forwards_of_one_port_clash(text: str, key: str, reason: str, value: str) -> None:
    """In one link and between links; the later one is told, and names the earlier."""
    problem = problem_of(text)
    assert (key, reason, value) == (problem.key, problem.reason, problem.value)
    assert "another address" in str(problem.hint)


@pytest.mark.parametrize(
    "text",
    [
        f"{LINK}tcp_ports = 53\nudp_ports = 53",
        f"{LINK}tcp_ports = ['127.0.0.1/22', '127.0.0.2/22']",
        f"{LINK}tcp_ports = 22\nipv4_only = true\n{LINK}tcp_ports = 22\nipv6_only = true",
        f"{LINK}tcp_ports = ['8080:80', '8081:80']",
    ],
)
def test_forwards_that_do_not_clash(text: str) -> None:
    """Other protocols, addresses, families and ports stay apart; the guest's port may be the same."""
    assert read(text).links


def test_clashes_are_found_beside_other_mistakes() -> None:
    """A wrong key elsewhere, or a wrong link before, hides nothing and shifts no index."""
    text = "link = [1, {mtu = 1, passt = {tcp_ports = 22}}, {passt = {mtu = 1, tcp_ports = [0, 22]}}]"
    assert [
        "link[0]",
        "link[1].mtu",
        "link[2].passt.mtu",
        "link[2].passt.tcp_ports[0]",
        "link[2].passt.tcp_ports[1]",
    ] == [problem.key for problem in problems_of(text)]


# --- all of it at once --------------------------------------------------------------------------------


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    """Somebody who mends a file does it from the top, and once."""
    text = """
        autostart = "yes"
        [restart]
        polcy = 1
        [[link]]
        mac = "x"
        [link.passt]
        udp_ports = [1, 0]
        tcp-ports = 1
        tcp_ports = [22, 22]
        [[link]]
        device = "e1000,id=1"
        [link.passt]
        fd = 3
        tcp_ports = 22
        [qemu]
        args = ["-m", 1, "-nic", "user"]
        accel = "x"
    """
    assert [
        "name",
        "autostart",
        "restart.polcy",
        "link[0].mac",
        "link[0].passt.udp_ports[1]",
        "link[0].passt.tcp-ports",
        "link[0].passt.tcp_ports[1]",
        "link[1].device",
        "link[1].passt.fd",
        "link[1].passt.tcp_ports",
        "link[1].passt.tcp_ports",
        "qemu.args[1]",
        "qemu.args[2]",
        "qemu.accel",
    ] == [problem.key for problem in problems_of(text, "/vms/A B.toml")]


def test_the_count_is_in_the_message() -> None:
    """The error itself names the file."""
    with pytest.raises(ConfigurationError, match=r"^/vms/web\.toml: 2 problems$"):
        read("a = 1\nb = 1")


# --- no mistake is told in pydantic's words -----------------------------------------------------------


def toml(value: object) -> str:
    """A value in TOML, in one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
        case float():
            return "nan" if math.isnan(value) else repr(value)
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())}}}"
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return str(value)


JARGON = re.compile(
    r"input|\bvalid |instance|pydantic|str_|validation|assertion|dictionary|Value error", re.IGNORECASE
)


def check_words(problems: list[Problem]) -> None:
    for problem in problems:
        assert problem.reason
        assert problem.reason[:1].islower(), problem
        assert not JARGON.search(f"{problem.reason} {problem.hint}"), problem
        assert "\n" not in str(problem), problem


def faults_of(text: str) -> list[Problem]:
    """The problems of a file that may have none."""
    try:
        read(text)
    except ConfigurationError as error:
        return list(error.problems)
    return []


WRONG: list[Any] = [
    *(
        True,
        0,
        -1,
        10**18,
        0.5,
        -0.5,
        1e300,
        math.inf,
        -math.inf,
        math.nan,
        "",
        " ",
        "x",
        "\0",
        "\n",
        "é" * 300,
    ),
    *([], [[]], [{}], [0], [True], [""], ["x", "x"], {}, {"x": 1}, {"name": {}}),
    *(
        datetime.date(2024, 2, 29),
        datetime.time(1, 2, 3),
        datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
    ),
]
KEYS = [(header, key) for header, model in TABLES.items() for key in model.model_fields]


@pytest.mark.parametrize(("header", "key"), KEYS, ids=[f"{header.split()[-1:]}{key}" for header, key in KEYS])
def test_every_wrong_value_of_every_key_is_told_in_our_words(header: str, key: str) -> None:
    """Whatever is wrong with a key, no word of the library that found it reaches a person."""
    for value in WRONG:
        check_words(faults_of(f"{header}\n{key} = {toml(value)}"))


scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["-netdev", "-accel", "kvm", "managed", "22", "8080:80", "none", "52:54:00:00:00:01"])
    | st.dates()
    | st.times()
)
keys = st.sampled_from(
    [*itertools.chain(*(model.model_fields for model in TABLES.values())), "fd", "tcp-ports"]
)


def tables(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(
        keys | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=4
    )


values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | tables(inner), max_leaves=6)
links = st.lists(tables(values) | st.fixed_dictionaries({"passt": tables(values)}), max_size=3)
files = st.fixed_dictionaries({}, optional={"name": values, "qemu": tables(values), "link": links | values})


@given(files | tables(values))
def test_whatever_stands_in_a_file_is_told_in_our_words(data: dict[str, Any]) -> None:
    """Any TOML at all is a VM, or an error that lists what is wrong with it."""
    text = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in data.items())
    check_words(faults_of(text))


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("[]{}=.,\"'#\n\t a1-"))
def test_whatever_a_file_holds_is_toml_or_told(text: str) -> None:
    """No text makes the parser raise what nobody expects."""
    check_words(faults_of(text))


def test_the_tests_own_toml_is_toml() -> None:
    """The writer above writes what the reader reads."""
    data = {"a b": [value for value in WRONG if value == value], "\U0001f40d": {"": ['\x7f\\"']}}
    assert data == tomllib.loads("\n".join(f"{toml(key)} = {toml(value)}" for key, value in data.items()))
