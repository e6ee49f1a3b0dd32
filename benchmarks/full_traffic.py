# SPDX-License-Identifier: GPL-2.0-or-later
"""Full traffic between guest and host: the guest's page starts it, and the host's end is a process of its own.

Of its own, so that it takes no time from the one that measures outages. As a program it is that process: it says its
ports in a line of JSON, answers each line with what it has counted, and ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import RunFailed, ended, log_end
from contenders import Contender

__all__ = ["KINDS", "Count", "HostEnd", "get", "host_end"]

KINDS = {
    "TCP up": ["tcp-up"],
    "TCP down": ["tcp-down"],
    "TCP both": ["tcp-up", "tcp-down"],
    "UDP": ["udp"],
}
"""Full traffic, and what the guest's page calls its parts."""

FLOW_TIMEOUT = 15.0
"""Seconds for traffic to begin, and to go on after an outage: the guest gives a dead connection up after 1 to 2 s."""

REQUEST_TIMEOUT = 30.0
"""Seconds for the guest's page, which competes with the traffic."""

CHUNK = 1 << 20
"""Bytes at a time; the kernel takes and gives less."""

LOOK_AT_DATAGRAMS = 0.02
"""Seconds. Datagrams are looked at now and then, not counted: one call for each would cost a whole processor."""


@dataclass(frozen=True)
class Count:
    """What has passed so far, and when that was asked."""

    received: int
    sent: int
    """bytes"""
    at: float


class HostEnd:
    """The host's end of all kinds of traffic."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.ports: dict[str, int] = self._read()

    def _read(self) -> dict[str, int]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RunFailed("the host's end of the traffic has ended")
        answer: dict[str, int] = json.loads(line)
        return answer

    def count(self) -> Count:
        """Ask for what has passed."""
        assert self._child.stdin is not None
        self._child.stdin.write(b"\n")
        self._child.stdin.flush()
        counted = self._read()
        return Count(counted["received"], counted["sent"], time.monotonic())

    @contextlib.contextmanager
    def traffic(self, vm: Contender, kind: str) -> Iterator[None]:
        """Full traffic of one kind with the guest, for as long as the context lasts."""
        for part in KINDS[kind]:
            get(vm, f"/cgi-bin/traffic?{part},{vm.router()},{self.ports[part]}")
        if not self.flows(kind):
            raise RunFailed(f"{vm.title}: no traffic within {FLOW_TIMEOUT:g} s: {kind}")
        restarts = vm.restarts
        yield
        if vm.restarts == restarts:
            get(vm, "/cgi-bin/traffic?stop")

    def flows(self, kind: str) -> bool:
        """Wait until something passes, each way that it should; false if it does not."""
        parts = KINDS[kind]
        before = self.count()
        while (now := self.count()).at < before.at + FLOW_TIMEOUT:
            up = now.received > before.received or parts == ["tcp-down"]
            down = now.sent > before.sent or "tcp-down" not in parts
            if up and down:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def host_end() -> Iterator[HostEnd]:
    """A running host's end."""
    command = [sys.executable, str(Path(__file__).resolve())]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child, ended(child):
        yield HostEnd(child)


def get(vm: Contender, path: str) -> None:
    """Ask for a page of the guest's, again and again: a connection may be lost."""
    deadline = time.monotonic() + REQUEST_TIMEOUT
    while True:
        vm.check_alive()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{vm.port}{path}", timeout=5) as answer:
                answer.read()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"{vm.title}: {path}: {error}: {log_end(vm.directory)}") from None


# --- the process --------------------------------------------------------------------------------------


class _Peers:
    """All connections, in one loop."""

    def __init__(self) -> None:
        self.received = self.sent = 0
        self.poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, str]] = {}
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._zeros = os.memfd_create("zeros")
        os.truncate(self._zeros, CHUNK)
        self._rest = bytearray(CHUNK)

    def listen(self, kind: str) -> int:
        """Serve connections of that kind; returns the port."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners[listener.fileno()] = (listener, kind)
        self.poll.register(listener, select.EPOLLIN)
        return int(listener.getsockname()[1])

    def handle(self, fd: int, events: int) -> None:
        """Do what one of them is ready for."""
        if fd in self._listeners:
            listener, kind = self._listeners[fd]
            peer, _ = listener.accept()
            peer.setblocking(False)
            self._open[peer.fileno()] = (peer, kind)
            wanted = select.EPOLLIN if kind == "tcp-up" else select.EPOLLIN | select.EPOLLOUT
            self.poll.register(peer, wanted)
            return
        peer, kind = self._open[fd]
        try:
            if events & select.EPOLLOUT:
                with contextlib.suppress(BlockingIOError):
                    self.sent += os.sendfile(fd, self._zeros, 0, CHUNK)
            if events & ~select.EPOLLOUT:
                # tcp(7): with MSG_TRUNC the bytes are thrown away instead of copied.
                got = peer.recv_into(self._rest, CHUNK, socket.MSG_TRUNC)
                if not got:
                    raise ConnectionResetError
                if kind == "tcp-up":
                    self.received += got
        except OSError:
            self.poll.unregister(fd)
            del self._open[fd]
            peer.close()


def serve() -> None:
    """Be the host's end until stdin ends."""
    peers = _Peers()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    ports = {kind: peers.listen(kind) for kind in ("tcp-up", "tcp-down")}
    ports["udp"] = int(datagrams.getsockname()[1])
    print(json.dumps(ports), flush=True)
    stdin = sys.stdin.fileno()
    peers.poll.register(stdin, select.EPOLLIN)
    looked = 0.0
    while True:
        for fd, events in peers.poll.poll(LOOK_AT_DATAGRAMS):
            if fd != stdin:
                peers.handle(fd, events)
                continue
            asked = os.read(stdin, 4096)
            if not asked:
                return
            for _ in range(asked.count(b"\n")):
                print(json.dumps({"received": peers.received, "sent": peers.sent}), flush=True)
        if time.monotonic() > looked + LOOK_AT_DATAGRAMS:
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    peers.received += len(datagrams.recv(2048, socket.MSG_DONTWAIT))
            looked = time.monotonic()


if __name__ == "__main__":
    serve()
