# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host can tell of a passt without a word to it: what it has not read, whether it runs, who waits for it.

:mod:`qrapd.stall` judges by it. A look costs 17 microseconds, and 15 to 25 more for each port looked at (measured).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import struct
import termios
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from qrapd import sock_diag
from qrapd.ports import read_forwards
from qrapd.stall import Signs

__all__ = [
    "MOST_PORTS",
    "ListenAddress",
    "count_waiting",
    "listen_addresses",
    "read",
    "unread_by_peer",
    "unread_by_us",
]

MOST_PORTS = 16
"""Listening sockets of one passt that are looked at: a third of a millisecond. Of `all`, with its 65,000 sockets, none
is. Without this sign, passt is asked."""

_ANSWER_SIZE = 8192
"""Bytes, far more than the kernel tells of one socket; it has answered when it has been asked."""

_NUMBER = struct.Struct("i")
_ZERO = bytes(_NUMBER.size)


class ListenAddress(NamedTuple):
    """Where passt listens for TCP connections."""

    host: str
    """an address of this host; 0.0.0.0 or :: for all of them"""
    port: int
    interface: str | None = None


def read(pid: int | None, fd: int, addresses: Collection[ListenAddress] = ()) -> Signs:
    """One look at the passt with this pid (None: not known), by a copy of QEMU's end of its stream.

    A process that has gone, or that may not be looked at, shows no activity and is not stopped: that its stream has
    hung up tells the rest.

    :param addresses: whose listen queues are looked at; best left out while the process shows activity.
    """
    stopped, activity = (False, None) if pid is None else _read_process(pid)
    return Signs(
        unread=unread_by_peer(fd),
        stopped=stopped,
        activity=activity,
        waiting=count_waiting(addresses) if addresses else 0,
        unread_by_qemu=unread_by_us(fd),
    )


# ---- the stream


def unread_by_peer(fd: int) -> int:
    """Memory, in bytes, of what the other end of a UNIX stream has not read; 0 if and only if all is read.

    The kernel counts the buffers (sk_wmem_alloc in net/unix/af_unix.c): 2304 for 1000 bytes, and as long as any byte
    of them is unread. For all copies of one end it is one count.
    """
    return _count(fd, termios.TIOCOUTQ)


def unread_by_us(fd: int) -> int:
    """Bytes that wait at this end of a UNIX stream."""
    return _count(fd, termios.FIONREAD)


def _count(fd: int, request: int) -> int:
    return int(_NUMBER.unpack(fcntl.ioctl(fd, request, _ZERO))[0])


# ---- the process


def _read_process(pid: int) -> tuple[bool, int | None]:
    """Whether it is stopped, and its activity. Everyone may read that of passt's, unless hidepid is set (proc(5))."""
    try:
        state = _read_file(f"/proc/{pid}/stat").rpartition(b") ")[2][:1]
    except OSError:
        return _is_stopped_child(pid), None
    if state == b"R":
        # It wants to run. If the host gives it no time, that is not passt's fault.
        return False, time.monotonic_ns()
    return state in (b"T", b"t"), _read_activity(pid)


def _read_activity(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        # Time on a processor, in ns, up to now: Documentation/scheduler/sched-stats.rst
        return int(_read_file(f"/proc/{pid}/schedstat").split()[0])
    with suppress(OSError, ValueError, IndexError):  # a kernel without CONFIG_SCHED_INFO
        lines = _read_file(f"/proc/{pid}/status").splitlines()
        return sum(int(line.split()[1]) for line in lines if b"ctxt_switches:" in line)
    return None


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _is_stopped_child(pid: int) -> bool:
    """The kernel tells a parent even where /proc hides its child, and goes on telling: nothing is taken from others."""
    with suppress(OSError):
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


# ---- the listen queues


def listen_addresses(options: Mapping[str, Any]) -> tuple[ListenAddress, ...]:
    """Where a passt with a link's options listens for TCP: the first MOST_PORTS places."""
    table = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return tuple(itertools.islice(_listen_addresses(table), MOST_PORTS))


def _listen_addresses(options: Mapping[str, Any]) -> Iterator[ListenAddress]:
    for _, protocol, spec in read_forwards(options, ""):
        if protocol != "tcp" or spec.all:
            continue
        hosts = ["0.0.0.0", "::"] if spec.address is None else [str(spec.address)]  # noqa: S104 nothing is bound
        excluded = spec.exclusions
        for first, last, _ in spec.ranges:
            for port in range(first, last + 1):
                if not any(low <= port <= high for low, high in excluded):
                    yield from (ListenAddress(host, port, spec.interface) for host in hosts)


def count_waiting(addresses: Collection[ListenAddress]) -> int:
    """TCP connections to these that nobody has accepted yet; those to sockets that cannot be asked about count none.

    Each is one question to the kernel, which finds the one socket. A dump would walk all of its listeners, and
    /proc/net/tcp all connections as well (3 ms on an idle host, measured).
    """
    found: dict[int, int] = {}  # by inode: one socket may serve IPv4 and IPv6
    with (
        suppress(OSError),  # no sock_diag for TCP in this kernel or this sandbox
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sock_diag.NETLINK_SOCK_DIAG) as netlink,
    ):
        for each in addresses:
            with suppress(FileNotFoundError):
                listener = _ask(netlink, each)
                if listener is not None:
                    found[listener.inode] = listener.waiting
    return sum(found.values())


def _ask(netlink: socket.socket, address: ListenAddress) -> sock_diag.TcpListener | None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    packed = socket.inet_pton(family, address.host.partition("%")[0])
    try:
        interface = 0 if address.interface is None else socket.if_nametoindex(address.interface)
    except OSError:
        return None
    netlink.send(sock_diag.listener_request(family, packed, address.port, interface))
    return sock_diag.parse_listener(netlink.recv(_ANSWER_SIZE, socket.MSG_DONTWAIT))
