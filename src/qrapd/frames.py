# SPDX-License-Identifier: GPL-2.0-or-later
"""Ethernet frames as passt's UNIX stream carries them, and those by which a passt is asked for a sign of life.

On the stream each frame is preceded by its length as a 4-byte big-endian number (QEMU's net/socket.c and
passt's tap.c); there is nothing between two frames. Consuming part of a frame would desynchronise the
stream for good.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = [
    "LENGTH_SIZE",
    "LONGEST_FRAME",
    "SHORTEST_FRAME",
    "AnswerFinder",
    "GarbageError",
    "introductions",
    "is_answer",
    "parse_mac",
    "probe_request",
    "sign_of_life_request",
    "split_frames",
]

LENGTH_SIZE = 4

LONGEST_FRAME = 4096 + 65536
"""Bytes. QEMU's NET_BUFSIZE (include/net/net.h): it drops a stream that announces more. passt sends at most 65535."""

SHORTEST_FRAME = 14
"""Bytes: an Ethernet header (IEEE 802.3). passt takes and sends nothing shorter (tap.c)."""

_BROADCAST = b"\xff" * 6
_ETHERTYPE_ARP = 0x0806
_ETHERTYPE_IPV4 = 0x0800
_ETHERTYPE_IPV6 = 0x86DD
_ARP_REQUEST, _ARP_REPLY = 1, 2
_NEXT_HEADER_ICMPV6 = 58
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136
_HEAD_SIZE = 55  # bytes of a frame that is_answer looks at: Ethernet's header, IPv6's, and ICMPv6's type


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` as six bytes."""
    return bytes.fromhex(text.replace(":", ""))


def sign_of_life_request(mac: bytes) -> bytes:
    """An ARP request and a neighbour solicitation from ``mac``, each with its length word: 128 bytes.

    Both ask for the unspecified address from the unspecified (IPv4) or the link-local address (IPv6), and
    so claim nothing in the guest's name; passt 2023-03 to 2026 answers for any target but the guest's own
    (measured). An IPv4-only passt answers the first, an IPv6-only one the second.
    """
    return _request(mac, mac, _link_local(mac))


def probe_request() -> bytes:
    """qrap's probe: the same two questions from nobody, 128 bytes, as the C program writes them.

    Ethernet from broadcast to broadcast, all addresses in the ARP request zero, the solicitation from ::1.
    """
    return _request(_BROADCAST, bytes(6), bytes(15) + b"\1")


def _request(ethernet_source: bytes, arp_sender: bytes, ipv6_source: bytes) -> bytes:
    arp = struct.pack("!6s6sH", _BROADCAST, ethernet_source, _ETHERTYPE_ARP)
    arp += struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, _ARP_REQUEST, arp_sender, bytes(4), bytes(6), bytes(4)
    )
    return b"".join(map(_with_length, (arp, _solicitation(ethernet_source, ipv6_source))))


def _solicitation(ethernet_source: bytes, ipv6_source: bytes) -> bytes:
    """A neighbour solicitation (RFC 4861) for the unspecified address, with a checksum that passt does not look at."""
    solicitation = struct.pack("!BBHI16s", _NEIGHBOUR_SOLICITATION, 0, 0, 0, bytes(16))
    ipv6 = struct.pack("!6s6sH", _BROADCAST, ethernet_source, _ETHERTYPE_IPV6)
    ipv6 += struct.pack(
        "!IHBB16s16s", 6 << 28, len(solicitation), _NEXT_HEADER_ICMPV6, 255, ipv6_source, bytes(16)
    )
    return ipv6 + solicitation


def _with_length(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


_PROTOCOL_FOR_EXPERIMENTS = 253
"""RFC 3692, and the IANA's register of protocol numbers: carries nothing that anyone would answer."""


def introductions(mac: bytes, addresses: Iterable[str]) -> Iterator[bytes]:
    """For each address an IP packet from it, with its length word, by which passt learns that the guest has it.

    passt takes the source of an IPv4 packet for the guest's address whatever is in it, and that of an IPv6 packet if a
    neighbour solicitation is in it; an ARP request, or an announcement, teaches it just the MAC (measured with passt
    2023-03 and 2025-05). Nobody answers the IPv4 packet; passt answers the solicitation, which the guest passes over.
    """
    for address in map(ip_address, addresses):
        if isinstance(address, IPv6Address):
            yield _with_length(_solicitation(mac, address.packed))
        else:
            yield _with_length(
                struct.pack("!6s6sH", _BROADCAST, mac, _ETHERTYPE_IPV4) + _empty_packet(address)
            )


def _empty_packet(source: IPv4Address) -> bytes:
    """An IPv4 packet (RFC 791) to the unspecified address, with eight bytes of no protocol."""
    fields = (0x45, 0, 28, 0, 0, 64, _PROTOCOL_FOR_EXPERIMENTS)
    header = struct.pack("!BBHHHBBH4s4s", *fields, 0, source.packed, bytes(4))
    checksum = struct.pack("!H", _internet_checksum(header))
    return header[:10] + checksum + header[12:] + bytes(8)


def _internet_checksum(data: bytes) -> int:
    """RFC 1071, over an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _link_local(mac: bytes) -> bytes:
    """The link-local address made from a MAC: RFC 4291, appendix A (modified EUI-64)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


def split_frames(data: bytes) -> Iterator[bytes]:
    """The whole frames at the beginning of ``data``, without their length words; a partial last one is left out."""
    start = LENGTH_SIZE
    while start <= len(data):
        (length,) = struct.unpack_from("!I", data, start - LENGTH_SIZE)
        if start + length > len(data):
            return
        yield data[start : start + length]
        start += length + LENGTH_SIZE


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


class GarbageError(ValueError):
    """A length word that neither a passt sends nor QEMU takes: whoever speaks here is no passt."""


class AnswerFinder:
    """Looks for an answer in a stream that comes in pieces; keeps the head of one frame, however long that is."""

    def __init__(self) -> None:
        self._kept = bytearray()  # of the length word, then of the frame's head
        self._length: int | None = None
        self._missing = 0  # of the frame, behind what is kept
        self.seen = 0
        """Bytes that were fed so far."""
        self.found = False
        """Whether an answer has arrived, all of it."""

    def feed(self, data: bytes) -> bool:
        """Take the next bytes of the stream and return :attr:`found`; what follows an answer is not looked at.

        :raise GarbageError: a frame would be longer than LONGEST_FRAME or shorter than SHORTEST_FRAME bytes.
        """
        self.seen += len(data)
        position = 0
        while position < len(data) and not self.found:
            if self._length is None:
                position = self._take(data, position, LENGTH_SIZE)
                self._begin_frame()
                continue
            position = self._take(data, position, min(self._length, _HEAD_SIZE))
            skipped = min(self._missing, len(data) - position)
            position += skipped
            self._missing -= skipped
            if len(self._kept) == min(self._length, _HEAD_SIZE) and not self._missing:
                self.found = is_answer(bytes(self._kept))
                self._kept.clear()
                self._length = None
        return self.found

    def _take(self, data: bytes, position: int, size: int) -> int:
        """Keep bytes until there are ``size``; returns the position behind them."""
        end = position + size - len(self._kept)
        self._kept += data[position:end]
        return min(end, len(data))

    def _begin_frame(self) -> None:
        if len(self._kept) < LENGTH_SIZE:
            return
        length = int.from_bytes(self._kept, "big")
        if not SHORTEST_FRAME <= length <= LONGEST_FRAME:
            raise GarbageError(f"a frame of {length} bytes")
        self._kept.clear()
        self._length = length
        self._missing = max(0, length - _HEAD_SIZE)
