# SPDX-License-Identifier: GPL-2.0-or-later
"""Ethernet frames as passt's UNIX stream carries them, and the two by which a passt is asked for a sign of life.

On the stream each frame is preceded by its length as a 4-byte big-endian number (QEMU's net/socket.c and
passt's tap.c); there is nothing between two frames. Consuming part of a frame would desynchronise the
stream for good.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["LENGTH_SIZE", "is_answer", "parse_mac", "sign_of_life_request", "split_frames"]

LENGTH_SIZE = 4

_BROADCAST = b"\xff" * 6
_ETHERTYPE_ARP = 0x0806
_ETHERTYPE_IPV6 = 0x86DD
_ARP_REQUEST, _ARP_REPLY = 1, 2
_NEXT_HEADER_ICMPV6 = 58
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` as six bytes."""
    return bytes.fromhex(text.replace(":", ""))


def sign_of_life_request(mac: bytes) -> bytes:
    """An ARP request and a neighbour solicitation from ``mac``, each with its length word: 128 bytes.

    Both ask for the unspecified address from the unspecified (IPv4) or the link-local address (IPv6), and
    so claim nothing in the guest's name; passt 2023-03 to 2026 answers for any target but the guest's own
    (measured). An IPv4-only passt answers the first, an IPv6-only one the second.
    """
    arp = struct.pack("!6s6sH", _BROADCAST, mac, _ETHERTYPE_ARP)
    arp += struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, _ARP_REQUEST, mac, bytes(4), bytes(6), bytes(4))
    solicitation = struct.pack("!BBHI16s", _NEIGHBOUR_SOLICITATION, 0, 0, 0, bytes(16))
    ipv6 = struct.pack("!6s6sH", _BROADCAST, mac, _ETHERTYPE_IPV6)
    ipv6 += struct.pack(
        "!IHBB16s16s", 6 << 28, len(solicitation), _NEXT_HEADER_ICMPV6, 255, _link_local(mac), bytes(16)
    )
    return b"".join(struct.pack("!I", len(frame)) + frame for frame in (arp, ipv6 + solicitation))


def _link_local(mac: bytes) -> bytes:
    """The link-local address made from a MAC: RFC 4291, appendix A (modified EUI-64)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


def split_frames(data: bytes) -> Iterator[bytes]:
    """The whole frames at the beginning of ``data``, without their length words; a partial last one is left out."""
    while len(data) >= LENGTH_SIZE:
        (length,) = struct.unpack_from("!I", data)
        if len(data) < LENGTH_SIZE + length:
            return
        yield data[LENGTH_SIZE : LENGTH_SIZE + length]
        data = data[LENGTH_SIZE + length :]


def is_answer(frame: bytes) -> bool:
    """Whether a frame is an ARP reply or a neighbour advertisement.

    passt since 2025-09 speaks first, with an ARP request and a solicitation of its own: those prove nothing.
    """
    if len(frame) < 22:
        return False
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype == _ETHERTYPE_ARP:
        return bool(struct.unpack_from("!H", frame, 20)[0] == _ARP_REPLY)
    if ethertype == _ETHERTYPE_IPV6 and len(frame) > 54:
        return frame[20] == _NEXT_HEADER_ICMPV6 and frame[54] == _NEIGHBOUR_ADVERTISEMENT
    return False
