# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command line of qrap(1) asks for: a descriptor's number for QEMU, or a network patched into QEMU's arguments.

All that is decided here, the odd cases too, is what the C program of passt 2023-03 (Debian 12) and 2025-05
(Debian 13) does: tests/test_qrap_differential.py runs both.
"""

from __future__ import annotations

# mypy takes this for typing's, which would cost the start of qrap milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "PATCHED_FD",
    "Explicit",
    "NoFreeAddress",
    "Patched",
    "patch",
    "qemu_names",
    "read_command_line",
    "strtol",
]

PATCHED_FD = 5
"""where a QEMU with a patched command line finds the stream"""

_INT_MAX = 2**31 - 1
_LONG_MAX = 2**63 - 1
_BLANKS = " \t\n\v\f\r"
_DIGITS = "0123456789abcdef"

_NETWORK_OPTIONS = ("-netdev", "-net")
_NETWORK_DEVICES = tuple(
    prefix
    for name in ("virtio-net-pci", "virtio-net-ccw", "e1000", "e1000e", "rtl8139")
    for prefix in (f"{name},", f'{{"driver":"{name}",')
)


class NoFreeAddress(Exception):
    """All addresses at which the machine could have a network device are taken."""


class Explicit:
    """QEMU is named and its arguments are right: it only needs the stream.

    :ivar fd: the number under which QEMU expects the stream, at least 3.
    :ivar argv: QEMU's, its name first.
    """

    __slots__ = ("argv", "fd")

    def __init__(self, fd: int, argv: Sequence[str]) -> None:
        self.fd = fd
        self.argv = list(argv)


class Patched:
    """Some QEMU is to be found, and has a network by these arguments.

    :ivar fd: always ``PATCHED_FD``.
    :ivar arguments: QEMU's, without its name.
    """

    __slots__ = ("arguments",)

    fd = PATCHED_FD

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)


class _Machine:
    """How one kind of machine addresses its devices.

    :ivar prefix: of the value of ``-machine``.
    :ivar device: the network device that fits.
    :ivar before, after: what encloses the address in a ``-device``.
    :ivar before_json, after_json: the same in one written in JSON, without the quote that ends the address.
    :ivar base: of the address's number.
    :ivar first, end: the numbers that a network device may have, ``end`` excluded.
    """

    def __init__(
        self,
        prefix: str,
        device: str,
        *,
        before: str,
        before_json: str,
        base: int,
        first: int,
        end: int,
        after: str = "",
        after_json: str = "",
    ) -> None:
        self.prefix, self.device = prefix, device
        self.before, self.after = before, after
        self.before_json, self.after_json = before_json, after_json
        self.base, self.first, self.end = base, first, end


_MACHINES = (
    _Machine(
        "pc-q35",
        "virtio-net-pci",
        before="bus=pci.",
        after=",addr=0x0",
        before_json='"bus":"pci.',
        after_json=',"addr":"0x0"',
        base=10,
        first=3,  # 2: where hot-plugged devices go
        end=31,
    ),
    _Machine(
        "pc-",
        "virtio-net-pci",
        before="bus=pci.0,addr=0x",
        before_json='"bus":"pci.0","addr":"0x',
        base=16,
        first=2,  # 1: the ISA bridge
        end=31,
    ),
    _Machine(
        "s390-ccw",
        "virtio-net-ccw",
        before="devno=fe.0.",
        before_json='"devno":"fe.0.',
        base=16,
        first=1,
        end=16,
    ),
)


def read_command_line(
    arguments: Sequence[str], path: str | None, is_executable: Callable[[str], bool]
) -> Explicit | Patched:
    """Decide which of the two ways a command line takes, and what QEMU is to get.

    :param arguments: without qrap's own name.
    :param path: the variable PATH; None if there is none.
    :param is_executable: as access(2) with X_OK says of a path.
    :raises NoFreeAddress: there is no place for a network device.
    """
    if len(arguments) < 2:
        return Patched(patch(arguments))
    fd, overflow = strtol(arguments[0], 0)
    if overflow or path is None or not 3 <= fd < _INT_MAX:
        return Patched(patch(arguments, reads_addresses=not overflow))
    # strtok(3) skips empty directories, where exec would look in the current one.
    directories = [directory for directory in path.split(":") if directory]
    if any(is_executable(f"{directory}/{arguments[1]}") for directory in directories):
        return Explicit(fd, arguments[1:])
    return Patched(patch(arguments, reads_addresses=not directories))


def patch(arguments: Sequence[str], *, reads_addresses: bool = True) -> list[str]:
    """QEMU's arguments with its network devices replaced by one on the stream.

    :param reads_addresses: whether addresses of other devices count. The C program takes an errno left behind
        by its search for QEMU_CMD for a failure to read the first of them, and ignores them all.
    :raises NoFreeAddress: there is no place for a network device.
    """
    machine = _machine(arguments)
    kept: list[str] = []
    taken = 0
    has_device = has_json = False
    words = iter(range(len(arguments)))
    for i in words:
        word = arguments[i]
        value = arguments[i + 1] if i + 1 < len(arguments) else None
        if word in _NETWORK_OPTIONS or (
            word == "-device" and value is not None and value.startswith(_NETWORK_DEVICES)
        ):
            next(words, None)
            continue
        kept.append(word)
        if word != "-device" or value is None:
            continue
        has_device = True
        number, is_json = _address(value, machine)
        has_json |= is_json
        if number is None or not reads_addresses:
            continue
        n, overflow = number
        if overflow:
            reads_addresses = False  # errno stays set here, too
        else:
            taken |= 1 << (n & 31)
    free = next((n for n in range(machine.first, machine.end) if not taken >> n & 1), None)
    if free is None:
        raise NoFreeAddress
    return kept + _network(machine, free, has_device=has_device, is_json=has_json)


def _machine(arguments: Sequence[str]) -> _Machine:
    """What the value after the last ``-machine`` begins with."""
    value = ""
    for i in range(len(arguments) - 1):
        if arguments[i] == "-machine":
            value = arguments[i + 1]
    return next((each for each in _MACHINES if value.startswith(each.prefix)), _MACHINES[0])


def _address(value: str, machine: _Machine) -> tuple[tuple[int, bool] | None, bool]:
    """The address in a ``-device``, as ``strtol`` gives it, if there is one; and whether it is written in JSON."""
    for before, is_json in ((machine.before, False), (machine.before_json, True)):
        _, found, rest = value.partition(before)
        if found:
            return strtol(rest, machine.base), is_json
    return None, False


def _network(machine: _Machine, number: int, *, has_device: bool, is_json: bool) -> list[str]:
    """The arguments that give QEMU its network."""
    address = f"{number:x}" if machine.base == 16 else f"{number}"
    if is_json:
        device = f'{{"driver":"{machine.device}",{machine.before_json}{address}"{machine.after_json}'
        device += ',"netdev":"hostnet0","x-txburst":4096}'
        netdev = f'{{"type":"socket","fd":"{PATCHED_FD}","id":"hostnet0"}}'
    else:
        device = f"{machine.device},{machine.before}{address}{machine.after},netdev=hostnet0,x-txburst=4096"
        netdev = f"socket,fd={PATCHED_FD},id=hostnet0"
    return [*(["-device", device] if has_device else []), "-netdev", netdev]


def qemu_names(machine: str) -> tuple[str, ...]:
    """What to look for where no QEMU is named, in this order; the last one is a path.

    :param machine: this host's, as uname(2) says it.
    """
    # What QEMU calls otherwise than Linux: configure's --target-list
    others = {"i486": "i386", "i586": "i386", "i686": "i386", "armv7l": "arm", "ppc64le": "ppc64"}
    return ("kvm", "qemu-kvm", f"qemu-system-{others.get(machine, machine)}", "/usr/libexec/qemu-kvm")


def strtol(text: str, base: int) -> tuple[int, bool]:
    """What strtol(3) reads at the beginning of a text, and whether it was too large for a long (of 64 bits).

    :param base: 10, 16, or 0 for decimal, 0x hexadecimal and 0 octal. The prefix 0b, which C has had since 2023, is
        none: qrap on Debian 12 does not know it.
    """
    text = text.lstrip(_BLANKS)
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    text = text.lower()
    if base in (0, 16) and text.startswith("0x") and text[2:3] and text[2] in _DIGITS:
        text, base = text[2:], 16
    elif base == 0:
        base = 8 if text.startswith("0") else 10
    value = 0
    for character in text:
        digit = _DIGITS.find(character)
        if not 0 <= digit < base:
            break
        value = value * base + digit
    value *= sign
    limited = max(-_LONG_MAX - 1, min(value, _LONG_MAX))
    return limited, limited != value
