# SPDX-License-Identifier: GPL-2.0-or-later
"""`qrapd console` in a real terminal, against the real server, bridge and broker; and a shell in a real guest."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import anyio
import pexpect
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.client import ClientConnection, unix_connect
from websockets.uri import parse_uri

from qrapd import console
from qrapd.api import console_bridge
from qrapd.api.console_bridge import bridge
from qrapd.api.server import serve
from qrapd.console import Attachment, Console
from qrapd.guest import GuestImage
from support import PATIENCE

PROGRAM = """
import sys
from qrapd.cli import main, run_command_line
from qrapd.commands.console import console
main.add_command(console)
sys.exit(run_command_line())
"""
PROMPT = "ready> "


class Host:
    """One that serves VMs' consoles on a socket, in a thread. The guests' ends are whatever is put into ``connect``."""

    def __init__(self, place: Path) -> None:
        self.base = place
        self.consoles: dict[str, Console] = {}
        self.letting_go: dict[str, anyio.CancelScope] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(place / "agent.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=anyio.run, args=(self._main,))
        self._up = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._tasks.cancel_scope.cancel)
        self._thread.join(PATIENCE)
        self._listener.close()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = Starlette(
            routes=[
                Route("/v1/vms/{name}", self._show),
                WebSocketRoute("/v1/vms/{name}/console", self._console),
            ]
        )
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(serve, app, self._listener)
            self._up.set()

    async def _show(self, request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if name not in self.consoles and name != "closed":
            return JSONResponse({"title": "no such VM", "detail": f"there is no VM {name}"}, 404)
        return JSONResponse({"name": name, "state": "ready"})

    async def _console(self, websocket: WebSocket) -> None:
        name = websocket.path_params["name"]
        if name == "closed":
            problem = JSONResponse({"title": "denied", "detail": "you may look, and not touch"}, 403)
            await websocket.send_denial_response(problem)
            return
        history = websocket.query_params.get("history") == "true"
        await bridge(websocket, self.consoles[name], history)

    def call(self, function: Callable[..., Any], *arguments: object) -> None:
        """Have the server's thread do something."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def connect(self, name: str, end: socket.socket) -> None:
        """Make a VM of the other end of this socket."""
        end.setblocking(False)

        async def run() -> None:
            with anyio.CancelScope() as scope:
                self.letting_go[name] = scope
                await self.consoles[name].run()

        def start() -> None:
            self.consoles[name] = Console(end, None)
            self._tasks.start_soon(run)

        self.call(start)
        wait_until(lambda: name in self.letting_go)

    def small_buffer(self, name: str) -> None:
        """Have the guest's port take but a little that is not read."""
        self.consoles[name]._end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def terminals(self, name: str) -> int:
        """How many are attached."""
        return len(self.consoles[name]._attachments)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that will be so in a moment."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    """A host without VMs."""
    with Host(place) as serving:
        yield serving


@pytest.fixture
def web(host: Host) -> Iterator[socket.socket]:
    """The serial port of a guest called web, as the guest has it."""
    ours, qemus = socket.socketpair()
    with qemus:
        qemus.settimeout(PATIENCE)
        host.connect("web", ours)
        yield qemus


def hear(port: socket.socket, words: bytes) -> None:
    """The guest reads just these words."""
    heard = b""
    while len(heard) < len(words):
        heard += port.recv(len(words) - len(heard))
    assert words == heard


def command(host: Host, *options: str) -> list[str]:
    """What starts ``qrapd console web``."""
    return [sys.executable, "-c", PROGRAM, "console", "--runtime-dir", str(host.base), *(options or ["web"])]


@contextmanager
def terminal(program: str, *arguments: str) -> Iterator[pexpect.spawn]:
    """A program in a terminal of its own."""
    child = pexpect.spawn(
        program, list(arguments), timeout=PATIENCE, env={**os.environ, "ENV": "", "PS1": PROMPT}
    )
    try:
        yield child
    finally:
        child.close(force=True)


@contextmanager
def at_console(host: Host, *options: str) -> Iterator[pexpect.spawn]:
    """Somebody at the console."""
    with terminal(*command(host, *options)) as child:
        child.expect_exact("leave with Ctrl-]\r\n")
        yield child


def leave(child: pexpect.spawn) -> None:
    """Ctrl-], and back to the shell."""
    child.send("\x1d")
    child.expect_exact("Left web, which runs on.\r\n")
    child.expect(pexpect.EOF)
    child.wait()
    assert 0 == child.exitstatus


# --- in a terminal ------------------------------------------------------------------------------------


def test_terminal(host: Host, web: socket.socket) -> None:
    """What was said before is shown, then what is said, as it is; each key gets through, until Ctrl-]."""
    web.sendall(b"before\r\n")
    with at_console(host) as child:
        child.expect_exact("before\r\n")
        web.sendall(b"\x1b[31mred\x1b[0m\n\xe2\x82\xac login: ")
        child.expect_exact(b"\x1b[31mred\x1b[0m\n\xe2\x82\xac login: ")
        child.send("root\r\x03\x04\x1a\x11\x13\x00\x7f")
        hear(web, b"root\r\x03\x04\x1a\x11\x13\x00\x7f")
        child.send("last")
        leave(child)
    hear(web, b"last")
    wait_until(lambda: host.terminals("web") == 0)


@pytest.mark.parametrize("key", [b"\x1d", b"\x1b[27;5;93~", b"\x1b[93;5u"])
def test_ways_to_press_the_key(host: Host, web: socket.socket, key: bytes) -> None:
    """Ctrl-] leaves also where a program in the guest has had the terminal report it in another way."""
    with at_console(host) as child:
        child.send(b"before" + key + b"behind")
        child.expect_exact("Left web")
        child.expect(pexpect.EOF)
    wait_until(lambda: host.terminals("web") == 0)
    web.setblocking(False)
    assert b"before" == web.recv(100)


def test_no_history(host: Host, web: socket.socket) -> None:
    """Only what is said from now on."""
    web.sendall(b"before\r\n")
    with at_console(host) as child:
        child.expect_exact("before\r\n")
    with at_console(host, "web", "--no-history") as child:
        wait_until(lambda: host.terminals("web") == 1)
        web.sendall(b"after")
        child.expect_exact("after")
        assert b"before" not in child.before


def test_two_at_once(host: Host, web: socket.socket) -> None:
    """Both see the same, both are heard, and one leaves without the other."""
    with at_console(host) as one, at_console(host) as other:
        wait_until(lambda: host.terminals("web") == 2)
        web.sendall(b"for both\r\n")
        one.expect_exact("for both\r\n")
        other.expect_exact("for both\r\n")
        one.send("one")
        hear(web, b"one")
        leave(one)
        other.send("other")
        hear(web, b"other")
        leave(other)


def test_end_of_guest(host: Host, web: socket.socket) -> None:
    """The end of the guest is the end of the command: all is well."""
    with at_console(host) as child:
        web.sendall(b"reboot: Power down")
        web.close()
        child.expect_exact("reboot: Power down")
        child.expect_exact("web: the guest has ended.\r\n")
        child.expect(pexpect.EOF)
        child.wait()
        assert 0 == child.exitstatus


def test_supervisor_lets_go(host: Host, web: socket.socket) -> None:
    """A supervisor that is replaced takes its terminals with it, and they say that the VM runs on."""
    with at_console(host) as child:
        host.call(host.letting_go["web"].cancel)
        child.expect_exact("qrapd has let go of the VM, which runs on")
        child.expect(pexpect.EOF)
        child.wait()
        assert 69 == child.exitstatus


def test_flood(host: Host, web: socket.socket) -> None:
    """Amid a flood Ctrl-] leaves."""
    over = threading.Event()

    def flood() -> None:
        with suppress(OSError):
            while not over.is_set():
                web.sendall(b"yes, and no, and yes again\r\n" * 100)

    guest = threading.Thread(target=flood)
    with at_console(host) as child:
        guest.start()
        try:
            child.expect_exact("yes again\r\n")
            leave(child)
        finally:
            over.set()
            guest.join(PATIENCE)


# --- the terminal is left as it was -------------------------------------------------------------------


def stty(shell: pexpect.spawn) -> str:
    """How the terminal is set, as the shell's own stty sees it."""
    shell.sendline("stty -a | tr '\\n' ' '; echo end=$?")
    shell.expect(r"\r\n(speed[^\r\n]*)end=0\r\n")
    words = shell.match[1].decode()
    shell.expect_exact(PROMPT)
    return str(words)


def sit_down(shell: pexpect.spawn, host: Host) -> None:
    """Call the console from a shell."""
    shell.sendline(f"sh {host.base}/call; echo status=$?")
    shell.expect_exact("leave with Ctrl-]\r\n")


@contextmanager
def shell_at(host: Host) -> Iterator[pexpect.spawn]:
    """A shell with job control, and a script that calls the console."""
    (host.base / "call").write_text(f"echo $$ >{host.base}/pid; exec {shlex.join(command(host))}\n")
    with terminal("/bin/sh", "-i") as shell:
        shell.expect_exact(PROMPT)
        yield shell


@pytest.mark.parametrize(("number", "status"), [("TERM", 143), ("HUP", 129), (None, 0)])
def test_terminal_is_restored(host: Host, web: socket.socket, number: str | None, status: int) -> None:
    """By a key or by a signal: afterwards the terminal is as it was."""
    with shell_at(host) as shell:
        before = stty(shell)
        sit_down(shell, host)
        web.sendall(b"\x1b[1mhello")
        shell.expect_exact("hello")
        if number is None:
            shell.send("\x1d")
        else:
            subprocess.run(["kill", f"-{number}", (host.base / "pid").read_text().strip()], check=True)
        shell.expect_exact(f"status={status}\r\n")
        shell.expect_exact(PROMPT)
        assert before == stty(shell)


def test_suspended(host: Host, web: socket.socket) -> None:
    """Suspended from elsewhere, it gives the terminal back; in the foreground again, each key is the guest's."""
    with shell_at(host) as shell:
        before = stty(shell)
        sit_down(shell, host)
        shell.send("\x1a")
        hear(web, b"\x1a")
        subprocess.run(["kill", "-TSTP", (host.base / "pid").read_text().strip()], check=True)
        shell.expect_exact(PROMPT)
        assert before == stty(shell)
        shell.sendline("fg")
        shell.expect("call[^\r\n]*\r\n")
        web.sendall(b"back")
        shell.expect_exact("back")
        shell.send("\x03")
        hear(web, b"\x03")
        shell.send("\x1d")
        shell.expect_exact("Left web")
        shell.expect_exact(PROMPT)
        assert before == stty(shell)


# --- in a pipe ----------------------------------------------------------------------------------------


@contextmanager
def called(host: Host, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command without a terminal; gone afterwards, whatever happens."""
    with subprocess.Popen(command(host), **streams) as call:  # type: ignore[call-overload]
        try:
            yield call
        finally:
            call.kill()


def test_pipe(host: Host, web: socket.socket) -> None:
    """Input from a pipe is sent as it is, and then what the guest says is shown to its end, and nothing else."""
    pipe = subprocess.PIPE
    with called(host, stdin=pipe, stdout=pipe, stderr=pipe) as call:
        assert call.stdin is not None
        call.stdin.write(b"reboot \x1d\n")
        call.stdin.close()
        call.stdin = None
        hear(web, b"reboot \x1d\n")
        web.sendall(b"\x00going down\r\n")
        web.close()
        assert (b"\x00going down\r\n", b"") == call.communicate(timeout=PATIENCE)
    assert 0 == call.returncode


def test_pipe_with_timeout(host: Host, web: socket.socket) -> None:
    """With a time limit it leaves after the end of its input, all of which arrives: more than fits into any buffer."""
    typed = b"0123456789abcde\n" * 100_000
    heard = bytearray()

    def listen() -> None:
        while len(heard) < len(typed):
            heard.extend(web.recv(1000))

    guest = threading.Thread(target=listen)
    guest.start()
    done = subprocess.run(
        command(host, "web", "--timeout", "0"), input=typed, capture_output=True, timeout=PATIENCE
    )
    guest.join(PATIENCE)
    assert (0, b"", b"") == (done.returncode, done.stdout, done.stderr)
    assert typed == heard


def test_reader_has_seen_enough(host: Host, web: socket.socket) -> None:
    """When the reader of a pipe goes, such as `head`, so does the command, even if the guest says no more."""
    reader, writer = os.pipe()
    with called(host, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE) as call:
        os.close(writer)
        web.sendall(b"first\n")
        assert b"first\n" == os.read(reader, 100)
        os.close(reader)
        _, words = call.communicate(timeout=PATIENCE)
    assert (0, b"") == (call.returncode, words)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [("closed", 69, "you may look, and not touch"), ("nobody", 69, "there is no VM nobody")],
)
def test_refused(host: Host, name: str, status: int, words: str) -> None:
    """What the other side says about it is what the caller reads."""
    done = subprocess.run(
        command(host, name), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
    )
    assert status == done.returncode
    assert words in done.stderr.decode()


# --- the WebSocket ------------------------------------------------------------------------------------


def websocket(host: Host, name: str = "web", query: str = "") -> ClientConnection:
    """Somebody else's client."""
    return unix_connect(str(host.base / "agent.sock"), f"ws://localhost/v1/vms/{name}/console{query}")


class _Broken(Console):
    """Has a bug."""

    def attach(self, *, history: bool) -> Attachment:
        attachment = super().attach(history=history)
        attachment.receive = None  # type: ignore[method-assign,assignment]
        return attachment


def test_close_codes(host: Host, web: socket.socket) -> None:
    """By the code a program can tell why a console ended."""
    host.consoles["broken"] = _Broken(web, None)
    with websocket(host) as one, websocket(host, "broken") as other:
        one.send("typed as text: \N{EURO SIGN}")
        hear(web, "typed as text: \N{EURO SIGN}".encode())
        web.sendall(b"\xff\x00")
        assert b"\xff\x00" == one.recv(PATIENCE)
        web.close()
        with pytest.raises(ConnectionClosed) as ended:
            one.recv(PATIENCE)
        assert ended.value.rcvd is not None
        assert (1000, "the guest has ended") == (ended.value.rcvd.code, ended.value.rcvd.reason)
        with pytest.raises(ConnectionClosed) as ended:
            other.recv(PATIENCE)
        assert ended.value.rcvd is not None
        assert 1011 == ended.value.rcvd.code


def test_client_that_never_reads(host: Host, web: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off after a while, and neither the guest nor another terminal has waited for it."""
    monkeypatch.setattr(console_bridge, "STALLED_SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX) as raw, websocket(host) as reader:
        raw.connect(str(host.base / "agent.sock"))
        raw.sendall(
            b"GET /v1/vms/web/console HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        wait_until(lambda: host.terminals("web") == 2)
        said = heard = 0
        while host.terminals("web") == 2:
            web.sendall(b"x" * 10_000)
            said += 10_000
            while heard < said:
                heard += len(reader.recv(PATIENCE))
            assert said < 10**9
        assert said > 250_000
        assert heard == said
        web.sendall(b"still here")
        assert b"still here" == reader.recv(PATIENCE)


def test_last_words(host: Host, web: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent before a farewell arrives, even if the guest is slow, and talks on to one who has gone."""
    monkeypatch.setattr(console, "INPUT_PATIENCE", PATIENCE)
    typed = [b"%04d" % number * 1000 for number in range(10)]
    host.small_buffer("web")
    client = ClientProtocol(parse_uri("ws://localhost/v1/vms/web/console"))
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE)
        raw.connect(str(host.base / "agent.sock"))
        client.send_request(client.connect())
        raw.sendall(b"".join(client.data_to_send()))
        while client.state is not State.OPEN:
            client.receive_data(raw.recv(1000))
        for piece in typed:
            client.send_binary(piece)
        client.send_close(1000)
        raw.sendall(b"".join(client.data_to_send()))
        while raw.recv(1000):
            pass
    web.sendall(b"to nobody")
    time.sleep(0.2)  # for it to be noticed, which must not do any harm
    hear(web, b"".join(typed))
    wait_until(lambda: host.terminals("web") == 0)


# --- a real guest -------------------------------------------------------------------------------------


@pytest.mark.guest
def test_shell_in_a_guest(host: Host, guest: GuestImage) -> None:
    """A shell in a real guest hears what is typed, Ctrl-C too; a second terminal sees what was there before it."""
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    path = host.base / "serial.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with (
            socket.socket(socket.AF_UNIX) as serial,
            subprocess.Popen(
                [
                    *(
                        qemu,
                        "-machine",
                        "q35",
                        "-accel",
                        "tcg",
                        "-m",
                        "128M",
                        "-nic",
                        "none",
                        "-display",
                        "none",
                    ),
                    *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
                    *("-append", f"{guest.command_line} rdinit=/bin/sh"),
                    *("-chardev", f"socket,id=console,fd={listener.fileno()},server=on,wait=off"),
                    *("-serial", "chardev:console"),
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
            ) as machine,
        ):
            try:
                serial.connect(str(path))
                listener.close()
                host.connect("web", serial)
                use_shell(host, machine)
            finally:
                machine.kill()


def use_shell(host: Host, machine: subprocess.Popen[bytes]) -> None:
    """Two people at one guest's shell."""
    with at_console(host) as one:
        one.expect_exact("# ")
        one.send("echo $((6 * 7)) apples\r")
        one.expect_exact("42 apples")
        with at_console(host) as other:
            other.expect_exact("42 apples")  # from before
            other.expect_exact("# ")
            other.send("echo $((6 * 8)) pears\r")
            one.expect_exact("48 pears")
            other.expect_exact("48 pears")
            leave(one)
            other.send("sleep 1000\r")
            other.expect_exact("sleep 1000")
            other.send("\x03echo $((6 * 9)) plums\r")
            machine.kill()
            other.expect_exact("web: the guest has ended.")
