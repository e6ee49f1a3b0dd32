# SPDX-License-Identifier: GPL-2.0-or-later
"""An HTTP client that looks at a guest from outside: new connections at short intervals, the first answer counts."""

from __future__ import annotations

import selectors
import socket
import time

__all__ = ["HttpClient"]


class HttpClient:
    """Asks again and again, each time on a new connection, several of which are under way at once.

    :param patience: seconds for one attempt; then it is dropped.
    """

    def __init__(self, port: int, patience: float, path: str = "/") -> None:
        self._port = port
        self._request = f"GET {path} HTTP/1.0\r\n\r\n".encode()
        self._patience = patience
        self._selector = selectors.DefaultSelector()
        self._begun: dict[socket.socket, float] = {}

    def close(self) -> None:
        """Drop what is under way."""
        for connection in list(self._begun):
            self._drop(connection)
        self._selector.close()

    @property
    def asking(self) -> bool:
        """Whether an attempt is under way."""
        return bool(self._begun)

    def ask(self) -> None:
        """Begin one more attempt, and drop those that have hung for too long."""
        now = time.monotonic()
        for connection in [each for each, begun in self._begun.items() if begun < now - self._patience]:
            self._drop(connection)
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self._port))
        self._begun[connection] = now
        self._selector.register(connection, selectors.EVENT_WRITE)

    def answered(self, until: float) -> bool:
        """Go on with all attempts until that time, or until one is answered with 200; look at least once."""
        while True:
            seconds = until - time.monotonic()
            for key, events in self._selector.select(max(0.0, seconds)):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if self._advance(connection, events):
                    return True
            if seconds <= 0:
                return False

    def first_answer(self, since: float, limit: float, interval: float) -> float | None:
        """Ask every ``interval`` seconds from now on; returns the seconds from ``since`` to the first answer.

        None if there was none within ``limit`` seconds. Who comes late leaves attempts out: a heap of them at once
        would burden the guest more than it tells.
        """
        due = time.monotonic()
        while (now := time.monotonic()) < since + limit:
            if now >= due:
                self.ask()
                due = max(due + interval, now)
            if self.answered(until=due):
                return time.monotonic() - since
        return None

    def _advance(self, connection: socket.socket, events: int) -> bool:
        try:
            if events & selectors.EVENT_WRITE:  # connected, or refused
                connection.send(self._request)
                self._selector.modify(connection, selectors.EVENT_READ)
                return False
            answer = connection.recv(4096)
        except OSError:
            answer = b""
        self._drop(connection)
        return answer.startswith(b"HTTP/1.") and answer.split()[1] == b"200"

    def _drop(self, connection: socket.socket) -> None:
        del self._begun[connection]
        self._selector.unregister(connection)
        connection.close()
