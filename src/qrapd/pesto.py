# SPDX-License-Identifier: GPL-2.0-or-later
"""Other forwards for a passt that runs, by pesto(1), and whether passt really listens then.

Measured with passt of 2026-10: a change takes 4 ms; passt closes all its listening sockets and opens them anew,
connections that are there stay. pesto ends with 0 whatever comes of that: of a port that is taken only passt's own
output tells, passt stops at it, and the ports after it are not opened at all. So what came of it is looked at here.
"""

from __future__ import annotations

import enum
import errno
import itertools
import socket
from collections.abc import Awaitable, Callable, Iterator

import anyio
import anyio.to_thread

from qrapd.errors import Unavailable
from qrapd.forwards import Ports
from qrapd.ports import PortSpec, parse_ports
from qrapd.process import read_lines, spawn

__all__ = ["Holder", "Refused", "arguments", "change", "is_complaint", "look", "taken"]

TIMEOUT = 5.0
"""Seconds for pesto, which takes 4 ms (measured). For a passt that hangs, or has another client, it waits for ever."""

MOST_PORTS = 256
"""Host ports of one forward that are looked at, 5 microseconds each (measured)."""

_END_GRACE = 0.5

_COMPLAINTS = ("Listen failed for", "Couldn't listen", "Error switching to new forwarding rules")


def arguments(ports: Ports) -> list[str]:
    """pesto's, for these forwards in the place of all that there are.

    A whole table, as the rules that passt has need not be known for it; and there is no less to it: passt opens all
    of its sockets anew for any change (measured).
    """
    options = [word for each in ("tcp", "udp") for spec in ports[each] for word in (f"--{each}-ports", spec)]
    return options or ["--tcp-ports", "none"]


def is_complaint(line: str) -> bool:
    """Whether passt says by this that it could not do what it was told."""
    return line.lstrip().startswith(_COMPLAINTS)


class Refused(Exception):
    """passt has tried what it was told, and could not; the words are its own, where it has found any."""

    def __init__(self, words: str, *, undone: bool) -> None:
        super().__init__(words)
        self.undone = undone
        """whether it forwards again what it did before"""


async def change(
    program: str, path: str, ports: Ports, before: Ports, hear: Callable[[], Awaitable[list[str]]]
) -> None:
    """Have the passt with its socket at ``path`` forward these ports and no others.

    :param before: what it forwards now; all of that is undone if passt cannot have one port.
    :param hear: what passt has written since.
    :raise Refused: passt has tried, and could not.
    :raise Unavailable: it could not be told; whether it has heard of it is not known.
    """
    await _tell(program, path, ports)
    found = await anyio.to_thread.run_sync(look, ports)
    unheard = [name for name, holder in found.items() if holder is Holder.NOBODY]
    words = [line.strip() for line in await hear() if is_complaint(line)]
    if not unheard and not words:
        return
    undone = True
    try:
        await _tell(program, path, before)
    except Unavailable:
        undone = False
    raise Refused("; ".join(words) or f"nobody listens on {', '.join(unheard)}", undone=undone)


async def _tell(program: str, path: str, ports: Ports) -> None:
    """Returns once passt has tried.

    :raise Unavailable: it could not be told, and whether it has heard of it is not known.
    """
    await _run([program, *arguments(ports), path])
    # passt takes up a client when it is done with the one before (measured): so it has tried when it answers this one.
    await _run([program, path])


async def _run(command: list[str]) -> None:
    program = command[0]
    try:
        process = await spawn(command)
    except OSError as error:
        raise Unavailable(f"{program} cannot be run: {error.strerror or error}") from error
    lines: list[str] = []
    status = None
    try:
        with anyio.move_on_after(TIMEOUT):
            lines += [line async for line in read_lines(process.output)]
            status = await process.wait()
    finally:
        with anyio.CancelScope(shield=True):
            await process.end(_END_GRACE, kill=status is None)
        process.close()
    if status is None:
        raise Unavailable(f"{program} did not end within {TIMEOUT:g} s")
    if status.exit_code != 0:
        said = "; ".join(line.strip() for line in lines) or "nothing"
        raise Unavailable(f"{program} ended with {status} and said: {said}")


# --- whether anybody listens --------------------------------------------------------------------------


class Holder(enum.Enum):
    """Who has a port of this host."""

    NOBODY = enum.auto()
    SOMEBODY = enum.auto()
    UNKNOWN = enum.auto()
    """this user may not have it, or there is no such address"""


def look(forwards: Ports, family: int | None = None) -> dict[str, Holder]:
    """Who has the ports of this host to which these forwards belong, by their names: ``tcp 127.0.0.1/80``.

    By binding them for a moment, which sees sockets of all users, and addresses and interfaces as the kernel does.

    :param family: 4 or 6 where passt has that alone.
    """
    found = {}
    for protocol, specs in forwards.items():
        for text in specs:
            spec = parse_ports(text)
            for port in itertools.islice(_ports(spec), MOST_PORTS):
                found[_name(protocol, spec, port)] = _look(protocol, spec, port, family)
    return found


def taken(wanted: Ports, now: Ports, family: int | None = None) -> list[str]:
    """The ports of these forwards that somebody else has: not those that are forwarded now, at whichever address."""
    ours = {
        (protocol, port)
        for protocol, specs in now.items()
        for text in specs
        for port in _ports(parse_ports(text))
    }
    return [
        _name(protocol, spec, port)
        for protocol, specs in wanted.items()
        for spec in map(parse_ports, specs)
        for port in itertools.islice(_ports(spec), MOST_PORTS)
        if (protocol, port) not in ours and _look(protocol, spec, port, family) is Holder.SOMEBODY
    ]


def _name(protocol: str, spec: PortSpec, port: int) -> str:
    place = f"{spec.address or ''}{f'%{spec.interface}' if spec.interface else ''}"
    return f"{protocol} {place}/{port}" if place else f"{protocol} {port}"


def _ports(spec: PortSpec) -> Iterator[int]:
    """None of `all`: passt takes what is free, and is content."""
    for first, last, _ in () if spec.all else spec.ranges:
        for port in range(first, last + 1):
            if not any(low <= port <= high for low, high in spec.exclusions):
                yield port


def _look(protocol: str, spec: PortSpec, port: int, family: int | None) -> Holder:
    if spec.address is not None:
        return _bind(protocol, str(spec.address), port, spec.interface)
    hosts = {4: "0.0.0.0", 6: "::"}  # noqa: S104 as passt does
    found = [
        _bind(protocol, host, port, spec.interface) for each, host in hosts.items() if family in (None, each)
    ]
    # A host, or a passt, without IPv6 has the port all the same.
    return next((each for each in (Holder.SOMEBODY, Holder.NOBODY) if each in found), Holder.UNKNOWN)


def _bind(protocol: str, host: str, port: int, interface: str | None) -> Holder:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as probe:
            if (
                kind == socket.SOCK_STREAM
            ):  # connections that are over hold no port; for UDP two could have one by this
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if interface is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            probe.bind((host, port))
    except OSError as error:
        return Holder.SOMEBODY if error.errno == errno.EADDRINUSE else Holder.UNKNOWN
    return Holder.NOBODY
