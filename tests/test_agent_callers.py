# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent's callers and its host's shortages do to it: who is let in, and that no VM notices."""

from __future__ import annotations

import grp
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from agent_runner import AgentHost, AgentRun, agent_host, caller, identity, wait_until
from qrapd.errors import ExitStatus
from support import NOBODY, PATIENCE, Run


@pytest.fixture
def host(place: Path) -> Iterator[AgentHost]:
    """A host that has nothing yet."""
    with agent_host(place) as made:
        yield made


def power_off(agent: AgentRun, host: AgentHost) -> None:
    """As when the host goes down: the agent ends, and all its VMs."""
    assert ExitStatus.OK == agent.stop(signal.SIGPWR)
    host.assert_nothing_left()


# ---- who may

ASK = """if True:
    import os, socket, sys
    path, uid, gid, groups, method, target = sys.argv[1:]
    os.setgroups([int(each) for each in groups.split(",") if each])
    os.setresgid(*[int(gid)] * 3); os.setresuid(*[int(uid)] * 3)
    made = socket.socket(socket.AF_UNIX)
    made.connect(path)
    head = [f"{method} {target} HTTP/1.1", "Host: qrapd", "Connection: close", "Content-Length: 0", "", ""]
    made.sendall("\\r\\n".join(head).encode())
    answer = b""
    while chunk := made.recv(65536):
        answer += chunk
    sys.stdout.write(answer.decode())
    """


def ask_as(
    agent: AgentRun, uid: int, gid: int, groups: list[int], method: str, target: str
) -> tuple[int, str]:
    """What the API says to another user: status, and all that it wrote."""
    words = [str(agent.socket), str(uid), str(gid), ",".join(map(str, groups)), method, target]
    done = subprocess.run(
        [sys.executable, "-S", "-c", ASK, *words], capture_output=True, text=True, timeout=PATIENCE
    )
    assert "" == done.stderr
    return int(done.stdout.split()[1]), done.stdout


def test_who_may(host: AgentHost) -> None:
    """Root, a group, and a group that may look on, by whatever group of theirs; all others are denied."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    some = [each for each in grp.getgrall() if each.gr_gid not in (0, NOBODY)]
    writers, readers = some[0], some[1]
    (host.place / "agent.toml").write_text(
        f'group = "{writers.gr_name}"\nread_only_group = "{readers.gr_name}"\n'
    )
    host.write("one")
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = identity(agent.wait_state("one", "ready"))
        look, act = ("GET", "/v1/vms"), ("POST", "/v1/vms/one/links/0/swap")
        others = [
            ("DELETE", "/v1/vms/one"), ("POST", "/v1/vms/one/kill"), ("PUT", "/v1/vms/one"),
            ("GET", "/v1/vms/one"), ("GET", "/v1/events"), ("GET", "/metrics"),
        ]  # fmt: skip
        for method, target in (look, act, *others):
            status, words = ask_as(agent, NOBODY, NOBODY, [], method, target)
            assert 403 == status, (method, target, words)
            assert "may not do this" in words
            assert writers.gr_name in words
        assert 200 == ask_as(agent, NOBODY, NOBODY, [], "GET", "/healthz")[0]
        for gid, groups in ((readers.gr_gid, []), (NOBODY, [7777, readers.gr_gid])):
            assert 200 == ask_as(agent, NOBODY, gid, groups, *look)[0]
            for each in (act, *others[:3]):
                assert 403 == ask_as(agent, NOBODY, gid, groups, *each)[0]
        assert before == identity(agent.status("one"))
        for gid, groups in ((writers.gr_gid, []), (NOBODY, [readers.gr_gid, writers.gr_gid])):
            now = agent.status("one")["links"][0]["generation"]
            assert 202 == ask_as(agent, NOBODY, gid, groups, *act)[0]
            agent.wait_for_generation("one", now + 1)
        agent.assert_no_bug()
        power_off(agent, host)


def test_a_group_that_is_not_there(host: AgentHost) -> None:
    """Nobody is let in by mistake: the agent does not begin."""
    (host.place / "agent.toml").write_text('group = "no-such-group"\n')
    with host.agent() as agent:
        assert ExitStatus.UNAVAILABLE == agent.wait()
    host.assert_nothing_left()


# ---- shortages


@pytest.mark.slow
def test_no_fd_is_lost(host: AgentHost) -> None:
    """Twenty swaps, twenty starts and stops, and callers: as many files are open as before."""
    host.write("stays")
    host.write("comes", autostart=False)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_state("stays", "ready")

        def go_round() -> None:
            agent.swap("stays")
            agent.act("comes", "start")
            agent.wait_state("comes", "ready")
            agent.act("comes", "kill")
            agent.wait_state("comes", "exited")

        go_round()  # what is opened once and kept: modules, threads
        before = agent.fds()
        for _ in range(20):
            go_round()
        wait_until(lambda: agent.fds() <= before, f"{before} files are open as before, not {agent.fds()}")
        agent.assert_no_bug()
        power_off(agent, host)


def fill(file: FileIO) -> None:
    """Write until there is no room."""
    with suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space"):
        file.write(b" ")


def test_a_full_runtime_directory(host: AgentHost) -> None:
    """Nothing can be written there any more: what runs goes on, and a start does no worse than fail for that while."""
    host.write("one")
    host.write("two", autostart=False)
    mount = f"mkdir -p {host.base} && mount -t tmpfs -o size=256k,mode=755 none {host.base}"
    prefix = ["unshare", "--mount", "sh", "-c", f'{mount} && exec {sys.executable} -m "$@"', "sh"]
    if subprocess.run([*prefix[:4], mount], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system; this test run is unprivileged")
    with host.agent(prefix=prefix) as agent:
        agent.wait_for("agent.ready")
        inside = Path(f"/proc/{agent.process.pid}/root{host.base}")
        agent.base = inside  # nobody else has it mounted
        before = agent.wait_state("one", "ready")
        blocker = inside / "blocker"
        with blocker.open("wb", buffering=0) as file:
            fill(file)
        agent.swap("one")
        agent.wait_for("record.failed", vm="one")
        agent.act("two", "start")
        wait_until(
            lambda: agent.status("two")["state"] in ("ready", "failed"), "the start has come to something"
        )
        assert before["qemu_pid"] == agent.wait_state("one", "ready")["qemu_pid"]
        blocker.unlink()
        agent.swap("one")
        if agent.status("two")["state"] == "failed":
            agent.act("two", "start")
        agent.wait_state("two", "ready")
        agent.assert_no_bug()
        assert ExitStatus.OK == agent.stop(signal.SIGPWR)
    host.assert_nothing_left()


def test_no_more_files(host: AgentHost) -> None:
    """At its limit of open files the agent refuses starts; what runs goes on, and all is well afterwards."""
    host.write("one")
    host.write("two")
    host.write("three", autostart=False)
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        before = {name: each["qemu_pid"] for name, each in agent.wait_all("ready", ["one", "two"]).items()}
        three = agent.act("three", "start")
        agent.wait_state("three", "ready")
        agent.act("three", "kill")
        agent.wait_state("three", "exited")
        usual = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
        # Room for a caller, and for none of what a start takes.
        highest = max(int(each.name) for each in Path(f"/proc/{agent.process.pid}/fd").iterdir())
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (highest + 3, usual[1]))
        try:
            agent.act("three", "start")
            three = agent.wait_state("three", "failed")
            assert "Too many open files" in three["error"], three
            os.kill(agent.status("one")["links"][0]["passt_pid"], signal.SIGKILL)
            agent.wait_for("link.lost", vm="one")
            assert "ready" == agent.status("two")["state"]
        finally:
            resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, usual)
        agent.wait_for("link.restored", vm="one")
        assert before == {name: agent.wait_state(name, "ready")["qemu_pid"] for name in before}
        agent.act("three", "start")
        agent.wait_state("three", "ready")
        agent.swap("two")
        power_off(agent, host)


def test_a_client_that_never_reads(host: AgentHost) -> None:
    """It follows the events, and they come by the thousands: neither the VMs nor other followers notice."""
    host.write("busy")
    host.write("other")
    # Each start of it is an event for each of these.
    (host.vms / "noisy.toml").write_text("".join(f"unknown{number} = 1\n" for number in range(50)))
    with host.agent() as agent:
        agent.wait_for("agent.ready")
        agent.wait_all("ready", ["busy", "other"])
        seen: list[str] = []

        def follow() -> None:
            with caller(agent.socket) as client, client.stream("GET", "/v1/events?after=now") as answer:
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        seen.append(line.removeprefix("event: "))
                    if line == "event: agent.stopping":
                        return

        following = threading.Thread(target=follow, daemon=True)
        following.start()
        deaf = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        try:
            for each in deaf:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                each.connect(str(agent.socket))
                each.sendall(b"GET /v1/events HTTP/1.1\r\nHost: qrapd\r\n\r\n")
            untouched = identity(agent.status("busy"))
            noise = 0
            with caller(agent.socket) as client:
                while noise < 100:
                    noise += client.post("/v1/vms/noisy/start").status_code == 202
            assert untouched == identity(agent.status("busy"))
            agent.swap("busy")
            before = agent.status("other")["qemu_pid"]
            agent.act("other", "restart")
            agent.wait_for_other_qemu("other", before)
            wait_until(lambda: "vm.ready" in seen, "the other follower has what came last")
            assert len(agent.told("config.invalid", vm="noisy")) > 5000
            assert "link.restored" in seen
            agent.assert_no_bug()
            power_off(agent, host)
        finally:
            for each in deaf:
                each.close()
            following.join(PATIENCE)


def test_the_commands_of_a_group(host: AgentHost, as_nobody: list[str]) -> None:
    """Its members do everything by `qrapd`, too, although the VMs' directories are closed to them."""
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, NOBODY))
    become = [word.replace(f"--regid {NOBODY}", f"--regid {group.gr_gid}") for word in as_nobody]

    def qrapd(*arguments: str) -> tuple[int, str]:
        command = [*become, "qrapd", *arguments, "--runtime-dir", str(host.base)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stdout + done.stderr

    (host.place / "agent.toml").write_text(f'group = "{group.gr_name}"\n')
    host.write("web")
    other = host.write("other", autostart=False)
    with Run(other.path, host.base) as run, host.agent() as agent:
        run.wait_for("vm.ready")
        agent.wait_for("agent.ready")
        agent.wait_state("web", "ready")
        status, shown = qrapd("show", "web")
        assert (0, True) == (status, "state:    ready" in shown), shown
        for command in (["link", "swap", "web"], ["events", "web"], ["restart", "web"], ["stop", "web"]):
            assert 0 == qrapd(*command)[0], command
        assert "exited" == agent.status("web")["state"]
        assert 0 == qrapd("start", "web")[0]
        # One that has a supervisor of its own: whoever may speak with the agent may not with that.
        assert "it has a supervisor of its own" in qrapd("show", "other")[1]
        status, shown = qrapd("stop", "other")
        assert (75, True) == (status, "has a supervisor of its own" in shown), shown
        status, shown = qrapd("stop", "--all")
        assert (75, True) == (status, "has a supervisor of its own" in shown), shown
        assert "exited" == agent.status("web")["state"]
        assert "ready" == agent.status("other")["state"]
        agent.assert_no_bug()
        assert ExitStatus.OK == agent.stop(signal.SIGPWR)
        assert ExitStatus.OK == run.stop()
    host.assert_nothing_left()


# ---- one VM by itself


def notices(run: Run) -> list[str]:
    """What was told that is no fault of a link."""
    return [each["notice"] for each in run.events if each["event"] == "link.notice"]


def test_a_socket_that_cannot_be_made(host: AgentHost) -> None:
    """It is tried again until it can: that is told once, and that it is there."""
    vm = host.write("one")
    path = host.base / "one" / "control.sock"
    path.mkdir(parents=True)  # in its place: as with a full /run, it cannot be made
    with Run(vm.path, host.base) as run:
        ready = run.wait_for("vm.ready")
        assert "takes no calls, and tries again: cannot listen" in run.wait_for("link.notice")["notice"]
        time.sleep(1)  # more than one attempt is made meanwhile: 0.05 s and 0.3 s later
        assert 1 == len(notices(run))
        path.rmdir()
        assert "takes calls again" in run.wait_for("link.notice")["notice"]
        with caller(path) as client:
            [status] = client.get("/v1/vms").json()
        assert ready["qemu_pid"] == status["qemu_pid"]
        assert 2 == len(notices(run))
        assert ExitStatus.OK == run.stop()
        run.assert_nothing_left()


def test_no_fds_for_the_first_caller(host: AgentHost) -> None:
    """The server is loaded when somebody calls: it cannot be then, and can be later."""
    vm = host.write("one")
    path = host.base / "one" / "control.sock"
    with Run(vm.path, host.base) as run:
        run.wait_for("vm.ready")
        wait_until(path.exists, "its socket is there")
        usual = resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE)
        taken = {int(each.name) for each in Path(f"/proc/{run.process.pid}/fd").iterdir()}
        lowest = next(number for number in itertools.count() if number not in taken)
        resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE, (lowest, usual[1]))
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            assert "Too many open files" in run.wait_for("link.notice")["notice"]
            resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE, usual)
        run.wait_for("link.notice")
        wait_until(path.exists, "its socket is there again")
        with caller(path) as client:
            assert "ready" == client.get("/v1/vms/one").json()["state"]
        assert "bug.found" not in run.names()
        assert ExitStatus.OK == run.stop()
        run.assert_nothing_left()


def test_the_api_of_one_vm(host: AgentHost) -> None:
    """`qrapd run` serves its VM's API on a socket of its own; until somebody calls, the server is not even loaded."""
    vm = host.write("one")
    # Python writes down every module that it reads.
    with Run(vm.path, host.base, prefix=[sys.executable, "-X", "importtime", "-m"]) as run:
        ready = run.wait_for("vm.ready")
        path = host.base / "one" / "control.sock"
        wait_until(path.exists, "its socket is there")
        server = ("starlette", "uvicorn", "h11", "websockets")
        assert [] == [line for line in run.stray if line.endswith(server)]
        with caller(path) as client:
            [status] = client.get("/v1/vms").json()
            assert ("one", "ready", "shell", ready["qemu_pid"]) == tuple(
                status[key] for key in ("name", "state", "origin", "qemu_pid")
            )
            wait_until(
                lambda: {line.split()[-1] for line in run.stray} >= {*server},
                "the server's modules are told of",
            )
            before = status["links"][0]
            assert 202 == client.post("/v1/vms/one/links/0/swap").status_code
            after = run.wait_for("link.restored")
            assert after["passt_pid"] != before["passt_pid"]
            assert 409 == client.post("/v1/vms/one/start").status_code
            assert 404 == client.get("/v1/vms/two").status_code
            for name in ("one", "two"):
                toml = {"content-type": "application/toml"}
                refused = client.put(f"/v1/vms/{name}", content="[qemu]\nargs = []\n", headers=toml)
                assert 409 == refused.status_code, refused.text
            assert 409 == client.delete("/v1/vms/one").status_code
            with client.stream("GET", "/v1/events?follow=false") as answer:
                assert "link.restored" in answer.read().decode()
            assert 101 == upgrade(path)
            assert 202 == client.post("/v1/vms/one/stop").status_code
        assert ExitStatus.OK == run.wait()
        run.assert_nothing_left()


def upgrade(path: Path) -> int:
    """The status that the console's WebSocket begins with."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(path))
        made.sendall(
            b"GET /v1/vms/one/console HTTP/1.1\r\nHost: qrapd\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        return int(made.recv(4096).split()[1])
