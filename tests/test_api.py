# SPDX-License-Identifier: GPL-2.0-or-later
"""The API over its socket, on a host that starts nothing: every decision, every fault."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api_host import PretendedHost, PretendedVm
from qrapd.api.access import Peer, Policy
from qrapd.api.app import STRANGER_SECONDS, make_app
from qrapd.api.limits import DEFAULT
from qrapd.api.operations import OPERATIONS
from qrapd.errors import (
    AlreadySupervised,
    ConfigurationError,
    Conflict,
    Problem,
    QemuFailed,
    QmpRefused,
    QrapdError,
    Unavailable,
    Unknown,
    UsageError,
)
from qrapd.status_tracker import StatusTracker
from qrapd.vm_files import SIZE_LIMIT
from qrapd.vm_status import VmStatus
from serving import Serving, eventually, read_all, serving
from support import NOBODY, PATIENCE

POLICY = Policy(own_uid=os.geteuid(), group=4242, read_only_group=4343, group_name="vmadmin")
STRANGER, READER = Peer(1, 1001, 1001), Peer(1, 1001, 1001, (4343,))
TOML = {"Content-Type": "application/toml"}


@dataclass
class Arena:
    """A host, its API, and a client."""

    host: PretendedHost
    server: Serving
    client: httpx.AsyncClient
    peer: Peer | None = None
    """whom the API takes every peer for; None: for who it is"""

    async def refused(self, status: int, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Ask for something that is refused, and return the problem document."""
        response = await self.client.request(method, path, **options)
        assert status == response.status_code, response.text
        return problem_of(response)


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """What every error has."""
    assert "application/problem+json" == response.headers["content-type"]
    document: dict[str, Any] = response.json()
    assert response.status_code == document["status"]
    assert document["title"]
    assert document["detail"]
    return document


@pytest.fixture
async def arena(place: Path) -> AsyncIterator[Arena]:
    host = PretendedHost("db", "web")
    made: Arena
    reports: list[tuple[str, BaseException]] = []
    app = make_app(host, POLICY, report=lambda where, error: reports.append((where, error)))

    async def as_peer(scope: Any, receive: Any, send: Any) -> None:
        if made.peer is not None:
            scope["state"]["peer"] = made.peer
        await app(scope, receive, send)

    async with serving(place, as_peer) as server, server.client() as client:
        server.reports = reports
        made = Arena(host, server, client)
        yield made


# ---- what is there


async def test_vms(arena: Arena) -> None:
    """All of them, and one."""
    response = await arena.client.get("/v1/vms")
    assert (200, "application/json") == (response.status_code, response.headers["content-type"])
    assert [vm.status for vm in arena.host.vms.values()] == [
        VmStatus.model_validate(each) for each in response.json()
    ]
    one = await arena.client.get("/v1/vms/web")
    assert response.json()[1] == one.json()
    keys = {"name", "state", "origin", "qemu_pid", "since", "restarts", "links", "error", "hint"}
    assert keys == one.json().keys()


async def test_health_and_metrics(arena: Arena) -> None:
    """What a monitoring system asks for."""
    assert "ok" == (await arena.client.get("/healthz")).json()["status"]
    response = await arena.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'qrapd_vm_state{state="exited",vm="web"} 1' in response.text or 'vm="web"' in response.text
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = await arena.client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_actions(arena: Arena) -> None:
    """Each is begun, and answered with the VM as it is then."""
    states = []
    for action in ("start", "reload", "stop", "restart", "kill"):
        response = await arena.client.post(f"/v1/vms/web/{action}")
        assert 202 == response.status_code
        states.append(response.json()["state"])
    assert ["ready", "ready", "exited", "ready", "failed"] == states
    assert ["start", "reload", "stop", "restart", "kill"] == arena.host.vms["web"].calls
    await arena.client.post("/v1/vms/web/start")
    assert 202 == (await arena.client.post("/v1/vms/web/links/0/swap")).status_code
    assert "swap 0" == arena.host.vms["web"].calls[-1]
    assert [] == arena.host.vms["db"].calls


async def test_forwards(arena: Arena) -> None:
    """What is forwarded is told, added to, and taken from."""
    path = "/v1/vms/web/links/0/forwards"
    await arena.client.post("/v1/vms/web/start")
    assert {"tcp": ["8080:80"], "udp": []} == (await arena.client.get(path)).json()
    change = {
        "add": [{"protocol": "tcp", "ports": "8443:443"}, {"protocol": "udp", "ports": "5353:53"}],
        "remove": [{"protocol": "tcp", "ports": "8080:80"}],
    }
    response = await arena.client.post(path, json=change)
    assert (200, {"by": "pesto", "tcp": ["8443:443"], "udp": ["5353:53"]}) == (
        response.status_code,
        response.json(),
    )
    problem = await arena.refused(404, "POST", path, json={"remove": [{"protocol": "tcp", "ports": "1:1"}]})
    assert "does not forward tcp 1:1" in problem["detail"]
    problem = await arena.refused(422, "POST", path, json={"add": [{"protocol": "tcp", "ports": "x"}]})
    assert [
        {"key": "add[0].ports", "reason": "is no port", "value": "x", "hint": "write 8080:80"}
    ] == problem["problems"]


@pytest.mark.parametrize(
    ("body", "keys"),
    [
        ({}, [""]),
        ({"add": []}, ["add"]),
        ({"add": [{"protocol": "sctp", "ports": "1"}]}, ["add[0].protocol"]),
        ({"add": [{"protocol": "tcp", "ports": ""}, {"protocol": "tcp"}]}, ["add[0].ports", "add[1].ports"]),
        ({"add": [], "more": 1}, ["add", "more"]),
        ([], [""]),
        ("x" * 1000, [""]),
        ({"add": [{"protocol": "tcp", "ports": "1"}] * 257}, ["add"]),
    ],
)
async def test_values_that_are_wrong(arena: Arena, body: Any, keys: list[str]) -> None:
    """All of them are told, each with its place; nothing is done."""
    problem = await arena.refused(422, "POST", "/v1/vms/web/links/0/forwards", json=body)
    assert keys == [each["key"] for each in problem["problems"]]
    assert all(len(each["value"] or "") <= 100 for each in problem["problems"])
    assert [] == arena.host.vms["web"].calls


async def test_files(arena: Arena) -> None:
    """A new one, another one in its place, one only if there is none, and none any more."""
    text = "# mine\n[qemu]\nargs = ['-m', '1G']\n"
    response = await arena.client.put("/v1/vms/new", content=text, headers=TOML)
    assert (201, "/v1/vms/new", "new") == (
        response.status_code,
        response.headers["location"],
        response.json()["name"],
    )
    assert text == arena.host.texts["new"]
    response = await arena.client.put("/v1/vms/new", content=text, headers=TOML)
    assert 200 == response.status_code
    assert "location" not in response.headers
    await arena.refused(412, "PUT", "/v1/vms/new", content="", headers=TOML | {"If-None-Match": "*"})
    await arena.refused(422, "PUT", "/v1/vms/new", content="", headers=TOML | {"If-None-Match": '"x"'})
    assert text == arena.host.texts["new"]
    response = await arena.client.put("/v1/vms/other", content="", headers=TOML | {"If-None-Match": "*"})
    assert 201 == response.status_code
    response = await arena.client.delete("/v1/vms/new")
    assert (204, b"") == (response.status_code, response.content)
    await arena.refused(404, "DELETE", "/v1/vms/new")
    await arena.client.post("/v1/vms/other/start")
    await arena.refused(409, "DELETE", "/v1/vms/other")


async def test_two_new_files_at_once(arena: Arena) -> None:
    """Of those who want theirs to be the first, one has it so; a file that nobody has read yet stays, too."""
    headers = TOML | {"If-None-Match": "*"}
    texts = [f"# {number}\n" for number in range(4)]
    done = await asyncio.gather(
        *(arena.client.put("/v1/vms/new", content=text, headers=headers) for text in texts)
    )
    assert [201, 412, 412, 412] == sorted(each.status_code for each in done)
    assert arena.host.texts["new"] == texts[[each.status_code for each in done].index(201)]
    arena.host.texts["unread"] = "# by hand\n"
    problem = await arena.refused(412, "PUT", "/v1/vms/unread", content="", headers=headers)
    assert "there is a VM unread already" in problem["detail"]
    assert "# by hand\n" == arena.host.texts["unread"]


async def test_a_file_as_json(arena: Arena) -> None:
    """It is written as TOML that means the same; null as a value means that there is none."""
    file = {
        "name": "new",
        "qemu": {"args": ["-m", 'a "quoted" \n\x01 ü'], "binary": None, "powerdown_timeout": 1.5},
        "link": [{"passt": {"tcp_ports": ["8080:80"], "udp_ports": None}}, {"mac": "52:54:00:00:00:01"}],
    }
    response = await arena.client.put("/v1/vms/new", json=file)
    assert 201 == response.status_code, response.text
    del file["qemu"]["binary"], file["link"][0]["passt"]["udp_ports"]  # type: ignore[index]
    assert file == tomllib.loads(arena.host.texts["new"])


@pytest.mark.parametrize(
    ("name", "body", "status", "key"),
    [
        ("new", b'{"qemu": {"args": [1]}}', 422, "qemu.args[0]"),
        ("new", b'{"qemu": {"args": [null]}}', 422, "qemu.args[0]"),
        ("new", b'{"name": "other"}', 422, "name"),
        ("new", b"[]", 422, ""),
        ("No_Name", b"{}", 422, "name"),
        ("new", b'{"restart": {"window": 1e999}}', 422, "restart.window"),
        ("new", b'{"qemu": ', 400, None),
        ("new", b"[" * 100_000, 400, None),
        ("new", b'{"name": "\xff"}', 400, None),
        ("new", b'{"name": "\\ud800"}', 400, None),
        ("new", b'{"restart": {"limit": ' + b"9" * 5000 + b"}}", 400, None),
        ("new", b"", 400, None),
    ],
    ids=[
        "type",
        "null",
        "name",
        "list",
        "path",
        "infinite",
        "cut",
        "deep",
        "bytes",
        "surrogate",
        "huge",
        "empty",
    ],
)
async def test_files_that_are_wrong(
    arena: Arena, name: str, body: bytes, status: int, key: str | None
) -> None:
    """Nothing is written, and what is wrong is said."""
    headers = {"Content-Type": "application/json"}
    problem = await arena.refused(status, "PUT", f"/v1/vms/{name}", content=body, headers=headers)
    assert ["db", "web"] == list(arena.host.texts)
    if key is not None:
        assert key == problem["problems"][0]["key"]


async def test_toml_that_is_wrong(arena: Arena) -> None:
    """The checks of a VM's file answer, with everything that they find."""
    body = "[qemu]\nargs = 1\nbnary = 'x'\n"
    problem = await arena.refused(422, "PUT", "/v1/vms/new", content=body, headers=TOML)
    assert ["qemu.args", "qemu.bnary"] == [each["key"] for each in problem["problems"]]
    assert "qemu.binary" in problem["problems"][1]["hint"] or "binary" in problem["problems"][1]["hint"]
    await arena.refused(400, "PUT", "/v1/vms/new", content=b"name = '\xff'", headers=TOML)
    assert ["db", "web"] == list(arena.host.texts)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonx"])
async def test_bodies_of_another_kind(arena: Arena, content_type: str | None) -> None:
    """They are not guessed at; the answer says what is taken."""
    headers = {"Content-Type": content_type} if content_type else {}
    response = await arena.client.put("/v1/vms/new", content=b"{}", headers=headers)
    assert (415, "application/toml, application/json") == (response.status_code, response.headers["accept"])
    problem_of(response)
    await arena.refused(415, "POST", "/v1/vms/web/links/0/forwards", content=b"{}", headers=headers)
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert 201 == (await arena.client.put("/v1/vms/new", content=b"{}", headers=headers)).status_code


async def test_bodies_that_are_too_large(arena: Arena) -> None:
    """Announced or not: no more is read than a VM's file may have."""
    most = b"#" * SIZE_LIMIT

    async def in_pieces() -> AsyncIterator[bytes]:
        yield most
        yield b"#"

    assert 201 == (await arena.client.put("/v1/vms/new", content=most, headers=TOML)).status_code
    await arena.refused(413, "PUT", "/v1/vms/new", content=in_pieces(), headers=TOML)
    head = f"PUT /v1/vms/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/toml\r\nContent-Length: {'9' * 19}\r\n\r\n"
    assert (await arena.server.ask(head.encode())).startswith(b"HTTP/1.1 413 ")


# ---- what is not there


async def test_unknown_things(arena: Arena) -> None:
    """VMs, links and paths that there are not."""
    for path in ("", "/v1", "/v1/vms/", "/v1/vms/web/", "/v1/vms/web/links", "/v1/vms/a%2Fb", "/docs"):
        assert "/openapi.json" in (await arena.refused(404, "GET", path))["hint"]
    for path in ("nobody", "Web", "web%0A", "%00", "%ff", "x" * 5000):
        await arena.refused(404, "GET", f"/v1/vms/{path}")
        await arena.refused(404, "POST", f"/v1/vms/{path}/start")
    for link in ("1", "-1", "00", "x", "%D9%A1", "9" * 5000):
        await arena.refused(404, "POST", f"/v1/vms/web/links/{link}/swap")
        await arena.refused(404, "GET", f"/v1/vms/web/links/{link}/forwards")


async def test_methods(arena: Arena) -> None:
    """What a path does not take is refused with what it takes; HEAD and OPTIONS go everywhere."""
    for method in ("PATCH", "TRACE", "POST", "XYZ"):
        response = await arena.client.request(method, "/v1/vms/web")
        assert (405, "DELETE, GET, HEAD, OPTIONS, PUT") == (response.status_code, response.headers["allow"])
        problem_of(response)
    response = await arena.client.options("/v1/vms/web/start")
    assert (204, "OPTIONS, POST") == (response.status_code, response.headers["allow"])
    for path in ("/v1/vms", "/v1/vms/web", "/metrics", "/healthz", "/openapi.json", "/v1/events"):
        response = await arena.client.head(path)
        assert (200, b"") == (response.status_code, response.content)
    response = await arena.client.head("/v1/vms/nobody")
    assert (404, b"") == (response.status_code, response.content)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unknown("m"), 404),
        (Conflict("m", hint="h"), 409),
        (AlreadySupervised("m"), 409),
        (UsageError("m"), 422),
        (ConfigurationError("m", [Problem("qemu.args", "is wrong", "1", "do it")]), 422),
        (Unavailable("m"), 503),
        (QemuFailed("m"), 503),
        (QmpRefused("m"), 503),
        (QrapdError("path \udcff"), 503),
    ],
    ids=lambda each: type(each).__name__,
)
async def test_failures_of_a_vm(arena: Arena, error: QrapdError, status: int) -> None:
    """What goes wrong below is told with message and hint."""
    arena.host.vms["web"].fault = error
    problem = await arena.refused(status, "POST", "/v1/vms/web/reload")
    assert problem["detail"].startswith(error.message[:4])
    assert error.hint == problem.get("hint")
    if isinstance(error, ConfigurationError):
        assert [{"key": "qemu.args", "reason": "is wrong", "value": "1", "hint": "do it"}] == problem[
            "problems"
        ]
    assert [] == arena.server.reports


async def test_a_bug(arena: Arena, capfd: pytest.CaptureFixture[str]) -> None:
    """Its words are for the log; the client gets what it can be found by."""
    arena.host.vms["web"].fault = KeyError("secret")
    response = await arena.client.post("/v1/vms/web/start")
    problem = problem_of(response)
    assert 500 == response.status_code
    assert "secret" not in response.text
    [(where, error)] = arena.server.reports
    assert f"POST /v1/vms/web/start ({problem['reference']})" == where
    assert isinstance(error, KeyError)
    assert ("", "") == capfd.readouterr()


# ---- who may


def requests() -> Iterator[tuple[str, str, int]]:
    """Every operation, and which right it needs."""
    concrete = {"{name}": "web", "{index}": "0"}
    for each in OPERATIONS:
        path = each.path
        for placeholder, value in concrete.items():
            path = path.replace(placeholder, value)
        yield each.method, path, int(each.access)


@pytest.mark.parametrize(("method", "path", "needed"), list(requests()))
async def test_who_may_what(arena: Arena, method: str, path: str, needed: int) -> None:
    """Every operation with each right: who may not is told who may, and nothing happens."""
    before = (dict(arena.host.texts), {name: vm.state for name, vm in arena.host.vms.items()})
    for right, peer in enumerate((STRANGER, READER)):
        arena.peer = peer
        if right < needed:
            problem = await arena.refused(403, method, path)
            assert "the user 1001 may not do this" in problem["detail"]
            assert "vmadmin (4242)" in problem["detail"]
            assert before == (arena.host.texts, {name: vm.state for name, vm in arena.host.vms.items()})
        elif path != "/v1/events":
            assert 200 == (await arena.client.request(method, path)).status_code


async def test_who_may_not_learns_nothing(arena: Arena) -> None:
    """Not which VMs, paths or methods there are; and what is sent is not read."""
    arena.peer = STRANGER
    documents = [
        await arena.refused(403, *each)
        for each in [("GET", "/v1/vms/web"), ("GET", "/v1/vms/nobody"), ("GET", "/x"), ("PATCH", "/v1/vms")]
    ]
    assert [documents[0]] * 4 == documents
    assert 403 == (await arena.client.options("/v1/vms")).status_code
    for name in ("web", "nobody"):
        with pytest.raises(InvalidStatus) as refused:
            await unix_connect(str(arena.server.path), f"ws://x/v1/vms/{name}/console")
        assert 403 == refused.value.response.status_code
    head = b"PUT /v1/vms/web HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n"
    answer = await arena.server.ask(head + b"Content-Type: application/toml\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ")


async def test_another_user_for_real(place: Path) -> None:
    """Another process, another user: in no group, in that for looking on, and in that for all."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    script = """if True:
        import json, os, socket, sys
        path, nobody, groups = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
        os.setgroups(groups); os.setresgid(nobody, nobody, nobody); os.setresuid(nobody, nobody, nobody)
        for line in ("GET /healthz", "GET /v1/vms", "POST /v1/vms/web/start"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                connection.sendall(f"{line} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
                print(connection.recv(12)[-3:].decode(), end=" ")
        """
    async with serving(place, make_app(PretendedHost("web"), POLICY)) as server:
        answers = []
        for groups in ([], [4343], [7, 4242]):
            command = [sys.executable, "-S", "-c", script, str(server.path), str(NOBODY), json.dumps(groups)]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            with anyio.fail_after(PATIENCE):
                answers.append((await process.communicate())[0].decode().split())
    assert [["200", "403", "403"], ["200", "200", "403"], ["200", "200", "202"]] == answers


async def test_who_may_nothing_waits(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer the more of them there are; nobody else does, and who goes meanwhile leaves nothing behind."""
    arena.peer = STRANGER
    began = time.monotonic()
    answers = await asyncio.gather(*(arena.client.get("/healthz") for _ in range(10)))
    assert [200] * 10 == [each.status_code for each in answers]
    assert time.monotonic() - began >= 10 * STRANGER_SECONDS * 0.9
    monkeypatch.setattr("qrapd.api.app.STRANGER_SECONDS", 1000)
    waiting = [await arena.server.connect() for _ in range(3)]
    for each, (_reader, writer) in zip(("healthz", "openapi.json", "v1/vms"), waiting, strict=True):
        writer.write(f"GET /{each} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await eventually(lambda: 3 == running())
    arena.peer = READER
    assert 200 == (await arena.client.get("/v1/vms")).status_code
    assert 3 == running()
    for _reader, writer in waiting:
        writer.close()
    await eventually(lambda: 0 == running())


def running() -> int:
    """Requests that are being answered."""
    return sum("run_asgi" in repr(each) for each in asyncio.all_tasks())


async def test_rights_that_are_lost(place: Path) -> None:
    """Who may no longer gets nothing more, neither an event nor what the guest says; what is typed goes nowhere."""
    host, uid = PretendedHost("web"), os.geteuid()
    policies = [Policy(own_uid=uid)]
    # Root may always: the peer is taken for another one.
    app = make_app(host, lambda: policies[-1])

    async def as_member(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["peer"] = Peer(1, 1001, 4242)
        await app(scope, receive, send)

    vm = host.vms["web"]
    with vm.with_console() as console, anyio.fail_after(PATIENCE):
        running = asyncio.create_task(console.run())
        assert vm.guest is not None
        async with serving(place, as_member) as server, server.client() as client:
            for who in ("the guest", "the client"):
                policies.append(POLICY)
                async with (
                    client.stream("GET", "/v1/events?after=now") as events,
                    unix_connect(str(server.path), "ws://x/v1/vms/web/console") as websocket,
                ):
                    lines = events.aiter_lines()
                    await skip_to(lines, "retry: ")
                    await websocket.send(b"typed")
                    assert b"typed" == await asyncio.get_running_loop().sock_recv(vm.guest, 100)
                    policies.append(replace(POLICY, group=None))
                    host.events.append("vm.stopping", {"vm": "web"})
                    assert [] == [line async for line in lines if line]
                    if who == "the guest":
                        vm.guest.send(b"secret")
                    else:
                        await websocket.send(b"typed")
                    with pytest.raises(ConnectionClosed):
                        await websocket.recv()
                    assert (1008, "is no longer allowed") == (websocket.close_code, websocket.close_reason)
                assert 403 == (await client.get("/v1/events")).status_code
            with pytest.raises(BlockingIOError):
                vm.guest.recv(100)
        running.cancel()
        await asyncio.wait({running})


async def test_an_error_with_bytes_of_any_kind(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path in it need not be UTF-8: that one VM's error must not keep all others from being shown."""
    tracker = StatusTracker("web", "agent", [(0, "swap")], datetime.now(UTC))
    tracker.note("link.failed", {"link": 0, "error": "b\udcff"}, datetime.now(UTC))
    tracker.note_failure("/etc/c\udcff/vms/web.toml: 1 problem", datetime.now(UTC), hint="see /etc/d\udcff")
    monkeypatch.setattr(PretendedVm, "status", property(lambda _: tracker.status()))
    for path in ("/v1/vms", "/v1/vms/web"):
        response = await arena.client.get(path)
        assert 200 == response.status_code
        assert "c\\\\udcff/vms" in response.text
        assert "b\\\\udcff" in response.text
        assert "d\\\\udcff" in response.text


# ---- events


def parse(text: str) -> list[dict[str, str]]:
    """The events of a stream, comments and all that has no data left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append(fields)
    return found


async def test_events_that_have_been(arena: Arena) -> None:
    """All of them, of one VM, after one, after now, and after one that nobody knows."""
    for name in ("web", "db"):
        await arena.client.post(f"/v1/vms/{name}/start")

    async def get(headers: dict[str, str] | None = None, **query: str) -> list[dict[str, str]]:
        response = await arena.client.get("/v1/events", params={"follow": "false"} | query, headers=headers)
        assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
        return parse(response.text)

    web, db = everything = await get()
    assert ["vm.ready", "vm.ready"] == [each["event"] for each in everything]
    data = json.loads(web["data"])
    assert ("info", "vm.ready", "web", 100) == (data["level"], data["event"], data["vm"], data["qemu_pid"])
    assert [db] == await get(vm="db")
    hint = (await arena.refused(404, "GET", "/v1/events?vm=nobody&follow=false"))["hint"]
    assert "GET /v1/vms" in hint
    assert [db] == await get(after=web["id"])
    assert [] == await get(after="now")
    assert [db] == await get({"Last-Event-ID": web["id"]}, after="now")
    missed, *rest = await get(after="of-another-time")
    assert {"event": "events.missed", "data": '{"event": "events.missed", "count": null}'} == missed
    assert everything == rest
    for query in ({"vm": "No_Name"}, {"follow": "maybe"}):
        assert list(query) == [
            each["key"] for each in (await arena.refused(422, "GET", "/v1/events", params=query))["problems"]
        ]


async def test_events_of_one_that_was(arena: Arena) -> None:
    """A VM that is gone may have left events: they are told."""
    await arena.client.post("/v1/vms/web/start")
    await arena.client.post("/v1/vms/web/stop")
    assert 204 == (await arena.client.delete("/v1/vms/web")).status_code
    response = await arena.client.get("/v1/events", params={"vm": "web", "follow": "false"})
    assert ["vm.ready", "vm.exited"] == [each["event"] for each in parse(response.text)]


async def test_events_of_one_to_come(arena: Arena) -> None:
    """Who follows may wait for a VM that there is not yet."""
    with anyio.fail_after(PATIENCE):
        async with arena.client.stream("GET", "/v1/events", params={"vm": "new"}) as response:
            lines = response.aiter_lines()
            await skip_to(lines, "retry: ")
            await arena.client.put("/v1/vms/new", content="", headers=TOML)
            await arena.client.post("/v1/vms/new/start")
            await skip_to(lines, "event: vm.ready")


async def test_events_as_they_come(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come at once; in between there are comments; and a client that has gone leaves nothing behind."""
    monkeypatch.setattr("qrapd.api.event_stream.KEEP_ALIVE_SECONDS", 0.05)
    with anyio.fail_after(PATIENCE):
        async with arena.client.stream("GET", "/v1/events", params={"vm": "web"}) as response:
            lines = response.aiter_lines()
            assert "retry: 1000" == await anext(lines)
            await skip_to(lines, ": nothing new")
            await skip_to(lines, ": nothing new")
            await arena.host.vms["db"].start()
            await arena.host.vms["web"].start()
            assert (await skip_to(lines, "id: ")).startswith("id: ")
            assert "event: vm.ready" == await anext(lines)
            assert "web" == json.loads((await anext(lines)).removeprefix("data: "))["vm"]
    await eventually(lambda: [] == [each for each in asyncio.all_tasks() if "run_asgi" in repr(each)])
    assert [] == arena.server.reports


async def test_a_bug_in_the_middle(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been answered in part is cut off, so that it does not look complete, and is reported once."""

    async def follow(*_: object, **__: object) -> AsyncIterator[Any]:
        yield await anext(arena.host.events.__class__.follow(arena.host.events))
        raise KeyError("secret")

    await arena.client.post("/v1/vms/web/start")
    monkeypatch.setattr(arena.host.events, "follow", follow)
    with pytest.raises(httpx.RemoteProtocolError):
        await arena.client.get("/v1/events")
    assert 1 == len(arena.server.reports)


async def skip_to(lines: AsyncIterator[str], beginning: str) -> str:
    """The next line that begins so."""
    async for line in lines:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no line {beginning!r}")


async def test_the_last_event(arena: Arena) -> None:
    """What happens right before the server's end is told, too: it is what the end is about."""
    reader, writer = await arena.server.connect()
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"retry: 1000\n\n")
    arena.host.events.append("vm.exited", {"vm": "web", "reason": "request"})
    await arena.server.stop()
    received = await read_all(reader)
    writer.close()
    assert b"event: vm.exited\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")


async def test_one_who_does_not_read_events(arena: Arena) -> None:
    """What the kernel does not take is not written for it; when it reads again it is told that it missed some."""
    reader, writer = await arena.server.connect()
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"retry: 1000\n\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # not in the type of a writer's transport
    for number in range(5000):
        arena.host.events.append("vm.ready", {"vm": "web", "text": "x" * 900, "number": number})
        if number % 50 == 0:
            await asyncio.sleep(0)
    await arena.client.get("/healthz")
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    arena.host.events.append("vm.exited", {"vm": "web", "reason": "request"})
    with anyio.fail_after(PATIENCE):
        received = b""
        while b"vm.exited" not in received:
            received += await reader.read(65536)
    writer.close()
    assert b"events.missed" in received
    assert received.count(b"event: vm.ready") < 5000


# ---- the console


async def test_the_console(arena: Arena) -> None:
    """Bytes go both ways; what was said before comes if asked for; the guest's end is the end."""
    vm = arena.host.vms["web"]
    with vm.with_console() as console:
        running = asyncio.create_task(console.run())
        assert vm.guest is not None
        vm.guest.send(b"before\r\n")
        await eventually(lambda: b"before\r\n" == console._history.look())
        url = "ws://x/v1/vms/web/console"
        with anyio.fail_after(PATIENCE):
            async with (
                unix_connect(str(arena.server.path), f"{url}?history=true") as first,
                unix_connect(str(arena.server.path), url) as second,
            ):
                assert b"before\r\n" == await first.recv()
                await first.send(b"\x00\xff\r")
                assert b"\x00\xff\r" == await asyncio.get_running_loop().sock_recv(vm.guest, 100)
                vm.guest.send(b"\x1b[31m\xff")
                assert [b"\x1b[31m\xff"] * 2 == [await first.recv(), await second.recv()]
                vm.guest.shutdown(1)
                with pytest.raises(ConnectionClosed):
                    await second.recv()
                assert (1000, "the guest has ended") == (second.close_code, second.close_reason)
        await running
    assert [] == arena.server.reports


async def test_no_console(arena: Arena) -> None:
    """Who asks for one that there is not, or may not, is told so before anything else; without WebSocket, too."""

    async def refused(path: str) -> tuple[int, str]:
        with pytest.raises(InvalidStatus) as error:
            await unix_connect(str(arena.server.path), f"ws://x{path}")
        response = error.value.response
        document = json.loads(response.body or b"")
        assert "application/problem+json" == response.headers["content-type"]
        assert response.status_code == document["status"]
        return response.status_code, document["detail"]

    status, detail = await refused("/v1/vms/web/console")
    assert 409 == status
    assert "does not run" in detail
    assert 404 == (await refused("/v1/vms/nobody/console"))[0]
    assert 404 == (await refused("/v1/vms"))[0]
    with arena.host.vms["web"].with_console():
        assert 422 == (await refused("/v1/vms/web/console?history=1"))[0]
        arena.peer = READER
        assert 403 == (await refused("/v1/vms/web/console"))[0]
    arena.peer = None
    response = await arena.client.get("/v1/vms/web/console")
    assert (426, "websocket") == (response.status_code, response.headers["upgrade"])
    problem_of(response)


# ---- bytes of any kind


UPGRADE = (
    b"GET /v1/vms/web/console HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
REQUESTS = [
    b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /v1/events HTTP/1.0\r\n\r\n",
    b"PUT /v1/vms/a HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"PUT /v1/vms/a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\na=1",
    UPGRADE,
    UPGRADE + b"\x82\x81\0\0\0\0x\x88\x80\0\0\0\0",
    b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
]


def distort(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, taken out or put in, or another request put into the middle."""
    changed = bytearray(data * chance.choice([1, 1, 2]))
    for _ in range(chance.choice([0, 1, 1, 3])):
        place = chance.randrange(len(changed) + 1)
        what = chance.choice([b"", chance.randbytes(1), chance.randbytes(7), chance.choice(REQUESTS)])
        changed[place : place + chance.choice([0, 1, 10])] = what
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
async def test_bytes_of_any_kind(place: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sent, and wherever it ends: it troubles nobody, and nothing of it stays."""
    # Of whom a second request waits behind a stream, nothing is read: that it is gone shows when it is written to.
    monkeypatch.setattr("qrapd.api.event_stream.KEEP_ALIVE_SECONDS", 0.2)
    chance = random.Random(seed)
    host = PretendedHost("web")
    troubles: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: troubles.append(context))
    app = make_app(host, POLICY, report=lambda *report: troubles.append(report))
    limits = replace(DEFAULT, request_seconds=0.05, idle_seconds=1)

    async def send(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError, TimeoutError):
            client.setblocking(False)
            await loop.sock_connect(client, str(server.path))
            half = chance.randrange(len(data) + 1)
            await loop.sock_sendall(client, data[:half])
            await asyncio.sleep(chance.choice([0, 0.01]))
            await loop.sock_sendall(client, data[half:])
            async with asyncio.timeout(chance.choice([0, 0.2])):
                while await loop.sock_recv(client, 65536):
                    pass

    with host.vms["web"].with_console() as console:
        running = asyncio.create_task(console.run())
        async with serving(place, app, limits=limits) as server:
            for _ in range(20):
                await asyncio.gather(*(send(distort(chance.choice(REQUESTS), chance)) for _ in range(10)))
            await eventually(lambda: not any("run_asgi" in repr(each) for each in asyncio.all_tasks()))
            async with server.client() as client:
                assert 200 == (await client.get("/v1/vms")).status_code
        assert [] == server.reports
        running.cancel()
        await asyncio.wait({running})
    assert [] == troubles
