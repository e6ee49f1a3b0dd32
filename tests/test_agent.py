# SPDX-License-Identifier: GPL-2.0-or-later
"""The host agent with real QEMUs and passts: what it starts, leaves, takes over and lets be."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_runner import AgentHost, AgentRun, agent_host, identity, wait_until
from qrapd.errors import ExitStatus
from qrapd.guest import GuestImage
from support import PATIENCE, fetch, free_port


@pytest.fixture
def host(place: Path) -> Iterator[AgentHost]:
    """A host that has nothing yet."""
    with agent_host(place) as made:
        yield made


def power_off(agent: AgentRun, host: AgentHost) -> None:
    """As when the host goes down: the agent ends, and all its VMs."""
    assert ExitStatus.OK == agent.stop(signal.SIGPWR)
    agent.assert_no_bug()
    host.assert_nothing_left()


# ---- what runs, and the API


def test_autostart_and_what_the_api_does(host: AgentHost) -> None:
    """Only what its file says is started; all else is started, changed and ended on request."""
    for name in ("one", "two"):
        host.write(name)
    host.write("three", autostart=False)
    with host.agent() as agent:
        ready = agent.wait_for("agent.ready")
        assert (3, 0) == (ready["vms"], ready["adopted"])
        agent.wait_all("ready", ["one", "two"])
        assert ["one", "three", "two"] == list(agent.statuses())
        three = agent.status("three")
        assert ("exited", None, "agent") == (three["state"], three["qemu_pid"], three["origin"])

        agent.act("three", "start")
        three = agent.wait_state("three", "ready")
        assert 409 == agent.request("POST", "/v1/vms/three/start").status_code
        two = identity(agent.status("two"))

        before = identity(agent.status("one"))
        agent.swap("one")
        after = identity(agent.status("one"))
        assert before[0] == after[0]
        assert before[1][0][0] != after[1][0][0]
        assert before[1][0][1] + 1 == after[1][0][1]
        assert 404 == agent.request("POST", "/v1/vms/one/links/1/swap").status_code

        agent.act("one", "restart")
        agent.wait_for_other_qemu("one", after[0])

        agent.act("one", "kill")
        agent.wait_state("one", "exited")
        assert "SIGKILL" in [each["how"] for each in agent.told("vm.stopping", vm="one")]
        assert 409 == agent.request("POST", "/v1/vms/one/links/0/swap").status_code
        agent.act("one", "kill")  # there is nothing to end: nothing happens
        agent.act("one", "restart")
        agent.wait_state("one", "ready")

        agent.act("three", "stop")
        agent.wait_state("three", "exited")
        agent.act("three", "stop")
        assert 409 == agent.request("POST", "/v1/vms/three/reload").status_code
        assert 404 == agent.request("POST", "/v1/vms/four/start").status_code

        assert two == identity(agent.status("two"))
        power_off(agent, host)


def test_reload_of_one_vm(host: AgentHost) -> None:
    """Other ports are another passt under the same QEMU; a wrong file changes nothing and is the caller's to know."""
    vm = host.write("one")
    other = host.write("two")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = {name: identity(each) for name, each in agent.wait_all("ready", ["one", "two"]).items()}
        port = free_port()
        vm.path.write_text(vm.path.read_text().replace(str(vm.ports[0]), str(port)))
        other.path.write_text(other.path.read_text().replace(str(other.ports[0]), str(free_port())))
        agent.act("one", "reload")
        agent.wait_for("link.restored", vm="one")
        assert [f"127.0.0.1/{port}:80"] == agent.get("/v1/vms/one/links/0/forwards")["tcp"]
        assert before["one"][0] == agent.status("one")["qemu_pid"]
        assert before["two"] == identity(agent.status("two"))

        vm.path.write_text("memory = 1\n")
        now = identity(agent.status("one"))
        answer = agent.request("POST", "/v1/vms/one/reload")
        assert 422 == answer.status_code, answer.text
        assert "memory" in answer.text
        assert now == identity(agent.status("one"))
        power_off(agent, host)


# ---- the agent goes and comes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_next_agent_takes_over(host: AgentHost, number: signal.Signals) -> None:
    """Whatever became of the last one: the same QEMUs, the same passts, and what was not autostarted as well."""
    for name in ("one", "two"):
        host.write(name, links=2)
    host.write("three", autostart=False)
    host.write("four", autostart=False)
    names = ["one", "two", "three"]
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.act("three", "start")
        agent.wait_all("ready", names)
        agent.swap("one", 1)
        before = {name: identity(agent.status(name)) for name in names}
        status = agent.stop(number)
        assert (ExitStatus.OK if number != signal.SIGKILL else -number) == status
    assert 3 + 5 == sum(child.alive for child in host.known.values())
    with host.agent() as agent:
        assert 3 == agent.wait_for("agent.ready")["adopted"]
        assert before == {name: identity(agent.wait_state(name, "ready")) for name in names}
        assert "exited" == agent.status("four")["state"]
        assert [] == agent.told("vm.started")
        agent.swap("one", 1)
        agent.act("two", "restart")
        agent.wait_for_other_qemu("two", before["two"][0])
        power_off(agent, host)


def test_an_upgrade_in_place(host: AgentHost) -> None:
    """The same process becomes the next agent; who asks meanwhile waits, and is answered by that one."""
    names = [f"vm{number}" for number in range(4)]
    for name in names:
        host.write(name)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = {name: identity(each) for name, each in agent.wait_all("ready", names).items()}
        answers: list[int] = []
        failures: list[str] = []
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                try:
                    answers.append(agent.request("GET", "/healthz").status_code)
                except Exception as error:
                    failures.append(repr(error))

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for each in asking:
            each.start()
        try:
            for _ in range(2):
                agent.process.send_signal(signal.SIGUSR2)
                assert 4 == agent.wait_for("agent.ready")["adopted"]
                assert agent.process.poll() is None
            asked = len(answers)
            wait_until(lambda: len(answers) > asked + 8, "answers of the new agent")
        finally:
            over.set()
            for each in asking:
                each.join(PATIENCE)
        assert [] == failures
        assert {200} == set(answers)
        assert before == {name: identity(agent.status(name)) for name in names}
        agent.swap("vm0")
        power_off(agent, host)


@pytest.mark.guest
def test_the_host_goes_down(host: AgentHost, guest: GuestImage) -> None:
    """SIGPWR: a guest powers down in order, and one that does not heed its power button is ended."""
    vm = host.write("guest", guest=guest, qemu="powerdown_timeout = 60")
    host.write("deaf")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_all("ready", ["guest", "deaf"])
        fetch(vm.ports[0])
        assert ExitStatus.OK == agent.stop(signal.SIGPWR)
        assert "power-down" == agent.last("agent.stopping")["how"]
        assert ["power-down"] == [each["how"] for each in agent.told("vm.stopping", vm="guest")]
        assert ["power-down", "quit"] == [each["how"] for each in agent.told("vm.stopping", vm="deaf")]
        assert ["request"] * 2 == [each["reason"] for each in agent.told("vm.exited")]
        agent.assert_no_bug()
        host.assert_nothing_left()


def test_two_agents(host: AgentHost) -> None:
    """One for each runtime directory; the other one says so and touches nothing."""
    host.write("one")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = identity(agent.wait_state("one", "ready"))
        with host.agent() as second:
            assert ExitStatus.ALREADY_SUPERVISED == second.wait()
            assert [] == second.told("agent.ready")
            assert any("agent already" in str(line) for line in [*second.stray, *second.events])
        assert before == identity(agent.status("one"))
        power_off(agent, host)


# ---- SIGHUP


def test_reading_all_files_again(host: AgentHost) -> None:
    """Only what changed is touched; new ones are started, and what was stopped stays so."""
    files = {name: host.write(name, links=2) for name in ("changed", "same", "wrong", "stopped", "failed")}
    busy = free_port()
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = {name: identity(each) for name, each in agent.wait_all("ready", list(files)).items()}
        agent.act("stopped", "stop")
        agent.wait_state("stopped", "exited")

        changed = files["changed"]
        changed.path.write_text(changed.path.read_text().replace(str(changed.ports[1]), str(busy)))
        files["wrong"].path.write_text("[qemu]\nargs = 1\n")
        host.write("new")
        host.write("later", autostart=False)
        (host.vms / "broken.toml").write_text("autostart = true\n[nonsense")
        (host.vms / ".new.toml.swp").write_text("no VM's file")
        agent.process.send_signal(signal.SIGHUP)
        reloaded = agent.wait_for("agent.reloaded")
        assert (["changed"], ["new"]) == (reloaded["changed"], reloaded["started"])
        agent.wait_state("new", "ready")
        wait_until(lambda: agent.told("link.restored", vm="changed", link=1) != [], "the changed link")

        now = agent.statuses()
        assert identity(now["same"]) == before["same"]
        assert identity(now["wrong"]) == before["wrong"]
        assert "ready" == now["wrong"]["state"]
        assert identity(now["changed"])[0] == before["changed"][0]
        assert identity(now["changed"])[1][0] == before["changed"][1][0]
        assert identity(now["changed"])[1][1][1] == before["changed"][1][1][1] + 1
        assert ("exited", "exited", "failed") == tuple(
            now[name]["state"] for name in ("stopped", "later", "broken")
        )
        assert now["broken"]["error"]
        assert agent.told("config.invalid", vm="wrong")
        assert agent.told("config.invalid", vm="broken")

        # Put right again, and another one away.
        (host.vms / "broken.toml").unlink()
        (host.vms / "later.toml").unlink()
        (host.vms / "same.toml").unlink()
        agent.process.send_signal(signal.SIGHUP)
        reloaded = agent.wait_for("agent.reloaded")
        assert ([], []) == (reloaded["changed"], reloaded["started"])
        now = agent.statuses()
        assert {"changed", "failed", "new", "same", "stopped", "wrong"} == now.keys()
        assert identity(now["same"]) == before["same"]
        power_off(agent, host)


def test_own_file_read_again(host: AgentHost) -> None:
    """A wrong agent.toml is told of, and all goes on."""
    host.write("one")
    own = host.place / "agent.toml"
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = identity(agent.wait_state("one", "ready"))
        own.write_text("starts_at_once = 0\n")
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("config.invalid", file=str(own))
        agent.wait_for("agent.reloaded")
        assert before == identity(agent.status("one"))
        power_off(agent, host)
    with host.agent() as agent:  # it does not begin with one that is wrong
        assert ExitStatus.CONFIGURATION == agent.wait()


# ---- files by the API


def test_a_new_file(host: AgentHost) -> None:
    """It is enough that it is there: nobody has to reload before a start."""
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        assert 404 == agent.request("POST", "/v1/vms/late/start").status_code
        host.write("late", autostart=False)
        assert 404 == agent.request("GET", "/v1/vms/..").status_code
        assert "exited" == agent.status("late")["state"]
        agent.act("late", "start")
        agent.wait_state("late", "ready")
        agent.assert_no_bug()
        power_off(agent, host)


def test_put_and_delete(host: AgentHost) -> None:
    """As TOML and as JSON; wrong ones are refused and nothing is written."""
    port = free_port()
    text = '[qemu]\nargs = ["-m", "32M"]\npowerdown_timeout = 0.2\n'
    text += f'[[link]]\n[link.passt]\ntcp_ports = ["127.0.0.1/{port}:80"]\n'
    as_toml = {"content-type": "application/toml"}
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        answer = agent.request("PUT", "/v1/vms/web", content=text, headers=as_toml)
        assert (201, "exited") == (answer.status_code, answer.json()["state"])
        assert text == (host.vms / "web.toml").read_text()
        agent.act("web", "start")
        before = identity(agent.wait_state("web", "ready"))
        assert 409 == agent.request("DELETE", "/v1/vms/web").status_code

        # It goes on by the old file until a reload.
        other = text.replace(str(port), str(free_port()))
        assert 200 == agent.request("PUT", "/v1/vms/web", content=other, headers=as_toml).status_code
        assert before == identity(agent.status("web"))
        agent.act("web", "reload")
        wait_until(lambda: identity(agent.status("web"))[1][0][1] == before[1][0][1] + 1, "another passt")
        never = {**as_toml, "if-none-match": "*"}
        assert 412 == agent.request("PUT", "/v1/vms/web", content=text, headers=never).status_code
        assert other == (host.vms / "web.toml").read_text()

        body = {"qemu": {"args": ["-m", "32M"], "powerdown_timeout": 0.2}, "link": []}
        assert 201 == agent.request("PUT", "/v1/vms/json", json=body).status_code
        agent.act("json", "start")
        agent.wait_state("json", "ready")

        refused = [("web", 'memory = "1G"\n' + text), ("web", 'name = "other"\n' + text), ("x", "[nonsense")]
        for name, wrong in refused:
            answer = agent.request("PUT", f"/v1/vms/{name}", content=wrong, headers=as_toml)
            assert 422 == answer.status_code, answer.text
            assert "application/problem+json" == answer.headers["content-type"]
        assert {"json.toml", "web.toml"} == {each.name for each in host.vms.iterdir()}

        agent.act("web", "stop")
        agent.wait_state("web", "exited")
        assert 204 == agent.request("DELETE", "/v1/vms/web").status_code
        assert 404 == agent.request("DELETE", "/v1/vms/web").status_code
        assert not (host.vms / "web.toml").exists()
        assert ["json"] == list(agent.statuses())
        power_off(agent, host)


def test_where_files_cannot_be_written(host: AgentHost) -> None:
    """As under the unit's ProtectSystem=: the caller is told, and the VM stays as it is."""
    vm = host.write("one")
    before_text = vm.path.read_text()
    # Root may write anywhere but on a file system that is read-only, here for the agent alone.
    mount = f"mount --bind {host.vms} {host.vms} && mount -o remount,bind,ro {host.vms}"
    prefix = ["unshare", "--mount", "sh", "-c", f'{mount} && exec {sys.executable} -m "$@"', "sh"]
    if subprocess.run([*prefix[:4], mount], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system; this test run is unprivileged")
    with host.agent(prefix=prefix) as agent:
        agent.wait_for("agent.ready")
        agent.wait_state("one", "ready")
        toml = {"content-type": "application/toml"}
        for name in ("one", "two"):
            answer = agent.request("PUT", f"/v1/vms/{name}", content="[qemu]\nargs = []\n", headers=toml)
            assert 503 == answer.status_code, answer.text
            assert "Read-only file system" in answer.json()["detail"]
        assert ["one"] == list(agent.statuses())
        agent.act("one", "stop")
        agent.wait_state("one", "exited")
        answer = agent.request("DELETE", "/v1/vms/one")
        assert 503 == answer.status_code, answer.text
        assert ["one"] == list(agent.statuses())
        assert before_text == vm.path.read_text()
        power_off(agent, host)
