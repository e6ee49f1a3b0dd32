# SPDX-License-Identifier: GPL-2.0-or-later
"""UNIX sockets looked at without being touched: who listens on a path, who is connected, what program that is.

Connecting is not looking: a passt with ``--one-off`` ends when its client leaves, so all this comes from the
kernel's tables. One dump by UNIX_DIAG (sock_diag(7)) tells of all paths at once; where that is refused,
/proc/net/unix tells the same but for the accept queue and the uid. Both know the sockets of this network
namespace only: a listener of another one is HIDDEN, and whether it is there at all tells a datagram socket,
which cannot be connected to a stream socket and so does it no harm.

Which process listens is harder: no table names it. /proc/PID/fd does, for processes of one's own and for root,
but no one else's, and passt is nobody's own (it is not dumpable). What everyone may read of every passt is its name
and its command line, unless /proc is mounted with hidepid (proc(5)).

`qrap` takes this path, too, and starts in a moment: the standard library alone, and of that no dataclasses (6 ms).
"""

# pathlib takes 9 ms to import, and qrap has no other use for it.
# ruff: noqa: PTH115, PTH116, PTH119, PTH123, PTH208

from __future__ import annotations

import enum
import errno
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from qrapd import sock_diag

__all__ = [
    "LONGEST_PATH",
    "Kind",
    "Program",
    "Sighting",
    "Socket",
    "dump_sockets",
    "find_holders",
    "find_programs",
    "is_locked",
    "lock_path",
    "look_at",
    "match",
    "parse_diag",
    "parse_proc_net_unix",
    "peer_credentials",
    "read_program",
]

# linux/unix_diag.h, linux/netlink.h
_REQUEST = struct.Struct("=BBHIII2I")
_SOCKET_HEADER = struct.Struct("=BBBxI2I")
_ATTRIBUTE_HEADER = struct.Struct("=HH")
_PAIR, _NUMBER = struct.Struct("=II"), struct.Struct("=I")
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_QUEUES, _SHOW_UID = 0x01, 0x02, 0x04, 0x10, 0x40
_NAME, _VFS, _PEER, _QUEUES, _UID = 0, 1, 2, 4, 7
_ESTABLISHED, _CLOSE, _LISTEN = 1, 7, 10  # TCP_ESTABLISHED and so on: UNIX sockets borrow TCP's states
_DUMP_SIZE = 128 * 1024  # the kernel fills up to 32 KiB at a time (netlink_dump), more where it is offered

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: unix(7)

LONGEST_PATH = 107
"""Bytes of a socket's path: sun_path has 108, the last one a null byte (unix(7))."""

_FDS_AT_A_TIME = 64
"""Between two pauses of a search: 0.1 to 0.3 ms (measured)."""


class Socket(NamedTuple):
    """A line of the kernel's table: a listening socket, or one that was accepted and so has its listener's name."""

    name: bytes
    inode: int
    listening: bool
    file: tuple[int, int] | None
    """Device (as the kernel counts) and inode (its lower 32 bits) of the file; None: not told."""
    peer: int | None
    """The inode of the socket at the other end; 0 when it has gone."""
    waiting: int | None
    """Connections that nobody has accepted yet (of a listening socket); None: not told."""
    uid: int | None
    """Whose the socket is; None: not told (Linux before 5.3)."""
    idle: bool = False
    """It has its name, but nobody has called listen(2) on it (yet)."""


class Kind(enum.Enum):
    """What is to be seen at a path."""

    ABSENT = "absent"
    OTHER = "other"  # a file, a socket that is no stream, or a path that no socket can have
    STALE = "stale"  # a socket's file, and nobody who has bound it
    BOUND = "bound"  # a program has bound it, but does not listen
    DENIED = "denied"
    HIDDEN = "hidden"  # somebody listens or is about to, in another network namespace
    LISTENING = "listening"


class Sighting(NamedTuple):
    """A path at one moment."""

    path: str
    kind: Kind
    file: tuple[int, int] | None = None
    """Device and inode, as stat(2) has them."""
    owner: int | None = None
    """The uid of the file."""
    made: float | None = None
    """When the file was made or last changed hands: seconds since the epoch."""
    inode: int | None = None
    """The listening socket's, as /proc/PID/fd names it."""
    uid: int | None = None
    """Whose the listening socket is; None: the kernel does not say."""
    waiting: int = 0
    """Connections that nobody has accepted yet."""
    connected: int = 0
    """Accepted connections, those included whose other end has gone."""
    reason: str = ""
    """What is there, or what forbids to look, in words, for the kinds OTHER, BOUND and DENIED."""

    @property
    def taken(self) -> bool:
        """Whether a client is connected, or waits to be."""
        return self.connected > 0 or self.waiting > 0


class Program(NamedTuple):
    """A process, as far as everyone may see it."""

    pid: int
    name: str
    """The kernel's name of it: the program's first 15 characters (proc_pid_comm(5))."""
    arguments: tuple[str, ...]
    """The command line; nothing where it may not be read."""
    started: float
    """Seconds since the epoch, by the boot clock: good to about 0.02 s while the host's clock is not set."""
    uid: int | None = None
    """The effective user; None where it cannot be read."""


# ---- the kernel's tables


def dump_sockets(paths: Collection[str]) -> list[Socket]:
    """All stream sockets of this network namespace that are bound to one of ``paths`` or were accepted there.

    Of a socket that was bound by another spelling of the path, the last component decides: :func:`match` tells more.

    :raise OSError: neither UNIX_DIAG nor /proc/net/unix can be read.
    """
    names = {os.path.basename(os.fsencode(path)) for path in paths}
    try:
        return list(_dump_by_netlink(names))
    except OSError:
        with open("/proc/net/unix", "rb") as table:
            return list(parse_proc_net_unix(table.read(), names))


def _dump_by_netlink(names: Collection[bytes]) -> Iterator[Socket]:
    show = _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_QUEUES | _SHOW_UID
    states = 1 << _ESTABLISHED | 1 << _CLOSE | 1 << _LISTEN
    question = _REQUEST.pack(socket.AF_UNIX, 0, 0, states, 0, show, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sock_diag.NETLINK_SOCK_DIAG) as netlink:
        netlink.send(sock_diag.request(question, dump=True))
        done = False
        while not done:
            sockets, done = parse_diag(netlink.recv(_DUMP_SIZE), names)
            yield from sockets


def parse_diag(data: bytes, names: Collection[bytes]) -> tuple[list[Socket], bool]:
    """One datagram of a dump: the sockets whose path ends in one of ``names``, and whether the dump is complete.

    :raise OSError: the kernel refuses the dump.
    """
    found: list[Socket] = []
    messages, done = sock_diag.split_messages(data)
    for start, end in messages:
        # The name comes first. Most sockets of a host are none of ours: these cost no more than this.
        first = start + _SOCKET_HEADER.size
        if first + 4 <= end:
            size, attribute = _ATTRIBUTE_HEADER.unpack_from(data, first)
            if attribute == _NAME:
                name = data[first + 4 : first + size].rstrip(b"\0")
                stream = data[start + 1] == socket.SOCK_STREAM
                if name[name.rfind(b"/") + 1 :] in names and name and stream:
                    found.append(_parse_socket(data[start:end], name))
    return found, done


def _parse_socket(message: bytes, name: bytes) -> Socket:
    state, inode = _SOCKET_HEADER.unpack_from(message)[2:4]
    attributes: dict[int, bytes] = {}
    start = _SOCKET_HEADER.size
    while start + 4 <= len(message):
        size, attribute = _ATTRIBUTE_HEADER.unpack_from(message, start)
        if size < 4:
            break
        attributes[attribute] = message[start + 4 : start + size]
        start += (size + 3) & ~3
    file = _PAIR.unpack(attributes[_VFS]) if _VFS in attributes else None
    queues = _PAIR.unpack(attributes[_QUEUES]) if _QUEUES in attributes else None
    listening = state == _LISTEN
    return Socket(
        name,
        inode,
        listening,
        file and (file[1], file[0]),
        _NUMBER.unpack(attributes[_PEER])[0] if _PEER in attributes else None,
        queues[0] if queues and listening else None,
        _NUMBER.unpack(attributes[_UID])[0] if _UID in attributes else None,
        idle=state == _CLOSE,
    )


def parse_proc_net_unix(table: bytes, names: Collection[bytes]) -> Iterator[Socket]:
    """/proc/net/unix (proc_pid_net(5)): ``Num: RefCount Protocol Flags Type St Inode Path``."""
    for line in table.splitlines()[1:]:
        columns = line.split(b" ", 7) if b"  " not in line else line.split(None, 7)
        if len(columns) < 8:
            continue
        name = columns[7]
        if name.startswith(b"@") or name[name.rfind(b"/") + 1 :] not in names:
            continue
        listening = bool(int(columns[3], 16) & 0x10000)  # __SO_ACCEPTCON
        connected = int(columns[5], 16) == 3  # SS_CONNECTED: linux/net.h
        if int(columns[4], 16) == socket.SOCK_STREAM:
            idle = not listening and not connected
            yield Socket(name, int(columns[6]), listening, None, None, None, None, idle)


# ---- paths


def look_at(paths: Sequence[str]) -> list[Sighting]:
    """What is to be seen at each of ``paths`` now, in their order. Nothing is touched.

    Costs one dump of the kernel's table and one stat(2) each: 0.3 ms for 99 absent paths, 1.2 ms for 99
    that are listened on (measured).

    :raise OSError: the kernel's tables cannot be read.
    """
    found: list[Sighting | os.stat_result] = [_stat(path) for path in paths]
    there = [path for path, status in zip(paths, found, strict=True) if isinstance(status, os.stat_result)]
    sockets = dump_sockets(there) if there else []
    by_name: dict[bytes, list[Socket]] = {}
    for each in sockets:
        by_name.setdefault(each.name[each.name.rfind(b"/") + 1 :], []).append(each)
    return [
        match(path, each, by_name.get(os.path.basename(os.fsencode(path)), []))
        if isinstance(each, os.stat_result)
        else each
        for path, each in zip(paths, found, strict=True)
    ]


def _stat(path: str) -> Sighting | os.stat_result:
    size = len(os.fsencode(path))
    if size > LONGEST_PATH:
        reason = f"its name has {size} bytes, and a socket's path may have {LONGEST_PATH}"
        return Sighting(path, Kind.OTHER, reason=reason)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Sighting(path, Kind.ABSENT)
    except PermissionError:
        return Sighting(
            path, Kind.DENIED, reason=f"{_closed_directory(path)} may not be searched by this user"
        )
    except OSError as error:
        return Sighting(path, Kind.OTHER, reason=error.strerror or str(error))
    if not stat.S_ISSOCK(status.st_mode):
        return Sighting(path, Kind.OTHER, owner=status.st_uid, reason=_name_type(status.st_mode))
    return status


def _closed_directory(path: str) -> str:
    """The first directory of those above ``path`` that may not be searched."""
    end = path.find("/", 1)
    while end > 0:
        if not os.access(path[:end], os.X_OK, effective_ids=True):
            return path[:end]
        end = path.find("/", end + 1)
    return path[: max(path.rfind("/"), 0)] or "."


def _name_type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISREG(mode):
        return "a regular file"
    return "no file, directory or socket" if not stat.S_ISFIFO(mode) else "a FIFO"


def match(path: str, status: os.stat_result, sockets: Iterable[Socket]) -> Sighting:
    """Which of ``sockets`` is bound to the file with this ``status``, and what that comes to."""
    ours = _bound_to(path, status, sockets)
    listeners = [each for each in ours if each.listening]
    sighting = Sighting(
        path,
        Kind.LISTENING,
        file=(status.st_dev, status.st_ino),
        owner=status.st_uid,
        made=status.st_ctime,
    )
    if not listeners:
        kind = _ask_by_datagram(path)
        if kind is Kind.HIDDEN and any(each.idle for each in ours):
            kind = Kind.BOUND
        return sighting._replace(kind=kind, reason=_REASONS.get(kind, ""))
    listener = listeners[-1]
    return sighting._replace(
        inode=listener.inode,
        uid=listener.uid,
        waiting=sum(each.waiting or 0 for each in listeners),
        connected=sum(not each.listening and not each.idle for each in ours),
    )


_REASONS = {
    Kind.BOUND: "a program has bound it and does not listen",
    Kind.DENIED: "its permissions do not let this user",
    Kind.OTHER: "a socket that is no stream",
}


def _bound_to(path: str, status: os.stat_result, sockets: Iterable[Socket]) -> list[Socket]:
    name, device = os.fsencode(path), os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    known = [each for each in sockets if each.file is None or each.file[1] == status.st_ino & 0xFFFFFFFF]
    by_device = [each for each in known if each.file and each.file[0] == device]
    # btrfs has one device number for stat(2) and another one inside: the name decides, then. But only then: below
    # another mount namespace's /tmp both the name and the inode may be the same.
    return by_device or [each for each in known if each.name == name]


def _ask_by_datagram(path: str) -> Kind:
    """Whether a stream socket is bound to the file, wherever: connect(2) looks for it before it minds the type."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.setblocking(False)
        try:
            datagram.connect(path)
        except OSError as error:
            known = {
                errno.ECONNREFUSED: Kind.STALE,
                errno.EPROTOTYPE: Kind.HIDDEN,
                errno.ENOENT: Kind.ABSENT,
                errno.EACCES: Kind.DENIED,
                errno.EPERM: Kind.DENIED,
            }
            return known.get(error.errno or 0, Kind.OTHER)
    return Kind.OTHER


def lock_path(file: tuple[int, int]) -> socket.socket | None:
    """An advisory lock on a socket's file (device, inode) that ends with the returned socket; None: somebody has it.

    It is an abstract name (unix(7)), so it needs no file, no rights, and cannot be left behind. Anyone can take
    it, too: never wait for it for long. It holds within a network namespace.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(_lock_name(file))
    except OSError as error:
        lock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return lock


def is_locked(file: tuple[int, int]) -> bool:
    """Whether anybody has that lock. Nobody notices the question, unlike a try to take it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(_lock_name(file))
        except OSError:
            return False
    return True


def _lock_name(file: tuple[int, int]) -> str:
    return f"\0qrapd/claim/{file[0]:x}:{file[1]:x}"


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Pid and uid of who called listen(2) on the other side (SO_PEERCRED: unix(7)); pid 0 where it cannot be named."""
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, uid


# ---- processes


def find_programs(prefix: str) -> list[Program]:
    """The processes whose name begins with ``prefix``; 0.5 ms for 100 processes (measured)."""
    wanted = os.fsencode(prefix)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        pids = [pid for pid in os.listdir(proc) if pid.isdecimal()]
        # The name, not the command line, of all: reading that one waits for whoever holds the process's memory.
        found = [int(pid) for pid in pids if _read_at(proc, f"{pid}/comm").startswith(wanted)]
    finally:
        os.close(proc)
    return [program for program in map(read_program, found) if program]


def read_program(pid: int) -> Program | None:
    """One process; None if it is not there, has ended (and nobody has collected it yet), or is hidden."""
    with suppress(OSError, ValueError, IndexError):
        proc = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            name = _read_at(proc, "comm").rstrip(b"\n")
            command = _read_at(proc, "cmdline", 1 << 20)
            state, *numbers = _read_at(proc, "stat").rpartition(b")")[2].split()
            # Not the owner of /proc/PID: of a program that is not dumpable, as passt, that is root (proc(5)).
            uids = _read_at(proc, "status").partition(b"\nUid:")[2].split(None, 2)
        finally:
            os.close(proc)
        if state in {b"Z", b"X"}:
            return None
        arguments = tuple(map(os.fsdecode, command.removesuffix(b"\0").split(b"\0"))) if command else ()
        started = _since_epoch(int(numbers[18]))
        return Program(pid, os.fsdecode(name), arguments, started, int(uids[1]) if len(uids) > 1 else None)
    return None


def _since_epoch(ticks: int) -> float:
    """Clock ticks since boot, as proc_pid_stat(5) has them, on the clock that files have."""
    import time

    now, boot = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - boot + ticks / os.sysconf("SC_CLK_TCK")


def _read_at(directory: int | None, name: str, size: int = 4096) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    except OSError:
        return b""
    try:
        data = b""
        while len(data) < size and (chunk := os.read(fd, size - len(data))):
            data += chunk
        return data
    except OSError:
        return b""
    finally:
        os.close(fd)


def find_holders(
    inodes: Collection[int], prefix: str, uids: Collection[int]
) -> Iterator[tuple[int, Program] | None]:
    """Who holds these sockets, as inode and process, and None for every pause that a caller may want to make.

    Searched are the processes whose name begins with ``prefix``, and then those of ``uids``, as far as their fds may
    be read: one's own can be, and all by root; passt's by root alone. 3 ms for 100 processes, 180 ms for 300 with
    100 fds each (measured): whoever has an event loop should not take it in one go. It ends when all are found.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    first, then = [], []
    start = os.fsencode(prefix)
    for count, name in enumerate(os.listdir("/proc"), 1):
        if name.isdecimal():
            with suppress(OSError):
                directory = f"/proc/{name}"
                if _read_at(None, f"{directory}/comm").startswith(start):
                    first.append(directory)
                elif os.stat(directory).st_uid in uids:
                    then.append(directory)
        if count % _FDS_AT_A_TIME == 0:
            yield None
    for directory in first + then:
        if not wanted:
            return
        yield None
        yield from _search_fds(directory, wanted)


def _search_fds(directory: str, wanted: dict[str, int]) -> Iterator[tuple[int, Program] | None]:
    try:
        names = os.listdir(f"{directory}/fd")
    except OSError:
        return
    for count, name in enumerate(names, 1):
        with suppress(OSError):
            inode = wanted.pop(os.readlink(f"{directory}/fd/{name}"), None)
            if inode is not None and (program := read_program(int(directory.rpartition("/")[2]))):
                yield inode, program
        if count % _FDS_AT_A_TIME == 0:
            yield None
