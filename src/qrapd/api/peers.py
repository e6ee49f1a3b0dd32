# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is at the other end of a connected UNIX socket.

The kernel noted it at connect(2), so a program that changes its user later, or is gone, changes nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Protocol

from qrapd.api.access import Peer

__all__ = ["read_peer"]

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: unix(7)
_SO_PEERGROUPS = 59  # asm-generic/socket.h, since Linux 4.13; Python has no name for it
_GID = struct.Struct("=I")
_FEW_GROUPS = 256  # what fits into the 1,024 bytes that Python's getsockopt() lets one have
_MOST_GROUPS = 65536  # NGROUPS_MAX: limits.h


class _Socket(Protocol):
    """A socket, or what an asyncio transport shows of one."""

    def fileno(self) -> int: ...

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def read_peer(connected: _Socket) -> Peer:
    """The credentials of a socket's other end.

    :raise OSError: this is no connected UNIX socket.
    """
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    return Peer(pid, uid, gid, _read_groups(connected))


def _read_groups(connected: _Socket) -> tuple[int, ...]:
    try:
        groups = connected.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _FEW_GROUPS * _GID.size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = _read_many_groups(connected.fileno())
    return tuple(gid for (gid,) in _GID.iter_unpack(groups))


def _read_many_groups(fd: int) -> bytes:
    import ctypes  # hardly anybody is in so many groups, and it takes 8 ms

    buffer = ctypes.create_string_buffer(_MOST_GROUPS * _GID.size)
    size = ctypes.c_uint(len(buffer))
    getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
    if getsockopt(fd, socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        raise OSError(ctypes.get_errno(), "SO_PEERGROUPS")
    return buffer.raw[: size.value]
