# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong with one VM of the agent, with its host or with its callers is nothing to the other VMs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from agent_runner import AgentHost, AgentRun, Status, agent_host, identity, patched, wait_until
from qrapd.errors import ExitStatus
from qrapd.qmp import COMMAND_TIMEOUT
from qrapd.runtime_directory import VmDirectory
from support import NOBODY, PATIENCE, Run, free_port, write_vm


@pytest.fixture
def host(place: Path) -> Iterator[AgentHost]:
    """A host that has nothing yet."""
    with agent_host(place) as made:
        yield made


def power_off(agent: AgentRun, host: AgentHost) -> None:
    """As when the host goes down: the agent ends, and all its VMs."""
    assert ExitStatus.OK == agent.stop(signal.SIGPWR)
    host.assert_nothing_left()


# ---- one VM


def is_another(agent: AgentRun, status: Status) -> bool:
    """Whether the VM's QEMU is not the one that it was."""
    return bool(agent.status(str(status["name"]))["qemu_pid"] != status["qemu_pid"])


def write_restarting(host: AgentHost, name: str) -> None:
    """One that is started again, a while after it has failed."""
    vm = host.write(name)
    vm.path.write_text(f'{vm.path.read_text()}\n[restart]\npolicy = "on-failure"\n')


def test_a_place_is_given_back_by_a_second_try(host: AgentHost) -> None:
    """The first QEMU fails, the second one comes up: the VM after it gets its place."""
    (host.place / "agent.toml").write_text("starts_at_once = 1\n")
    marker, program = host.place / "tried", host.place / "qemu-once"
    qemu = shutil.which("qemu-system-x86_64")
    program.write_text(f'#!/bin/sh\n[ -e {marker} ] || {{ : >{marker}; exit 1; }}\nexec {qemu} "$@"\n')
    program.chmod(0o755)
    vm = host.write("a", qemu=f'binary = "{program}"\nsandbox = false\npowerdown_timeout = 0.2')
    vm.path.write_text(f'{vm.path.read_text()}\n[restart]\npolicy = "on-failure"\n')
    for name in ("b", "c"):
        host.write(name)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_all("ready", ["a", "b", "c"])
        assert 1 == agent.status("a")["restarts"]
        agent.assert_no_bug()
        power_off(agent, host)


def test_what_waits_for_its_restart_comes_back_under_the_next_agent(host: AgentHost) -> None:
    """Whether the agent ends in order or not: the file says so."""
    write_restarting(host, "web")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        status = agent.wait_state("web", "ready")
        while not any(each["delay_ms"] > 1000 for each in agent.told("vm.restarting")):
            os.kill(status["qemu_pid"], signal.SIGKILL)
            wait_until(partial(is_another, agent, status), "it runs on")
            if agent.told("vm.restarting")[-1]["delay_ms"] <= 1000:
                status = agent.wait_state("web", "ready")
        assert ExitStatus.OK == agent.stop(signal.SIGTERM)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_state("web", "ready")
        power_off(agent, host)


def test_who_is_powering_down_is_not_hurried(host: AgentHost) -> None:
    """A stop after a restart, and the host's going down after a stop, leave the guest the time that it has."""
    host.write("web", qemu="powerdown_timeout = 3")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_state("web", "ready")
        agent.act("web", "restart")
        agent.wait_for("vm.stopping", vm="web")
        agent.act("web", "stop")
        agent.act("web", "stop")
        assert ExitStatus.OK == agent.stop(signal.SIGPWR)
        first, second = agent.told("vm.stopping", vm="web")
        assert ("power-down", "quit") == (first["how"], second["how"])
        seconds = datetime.fromisoformat(second["timestamp"]) - datetime.fromisoformat(first["timestamp"])
        assert seconds.total_seconds() > 2.9  # at least: what was asked meanwhile has not hurried it
        assert 1 == len(agent.told("vm.ready"))
        host.assert_nothing_left()


def test_starts_that_fail(host: AgentHost) -> None:
    """Each is failed with its reason; the others run, and a restart after a repair does as well."""
    host.write("good", links=2)
    taken = host.write("taken")
    missing = host.write("missing", qemu='binary = "qemu-system-none"\npowerdown_timeout = 0.2')
    host.write("refused", args=["-nonsense"])
    host.write("dies", args=["-version"])
    (host.vms / "wrong.toml").write_text("autostart = true\n[qemu]\nmemory = 1\n")
    (host.vms / "named.toml").write_text('autostart = true\nname = "other"\n')
    reasons = {
        "taken": "Failed to bind any port",
        "missing": "qemu-system-none",
        "refused": "-nonsense",
        "dies": "before its monitor said a word",
        "wrong": "memory",
        "named": "named.toml",
    }
    with socket.create_server(("127.0.0.1", taken.ports[0])), host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_state("good", "ready")
        for name, reason in reasons.items():
            status = agent.wait_state(name, "failed")
            assert reason in status["error"], status
            assert status["qemu_pid"] is None
        good = identity(agent.status("good"))
        missing.path.write_text(missing.path.read_text().replace('binary = "qemu-system-none"', ""))
        agent.act("missing", "start")
        agent.wait_state("missing", "ready")
        agent.act("dies", "restart")
        wait_until(lambda: len(agent.told("run.failed", vm="dies")) == 2, "it has failed again")
        agent.wait_state("dies", "failed")
        assert good == identity(agent.status("good"))
        agent.assert_no_bug()
        power_off(agent, host)


DEFECTS = """
import dataclasses
from qrapd import plan
from qrapd.supervisor import Supervisor
resolve, apply = plan.resolve, Supervisor._apply
seen = []
def fail(*_):
    raise RuntimeError("a defect")
def broken(configuration):
    made = resolve(configuration)
    if made.name == "spawns":
        return dataclasses.replace(made, command_line=fail)
    if made.name == "reads":
        seen.append(1)
        if len(seen) > 1:
            fail()
    return made
async def broken_apply(self, plan):
    if self.plan.name == "applies":
        fail()
    await apply(self, plan)
plan.resolve, Supervisor._apply = broken, broken_apply
"""


def test_a_bug_in_one_vm(host: AgentHost) -> None:
    """While it starts, while its file is read again, while that is applied: it is told, and is that VM's alone."""
    names = ["applies", "good", "reads"]
    files = {name: host.write(name) for name in [*names, "spawns"]}
    with host.agent(prefix=patched(DEFECTS)) as agent:
        agent.wait_for("agent.ready")
        before = {name: identity(each) for name, each in agent.wait_all("ready", names).items()}
        spawns = agent.wait_state("spawns", "failed")
        assert "a bug in qrapd" in spawns["error"]
        assert [child for child in host.known.values() if child.alive] != []

        for vm in files.values():
            vm.path.write_text(vm.path.read_text().replace(str(vm.ports[0]), str(free_port())))
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        agent.wait_for("link.restored", vm="good")
        wait_until(lambda: len(agent.told("bug.found")) == 3, "three bugs are told")
        now = agent.statuses()
        assert ["ready"] * 3 == [now[name]["state"] for name in names]
        for name in ("applies", "reads"):
            assert before[name] == identity(now[name])

        for name, status in (("applies", 202), ("reads", 500)):
            assert status == agent.request("POST", f"/v1/vms/{name}/reload").status_code
        assert 200 == agent.request("GET", "/healthz").status_code
        assert ["ready"] * 3 == [agent.status(name)["state"] for name in names]
        agent.act("applies", "stop")
        agent.wait_state("applies", "exited")
        power_off(agent, host)


def write_silent_qemu(path: Path) -> str:
    """A program that answers when it is asked what it can do, and hangs when it is to run a machine."""
    real = shutil.which("qemu-system-x86_64")
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *-qmp*|*chardev*|*mon*) exec sleep 1000;; esac\nexec {real} "$@"\n'
    )
    path.chmod(0o755)
    return f'binary = "{path}"\npowerdown_timeout = 0.2\nquit_timeout = 0.2'


@pytest.mark.slow  # a hanging start keeps its place for 10 s
def test_starts_at_once(host: AgentHost) -> None:
    """No more than the file says are on their way up. One that hangs gives its place away; who waits can be stopped."""
    own = host.place / "agent.toml"
    own.write_text("starts_at_once = 2\n")
    silent = write_silent_qemu(host.place / "silent")
    hanging, waiting = [f"a{number}" for number in range(3)], [f"b{number}" for number in range(3)]
    for name in hanging:
        host.write(name, autostart=False, qemu=silent)
    for name in waiting:
        host.write(name, autostart=False)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        for name in hanging[:2]:
            agent.act(name, "start")
            agent.wait_for("vm.started", vm=name)
        for name in [hanging[2], *waiting]:
            agent.act(name, "start")
        assert {"starting"} == {each["state"] for each in agent.statuses().values()}
        agent.act("b2", "stop")
        agent.wait_state("b2", "exited")
        agent.wait_for("vm.started")
        started = [each["vm"] for each in agent.told("vm.started")]
        agent.wait_all("ready", ["b0", "b1"])  # when those that hang have given their places away
        assert set(hanging) | {"b0", "b1"} == {each["vm"] for each in agent.told("vm.started")}
        assert hanging == started
        power_off(agent, host)


def test_places_for_starts(host: AgentHost) -> None:
    """One place: no VM's first process is started before the VM before it is up, ended or failed."""
    (host.place / "agent.toml").write_text("starts_at_once = 1\n")
    names = [f"vm{number}" for number in range(4)]
    for name in names:
        host.write(name)
    host.write("vm1x", args=["-nonsense"])
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_all("ready", names)
        agent.wait_state("vm1x", "failed")
        on_their_way: set[str] = set()
        most = 0
        for event in agent.events:
            if event["event"] == "passt.started":
                on_their_way.add(event["vm"])
            elif event["event"] in ("vm.ready", "run.failed"):
                on_their_way.discard(event["vm"])
            most = max(most, len(on_their_way))
        assert 1 == most
        # More of them, from now on.
        (host.place / "agent.toml").write_text("starts_at_once = 4\n")
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        agent.act("vm0", "restart")
        agent.wait_state("vm0", "ready")
        agent.assert_no_bug()
        power_off(agent, host)


def test_a_reload_of_a_vm_that_never_comes_up(host: AgentHost) -> None:
    """Who waits for it to be ready, to apply another file, does so no longer than it is on its way."""
    vm = host.write("hangs", autostart=False, qemu=write_silent_qemu(host.place / "silent"))
    host.write("good")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.act("hangs", "start")
        agent.wait_for("vm.started", vm="hangs")
        vm.path.write_text(vm.path.read_text().replace(str(vm.ports[0]), str(free_port())))
        agent.act("hangs", "reload")
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        agent.act("hangs", "kill")
        agent.wait_state("hangs", "exited", "failed")
        agent.wait_state("good", "ready")
        assert ExitStatus.OK == agent.stop(signal.SIGTERM)  # it has nobody to wait for
    with host.agent() as agent:
        assert 1 == agent.wait_for("agent.ready")["adopted"]
        power_off(agent, host)


def test_a_qemu_that_hangs(host: AgentHost) -> None:
    """One of ten is stopped by SIGSTOP: the nine start, stop and swap, the API answers, and that one can be ended."""
    names = [f"vm{number}" for number in range(10)]
    hung, others = names[4], names[:4] + names[5:]
    for name in names:
        host.write(name, qemu="powerdown_timeout = 0.2\nquit_timeout = 0.2")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_all("ready", names)
        os.kill(before[hung]["qemu_pid"], signal.SIGSTOP)
        agent.act(hung, "links/0/swap")  # it waits for QEMU, which does not answer

        for name in others:
            agent.act(name, "links/0/swap")
        for name in others:
            agent.wait_for_generation(name, 2)
        for name in others:
            agent.act(name, "restart")
        for name in others:
            agent.wait_for_other_qemu(name, before[name]["qemu_pid"])
        for name in others[:3]:
            agent.act(name, "stop")
        for name in others[:3]:
            agent.wait_state(name, "exited")
        for name in others[:3]:
            agent.act(name, "start")
        agent.wait_all("ready", others)
        assert agent.status(hung)["qemu_pid"] == before[hung]["qemu_pid"]
        assert [] == agent.told("link.restored", vm=hung)
        # Whoever had waited for what the one that hangs was told had waited for that long.
        outages = [each["outage_ms"] / 1000 for each in agent.told("link.restored")]
        assert max(outages) < COMMAND_TIMEOUT

        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        agent.act(hung, "stop")
        status = agent.wait_state(hung, "exited")
        assert status["qemu_pid"] is None
        # power-down and quit are without an answer; SIGTERM has no effect on what is stopped, SIGKILL has.
        assert "SIGKILL" == agent.told("vm.stopping", vm=hung)[-1]["how"]

        agent.act(hung, "start")
        again = agent.wait_state(hung, "ready")
        os.kill(again["qemu_pid"], signal.SIGSTOP)
        agent.act(hung, "kill")
        agent.wait_state(hung, "exited")
        agent.assert_no_bug()
        power_off(agent, host)


def test_the_agent_ends_while_a_qemu_hangs(host: AgentHost) -> None:
    """It leaves that one, too, and the next agent has the others at once."""
    for name in ("one", "hung", "two"):
        host.write(name, qemu="powerdown_timeout = 0.2\nquit_timeout = 0.2")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_all("ready", ["one", "two", "hung"])
        os.kill(before["hung"]["qemu_pid"], signal.SIGSTOP)
        assert ExitStatus.OK == agent.stop(signal.SIGTERM)
    with host.agent() as agent:
        for name in ("one", "two"):
            agent.wait_for_api()
            assert identity(agent.wait_state(name, "ready")) == identity(before[name])
        agent.swap("one")
        assert "starting" == agent.status("hung")["state"]
        os.kill(before["hung"]["qemu_pid"], signal.SIGCONT)
        assert 3 == agent.wait_for("agent.ready")["adopted"]
        assert identity(agent.wait_state("hung", "ready")) == identity(before["hung"])
        agent.assert_no_bug()
        power_off(agent, host)


# ---- others who run VMs


def ps(host: AgentHost, *options: str) -> dict[str, Status]:
    """What `qrapd ps` shows, by the VMs' names."""
    command = [sys.executable, "-m", "qrapd", "ps", "--json", "--runtime-dir", str(host.base), *options]
    shown = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout
    return {each["name"]: each for each in json.loads(shown)}


ACTIONS = [
    ("POST", "start"),
    ("POST", "stop"),
    ("POST", "restart"),
    ("POST", "kill"),
    ("POST", "reload"),
    ("POST", "links/0/swap"),
    ("GET", "links/0/forwards"),
    ("DELETE", ""),
]


def test_a_vm_that_a_shell_runs(host: AgentHost) -> None:
    """The agent does not touch it: it says who has it, and how it is, as far as can be seen."""
    wanted = host.write("wanted")
    unwanted = host.write("unwanted", autostart=False, links=2)
    host.write("own")
    with Run(wanted.path, host.base) as first, Run(unwanted.path, host.base) as second:
        running = {"wanted": first.wait_for("vm.ready"), "unwanted": second.wait_for("vm.ready")}
        for name in running:
            wait_until((host.base / name / "control.sock").exists, "it takes calls")
        with host.agent() as agent:
            agent.wait_for("agent.ready")
            own = agent.wait_state("own", "ready")
            assert "already supervised" in agent.wait_for("run.failed", vm="wanted")["error"]
            # What it was not to run is no failure of it.
            assert [] == agent.told("run.failed", vm="unwanted")
            vms = ps(host)
            for name, ready in running.items():
                for status in (agent.status(name), vms[name]):
                    assert ("ready", "shell") == (status["state"], status["origin"])
                    assert ready["qemu_pid"] == status["qemu_pid"]
                answers = [
                    agent.request(method, f"/v1/vms/{name}/{action}".rstrip("/"))
                    for method, action in ACTIONS
                ]
                assert [409] * len(ACTIONS) == [each.status_code for each in answers]
                its_own = f"{host.base / name}/control.sock"
                assert f"ask that one, as the commands do: {its_own}" == answers[0].json()["hint"]
                assert its_own in agent.status(name)["error"]
                assert None is vms[name]["error"]  # what it says itself comes first
                assert (
                    f'qrapd_vm_state{{state="ready",vm="{name}"}} 1.0'
                    in agent.request("GET", "/metrics").text
                )
            assert ("agent", own["qemu_pid"]) == (vms["own"]["origin"], vms["own"]["qemu_pid"])
            links = agent.status("unwanted")["links"]
            assert [("up", 1)] * 2 == [(link["state"], link["generation"]) for link in links]
            os.kill(links[1]["passt_pid"], signal.SIGKILL)
            second.wait_for("link.restored", link=1)
            wait_until(lambda: agent.status("unwanted")["links"][1]["generation"] == 2, "that is seen")

            assert ExitStatus.OK == first.stop()
            wait_until(lambda: agent.status("wanted")["origin"] == "agent", "it has ended")
            assert "already supervised" in agent.wait_state("wanted", "failed")["error"]
            agent.act("wanted", "start")
            agent.wait_state("wanted", "ready")

            second.process.kill()
            second.process.wait()
            wait_until(lambda: agent.status("unwanted")["state"] == "failed", "its supervisor is gone")
            left = agent.status("unwanted")
            assert ("shell", running["unwanted"]["qemu_pid"]) == (left["origin"], left["qemu_pid"])
            assert "its supervisor is gone, and its QEMU runs on" in left["error"]
            host.note(*second.children)
            agent.act("unwanted", "start")
            assert running["unwanted"]["qemu_pid"] == agent.wait_state("unwanted", "ready")["qemu_pid"]
            assert "agent" == agent.status("unwanted")["origin"]
            agent.assert_no_bug()
            power_off(agent, host)


def test_what_shells_leave_while_the_agent_runs(host: AgentHost) -> None:
    """It can be stopped, killed and restarted as any other VM."""
    names = ("stopped", "killed", "restarted")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        qemus = {}
        for name in names:
            vm = host.write(name, autostart=False)
            with vm.path.open("a") as file:
                file.write('\n[restart]\npolicy = "on-failure"\n')
            agent.process.send_signal(signal.SIGHUP)
            agent.wait_for("agent.reloaded")
            run = Run(vm.path, host.base).__enter__()
            qemus[name] = run.wait_for("vm.ready")["qemu_pid"]
            host.note(*run.children)
            run.process.kill()
            run.wait()
            assert run.process.stderr is not None
            run.process.stderr.close()
        for name, action in zip(names, ("stop", "kill", "restart"), strict=True):
            assert ("failed", qemus[name]) == (agent.status(name)["state"], agent.status(name)["qemu_pid"])
            if action == "stop":
                command = [sys.executable, "-m", "qrapd", action, name, "--runtime-dir", str(host.base)]
                subprocess.run(command, check=True, timeout=PATIENCE)
            else:
                agent.act(name, action)
        agent.wait_state("stopped", "exited")
        agent.wait_state("killed", "failed")  # as one that was killed while nobody had it
        agent.wait_for_other_qemu("restarted", qemus["restarted"])
        for name in names:
            assert not host.known[qemus[name]].alive
        assert ["request"] == [each["reason"] for each in agent.told("vm.exited", vm="stopped")]
        assert [] == agent.told("vm.ready", vm="killed")
        agent.assert_no_bug()
        power_off(agent, host)


def test_a_vm_of_a_supervisor_that_hangs(host: AgentHost) -> None:
    """The agent has seen it alive; `qrapd ps` has asked, and says that it does not answer."""
    vm = host.write("web", autostart=False)
    with Run(vm.path, host.base) as run, host.agent() as agent:
        run.wait_for("vm.ready")
        wait_until((host.base / "web" / "control.sock").exists, "it takes calls")
        agent.wait_for("agent.ready")
        assert "ready" == agent.status("web")["state"]
        run.process.send_signal(signal.SIGSTOP)
        try:
            shown = ps(host, "--timeout", "1")["web"]
        finally:
            run.process.send_signal(signal.SIGCONT)
        assert ("failed", "does not answer") == (shown["state"], shown["error"][-len("does not answer") :])


def test_a_vm_in_a_directory_that_is_closed(place: Path, as_nobody: list[str]) -> None:
    """Another user's: that it cannot be seen is what the agent says."""
    place.chmod(0o777)
    with agent_host(place) as host:
        host.base.mkdir(mode=0o755)
        os.chown(host.base, NOBODY, NOBODY)
        vm = host.write("web", autostart=False)
        with Run(vm.path, host.base) as run, host.agent(prefix=as_nobody) as agent:
            run.wait_for("vm.ready")
            agent.wait_for("agent.ready")
            status = agent.status("web")
            assert "exited" == status["state"]
            assert (
                f"whether a unit or a shell runs it cannot be seen: Permission denied: {host.base}/web"
                in status["error"]
            )
            refused = agent.request("POST", "/v1/vms/web/start")
            assert (409, "closed to the agent") == (
                refused.status_code,
                refused.json()["detail"][-len("closed to the agent") :],
            )


def test_a_running_vm_without_a_file(host: AgentHost) -> None:
    """Its file went while no agent was there: the next one looks after it all the same, for nobody else would."""
    host.write("kept")
    vm = host.write("orphan")
    text = vm.path.read_text()
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_all("ready", ["kept", "orphan"])["orphan"]
        assert ExitStatus.OK == agent.stop()
    vm.path.unlink()
    with host.agent() as agent:
        assert 2 == agent.wait_for("agent.ready")["adopted"]
        assert ["no such file" in each["problem"] for each in agent.told("config.invalid", vm="orphan")] == [
            True
        ]
        assert identity(before) == identity(agent.wait_state("orphan", "ready"))
        assert "agent" == ps(host)["orphan"]["origin"]
        # Its passt is replaced as it was started.
        os.kill(before["links"][0]["passt_pid"], signal.SIGKILL)
        agent.wait_for("link.restored", vm="orphan")
        # What could not come up again does not go down.
        answer = agent.request("POST", "/v1/vms/orphan/restart")
        assert 422 == answer.status_code, answer.text
        assert before["qemu_pid"] == agent.status("orphan")["qemu_pid"]
        vm.path.write_text(text)
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        agent.act("orphan", "restart")
        agent.wait_for_other_qemu("orphan", before["qemu_pid"])
        agent.assert_no_bug()
        power_off(agent, host)


def test_the_host_goes_down_with_a_vm_without_a_file(host: AgentHost) -> None:
    """It is powered down as the others are."""
    vm = host.write("orphan")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        qemu = agent.wait_state("orphan", "ready")["qemu_pid"]
        assert ExitStatus.OK == agent.stop()
    vm.path.unlink()
    with host.agent() as agent:
        assert 1 == agent.wait_for("agent.ready")["adopted"]
        agent.process.send_signal(signal.SIGPWR)
        assert "power-down" == agent.wait_for("vm.stopping", vm="orphan")["how"]
        os.kill(
            qemu, signal.SIGKILL
        )  # it has no guest that would heed its power button, and the file's timeout is gone
        assert ExitStatus.OK == agent.wait()
        agent.assert_no_bug()
    host.assert_nothing_left()


def test_what_others_have_left_without_a_file(host: AgentHost) -> None:
    """A shell's or a unit's is not the agent's to look after, nor is what only looks like a VM's directory."""
    host.write("kept")
    vm = write_vm(host.place, "other", qemu="powerdown_timeout = 0.2")
    with Run(vm.path, host.base) as other:
        other.wait_for("vm.ready")
        host.note(*other.children)
        other.process.kill()
        other.process.wait()
    (host.base / "forged").symlink_to(host.base / "other")
    (host.base / "strange" / "record.json").mkdir(parents=True)
    with host.agent() as agent:
        assert 0 == agent.wait_for("agent.ready")["adopted"]
        assert {"kept"} == set(agent.statuses())
        agent.assert_no_bug()
        agent.wait_state("kept", "ready")
        assert ExitStatus.OK == agent.stop(signal.SIGPWR)
    assert ["other"] == [name for name in ps(host) if name == "other"]
    stop = [sys.executable, "-m", "qrapd", "stop", "other", "--runtime-dir", str(host.base)]
    stopped = subprocess.run(stop, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert ExitStatus.OK == stopped.returncode, stopped.stderr
    (host.base / "forged").unlink()
    (host.base / "strange" / "record.json").rmdir()
    (host.base / "strange").rmdir()
    host.assert_nothing_left()


def test_an_agent_that_is_killed_in_a_start(host: AgentHost) -> None:
    """The next one removes the directory that was made for it, although it does not start that VM."""
    host.write("web", autostart=False)
    # It ends when it has the directory, and before there is anything in it.
    code = (
        "import os, signal\nfrom qrapd import supervisor\n"
        "async def die(*_): os.kill(os.getpid(), signal.SIGKILL)\nsupervisor.look_for_left = die\n"
    )
    with host.agent(prefix=patched(code)) as agent:
        agent.wait_for("agent.ready")
        agent.request("POST", "/v1/vms/web/start")
        agent.wait()
    assert ["lock"] == [each.name for each in (host.base / "web").iterdir()]
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        assert "exited" == agent.status("web")["state"]
        assert not (host.base / "web").exists()
        agent.act("web", "start")
        agent.wait_state("web", "ready")
        agent.assert_no_bug()
        power_off(agent, host)


def test_the_host_goes_down_while_the_agent_leaves(host: AgentHost) -> None:
    """What it has left already it takes over once more, to power it down."""
    host.write("left", links=2)
    host.write("stopping", qemu="powerdown_timeout = 60")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_all("ready", ["left", "stopping"])
        agent.act("stopping", "stop")
        agent.wait_for("vm.stopping", vm="stopping")
        agent.process.send_signal(signal.SIGTERM)  # it waits for the one that is on its way down
        wait_until(lambda: VmDirectory(host.base, "left").supervisor_pid() is None, "the other one is left")
        agent.process.send_signal(signal.SIGPWR)
        wait_until(lambda: bool(agent.told("vm.exited", vm="left")), "it is powered down")
        os.kill(before["stopping"]["qemu_pid"], signal.SIGKILL)
        assert ExitStatus.OK == agent.wait()
        assert ["leave", "power-down"] == [each["how"] for each in agent.told("agent.stopping")]
        assert "power-down" == agent.told("vm.stopping", vm="left")[0]["how"]
        assert ["request"] == [each["reason"] for each in agent.told("vm.exited", vm="left")]
        agent.assert_no_bug()
    host.assert_nothing_left()


# ---- an agent that ends, or begins, at a bad moment

SLOW_LOOK = """
import time
from qrapd import record
look = record.of_agents
def of_agents(base):
    print('{"event": "test.looking"}', file=__import__("sys").stderr, flush=True)
    time.sleep(1)
    return look(base)
record.of_agents = of_agents
"""


def left_running(host: AgentHost, *names: str) -> dict[str, Status]:
    """VMs whose agent was killed."""
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_all("ready", names)
        agent.stop(signal.SIGKILL)
    return before


def test_an_end_while_it_looks_for_what_was_left(host: AgentHost) -> None:
    """It ends, and the next one has the VM."""
    host.write("web")
    before = left_running(host, "web")
    with host.agent(prefix=patched(SLOW_LOOK)) as agent:
        agent.wait_for("test.looking")
        assert ExitStatus.OK == agent.stop(signal.SIGTERM)
        agent.assert_no_bug()
    with host.agent() as agent:
        assert 1 == agent.wait_for("agent.ready")["adopted"]
        assert identity(before["web"]) == identity(agent.wait_state("web", "ready"))
        power_off(agent, host)


def test_the_host_goes_down_before_the_agent_has_looked(host: AgentHost) -> None:
    """What an earlier one has left is powered down all the same."""
    host.write("one")
    host.write("two")
    left_running(host, "one", "two")
    pending = "import os, signal; signal.pthread_sigmask(0, [30]); os.kill(os.getpid(), 30)"
    assert (0, 30) == (signal.SIG_BLOCK, signal.SIGPWR)
    with host.agent(prefix=patched(pending)) as agent:
        assert ExitStatus.OK == agent.wait()
        assert {"one", "two"} == {each["vm"] for each in agent.told("vm.exited")}
        agent.assert_no_bug()
    host.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("action", ["stop", "restart"])
def test_what_was_asked_outlives_the_agent(host: AgentHost, action: str, number: signal.Signals) -> None:
    """A guest that takes its time to power down is not forgotten by the next agent, nor is what it is to do then."""
    host.write("web", qemu="powerdown_timeout = 60")
    with host.agent(prefix=patched("import qrapd.agent as a; a.LEAVE_TIMEOUT = 0.2")) as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_state("web", "ready")
        agent.act("web", action)
        agent.wait_for("vm.stopping", vm="web")
        agent.stop(number)
    with host.agent() as agent:
        agent.wait_for("vm.stopping", vm="web")
        os.kill(before["qemu_pid"], signal.SIGKILL)
        if action == "stop":
            agent.wait_state("web", "exited")
        else:
            agent.wait_for_other_qemu("web", before["qemu_pid"])
        agent.assert_no_bug()
        if action == "restart":
            os.kill(agent.status("web")["qemu_pid"], signal.SIGKILL)
            agent.wait_state("web", "failed")
        power_off(agent, host)


def test_a_qemu_that_cannot_be_taken_over(host: AgentHost) -> None:
    """It is shown with its pid, its file stays, it is not forgotten, and it can be killed."""
    host.write("hung")
    qemu = left_running(host, "hung")["hung"]["qemu_pid"]
    os.kill(qemu, signal.SIGSTOP)
    with host.agent(prefix=patched("import qrapd.deadlines as d; d.ADOPTION_TIMEOUT = 0.5")) as agent:
        agent.wait_for("agent.ready")
        status = agent.wait_state("hung", "failed")
        assert qemu == status["qemu_pid"]
        assert "still runs" in status["error"]
        assert 409 == agent.request("DELETE", "/v1/vms/hung").status_code
        path = host.vms / "hung.toml"
        path.rename(host.place / "elsewhere")
        agent.process.send_signal(signal.SIGHUP)
        agent.wait_for("agent.reloaded")
        assert qemu == agent.status("hung")["qemu_pid"]
        agent.act("hung", "kill")
        wait_until(lambda: agent.status("hung")["qemu_pid"] is None, "it is gone")
        agent.assert_no_bug()
        power_off(agent, host)


def test_a_restart_of_what_is_being_stopped(host: AgentHost) -> None:
    """It would be forgotten: whoever asks is told."""
    host.write("web", qemu="powerdown_timeout = 60")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        qemu = agent.wait_state("web", "ready")["qemu_pid"]
        agent.act("web", "stop")
        answer = agent.request("POST", "/v1/vms/web/restart")
        assert 409 == answer.status_code, answer.text
        os.kill(qemu, signal.SIGKILL)
        agent.wait_state("web", "exited")
        power_off(agent, host)


def test_a_wrong_file_is_no_end(host: AgentHost) -> None:
    """A VM whose file is wrong has not ended by that, and once it is right there is nothing to see of it."""
    vm = host.write("web", autostart=False)
    text = vm.path.read_text()
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        for content in ("memory = 1\n", text):
            vm.path.write_text(content)
            agent.process.send_signal(signal.SIGHUP)
            agent.wait_for("agent.reloaded", changed=[], started=[])
            wait_until(lambda c=content: (agent.status("web")["error"] is None) == (c == text), "it is read")  # type: ignore[misc]
        assert "exited" == agent.status("web")["state"]
        assert 'qrapd_vm_failures_total{vm="web"} 0.0' in agent.request("GET", "/metrics").text
        power_off(agent, host)


def test_an_upgrade_that_could_not_start(host: AgentHost) -> None:
    """The next agent would end for a mistake in agent.toml: this one stays, and says why."""
    host.write("web")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = agent.wait_state("web", "ready")
        (host.place / "agent.toml").write_text("start_at_once = 4\n")
        agent.process.send_signal(signal.SIGUSR2)
        assert "agent.toml" in agent.wait_for("config.invalid")["file"]
        (host.place / "agent.toml").unlink()
        agent.process.send_signal(signal.SIGUSR2)
        assert 1 == agent.wait_for("agent.ready")["adopted"]
        assert identity(before) == identity(agent.wait_state("web", "ready"))
        agent.assert_no_bug()
        power_off(agent, host)
