# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of the API, all at once: how long each answer takes. A process of its own, which prints JSON.

Usage: ``api_load.py SOCKET CLIENTS PAUSE SECONDS NAME...``. Each client has one connection, and PAUSE seconds between
an answer and the next question. One in ten asks for all VMs, the others for one of these by its name.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator

__all__ = ["ALL", "ONE"]

ALL = "GET /v1/vms"
ONE = "GET /v1/vms/{name}"

_EVERY = 10


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    """One question and its whole answer."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: qrapd\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if not head.startswith("http/1.1 200"):
        raise RuntimeError(f"{path}: {head}")
    await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))


async def client(socket: str, paths: Iterator[str], pause: float, end: float, took: list[float]) -> None:
    """Ask until the end; adds to ``took``, in ms."""
    reader, writer = await asyncio.open_unix_connection(socket)
    while time.monotonic() < end:
        began = time.monotonic()
        await ask(reader, writer, next(paths))
        took.append(1000 * (time.monotonic() - began))
        await asyncio.sleep(pause)
    writer.close()


async def main(socket: str, clients: str, pause: str, seconds: str, *names: str) -> None:
    """All clients; they begin one after the other within a pause, so that they do not ask in step."""
    took: dict[str, list[float]] = {ALL: [], ONE: []}
    end = time.monotonic() + float(seconds)
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(clients)):
            wants_all = number % _EVERY == 0
            start = number * len(names) // int(clients)
            paths = itertools.cycle(
                ["/v1/vms"] if wants_all else [f"/v1/vms/{name}" for name in (*names[start:], *names[:start])]
            )
            tasks.create_task(client(socket, paths, float(pause), end, took[ALL if wants_all else ONE]))
            await asyncio.sleep(float(pause) / int(clients))
    print(json.dumps(took))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
