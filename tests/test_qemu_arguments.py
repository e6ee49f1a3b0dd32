# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for QEMU's command line: what qrapd puts there, in which order, and what it leaves to the user."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from qrapd.config import parse
from qrapd.qemu_arguments import Endpoints, command_line, disk_files


def arguments(text: str, *, kvm: bool = False, endpoints: Endpoints | None = None) -> list[str]:
    """The command line of a VM called web."""
    vm = parse(text, Path("/vms/web.toml"))
    return command_line(vm, "qemu", kvm=kvm, endpoints=endpoints or Endpoints.placeholders(len(vm.links)))


def values(argv: list[str], option: str) -> list[str]:
    """What follows each occurrence of an option."""
    return [value for name, value in pairwise(argv) if name == option]


def test_the_whole_command_line() -> None:
    """Everything that QEMU gets for a VM with one link; the user's own arguments come last, so that they win."""
    expected = [
        *("qemu", "-name", "guest=web", "-accel", "tcg", "-display", "none"),
        *("-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", "socket,id=user-qmp,fd=4,server=on,wait=off", "-mon", "chardev=user-qmp,mode=control"),
        *("-chardev", "socket,id=console,fd=5,server=on,wait=off", "-serial", "chardev:console"),
        *("-netdev", "socket,id=link0-stream1,fd=6"),
        *("-netdev", "hubport,id=link0-port1,hubid=0,netdev=link0-stream1"),
        *("-netdev", "hubport,id=link0-nic,hubid=0"),
        *("-device", "virtio-net-pci,id=link0,netdev=link0-nic,mac=52:54:00:12:34:56,host_mtu=32750"),
        *("-machine", "q35", "a b"),
    ]
    text = "[qemu]\nargs = ['-machine', 'q35', 'a b']\n[[link]]\nmac = '52:54:00:12:34:56'"
    assert expected == arguments(text, endpoints=Endpoints(3, 4, 5, [6]))


def test_no_link_is_no_network() -> None:
    """QEMU's default would be a NIC on its own user-mode network."""
    argv = arguments("")
    assert ["none"] == values(argv, "-nic")
    assert [] == values(argv, "-netdev") + values(argv, "-device")


def test_without_links_the_user_makes_the_network() -> None:
    """`-nic none` goes before the user's, and QEMU ignores it beside any other network (measured)."""
    assert ["none", "user"] == values(arguments("[qemu]\nargs = ['-nic', 'user']"), "-nic")


def test_each_link_has_a_hub_of_its_own() -> None:
    """In the file's order, with its own stream and its own MAC address."""
    argv = arguments("[[link]]\n[[link]]\ndevice = 'e1000'\nmac = '52:54:00:00:00:01'")
    assert [
        "socket,id=link0-stream1,fd=LINK0_FD",
        "hubport,id=link0-port1,hubid=0,netdev=link0-stream1",
        "hubport,id=link0-nic,hubid=0",
        "socket,id=link1-stream1,fd=LINK1_FD",
        "hubport,id=link1-port1,hubid=1,netdev=link1-stream1",
        "hubport,id=link1-nic,hubid=1",
    ] == values(argv, "-netdev")
    first, second = values(argv, "-device")
    assert first.startswith("virtio-net-pci,id=link0,netdev=link0-nic,mac=52:54:00:")
    assert "e1000,id=link1,netdev=link1-nic,mac=52:54:00:00:00:01" == second
    assert [] == values(argv, "-nic")


def test_a_devices_properties_follow_qrapds_own() -> None:
    """They come last and as they are."""
    (device,) = values(arguments("[[link]]\ndevice = 'virtio-net-pci,mq=on,vectors=4'"), "-device")
    assert device.startswith("virtio-net-pci,id=link0,netdev=link0-nic,mac=")
    assert device.endswith(",mq=on,vectors=4")


def test_no_console_is_no_serial_port_of_ours() -> None:
    """Then `-serial` is the user's, or there is QEMU's own."""
    argv = arguments("[qemu]\nconsole = 'none'")
    assert [] == values(argv, "-serial")
    assert not any("id=console" in argument for argument in argv)


@pytest.mark.parametrize(
    ("accel", "args", "kvm", "expected"),
    [
        ("auto", [], True, ["kvm"]),
        ("auto", [], False, ["tcg"]),
        ("auto", ["-accel", "xen"], True, ["xen"]),
        ("auto", ["-enable-kvm"], True, []),
        ("auto", ["-machine", "q35,accel=tcg"], True, []),
        ("kvm", [], False, ["kvm"]),
        ("tcg", [], True, ["tcg"]),
        ("args", [], True, []),
        ("args", ["-accel", "tcg"], True, ["tcg"]),
    ],
)
def test_the_accelerator(accel: str, args: list[str], kvm: bool, expected: list[str]) -> None:
    """Once at most: what the file says, what the arguments say, or what works on this host."""
    assert expected == values(arguments(f"[qemu]\naccel = '{accel}'\nargs = {args}", kvm=kvm), "-accel")


FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def sandboxes(text: str) -> list[str]:
    """What follows each -sandbox of a QEMU that has one."""
    vm = parse(text, Path("/vms/web.toml"))
    passts = {index: ["passt"] for index in range(len(vm.links))}
    endpoints = Endpoints.placeholders(len(vm.links))
    return values(command_line(vm, "qemu", endpoints, kvm=False, passts=passts, seccomp=True), "-sandbox")


def test_a_qemu_without_seccomp_gets_no_sandbox() -> None:
    """It would refuse to start."""
    assert [] == values(arguments(""), "-sandbox")
    assert [FILTER] == sandboxes("")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[link]]\n[[link]]\nmode = 'vhost-user'", [FILTER]),
        ("[[link]]\n[[link]]\nmode = 'native'", []),
        ("[qemu]\nsandbox = false", []),
        ("[qemu]\nargs = ['-sandbox', 'on']", ["on"]),
        ("[qemu]\nargs = ['--sandbox', 'off']", []),
        ("[qemu]\nsandbox = false\nargs = ['-sandbox', 'on,spawn=deny']", ["on,spawn=deny"]),
    ],
)
def test_the_sandbox(text: str, expected: list[str]) -> None:
    """QEMU's filters add up, so that one of the user's replaces ours; passt cannot live below any."""
    assert expected == sandboxes(text)


@pytest.mark.parametrize(
    "args",
    [
        ["-netdev", "tap,id=t"],
        ["-nic", "tap"],
        ["-net", "tap,script=no"],
        ["-netdev", "tap,id=t,downscript=no,script=/etc/up"],
        ["-netdev", '{"type": "tap", "id": "t"}'],
        ["-netdev", '{"id": "t", "type": "bridge"}'],
        ["-netdev", "type=bridge,id=b"],
        ["-nic", "bridge,br=virbr0"],
        ["-netdev", "passt,id=p"],
        ["-netdev", "user,id=u,smb=/srv"],
        ["--nic", "user,guestfwd=tcp:10.0.2.100:80-cmd:/bin/cat"],
        ["-incoming", "exec:cat state"],
        ["-incoming", '{"channel-type": "main", "addr": {"transport": "exec", "args": ["cat"]}}'],
        ["-async-teardown"],
        ["-run-with", "user=x,async-teardown=on"],
        ["-display", "gtk,gl=on"],
        ["-display", "sdl"],
        ["-display", '{"type": "spice-app"}'],
    ],
)
def test_a_qemu_that_has_to_start_programs_gets_no_sandbox(args: list[str]) -> None:
    """They would inherit it, and QEMU itself could not start them."""
    assert [] == sandboxes(f"[qemu]\nargs = {args}")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["-netdev", "tap,id=t,fd=7"],
        ["-nic", "tap,fds=7:8"],
        ["-netdev", '{"type": "tap", "id": "t", "fd": "7"}'],
        ["-netdev", "tap,id=t,ifname=tap0,script=no,downscript=no"],
        ["-netdev", '{"type": "tap", "id": "t", "script": "no", "downscript": "no"}'],
        ["-netdev", "user,id=bridge,hostfwd=tcp::8080-:80"],
        ["-nic", "none"],
        ["-incoming", "tcp:0:4444"],
        ["-incoming", "defer"],
        ["-run-with", "async-teardown=off"],
        ["-display", "vnc=:1"],
        ["-display", "none"],
        ["-drive", "file=exec:"],
        ["-name"],
    ],
)
def test_all_else_gets_the_whole_sandbox(args: list[str]) -> None:
    """Whatever looks like it."""
    assert [FILTER] == sandboxes(f"[qemu]\nargs = {args}")


@pytest.mark.parametrize("args", [["-runas", "nobody"], ["-run-with", "chroot=/x,user=nobody"]])
def test_a_qemu_that_changes_its_user_may_do_so(args: list[str]) -> None:
    """And nothing else."""
    assert [FILTER.replace("elevateprivileges=deny", "elevateprivileges=allow")] == sandboxes(
        f"[qemu]\nargs = {args}"
    )


def test_streams_and_links_are_equally_many() -> None:
    """A link without its stream would be a NIC on a dead hub."""
    with pytest.raises(ValueError, match="zip"):
        arguments("[[link]]", endpoints=Endpoints(3, 4, 5, []))


def test_placeholders_say_which_fd_will_stand_there() -> None:
    """For `qrapd plan`."""
    assert Endpoints(
        "QMP_FD", "USER_QMP_FD", "SERIAL_FD", ["LINK0_FD", "LINK1_FD"]
    ) == Endpoints.placeholders(2)


def test_the_installed_qemu_takes_the_devices() -> None:
    """Our properties are ones that QEMU's own devices have."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    argv = [qemu, "-device", "virtio-net-pci,help"]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    assert {"mac", "netdev", "mq", "vectors"} <= {
        line.strip().partition("=")[0] for line in told.splitlines()
    }


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("-drive", "file=web.qcow2,if=virtio", "web.qcow2"),
        ("--drive", "if=virtio,file=/a/b.img", "/a/b.img"),
        ("-drive", "file=a,,b.img", "a,b.img"),
        ("-drive", "driver=raw,file.filename=x.img", "x.img"),
        ("-blockdev", "driver=file,filename=x.img,node-name=d", "x.img"),
        ("-blockdev", "driver=qcow2,file.driver=file,file.filename=x.img", "x.img"),
        ("-cdrom", "debian.iso", "debian.iso"),
        ("-drive", "file=nbd:host:10809", None),
        ("-drive", "if=none,id=profile=x", None),
        ("-blockdev", "driver=qcow2,file=node", None),
        ("-blockdev", '{"driver":"file","filename":"x"}', None),
        ("-append", "file=x", None),
    ],
)
def test_the_files_of_disks(option: str, value: str, path: str | None) -> None:
    """As QEMU would open them; what is no plain file is none of them."""
    assert ([] if path is None else [(2, path)]) == list(disk_files(["-nodefaults", option, value]))
