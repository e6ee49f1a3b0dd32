# SPDX-License-Identifier: GPL-2.0-or-later
"""Wrapped command lines: where the stream and its NIC end up, what stays as it was, and what QEMU makes of it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.config import NAME_PATTERN
from qrapd.errors import UsageError
from qrapd.qemu_arguments import Endpoints
from qrapd.qrap_arguments import Explicit, Patched, qemu_names, read_command_line
from qrapd.wrap_arguments import Wrapped, wrap

ENDPOINTS = Endpoints("QMP", "USER", None, ["STREAM"])
MONITORS = [
    *("-chardev", "socket,id=qrapd-qmp,fd=QMP,server=on,wait=off", "-mon", "chardev=qrapd-qmp,mode=control"),
    *("-chardev", "socket,id=qrapd-user-qmp,fd=USER,server=on,wait=off"),
    *("-mon", "chardev=qrapd-user-qmp,mode=control"),
    *("-global", "virtio-net-device.host_mtu=32750"),
]


def link(hub: int) -> list[str]:
    """What brings the stream to a hub."""
    return [
        *("-netdev", "socket,id=link0-stream1,fd=STREAM"),
        *("-netdev", f"hubport,id=link0-port1,hubid={hub},netdev=link0-stream1"),
    ]


def explicit(*arguments: str, fd: int = 7) -> Wrapped:
    """``qrapd wrap FD kvm ARGUMENTS``."""
    return wrap(Explicit(fd, ["kvm", *arguments]), pid=4711)


def result(*arguments: str, fd: int = 7, binary: str = "/usr/bin/kvm") -> list[str]:
    """What QEMU gets, without its name, the monitors, and the limit of the MTU."""
    argv = explicit(*arguments, fd=fd).command_line(ENDPOINTS, binary)
    assert [binary, *MONITORS] == argv[: len(MONITORS) + 1]
    return argv[len(MONITORS) + 1 :]


# ---- the name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("web", "web"),
        ("guest=web,debug-threads=on", "web"),
        ("debug-threads=on,guest=web", "web"),
        ("Web_Server.1,process=x", "web-server-1"),
        ("a,,b", "a-b"),
        ("{x}", "x"),
        ("x" * 70, "x" * 63),
        (f"--{'x' * 62} y", "x" * 62),
        ("Ünïcode", "n-code"),
        ("web\n", "web"),
        ("debug-threads=on", "wrap-4711"),
        ("guest=", "wrap-4711"),
        ("...", "wrap-4711"),
    ],
)
def test_the_name(value: str, expected: str) -> None:
    """QEMU's name for the VM, made to fit; the process id if nothing fits."""
    assert expected == explicit("-nic", "socket,fd=7", "-name", value).name


def test_the_last_name_counts() -> None:
    """As for QEMU, which merges them."""
    assert "b" == explicit("-name", "a", "--name", "b", "-name", "process=c", "-nic", "socket,fd=7").name
    assert "wrap-4711" == explicit("-nic", "socket,fd=7").name


@given(st.text())
def test_every_name_can_be_a_vms(value: str) -> None:
    """Whatever QEMU may call it."""
    assert re.match(NAME_PATTERN, explicit("-nic", "socket,fd=7", "-name", value).name)


# ---- the stream's netdev


@pytest.mark.parametrize(
    "value",
    [
        "socket,id=n,fd=7",
        "socket,fd=07,id=n",
        "fd=7,type=socket,id=n",
        "socket,fd=3,id=n,fd=7,id=m",
        "type=socket,id=n,fd=7",
    ],
)
@pytest.mark.parametrize("option", ["-netdev", "--netdev"])
def test_netdev_becomes_a_hubport(option: str, value: str) -> None:
    """In its place, with its id, in any order of its keys; the hub's other port leads to the stream."""
    expected = ["-m", "1G", *link(100), "-netdev", "hubport,id=n,hubid=100", "-device", "e1000,netdev=n"]
    got = result("-m", "1G", option, value, "-device", "e1000,netdev=n")
    assert expected == [word.replace(",id=m", "") for word in got]


@pytest.mark.parametrize(
    "value",
    [
        '{"type":"socket","id":"n","fd":"7"}',
        "{'fd': '7', 'id': 'n', 'type': 'socket'}",
        '{"type":"stream","id":"n","addr":{"type":"fd","str":"7"},"server":false}',
        "stream,id=n,addr.type=fd,addr.str=7",
    ],
)
def test_netdev_in_the_newer_notations(value: str) -> None:
    """Then its hubport is in JSON, too: QEMU makes those first, and those that refer to them."""
    nic = ["-device", '{"driver":"e1000","netdev":"n"}']
    port = '{"type":"hubport","id":"n","hubid":100}'
    assert [*link(100), "-netdev", port, *nic] == result("-netdev", value, *nic)


def test_nic_option() -> None:
    """What is said of the NIC stays with it."""
    expected = ["-nic", "hubport,model=e1000,mac=52:54:00:00:00:01,id=a,hubid=100"]
    value = "socket,model=e1000,fd=7,mac=52:54:00:00:00:01,id=a"
    assert [*link(100), *expected, "-S"] == result("-nic", value, "-S")
    assert [*link(100), "-nic", "hubport,hubid=100"] == result("-nic", "type=socket,fd=7")


def test_net_option() -> None:
    """Its hub is there already, and the stream stays on it."""
    assert ["-net", "nic", *link(0)] == result("-net", "nic", "-net", "socket,fd=7")
    assert [*link(0), "-net", "nic,model=e1000"] == result(
        "-net", "socket,fd=7,name=x", "-net", "nic,model=e1000"
    )


def test_a_hub_of_the_callers_own() -> None:
    """A stream that sits behind a hub stays on that; what `qrapd plan` prints, too, with its ids."""
    own = ["-netdev", "hubport,id=q,hubid=3", "-device", "e1000,netdev=q"]
    stream = ["-netdev", "socket,id=s,fd=7", "-netdev", "hubport,id=p,hubid=3,netdev=s"]
    assert [*link(3), *own] == result(*stream, *own)
    assert [*own, *link(3)] == result(*own, *stream)
    planned = [
        *link(0),
        "-netdev",
        "hubport,id=link0-nic,hubid=0",
        "-device",
        "e1000,id=link0,netdev=link0-nic",
    ]
    assert planned == result(*[word.replace("STREAM", "7") for word in planned])


def test_the_hubs_number() -> None:
    """The lowest from 100 on that the command line does not use."""
    stream = ("-nic", "socket,fd=7")
    ports = ("-netdev", "hubport,id=a,hubid=100", "-netdev", '{"type":"hubport","id":"b","hubid":102}')
    assert 101 == explicit(*ports, *stream).hub
    assert 103 == explicit(*ports, *stream, "-nic", "hubport,hubid=0x65").hub
    assert 0 == explicit("-net", "socket,fd=7").hub


def test_patched() -> None:
    """qrap's own netdev is on descriptor 5, in either notation; the NIC that it has added uses it."""
    for other in ("x", '{"driver":"x","bus":"pci.3","addr":"0x0"}'):
        wanted = read_command_line(["-m", "1G", "-device", other], None, lambda _: False)
        assert isinstance(wanted, Patched)
        argv = wrap(wanted, pid=1).command_line(ENDPOINTS, "kvm")
        assert [*wanted.arguments[:6], *link(100)] == argv[len(MONITORS) + 1 : -2]
        assert "hostnet0" in argv[-1]
        assert "100" in argv[-1]


def test_where_to_look_for_qemu() -> None:
    """The order is qrap's; some machines QEMU calls otherwise."""
    assert ("kvm", "qemu-kvm", "qemu-system-x86_64", "/usr/libexec/qemu-kvm") == qemu_names("x86_64")
    assert "qemu-system-i386" == qemu_names("i686")[2]


# ---- the NIC


@pytest.mark.parametrize(
    "nic",
    [
        ("-device", "e1000,netdev=n"),
        ("--device", "netdev=n,driver=e1000"),
        ("-device", "{'driver':'e1000','netdev':'n'}"),
        ("-net", "nic,netdev=n"),
        ("-device", "e1000,id=a", "-set", "device.a.netdev=n"),
    ],
)
def test_a_nic_of_the_callers(nic: tuple[str, ...]) -> None:
    """It is found in any notation, and then none is added."""
    port = ("-netdev", "hubport,id=n,hubid=100")
    assert [*nic, *link(100), *port] == result(*nic, "-netdev", "socket,id=n,fd=7")
    assert [*link(100), *port, *nic] == result("-netdev", "socket,id=n,fd=7", *nic)


@pytest.mark.parametrize(
    ("arguments", "binary", "model"),
    [
        ((), "kvm", "virtio-net-pci"),
        (("-M", "virt"), "/usr/bin/qemu-system-aarch64", "virtio-net-pci"),
        ((), "/usr/bin/qemu-system-s390x", "virtio-net-ccw"),
        (("-machine", "accel=kvm,type=s390-ccw-virtio-7.2"), "kvm", "virtio-net-ccw"),
        (("-machine", "s390-ccw-virtio", "-M", "q35", "-machine", "accel=tcg"), "kvm", "virtio-net-pci"),
        (("-M", "microvm"), "qemu-system-x86_64", "virtio-net-device"),
    ],
)
def test_a_nic_where_there_is_none(arguments: tuple[str, ...], binary: str, model: str) -> None:
    """One of the machine's kind, and last: all other devices keep their places."""
    others = ("-device", "x", "-device", "e1000,netdev=other")
    expected = [*link(100), "-netdev", "hubport,id=n,hubid=100", *others, *arguments]
    added = ["-device", f"{model},netdev=n,id=link0"]
    assert [*expected, *added] == result("-netdev", "socket,id=n,fd=7", *others, *arguments, binary=binary)


def test_a_nic_for_a_hub_without_one() -> None:
    """QEMU connects `-net`'s hub to no NIC of itself, and so a port for one is added, too."""
    port = ["-netdev", "hubport,id=link0-nic,hubid=0"]
    added = ["-device", "virtio-net-pci,netdev=link0-nic,id=link0"]
    assert [*link(0), *port, "-S", *added] == result("-net", "socket,fd=7", "-S")
    elsewhere = ["-net", "nic,netdev=u", "-nic", "hubport,hubid=3"]
    assert [*link(0), *port, *elsewhere, *added] == result("-net", "socket,fd=7", *elsewhere)


@pytest.mark.parametrize(
    "nic",
    [
        ["-netdev", "hubport,id=q,hubid=0", "-device", "e1000,netdev=q"],
        ["-nic", "hubport,hubid=0"],
        [
            "-netdev",
            "hubport,id=q,hubid=0",
            "-netdev",
            "hubport,id=r,hubid=9,netdev=q",
            "-nic",
            "hubport,hubid=9",
        ],
        [
            "-netdev",
            "hubport,id=r,hubid=9",
            "-netdev",
            "hubport,id=q,hubid=0,netdev=r",
            "-nic",
            "hubport,hubid=9",
        ],
    ],
)
def test_a_nic_elsewhere_on_the_hub(nic: list[str]) -> None:
    """Then none is added."""
    assert [*link(0), *nic] == result("-net", "socket,fd=7", *nic)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing in QEMU's arguments takes the stream from descriptor 7"),
        (("-netdev", "socket,id=n,fd=8"), "nothing"),
        (("-netdev", "socket,id=n,fd=x7"), "nothing"),
        (("-netdev", "tap,id=n,fd=7"), "nothing"),
        (("-netdev", "stream,id=n,addr.type=unix,addr.str=7"), "nothing"),
        (("-nic", "stream,addr.type=fd,addr.str=7"), "nothing"),
        (("-netdev", "{'type':'socket','id':'n','fd':'7'"), "nothing"),
        (("-netdev", "[" * 100000), "nothing"),
        (("-netdev", '{"a":' * 100000), "nothing"),
        (("-netdev",), "nothing"),
        (("-add-fd", "fd=7,set=1"), "nothing"),
        (
            ("-netdev", "socket,id=n,fd=7", "-nic", "socket,fd=7"),
            "n,fd=7` and `-nic socket,fd=7` all take it",
        ),
        (("-netdev", "socket,fd=7"), "has no id"),
        (("-nic", "socket,fd=7", "-daemonize"), "out of qrapd's hands"),
        (("--daemonize",), "out of qrapd's hands"),
        (("-nic", "socket,fd=7", "-chardev", "null,id=qrapd-qmp"), "needs for its own: qrapd-qmp"),
        (("-nic", "socket,fd=7", "-netdev", "user,id=link0-stream12"), "needs for its own: link0-stream12"),
        (("-netdev", "socket,id=link0-port1,fd=7"), "needs for its own: link0-port1"),
        (("-netdev", "socket,id=n,fd=7", "-device", "x,id=link0"), "needs for its own: link0"),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: str) -> None:
    """What cannot be supervised is the caller's to change, and every message says how."""
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        explicit(*arguments)
    assert caught.value.hint


def test_ids_that_only_look_like_ours() -> None:
    """They may stay: nothing of that name will be added."""
    nic = ("-device", "e1000,netdev=n,id=link0", "-chardev", "null,id=qmp", "-netdev", "user,id=link0-portal")
    assert [*link(100), "-netdev", "hubport,id=n,hubid=100", *nic] == result(
        "-netdev", "socket,id=n,fd=7", *nic
    )


# ---- in general

INERT = [
    *(["-S"], ["-nographic"], ["disk.img"], ["-m", "1G"], ["-append", "a -net b"], ["-device", "x,id=a"]),
    *(["-name", "a"], ["-qmp", "stdio"], ["-monitor", "none"], ["-serial", "mon:stdio"], ["-pidfile", "p"]),
    *(["-netdev", "user,id=u"], ["-device", "e1000,netdev=u"], ["-nic", "none"], ["-chardev", "null,id=c"]),
    *(
        ["-netdev", "hubport,id=h,hubid=100"],
        ["-netdev", "socket,id=o,fd=8"],
        ["-net", "nic,netdev=u"],
        ["-M", "q35"],
    ),
]
STREAMS = [
    ["-netdev", "socket,id=n,fd=7"],
    ["--netdev", "{'type':'socket','id':'n','fd':'7'}"],
    ["-netdev", "stream,id=n,addr.type=fd,addr.str=7"],
    ["-nic", "socket,fd=7"],
    ["-net", "socket,fd=7"],
]
GROUPS = st.lists(st.sampled_from(INERT))


@given(GROUPS, st.sampled_from(STREAMS), GROUPS, st.sampled_from([[], ["-device", "rtl8139,netdev=n"]]))
def test_all_else_stays_as_it_was(
    before: list[list[str]], stream: list[str], after: list[list[str]], nic: list[str]
) -> None:
    """Words around the stream keep their order; one netdev has the stream, and one NIC is on its hub."""
    first, last = [*chain(*before)], [*chain(*after, nic)]
    wrapped = explicit(*first, *stream, *last)
    got = wrapped.command_line(ENDPOINTS, "kvm")
    rest = got[1 + len(MONITORS) :]
    assert first == rest[: len(first)]
    assert link(wrapped.hub) == rest[len(first) : len(first) + 4]
    added = [word for word in rest if word.endswith(",id=link0")]
    end = len(rest) - 2 * len(added)
    assert last == rest[end - len(last) : end]
    assert 1 == sum("fd=STREAM" in word for word in got)
    assert not any("fd=7" in word or "str=7" in word for word in got)
    assert (stream[0] == "-net" or (not nic and stream[0] != "-nic")) == bool(added)


WORDS = st.sampled_from(["-netdev", "-nic", "-net", "-device", "-set", "-name", "-M", "socket,id=n,fd=7"])
PIECES = st.sampled_from(
    ["socket", "fd=7", "hubport", "hubid=", "9" * 30, "netdev=n", "id=n", ",", "{", "}", '"', "'", "\\"]
)


@given(st.lists(WORDS | st.lists(PIECES).map("".join) | st.text(max_size=9)))
def test_odd_command_lines(arguments: list[str]) -> None:
    """Each is wrapped, or refused with a reason: what is wrong otherwise, QEMU will say."""
    try:
        argv = explicit(*arguments).command_line(ENDPOINTS, "kvm")
    except UsageError:
        return
    assert 1 == sum("fd=STREAM" in word for word in argv)


# ---- a real QEMU


class RunningQemu:
    """A QEMU whose guest is not started, one end of its stream, and a monitor."""

    def __init__(self, stream: socket.socket, monitor: socket.socket) -> None:
        self.stream = stream
        self._monitor = monitor.makefile("rw")
        assert "QMP" in json.loads(self._monitor.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        for line in self._monitor:
            answer = json.loads(line)
            if "event" not in answer:
                return answer["return"]
        pytest.fail("QEMU has hung up")

    def hubs(self) -> dict[int, list[str]]:
        """What `info network` says of each hub: its members, NICs and netdevs, each with its type."""
        hubs: dict[int, list[str]] = {}
        members: list[str] = []
        told = self.execute("human-monitor-command", **{"command-line": "info network"})
        for line in told.splitlines():
            if hub := re.fullmatch(r"hub (\d+)", line):
                members = hubs[int(hub[1])] = []
            elif member := re.fullmatch(r" \\ \S+: (\S+): index=\d+,type=(\w+),.*", line):
                members.append(f"{member[2]} {member[1]}")
            else:
                members = []
        return {hub: sorted(members) for hub, members in hubs.items()}

    def expect_frame_of_the_nic(self) -> None:
        """Let the NIC speak, and hear it at the stream's other end."""
        self.execute("cont")
        self.execute("announce-self", initial=50, max=550, rounds=1, step=50)  # ms
        length = int.from_bytes(self.read(4), "big")
        assert b"\xff" * 6 == self.read(length)[:6]

    def read(self, length: int) -> bytes:
        """The next bytes of the stream."""
        return self.stream.recv(length, socket.MSG_WAITALL)


@contextmanager
def running(wanted: Explicit | Patched, binary: str, directory: Path) -> Iterator[RunningQemu]:
    """QEMU with a wrapped command line, as qrapd would start it."""
    with ExitStack() as stack:
        monitors, listeners = [], []
        for name in ("qmp", "user"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(directory / name))
            listener.listen(1)
            monitor = stack.enter_context(socket.socket(socket.AF_UNIX))
            monitor.settimeout(30)
            monitor.connect(str(directory / name))
            listeners.append(listener)
            monitors.append(monitor)
        ours, qemus = map(stack.enter_context, socket.socketpair())
        ours.settimeout(30)
        fds = [listeners[0].fileno(), listeners[1].fileno(), qemus.fileno()]
        argv = wrap(wanted, pid=1).command_line(Endpoints(fds[0], fds[1], None, [fds[2]]), binary)
        with (directory / "words").open("w+") as words:
            process = subprocess.Popen(
                argv, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT
            )
        try:
            for each in (*listeners, qemus):
                each.close()
            RunningQemu(ours, monitors[1])
            yield RunningQemu(ours, monitors[0])
        finally:
            process.kill()
            process.wait()
            # Also in place of a failure that they explain.
            assert "" == (directory / "words").read_text()


@pytest.fixture
def qemu() -> str:
    """The installed QEMU."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return path


JSON_DEVICE = '{"driver":"virtio-rng-pci","bus":"pci.0","addr":"0x5"}'
BARE = ["-M", "q35", "-m", "32", "-display", "none", "-S"]


@pytest.mark.parametrize(
    ("arguments", "hub", "nic"),
    [
        (["-netdev", "socket,id=n,fd=7"], 100, "link0"),
        (["-netdev", "socket,id=n,fd=7", "-device", "e1000,id=a,netdev=n"], 100, "a"),
        (["-device", '{"driver":"e1000","id":"a","netdev":"n"}', "--netdev", "socket,fd=7,id=n"], 100, "a"),
        (["-netdev", '{"type":"socket","id":"n","fd":"7"}', "-device", "e1000,id=a,netdev=n"], 100, "a"),
        (["-netdev", "{'type':'socket','id':'n','fd':'7'}", "-net", "nic,netdev=n"], 100, "e1000e.0"),
        (["-netdev", "stream,id=n,addr.type=fd,addr.str=7", "-device", "e1000,netdev=n,id=a"], 100, "a"),
        (["-net", "socket,fd=7", "-net", "nic"], 0, "e1000e.0"),
        (["-net", "nic,model=e1000", "-net", "socket,fd=7"], 0, "e1000.0"),
        (["-net", "socket,fd=7"], 0, "link0"),
        (["-nic", "socket,fd=7"], 100, "e1000e.0"),
        (["-nic", "socket,fd=7,model=e1000,mac=52:54:00:00:00:01,id=n"], 100, "e1000.0"),
        (
            [
                *("-netdev", "socket,id=s,fd=7", "-netdev", "hubport,id=p,hubid=3,netdev=s"),
                *("-netdev", "hubport,id=q,hubid=3", "-device", "e1000,id=a,netdev=q"),
            ],
            3,
            "a",
        ),
        (["-netdev", "socket,id=n,fd=7", "-device", "e1000,id=a", "-set", "device.a.netdev=n"], 100, "a"),
        (
            [
                *("-netdev", "socket,id=n,fd=7", "-device", "e1000,id=a,netdev=n"),
                *("-object", "filter-dump,id=f,netdev=n,file=/dev/null"),
            ],
            100,
            "a",
        ),
    ],
)
def test_nic_and_stream_share_a_hub(
    qemu: str, place: Path, arguments: Sequence[str], hub: int, nic: str
) -> None:
    """In QEMU's own words, in each way to name the stream; and the NIC is heard at its other end."""
    with running(Explicit(7, ["kvm", *BARE, *arguments]), qemu, place) as vm:
        assert {hub: [f"nic {nic}", "socket link0-stream1"]} == vm.hubs()
        vm.expect_frame_of_the_nic()


@pytest.mark.parametrize(
    ("arguments", "nic"),
    [
        (["-M", "q35", "-netdev", "user,id=u", "-net", "nic"], "link0"),
        (
            ["-M", "q35", "-device", "pcie-root-port,id=pci.3", "-device", "e1000,netdev=u"],
            "virtio-net-pci.0",
        ),
        (
            # Without the VGA that has the address which qrap takes for free.
            ["-machine", "pc-i440fx-7.2", "-vga", "none", "-device", JSON_DEVICE],
            "virtio-net-pci.0",
        ),
    ],
    ids=["no device", "a device", "JSON"],
)
def test_patched_command_lines(qemu: str, place: Path, arguments: list[str], nic: str) -> None:
    """What qrap makes of a command line is wrapped like any other."""
    wanted = read_command_line(["-m", "32", "-display", "none", "-S", *arguments], None, lambda _: False)
    with running(wanted, qemu, place) as vm:
        assert {100: [f"nic {nic}", "socket link0-stream1"]} == vm.hubs()
        vm.expect_frame_of_the_nic()


def test_the_callers_own_monitors_and_ports(qemu: str, place: Path) -> None:
    """They stay beside ours."""
    own = [
        "-qmp",
        f"unix:{place}/own,server=on,wait=off",
        "-chardev",
        "null,id=qmp",
        "-serial",
        "chardev:qmp",
    ]
    wanted = Explicit(7, ["kvm", *BARE, "-nic", "socket,fd=7", *own, "-pidfile", f"{place}/pid"])
    with running(wanted, qemu, place) as vm:
        assert {"qrapd-qmp", "qrapd-user-qmp", "compat_monitor0", "qmp"} <= {
            chardev["label"] for chardev in vm.execute("query-chardev")
        }
        assert "prelaunch" == vm.execute("query-status")["status"]
        assert (place / "pid").exists()
        with socket.socket(socket.AF_UNIX) as own_monitor:
            own_monitor.settimeout(30)
            own_monitor.connect(f"{place}/own")
            assert own_monitor.recv(64).startswith(b'{"QMP"')


def test_names_are_free_for_a_swap(qemu: str, place: Path) -> None:
    """The next generation finds its place even on `-net`'s hub, and then QEMU lets go of the first stream."""
    with running(Explicit(7, ["kvm", *BARE, "-net", "nic", "-net", "socket,fd=7"]), qemu, place) as vm:
        vm.execute("netdev_add", type="user", id="link0-stream2")
        vm.execute("netdev_add", type="hubport", id="link0-port2", hubid=0, netdev="link0-stream2")
        vm.execute("netdev_del", id="link0-port1")
        vm.execute("netdev_del", id="link0-stream1")
        assert ["nic e1000e.0", "user link0-stream2"] == vm.hubs()[0]
        assert b"" == vm.read(1)
