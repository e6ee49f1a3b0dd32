# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd events``: what has happened to the VMs here, and what happens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.options import client_options, json_option, name_argument, places
from qrapd.errors import ExitStatus

if TYPE_CHECKING:
    from qrapd.client.places import Places
    from qrapd.client.stream import ServerEvent

__all__ = ["event_line", "events"]

LOOK_AROUND = 2.0
"""Seconds between two looks for supervisors that are new, while following."""

_COLOURS = {"warning": "yellow", "error": "red"}


@click.command()
@name_argument(required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@json_option
@client_options
def events(
    name: str | None,
    follow: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> int:
    """Show the last events of one VM or of all: starts and ends, and links lost and restored.

    They are kept as long as their supervisor or agent lasts; the journal has older ones, and what guests write:
    `qrapd logs`. Ends with 69 if some may be missing, because somebody did not answer.
    """
    from qrapd.commands.asking import run

    where = places(runtime_dir, socket)
    if not follow:
        return run(lambda: _show_kept(where, name, as_json))
    with contextlib.suppress(KeyboardInterrupt):  # that is how following ends
        run(lambda: _follow(where, name, as_json))
    return ExitStatus.OK


async def _show_kept(where: Places, name: str | None, as_json: bool) -> int:
    """Returns the exit status: of all VMs, that of whoever does not tell is no reason to hide what others do."""
    from qrapd.client.http import Unreachable
    from qrapd.commands.complaints import complain
    from qrapd.errors import QrapdError

    kept: list[ServerEvent] = []
    problems: list[QrapdError] = []
    for socket in await _sockets(where, name):
        try:
            kept += [event async for event in _read(socket, name, follow=False)]
        except QrapdError as error:
            if where.socket is not None or name is not None:
                raise
            # One that was killed leaves its socket: nobody is there who could know of more.
            if not (isinstance(error, Unreachable) and error.cause in ("absent", "refused")):
                problems.append(error)
    for event in sorted(kept, key=lambda event: str(event.fields.get("timestamp") or "")):
        show_event(event, as_json=as_json)
    for problem in problems:
        complain(problem)
    return ExitStatus.UNAVAILABLE if problems else ExitStatus.OK


async def _follow(where: Places, name: str | None, as_json: bool) -> None:
    import anyio

    from qrapd.client.http import Forbidden, Unreachable
    from qrapd.commands.complaints import complain
    from qrapd.errors import QrapdError

    reading: set[Path] = set()
    refused: set[Path] = set()
    complaints: dict[Path, str] = {}

    def complain_once(socket: Path, error: QrapdError) -> None:
        if complaints.get(socket) != error.message:
            complaints[socket] = error.message
            complain(error)

    async def read(socket: Path) -> None:
        try:
            async for event in _read(socket, name, follow=True):
                complaints.pop(socket, None)
                show_event(event, as_json=as_json)
        except Unreachable as error:
            if where.socket is not None:
                raise
            # It has gone with its VM, and whoever comes next at this place is found again.
            if error.cause == "denied":
                refused.add(socket)
                complain(error)
        except QrapdError as error:
            if where.socket is not None or name is not None:
                raise
            # Who has no room just now may have some later.
            if isinstance(error, Forbidden):
                refused.add(socket)
            complain_once(socket, error)
        finally:
            reading.discard(socket)

    async with anyio.create_task_group() as tasks:
        found = await _sockets(where, name)
        while True:
            for socket in found:
                if socket not in reading | refused:
                    reading.add(socket)
                    tasks.start_soon(read, socket)
            await anyio.sleep(LOOK_AROUND)
            found = _all_sockets(where) if name is None else found


async def _sockets(where: Places, name: str | None) -> list[Path]:
    """On which events are told of this VM, or of any."""
    from qrapd.commands.asking import host_of

    if name is None:
        return _all_sockets(where)
    async with host_of(where, name) as client:
        return [client.socket]


def _all_sockets(where: Places) -> list[Path]:
    if where.socket is not None:
        return [where.socket]
    return [path for path in (where.agent, *map(where.control, where.names())) if os.access(path, os.F_OK)]


async def _read(socket: Path, name: str | None, *, follow: bool) -> AsyncIterator[ServerEvent]:
    from qrapd.client.http import Client

    async with Client(socket) as client, aclosing(client.events(name, follow=follow)) as told:
        async for event in told:
            yield event


def show_event(event: ServerEvent, *, as_json: bool) -> None:
    """Print one event: a line for people, or JSON as in the log."""
    if as_json:
        click.echo(json.dumps({"id": event.id, **event.fields}, ensure_ascii=False))
    else:
        click.echo(event_line(event))
    sys.stdout.flush()  # whoever follows through a pipe wants it now


def event_line(event: ServerEvent) -> str:
    """When, and what: the sentence of the log."""
    from qrapd.lines import clean
    from qrapd.messages import headline

    fields = event.fields
    try:
        moment = (
            datetime.fromisoformat(str(fields.get("timestamp"))).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        )
    except ValueError:
        moment = "-" * 19
    words = headline(event.event, fields)
    if event.event == "events.missed":
        words = "(events before this one are no longer kept)"
    # What a program said in an error must not act on this terminal.
    words = clean(words.replace("\n", " ").encode("utf-8", "replace"))
    return f"{moment}  {click.style(words, fg=_COLOURS.get(str(fields.get('level'))))}"
