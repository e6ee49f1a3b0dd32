# SPDX-License-Identifier: GPL-2.0-or-later
"""A real agent does what its OpenAPI document says, whatever is sent: schemathesis, with real QEMUs and passts.

What is sent writes files, and starts what they name. So the files that are made up go to names that are never started,
and the names that are started have files out of a short list.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig

from agent_process import AgentProcess, agent_process, eventually, vm_text
from qrapd.api.operations import OPERATIONS, openapi_document
from support import free_port
from test_api_contract import CONFIG, EXCLUDED, Case, as_toml, plain

__all__ = ["as_toml"]

pytestmark = [pytest.mark.xdist_group("agent"), pytest.mark.timeout(300)]

schema = schemathesis.openapi.from_dict(openapi_document(), config=SchemathesisConfig.from_dict(CONFIG))

STARTED = ("web", "db")
"""Names that are started, by files of ours only."""

WRITTEN = "written"
"""The name for files that are made up. It is never started."""

STARTING = {"start_vm", "restart_vm"}


class Served:
    """An agent whose API is asked."""

    def __init__(self, agent: AgentProcess) -> None:
        self.agent = agent
        self.ports = {name: free_port() for name in STARTED}
        self.files = {
            name: [vm_text(links=1, tcp_ports=[f"127.0.0.1/{port}:80"]), vm_text(links=2)]
            for name, port in self.ports.items()
        }
        self.files["db"].append(vm_text())
        for name, texts in self.files.items():
            (agent.files / f"{name}.toml").write_text(texts[0])
        agent.start()

    def bring(self, name: str, *, up: bool) -> None:
        """See to it that there is this VM, and that it runs or does not."""
        if name not in self.agent.vms():
            self.put(name, self.files[name][0])
        state = self.agent.wait_for_state(name, "ready", "exited", "failed")["state"]
        if (state == "ready") is not up:
            self.agent.client.post(f"/v1/vms/{name}/{'start' if up else 'kill'}")
            self.agent.wait_for_state(name, *(["ready"] if up else ["exited", "failed"]))

    def put(self, name: str, text: str) -> httpx.Response:
        return self.agent.client.put(
            f"/v1/vms/{name}", content=text, headers={"Content-Type": "application/toml"}
        )

    def assert_no_bug(self) -> None:
        assert [] == [each for each in self.agent.events() if each["event"] == "bug.found"]
        assert [] == self.agent.stray()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with agent_process() as agent:
        made = Served(agent)
        yield made
        agent.end(signal.SIGPWR)
        agent.assert_nothing_left()


def test_the_document_is_the_one_that_is_served(served: Served) -> None:
    """By which the next tests go."""
    assert openapi_document() == served.agent.client.get("/openapi.json").json()


def test_every_operation_succeeds(served: Served) -> None:
    """Each is answered with 2xx at least once, by what the document says of it, and does what it is for."""
    agent, succeeded = served.agent, set[str]()

    def ask(method: str, path: str, name: str = "web", **content: Any) -> httpx.Response:
        operation = next(each for each in OPERATIONS if (each.method, each.path) == (method, path))
        answer = agent.client.request(method, path.format(name=name, index=0), **content)
        assert answer.status_code in operation.answers, (method, path, answer.text)
        schema[path][method].validate_response(answer)
        succeeded.add(operation.name)
        return answer

    vm, link = "/v1/vms/{name}", "/v1/vms/{name}/links/{index}"
    port = free_port()
    ask("GET", "/healthz")
    ask("GET", "/openapi.json")
    # As the JSON that it is described by, and as TOML.
    file = {"qemu": {"args": ["-m", "32M"], "powerdown_timeout": 0}, "link": [{}]}
    assert ask("PUT", vm, "new", json=file).status_code == 201
    toml: dict[str, Any] = {
        "content": served.files["web"][0],
        "headers": {"Content-Type": "application/toml"},
    }
    assert ask("PUT", vm, **toml).status_code == 200
    assert {"db", "new", "web"} <= {each["name"] for each in ask("GET", "/v1/vms").json()}
    for name in ("new", "web"):
        ask("POST", f"{vm}/start", name)
        agent.wait_for_state(name, "ready")
    first = ask("GET", vm).json()
    ask("POST", f"{link}/swap")
    eventually(lambda: agent.vm("web")["links"][0]["generation"] > first["links"][0]["generation"], "no swap")
    agent.wait_for_state("web", "ready")
    change = {"add": [{"protocol": "tcp", "ports": f"127.0.0.1/{port}:80"}]}
    ask("POST", f"{link}/forwards", json=change)
    assert any(str(port) in each for each in ask("GET", f"{link}/forwards").json()["tcp"])
    agent.wait_for_state("web", "ready")
    ask("POST", f"{vm}/reload")
    agent.wait_for_state("web", "ready")
    ask("POST", f"{vm}/restart")
    eventually(lambda: agent.vm("web")["qemu_pid"] not in (None, first["qemu_pid"]), "no restart")
    agent.wait_for_state("web", "ready")
    assert "qrapd_vm" in ask("GET", "/metrics").text
    assert "vm.ready" in ask("GET", "/v1/events", params={"follow": "false"}).text
    ask("POST", f"{vm}/stop")
    ask("POST", f"{vm}/kill", "new")
    for name in ("new", "web"):
        agent.wait_for_state(name, "exited")
    ask("DELETE", vm, "new")
    assert "new" not in agent.vms()
    assert sorted(each.name for each in OPERATIONS) == sorted(succeeded)
    assert not [each for each in agent.running() if each.is_qemu or each.is_passt]
    served.assert_no_bug()


@schema.given(data=st.data())
@schema.parametrize()
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_sent(case: Case, served: Served, data: st.DataObject) -> None:
    """No failure of the agent's, and every answer is one that the document has: its status, type and schema."""
    aim(case, served, data)
    answer = send(case, served)
    case.validate_response(answer, excluded_checks=EXCLUDED)
    served.assert_no_bug()


def aim(case: Case, served: Served, data: st.DataObject) -> None:
    """Have most of what is made up hit something, and nothing of it run what it likes."""
    operation = next(
        each for each in OPERATIONS if (each.method, each.path) == (case.method, case.operation.path)
    )
    if "name" not in case.path_parameters:
        return
    right = case.meta is None or case.meta.generation.mode.is_positive
    if operation.name == "put_vm":
        if right and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(STARTED))
            case.path_parameters["name"] = name
            case.body, case.media_type = data.draw(st.sampled_from(served.files[name])), "application/toml"
        elif case.path_parameters["name"] in STARTED or right:
            case.path_parameters["name"] = WRITTEN
        return
    if right and data.draw(st.integers(0, 3)):
        of_a_link = "index" in case.path_parameters
        # The first has a link, whatever has been written to it, and forwards are for what runs.
        name = STARTED[0] if of_a_link else data.draw(st.sampled_from(STARTED))
        case.path_parameters["name"] = name
        served.bring(name, up=data.draw(st.sampled_from([True, True, False] if of_a_link else [True, False])))
        if of_a_link:
            case.path_parameters["index"] = data.draw(st.sampled_from([0, 0, 0, 1, 2]))
    elif operation.name in STARTING:
        # A file that was made up may have been written by this name.
        assume(
            case.path_parameters["name"] in STARTED or case.path_parameters["name"] not in served.agent.vms()
        )


def send(case: Case, served: Served) -> httpx.Response:
    """Byte by byte."""
    made = requests.Request(**plain(case)).prepare()
    try:
        headers: Any = dict(made.headers)
        content: Any = made.body
        return served.agent.client.request(
            made.method or "", made.url or "", headers=headers, content=content
        )
    except (httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError):
        assume(False)  # nothing that a client of HTTP could send
        raise
