# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of the API that has no VMs, only statuses that change when it is told to: for tests of the client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

STEP = 0.05
"""Seconds between two states on the way."""


def now() -> str:
    """As JSON has it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def link(index: int = 0, **fields: Any) -> dict[str, Any]:
    """A link's status."""
    return {
        "index": index,
        "mode": "swap",
        "state": "up",
        "passt_pid": 4000 + index,
        "generation": 1,
        "outages": 0,
        "last_outage_ms": None,
        "unread_by_passt": 0,
        "unread_by_qemu": 0,
        **fields,
    }


def status(
    name: str, state: str = "ready", *, links: int | list[dict[str, Any]] = 1, **fields: Any
) -> dict[str, Any]:
    """A VM's status."""
    return {
        "name": name,
        "state": state,
        "origin": "agent",
        "qemu_pid": 3000 if state in ("ready", "degraded") else None,
        "since": now(),
        "restarts": 0,
        "links": links if isinstance(links, list) else [link(n) for n in range(links)],
        "error": None,
        "hint": None,
        **fields,
    }


def problem(code: int, detail: str, **more: Any) -> JSONResponse:
    """An error: RFC 9457."""
    content = {"title": "it is so", "status": code, "detail": detail, **more}
    return JSONResponse(content, status_code=code, media_type="application/problem+json")


class FakeHost:
    """VMs by name, as dictionaries; what is asked for takes a few steps."""

    def __init__(self, *vms: dict[str, Any], stuck: bool = False, failing: str | None = None) -> None:
        self.vms = {vm["name"]: vm for vm in vms}
        self.stuck = stuck
        """nothing that is begun ever ends"""
        self.failing = failing
        """why every start and every swap fails"""
        self.by = "pesto"
        self.forwards: dict[str, list[str]] = {"tcp": ["8080:80"], "udp": []}
        self.clashes: list[str] = []
        """host ports that another link forwards"""
        self.calls: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.epoch = "a"
        self.cut_after = 0
        """break off each stream of events after so many; 0: never"""
        self.pause = 0.0
        """seconds before each event"""
        self.busy = 0
        """so many calls for events are refused, for want of room"""
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what happens

    def tell(self, event: str, **fields: Any) -> None:
        """Something happens."""
        self.events.append({"timestamp": now(), "level": "info", "event": event, **fields})

    def change(self, name: str, **fields: Any) -> None:
        """A VM comes to another state."""
        self.vms[name].update(fields)
        if "state" in fields:
            self.vms[name]["since"] = now()

    async def _pass_through(self, name: str, *states: str) -> None:
        for state in states:
            await asyncio.sleep(STEP)
            if self.stuck:
                return
            runs = state == "ready"
            if runs and self.failing:
                self.change(name, state="failed", error=self.failing, qemu_pid=None)
                self.tell("run.failed", vm=name, error=self.failing)
                return
            pid = int(time.monotonic() * 1e6) % 100_000 + 5000 if runs else None
            self.change(name, state=state, qemu_pid=pid)
            self.tell(
                "vm.ready" if runs else "vm.stopping", vm=name, status="running", links=1, how="power-down"
            )

    async def _swap(self, name: str, index: int) -> None:
        each = self.vms[name]["links"][index]
        each["state"] = "down"
        await asyncio.sleep(STEP)
        if self.stuck:
            return
        if self.failing:
            each["state"] = "failed"
            self.change(name, state="degraded", error=self.failing)
        else:
            each.update(state="up", generation=each["generation"] + 1, last_outage_ms=12.3)
            self.tell(
                "link.restored",
                vm=name,
                link=index,
                outage_ms=12.3,
                passt_pid=9,
                generation=each["generation"],
            )

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the API

    def _find(self, request: Request) -> dict[str, Any] | None:
        self.calls.append(f"{request.method} {request.url.path}")
        found: dict[str, Any] | None = self.vms.get(request.path_params.get("name", ""))
        return found

    async def _list(self, request: Request) -> Response:
        self._find(request)
        return JSONResponse(list(self.vms.values()))

    async def _get(self, request: Request) -> Response:
        vm = self._find(request)
        return JSONResponse(vm) if vm else problem(404, "there is no such VM", hint="VMs: web")

    async def _act(self, request: Request) -> Response:
        vm, action = self._find(request), request.path_params["action"]
        if vm is None:
            return problem(404, "there is no such VM")
        name = vm["name"]
        if action == "start" and vm["state"] in ("ready", "degraded"):
            return problem(409, f"{name} runs already", hint="stop it first")
        if action == "reload" and self.failing:
            wrong = {"key": "qemu.arg", "reason": "is not a known key", "value": None, "hint": "args?"}
            return problem(422, "/etc/qrapd/vms/web.toml: 1 problem", problems=[wrong])
        steps = {
            "start": ["starting", "ready"],
            "stop": ["stopping", "exited"],
            "kill": ["failed"],
            "restart": ["stopping", "exited", "starting", "ready"],
            "reload": [],
        }
        self._begin(self._pass_through(name, *steps[action]))
        return JSONResponse(vm, 202)

    async def _swap_link(self, request: Request) -> Response:
        vm, index = self._find(request), request.path_params["index"]
        if vm is None or index >= len(vm["links"]):
            return problem(404, f"there is no link {index}")
        self._begin(self._swap(vm["name"], index))
        return JSONResponse(vm, 202)

    async def _forwards(self, request: Request) -> Response:
        vm = self._find(request)
        if vm is None:
            return problem(404, "there is no such VM")
        if request.method == "GET":
            return JSONResponse(self.forwards)
        change = await request.json()
        assert change
        assert all(change.values()), "empty lists are no change"
        for each in change.get("remove", ()):
            if each["ports"] not in self.forwards[each["protocol"]]:
                return problem(404, f"link 0 does not forward {each['ports']}", hint="it forwards 8080:80")
            self.forwards[each["protocol"]].remove(each["ports"])
        for each in change.get("add", ()):
            if (port := each["ports"].partition(":")[0]) in self.clashes:
                wrong = {
                    "key": "link[0].passt.tcp_ports[1]",
                    "reason": f"forwards tcp port {port} of the host, as link[1].passt.tcp_ports[0] does",
                    "hint": "take another",
                }
                return problem(422, "/etc/qrapd/vms/web.toml: 1 problem", problems=[wrong])
            self.forwards[each["protocol"]].append(each["ports"])
        if self.by == "swap":
            await self._swap(vm["name"], request.path_params["index"])
        return JSONResponse({"by": self.by, **self.forwards})

    async def _events(self, request: Request) -> Response:
        self.calls.append(f"GET /v1/events?{request.url.query}")
        if not self.vms:
            return problem(403, "the user 1 may not do this")
        if self.busy:
            self.busy -= 1
            return problem(503, "there is no room for another one")
        return StreamingResponse(self._stream(request), media_type="text/event-stream")

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        after, vm = request.query_params.get("after"), request.query_params.get("vm")
        follow, place, told = request.query_params.get("follow") != "false", 0, 0
        if after == "now":
            place = len(self.events)
        elif after is not None:
            epoch, _, number = after.partition("-")
            place = int(number) if epoch == self.epoch else 0
            if epoch != self.epoch:
                yield "event: events.missed\ndata: {}\n\n"
        yield ": hello\n\n"
        while True:
            while place < len(self.events):
                event = self.events[place]
                place += 1
                if vm in (None, event.get("vm")):
                    await asyncio.sleep(self.pause)
                    text = json.dumps(event, ensure_ascii=False)
                    yield f"id: {self.epoch}-{place}\nevent: {event['event']}\ndata: {text}\n\n"
                    told += 1
                    if self.cut_after and told >= self.cut_after:
                        return
            if not follow:
                return
            await asyncio.sleep(STEP / 5)

    def app(self) -> Starlette:
        """The paths of the API."""
        return Starlette(
            routes=[
                Route("/v1/vms", self._list),
                Route("/v1/vms/{name}", self._get),
                Route("/v1/vms/{name}/links/{index:int}/swap", self._swap_link, methods=["POST"]),
                Route("/v1/vms/{name}/links/{index:int}/forwards", self._forwards, methods=["GET", "POST"]),
                Route("/v1/vms/{name}/{action}", self._act, methods=["POST"]),
                Route("/v1/events", self._events),
            ]
        )

    @contextmanager
    def serve(self, socket: Path) -> Iterator[FakeHost]:
        """Answer on this socket, in a thread."""
        socket.parent.mkdir(parents=True, exist_ok=True)
        config = uvicorn.Config(
            self.app(),
            uds=str(socket),
            log_level="error",
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)
            socket.unlink(missing_ok=True)
