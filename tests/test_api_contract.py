# SPDX-License-Identifier: GPL-2.0-or-later
"""The API does what its OpenAPI document says, whatever is sent: schemathesis over the UNIX socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, settings
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from api_host import PretendedHost
from qrapd.api.access import Policy
from qrapd.api.app import make_app
from qrapd.api.openapi import Operation
from qrapd.api.operations import OPERATIONS, openapi_document
from serving import serving
from support import PATIENCE, open_directory

Case = schemathesis.Case[Any]

REFUSALS = ["400", "404", "405", "409", "412", "413", "415", "422"]
"""What may answer to data that is wrong; 412 where there is such a VM already, before the data is looked at."""

CONFIG = {"seed": 1, "checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}

schema = schemathesis.openapi.from_dict(openapi_document(), config=SchemathesisConfig.from_dict(CONFIG))

# What JSON Schema can say is less than what is checked: two ports that clash, a word that is no port.
EXCLUDED: Any = [CHECKS.get_one("positive_data_acceptance")]


@schemathesis.serializer("application/toml")
def as_toml(_context: schemathesis.SerializationContext, value: Any) -> bytes:
    """TOML is sent as the text that it is; what is made up for it is seldom TOML."""
    return str(value).encode("utf-8", errors="replace")


class Served:
    """The API in a thread of its own, on a socket."""

    def __init__(self, directory: Path) -> None:
        self.host = PretendedHost("db", "web")
        self.reports: list[tuple[str, BaseException]] = []
        self._directory = directory
        self._ready, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        def report(where: str, error: BaseException) -> None:
            self.reports.append((where, error))

        self._loop = asyncio.get_running_loop()
        async with serving(self._directory, make_app(self.host, Policy(own_uid=0), report=report)) as server:
            self.path = server.path
            server.reports = self.reports
            self._ready.set()
            await self._over.wait()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        transport = httpx.HTTPTransport(uds=str(self.path))
        self.client = httpx.Client(transport=transport, timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)

    def call(self, case: Case) -> httpx.Response:
        """Send what schemathesis has made up, byte by byte."""
        made = requests.Request(**plain(case)).prepare()
        try:
            headers: Any = dict(made.headers)
            content: Any = made.body
            return self.client.request(made.method or "", made.url or "", headers=headers, content=content)
        except (httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError):
            assume(False)  # nothing that a client of HTTP could send
            raise


def plain(case: Case) -> dict[str, Any]:
    """The parts of a request. Events end here after those that have been: a stream has no end to wait for."""
    if case.operation.path == "/v1/events" and case.query.get("follow") in (None, True, "true"):
        case.query = {**case.query, "follow": "false"}
    return dict(case.as_transport_kwargs(base_url="http://localhost"))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with open_directory() as directory, Served(directory) as made:
        yield made


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_the_documents_examples(served: Served, operation: Operation) -> None:
    """Every operation succeeds with the examples that the document gives."""
    document = openapi_document()["paths"][operation.path][operation.method.lower()]
    parameters = {each["name"]: each for each in document.get("parameters", [])}
    path = operation.path
    for name, each in parameters.items():
        path = path.replace(f"{{{name}}}", str(each.get("example")))
    query = {
        name: str(each["example"]).lower()
        for name, each in parameters.items()
        if each["in"] == "query" and "example" in each
    }
    bodies = [
        (media_type, example["value"])
        for media_type, content in document.get("requestBody", {}).get("content", {}).items()
        for example in content["examples"].values()
    ]
    for media_type, value in bodies or [("", None)]:
        served.host.begin("db", "web")  # what came before is not to matter
        vm = served.host.vms["web"]
        vm.state = "exited" if operation.name in {"start_vm", "delete_vm"} else "ready"
        content = {"json": value} if media_type == "application/json" else {"content": value}
        headers = {"Content-Type": media_type} if media_type else {}
        response = served.client.request(
            operation.method, f"http://localhost{path}", params=query, headers=headers, **content
        )
        assert response.status_code in operation.answers, response.text
        schema[operation.path][operation.method].validate_response(response)
    assert [] == served.reports


@schema.parametrize()
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=15,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_sent(case: Case, served: Served) -> None:
    """No failure of the server's, and every answer is one that the document has: its status, type and schema."""
    if len(served.host.vms) > 20 or "web" not in served.host.vms:
        served.host.begin("db", "web")  # something to work on
    response = served.call(case)
    case.validate_response(response, excluded_checks=EXCLUDED)
    assert [] == served.reports
