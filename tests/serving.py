# SPDX-License-Identifier: GPL-2.0-or-later
"""For tests of the API and its server: one that serves on a socket of its own, and what is needed to ask it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx

from qrapd.api.limits import DEFAULT, Limits
from qrapd.api.server import serve, serve_on_demand
from support import PATIENCE


@dataclass
class Serving:
    """A server that runs."""

    path: Path
    reports: list[tuple[str, BaseException]] = field(default_factory=list)
    task: asyncio.Task[None] = field(init=False)

    def client(self) -> httpx.AsyncClient:
        """One whose requests go to this server."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.path))
        return httpx.AsyncClient(transport=transport, base_url="http://qrapd", timeout=PATIENCE)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection for bytes of the test's choice."""
        return await asyncio.open_unix_connection(self.path)

    async def ask(self, *pieces: bytes) -> bytes:
        """Send bytes on a connection of their own, and return all that comes until it is closed."""
        loop = asyncio.get_running_loop()
        # Not asyncio's streams: when they cannot write, they do not give out what there is to read.
        with socket.socket(socket.AF_UNIX) as client, anyio.fail_after(PATIENCE):
            client.setblocking(False)
            await loop.sock_connect(client, str(self.path))
            with suppress(BrokenPipeError):
                for piece in pieces:
                    await loop.sock_sendall(client, piece)
            received = b""
            with suppress(ConnectionResetError):  # closed, and something of ours was never read
                while chunk := await loop.sock_recv(client, 65536):
                    received += chunk
            return received

    async def stop(self) -> None:
        """End the server as its owner would."""
        self.task.cancel()
        await asyncio.wait({self.task})


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed."""
    with anyio.fail_after(PATIENCE):
        return await reader.read()


def listen(path: Path) -> socket.socket:
    """A listening socket that everybody may connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    path.chmod(0o666)
    return listener


@asynccontextmanager
async def serving(
    directory: Path,
    app: Any = None,
    *,
    limits: Limits = DEFAULT,
    on_demand: Callable[[], Any] | None = None,
) -> AsyncIterator[Serving]:
    """Serve ``app``, or what ``on_demand`` makes, as long as the block lasts."""
    made = Serving(directory / "http.sock")
    listener = listen(made.path)

    def report(where: str, error: BaseException) -> None:
        made.reports.append((where, error))

    if on_demand is not None:
        serve_it = serve_on_demand(listener, on_demand, limits=limits, report=report)
    else:
        serve_it = serve(app, listener, limits=limits, report=report)
    made.task = asyncio.create_task(serve_it)
    try:
        yield made
    finally:
        await made.stop()
        listener.close()
    if not made.task.cancelled():
        made.task.result()


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something is the case."""
    with anyio.fail_after(PATIENCE):
        while not holds():  # noqa: ASYNC110 (of things that tell nobody)
            await asyncio.sleep(0.01)
