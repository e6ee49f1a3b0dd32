# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that speak with an agent or a supervisor, as a terminal and a pipe see them."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pexpect
import pytest

from fake_host import FakeHost, link, status
from qrapd.cli import COMMANDS, main
from qrapd.client.places import Places
from qrapd.commands import asking
from qrapd.commands.tables import aligned, since, span
from qrapd.process import start_time
from qrapd.record import LinkRecord, ProcessId, Record, write
from qrapd.runtime_directory import VmDirectory
from support import NOBODY, PATIENCE, Run, write_vm
from test_cli import qrapd
from test_client import held, leave_record, mute

NO_COLOURS = {"NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture
def host(place: Path) -> Iterator[FakeHost]:
    """An agent with three VMs."""
    links = [link(0, outages=2, last_outage_ms=12.3), link(1)]
    vms = [
        status("web", links=links),
        status("db", "exited", links=0),
        status("bad", "failed", error="no disk"),
    ]
    with FakeHost(*vms).serve(place / "agent.sock") as serving:
        yield serving


def ask(place: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a pipe, with this runtime directory."""
    return qrapd(*arguments, "--runtime-dir", place, **{"XDG_CONFIG_HOME": str(place / "none"), **variables})


class Terminal:
    """A command in a terminal; leaving it ends the command."""

    def __init__(self, place: Path, *arguments: str, columns: int = 120) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "qrapd", *arguments, "--runtime-dir", str(place)],
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns)},
            dimensions=(40, columns),
            timeout=PATIENCE,
            encoding="utf-8",
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def finish(self) -> tuple[int, str]:
        """The exit status, and all that was shown."""
        shown = self.child.read()
        self.child.close()
        return int(self.child.exitstatus), shown


# --- ps -----------------------------------------------------------------------------------------------


def test_ps_in_a_pipe(place: Path, host: FakeHost) -> None:
    """Aligned lines without colours, each VM whole on its own."""
    ended = ask(place, "ps")
    assert (0, "") == (ended.returncode, ended.stderr)
    lines = ended.stdout.splitlines()
    assert ["name", "state", "for", "origin", "qemu", "links", "outages", "restarts", "remark"] == lines[
        0
    ].split()
    assert re.fullmatch(r"web +ready +\d+s +agent +3000 +2 up +2 \(12 ms\) +0", lines[3])
    assert re.fullmatch(r"bad +failed +\d+s +agent +- +1 up +0 +0 +no disk", lines[1])
    assert re.fullmatch(r"db +exited +\d+s +agent +- +none +0 +0", lines[2])
    assert {lines[0].index("state")} == {
        line.index(word) for line, word in zip(lines[1:], ["failed", "exited", "ready"], strict=True)
    }
    assert "\x1b" not in ended.stdout


def test_ps_as_json(place: Path, host: FakeHost) -> None:
    """What the API says, as it says it, and of those whose supervisor is gone the same form."""
    me = ProcessId(os.getpid(), start_time(os.getpid()))
    leave_record(place, "left", me, LinkRecord(0, "swap", 2, 2))
    vms = json.loads(ask(place, "ps", "--json").stdout)
    assert ["bad", "db", "left", "web"] == [vm["name"] for vm in vms]
    assert host.vms["web"] == vms[3]
    assert vms[3].keys() == vms[2].keys()
    assert vms[3]["links"][0].keys() == vms[2]["links"][0].keys()
    assert ("failed", "its supervisor is gone") == (vms[2]["state"], vms[2]["error"])


def test_ps_in_a_terminal(place: Path, host: FakeHost) -> None:
    """A table with colours."""
    with Terminal(place, "ps") as terminal:
        code, shown = terminal.finish()
    assert 0 == code
    assert re.search(r"\x1b\[32mready", shown)
    assert re.search(r"\x1b\[1;31mfailed", shown)


def test_ps_of_nothing(place: Path) -> None:
    """A pipe gets the heads alone, a terminal is told where was looked; JSON is an empty list."""
    ended = ask(place, "ps")
    assert (0, "", 1) == (ended.returncode, ended.stderr, len(ended.stdout.splitlines()))
    assert [] == json.loads(ask(place, "ps", "--json").stdout)
    with Terminal(place, "ps") as terminal:
        assert f"as far as {place} tells" in terminal.finish()[1]


def test_ps_when_somebody_hangs(place: Path, host: FakeHost) -> None:
    """The others are there, and so is the one that hangs."""
    with mute(place / "hung/control.sock"), held(place, "hung"):
        ended = ask(place, "ps", "--timeout", "1")
    assert 0 == ended.returncode
    assert 5 == len(ended.stdout.splitlines())
    assert "does not answer" in ended.stdout
    with mute(place / "other/agent.sock"):
        ended = ask(place / "other", "ps", "--timeout", "0.5")
    assert 69 == ended.returncode
    assert "agent.sock does not answer" in ended.stderr


def test_one_socket_by_option_and_by_environment(place: Path, host: FakeHost) -> None:
    """Nothing else is asked then; and what is wrong with it is said."""
    by_option = qrapd("ps", "--json", "--socket", place / "agent.sock")
    by_environment = qrapd("ps", "--json", QRAPD_SOCKET=str(place / "agent.sock"))
    assert 3 == len(json.loads(by_option.stdout)) == len(json.loads(by_environment.stdout))
    ended = qrapd("ps", "--socket", place / "nowhere")
    assert (69, f"qrapd: there is no socket {place}/nowhere\n") == (ended.returncode, ended.stderr)
    assert 2 == qrapd("ps", "--socket", place / ("x" * 107)).returncode


# --- waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "doing", "words"),
    [
        (["start", "db"], "starting", "runs, QEMU is pid"),
        (["stop", "web"], "stopping", "has ended"),
        (["restart", "web"], "restarting", "runs, QEMU is pid"),
        (["kill", "web"], "killing", "is dead"),
        (["link", "swap", "web", "1"], "swapping passt", "link 1: back after 12 ms on another passt"),
    ],
)
def test_waits(place: Path, host: FakeHost, arguments: list[str], doing: str, words: str) -> None:
    """In a terminal: what is going on, and how it ended. In a pipe: nothing, but that it has ended."""
    with Terminal(place, *arguments) as terminal:
        terminal.child.expect_exact(f"{arguments[-2 if arguments[0] == 'link' else -1]}: {doing}")
        code, shown = terminal.finish()
    assert (0, True) == (code, words in shown), shown
    if arguments[0] in ("stop", "kill"):
        host.change("web", state="ready", qemu_pid=1)
    if arguments[0] == "start":
        host.change("db", state="exited", qemu_pid=None)
    ended = ask(place, *arguments)
    assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)


def test_the_state_when_a_wait_is_over(place: Path, host: FakeHost) -> None:
    """It is the one that was waited for, and not the one before."""
    assert "ready" == json.loads(ask(place, "start", "db", "--json").stdout)["state"]
    assert "exited" == json.loads(ask(place, "stop", "db", "--json").stdout)["state"]
    assert 2 == json.loads(ask(place, "link", "swap", "web", "0", "--json").stdout)["links"][0]["generation"]


def test_no_wait(place: Path, host: FakeHost) -> None:
    """It is begun, and that is all."""
    host.stuck = True
    for arguments in (["start", "db"], ["stop", "web"], ["restart", "web"], ["link", "swap", "web", "0"]):
        assert 0 == ask(place, *arguments, "--no-wait").returncode
    assert 4 == sum(call.startswith("POST") for call in host.calls)


def test_what_fails(place: Path, host: FakeHost) -> None:
    """Status 1 and the reason."""
    host.failing = "no passt answers"
    for arguments in (["start", "db"], ["start", "bad"], ["restart", "web"]):
        ended = ask(place, *arguments)
        assert 1 == ended.returncode
        assert f"{arguments[-1]}: has failed: no passt answers\n" == ended.stderr
    host.change("web", state="ready")
    ended = ask(place, "link", "swap", "web", "0")
    assert (1, "web: link 0: no passt: no passt answers\n") == (ended.returncode, ended.stderr)


def test_a_wait_with_a_limit(place: Path, host: FakeHost) -> None:
    """It ends with 69, says that what was begun goes on, and how it is."""
    host.stuck = True
    ended = ask(place, "stop", "web", "--timeout", "0.2")
    assert 69 == ended.returncode
    assert "web: it is ready after 0.2 s" in ended.stderr
    assert "goes on" in ended.stderr


def test_ctrl_c_leaves_the_vm_as_it_is(place: Path, host: FakeHost) -> None:
    """The wait ends, and it is said that nothing else does."""
    host.stuck = True
    with Terminal(place, "stop", "web") as terminal:
        terminal.child.expect_exact("stopping")
        deadline = time.monotonic() + PATIENCE
        while "POST /v1/vms/web/stop" not in host.calls:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        terminal.child.sendintr()
        code, shown = terminal.finish()
    assert 130 == code
    assert "no longer waited for; what was begun goes on" in shown
    assert "Traceback" not in shown
    assert shown.rstrip("\r\n").endswith("See: qrapd show web\r\n".rstrip())
    assert not shown.endswith("\r\n\r\n")
    assert 1 == sum(call.startswith("POST") for call in host.calls)


ERRORS = {
    "unknown": (["start", "nix"], 69, "there is no such VM"),
    "unknown, with a hint": (["show", "nix"], 69, "hint: VMs: web"),
    "runs already": (["start", "web"], 75, "runs already"),
    "the hint": (["start", "web"], 75, "hint: stop it first"),
    "no such link": (["link", "swap", "web", "7"], 69, "there is no link 7"),
    "which link": (["link", "swap", "web"], 2, "hint: one of 0, 1"),
    "no link": (["link", "swap", "db"], 75, "has no link now"),
    "no name": (["show", "../x"], 2, "is no VM's name"),
    "stop what": (["stop"], 2, "say which VM is meant"),
    "stop both": (["stop", "web", "--all"], 2, "say which VM is meant"),
    "no file": (["stop", "./nix.toml"], 78, "there is no such file"),
    "no such forward": (["forward", "remove", "web", "1:1", "--link", "0"], 69, "hint: it forwards 8080:80"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(place: Path, host: FakeHost, case: str) -> None:
    """The status of the interface and the words of whoever refused."""
    arguments, code, words = ERRORS[case]
    ended = ask(place, *arguments, HOME=str(place))
    assert (code, "") == (ended.returncode, ended.stdout)
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nobody_to_ask(place: Path) -> None:
    """No agent, no VM: said with what to do about it."""
    ended = ask(place, "start", "web")
    assert 69 == ended.returncode
    assert "there is no agent that could start it" in ended.stderr
    assert "qrapd run web" in ended.stderr
    ended = ask(place, "restart", "web")
    assert (69, True) == (ended.returncode, "--socket PATH" in ended.stderr)


def test_a_user_is_told_of_the_hosts_agent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no such VM of their own may have meant one of the agent's."""
    monkeypatch.setattr(asking, "HOSTS_AGENT", place / "host/agent.sock")
    assert "qrapd run" in str(asking._unknown(Places(place / "own"), "web").hint)
    with mute(place / "host/agent.sock"):
        error = asking._unknown(Places(place / "own"), "web")
    assert f"--socket {place}/host/agent.sock" in str(error.hint)


def test_reload_by_the_agent(place: Path, host: FakeHost) -> None:
    """Problems of the file come out as from `qrapd check`."""
    ended = ask(place, "reload", "web")
    assert (0, True) == (ended.returncode, "the agent reads its file again" in ended.stdout)
    host.failing = "x"
    ended = ask(place, "reload", "web")
    assert 78 == ended.returncode
    assert "/etc/qrapd/vms/web.toml: qemu.arg: is not a known key\n  hint: args?\n" == ended.stderr


def test_stop_all(place: Path, host: FakeHost) -> None:
    """Those that run are stopped, each by one request."""
    host.vms["two"] = status("two")
    ended = ask(place, "stop", "--all")
    assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert {"exited"} == {host.vms[name]["state"] for name in ("web", "two", "db")}
    assert 2 == sum(call.startswith("POST") for call in host.calls)


def test_stop_of_what_nobody_knows(place: Path) -> None:
    """It does not run, which is what was wanted; and a typing error is seen."""
    ended = ask(place, "stop", "nix", HOME=str(place))
    assert (0, "nix: does not run; nothing is known of a VM of that name\n") == (
        ended.returncode,
        ended.stderr,
    )


def test_stop_all_finds_what_could_not_be_taken_over(place: Path, host: FakeHost) -> None:
    """Its host says that it has failed; the record says that QEMU runs. The others that have failed are left alone."""
    leave_record(place, "bad", ProcessId(os.getpid(), start_time(os.getpid())))
    assert 0 == ask(place, "stop", "--all").returncode
    assert {"POST /v1/vms/web/stop", "POST /v1/vms/bad/stop"} == {
        call for call in host.calls if call.startswith("POST")
    }


def test_stop_all_of_one_that_ends_badly(place: Path, host: FakeHost) -> None:
    """It has failed before it is waited for: by how it was before it was told, that is no VM that did not run."""
    original = host.change

    def change(name: str, **fields: Any) -> None:
        original(name, **{**fields, "state": "failed", "error": "a disk is full"})

    host.change = change  # type: ignore[method-assign]
    host.vms["late"] = status("late")  # told first, and waited for first
    host.vms["zoo"] = status("zoo")
    ended = ask(place, "stop", "--all")
    assert (1, 3) == (ended.returncode, ended.stderr.count("has failed: a disk is full")), ended.stderr


@pytest.mark.parametrize("command", ["kill", "restart"])
def test_a_supervisor_that_goes_with_its_vm(place: Path, command: str) -> None:
    """Whoever answered for the VM ends with it: a VM that was to be killed is dead then, another has failed."""
    socket = place / "web/control.sock"
    host = FakeHost(status("web"))
    host.stuck = True
    with host.serve(socket), Terminal(place, command, "web") as terminal:
        terminal.child.expect_exact("web: ")
        deadline = time.monotonic() + PATIENCE
        while f"POST /v1/vms/web/{command}" not in host.calls:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        socket.unlink()
        code, shown = terminal.finish()
    if command == "kill":
        assert (0, True) == (code, "web: is dead" in shown), shown
    else:
        assert (1, True) == (code, "its supervisor has ended with it" in shown), shown


# --- VMs of others ------------------------------------------------------------------------------------


def test_an_agent_is_no_supervisor_of_one(place: Path) -> None:
    """An agent that hangs holds its VMs' locks: a signal meant for one of them must not reach it."""
    (place / "web").mkdir()
    code = (
        "import fcntl, os, sys, time; lock = open(sys.argv[2], 'w'); fcntl.flock(lock, fcntl.LOCK_EX);"
        "print(os.getpid(), file=lock, flush=True); print('held', flush=True); time.sleep(600)"
    )
    script = place / "qrapd"
    script.write_text(code)
    command = [sys.executable, str(script), "agent", str(place / "web/lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            assert "held\n" == agent.stdout.readline()
            for arguments in (["stop", "web"], ["reload", "web"], ["stop", "--all"]):
                ended = ask(place, *arguments)
                assert 69 == ended.returncode, ended.stderr
                assert f"web is a VM of the agent (pid {agent.pid})" in ended.stderr
            assert None is agent.poll()
            assert "agent" == json.loads(ask(place, "ps", "--json").stdout)[0]["origin"]
        finally:
            agent.kill()


def test_kill_where_nobody_answers(place: Path) -> None:
    """The QEMU that the record names is killed, and no other process; and it is said why so."""
    with subprocess.Popen(["sleep", "600"]) as qemu:
        try:
            leave_record(place, "left", ProcessId(qemu.pid, start_time(qemu.pid) + 1))
            assert 69 == ask(place, "kill", "left").returncode
            record_path = VmDirectory(place, "left").record_path
            write(record_path, Record(ProcessId(qemu.pid, start_time(qemu.pid))))
            ended = ask(place, "kill", "left")
            assert (0, "") == (ended.returncode, ended.stderr)
            assert f"its QEMU (pid {qemu.pid}) was killed" in ended.stdout
            assert -signal.SIGKILL == qemu.wait(PATIENCE)
        finally:
            qemu.kill()
    with subprocess.Popen(["sleep", "600"]) as qemu:
        try:
            write(record_path, Record(ProcessId(qemu.pid, start_time(qemu.pid))))
            ended = ask(place, "kill", "left", "--json")
            assert (0, "") == (ended.returncode, ended.stderr)
            assert ("left", None) == tuple(json.loads(ended.stdout)[key] for key in ("name", "qemu_pid"))
        finally:
            qemu.kill()


@pytest.mark.parametrize("command", ["kill", "stop"])
def test_root_does_not_follow_what_a_user_has_written(place: Path, command: str) -> None:
    """A user's directory names root's process: as QEMU to kill, as a supervisor to stop. Nothing happens to it."""
    if os.geteuid() != 0:
        pytest.skip("only root could harm root's processes")
    with subprocess.Popen(["sleep", "600"]) as victim, held(place, "trap"):
        try:
            write(
                VmDirectory(place, "trap").record_path, Record(ProcessId(victim.pid, start_time(victim.pid)))
            )
            (place / "trap/lock").write_text(f"{victim.pid}\n")
            os.chown(place / "trap", NOBODY, NOBODY)
            for file in (place / "trap").iterdir():
                os.chown(file, NOBODY, NOBODY)
            ended = ask(place, command, "trap")
            assert 69 == ended.returncode, ended.stderr
            assert "another user's" in ended.stderr
            assert None is victim.poll()
        finally:
            victim.kill()


def test_a_vm_of_a_shell(place: Path) -> None:
    """It is listed, and stop reaches it by its name, without a file of that name."""
    vm = write_vm(place, "shell", args=["-S"])
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        listed = json.loads(ask(place / "run", "ps", "--json").stdout)
        assert [("shell", run.process.pid)] == [
            (each["name"], VmDirectory(place / "run", "shell").supervisor_pid()) for each in listed
        ]
        assert "shell" in ask(place / "run", "show", "shell").stdout
        ended = ask(place / "run", "stop", "shell", "--json")
        assert (0, "exited") == (ended.returncode, json.loads(ended.stdout)["state"])
        assert 0 == run.process.wait(PATIENCE)


def test_a_vm_of_a_shell_by_its_name(place: Path) -> None:
    """Told by name, whose file is somewhere else; by the file, once that has gone, with a word on the name."""
    vm = write_vm(place, "shell", args=["-S"])
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        text = vm.path.read_text()
        vm.path.write_text(text + "[nonsense]\n")
        ended = ask(place / "run", "reload", "shell")
        assert (78, True) == (ended.returncode, f"{vm.path}: nonsense" in ended.stderr), ended.stderr
        vm.path.write_text(text.replace("[qemu]", "[qemu]\npowerdown_timeout = 1", 1))
        ended = ask(place / "run", "reload", "shell")
        assert (0, "") == (ended.returncode, ended.stderr)
        assert f"its supervisor (pid {run.process.pid}) reads the file again" in ended.stdout
        run.wait_for("vm.reloaded")
        ended = ask(place / "run", "upgrade", "shell")
        assert (0, "") == (ended.returncode, ended.stderr)
        run.wait_for("vm.adopted")
        vm.path.rename(place / "other.toml")
        for command in ("stop", "reload", "upgrade"):
            ended = ask(place / "run", command, vm.path)
            assert 78 == ended.returncode
            assert f"hint: a VM shell runs: qrapd {command} shell" in ended.stderr
        for _ in range(2):
            assert 0 == ask(place / "run", "stop", "shell", HOME=str(place)).returncode
        assert 0 == run.process.wait(PATIENCE)


@pytest.mark.parametrize(
    "arguments", [["web", "--no-wait"], ["--all", "--no-wait"], ["web", "--timeout", "0.1"]]
)
def test_a_stop_of_what_is_left_goes_on_by_itself(place: Path, arguments: list[str]) -> None:
    """Nobody waits for a guest that takes its time, and it is being stopped all the same."""
    vm = write_vm(place, "web", qemu="powerdown_timeout = 60")
    directory = VmDirectory(place / "run", "web")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        run.process.kill()
        run.process.wait(PATIENCE)
        ended = ask(place / "run", "stop", *arguments, HOME=str(place))
        assert run.children[run.last("vm.started")["qemu_pid"]].alive
        if "--timeout" in arguments:
            assert 69 == ended.returncode
            assert "web: it still runs after 0.1 s" in ended.stderr
        else:
            assert (0, "") == (ended.returncode, ended.stderr)
        deadline = time.monotonic() + PATIENCE
        while directory.supervisor_pid() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # The second signal takes the next step.
        assert 0 == ask(place / "run", "stop", "web", "--no-wait").returncode
        assert 0 == ask(place / "run", "stop", "web").returncode
        run.assert_nothing_left()


def test_a_stop_of_what_is_left_within_its_time(place: Path) -> None:
    """The log of the taking over comes out, as without a limit, and what has failed is a failure."""
    vm = write_vm(place, "web", args=["-S"], qemu="powerdown_timeout = 0")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        run.process.kill()
        run.process.wait(PATIENCE)
        ended = ask(place / "run", "stop", vm.path, "--timeout", "60", "--json")
        assert (0, "exited") == (ended.returncode, json.loads(ended.stdout)["state"])
        assert '"vm.exited"' in ended.stderr
        run.assert_nothing_left()
    ended = ask(place / "run", "stop", vm.path, "--no-wait", "--json")
    assert (0, "exited") == (ended.returncode, json.loads(ended.stdout)["state"]), "nothing is begun"


def test_stop_all_of_a_shell(place: Path) -> None:
    """`stop --all` ends with 0 once none runs."""
    vm = write_vm(place, "shell", args=["-S"])
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        ended = ask(place / "run", "stop", "--all")
        assert (0, "") == (ended.returncode, ended.stderr)
        assert 0 == run.process.wait(PATIENCE)


# --- show, events, forward ----------------------------------------------------------------------------


def test_show(place: Path, host: FakeHost) -> None:
    """Facts, links with what they forward, and events; as JSON all in one."""
    host.tell("link.restored", vm="web", link=0, outage_ms=12.3, passt_pid=4000, generation=2)
    host.tell("vm.ready", vm="db", status="running", links=0)
    shown = ask(place, "show", "web").stdout
    assert re.search(r"^state: +ready for \d+s$", shown, re.MULTILINE)
    assert re.search(r"^0 +swap +up +4000 +1 +2 +12 ms +- +8080:80$", shown, re.MULTILINE)
    assert "web: link 0: back after 12.3 ms" in shown
    assert "db" not in shown
    data = json.loads(ask(place, "show", "web", "--json").stdout)
    assert ["link.restored"] == [event["event"] for event in data["events"]]
    assert ["8080:80"] == data["links"][0]["forwards"]["tcp"]
    assert [] == json.loads(ask(place, "show", "web", "--json", "--events", "0").stdout)["events"]


def test_show_what_is_left(place: Path) -> None:
    """Its directory tells what it can."""
    leave_record(place, "left", ProcessId(os.getpid(), 1), LinkRecord(0, "swap", 2, 2))
    ended = ask(place, "show", "left")
    assert 0 == ended.returncode
    assert "its supervisor is gone, and its QEMU is gone, too" in ended.stdout


def test_events(place: Path, host: FakeHost) -> None:
    """Those of all hosts in the order of their times; of one VM; as JSON; and nothing acts on the terminal."""
    host.tell("vm.ready", vm="web", status="running", links=1)
    with FakeHost(status("unit")).serve(place / "unit/control.sock") as unit:
        unit.tell("run.failed", vm="unit", error="a\nb\x1b[31m")
        host.tell("vm.exited", vm="web", reason="request")
        lines = ask(place, "events").stdout.splitlines()
        one = [json.loads(line) for line in ask(place, "events", "web", "--json").stdout.splitlines()]
    assert ["web: the machine is running, 1 of 1 links connected", "unit: a b", "web: ended: request"] == [
        line[21:] for line in lines
    ]
    assert ["vm.ready", "vm.exited"] == [event["event"] for event in one]
    assert {"web"} == {event["vm"] for event in one}


def test_events_where_some_do_not_tell(place: Path, host: FakeHost) -> None:
    """Whom nobody can ask any more hides nothing; who refuses, or breaks off, is told of, and the status says it."""
    host.tell("vm.ready", vm="web", status="running", links=1)
    with mute(place / "dead/control.sock"):
        pass
    ended = ask(place, "events")
    assert (0, "", True) == (ended.returncode, ended.stderr, "web: the machine is running" in ended.stdout)
    with FakeHost().serve(place / "closed/control.sock"):
        ended = ask(place, "events")
        assert (69, True) == (ended.returncode, "web: the machine is running" in ended.stdout)
        assert "the user 1 may not do this" in ended.stderr
        assert 69 == ask(place, "events", "--socket", place / "closed/control.sock").returncode


def test_events_of_one_that_had_no_room(place: Path, host: FakeHost) -> None:
    """It is asked again, and complained of once."""
    host.busy = 2
    host.tell("vm.ready", vm="db", status="running", links=0)
    with Terminal(place, "events", "--follow") as terminal:
        terminal.child.expect_exact("there is no room for another one")
        terminal.child.expect_exact("db: the machine is running")
        assert "no room" not in terminal.child.before
        terminal.child.sendintr()
        assert 0 == terminal.finish()[0]


def test_events_as_they_come(place: Path, host: FakeHost) -> None:
    """At once, also from a supervisor that is new; Ctrl-C is how it ends, and no failure."""
    host.tell("vm.exited", vm="web", reason="request")
    with Terminal(place, "events", "--follow") as terminal:
        terminal.child.expect_exact("web: ended: request")
        host.tell("vm.ready", vm="db", status="running", links=0)
        terminal.child.expect_exact("db: the machine is running")
        with FakeHost(status("unit")).serve(place / "unit/control.sock") as unit:
            unit.tell("vm.started", vm="unit", qemu_pid=12)
            terminal.child.expect_exact("unit: QEMU started as pid 12")
        host.tell("vm.exited", vm="db", reason="failed")
        terminal.child.expect_exact("db: ended: failed")
        terminal.child.sendintr()
        code, shown = terminal.finish()
    assert (0, False) == (code, "Traceback" in shown)


def test_forwards(place: Path, host: FakeHost) -> None:
    """Added, listed, removed; and how that came about."""
    ended = ask(place, "forward", "add", "web", "2222:22", "--link", "0")
    assert (0, "") == (ended.returncode, ended.stderr)
    assert "web: link 0 forwards tcp 8080:80, 2222:22 (passt was told (pesto)" in ended.stdout
    assert 0 == ask(place, "forward", "add", "web", "53", "--udp", "--link", "0").returncode
    rows = [line.split() for line in ask(place, "forward", "list", "web", "--link", "0").stdout.splitlines()]
    assert [
        ["link", "protocol", "ports"],
        ["0", "tcp", "8080:80"],
        ["0", "tcp", "2222:22"],
        ["0", "udp", "53"],
    ] == rows
    host.by = "swap"
    ended = ask(place, "forward", "remove", "web", "8080:80", "--link", "0", "--json")
    assert {"link": 0, "by": "swap", "tcp": ["2222:22"], "udp": ["53"]} == json.loads(ended.stdout)
    ended = ask(place, "forward", "remove", "web", "2222:22", "--link", "0")
    assert "by a swap: another passt has taken its place" in ended.stdout
    assert [0, 1] == [
        each["link"] for each in json.loads(ask(place, "forward", "list", "web", "--json").stdout)
    ]


# --- completion, and what is imported -----------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Each shell gets its own."""
    ended = qrapd("completion", shell)
    assert (0, "") == (ended.returncode, ended.stderr)
    assert f"_QRAPD_COMPLETE={shell}_complete" in ended.stdout


def test_completion_in_bash(place: Path) -> None:
    """Bash completes a VM's name, by the script, in a directory of VM files and a runtime directory."""
    for directory in ("config/qrapd/vms", "run/webcam", "run/other", "run/webless"):
        (place / directory).mkdir(parents=True)
    for directory in ("run/webcam", "run/other"):  # of the third one nothing is left
        (place / directory / "record.json").touch()
    (place / "config/qrapd/vms/website.toml").touch()
    script = (
        f"source <({sys.executable} -m qrapd completion bash); "
        f'qrapd() {{ {sys.executable} -m qrapd "$@"; }}; '
        "COMP_WORDS=(qrapd show we); COMP_CWORD=2; _qrapd_completion qrapd; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    bin_directory = place / "bin"
    bin_directory.mkdir()
    program = bin_directory / "qrapd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qrapd "$@"\n')
    program.chmod(0o755)
    variables = {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "XDG_CONFIG_HOME": str(place / "config"),
        "RUNTIME_DIRECTORY": str(place / "run"),
    }
    ended = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
        check=False,
    )
    files = [] if os.geteuid() == 0 else ["website"]  # root's are in /etc
    assert ["webcam", *files] == ended.stdout.split(), ended.stderr


def every_command(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands, those of groups included, by what is typed."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path}{name}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{path}{name} ")


def test_every_command_is_there() -> None:
    """Each that is registered can be imported, has its own name, and help in a sentence."""
    found = dict(every_command(main))
    assert set(COMMANDS) <= set(found)
    for name, command in found.items():
        assert name.rpartition(" ")[2] == command.name
        assert command.get_short_help_str(200).endswith(".")


@pytest.mark.parametrize("module", ["vm", "files", "host", "options"])
def test_what_a_start_does_not_import(module: str) -> None:
    """`qrapd run` pays for no client and no table."""
    importlib.import_module(f"qrapd.commands.{module}")
    code = (
        f"import sys, qrapd.cli, qrapd.commands.{module}; "
        "heavy = 'httpx', 'rich', 'starlette', 'uvicorn', 'anyio', 'pydantic'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "[]\n" == ended.stdout


# --- tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0s"),
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (61, "1m 1s"),
        (3600, "1h"),
        (7322, "2h 2m"),
        (90000, "1d 1h"),
    ],
)
def test_spans(seconds: float, words: str) -> None:
    """The two largest units."""
    assert words == span(seconds)


def test_since() -> None:
    """By JSON's words for a moment; what is none is no reason to fail."""
    now = datetime.now(UTC)
    moments: list[Any] = [
        (now - timedelta(seconds=61)).isoformat().replace("+00:00", "Z"),
        None,
        "soon",
        "2026-01-01",
    ]
    assert ["1m 1s", "-", "-", "-"] == [since(each, now) for each in moments]


def test_aligned() -> None:
    """Columns below each other, no blanks at the end."""
    assert ["a   bb", "cc"] == aligned([["a", "bb"], ["cc", ""]])


# --- the man page -------------------------------------------------------------------------------------


def test_the_man_page_has_every_command_and_option() -> None:
    """What `--help` names is in qrapd(1)."""
    page = (Path(__file__).resolve().parent.parent / "docs/man/qrapd.1").read_text()
    text = re.sub(r"\\f.|\\ |\"|^\.\w+ ?", "", page.replace(r"\-", "-"), flags=re.MULTILINE)
    words = set(re.split(r"[^\w-]+", text))
    missing = []
    for name, command in [("", main), *every_command(main)]:
        if not isinstance(command, click.Group) and not re.search(rf"^qrapd {name}\b", text, re.MULTILINE):
            missing.append(name)
        context = click.Context(command, help_option_names=["-h", "--help"])
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option):
                missing += [
                    f"{name} {each}"
                    for each in (*parameter.opts, *parameter.secondary_opts)
                    if each not in words
                ]
    assert [] == missing
