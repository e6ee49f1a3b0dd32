# SPDX-License-Identifier: GPL-2.0-or-later
"""The API over a host's VMs, as an ASGI application. The operations are in :mod:`qrapd.api.operations`.

Before anything else it is asked whether the peer may: who may not learns nothing of what there is, and nothing that
it sends is read.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeAlias

import anyio
from pydantic import BaseModel, TypeAdapter
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from qrapd import __version__
from qrapd.api.access import Access, Peer, Policy, decide, refusal
from qrapd.api.console_bridge import bridge
from qrapd.api.event_stream import EventStream
from qrapd.api.models import Forwards, ForwardsChange, ForwardsChanged, Health
from qrapd.api.openapi import Operation
from qrapd.api.operations import CONSOLE_PATH, OPERATIONS, openapi_json
from qrapd.api.problems import MEDIA_TYPE, Failure, Report, failure_of
from qrapd.api.requests import file_text, flag, is_name, name_in_query, only_if_none, read_model
from qrapd.errors import ConfigurationError, Problem, QrapdError
from qrapd.event_log import EventLog
from qrapd.hosting import Host, HostedVm
from qrapd.vm_status import VmStatus

__all__ = ["App", "make_app"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_Answer: TypeAlias = Response | EventStream
_Handler: TypeAlias = Callable[[Request], Awaitable[_Answer]]

_STATUSES = TypeAdapter(list[VmStatus])

STRANGER_SECONDS = 0.02
"""So long waits one without any right for the answer, for each of those who wait: all of them together get 50 answers a
second. Each step of a link's mending waits for a turn of the event loop. With 62 connections that ask without rest one
took 15 ms (measured), and with this 0.05 ms."""


def _say_nothing(_request: str, _error: BaseException) -> None:
    pass


def make_app(host: Host, policy: Policy | Callable[[], Policy], *, report: Report = _say_nothing) -> App:
    """The ASGI application.

    :param policy: who may do what; a function is asked each time.

    It wants to find the peer in ``scope["state"]["peer"]``, as an :class:`qrapd.api.access.Peer`.

    :param report: is told of bugs: which request it was, with the reference that the client got, and the error.
    """
    return _Api(host, policy if callable(policy) else lambda: policy, report)


class _Api:
    def __init__(self, host: Host, policy: Callable[[], Policy], report: Report) -> None:
        self._host = host
        self._policy = policy
        self._report = report
        self._strangers = 0
        """who wait, and may nothing"""
        by_path = groupby(sorted(OPERATIONS, key=attrgetter("path")), attrgetter("path"))
        routes = [
            Route(path, self._resource({each.method: each for each in group})) for path, group in by_path
        ]
        console = [Route(CONSOLE_PATH, self._not_upgraded), WebSocketRoute(CONSOLE_PATH, self._console)]
        self._router = Router([*routes, *console], redirect_slashes=False, default=self._nowhere)

    # ---- around every request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route a request; whatever goes wrong until it is answered becomes a problem document."""
        answered = False

        async def watched_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._hold_up(scope)
            await self._router(scope, receive, watched_send)
        except ClientDisconnect:
            return
        except Exception as error:
            if answered:
                raise  # too late for another answer: the server cuts the connection, and reports it
            await self._refuse(self._failure(error, scope), scope, receive, send)

    async def _hold_up(self, scope: Scope) -> None:
        """Let one without any right wait: the event loop is the VMs' first. Who goes meanwhile waits no longer."""
        state = scope["state"]
        if decide(self._policy(), state["peer"]) > Access.NONE:
            return
        gone: asyncio.Event = state["gone"]
        self._strangers += 1
        try:
            with anyio.move_on_after(self._strangers * STRANGER_SECONDS):
                await gone.wait()
        finally:
            self._strangers -= 1

    def _failure(self, error: Exception, scope: Scope) -> Failure:
        if isinstance(error, Failure):
            return error
        if isinstance(error, QrapdError):
            return failure_of(error)
        reference = secrets.token_hex(4)
        self._report(f"{scope.get('method', 'WebSocket')} {scope.get('path')} ({reference})", error)
        detail, hint = "this is a bug in qrapd", f"the log tells more of it: look for {reference}"
        return Failure(500, detail, hint=hint, reference=reference)

    async def _refuse(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(failure.body(), failure.status, failure.headers, MEDIA_TYPE)
        if scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(response)

    def _check(self, connection: HTTPConnection, needed: Access) -> None:
        if not self._may(connection, needed):
            raise Failure(403, refusal(self._policy(), connection.state.peer, needed))

    def _may(self, connection: HTTPConnection, needed: Access) -> bool:
        """As of now: the policy may become another one, and a connection may last for days."""
        peer: Peer = connection.state.peer
        return decide(self._policy(), peer) >= needed

    async def _nowhere(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        self._check(HTTPConnection(scope), Access.READ)
        raise Failure(
            404, f"there is nothing at {scope['path']}", hint="GET /openapi.json tells what there is"
        )

    def _resource(self, operations: Mapping[str, Operation]) -> App:
        """What is at one path."""
        handlers: Mapping[str, _Handler] = {
            method: getattr(self, f"_{operation.name}") for method, operation in operations.items()
        }
        allowed = ", ".join(sorted({*handlers, "OPTIONS", *({"HEAD"} if "GET" in handlers else ())}))
        least = min(each.access for each in operations.values())

        async def resource(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            method = "GET" if request.method == "HEAD" else request.method
            if method in operations:
                self._check(request, operations[method].access)
                answer = await handlers[method](request)
            else:
                self._check(request, least)
                if method != "OPTIONS":
                    detail = f"{method} is not for {request.url.path}"
                    raise Failure(405, detail, headers={"Allow": allowed})
                answer = Response(status_code=204, headers={"Allow": allowed})
            await answer(scope, receive, send)

        return _Endpoint(resource)

    def _vm(self, connection: HTTPConnection) -> HostedVm:
        name = connection.path_params["name"]
        if (vm := self._host.vms.get(name)) is None:
            raise _no_vm(name)
        return vm

    async def _find(self, request: Request) -> HostedVm:
        """As :meth:`_vm`; a file that has come since the last reload is enough."""
        if (name := request.path_params["name"]) not in self._host.vms and is_name(name):
            await self._host.look_for(name)
        return self._vm(request)

    def _link(self, request: Request) -> tuple[HostedVm, int]:
        vm, text = self._vm(request), request.path_params["index"]
        count = len(vm.status.links)
        # Compared as text: Python reads Arabic digits as numbers, too, and refuses to read thousands of them.
        if text not in (str(index) for index in range(count)):
            has = {0: "no links", 1: "the link 0 only"}.get(count, f"the links 0 to {count - 1}")
            raise Failure(404, f"there is no link {text}: the VM {vm.status.name} has {has}")
        return vm, int(text)

    # ---- the operations, by their names

    async def _list_vms(self, _request: Request) -> Response:
        body = _STATUSES.dump_json([vm.status for vm in self._host.vms.values()])
        return Response(body, media_type="application/json")

    async def _get_vm(self, request: Request) -> Response:
        return _json((await self._find(request)).status)

    async def _put_vm(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not is_name(name):
            problem = Problem(
                "name", "is not a VM's name", name[:100], "1 to 63 characters of a-z, 0-9 and -"
            )
            raise ConfigurationError(f"{name[:100]}.toml", [problem])
        there = Failure(412, f"there is a VM {name} already")
        if (only_new := only_if_none(request)) and name in self._host.vms:
            raise there
        is_new = await self._host.put(name, await file_text(request), only_new=only_new)
        if only_new and not is_new:  # another one was quicker, or put the file there by hand
            raise there
        status = self._vm(request).status
        return _json(status, 201, {"Location": f"/v1/vms/{name}"}) if is_new else _json(status)

    async def _delete_vm(self, request: Request) -> Response:
        self._vm(request)
        await self._host.delete(request.path_params["name"])
        return Response(status_code=204)

    async def _start_vm(self, request: Request) -> Response:
        return await _begin(vm := await self._find(request), vm.start())

    async def _stop_vm(self, request: Request) -> Response:
        return await _begin(vm := self._vm(request), vm.stop())

    async def _restart_vm(self, request: Request) -> Response:
        return await _begin(vm := self._vm(request), vm.restart())

    async def _kill_vm(self, request: Request) -> Response:
        return await _begin(vm := self._vm(request), vm.kill())

    async def _reload_vm(self, request: Request) -> Response:
        return await _begin(vm := self._vm(request), vm.reload())

    async def _swap_link(self, request: Request) -> Response:
        vm, link = self._link(request)
        return await _begin(vm, vm.swap(link))

    async def _get_forwards(self, request: Request) -> Response:
        vm, link = self._link(request)
        forwards = vm.forwards(link)
        return _json(Forwards(tcp=list(forwards.get("tcp", ())), udp=list(forwards.get("udp", ()))))

    async def _change_forwards(self, request: Request) -> Response:
        vm, link = self._link(request)
        change = await read_model(request, ForwardsChange)
        done = await vm.change_forwards(
            link,
            add=[(each.protocol, each.ports) for each in change.add],
            remove=[(each.protocol, each.ports) for each in change.remove],
        )
        return _json(ForwardsChanged(by=done.by, tcp=list(done.tcp), udp=list(done.udp)))

    async def _get_events(self, request: Request) -> EventStream:
        log, name = self._host.events, name_in_query(request, "vm")
        follow = flag(request, "follow", default=True)
        # Who follows may wait for one that is to come; and of one that has been there may still be events.
        if not (name is None or follow or name in self._host.vms or await _is_told_of(log, name)):
            raise _no_vm(name)
        after = request.headers.get("last-event-id") or request.query_params.get("after")
        return EventStream(
            log,
            after=log.last_id if after == "now" else after,
            vm=name,
            follow=follow,
            may=partial(self._may, request, Access.READ),
        )

    async def _get_metrics(self, request: Request) -> Response:
        from qrapd.metrics import scrape  # takes prometheus_client along, which is for those who ask for it

        body, content_type = await scrape(self._host, accept=request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def _get_health(self, _request: Request) -> Response:
        return _json(Health(status="ok", version=__version__))

    async def _get_openapi(self, _request: Request) -> Response:
        return Response(openapi_json(), media_type="application/json")

    # ---- the console

    async def _not_upgraded(self, request: Request) -> Response:
        self._check(request, Access.WRITE)
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        raise Failure(426, "the console is a WebSocket", headers=headers)

    async def _console(self, websocket: WebSocket) -> None:
        self._check(websocket, Access.WRITE)
        vm = self._vm(websocket)
        if (console := vm.console) is None:
            raise Failure(
                409, f"the VM {vm.status.name} does not run, or its console is not qrapd's (qemu.console)"
            )
        history = flag(websocket, "history", default=False)
        await bridge(websocket, console, history, may=partial(self._may, websocket, Access.WRITE))


class _Endpoint:
    """An ASGI application as Starlette's routes know one: by its not being a function."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _no_vm(name: str) -> Failure:
    return Failure(404, f"there is no VM {name}", hint="see which there are: qrapd ps, or GET /v1/vms")


async def _is_told_of(log: EventLog, vm: str) -> bool:
    """Whether events of this VM are kept, or have been."""
    news: AsyncIterator[object] = log.follow(None, vm, wait=False)
    async with aclosing(news) as kept:  # type: ignore[type-var]  # it is an asynchronous generator
        async for _ in kept:
            return True
    return False


async def _begin(vm: HostedVm, begun: Awaitable[None]) -> Response:
    await begun
    return _json(vm.status, 202)


def _json(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(model.model_dump_json(), status, headers, "application/json")
