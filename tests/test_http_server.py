# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP server on its UNIX socket: what an application gets, and what no peer can do to it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed

from qrapd.api.access import Peer
from qrapd.api.limits import DEFAULT
from serving import Serving, eventually, read_all, serving
from support import NOBODY, PATIENCE

HELLO = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SOON = 0.3
"""A limit that is to be run into."""


class App:
    """Answers by the path; keeps what it was told of the peers."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.gone: list[asyncio.Event] = []
        self.running = 0
        self.ended = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.peers.append(scope["state"]["peer"])
        self.gone.append(scope["state"]["gone"])
        self.running += 1
        try:
            if scope["type"] == "websocket":
                await self.echo(receive, send)
            elif scope["path"][1:].isdecimal():
                await respond(send, bytes(int(scope["path"][1:])))
            else:
                await getattr(self, scope["path"].strip("/") or "hello")(receive, send)
        finally:
            self.running -= 1
            self.ended += 1

    async def hello(self, _receive: Any, send: Any) -> None:
        await respond(send, b"hello")

    async def large(self, _receive: Any, send: Any) -> None:
        await respond(send, bytes(4 * 1024 * 1024))

    async def body(self, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        await respond(send, str(size).encode())

    async def stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def flood(self, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})

    async def slow(self, _receive: Any, send: Any) -> None:
        await asyncio.sleep(SOON)
        await respond(send, b"slow")

    async def stuck(self, _receive: Any, _send: Any) -> None:
        await asyncio.Event().wait()

    async def broken(self, _receive: Any, _send: Any) -> None:
        raise RuntimeError("it is broken")

    async def echo(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message.get("bytes")})


async def respond(send: Any, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def app() -> App:
    return App()


# ---- what an application gets


async def test_the_peer(place: Path, app: App) -> None:
    """The application learns who has connected, for HTTP and for a WebSocket."""
    expected = Peer(os.getpid(), os.getuid(), os.getgid(), tuple(os.getgroups()))
    async with serving(place, app) as server:
        async with server.client() as client:
            response = await client.get("/")
            assert (200, b"hello") == (response.status_code, response.content)
            assert "server" not in response.headers
            assert response.headers["date"].endswith("GMT")
            await client.get("/")
        async with unix_connect(str(server.path), "ws://x/") as websocket:
            await websocket.send(b"\x00\xff")
            assert b"\x00\xff" == await websocket.recv()
        assert [expected] * 3 == app.peers


async def test_as_another_user_in_a_group(place: Path, app: App) -> None:
    """Users and supplementary groups are what the kernel says of another process."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    async with serving(place, app) as server:
        assert 0 == (await as_user(server, [4242, 77])).returncode
        assert [(NOBODY, NOBODY, (77, 4242))] == [(peer.uid, peer.gid, peer.groups) for peer in app.peers]
        assert 0 == (await as_user(server, list(range(1000, 1300)))).returncode
        assert tuple(range(1000, 1300)) == app.peers[-1].groups


async def as_user(
    server: Serving, groups: list[int], connections: int = 1
) -> subprocess.CompletedProcess[str]:
    """Ask for / as nobody, who is in ``groups``; prints the responses' first lines."""
    script = f"""if True:
        import os, socket
        os.setgroups({groups}); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
        made = [socket.socket(socket.AF_UNIX) for _ in range({connections})]
        for each in made:
            each.connect({str(server.path)!r})
            try:
                each.sendall({HELLO!r})
            except BrokenPipeError:
                pass
            print(each.recv(1000).decode().splitlines()[0])
        """
    command = [sys.executable, "-S", "-c", script]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    with anyio.fail_after(PATIENCE):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, output.decode())


async def test_requests_one_after_the_other(place: Path, app: App) -> None:
    """A connection serves many requests, also those that come in one piece, and bodies of both kinds."""
    post = b"POST /body HTTP/1.1\r\nHost: x\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    counted = post + b"Content-Length: 4\r\nConnection: close\r\n\r\nabcd"
    async with serving(place, app) as server:
        answer = await server.ask(HELLO + chunked[:50], chunked[50:] + HELLO, counted)
        assert 4 == answer.count(b"HTTP/1.1 200 OK")
        assert [b"hello", b"3", b"hello", b"4"] == [
            each.partition(b"\r\n\r\n")[2] for each in answer.split(b"HTTP/1.1 200 OK")[1:]
        ]


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("http://x/slow", "slow"),
        ("HTTPS://x:1/slow?y=http://z/", "slow"),
        ("http://x", "hello"),
        ("http://x?/slow", "hello"),
    ],
)
async def test_a_target_in_absolute_form(place: Path, app: App, target: str, answer: str) -> None:
    """As clients of a proxy ask, and a server has to understand it; there is one host here, whatever it is called."""
    async with serving(place, app) as server:
        request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        received = await server.ask(request.encode())
        assert received.startswith(b"HTTP/1.1 200 ")
        assert received.endswith(answer.encode())


SLOW = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        (SLOW, [b"slow"]),
        (HELLO + SLOW + HELLO, [b"hello", b"slow", b"hello"]),
        (SLOW + b"GET /", [b"slow"]),
        (POST + b"a", []),
    ],
    ids=["one", "several", "one and a part", "a part"],
)
async def test_one_who_has_said_all(place: Path, app: App, said: bytes, answers: list[bytes]) -> None:
    """Who says no more gets all answers to what was said, and the end; what is not whole is not waited for."""
    async with serving(place, app) as server:
        reader, writer = await server.connect()
        writer.write(said)
        writer.write_eof()
        received = await read_all(reader)
        writer.close()
        found = [each.partition(b"\r\n\r\n")[2] for each in received.split(b"HTTP/1.1 200 OK")[1:]]
        assert answers == found
        await eventually(lambda: app.running == 0)
        assert [] == connections_of(server)
        assert [] == server.reports


async def test_one_who_goes(place: Path, app: App) -> None:
    """Who says no more and hears nothing any more is gone: what is for that one ends at once."""
    async with serving(place, app) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"first")
        assert not app.gone[0].is_set()
        writer.close()
        await eventually(lambda: app.running == 0)
        assert app.gone[0].is_set()
        async with unix_connect(str(server.path), "ws://x/") as websocket:
            await websocket.send(b"x")
            await websocket.recv()
            assert not app.gone[1].is_set()
        await eventually(lambda: app.gone[1].is_set())


async def test_on_demand(place: Path, app: App) -> None:
    """Nothing is made before somebody connects, and the first one is answered, too."""
    made = []

    def make_app() -> App:
        made.append(app)
        return app

    async with serving(place, on_demand=make_app) as server:
        await asyncio.sleep(SOON)
        assert [] == made
        async with server.client() as client:
            assert b"hello" == (await client.get("/")).content
            assert b"hello" == (await client.get("/")).content
        assert [app] == made


IDLE = """if True:
    import asyncio, os, resource, socket, sys
    from qrapd.api.server import serve_on_demand
    loaded = [name for name in ("uvicorn", "starlette", "h11", "pydantic", "websockets") if name in sys.modules]
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
    def waits():
        with open("/proc/self/status") as file:
            return [int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt")][0]
    async def main():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(sys.argv[1])
        listener.listen()
        task = asyncio.create_task(serve_on_demand(listener, lambda: app))
        for _ in range(2):
            await asyncio.sleep(0.1)
            before = waits()
            await asyncio.sleep(2)
            print(waits() - before)
            reader, writer = await asyncio.open_unix_connection(sys.argv[1])
            writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            await reader.read()
            writer.close()
        print(loaded)
        task.cancel()
        await asyncio.wait({task})
    asyncio.run(main())
"""


def test_an_idle_one_does_not_wake_up(place: Path) -> None:
    """Neither before the first client nor after it; and importing the module takes none of the libraries along."""
    command = [sys.executable, "-c", IDLE, str(place / "idle.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    *wakeups, loaded = done.stdout.splitlines()
    assert "[]" == loaded, done.stderr
    assert 2 == len(wakeups)
    # One is that of the test's own sleep. A server that looks around ten times a second has 20.
    assert all(int(each) <= 4 for each in wakeups), wakeups


# ---- limits


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"", b"408"),
        (b"GET / HT", b"408"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", b"408"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"408"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * DEFAULT.head_bytes, b"431"),
        (b"what is this?\r\n\r\n", b"400"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # without Host
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk", "head", "nonsense", "chunk", "host"],
)
async def test_a_request_that_is_none(place: Path, app: App, begun: bytes, status: bytes) -> None:
    """What never becomes a request is answered with a problem and closed, and leaves nothing behind."""
    async with serving(place, app, limits=replace(DEFAULT, request_seconds=SOON)) as server:
        answer = await server.ask(begun)
        assert answer.startswith(b"HTTP/1.1 " + status), answer
        assert b"application/problem+json" in answer
        await eventually(lambda: app.running == 0)
        assert [] == server.reports


@pytest.mark.parametrize(
    "second", [b"", b"GET /", b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\na"]
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_second_request_that_never_ends(place: Path, app: App, second: bytes, at_once: bool) -> None:
    """The limits hold for each request of a connection, and for the time between them."""
    limits = replace(DEFAULT, request_seconds=SOON, idle_seconds=1)
    async with serving(place, app, limits=limits) as server:
        answer = await server.ask(*([HELLO + second] if at_once else [HELLO, second]))
        assert b"hello" in answer
        await eventually(lambda: app.running == 0)


async def test_a_body_that_nobody_wants(place: Path, app: App) -> None:
    """Who has the answer and goes on sending is cut off."""
    async with serving(place, app, limits=replace(DEFAULT, request_seconds=SOON)) as server:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await server.connect()
        writer.write(head)
        assert b"HTTP/1.1 200 OK\r\n" == await reader.readline()
        with anyio.fail_after(PATIENCE), suppress(ConnectionError):
            while True:
                writer.write(b"3\r\nabc\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()


@pytest.mark.parametrize("path", ["large", "flood"])
async def test_a_reader_that_does_not_read(place: Path, app: App, path: str) -> None:
    """What the kernel does not take for so long is dropped, with the connection."""
    async with serving(place, app, limits=replace(DEFAULT, write_seconds=SOON)) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.path))
            client.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await eventually(lambda: app.ended == 1)
            await eventually(lambda: [] == connections_of(server))
        assert [] == server.reports


async def test_a_little_that_is_not_read(place: Path, app: App) -> None:
    """It is the same for what is just too much for the kernel, how little that may be."""
    limits = replace(DEFAULT, write_seconds=SOON, idle_seconds=1)
    async with serving(place, app, limits=limits) as server:
        clients = [socket.socket(socket.AF_UNIX) for _ in range(30)]
        for number, client in enumerate(clients):
            client.connect(str(server.path))
            client.sendall(f"GET /{number * 10_000} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await eventually(lambda: app.ended == len(clients))
        await eventually(lambda: [] == connections_of(server))
        for client in clients:
            client.close()


async def test_a_slow_reader_gets_all_of_it(place: Path, app: App) -> None:
    """One that reads a little now and then is waited for."""
    async with serving(place, app) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        with anyio.fail_after(PATIENCE):
            while chunk := await reader.read(500_000):
                size += len(chunk)
                await asyncio.sleep(0.01)
        writer.close()
        assert size > 4 * 1024 * 1024


async def test_pings_of_one_that_does_not_read(place: Path, app: App) -> None:
    """The answers to pings do not pile up: nothing more is read from who does not read them."""
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    pings = (b"\x89\xfd\0\0\0\0" + bytes(125)) * 100
    async with serving(place, app) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(server.path))
            client.sendall(upgrade)
            await eventually(lambda: app.running == 1)
            sent = refused = 0
            # The server is in this event loop: it has many turns while nothing is taken.
            while refused < 20 and sent < 8 * 1024 * 1024:
                try:
                    sent += client.send(pings)
                    refused = 0
                except BlockingIOError:
                    refused += 1
                    await asyncio.sleep(0.01)
        assert 0 < sent < 8 * 1024 * 1024
        await eventually(lambda: [] == connections_of(server))


async def test_a_terminal_that_does_not_read(place: Path, app: App) -> None:
    """Who reads no messages is cut off, after a while of its own."""
    limits = replace(DEFAULT, write_seconds=PATIENCE, message_write_seconds=SOON)
    async with serving(place, app, limits=limits) as server:
        websocket = await unix_connect(str(server.path), "ws://x/", max_queue=1)
        with anyio.fail_after(PATIENCE), suppress(ConnectionClosed):
            while True:  # each comes back, until nobody takes it any more
                await websocket.send(bytes(DEFAULT.message_bytes))
        await eventually(lambda: app.ended == 1)


async def test_a_message_that_is_too_large(place: Path, app: App) -> None:
    """It closes the WebSocket, by the code that stands for it."""
    async with serving(place, app) as server, unix_connect(str(server.path), "ws://x/") as websocket:
        await websocket.send(bytes(DEFAULT.message_bytes))
        assert DEFAULT.message_bytes == len(await websocket.recv())
        await websocket.send(bytes(DEFAULT.message_bytes + 1))
        with pytest.raises(ConnectionClosed):
            await websocket.recv()
        assert 1009 == websocket.close_code


async def test_too_many_connections(place: Path, app: App) -> None:
    """One too many is told so; as soon as there is room again, it is served."""
    async with serving(place, app, limits=replace(DEFAULT, connections=3, kept=1)) as server:
        held = [await server.connect() for _ in range(3)]
        answer = await server.ask(HELLO)
        assert answer.startswith(b"HTTP/1.1 503 "), answer
        assert b"there are 3 connections already" in answer
        # A WebSocket is a connection, too, and is counted once.
        held.pop()[1].close()
        await eventually(lambda: len(connections_of(server)) == 2)
        async with unix_connect(str(server.path), "ws://x/") as websocket:
            await websocket.send(b"x")
            await websocket.recv()
            assert (await server.ask(HELLO)).startswith(b"HTTP/1.1 503 ")
        with anyio.fail_after(PATIENCE):
            while not (await server.ask(HELLO[:-2] + b"Connection: close\r\n\r\n")).endswith(b"hello"):
                pass
        for _reader, writer in held:
            writer.close()


async def test_too_many_connections_of_one_user(place: Path, app: App) -> None:
    """That is for others: root and the serving user are not to shut themselves out."""
    async with serving(place, app, limits=replace(DEFAULT, per_uid=3)) as server:
        held = [await server.connect() for _ in range(4)]
        assert b"hello" in await server.ask(HELLO[:-2] + b"Connection: close\r\n\r\n")
        for _reader, writer in held:
            writer.close()
        if os.geteuid() == 0:  # only root can become another user
            others = await as_user(server, [], connections=4)
            refused = "HTTP/1.1 503 Service Unavailable"
            assert ["HTTP/1.1 200 OK"] * 3 + [refused] == others.stdout.splitlines()


async def test_others_leave_room_for_us(place: Path, app: App) -> None:
    """However many users connect, root and the serving user still can."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    async with serving(place, app, limits=replace(DEFAULT, connections=5, kept=2)) as server:
        others = await as_user(server, [], connections=5)
        assert ["HTTP/1.1 200 OK"] * 3 + [
            "HTTP/1.1 503 Service Unavailable"
        ] * 2 == others.stdout.splitlines()
        held = [await server.connect() for _ in range(3)]
        assert b"hello" in await server.ask(HELLO[:-2] + b"Connection: close\r\n\r\n")
        for _reader, writer in held:
            writer.close()


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """This process may open few files more; the limit is as before afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_all(taken: list[int]) -> None:
    """Open file descriptors until there are none."""
    while True:
        taken.append(os.dup(0))


async def test_out_of_file_descriptors(place: Path, app: App, few_descriptors: None) -> None:
    """Who connects then waits; it is reported once, costs nothing, and is over when there are descriptors again."""
    async with serving(place, app) as server:
        async with server.client() as client:
            await client.get("/")
        await eventually(lambda: [] == connections_of(server))  # nothing of it is given back any more
        waiting = socket.socket(socket.AF_UNIX)
        taken: list[int] = []
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            take_all(taken)
        waiting.connect(str(server.path))
        waiting.sendall(HELLO)
        await eventually(lambda: [] != server.reports)
        before = time.process_time()
        await asyncio.sleep(2.5)
        spent = time.process_time() - before
        for each in taken:
            os.close(each)
        waiting.setblocking(False)
        with anyio.fail_after(PATIENCE):
            answer = await asyncio.get_running_loop().sock_recv(waiting, 1000)
        waiting.close()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert ["cannot accept a connection"] == [where for where, _ in server.reports]
        assert spent < 0.5


# ---- failures, and the end


@pytest.mark.parametrize("path", ["broken", "stream"])
async def test_what_goes_wrong_within(
    place: Path, app: App, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the application is reported, and is nobody else's."""

    async def broken_stream(receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise RuntimeError("it is broken")

    monkeypatch.setattr(app, "stream", broken_stream)
    async with serving(place, app) as server:
        answer = await server.ask(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"500" in answer or not answer.endswith(b"0\r\n\r\n")
        assert b"Traceback" not in answer
        assert ["it is broken"] == [str(error) for _, error in server.reports]
        assert b"hello" in await server.ask(HELLO[:-2] + b"Connection: close\r\n\r\n")


BROKEN = """if True:
    import asyncio, socket, sys
    from qrapd.api.server import serve
    async def app(scope, receive, send):
        raise RuntimeError("it is broken")
    async def main():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(sys.argv[1])
        listener.listen()
        task = asyncio.create_task(serve(app, listener))
        for request in (b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n", b"nonsense\\r\\n\\r\\n"):
            reader, writer = await asyncio.open_unix_connection(sys.argv[1])
            writer.write(request)
            print((await reader.read()).split()[1].decode())
            writer.close()
        task.cancel()
        await asyncio.wait({task})
    asyncio.run(main())
"""


def test_nothing_is_written_to_stderr(place: Path) -> None:
    """It is the log's; and where no log is set up, as in a test, Python's logging would write there by itself."""
    command = [sys.executable, "-c", BROKEN, str(place / "broken.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ("500\n400\n", "") == (done.stdout, done.stderr)


async def test_the_end(place: Path, app: App) -> None:
    """Idle connections, streams and WebSockets end at once; who is being answered gets the answer."""
    async with serving(place, app, limits=replace(DEFAULT, grace_seconds=PATIENCE)) as server:
        idle, slow, stream = [await server.connect() for _ in range(3)]
        idle[1].write(HELLO)
        await idle[0].readuntil(b"hello")
        slow[1].write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        stream[1].write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        await stream[0].readuntil(b"first")
        async with unix_connect(str(server.path), "ws://x/") as websocket:
            await websocket.send(b"x")
            await websocket.recv()
            await server.stop()
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            assert 1012 == websocket.close_code
        assert b"" == await read_all(idle[0])
        assert (await read_all(slow[0])).endswith(b"slow")
        assert (await read_all(stream[0])).endswith(b"0\r\n\r\n")
        for each in (idle, slow, stream):
            each[1].close()
        assert 0 == app.running
        assert [] == server.reports


async def test_the_end_does_not_wait_for_ever(place: Path, app: App) -> None:
    """Neither an application that hangs nor a reader that does not read keeps the server."""
    async with serving(place, app, limits=replace(DEFAULT, grace_seconds=SOON)) as server:
        stuck, unread = [await server.connect() for _ in range(2)]
        stuck[1].write(b"GET /stuck HTTP/1.1\r\nHost: x\r\n\r\n")
        unread[1].write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: len(app.peers) == 2)
        with anyio.fail_after(PATIENCE):
            await server.stop()
        assert 0 == app.running
        assert [] == server.reports
        assert [] == connections_of(server)
        for each in (stuck, unread):
            each[1].close()


def connections_of(server: Serving) -> list[str]:
    """The server's ends that are still open, as the kernel's table has them."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    # Connected (03); a listening one has the flag 00010000 (__SO_ACCEPTCON).
    return [line for line in lines if line.endswith(f" {server.path}") and " 0001 03 " in line]
