# SPDX-License-Identifier: GPL-2.0-or-later
"""uvicorn's protocols for HTTP/1.1 and WebSocket, with the limits that a socket which everybody may open needs.

Only :mod:`qrapd.api.server` imports this, when there is somebody to serve: it takes uvicorn and h11 along.

uvicorn's protocols do the protocol, and leave open: a request that is begun and never ends, a response that is never
read, and what the application is told of the peer. uvicorn.Server is not used at all: it wakes up ten times a
second, takes the signals, and configures logging.
"""

from __future__ import annotations

import asyncio
import logging
import re
import select
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from qrapd.api.access import Peer
from qrapd.api.problems import Report, raw_response

if TYPE_CHECKING:
    from qrapd.api.limits import Limits

__all__ = ["Connections", "forward_errors", "make_config", "make_protocol"]

_TURN = 0.01
"""Seconds for others to have their turn, at the end of the server."""

_AUTHORITY = re.compile(rb"https?://[^/?]*", re.IGNORECASE)
"""What a target in absolute form has before the path."""


class Connections:
    """What all connections share: in place of uvicorn's ServerState."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.total_requests = 0
        self.connections: set[HttpProtocol | WebSocketProtocol] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """For each response; uvicorn makes the date once a second, here it is made when it is needed."""
        return [(b"date", formatdate(usegmt=True).encode("ascii"))]

    async def end(self, patience: float) -> None:
        """Close all connections: idle ones and streams at once, and once they are answered those with a request."""
        if self.connections:
            await asyncio.sleep(_TURN)  # what has just happened is still to be told: a VM's end, for one
        for connection in list(self.connections):
            connection.shutdown()
        if self.tasks:
            _, late = await asyncio.wait(set(self.tasks), timeout=patience)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=patience)
        for _ in range(round(patience / _TURN)):
            if not self.connections:
                return
            await asyncio.sleep(_TURN)  # what was written is on its way to the kernel
        for connection in list(self.connections):
            connection.transport.abort()


class _SlowReader:
    """Cuts off a peer that does not read: nothing is kept for it for longer than ``patience``.

    The transport's buffer has no room on purpose, so it is "full" when the kernel has not taken everything.
    """

    patience: float
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _write_timer: asyncio.TimerHandle | None = None

    def _started(self) -> None:
        self.transport.set_write_buffer_limits(high=0)

    def _stuck(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.patience, self.transport.abort)

    def _moving(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Parser(h11.Connection):
    """Takes targets in absolute form, too, and remembers which status fits a fault: uvicorn answers 400 to all."""

    fault_status = 400

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.fault_status = error.error_status_hint
            raise
        return _in_origin_form(event) if isinstance(event, h11.Request) else event


def _in_origin_form(request: h11.Request) -> h11.Request:
    """As clients of a proxy ask; a server has to take it (RFC 9112, 3.2.2). There is one host here."""
    if (found := _AUTHORITY.match(request.target)) is None:
        return request
    rest = request.target[found.end() :]
    return h11.Request(
        method=request.method,
        target=rest if rest.startswith(b"/") else b"/" + rest,
        headers=list(request.headers),
        http_version=request.http_version,
    )


class HttpProtocol(_SlowReader, H11Protocol):
    """One connection, until it is closed or becomes a WebSocket."""

    def __init__(self, config: Config, shared: Connections, peer: Peer, on_end: Callable[[], None]) -> None:
        state = {"peer": peer, "gone": (gone := asyncio.Event())}
        super().__init__(config, cast("ServerState", shared), state, asyncio.get_running_loop())
        self.limits = shared.limits
        self.patience = shared.limits.write_seconds
        self.on_end = on_end
        self.gone = gone
        self.conn = _Parser(h11.SERVER, self.limits.head_bytes)
        self.ws_protocol_class = self._become_websocket  # type: ignore[assignment]  # a class, which is called as well
        self._request_timer: asyncio.TimerHandle | None = None
        self._waits_for: object = None
        self._upgraded = False
        self._half_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self._started()
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._moving()
        self._stop_request_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.gone.set()
        self.on_end()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's closes always
        """Whoever has said all, and still listens, gets the answer to what was said."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and self.conn.their_state is not h11.SEND_BODY and not _has_hung_up(self.transport):
            self._half_closed = True
            return True
        return None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Otherwise the answer was to one of several requests that had come together.
        if self._half_closed and self.cycle.response_complete:
            self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if not self._upgraded:
            self._watch_request()

    def _watch_request(self) -> None:
        """Let neither the head nor the body of a request take longer than it may.

        Between two requests uvicorn's own timer runs; it ends with the next byte.
        """
        state = self.conn.their_state
        begun = self.timeout_keep_alive_task is None or bool(self.conn.trailing_data[0])
        if self.transport.is_closing() or not (state is h11.SEND_BODY or (state is h11.IDLE and begun)):
            self._stop_request_timer()
        elif self._waits_for is not state:
            self._stop_request_timer()
            self._waits_for = state
            self._request_timer = self.loop.call_later(self.limits.request_seconds, self._too_late)

    def _stop_request_timer(self) -> None:
        self._waits_for = None
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _too_late(self) -> None:
        part = "body" if self.conn.their_state is h11.SEND_BODY else "head"
        self._refuse(408, f"the {part} of the request did not come within {self.limits.request_seconds:g} s")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's signature)
        status = cast("_Parser", self.conn).fault_status
        if status == 431:
            self._refuse(431, f"the head of the request is larger than {self.limits.head_bytes} bytes")
        else:
            self._refuse(400, "this is not a request of HTTP/1.1")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer and close, if no other answer is on its way; the application finds that the client has gone."""
        self._stop_request_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
        elif self.cycle is not None and self.conn.our_state is h11.DONE:
            self.transport.abort()  # it has its answer, and is still sending what nobody wants
        if not self.transport.is_closing():
            self.transport.write(raw_response(status, detail))
            self.transport.close()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._stop_request_timer()
        super().handle_websocket_upgrade(event)

    def _become_websocket(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> WebSocketProtocol:
        return WebSocketProtocol(config, cast("Connections", server_state), app_state, self._end_websocket)

    def _end_websocket(self) -> None:
        self.gone.set()
        self.on_end()

    def shutdown(self) -> None:
        self.gone.set()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False
        else:
            # A stream, which would never end: its last chunk says that this is its end.
            with suppress(h11.LocalProtocolError):
                self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.transport.close()

    def pause_writing(self) -> None:
        self._stuck()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._moving()
        super().resume_writing()


class WebSocketProtocol(_SlowReader, WebSocketsSansIOProtocol):
    """A connection that has become a WebSocket."""

    def __init__(
        self, config: Config, shared: Connections, app_state: dict[str, Any], on_end: Callable[[], None]
    ) -> None:
        super().__init__(config, cast("ServerState", shared), app_state, asyncio.get_running_loop())
        self.patience = shared.limits.message_write_seconds
        self.on_end = on_end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._started()

    def connection_lost(self, exc: Exception | None) -> None:
        self._moving()
        super().connection_lost(exc)
        self.on_end()

    def pause_writing(self) -> None:
        self._stuck()
        # Each ping is answered: who sends them and does not read the answers is not listened to.
        self.transport.pause_reading()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._moving()
        if not self.read_paused:
            self.transport.resume_reading()
        super().resume_writing()


def _has_hung_up(transport: asyncio.Transport) -> bool:
    """Whether the other end is closed, and not only for writing; both look the same to who reads."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return bool(poll.poll(0))


def make_config(app: Any, limits: Limits) -> Config:
    """What uvicorn's protocols look up. Everything that would reach beyond them is off."""
    config = Config(
        app,
        loop="none",
        http=HttpProtocol,
        ws=WebSocketProtocol,
        ws_max_size=limits.message_bytes,
        # The kernel tells when the other end of a UNIX socket is gone; a ping would only wake both up.
        ws_ping_interval=None,
        ws_ping_timeout=None,
        ws_per_message_deflate=False,  # costs a third of a MiB for each connection
        lifespan="off",
        log_config=None,
        access_log=False,
        interface="asgi3",
        proxy_headers=False,  # who the peer is says the kernel
        server_header=False,
        date_header=False,  # see Connections.default_headers
        workers=1,
        forwarded_allow_ips="",
        timeout_keep_alive=limits.idle_seconds,
    )
    config.load()
    return config


def make_protocol(
    config: Config, shared: Connections, peer: Peer, on_end: Callable[[], None]
) -> asyncio.Protocol:
    """The protocol of a new connection; ``on_end`` is called when that is gone."""
    return HttpProtocol(config, shared, peer, on_end)


class _Forward(logging.Handler):
    """Takes exceptions that uvicorn logs. All else is of what clients do, who could fill the log with it."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self._report(record.getMessage().strip(), error)


def forward_errors(report: Report) -> Callable[[], None]:
    """Have uvicorn's errors told, and nothing of it written to stderr; returns what takes that back."""
    logger, handler = logging.getLogger("uvicorn"), _Forward(report)
    logger.propagate = False
    logger.addHandler(handler)
    return lambda: logger.removeHandler(handler)
