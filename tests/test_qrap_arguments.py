# SPDX-License-Identifier: GPL-2.0-or-later
"""qrap's two ways, and the patching: what the differential test cannot say, because it needs no C program."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.qrap_arguments import Explicit, NoFreeAddress, Patched, patch, read_command_line, strtol

NETDEV = ["-netdev", "socket,fd=5,id=hostnet0"]
NETDEV_JSON = ["-netdev", '{"type":"socket","fd":"5","id":"hostnet0"}']
Q35 = "virtio-net-pci,bus=pci.{},addr=0x0,netdev=hostnet0,x-txburst=4096"
PC = "virtio-net-pci,bus=pci.0,addr=0x{},netdev=hostnet0,x-txburst=4096"
S390 = "virtio-net-ccw,devno=fe.0.{},netdev=hostnet0,x-txburst=4096"


def read(*arguments: str, path: str | None = "/a:/bin", programs: Sequence[str] = ("/bin/kvm",)) -> object:
    """What a command line asks for, as something to compare."""
    wanted = read_command_line(arguments, path, lambda each: each in programs)
    return (wanted.fd, wanted.argv) if isinstance(wanted, Explicit) else wanted.arguments


# ---- numbers


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("5", 0, 5),
        ("0x1F", 0, 31),
        ("0X1f", 0, 31),
        ("010", 0, 8),
        ("09", 0, 0),
        ("0x", 0, 0),
        ("0xg", 0, 0),
        ("5abc", 0, 5),
        (" \t\n\v\f\r+7", 0, 7),
        ("-0x10", 0, -16),
        ("- 5", 0, 0),
        ("+-5", 0, 0),
        ("", 0, 0),
        ("abc", 0, 0),
        ("0b101", 0, 0),
        ("0b101", 16, 0xB101),
        ("0x1f", 16, 31),
        ("1f", 16, 31),
        ("1f", 10, 1),
        ("0x1f", 10, 0),
        ("٣", 0, 0),  # a digit to Python, none to C
        ("5\u00a06", 0, 5),
    ],
)
def test_numbers(text: str, base: int, expected: int) -> None:
    """Numbers are read as by strtol(3) of C before C23, which has a prefix for binary ones."""
    assert (expected, False) == strtol(text, base)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9223372036854775807", (2**63 - 1, False)),
        ("9223372036854775808", (2**63 - 1, True)),
        ("-9223372036854775808", (-(2**63), False)),
        ("-9223372036854775809", (-(2**63), True)),
        ("0xffffffffffffffff", (2**63 - 1, True)),
    ],
)
def test_too_large_numbers(text: str, expected: tuple[int, bool]) -> None:
    """What does not fit into a long is limited to what does, and told."""
    assert expected == strtol(text, 0)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(["", "x", ",addr=0x0", '"', " 1"]))
def test_numbers_in_every_base(number: int, rest: str) -> None:
    """Any long is read back from its decimal, hexadecimal and octal form, whatever follows that is no digit."""
    sign = "-" if number < 0 else ""
    assert (number, False) == strtol(f"{number}{rest}", 0)
    assert (number, False) == strtol(f"{number:#x}{rest}", 0)
    assert (number, False) == strtol(f"{sign}0{abs(number):o}{rest}", 0)
    assert (number, False) == strtol(f"{number:x}{rest}", 16)


# ---- which of the two ways


@pytest.mark.parametrize(
    ("number", "fd"),
    [("3", 3), ("5", 5), ("0x10", 16), ("010", 8), (" 7x", 7), ("2147483646", 2147483646)],
)
def test_explicit(number: str, fd: int) -> None:
    """A number from 3 on and a program that PATH has: QEMU's arguments stay as they are."""
    assert (fd, ["kvm", "-netdev", "user", "-device", "e1000,x"]) == read(
        number, "kvm", "-netdev", "user", "-device", "e1000,x"
    )


@pytest.mark.parametrize("number", ["2", "-5", "0", "", "kvm", "2147483647", "4294967301", "9" * 30])
def test_numbers_that_are_no_descriptors(number: str) -> None:
    """Below 3 and from INT_MAX on, the number is an argument of QEMU like any other."""
    assert [number, "kvm", *NETDEV] == read(number, "kvm")


def test_command_that_path_does_not_have() -> None:
    """An absolute path is looked for below PATH's directories, too, and seldom there."""
    assert ["5", "/bin/kvm", *NETDEV] == read("5", "/bin/kvm")
    assert (5, ["kvm"]) == read("5", "kvm", programs=("/a/kvm",))
    assert (5, ["/opt/kvm"]) == read("5", "/opt/kvm", programs=("/a//opt/kvm",))


def test_odd_paths() -> None:
    """Without PATH nothing is found, and an empty directory in it does not mean the current one."""
    assert ["5", "kvm", *NETDEV] == read("5", "kvm", path=None)
    assert ["5", "kvm", *NETDEV] == read("5", "kvm", path="::", programs=("/kvm", "kvm"))
    assert (5, ["kvm"]) == read("5", "kvm", path="::/bin:")


@pytest.mark.parametrize("arguments", [(), ("5",)])
def test_too_few_arguments_for_the_explicit_way(arguments: tuple[str, ...]) -> None:
    """There is always a network, whatever else there is."""
    assert [*arguments, *NETDEV] == read(*arguments)


# ---- patching


@pytest.mark.parametrize("option", ["-netdev", "-net"])
def test_network_options_are_dropped(option: str) -> None:
    """With the argument that follows, be it an option, and also if none does."""
    assert ["-m", "1G", *NETDEV] == patch([option, "user,id=x", "-m", "1G"])
    assert ["1G", *NETDEV] == patch([option, "-m", "1G"])
    assert ["-m", "1G", *NETDEV] == patch(["-m", "1G", option])


@pytest.mark.parametrize("name", ["virtio-net-pci", "virtio-net-ccw", "e1000", "e1000e", "rtl8139"])
def test_network_devices_are_dropped(name: str) -> None:
    """In both notations, if more follows the name; a bare name stays."""
    assert NETDEV == patch(["-device", f"{name},netdev=x"])
    assert NETDEV == patch(["-device", f'{{"driver":"{name}","netdev":"x"}}'])
    bare = ["-device", name]
    assert [*bare, "-device", Q35.format(3), *NETDEV] == patch(bare)
    assert [*bare, "-device", Q35.format(3), *NETDEV] == patch([*bare, "-device", f"{name},a=b"])


def test_a_device_without_a_value_is_none() -> None:
    """It is handed on, and QEMU will complain."""
    assert ["-device", *NETDEV] == patch(["-device"])


@pytest.mark.parametrize(
    ("machine", "device"),
    [
        ("pc-q35-7.2", Q35.format(3)),
        ("q35", Q35.format(3)),
        ("pc", Q35.format(3)),
        ("pc-i440fx-7.2", PC.format(2)),
        ("s390-ccw-virtio", S390.format(1)),
        ("none", Q35.format(3)),
    ],
)
def test_machines(machine: str, device: str) -> None:
    """The machine's prefix says how the device is called and addressed."""
    arguments = ["-machine", machine, "-device", "x"]
    assert [*arguments, "-device", device, *NETDEV] == patch(arguments)


def test_the_last_machine_counts() -> None:
    """Also if nothing is known of it, and also where it is another option's value."""
    first = ["-machine", "pc-i440fx", "-device", "x"]
    for last, device in (("none", Q35.format(3)), ("s390-ccw", S390.format(1))):
        arguments = [*first, "-machine", last]
        assert [*arguments, "-device", device, *NETDEV] == patch(arguments)
    arguments = [*first, "-append", "-machine"]
    assert [*arguments, "-device", PC.format(2), *NETDEV] == patch(arguments)


@pytest.mark.parametrize(
    ("machine", "other", "free"),
    [
        ("pc-q35", "x,bus=pci.{:d},addr=0x0", [Q35.format(n) for n in range(3, 31)]),
        ("pc-", "x,bus=pci.0,addr=0x{:x}", [PC.format(f"{n:x}") for n in range(2, 31)]),
        ("s390-ccw", "x,devno=fe.0.{:x}", [S390.format(f"{n:x}") for n in range(1, 16)]),
    ],
)
def test_the_lowest_free_address(machine: str, other: str, free: list[str]) -> None:
    """One device after the other takes the next; when none is left, there is no way."""
    arguments = ["-machine", machine, "-device", "x"]
    first = 31 - len(free) if machine != "s390-ccw" else 1
    for n, device in enumerate(free, first):
        assert [*arguments, "-device", device, *NETDEV] == patch(arguments)
        arguments += ["-device", other.format(n)]
    with pytest.raises(NoFreeAddress):
        patch(arguments)


def test_json() -> None:
    """An address in JSON is answered in JSON, but for a device that is dropped."""
    other = ["-device", '{"driver":"x","bus":"pci.3","addr":"0x0"}']
    device = '{"driver":"virtio-net-pci","bus":"pci.4","addr":"0x0","netdev":"hostnet0","x-txburst":4096}'
    assert [*other, "-device", device, *NETDEV_JSON] == patch(other)
    without_address = ["-device", '{"driver":"x"}']
    assert [*without_address, "-device", Q35.format(3), *NETDEV] == patch(without_address)


def test_addresses_are_ignored_after_a_search_in_vain() -> None:
    """As in the C program, where the errno of the search for QEMU_CMD passes for that of the address."""
    other = ["-device", "x,bus=pci.3,addr=0x0"]
    added = ["-device", Q35.format(3), *NETDEV]
    assert ["5", "no-such", *other, *added] == read("5", "no-such", *other)
    # No directory, no search; no number, none either; too large a number leaves an errno, too.
    added[1] = Q35.format(4)
    assert ["5", "no-such", *other, *added] == read("5", "no-such", *other, path=":")
    assert ["x", "no-such", *other, *added] == read("x", "no-such", *other)
    added[1] = Q35.format(3)
    assert ["9" * 30, "x", *other, *added] == read("9" * 30, "x", *other)


def test_addresses_are_ignored_after_one_that_is_too_large() -> None:
    """Those before it count."""
    devices = [f"x,bus=pci.{n},addr=0x0" for n in ("3", "9" * 30, "4")]
    arguments = [word for device in devices for word in ("-device", device)]
    assert [*arguments, "-device", Q35.format(4), *NETDEV] == patch(arguments)


@given(st.lists(st.sampled_from(["-device", "-machine", "-net", "x", "pc-", "bus=pci.3", "e1000,"])))
def test_nothing_is_made_up(arguments: list[str]) -> None:
    """What is kept is in its order, and what is added comes after it."""
    wanted = read_command_line(["-x", *arguments], "/bin", lambda _: False)
    assert isinstance(wanted, Patched)
    assert wanted.arguments[-2:] in (NETDEV, NETDEV_JSON)
    rest = iter(["-x", *arguments])
    kept = wanted.arguments[:-2]
    if "hostnet0" in kept[-1]:
        kept = kept[:-2]
    assert all(word in rest for word in kept)
