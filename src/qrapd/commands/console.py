# SPDX-License-Identifier: GPL-2.0-or-later
"""`qrapd console`: this terminal at a guest's serial port.

A loop of one's own over poll(2) rather than a library's threads: signals, a terminal that must be left as it was found,
input from a file, and the key to leave by while the other side hangs, all in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket as socket_module
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from qrapd.commands.options import client_options, name_argument, places
from qrapd.errors import Unavailable

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

__all__ = ["console"]

HANDSHAKE_SECONDS = 10.0
"""For qrapd to answer: the first caller waits for its server to be imported, some 40 ms on an idle machine."""

FAREWELL_SECONDS = 2.0
"""For the last input to be taken and the connection to be closed in order."""

PIECE = 4096
"""Bytes at once: a pipe that poll(2) calls writable takes so many without a wait (pipe(7), PIPE_BUF)."""

ENOUGH = 64 * 1024
"""Bytes of input that may wait for qrapd."""

# Ctrl-], and what it is where a program in the guest has had the terminal report keys in other ways: by xterm's
# modifyOtherKeys and by kitty's keyboard protocol.
_LEAVE = re.compile(rb"\x1d|\x1b\[27;5;93~|\x1b\[93;5u")


@click.command()
@name_argument()
@click.option("--history/--no-history", default=True, help="First show what the guest said before.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave so long after the end of the input, where that is no terminal.  [default: stay]",
)
@client_options
def console(
    name: str,
    history: bool,
    timeout: float | None,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> None:
    """Sit down at the serial console of a VM that runs. Ctrl-] leaves.

    Several may do so at once: all see the same, and what they type goes to the same guest. Keys go to the guest as they
    are, Ctrl-C included. Where the input is a pipe or a file, it is sent, and then what the guest says is shown until
    the VM ends.
    """
    from qrapd.commands.asking import host_of, run

    where = places(runtime_dir, socket)

    async def find() -> Path:
        async with host_of(where, name) as client:
            return client.socket

    is_terminal = os.isatty(sys.stdin.fileno())
    with _connect(run(find), name, history) as (connection, protocol):
        talk = _Talk(connection, protocol, is_terminal, timeout)
        if is_terminal:
            click.echo(f"Connected to {name}; leave with Ctrl-]", err=True)
            with _raw_terminal(sys.stdin.fileno()):
                talk.run()
            click.echo(err=True)  # the guest may have left the cursor anywhere
        else:
            talk.run()
    _tell_end(name, talk, is_terminal)


def _tell_end(name: str, talk: _Talk, is_terminal: bool) -> None:
    if talk.left:
        words = f"Left {name}, which runs on."
    elif talk.protocol.close_code == 1000:
        words = f"{name}: {talk.protocol.close_reason or 'ended'}."
    else:
        reason = talk.protocol.close_reason or "the connection was lost"
        raise Unavailable(f"the console of {name} is gone: {reason}", hint=f"once more: qrapd console {name}")
    if is_terminal:
        click.echo(words, err=True)


# --- the connection -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _connect(path: Path, name: str, history: bool) -> Iterator[tuple[socket_module.socket, ClientProtocol]]:
    """Have whoever has the VM open its console.

    :raise QrapdError: he does not.
    """
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri

    uri = f"ws://qrapd/v1/vms/{name}/console?history={str(history).lower()}"
    protocol = ClientProtocol(parse_uri(uri))
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM) as connection:
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            connection.connect(str(path))
            _shake_hands(connection, protocol, path)
        except TimeoutError:
            raise Unavailable(f"{path} did not answer within {HANDSHAKE_SECONDS:g} s") from None
        except OSError as error:
            raise Unavailable(f"cannot connect to {path}: {error.strerror}") from None
        connection.setblocking(False)
        yield connection, protocol


def _shake_hands(connection: socket_module.socket, protocol: ClientProtocol, path: Path) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.protocol import State

    from qrapd.client.http import error_of

    protocol.send_request(protocol.connect())
    connection.sendall(b"".join(protocol.data_to_send()))
    while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
        if data := connection.recv(PIECE):
            protocol.receive_data(data)
        else:
            protocol.receive_eof()
    problem = protocol.handshake_exc
    if isinstance(problem, InvalidStatus):
        try:
            document = json.loads(problem.response.body or b"")
        except ValueError:
            document = None
        raise error_of(problem.response.status_code, document, path)
    if problem is not None:
        raise Unavailable(f"{path} opens no console: {problem}")


# --- the terminal -------------------------------------------------------------------------------------


class _Ended(Exception):
    """A signal asks for the end."""


@contextlib.contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    """Every key goes to the guest as it is. When this is left, however, or suspended, the terminal is as before."""
    before = termios.tcgetattr(fd)

    def restore() -> None:
        with contextlib.suppress(termios.error):  # it has hung up
            termios.tcsetattr(fd, termios.TCSANOW, before)

    def end(number: int, _: FrameType | None) -> None:
        raise _Ended(number)

    def suspend(number: int, _: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # here it stands still
        signal.signal(number, suspend)
        go_on(number, None)

    def go_on(_number: int, _: FrameType | None) -> None:
        with contextlib.suppress(termios.error):
            tty.setraw(fd, termios.TCSANOW)

    handlers = {
        signal.SIGTERM: end,
        signal.SIGHUP: end,
        signal.SIGINT: end,
        signal.SIGQUIT: end,
        signal.SIGTSTP: suspend,
        signal.SIGCONT: go_on,
    }
    previous: dict[signal.Signals, Any] = {}
    deadly: int | None = None
    try:
        for number, handler in handlers.items():
            previous[number] = signal.signal(number, handler)
        tty.setraw(fd, termios.TCSANOW)  # what is typed already is for the guest
        yield
    except _Ended as ended:
        deadly = ended.args[0]
    finally:
        for number in handlers:  # a second signal would come between the terminal and what it was
            signal.signal(number, signal.SIG_IGN)
        restore()
        for number, usual in previous.items():
            signal.signal(number, usual)
    if deadly is not None:
        signal.signal(deadly, signal.SIG_DFL)
        signal.raise_signal(deadly)


class _Talk:
    """Bytes both ways, until the other side ends it or somebody leaves."""

    def __init__(
        self,
        connection: socket_module.socket,
        protocol: ClientProtocol,
        is_terminal: bool,
        timeout: float | None,
    ) -> None:
        self.protocol = protocol
        self.left = False
        """whether it was we who ended it"""
        self._connection = connection
        self._is_terminal = is_terminal
        self._timeout = timeout
        self._stdin, self._stdout = sys.stdin.fileno(), sys.stdout.fileno()
        self._reading = True
        self._deadline: float | None = None
        self._out = bytearray()
        self._shown = bytearray()

    def run(self) -> None:
        from websockets.protocol import State

        while True:
            self._take_news()
            if self.protocol.state is State.CLOSED and not self._shown:
                return
            ready = self._wait()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                if self.protocol.state is not State.OPEN:
                    return
                self._leave()
            if self._stdout in ready:
                self._show(ready[self._stdout])
            if self._stdin in ready:
                self._type()
            if (socket_events := ready.get(self._connection.fileno(), 0)) & select.POLLOUT:
                self._send()
            if socket_events & ~select.POLLOUT:
                self._receive()

    def _wait(self) -> dict[int, int]:
        """What is ready. Nobody is read from who says more than can be passed on: he waits, and nobody else."""
        poll = select.poll()
        if wanted := (0 if self._shown else select.POLLIN) | (select.POLLOUT if self._out else 0):
            poll.register(self._connection, wanted)
        # Without anything to show, poll(2) still tells of a reader who is gone. A terminal's keys are always read:
        # one of them leaves.
        poll.register(self._stdout, select.POLLOUT if self._shown else 0)
        if self._reading and (self._is_terminal or len(self._out) < ENOUGH):
            poll.register(self._stdin, select.POLLIN)
        seconds = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return dict(poll.poll(None if seconds is None else seconds * 1000 + 1))

    def _take_news(self) -> None:
        from websockets.frames import Frame, Opcode

        for event in self.protocol.events_received():
            if self.left and self._is_terminal:
                continue  # who has left by a key wants to see no more of a flood
            if isinstance(event, Frame) and event.opcode in {Opcode.BINARY, Opcode.TEXT, Opcode.CONT}:
                self._shown += event.data
        for data in self.protocol.data_to_send():
            self._out += data  # an empty piece asks for a half-close: the other side closes anyway

    def _type(self) -> None:
        from websockets.protocol import State

        try:
            data = os.read(self._stdin, PIECE)
        except OSError:
            data = b""  # the terminal has hung up
        key = _LEAVE.search(data) if self._is_terminal else None
        typed = data[: key.start()] if key else data
        if typed and len(self._out) >= ENOUGH:
            self._shown += b"\a"  # only a terminal is read from when there is so much already
        elif typed and self.protocol.state is State.OPEN:
            self.protocol.send_binary(typed)
        if key or (not data and self._is_terminal):
            self._leave()
        elif not data:
            self._reading = False
            if self._timeout is not None:
                self._deadline = time.monotonic() + self._timeout

    def _leave(self) -> None:
        """Say farewell behind all that was typed, so that it arrives."""
        from websockets.protocol import State

        self._reading = False
        self._deadline = time.monotonic() + FAREWELL_SECONDS
        if self.protocol.state is State.OPEN:  # otherwise the other side was first
            self.left = True
            self.protocol.send_close(1000)
        if self._is_terminal:
            self._shown.clear()

    def _show(self, events: int) -> None:
        if not events & select.POLLOUT:
            raise BrokenPipeError  # such as `head`, which has seen enough
        count = os.write(self._stdout, self._shown[:PIECE])
        del self._shown[:count]

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                count = self._connection.send(self._out)
            except (BrokenPipeError, ConnectionResetError):
                count = len(self._out)  # how it ended is told by what is still to be read
            del self._out[:count]

    def _receive(self) -> None:
        from websockets.protocol import State

        if self.protocol.state is State.CLOSED:
            return
        try:
            data = self._connection.recv(ENOUGH)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self.protocol.receive_data(data)
        else:
            self.protocol.receive_eof()
