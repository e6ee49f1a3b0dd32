# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions to sock_diag(7) and its answers, as bytes: netlink's framing, and TCP listeners.

Of UNIX sockets, `unix_sockets` knows the rest.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

__all__ = [
    "NETLINK_SOCK_DIAG",
    "TcpListener",
    "listener_request",
    "parse_listener",
    "request",
    "split_messages",
]

# linux/netlink.h, linux/sock_diag.h
NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_MESSAGE_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")

# linux/inet_diag.h: inet_diag_req_v2 up to its id, inet_diag_sockid, inet_diag_msg around its id
_INET_REQUEST = struct.Struct("=BBBxI")
_PORTS, _INTERFACE_AND_COOKIE = struct.Struct("!HH"), struct.Struct("=I2I")
_INET_HEADER, _INET_FOOTER = struct.Struct("=BB2x"), struct.Struct("=5I")
_FOOTER_START = _INET_HEADER.size + 48
_NO_COOKIE = 0xFFFFFFFF
_IPPROTO_TCP, _TCP_LISTEN = 6, 10


def request(body: bytes, *, dump: bool) -> bytes:
    """A question with the header that it needs: about one socket, or about all.

    :param body: the family's request.
    """
    flags = _NLM_F_REQUEST | (_NLM_F_DUMP if dump else 0)
    return _MESSAGE_HEADER.pack(_MESSAGE_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + body


def split_messages(data: bytes) -> tuple[list[tuple[int, int]], bool]:
    """Where in one datagram of an answer the sockets are, start and end each, and whether a dump is complete.

    :raise OSError: the kernel refuses, or what came is no answer.
    """
    found: list[tuple[int, int]] = []
    start = 0
    while start + _MESSAGE_HEADER.size <= len(data):
        length, kind = _MESSAGE_HEADER.unpack_from(data, start)[:2]
        if kind == _NLMSG_DONE:
            return found, True
        if kind == _NLMSG_ERROR:
            (number,) = _ERROR.unpack_from(data, start + _MESSAGE_HEADER.size)
            raise OSError(-number, "refused by sock_diag(7)")
        if length < _MESSAGE_HEADER.size:
            raise OSError(errno.EBADMSG, "the kernel sent a message without an end")
        found.append((start + _MESSAGE_HEADER.size, start + length))
        start += (length + 3) & ~3
    return found, False


class TcpListener(NamedTuple):
    """A listening socket."""

    waiting: int
    """Connections that nobody has accepted yet."""
    inode: int


def listener_request(family: int, address: bytes, port: int, interface: int = 0) -> bytes:
    """Ask for the socket that a connection to this place would reach.

    :param address: as in the packet, 4 or 16 bytes; all zero is the listener on every address.
    :param interface: the index of the interface that a listener is bound to.
    """
    sockets_id = _PORTS.pack(port, 0) + address.ljust(16, b"\0") + bytes(16)
    sockets_id += _INTERFACE_AND_COOKIE.pack(interface, _NO_COOKIE, _NO_COOKIE)
    return request(_INET_REQUEST.pack(family, _IPPROTO_TCP, 0, 1 << _TCP_LISTEN) + sockets_id, dump=False)


def parse_listener(data: bytes) -> TcpListener | None:
    """The answer; None: the socket found there does not listen.

    :raise OSError: ENOENT where there is no such socket, else as :func:`split_messages`.
    """
    for start, end in split_messages(data)[0]:
        if end - start >= _FOOTER_START + _INET_FOOTER.size:
            _, state = _INET_HEADER.unpack_from(data, start)
            _, waiting, _, _, inode = _INET_FOOTER.unpack_from(data, start + _FOOTER_START)
            if state == _TCP_LISTEN:
                return TcpListener(waiting, inode)
    return None
