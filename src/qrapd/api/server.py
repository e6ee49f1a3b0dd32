# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves an ASGI application on a UNIX socket: HTTP/1.1 and WebSocket, and the application learns who the peer is.

It costs nothing until somebody connects: no wake-up, and with :func:`serve_on_demand` not even the imports (with the
application's 70 ms and 8 MiB, measured). The caller's VMs are in the same process, so neither a peer nor a lack of
file descriptors ends it, or keeps it busy.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from qrapd.api.limits import DEFAULT, Limits
from qrapd.api.peers import read_peer
from qrapd.api.problems import Report, raw_response

if TYPE_CHECKING:
    from uvicorn.config import Config

    from qrapd.api.protocol import Connections

__all__ = ["Limits", "serve", "serve_on_demand"]

_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RETRY_SECONDS = 1.0
"""After which it is tried again to accept a connection that there were no file descriptors for."""
_AT_A_TIME = 4
"""Connections that are accepted before others have their turn: with what each begins, 1 to 2 ms."""


def _say_nothing(_where: str, _error: BaseException) -> None:
    pass


async def serve_on_demand(
    listener: socket.socket,
    make_app: Callable[[], Any],
    *,
    limits: Limits = DEFAULT,
    report: Report = _say_nothing,
) -> None:
    """As :func:`serve`, but the application is made, in a thread, when the first client is there."""
    await anyio.wait_readable(listener)
    app = await anyio.to_thread.run_sync(partial(_prepare, make_app))
    await serve(app, listener, limits=limits, report=report)


def _prepare(make_app: Callable[[], Any]) -> Any:
    import qrapd.api.protocol  # noqa: F401 (serve() finds it loaded)

    return make_app()


async def serve(
    app: Any, listener: socket.socket, *, limits: Limits = DEFAULT, report: Report = _say_nothing
) -> None:
    """Serve until cancelled; then streams and WebSockets end at once, and what is being answered is answered.

    :param app: an ASGI 3 application; it finds the :class:`qrapd.api.access.Peer` in ``scope["state"]["peer"]``, and in
        ``scope["state"]["gone"]`` an :class:`asyncio.Event` for the end of its connection or of the server.
    :param listener: listens; it stays the caller's, who closes it.
    :param report: is told of failures within: of the application's that it does not handle itself, and of
        connections that cannot be accepted.
    """
    from qrapd.api.protocol import Connections, forward_errors, make_config

    listener.setblocking(False)
    shared = Connections(limits)
    stop_forwarding = forward_errors(report)
    server = _Server(make_config(app, limits), shared, report)
    try:
        async with anyio.create_task_group() as tasks:
            await server.accept(listener, tasks)
    finally:
        with anyio.CancelScope(shield=True):
            await shared.end(limits.grace_seconds)
        stop_forwarding()


class _Server:
    def __init__(self, config: Config, shared: Connections, report: Report) -> None:
        self._config = config
        self._shared = shared
        self._limits = shared.limits
        self._report = report
        self._by_uid: Counter[int] = Counter()
        self._favoured = {0, os.geteuid()}

    async def accept(self, listener: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
        """Take connections as they come. asyncio's own loop, when out of descriptors, says so 100 times a second."""
        out_of_descriptors = False
        while True:
            await anyio.wait_readable(listener)
            for _ in range(_AT_A_TIME):
                try:
                    connected, _address = listener.accept()
                except BlockingIOError:
                    break
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    if error.errno not in _OUT_OF:
                        raise
                    if not out_of_descriptors:
                        self._report("cannot accept a connection", error)
                    out_of_descriptors = True
                    await anyio.sleep(_RETRY_SECONDS)
                    break
                out_of_descriptors = False
                tasks.start_soon(self._begin, connected)

    async def _begin(self, connected: socket.socket) -> None:
        """Let a connection in or turn it away."""
        from qrapd.api.protocol import make_protocol

        connected.setblocking(False)
        try:
            peer = read_peer(connected)
            if refusal := self._refusal(peer.uid):
                connected.send(raw_response(503, refusal))  # fits into any socket's buffer
                connected.close()
                return
            self._by_uid[peer.uid] += 1
            with ExitStack() as count:
                count.callback(self._end, peer.uid)
                make = partial(make_protocol, self._config, self._shared, peer)
                connect = asyncio.get_running_loop().connect_accepted_socket
                await connect(lambda: make(count.pop_all().close), connected)
        except OSError:  # it has gone already
            connected.close()
        except Exception as error:  # one connection's trouble is not the server's, and not the VMs'
            connected.close()
            self._report("cannot serve a connection", error)

    def _refusal(self, uid: int) -> str | None:
        limits = self._limits
        favoured = uid in self._favoured
        if not favoured and self._by_uid[uid] >= limits.per_uid:
            return f"the user {uid} has {limits.per_uid} connections already"
        room = limits.connections - (0 if favoured else limits.kept)
        if self._by_uid.total() >= room:
            return f"there are {room} connections already"
        return None

    def _end(self, uid: int) -> None:
        self._by_uid[uid] -= 1
        if not self._by_uid[uid]:
            del self._by_uid[uid]
