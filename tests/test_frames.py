# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames on passt's stream: cut right whatever comes, and the request what scapy would build."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether

from qrapd.frames import LENGTH_SIZE, is_answer, parse_mac, sign_of_life_request, split_frames

MAC = "52:54:00:12:34:56"

frames = st.lists(st.binary(max_size=200))


def on_the_wire(sequence: list[bytes]) -> bytes:
    """Frames as the stream carries them."""
    return b"".join(struct.pack("!I", len(frame)) + frame for frame in sequence)


@given(frames)
def test_frames_come_back_as_they_went(sequence: list[bytes]) -> None:
    """Splitting undoes what the wire format does, empty frames included."""
    assert sequence == list(split_frames(on_the_wire(sequence)))


@given(frames, st.binary(min_size=1, max_size=200), st.data())
def test_a_partial_last_frame_is_left_out(sequence: list[bytes], last: bytes, data: st.DataObject) -> None:
    """What is cut off anywhere in the last frame, its length word included, is not shown."""
    whole = on_the_wire([last])
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert sequence == list(split_frames(on_the_wire(sequence) + whole[:cut]))


@given(st.binary(max_size=300))
def test_any_bytes_are_split(data: bytes) -> None:
    """Garbage never raises, and what comes out is a beginning of what went in."""
    whole = list(split_frames(data))
    assert data.startswith(on_the_wire(whole))
    assert [] == [frame for frame in whole if is_answer(frame) not in {True, False}]


@given(st.binary(max_size=100))
def test_any_frame_is_judged(frame: bytes) -> None:
    """is_answer never raises, however short a frame is."""
    assert is_answer(frame) in {True, False}


def test_many_small_frames_are_split_in_linear_time() -> None:
    """A stream full of empty frames costs milliseconds: a hostile peer cannot hold up the supervisor."""
    before = time.process_time()
    assert 250_000 == sum(1 for _ in split_frames(bytes(LENGTH_SIZE * 250_000)))
    assert time.process_time() - before < 5


@pytest.mark.parametrize("mac", [MAC, "02:00:00:00:00:01", "fe:ff:ff:ff:ff:ff", "00:16:3e:aa:bb:cc"])
def test_the_request_is_what_scapy_builds(mac: str) -> None:
    """An ARP request and a neighbour solicitation; scapy says what their bytes are, and that they parse."""
    arp, solicitation = split_frames(sign_of_life_request(parse_mac(mac)))

    expected = Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / ARP(
        op="who-has", hwsrc=mac, psrc="0.0.0.0", hwdst="00:00:00:00:00:00", pdst="0.0.0.0"
    )
    assert bytes(expected) == arp

    parsed = Ether(solicitation)
    assert ("ff:ff:ff:ff:ff:ff", mac) == (parsed.dst, parsed.src)
    assert "::" == parsed[IPv6].dst
    assert 255 == parsed[IPv6].hlim  # RFC 4861, 7.1.1: anything less is dropped
    assert "::" == parsed[ICMPv6ND_NS].tgt
    rebuilt = (
        Ether(dst="ff:ff:ff:ff:ff:ff", src=mac)
        / IPv6(src=parsed[IPv6].src, dst="::", hlim=255)
        / ICMPv6ND_NS(tgt="::", cksum=0)  # passt does not look at it, nor did qrap set it
    )
    assert bytes(rebuilt) == solicitation


def test_the_link_local_address_is_made_from_the_mac() -> None:
    """RFC 4291, appendix A: the universal bit is inverted, and ff:fe stands in the middle."""
    _, solicitation = split_frames(sign_of_life_request(parse_mac(MAC)))
    assert "fe80::5054:ff:fe12:3456" == Ether(solicitation)[IPv6].src


def test_the_request_has_the_length_that_is_promised() -> None:
    """128 bytes, length words included."""
    assert 128 == len(sign_of_life_request(parse_mac(MAC)))


@pytest.mark.parametrize("padding", [0, 18])
def test_answers_are_recognised(padding: int) -> None:
    """An ARP reply (padded to 60 bytes by passts of 2026) and a neighbour advertisement are answers."""
    arp = Ether(src=MAC, dst=MAC) / ARP(op="is-at", psrc="192.0.2.1", pdst="192.0.2.2")
    advertisement = Ether(src=MAC, dst=MAC) / IPv6(src="fe80::1", dst="fe80::2") / ICMPv6ND_NA(tgt="fe80::1")
    assert is_answer(bytes(arp) + bytes(padding))
    assert is_answer(bytes(advertisement) + bytes(padding))


def test_questions_are_no_answers() -> None:
    """What a passt since 2025-09 sends unasked proves nothing: nor does our own request, echoed."""
    unasked = [
        Ether(src=MAC) / ARP(op="who-has", psrc="192.0.2.1", pdst="192.0.2.2"),
        Ether(src=MAC, dst="33:33:00:00:00:01")
        / IPv6(src="fe80::1", dst="ff02::1")
        / ICMPv6ND_NS(tgt="fe80::2"),
    ]
    assert [] == [frame for frame in unasked if is_answer(bytes(frame))]
    assert [] == [frame for frame in split_frames(sign_of_life_request(parse_mac(MAC))) if is_answer(frame)]
