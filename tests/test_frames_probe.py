# SPDX-License-Identifier: GPL-2.0-or-later
"""qrap's own two frames, byte for byte, and the search for an answer in whatever a stream brings."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether

from qrapd.frames import (
    LONGEST_FRAME,
    SHORTEST_FRAME,
    AnswerFinder,
    GarbageError,
    is_answer,
    probe_request,
    split_frames,
)

BROADCAST = "ff:ff:ff:ff:ff:ff"

# What qrap.c writes, by the description of it: length 42, ARP; length 78, neighbour solicitation.
WRITTEN_BY_QRAP = bytes.fromhex(
    "0000002a ffffffffffff ffffffffffff 0806 0001 0800 06 04 0001"
    "000000000000 00000000 000000000000 00000000"
    "0000004e ffffffffffff ffffffffffff 86dd 60000000 0018 3a ff"
    "00000000000000000000000000000001 00000000000000000000000000000000"
    "87 00 0000 00000000 00000000000000000000000000000000"
)

# Listens as a passt would in a /tmp of its own, starts qrap, and prints what qrap wrote.
CAPTURE = """
import socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind("/tmp/passt_1.socket")
listener.listen()
listener.settimeout(10)
qrap = subprocess.Popen([sys.argv[1], "5", "true"], stderr=subprocess.DEVNULL)
try:
    connection = listener.accept()[0]
    connection.settimeout(10)
    print(connection.recv(4096).hex())
finally:
    qrap.kill()
    qrap.wait()
"""


def on_the_wire(frame: bytes) -> bytes:
    """A frame as the stream carries it."""
    return struct.pack("!I", len(frame)) + frame


def addresses(family: Literal[4, 6]) -> st.SearchStrategy[str]:
    """Any address, as text."""
    return st.ip_addresses(v=family).map(str)


macs = st.binary(min_size=6, max_size=6).map(lambda mac: mac.hex(":"))
replies = st.builds(
    lambda source, target, mine, yours, padding: (
        bytes(Ether(src=source, dst=target) / ARP(op="is-at", hwsrc=source, psrc=mine, pdst=yours))
        + bytes(padding)
    ),
    macs,
    macs,
    addresses(4),
    addresses(4),
    st.sampled_from([0, 18]),
)
advertisements = st.builds(
    lambda source, mine, yours: bytes(
        Ether(src=source, dst=BROADCAST) / IPv6(src=mine, dst=yours) / ICMPv6ND_NA(tgt=mine)
    ),
    macs,
    addresses(6),
    addresses(6),
)
answers = replies | advertisements
questions = st.builds(
    lambda source, mine, yours: bytes(Ether(src=source, dst=BROADCAST) / ARP(psrc=mine, pdst=yours)),
    macs,
    addresses(4),
    addresses(4),
) | st.builds(
    lambda source, mine, yours: bytes(
        Ether(src=source, dst=BROADCAST) / IPv6(src=mine, dst=yours) / ICMPv6ND_NS(tgt=yours)
    ),
    macs,
    addresses(6),
    addresses(6),
)
noise = st.binary(min_size=SHORTEST_FRAME, max_size=200).filter(lambda frame: not is_answer(frame))


@st.composite
def cuts(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """The stream in pieces, as reads may bring it."""
    ends = sorted(draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    return [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]


def test_the_probe_is_what_the_c_program_writes() -> None:
    """Byte for byte as it is described."""
    assert WRITTEN_BY_QRAP == probe_request()
    assert 128 == len(probe_request())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a /tmp of its own")
def test_the_installed_qrap_writes_the_same(request: pytest.FixtureRequest) -> None:
    """The C program itself, caught in a mount namespace with a /tmp of its own."""
    qrap = Path("/usr/bin/qrap")
    if not qrap.is_file() or qrap.read_bytes()[:4] != b"\x7fELF":
        release = platform.freedesktop_os_release()
        if (release["ID"], release.get("VERSION_ID")) not in {("debian", "12"), ("debian", "13")}:
            request.node.add_marker(pytest.mark.may_skip(reason="only Debian 12 and 13 have the C program"))
        pytest.skip(f"{qrap}, passt's C program, is not here (on Debian 12 and 13: apt install passt)")
    # The kernel's list of listeners goes by network namespace; qrap does not look at it, but ours is no one's business.
    script = 'mount -t tmpfs none /tmp && exec "$@"'
    isolation = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", script, "sh"]
    python = [sys.executable, "-I", "-c", CAPTURE, str(qrap)]
    done = subprocess.run([*isolation, *python], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.fail(done.stderr)
    assert probe_request().hex() == done.stdout.strip()


def test_the_probe_is_what_scapy_builds() -> None:
    """scapy agrees on every field."""
    nowhere = "00:00:00:00:00:00"
    arp = Ether(dst=BROADCAST, src=BROADCAST) / ARP(
        op="who-has", hwsrc=nowhere, psrc="0.0.0.0", hwdst=nowhere, pdst="0.0.0.0"
    )
    solicitation = (
        Ether(dst=BROADCAST, src=BROADCAST)
        / IPv6(src="::1", dst="::", hlim=255)
        / ICMPv6ND_NS(tgt="::", cksum=0)
    )
    assert [bytes(arp), bytes(solicitation)] == list(split_frames(probe_request()))


@given(st.lists(questions | noise, max_size=4), answers, st.binary(max_size=50), st.data())
def test_an_answer_is_found(before: list[bytes], answer: bytes, after: bytes, data: st.DataObject) -> None:
    """Behind whatever a passt says unasked, however the stream is cut; what follows is not looked at."""
    stream = b"".join(map(on_the_wire, [*before, answer]))
    finder = AnswerFinder()
    for piece in data.draw(cuts(stream)):
        assert not finder.found or not piece
        finder.feed(piece)
    assert finder.found
    assert finder.feed(after)
    assert len(stream) + len(after) == finder.seen


@given(st.lists(questions | noise, max_size=4), answers, st.data())
def test_part_of_an_answer_is_none(before: list[bytes], answer: bytes, data: st.DataObject) -> None:
    """Not before its last byte has arrived."""
    stream = b"".join(map(on_the_wire, [*before, answer]))[:-1]
    finder = AnswerFinder()
    assert [] == [piece for piece in data.draw(cuts(stream)) if finder.feed(piece)]


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_any_bytes_are_judged(pieces: list[bytes]) -> None:
    """Nothing but GarbageError is raised; what is found, split_frames and is_answer find, too; little is kept."""
    finder = AnswerFinder()
    try:
        found = [finder.feed(piece) for piece in pieces]
    except GarbageError:
        return
    assert found[-1:] == [any(map(is_answer, split_frames(b"".join(pieces))))][: len(found)]
    assert len(finder._kept) <= 60


@pytest.mark.parametrize(
    "length", [0, 13, LONGEST_FRAME + 1, 2**31, 2**32 - 1], ids=lambda length: f"{length} bytes"
)
def test_garbage_is_known_by_its_length(length: int) -> None:
    """A frame that no passt sends and that QEMU would not take is refused before it arrives."""
    with pytest.raises(GarbageError, match=str(length)):
        AnswerFinder().feed(struct.pack("!I", length))


@pytest.mark.parametrize("length", [SHORTEST_FRAME, 65535, LONGEST_FRAME])
def test_the_largest_frames_are_passed_over(length: int) -> None:
    """An answer behind the shortest, passt's longest and QEMU's longest frame is found; none of these is kept."""
    answer = bytes(Ether(dst=BROADCAST) / ARP(op="is-at", psrc="192.0.2.1", pdst="192.0.2.2"))
    finder = AnswerFinder()
    assert not finder.feed(on_the_wire(bytes(length)))
    assert finder.feed(on_the_wire(answer))
    assert len(finder._kept) == 0
