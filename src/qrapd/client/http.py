# SPDX-License-Identifier: GPL-2.0-or-later
"""One socket of the API: questions to it, and its answers or its errors as qrapd's own."""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, NoReturn, Self
from urllib.parse import quote

import anyio
import httpx

from qrapd.client.stream import EventReader, ServerEvent
from qrapd.errors import ConfigurationError, Conflict, Problem, QrapdError, Unavailable, Unknown, UsageError

__all__ = ["ANSWER_TIMEOUT", "Client", "Forbidden", "Status", "Unreachable", "error_of"]

Status = dict[str, Any]
"""A VM's status as JSON has it: :class:`qrapd.vm_status.VmStatus`."""

ANSWER_TIMEOUT = 10.0
"""Seconds. A supervisor imports its server when it is called first, which takes it 40 ms of CPU time (measured): of a
hundred on two cores the last one has its turn after 2 s. And a lot of room."""

CHANGE_TIMEOUT = 60.0
"""Seconds for what is done before it is answered: a file is read and checked, passt is asked for its options."""

CONNECT_TIMEOUT = 3.0
"""Seconds. A connection to a UNIX socket waits for nobody, not even for a process that hangs, until its queue is full;
and anyio 4.16 waits for room in there without rest, at the cost of a processor."""

SILENCE = 60.0
"""Seconds without even a comment, of which one comes every 15 s, after which a stream of events is taken for lost."""

_RETRY = 0.2

Cause = Literal["absent", "refused", "denied", "silent", "broken"]


class Unreachable(Unavailable):
    """Nobody takes the call. ``cause``: no such socket, nobody listens, not for this user, no answer, hung up."""

    def __init__(self, socket: Path, cause: Cause, detail: str = "") -> None:
        words = {
            "absent": f"there is no socket {socket}",
            "refused": f"nobody listens on {socket}",
            "denied": f"the socket {socket} is closed to this user",
            "silent": f"{socket} does not answer",
            "broken": f"{socket} has broken off the call",
        }
        hint = "do this as the user who runs it, or as root" if cause == "denied" else None
        super().__init__(words[cause] + (f": {detail}" if detail else ""), hint=hint)
        self.socket = socket
        self.cause = cause


class Forbidden(Unavailable):
    """Not for this user, who need not ask again."""


class Client:
    """Speaks to one socket. A context manager; every call raises :class:`QrapdError` and nothing else of its own."""

    def __init__(self, socket: Path, *, timeout: float = ANSWER_TIMEOUT) -> None:
        self.socket = socket
        self._timeout = timeout
        self._http = httpx.AsyncClient(
            # No certificates are needed, and reading them takes longer than all else here.
            transport=httpx.AsyncHTTPTransport(uds=str(socket), verify=False),
            base_url="http://qrapd",
            timeout=_timeouts(timeout),
            trust_env=False,  # proxies and certificates are for the web
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def vms(self) -> list[Status]:
        """All VMs of this host."""
        answer = await self._ask("GET", "/v1/vms")
        if isinstance(answer, dict):
            answer = answer.get("vms")
        if not isinstance(answer, list) or not all(_is_status(each) for each in answer):
            self._refuse_stranger()
        return answer

    async def vm(self, name: str) -> Status:
        """One VM.

        :raise Unknown: it is not of this host.
        """
        return self._status(await self._ask("GET", _path(name)))

    async def act(self, name: str, action: str) -> Status:
        """Begin ``start``, ``stop``, ``restart``, ``kill`` or ``reload``."""
        return self._status(await self._ask("POST", _path(name, action), timeout=CHANGE_TIMEOUT))

    async def swap(self, name: str, link: int) -> Status:
        """Begin to replace a link's passt."""
        answer = await self._ask("POST", _path(name, "links", str(link), "swap"), timeout=CHANGE_TIMEOUT)
        return self._status(answer)

    async def forwards(self, name: str, link: int) -> dict[str, list[str]]:
        """What a link forwards now: ``tcp`` and ``udp``."""
        return self._mapping(await self._ask("GET", _path(name, "links", str(link), "forwards")))

    async def change_forwards(
        self,
        name: str,
        link: int,
        *,
        add: Iterable[tuple[str, str]] = (),
        remove: Iterable[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Forward other ports: pairs of ``tcp`` or ``udp`` and passt's words. The answer says ``by`` what means."""
        body = {
            key: wanted
            for key, forwards in (("add", add), ("remove", remove))
            if (wanted := [{"protocol": protocol, "ports": ports} for protocol, ports in forwards])
        }
        path = _path(name, "links", str(link), "forwards")
        return self._mapping(await self._ask("POST", path, body=body, timeout=CHANGE_TIMEOUT))

    async def events(
        self, vm: str | None = None, *, after: str | None = None, follow: bool = True, patience: float = 5.0
    ) -> AsyncGenerator[ServerEvent, None]:
        """What has happened and what happens; goes on after a lost connection where that broke off.

        :param after: only what comes after the event of this id; ``now``: what has not happened yet.
        :param follow: else all that there is, and no more.
        :param patience: seconds for which a lost server is called again.
        :raise Unreachable: it could not be reached, or has gone for good.
        """
        deadline = 0.0  # the first call is made once
        while True:
            try:
                async with aclosing(self._events_once(vm, after, follow=follow)) as events:
                    async for event in events:
                        after, deadline = event.id or after, anyio.current_time() + patience
                        yield event
                if not follow:
                    return
                deadline = max(deadline, anyio.current_time() + patience)
            except Unreachable as error:
                if error.cause == "silent" and deadline:
                    deadline = anyio.current_time() + patience  # it was there all the time
                elif anyio.current_time() > deadline:
                    raise
            await anyio.sleep(_RETRY)

    async def _events_once(
        self, vm: str | None, after: str | None, *, follow: bool
    ) -> AsyncGenerator[ServerEvent, None]:
        parameters = {"vm": vm} if vm else {}
        if not follow:
            parameters["follow"] = "false"
        if after is not None:
            parameters["after"] = after
        headers = {"Accept": "text/event-stream"}
        # What is kept comes at once, and the server ends the stream.
        reader, quiet = EventReader(), SILENCE if follow else self._timeout
        timeout = _timeouts(self._timeout, read=max(self._timeout, quiet))
        try:
            async with self._http.stream(
                "GET", "/v1/events", params=parameters, headers=headers, timeout=timeout
            ) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response.status_code, _json(response), self.socket)
                chunks = response.aiter_raw()
                while True:
                    chunk = None
                    # Around this one wait only: no scope may stay open while the caller has its turn.
                    with anyio.move_on_after(quiet) as waiting:
                        chunk = await anext(chunks, None)
                    if waiting.cancelled_caught and not follow:
                        raise Unreachable(self.socket, "silent")
                    if chunk is None:
                        return
                    for event in reader.feed(chunk):
                        yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    async def _ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Any:
        timeout = timeout or self._timeout
        try:
            with anyio.fail_after(timeout):  # httpx's own is for each step
                response = await self._http.request(method, path, json=body, timeout=_timeouts(timeout))
        except TimeoutError:
            raise Unreachable(self.socket, "silent") from None
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise error_of(response.status_code, _json(response), self.socket)
        return _json(response)

    def _unreachable(self, error: httpx.HTTPError) -> QrapdError:
        if isinstance(error, httpx.TimeoutException):
            return Unreachable(self.socket, "silent")
        numbers = {each.errno for each in _causes(error) if isinstance(each, OSError)}
        if numbers & {errno.ENOENT, errno.ENOTDIR}:
            return Unreachable(self.socket, "absent")
        if numbers & {errno.EACCES, errno.EPERM}:
            return Unreachable(self.socket, "denied")
        if errno.EMFILE in numbers:
            return Unavailable("too many files are open here", hint="raise the limit with: ulimit -n 1024")
        if errno.ECONNREFUSED in numbers:
            return Unreachable(self.socket, "refused")
        return Unreachable(self.socket, "broken", str(error))

    def _status(self, answer: Any) -> Status:
        if not _is_status(answer):
            self._refuse_stranger()
        return dict(answer)

    def _mapping(self, answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            self._refuse_stranger()
        return answer

    def _refuse_stranger(self) -> NoReturn:
        raise Unavailable(f"what answers on {self.socket} is no qrapd that this one understands")


def error_of(status: int, problem: Any, socket: Path) -> QrapdError:
    """An answer that is an error (RFC 9457) as the exception that the other side had."""
    problem = problem if isinstance(problem, dict) else {}
    message = str(
        problem.get("detail") or problem.get("title") or f"{socket} answers with HTTP status {status}"
    )
    hint = str(problem["hint"]) if problem.get("hint") else None
    problems = [
        Problem(
            str(each.get("key") or ""),
            str(each.get("reason") or each.get("detail") or ""),
            None if each.get("value") is None else str(each["value"]),
            str(each["hint"]) if each.get("hint") else None,
        )
        for each in problem.get("problems") or ()
        if isinstance(each, dict)
    ]
    if problems:
        return ConfigurationError(message.rpartition(": ")[0] or message, problems)
    if status == httpx.codes.NOT_FOUND:
        return Unknown(message, hint=hint)
    if status in (httpx.codes.CONFLICT, httpx.codes.PRECONDITION_FAILED):
        return Conflict(message, hint=hint)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Forbidden(message, hint=hint or "do this as the user who runs it, or as root")
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
        return Unavailable(message, hint=hint)
    if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
        return UsageError(message, hint=hint)
    if problem.get("reference"):
        hint = f"a bug in qrapd: whoever answers on {socket} has logged it with {problem['reference']}"
    return QrapdError(message, hint=hint)


def _timeouts(seconds: float, read: float | None = None) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT), read=read or seconds)


def _path(name: str, *more: str) -> str:
    return "/".join(("/v1/vms", quote(name, safe=""), *more))


def _is_status(answer: Any) -> bool:
    return isinstance(answer, dict) and {"name", "state"} <= answer.keys()


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):  # anyio tries several addresses, in general
            yield from error.exceptions
        error = error.__cause__ or error.__context__
