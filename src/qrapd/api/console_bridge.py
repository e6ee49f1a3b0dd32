# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's console over a WebSocket: binary frames are the terminal's bytes, both ways.

Close codes (RFC 6455, 7.4.1): 1000 the guest has ended; 1012 qrapd has let go of a VM that runs on, and
another qrapd may have it in a moment; 1008 denied, or one who does not read; 1011 a bug in qrapd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from qrapd.console import Attachment, Console

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

__all__ = ["bridge"]

STALLED_SECONDS = 60.0
"""One who has read nothing for so long is cut off: longer than a person's terminal stands still, and no server notices
it by its pings alone, as those wait behind what is not read."""

CLOSE_SECONDS = 1.0
"""For a last word to one who may not read it."""

_DENIED = 1008, "is no longer allowed"


def _always() -> bool:
    return True


async def bridge(
    websocket: WebSocket, console: Console, history: bool, *, may: Callable[[], bool] = _always
) -> None:
    """Serve a console to one who may have it, until either side has had enough.

    :param may: whether that one still may; asked before anything goes either way.

    Keep-alive by pings is the server's business.
    """
    await websocket.accept()
    attachment = console.attach(history=history)
    ending: tuple[int, str] | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hand_in, websocket, attachment, tasks.cancel_scope, may)
            ending = await _hand_out(websocket, attachment, console, may)
            if ending is not None:
                tasks.cancel_scope.cancel()
            # Otherwise the other side has gone: what it typed before is still to be handed in.
    except Exception:
        await _close(websocket, 1011, "a bug in qrapd")
        raise
    finally:
        attachment.close()
    if ending is not None:
        await _close(websocket, *ending)


async def _hand_out(
    websocket: WebSocket, attachment: Attachment, console: Console, may: Callable[[], bool]
) -> tuple[int, str] | None:
    """What the guest says. Returns how to close; None if the other side has done so."""
    from starlette.websockets import WebSocketDisconnect

    while True:
        try:
            said = await attachment.receive()
        except anyio.EndOfStream:
            break
        if not may():
            return _DENIED
        try:
            with anyio.move_on_after(STALLED_SECONDS) as patience:
                await websocket.send_bytes(said)
            if patience.cancelled_caught:
                return 1008, "does not read"
        except (WebSocketDisconnect, RuntimeError):  # the latter: a close was sent meanwhile
            return None
    if console.guest_ended:
        return 1000, "the guest has ended"
    return 1012, "qrapd has let go of the VM, which runs on"


async def _hand_in(
    websocket: WebSocket, attachment: Attachment, both: anyio.CancelScope, may: Callable[[], bool]
) -> None:
    """What is typed, until the other side is gone."""
    while True:
        message = await websocket.receive()
        if message["type"] != "websocket.receive":
            break
        if not may():
            await _close(websocket, *_DENIED)
            break
        typed = message.get("bytes")
        if typed is None:  # by hand it is easier to send text
            typed = (message.get("text") or "").encode()
        await attachment.send(typed)
    both.cancel()


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    from starlette.websockets import WebSocketDisconnect

    with anyio.move_on_after(CLOSE_SECONDS):
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await websocket.close(code, reason)
