# SPDX-License-Identifier: GPL-2.0-or-later
"""What client commands share: who has a VM, a request, and the wait for what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import anyio
import click

from qrapd.client.http import Client, Status, Unreachable
from qrapd.client.places import Places, look
from qrapd.client.waiting import Verdict
from qrapd.commands.complaints import root_cause
from qrapd.commands.tables import in_terminal
from qrapd.errors import ExitStatus, QrapdError, Unavailable, Unknown

__all__ = ["Ended", "Request", "carry_out", "host_of", "interruptible", "progress", "request", "run"]

Result = TypeVar("Result")

HOSTS_AGENT = Path("/run/qrapd/agent.sock")
"""Which a user who is not root has to name, since a VM of the same name may be their own."""

POLL = 1.0
"""Seconds between two looks at a VM that is waited for. Events make for the quick ones; this is for those missed."""

LOST_PATIENCE = 10.0
"""Seconds for which a host that has gone may come back: a restart or an upgrade takes it one or two."""


def run(job: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a command's work; errors come out of the tasks they passed through as they were."""

    async def work() -> Result:
        asyncio.get_running_loop().set_exception_handler(_report)
        return await job()

    try:
        return anyio.run(work)
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio has to say where no task could be told."""
    # anyio 4.16 has a future of its own completed by the data on a socket, also in the moment in which a wait for
    # them was cancelled: nobody waits for that future any more, and the end of a command is no time for a traceback.
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


# --- who has it ---------------------------------------------------------------------------------------


class NoHost(Unknown):
    """Nobody answers who could know the VM."""


@asynccontextmanager
async def host_of(places: Places, name: str) -> AsyncIterator[Client]:
    """Whoever takes calls for a VM: its own supervisor, or the agent.

    :raise Unknown: there is no such VM.
    :raise Unavailable: nobody answers for it.
    """
    closed: Unreachable | None = None
    for socket in _sockets(places, name):
        async with Client(socket) as client:
            try:
                await client.vm(name)
            except Unreachable as error:
                if places.socket is not None or error.cause not in ("absent", "refused", "denied"):
                    raise
                # An agent's VMs have directories that are closed to those, too, who may speak with it.
                closed = closed or (error if error.cause == "denied" else None)
            except Unknown:
                if places.socket is not None or socket != places.agent:
                    raise
                if closed is not None:
                    raise closed from None
                _refuse_silent(places, name)
                raise
            else:
                yield client
                return
    if closed is not None:
        raise closed
    _refuse_silent(places, name)
    raise _unknown(places, name)


def _sockets(places: Places, name: str) -> list[Path]:
    return [places.socket] if places.socket is not None else [places.control(name), places.agent]


def _refuse_silent(places: Places, name: str) -> None:
    """:raise Unavailable: there is a VM of this name, and nobody to speak for it."""
    try:
        left = look(places.base, name)
    except PermissionError:
        raise Unavailable(
            f"the directory {places.base / name} of the VM {name} is closed to this user",
            hint="do this as the user who runs the VM",
        ) from None
    if left is None:
        return
    if left["state"] == "starting":
        raise Unavailable(
            f"{name}: {left['error']}",
            hint="try again when it is up; its log tells how far it is: `qrapd logs`",
        )
    raise Unavailable(f"{name}: {left['error']}", hint=left.get("hint") or f"`qrapd stop {name}` clears up")


def _unknown(places: Places, name: str) -> NoHost:
    message = f"there is no VM {name}, as far as {places.base} tells"
    with contextlib.suppress(OSError):
        if names := places.names():
            return NoHost(message, hint=f"VMs there: {', '.join(names[:10])}")
        if places.base != HOSTS_AGENT.parent and HOSTS_AGENT.exists():
            return NoHost(message, hint=f"this host's agent is asked by: --socket {HOSTS_AGENT}")
    return NoHost(
        message,
        hint=f"start it: `qrapd run {name}`; or say where else to look: --runtime-dir DIR, --socket PATH",
    )


# --- a request and its end ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked of a VM, and by what its end is known."""

    doing: str
    """what a terminal shows meanwhile: ``stopping``"""
    begin: Callable[[Client], Awaitable[Status]]
    verdict: Callable[[Sequence[Status]], Verdict | None]
    """by the statuses from before the request to now"""


@dataclass(frozen=True)
class Ended:
    """What came of a request."""

    name: str
    status: Status
    verdict: Verdict | None
    """None: nobody has waited"""
    seconds: float = 0.0


async def request(
    client: Client, name: str, asked: Request, *, wait: bool = True, timeout: float | None = None
) -> Ended:
    """Begin it and wait for its end.

    :raise Unavailable: it takes longer than ``timeout`` seconds.
    """
    began = anyio.current_time()
    history = [await client.vm(name)]
    try:
        history.append(await asked.begin(client))
    except Unreachable as error:
        # A VM's own supervisor may end with it before it has answered.
        if error.cause != "broken" or not _is_own(client):
            raise
        history.append(await _look_again(client, name))
    verdict = asked.verdict(history) if wait else None
    if wait and verdict is None:
        with anyio.move_on_after(timeout):
            verdict = await _wait(client, name, asked, history)
        if verdict is None:
            raise Unavailable(
                f"{name}: it is {history[-1]['state']} after {timeout:g} s, and no longer waited for",
                hint=f"what was begun goes on: qrapd show {name}",
            )
    return Ended(name, history[-1], verdict, anyio.current_time() - began)


async def _wait(client: Client, name: str, asked: Request, history: list[Status]) -> Verdict:
    news = anyio.Event()
    verdict: Verdict | None = None

    async def listen() -> None:
        nonlocal news
        # Whoever cannot tell of events is asked again and again, below.
        with contextlib.suppress(QrapdError):
            async for _ in client.events(name, after="now", patience=LOST_PATIENCE):
                news.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        while verdict is None:
            with anyio.move_on_after(POLL):
                await news.wait()
            news = anyio.Event()
            status = await _look_again(client, name)
            if status != history[-1]:
                # Of a long wait only what may matter is kept: what came before, and what is new.
                history.append(status)
            verdict = asked.verdict(history)
        tasks.cancel_scope.cancel()
    assert verdict is not None
    return verdict


async def _look_again(client: Client, name: str) -> Status:
    """How it is now. A supervisor of one VM goes with it, and its socket, too."""
    deadline = anyio.current_time() + LOST_PATIENCE
    while True:
        try:
            return await client.vm(name)
        except Unreachable as error:
            if _is_own(client) and error.cause in ("absent", "refused") and not client.socket.exists():
                return _gone(name)
            if anyio.current_time() > deadline:
                raise
        await anyio.sleep(POLL / 5)


def _is_own(client: Client) -> bool:
    """Whether this is a VM's own supervisor, whose socket goes with the VM."""
    return client.socket.name == "control.sock"


def _gone(name: str) -> Status:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    error = "its supervisor has ended with it"
    return {
        "name": name,
        "state": "failed",
        "qemu_pid": None,
        "since": now,
        "restarts": 0,
        "links": [],
        "error": error,
        "hint": None,
    }


@contextlib.contextmanager
def progress(words: str, delay: float = 0.0) -> Iterator[None]:
    """Show in a terminal that something goes on; silent in a pipe.

    :param delay: seconds to wait for an end that comes so soon that nobody needs to be told.
    """
    if not in_terminal():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    spinner = Console(stderr=True).status(Text(words))
    begin = threading.Timer(delay, spinner.start)
    begin.start() if delay else spinner.start()
    try:
        yield
    finally:
        begin.cancel()
        if delay:
            begin.join()  # it may just be starting
        spinner.stop()


def carry_out(
    places: Places, name: str, asked: Request, *, wait: bool, timeout: float | None, as_json: bool
) -> int:
    """Do what a command of one request does, and say how it ended. Returns the exit status."""

    async def job() -> Ended:
        async with host_of(places, name) as client:
            return await request(client, name, asked, wait=wait, timeout=timeout)

    with interruptible(name, asked.doing), progress(f"{name}: {asked.doing}…"):
        ended = run(job)
    return tell_end(ended, as_json=as_json)


@contextlib.contextmanager
def interruptible(name: str, doing: str) -> Iterator[None]:
    """Ctrl-C ends the wait, and nothing else.

    :raise click.exceptions.Exit: with the status for that; click would write an empty line for a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"{name}: no longer waited for; what was begun goes on ({doing}). See: qrapd show {name}",
            err=True,
        )
        raise click.exceptions.Exit(ExitStatus.INTERRUPTED) from None


def tell_end(ended: Ended, *, as_json: bool) -> int:
    """Say how a request ended: as JSON, in a terminal, or, if it failed, in any case."""
    verdict = ended.verdict
    if as_json:
        click.echo(json.dumps(ended.status, ensure_ascii=False))
    if verdict is None:
        if in_terminal() and not as_json:
            click.echo(f"{ended.name}: begun, not waited for; it is {ended.status['state']}")
        return ExitStatus.OK
    if not verdict.ok:
        click.echo(f"{ended.name}: {verdict.words}", err=True)
        if verdict.hint:
            click.echo(f"  hint: {verdict.hint}", err=True)
        return ExitStatus.FAILED
    if in_terminal() and not as_json:
        click.echo(f"{ended.name}: {verdict.words} ({ended.seconds:.1f} s)")
    return ExitStatus.OK
