# SPDX-License-Identifier: GPL-2.0-or-later
"""What is seen of real processes, real streams and real listen queues, and what is made of it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd import sock_diag, vital_signs
from qrapd.frames import parse_mac, sign_of_life_request
from qrapd.stall import Signs, StallJudge, Verdict
from qrapd.vital_signs import (
    ListenAddress,
    count_waiting,
    listen_addresses,
    read,
    unread_by_peer,
    unread_by_us,
)
from support import PATIENCE, free_port

HELLO = sign_of_life_request(parse_mac("52:54:00:12:34:56"))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s"
        time.sleep(0.01)


@dataclass
class Peer:
    """A process at the other end of a stream."""

    pid: int
    stream: socket.socket
    process: subprocess.Popen[bytes]

    def look(self, *addresses: ListenAddress) -> Signs:
        """As a link does."""
        return read(self.pid, self.stream.fileno(), addresses)

    def send(self, number: signal.Signals) -> None:
        """A signal; for SIGSTOP and SIGCONT, until it has come."""
        os.kill(self.pid, number)
        eventually(lambda: self.look().stopped is (number is signal.SIGSTOP))


@contextmanager
def peer(*argv: str) -> Iterator[Peer]:
    """A program on one end of a stream, whose number is its last argument; it is gone afterwards."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [*argv, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL
            )
        try:
            yield Peer(process.pid, ours, process)
        finally:
            process.kill()
            process.wait()


def answer(stream: socket.socket) -> None:
    """Wait for passt's first words, and take all that are there."""
    stream.settimeout(PATIENCE)
    stream.send(HELLO)
    assert stream.recv(1 << 16)
    time.sleep(0.1)
    stream.setblocking(False)
    with suppress(BlockingIOError):
        stream.recv(1 << 16)


@contextmanager
def passt(*options: str) -> Iterator[Peer]:
    """A real one that answers."""
    with peer("passt", *options, "--foreground", "--fd") as found:
        answer(found.stream)
        yield found


def python(program: str) -> Sequence[str]:
    """A program in passt's place."""
    return (sys.executable, "-c", program)


# ---- the process


def test_a_process_that_is_stopped() -> None:
    """It is seen to be, does not run, and is seen to go on."""
    with peer(*python("import time\nwhile True: time.sleep(0.001)")) as found:
        first = found.look()
        assert not first.stopped
        eventually(lambda: found.look().activity != first.activity)
        found.send(signal.SIGSTOP)
        seen = {found.look() for _ in range(20)}
        assert 1 == len(seen)
        assert seen.pop().activity is not None
        found.send(signal.SIGCONT)


def test_a_process_that_wants_to_run_counts_as_active() -> None:
    """Whether or not it is given the time."""
    with peer(*python("while True: pass")) as found:
        eventually(lambda: len({found.look().activity for _ in range(3)}) == 3)


def test_a_process_that_has_gone() -> None:
    """Dead, buried, or never there: no activity and no complaint."""
    with peer("true") as found:
        eventually(lambda: not Path(f"/proc/{found.pid}/cmdline").read_bytes())
        assert 1 == len({found.look().activity for _ in range(3)})
        found.process.wait()
        assert Signs(unread=0) == found.look()
        assert Signs(unread=0) == read(None, found.stream.fileno())


def test_where_proc_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a child is stopped is still known, as often as one asks; of others, nothing is."""

    def refuse(path: str) -> bytes:
        raise FileNotFoundError(path)

    with peer("sleep", "1000") as found:
        monkeypatch.setattr(vital_signs, "_read_file", refuse)
        assert Signs(0) == found.look()
        found.send(signal.SIGSTOP)
        assert [Signs(0, stopped=True)] * 3 == [found.look() for _ in range(3)]
        found.send(signal.SIGCONT)
        assert Signs(0) == read(os.getpid(), found.stream.fileno())


def test_a_kernel_without_schedstat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context switches say the same."""
    whole = vital_signs._read_file

    def partly(path: str) -> bytes:
        if path.endswith("/schedstat"):
            raise FileNotFoundError(path)
        return whole(path)

    monkeypatch.setattr(vital_signs, "_read_file", partly)
    with peer(*python("import time\nwhile True: time.sleep(0.01)")) as found:
        first = found.look()
        eventually(lambda: found.look().activity != first.activity)


# ---- the stream


def test_what_is_unread_is_counted_at_every_copy_of_an_end() -> None:
    """The memory of it for the other end, the bytes of it for ours; it takes nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.dup() as copy:
        assert (0, 0) == (unread_by_peer(copy.fileno()), unread_by_us(copy.fileno()))
        ours.send(bytes(1000))
        ours.send(bytes(1000))
        both = unread_by_peer(copy.fileno())
        assert both >= 2000
        theirs.recv(1)
        assert both == unread_by_peer(copy.fileno())  # a buffer that is read in part counts whole
        theirs.recv(999)
        assert 1000 <= unread_by_peer(copy.fileno()) < both
        theirs.recv(1000)
        assert 0 == unread_by_peer(copy.fileno())
        theirs.send(bytes(90))
        assert 90 == unread_by_us(copy.fileno())
        assert 90 == len(ours.recv(1000))


# ---- the listen queues


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"tcp_ports": "none"}, []),
        ({"tcp_ports": "all"}, []),
        ({"tcp_ports": "~22"}, []),
        ({"udp_ports": "53"}, []),
        ({"tcp_ports": "127.0.0.1/8080:80"}, [("127.0.0.1", 8080)]),
        ({"tcp_ports": ["::1/22-23", "what?"]}, [("::1", 22), ("::1", 23)]),
        ({"tcp_ports": "22-25,~23-24", "ipv4_only": True}, [("0.0.0.0", 22), ("0.0.0.0", 25)]),
        ({"tcp_ports": ("::1/22", "23", "24"), "ipv6_only": True}, [("::1", 22), ("::", 23), ("::", 24)]),
        ({"tcp_ports": "80"}, [("0.0.0.0", 80), ("::", 80)]),
        ({"tcp_ports": "%lo/80", "ipv6_only": True}, [("::", 80, "lo")]),
    ],
)
def test_where_passt_listens(
    options: dict[str, object], expected: list[tuple[str, int] | tuple[str, int, str]]
) -> None:
    """What the options of a link come to; of `all`, nothing is looked at."""
    assert tuple(ListenAddress(*each) for each in expected) == listen_addresses(options)


def test_of_many_ports_some_are_looked_at() -> None:
    """A range may have tens of thousands."""
    assert vital_signs.MOST_PORTS == len(listen_addresses({"tcp_ports": "1000-30000"}))


FAMILIES = [
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
    (socket.AF_INET6, "::1", "::1"),
    (socket.AF_INET6, "::", "::1"),
]


@pytest.mark.parametrize(("family", "bound", "called"), FAMILIES)
def test_a_queue_that_nobody_empties(family: socket.AddressFamily, bound: str, called: str) -> None:
    """Connections are counted until they are accepted."""
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server((bound, 0), family=family))
        except OSError:
            if family == socket.AF_INET6:
                return  # a host without IPv6 has no such queue
            raise
        port = listener.getsockname()[1]
        place = ListenAddress(bound, port)
        assert 0 == count_waiting([place])
        for _ in range(3):
            stack.enter_context(socket.create_connection((called, port), timeout=5))
        assert 3 == count_waiting([ListenAddress(bound, free_port()), place, place])
        assert 0 == count_waiting([ListenAddress(bound, port, "no-such-link")])
        for waiting in (2, 1, 0):
            listener.accept()[0].close()
            assert waiting == count_waiting([place])


def test_one_socket_for_both_families_counts_once() -> None:
    """As newer passts listen."""
    if not socket.has_dualstack_ipv6():
        return
    with ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        assert 1 == count_waiting([ListenAddress("0.0.0.0", port), ListenAddress("::", port)])


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of queues then, and that is all."""

    def refuse(data: bytes) -> None:
        raise PermissionError

    monkeypatch.setattr(sock_diag, "parse_listener", refuse)
    assert 0 == count_waiting([ListenAddress("127.0.0.1", 1)])


@given(st.binary(max_size=200))
def test_any_answer_is_parsed_or_refused(data: bytes) -> None:
    """No bytes make it hang, and none raise anything but OSError or struct.error."""
    with suppress(OSError, struct.error):
        sock_diag.parse_listener(data)


# ---- a real passt


def test_a_real_passt_idle_stopped_and_awake_again() -> None:
    """Idle, it runs about once per second. Stopped, it reads nothing and accepts nobody. Awake, it does all that."""
    port = free_port()
    here = ListenAddress("127.0.0.1", port)
    with passt("--tcp-ports", f"127.0.0.1/{port}:80") as found, ExitStack() as stack:
        idle = found.look(here)
        assert (0, False, 0, 0) == (idle.unread, idle.stopped, idle.waiting, idle.unread_by_qemu)
        eventually(lambda: found.look().activity != idle.activity)
        found.send(signal.SIGSTOP)
        found.stream.send(HELLO)
        stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        stopped = found.look(here)
        assert (True, 1) == (stopped.stopped, stopped.waiting)
        assert stopped.unread >= len(HELLO)
        found.send(signal.SIGCONT)
        eventually(lambda: found.look(here).waiting == 0 and found.look().unread == 0)
        eventually(lambda: found.look().unread_by_qemu > 0)  # its answer


def flood(port: int) -> bytes:
    """UDP from the guest to a port of this host, by way of passt's gateway: a frame with its length word."""

    def header(checksum: int) -> bytes:
        ends = socket.inet_aton("10.9.0.2") + socket.inet_aton("10.9.0.1")
        return struct.pack("!BBHHHBBH", 0x45, 0, 28 + 1000, 0, 0x4000, 64, 17, checksum) + ends

    total = sum(struct.unpack("!10H", header(0)))
    total = (total & 0xFFFF) + (total >> 16)
    datagram = struct.pack("!HHHH", 4000, port, 8 + 1000, 0) + bytes(1000)
    frame = b"\xff" * 6 + parse_mac("52:54:00:12:34:56") + b"\x08\x00" + header(~total & 0xFFFF) + datagram
    return struct.pack("!I", len(frame)) + frame


@pytest.mark.timeout(180)
def test_a_busy_passt_is_never_stalled() -> None:
    """Its queue is full at most looks, and the shortest timeout makes for the most doubts: they are all resolved."""
    options = ["--ipv4-only", "--address", "10.9.0.2", "--netmask", "24", "--gateway", "10.9.0.1"]
    over = threading.Event()
    with passt(*options) as found, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        sender = subprocess.Popen(
            [sys.executable, "-c", "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\n"
             "s.setblocking(True)\nf = bytes.fromhex(sys.argv[2])\nwhile True: s.sendall(f)",
             str(found.stream.fileno()), flood(sink.getsockname()[1]).hex()],
            pass_fds=[found.stream.fileno()],
        )  # fmt: skip
        drain = threading.Thread(target=_drain, args=(sink, found.stream, over))
        drain.start()
        try:
            judge, full = StallJudge(1), 0
            end = time.monotonic() + 8
            while time.monotonic() < end:
                signs = found.look()
                full += signs.unread > 0
                assert judge.judge(time.monotonic(), signs) is Verdict.FINE, judge.reason
                time.sleep(judge.next_look)
            assert sender.poll() is None
            assert full
        finally:
            over.set()
            drain.join()
            sender.kill()
            sender.wait()


def _drain(sink: socket.socket, stream: socket.socket, over: threading.Event) -> None:
    sink.settimeout(0.05)
    while not over.is_set():
        with suppress(OSError):
            for _ in range(500):
                sink.recv(2000)
        with suppress(BlockingIOError):
            stream.recv(1 << 16, socket.MSG_DONTWAIT)


HUNG = {
    "asleep": ("import time; time.sleep(1000)", "in which the process did not run"),
    "gone wild": ("while True: pass", "though the process runs"),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("program", "reason"), HUNG.values(), ids=HUNG.keys())
def test_a_process_that_hangs_is_found_below_a_silent_guest(program: str, reason: str) -> None:
    """What it is asked stays unread."""
    with peer(*python(program)) as found:
        eventually(lambda: b"-c" in Path(f"/proc/{found.pid}/cmdline").read_bytes())
        judge, asked = StallJudge(1), 0
        deadline = time.monotonic() + PATIENCE
        while (verdict := judge.judge(time.monotonic(), found.look())) is not Verdict.STALLED:
            if verdict is Verdict.ANNOUNCE:
                asked += 1
                found.stream.send(HELLO)
            assert time.monotonic() < deadline
            time.sleep(judge.next_look)
        assert (1, True) == (asked, reason in judge.reason)
