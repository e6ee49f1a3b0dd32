# SPDX-License-Identifier: GPL-2.0-or-later
"""Every operation of the API, once: the routes and the OpenAPI document both come from here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from qrapd import __version__
from qrapd.api.access import Access
from qrapd.api.models import Forwards, ForwardsChange, ForwardsChanged, Health, ProblemDocument, ServerEvent
from qrapd.api.openapi import Answer, Content, Operation, Parameter, document
from qrapd.config import NAME_PATTERN, VmFile
from qrapd.vm_status import VmStatus

__all__ = ["CONSOLE_PATH", "OPERATIONS", "openapi_document", "openapi_json"]

CONSOLE_PATH = "/v1/vms/{name}/console"
"""A WebSocket, which OpenAPI has no words for."""

_ANYBODY, _READ, _WRITE = Access.NONE, Access.READ, Access.WRITE
_VM, _LINK = "/v1/vms/{name}", "/v1/vms/{name}/links/{index}"

_NAME = Parameter("name", "path", "the VM's name", {"type": "string", "pattern": NAME_PATTERN}, "web")
_INDEX = Parameter(
    "index", "path", "the link's place in the VM's file, from 0", {"type": "integer", "minimum": 0}, 0
)

_STATUS = [Content(model=VmStatus)]
_METRICS = [Content("text/plain"), Content("application/openmetrics-text")]
_BEGUN = {202: Answer("it has begun; the events tell what comes of it", _STATUS)}

_FILE_AS_TOML = '[qemu]\nargs = ["-m", "1G"]\n\n[[link]]\n[link.passt]\ntcp_ports = ["8080:80"]\n'
_FILE_AS_JSON = {"qemu": {"args": ["-m", "1G"]}, "link": [{"passt": {"tcp_ports": ["8080:80"]}}]}
_FORWARDS = {"one more": {"add": [{"protocol": "tcp", "ports": "8443:443"}]}}


def _action(name: str, summary: str, description: str = "") -> Operation:
    return Operation(
        f"{name}_vm",
        "POST",
        f"{_VM}/{name}",
        summary,
        _WRITE,
        _BEGUN,
        (404, 409),
        (_NAME,),
        description=description,
    )


OPERATIONS = (
    Operation(
        "list_vms", "GET", "/v1/vms", "All VMs", _READ,
        {200: Answer("the VMs", [Content(model=VmStatus, many=True)])},
    ),
    Operation("get_vm", "GET", _VM, "One VM", _READ, {200: Answer("the VM", _STATUS)}, (404,), (_NAME,)),
    Operation(
        "put_vm",
        "PUT",
        _VM,
        "Write a VM's file",
        _WRITE,
        {
            200: Answer("another file was in its place; a VM that runs goes on by that until a reload", _STATUS),
            201: Answer("it is new", _STATUS, {"Location": "the VM's path"}),
        },
        (400, 409, 412, 413, 415, 422),
        (
            _NAME,
            Parameter(
                "If-None-Match", "header", "`*`: only if there is no such VM", {"type": "string", "enum": ["*"]}
            ),
        ),
        (
            Content("application/toml", examples={"one link": _FILE_AS_TOML}),
            Content(model=VmFile, examples={"one link": _FILE_AS_JSON}),
        ),
        "Nothing is written if anything is wrong with it. Of JSON, null is left out: TOML does not have it.",
    ),
    Operation(
        "delete_vm", "DELETE", _VM, "Remove the file of a VM that does not run", _WRITE,
        {204: Answer("it is gone")}, (404, 409), (_NAME,),
    ),
    _action("start", "Start it"),
    _action("stop", "Have the guest power down", "Nothing happens to a VM that does not run."),
    _action("restart", "Stop it in order and start it again", "It starts by its file as that is then."),
    _action("kill", "End QEMU at once", "By SIGKILL: the guest loses what it has not written to its disks."),
    Operation(
        "reload_vm", "POST", f"{_VM}/reload", "Read its file again and apply what can be applied", _WRITE,
        _BEGUN, (404, 409, 422), (_NAME,),
    ),
    Operation(
        "swap_link", "POST", f"{_LINK}/swap", "Replace a link's passt under the running NIC", _WRITE,
        _BEGUN, (404, 409), (_NAME, _INDEX),
    ),
    Operation(
        "get_forwards", "GET", f"{_LINK}/forwards", "What a link forwards now", _READ,
        {200: Answer("in passt's own words", [Content(model=Forwards)])}, (404, 409), (_NAME, _INDEX),
    ),
    Operation(
        "change_forwards",
        "POST",
        f"{_LINK}/forwards",
        "Forward other ports, until the VM ends",
        _WRITE,
        {200: Answer("it is done", [Content(model=ForwardsChanged)])},
        (400, 404, 409, 413, 415, 422),
        (_NAME, _INDEX),
        (Content(model=ForwardsChange, examples=_FORWARDS),),
        "The VM's file stays as it is.",
    ),
    Operation(
        "get_events",
        "GET",
        "/v1/events",
        "What happens, as server-sent events",
        _READ,
        {200: Answer("one after the other; the schema is that of each", [Content("text/event-stream", ServerEvent)])},
        (404, 422),
        (
            Parameter("vm", "query", "only of this VM", {"type": "string", "pattern": NAME_PATTERN}, "web"),
            Parameter(
                "after",
                "query",
                "the id of the last event that is known; `now`: none that has been; default: all that is kept",
                {"type": "string"},
                "now",
            ),
            Parameter(
                "follow",
                "query",
                "false: end after what has been, or 404 where there is no such VM and nothing is kept of one",
                {"type": "boolean", "default": True},
                False,
            ),
            Parameter("Last-Event-ID", "header", "as `after`, and before it", {"type": "string"}),
        ),
        description="Where events are gone that come after that id, there is one `events.missed` without an id. "
        "Lines of guests and of passt are not among them. A comment comes whenever 15 s have passed in silence.",
    ),
    Operation(
        "get_metrics", "GET", "/metrics", "Metrics for Prometheus", _READ,
        {200: Answer("for whoever asks for it, in OpenMetrics' format", _METRICS)},
    ),
    Operation(
        "get_health", "GET", "/healthz", "Whether somebody is there", _ANYBODY,
        {200: Answer("yes", [Content(model=Health)])},
    ),
    Operation(
        "get_openapi", "GET", "/openapi.json", "This document", _ANYBODY,
        {200: Answer("OpenAPI 3.1", [Content(kind="object")])},
    ),
)  # fmt: skip

_DESCRIPTION = f"""\
VMs of this host's agent, or the one VM of a supervisor, on a UNIX socket.

Who may do what is decided by the user and the groups of whoever connects. To look on needs one right, to change \
anything another, and a peer without either can ask for `/healthz` and this document. Errors are \
application/problem+json (RFC 9457).

The guest's serial console is a WebSocket at `{CONSOLE_PATH}`, for whoever may write: binary messages are the bytes of \
the terminal, both ways; `?history=true` first sends what the guest said before.
"""


@cache
def openapi_document() -> dict[str, Any]:
    """The OpenAPI document; made when it is first asked for."""
    return document(OPERATIONS, ProblemDocument, title="qrapd", version=__version__, description=_DESCRIPTION)


@cache
def openapi_json() -> bytes:
    """The same as it is sent. It is large, everybody may ask for it, and to write it takes the event loop 1 ms."""
    return json.dumps(openapi_document(), ensure_ascii=False, separators=(",", ":")).encode()
