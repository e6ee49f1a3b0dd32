# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's side of a guest's traffic: sinks and sources on 127.0.0.1 that count, and say what they got wrong.

The guest's side is its page `/cgi-bin/traffic`: see `qrapd.guest`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

from support import PATIENCE

PATTERN = b"".join(b"%05d\n" % number for number in range(1, 100_000))
"""What a guest sends over TCP, again and again: every place tells where it belongs."""

CHUNK = 256 * 1024
_TWICE = PATTERN + PATTERN[:CHUNK]


@dataclass
class Connection:
    """One TCP connection of the guest's, with bytes as the host counts them."""

    received: int = 0
    sent: int = 0


@dataclass
class Endpoint:
    """What a guest can send to, or receive from."""

    port: int
    connections: list[Connection] = field(default_factory=list)
    """all that there were, in order; a UDP sink has just one"""
    mistakes: list[str] = field(default_factory=list)
    """bytes that are not those that the guest had sent"""
    datagrams: bool = False

    def received(self) -> int:
        """Bytes, or for UDP datagrams, since the beginning."""
        return sum(connection.received for connection in self.connections)

    def newly_received(self) -> Callable[[], int]:
        """A counter that passes over the connections that are there already.

        What a dead passt has left in the host's buffers still arrives, but never on a new connection. Of datagrams
        that is so little (212,992 bytes in Linux, that is 277 small ones) that all can be counted.

        To be called while the old passt lives. As soon as the new one has reset the guest's connection the next one is
        made: in 3 of 14 runs (passt 2026-10) it was there 0.2 to 20 ms before a test that had waited for the new passt
        called this, so that it was passed over, and no other ever came.
        """
        if self.datagrams:
            return self.received
        before = len(self.connections)
        return lambda: sum(connection.received for connection in self.connections[before:])


def wait_until_grown(count: Callable[[], int], by: int, what: str) -> None:
    """Wait until a counter has grown by so much from now on."""
    start, deadline = count(), time.monotonic() + PATIENCE
    while (grown := count() - start) < by:
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: {grown} instead of {by} within {PATIENCE:g} s")
        time.sleep(0.01)


@contextmanager
def tcp_sink() -> Iterator[Endpoint]:
    """Accepts again and again, and compares what comes with what the guest sends."""
    with _tcp_endpoint(_receive_pattern) as endpoint:
        yield endpoint


@contextmanager
def tcp_source() -> Iterator[Endpoint]:
    """Accepts again and again, and sends zeros as fast as they go; counts what comes back, too."""
    with _tcp_endpoint(_receive, _send) as endpoint:
        yield endpoint


@contextmanager
def udp_sink() -> Iterator[Endpoint]:
    """Counts datagrams."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        connection = Connection()
        endpoint = Endpoint(receiver.getsockname()[1], [connection], datagrams=True)

        def count() -> None:
            while receiver.recv(65536):  # an empty one is the sign to end
                connection.received += 1

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield endpoint
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                while thread.is_alive():  # one datagram may be lost
                    sender.sendto(b"", ("127.0.0.1", endpoint.port))
                    thread.join(0.1)


_Part = Callable[[socket.socket, Connection, Endpoint], None]


@contextmanager
def _tcp_endpoint(*parts: _Part) -> Iterator[Endpoint]:
    """A listener whose connections are each served by these parts, in threads of their own."""
    accepted: list[socket.socket] = []
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint(listener.getsockname()[1])

        def accept() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:  # shut down
                    return
                accepted.append(peer)
                endpoint.connections.append(Connection())
                for part in parts:
                    run = threading.Thread(
                        target=_serve, args=(part, peer, endpoint.connections[-1], endpoint)
                    )
                    run.start()
                    threads.append(run)

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield endpoint
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for peer in accepted:
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for peer in accepted:
                peer.close()


def _serve(part: _Part, peer: socket.socket, connection: Connection, endpoint: Endpoint) -> None:
    with suppress(OSError):  # reset: by a passt that was killed, or at the end
        part(peer, connection, endpoint)
    with suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def _receive(peer: socket.socket, connection: Connection, _: Endpoint) -> None:
    while data := peer.recv(CHUNK):
        connection.received += len(data)


def _receive_pattern(peer: socket.socket, connection: Connection, endpoint: Endpoint) -> None:
    while data := peer.recv(CHUNK):
        place = connection.received % len(PATTERN)
        if data != _TWICE[place : place + len(data)]:
            expected = _TWICE[place : place + len(data)]
            wrong = next(i for i in range(len(data)) if data[i] != expected[i])
            endpoint.mistakes.append(
                f"byte {connection.received + wrong}: {data[wrong : wrong + 12]!r}"
                f" instead of {expected[wrong : wrong + 12]!r}"
            )
            return  # one is enough: the guest will make a new connection
        connection.received += len(data)


def _send(peer: socket.socket, connection: Connection, _: Endpoint) -> None:
    zeros = bytes(CHUNK)
    while True:
        connection.sent += peer.send(zeros)
