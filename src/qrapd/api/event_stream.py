# SPDX-License-Identifier: GPL-2.0-or-later
"""GET /v1/events: server-sent events, as the HTML standard has them, out of the event log."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from qrapd.event_log import Entry, EventLog, Missed

__all__ = ["KEEP_ALIVE_SECONDS", "MISSED", "EventStream"]

KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a comment is sent, as the standard suggests. The kernel tells when a peer is gone; this is for
what counts the seconds: a client's read timeout, a proxy in between."""

MISSED = "events.missed"
"""The event that says that others are gone; it has no id, as nothing is to be resumed after it."""

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_RETRY = b"retry: 1000\n\n"
"""Milliseconds after which a browser's EventSource connects again; and first bytes, by which a client is sure that it
follows."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class EventStream:
    """A response, as ASGI has it.

    :param may: whether the client still may; it ends where it may not.
    """

    def __init__(
        self, log: EventLog, *, after: str | None, vm: str | None, follow: bool, may: Callable[[], bool]
    ) -> None:
        self._log = log
        self._after = after
        self._vm = vm
        self._follow = follow
        self._may = may
        self.keep_alive_seconds = KEEP_ALIVE_SECONDS

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send until the client goes, or until the end where it does not follow."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        body = scope["method"] != "HEAD"
        if body:
            await send({"type": "http.response.body", "body": _RETRY, "more_body": True})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, receive, tasks.cancel_scope)
                await self._write(send, tasks)
                tasks.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _write(self, send: Send, tasks: anyio.abc.TaskGroup) -> None:
        # The log is read by a task of its own: waiting for it with a timeout would end the iteration.
        writer, reader = anyio.create_memory_object_stream[Entry | Missed](0)
        tasks.start_soon(self._read_log, writer)
        with reader:
            while True:
                block = b": nothing new\n\n"
                with anyio.move_on_after(self.keep_alive_seconds):
                    try:
                        block = _block(await reader.receive())
                    except anyio.EndOfStream:
                        return
                if not self._may():
                    return
                await send({"type": "http.response.body", "body": block, "more_body": True})

    async def _read_log(self, writer: MemoryObjectSendStream[Entry | Missed]) -> None:
        news: AsyncIterator[Entry | Missed] = self._log.follow(self._after, self._vm, wait=self._follow)
        async with aclosing(news) as following:  # type: ignore[type-var]  # it is an asynchronous generator
            with writer:
                async for item in following:
                    await writer.send(item)


def _block(item: Entry | Missed) -> bytes:
    """One event. JSON has no line breaks of its own, so that one line of data holds it."""
    if isinstance(item, Missed):
        data = json.dumps({"event": MISSED, "count": item.count})
        return f"event: {MISSED}\ndata: {data}\n\n".encode()
    return f"id: {item.id}\nevent: {item.event}\ndata: {item.json}\n\n".encode()
