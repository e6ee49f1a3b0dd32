# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's units, as files and in a real systemd: its VMs outlive it, but not the host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from booted import PROJECT, Booted, install
from qrapd.guest import GuestImage
from support import VmFile, fetch, free_port, write_vm
from test_systemd_units import (
    analyze,
    count_fds,
    drop_in,
    in_systemd,
    is_ordered,
    requests,
    told,
    uptime,
    wait_for_http,
    write,
)

UNITS = PROJECT / "systemd"
SERVICE = UNITS / "qrapd-agent.service"
DOCUMENT = (PROJECT / "docs/agent.md").read_text()

EXPOSURE = 2.6
"""What `systemd-analyze security` may say at most; 10 is everything open."""

AGENT, SOCKET = "qrapd-agent.service", "qrapd-agent.socket"

CGROUP = "/sys/fs/cgroup/machine.slice/machine-qrapd.slice/qrapd-agent.service"

DROP_INS: dict[str, str] = dict(
    re.findall(r"\*\*([^*]+)\*\*(?:(?!\*\*|```).)*?```ini\n(.*?)```", DOCUMENT, re.DOTALL)
)
"""Those of the documentation, under what is written in bold before them."""


# ---- as files


def copy_units(source: Path, directory: Path, text: str = "") -> Path:
    """The agent's units with programs that are there, and with a drop-in."""
    for name in (AGENT, SOCKET):
        lines = (source / name).read_text()
        (directory / name).write_text(re.sub("=qrapd ", "=/bin/true ", lines))
    if text:
        (directory / f"{AGENT}.d").mkdir()
        (directory / f"{AGENT}.d/10.conf").write_text(text)
    return directory / AGENT


def settings(unit: Path) -> dict[str, list[str]]:
    """A unit's lines, by what they set."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^([A-Za-z]+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("source", [UNITS, UNITS / "user"], ids=["system", "user"])
def test_systemd_has_no_complaint(tmp_path: Path, source: Path) -> None:
    """Not one, in any version from 252 on."""
    unit = copy_units(source, tmp_path)
    done = analyze("verify", "--man=no", unit, unit.with_name(SOCKET))
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("name", DROP_INS)
def test_systemd_has_no_complaint_about_a_drop_in(tmp_path: Path, name: str) -> None:
    """Those that the documentation shows."""
    done = analyze("verify", "--man=no", copy_units(UNITS, tmp_path, DROP_INS[name]))
    assert (0, "") == (done.returncode, done.stderr)


def test_the_document_has_its_drop_ins() -> None:
    """The pattern that finds them finds what is there."""
    assert DOCUMENT.count("```ini") == len(DROP_INS)
    assert "Files that the API may write." in DROP_INS


def test_the_unit_is_locked_in(tmp_path: Path) -> None:
    """As far as it can be, and as the documentation says."""
    done = analyze("security", "--offline=true", "--no-pager", copy_units(UNITS, tmp_path))
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert EXPOSURE >= float(exposure[1]), "\n".join(x for x in done.stdout.splitlines() if x.startswith("✗"))
    assert f"`systemd-analyze security qrapd-agent` says {EXPOSURE}" in DOCUMENT


@pytest.mark.parametrize(
    ("directory", "different"),
    [(UNITS, {"PrivateUsers", "ProtectProc", "SystemCallFilter"}), (UNITS / "user", set())],
    ids=["system", "user"],
)
def test_it_is_locked_in_as_the_unit_for_one_vm(directory: Path, different: set[str]) -> None:
    """Line by line, but for those that have their reasons in the unit."""
    one, agent = settings(directory / "qrapd@.service"), settings(directory / AGENT)
    names = {
        name
        for name in one
        if re.match(
            "Private|Protect|Restrict[A-Z]|SystemCall|Capab|Ambient|Lock|NoNew|Keyring|RemoveIPC|Device", name
        )
    }
    assert 10 < len(names)
    assert different == {name for name in names if one[name] != agent.get(name)}
    text = (directory / AGENT).read_text()
    assert all(name in text for name in different)


@pytest.mark.parametrize("directory", [UNITS, UNITS / "user"], ids=["system", "user"])
def test_the_names_of_all_kept_fds_fit(directory: Path) -> None:
    """Into $LISTEN_FDNAMES, even the longest: past 128 KiB in one variable (MAX_ARG_STRLEN) no agent could start."""
    longest = f"{'x' * 63}.passt999-output:"
    (most,) = settings(directory / AGENT)["FileDescriptorStoreMax"]
    assert len("LISTEN_FDNAMES=") + int(most) * len(longest) < 128 * 1024
    assert 200 * 5 < int(most)  # two for a VM and three for a link: 200 VMs with one


# ---- in systemd


@pytest.fixture(scope="module")
def machine(booted: Booted, guest: GuestImage) -> Booted:
    """With qrapd installed."""
    return install(booted, guest)


@pytest.fixture
def agent(machine: Booted) -> Iterator[Booted]:
    """The machine with nothing of an agent in it, before and after."""
    clear(machine)
    machine.systemctl("start", SOCKET)
    yield machine
    clear(machine)


def clear(machine: Booted) -> None:
    """No agent, none of its VMs, and no file for either."""
    machine.systemctl("stop", SOCKET, AGENT, check=False)
    machine.shell(f"for pid in $(cat {CGROUP}/cgroup.procs); do kill -KILL $pid; done", check=False)
    machine.systemctl("reset-failed", SOCKET, AGENT, check=False)
    machine.shell(
        "rm -rf /etc/qrapd/agent.toml /etc/qrapd/vms/*.toml /{run,etc}/systemd/system/qrapd-agent*.d /run/qrapd\n"
        "chown root:root /etc/qrapd/vms\n"
        "systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/qrapd.conf",  # as after a boot
        check=True,
    )
    machine.systemctl("daemon-reload")


def give(machine: Booted, name: str, guest: GuestImage, **options: Any) -> VmFile:
    """A VM that the agent is to run."""
    file = write(machine, name, guest, **options)
    file.path.write_text("autostart = true\n" + file.path.read_text())
    return file


def give_bare(machine: Booted, name: str, autostart: str = "true") -> None:
    """One with nothing to boot, which ends at once."""
    file = write_vm(machine.path("/etc/qrapd/vms"), name, qemu="powerdown_timeout = 0")
    file.path.write_text(f"autostart = {autostart}\n" + file.path.read_text())


def ps(machine: Booted, user: str | None = None, base: str = "/run/qrapd") -> dict[str, dict[str, Any]]:
    """What `qrapd ps` tells, by the VMs' names."""
    done = machine.run("/usr/local/bin/qrapd", "ps", "--json", "--runtime-dir", base, user=user)
    return {each["name"]: each for each in json.loads(done.stdout or "[]")}


def pids(machine: Booted, name: str) -> tuple[int, int]:
    """Of a VM's QEMU and passt."""
    status = ps(machine)[name]
    return status["qemu_pid"], status["links"][0]["passt_pid"]


def wait_for_state(machine: Booted, name: str, state: str) -> None:
    """Until `qrapd ps` says so."""
    machine.wait_for(f"{name}: {state}", lambda: ps(machine).get(name, {}).get("state") == state, AGENT)


def kill_agent(machine: Booted) -> None:
    """kill -9; the next one has taken over when this returns."""
    before = len(machine.journal("QRAPD_EVENT=agent.ready"))
    machine.run("kill", "-KILL", machine.show(AGENT, "MainPID"), check=True)
    machine.wait_for("another agent", lambda: len(machine.journal("QRAPD_EVENT=agent.ready")) > before, AGENT)


ASK = """
import http.client, socket, sys
method, path, *rest = sys.argv[1:]
caller = http.client.HTTPConnection("qrapd")
caller.sock = socket.socket(socket.AF_UNIX)
caller.sock.connect("/run/qrapd/agent.sock")
caller.request(method, path, rest[0].encode() if rest else None, {"Content-Type": "application/toml"} if rest else {})
answer = caller.getresponse()
print(answer.status, answer.read().decode())
"""
"""For a Python as it is on every host; curl is not."""


def ask(machine: Booted, user: str, *words: str) -> tuple[int, str]:
    """Ask the API with a method, a path and maybe a VM's file: status and body."""
    status, _, body = machine.run(
        "/usr/bin/python3", "-c", ASK, *words, user=user, check=True
    ).stdout.partition(" ")
    return int(status), body


class TestInSystemd:
    """The units as they are installed."""

    pytestmark = in_systemd

    def test_the_first_call_starts_it(self, agent: Booted, guest: GuestImage) -> None:
        """And it starts the VMs that have `autostart`, and those only."""
        file = give(agent, "first", guest)
        give_bare(agent, "second", "false")
        assert "inactive" == agent.show(AGENT, "ActiveState")
        assert {"first", "second"} == ps(agent).keys()
        wait_for_state(agent, "first", "ready")
        assert ("agent", "exited") == (ps(agent)["first"]["origin"], ps(agent)["second"]["state"])
        wait_for_http(agent, file.ports[0], AGENT)
        modes = agent.shell("stat -c '%a %U' /run/qrapd /run/qrapd/agent.sock /run/qrapd/first", check=True)
        assert ["755 qrapd", "666 root", "700 qrapd"] == modes.stdout.splitlines()
        agent.wait_for("words", lambda: agent.show(AGENT, "StatusText") == "2 VMs: 1 exited, 1 ready", AGENT)
        agent.shell("qrapd stop first --timeout 60", check=True)
        assert {"qrapd"} == set(agent.processes(AGENT).values())

    def test_it_is_killed_under_traffic(self, agent: Booted, guest: GuestImage) -> None:
        """Each time another one takes the VM over with what is in the fd store, and no request fails."""
        file = give(agent, "lasting", guest)
        agent.systemctl("start", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        before, running = uptime(file.ports[0]), pids(agent, "lasting")
        fds = count_fds(agent, running[0])
        with requests(file.ports[0]) as failures:
            for _ in range(3):
                kill_agent(agent)
        assert [] == failures
        assert running == pids(agent, "lasting")
        assert fds == count_fds(agent, running[0])
        assert before < uptime(file.ports[0])
        assert 3 == told(agent, "lasting").count("vm.adopted")
        # QEMU's pidfd and output, the link's stream, and passt's pidfd and output: each once.
        assert "5" == agent.show(AGENT, "NFileDescriptorStore")

    def test_it_hangs(self, agent: Booted, guest: GuestImage) -> None:
        """The watchdog replaces an agent whose loop stands still, and the guest is unharmed."""
        drop_in(agent, "10", "WatchdogSec=2\nTimeoutAbortSec=1\n", "qrapd-agent")
        file = give(agent, "calm", guest)
        agent.systemctl("start", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        before, running = uptime(file.ports[0]), pids(agent, "calm")
        agent.run("kill", "-STOP", agent.show(AGENT, "MainPID"), check=True)
        agent.wait_for("an adoption", lambda: "vm.adopted" in told(agent, "calm"), AGENT)
        assert running == pids(agent, "calm")
        assert before < uptime(file.ports[0])

    def test_restart_reload_and_upgrade(self, agent: Booted, guest: GuestImage) -> None:
        """No VM notices, and a reload starts what is new."""
        file = give(agent, "calm", guest)
        agent.systemctl("start", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        before, running = uptime(file.ports[0]), pids(agent, "calm")
        with requests(file.ports[0]) as failures:
            agent.systemctl("restart", AGENT)
            give_bare(agent, "new")
            agent.systemctl("reload", AGENT)
            wait_for_state(agent, "new", "ready")
            process = agent.show(AGENT, "MainPID")
            agent.systemctl("kill", "--signal=USR2", "--kill-who=main", AGENT)
            agent.wait_for("an upgrade", lambda: told(agent, "calm").count("vm.adopted") == 2, AGENT)
            wait_for_state(agent, "calm", "ready")
        assert [] == failures
        assert (process, "running") == (agent.show(AGENT, "MainPID"), agent.show(AGENT, "SubState"))
        assert running == pids(agent, "calm")
        assert before < uptime(file.ports[0])
        assert "link.lost" not in told(agent, "calm")

    def test_a_stop_leaves_the_vms(self, agent: Booted, guest: GuestImage) -> None:
        """They run on without it, and the next one has them again; with their connections, where QEMU may be asked."""
        file = give(agent, "alone", guest)
        agent.systemctl("start", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        before, running = uptime(file.ports[0]), pids(agent, "alone")
        agent.systemctl("stop", SOCKET, AGENT)
        assert ("inactive", "success") == (agent.show(AGENT, "ActiveState"), agent.show(AGENT, "Result"))
        assert not agent.path("/run/qrapd/agent.sock").exists()
        assert before < uptime(file.ports[0])
        agent.systemctl("start", AGENT)
        wait_for_state(agent, "alone", "ready")
        wait_for_http(agent, file.ports[0], AGENT)
        assert running[0] == pids(agent, "alone")[0]
        assert before < uptime(file.ports[0])
        yama = Path("/proc/sys/kernel/yama/ptrace_scope")
        if not yama.exists() or int(yama.read_text()) == 0:
            assert running == pids(agent, "alone")
            assert "link.lost" not in told(agent, "alone")

    def test_without_fds_and_without_ptrace(self, agent: Booted, guest: GuestImage) -> None:
        """Where a stop empties the fd store and QEMU's stream may not be had, links get another passt, and go on."""
        drop_in(agent, "10", "SystemCallFilter=~pidfd_getfd\nFileDescriptorStoreMax=0\n", "qrapd-agent")
        file = give(agent, "robbed", guest)
        agent.systemctl("start", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        before, running = uptime(file.ports[0]), pids(agent, "robbed")
        agent.systemctl("stop", AGENT, check=False)
        agent.systemctl("start", AGENT)
        agent.wait_for("restored", lambda: "link.restored" in told(agent, "robbed"), AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        assert running[0] == pids(agent, "robbed")[0]
        assert before < uptime(file.ports[0])

    def test_the_host_goes_down(self, agent: Booted, guest: GuestImage) -> None:
        """Then the guests are powered down in order; and a boot brings agent and VMs up again."""
        log = agent.path("/var/lib/qrapd/log")
        keep_log(agent, "/etc/systemd/system", "qrapd agent --config-dir /etc/qrapd", "/var/lib/qrapd/log")
        file = give(agent, "entire", guest)
        agent.systemctl("enable", "--now", AGENT)
        wait_for_http(agent, file.ports[0], AGENT)
        try:
            agent.reboot()
            log = agent.path("/var/lib/qrapd/log")
            assert float(fetch(file.ports[0]).split()[-2]) < 600  # a guest of this boot
        finally:
            agent.systemctl("disable", AGENT)
            said = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            log.unlink()
        assert powered_down_in_order(said), said

    def test_as_documented(self, agent: Booted) -> None:
        """The lines from an installed qrapd to `qrapd ps`, as they stand there."""
        section = DOCUMENT.partition("## From here to `qrapd ps`\n")[2].partition("\n## ")[0]
        (toml,), (lines,) = (
            re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("toml", "sh")
        )
        make, *rest = lines.splitlines()
        assert "make install" == make
        assert len(rest) < 9
        agent.systemctl("stop", SOCKET)
        directory = agent.path("/root/agent")
        directory.mkdir(exist_ok=True)
        text = toml.replace("8080", str(free_port())).replace('"1G"', '"32M"')
        (directory / "web.toml").write_text(text)
        script = "cd /root/agent; truncate -s 1M web.qcow2\n" + "\n".join(rest)
        try:
            shown = agent.shell(script, check=True).stdout.splitlines()
            assert ["name", "web"] == [line.split()[0] for line in shown]
            wait_for_state(agent, "web", "ready")
            agent.shell("qrapd kill web", check=True)
        finally:
            agent.systemctl("disable", AGENT)
            agent.shell("rm -rf /root/agent /var/lib/qrapd/web.qcow2")

    @pytest.mark.parametrize("agent_first", [True, False])
    def test_beside_a_unit_for_one_vm(self, agent: Booted, agent_first: bool) -> None:
        """Whoever starts and stops first: neither takes anything away from the other, whoever its user is."""
        drop_in(agent, "10", "User=vm-own\nStateDirectory=\n", "qrapd@own")
        agent.shell("id vm-own || useradd --system vm-own; usermod -aG kvm vm-own", check=True)
        give_bare(agent, "mine")
        for name in ("one", "own"):
            give_bare(agent, name, "false")
        units = ["qrapd@one", "qrapd@own"]
        order = [[AGENT], units] if agent_first else [units, [AGENT]]
        for each in order:
            agent.systemctl("start", *each)
        wait_for_state(agent, "mine", "ready")
        there = ps(agent)
        assert {"mine": "agent", "one": "unit", "own": "unit"} == {
            name: there[name]["origin"] for name in there
        }
        assert {"ready"} == {each["state"] for each in there.values()}
        # The agent does not ask them: it tells what it sees, which of another user's is nothing.
        told = {each["name"]: each for each in json.loads(ask(agent, "root", "GET", "/v1/vms")[1])}
        seen = [told["one"][key] for key in ("state", "origin", "qemu_pid")]
        assert ["ready", "unit", there["one"]["qemu_pid"]] == seen
        assert "/run/qrapd/one/control.sock" in told["one"]["error"]
        assert "cannot be seen: Permission denied: /run/qrapd/own" in told["own"]["error"]
        for name in ("one", "own"):
            assert 409 == ask(agent, "root", "POST", f"/v1/vms/{name}/start")[0]
        owners = agent.shell("stat -c '%U %a' /run/qrapd /run/qrapd/{mine,one,own}", check=True).stdout.split(
            "\n"
        )
        assert ["qrapd 755", "qrapd 700", "qrapd 700", "vm-own 700", ""] == owners
        for each in order:
            agent.systemctl("stop", *each, *([SOCKET] if AGENT in each else []))
            still = {name: status for name, status in ps(agent).items() if status["qemu_pid"]}
            assert {name: there[name]["qemu_pid"] for name in still} == {
                name: status["qemu_pid"] for name, status in still.items()
            }
            assert "mine" in still
        assert {"mine"} == still.keys()
        assert {"mine"} == {each.name for each in agent.path("/run/qrapd").iterdir() if each.is_dir()}
        agent.systemctl("start", AGENT)
        wait_for_state(agent, "mine", "ready")
        assert there["mine"]["qemu_pid"] == ps(agent)["mine"]["qemu_pid"]
        agent.shell("qrapd stop --all", check=True)
        assert [] == [each.name for each in agent.path("/run/qrapd").iterdir() if each.is_dir()]

    def test_who_may_do_what(self, agent: Booted) -> None:
        """Members of the one group, also by a supplementary one, everything; of the other look; else nothing."""
        script = "getent group vm-admins || { groupadd vm-admins; groupadd vm-watchers; }\n"
        script += "for u in ann bob cid; do id $u || useradd --create-home $u; done\n"
        script += "usermod -aG vm-admins ann; usermod -aG vm-watchers bob"
        agent.shell(script, check=True)
        agent.path("/etc/qrapd/agent.toml").write_text(
            'group = "vm-admins"\nread_only_group = "vm-watchers"\n'
        )
        give_bare(agent, "some")
        agent.systemctl("start", AGENT)
        calls = (("GET", "/v1/vms"), ("POST", "/v1/vms/some/stop"))
        allowed = {
            user: tuple(ask(agent, user, *call)[0] for call in calls)
            for user in ("cid", "bob", "ann", "root")
        }
        expected = {"cid": (403, 403), "bob": (200, 403), "ann": (200, 202), "root": (200, 202)}
        assert expected == allowed
        assert "some" in ps(agent, "bob")

    def test_a_group_that_is_not_there(self, agent: Booted) -> None:
        """The agent says so and tries again: it may come from a directory that is not up yet."""
        agent.path("/etc/qrapd/agent.toml").write_text('group = "vm-nobody"\n')
        agent.systemctl("start", AGENT, check=False)
        assert "69" == agent.show(AGENT, "ExecMainStatus")
        agent.shell("groupadd vm-nobody", check=True)
        try:
            agent.wait_for("an agent", lambda: agent.show(AGENT, "ActiveState") == "active", AGENT)
        finally:
            agent.shell("groupdel vm-nobody", check=True)

    def test_a_wrong_agent_toml_is_not_tried_for_ever(self, agent: Booted) -> None:
        """Nor by a caller who waits: systemd gives up on the socket, and who calls is told."""
        agent.path("/etc/qrapd/agent.toml").write_text('groop = "x"\n')
        assert 69 == agent.run("/usr/local/bin/qrapd", "ps").status
        agent.wait_for("the limit", lambda: agent.show(SOCKET, "Result") == "trigger-limit-hit", SOCKET)
        assert ("failed", "78") == (agent.show(AGENT, "ActiveState"), agent.show(AGENT, "ExecMainStatus"))
        agent.path("/etc/qrapd/agent.toml").unlink()
        agent.systemctl("start", AGENT)
        assert {} == ps(agent)

    def test_put(self, agent: Booted) -> None:
        """Files are root's; the API says so, and writes them once it is let in as the documentation has it."""
        put = ("PUT", "/v1/vms/put", '[qemu]\nargs = ["-m", "32M"]\n')
        status, body = ask(agent, "root", *put)
        assert 503 == status
        assert "Read-only file system" in json.loads(body)["detail"]
        assert "docs/agent.md" in json.loads(body)["hint"]
        drop_in(agent, "10", DROP_INS["Files that the API may write."], "qrapd-agent")
        (command,) = re.findall(r"^chown .*vms.*$", DOCUMENT, re.MULTILINE)
        agent.shell(command, check=True)
        agent.systemctl("restart", AGENT)
        assert 201 == ask(agent, "root", *put)[0]
        assert 202 == ask(agent, "root", "POST", "/v1/vms/put/start")[0]
        wait_for_state(agent, "put", "ready")
        agent.shell("qrapd kill put", check=True)
        assert 204 == ask(agent, "root", "DELETE", "/v1/vms/put")[0]

    def test_without_root(self, agent: Booted, guest: GuestImage) -> None:
        """A user's own: by their socket, through a crash, and down in order with the user's manager."""
        agent.shell(
            "id una || useradd --create-home una; mkdir -p ~una/.config/qrapd/vms; loginctl enable-linger una"
        )
        uid = agent.run("id", "-u", "una", check=True).stdout.strip()
        base = f"/run/user/{uid}/qrapd"
        agent.wait_for("una's systemd", lambda: agent.path(f"/run/user/{uid}/systemd/private").exists())
        keep_log(agent, "/run/systemd/user", "qrapd agent", "%h/log")
        file = write(agent, "hers", guest)
        there = agent.path("/home/una/.config/qrapd/vms/hers.toml")
        there.write_text("autostart = true\n" + file.path.read_text())
        file.path.unlink()
        agent.shell("chown -R una: ~una", check=True)
        agent.systemctl("daemon-reload", user="una")
        agent.systemctl("start", SOCKET, user="una")
        assert {"hers"} == ps(agent, "una", base).keys()
        wait_for_http(agent, file.ports[0], "user@*")
        before, qemu = uptime(file.ports[0]), ps(agent, "una", base)["hers"]["qemu_pid"]
        agent.run("kill", "-KILL", agent.show(AGENT, "MainPID", user="una"), check=True)
        agent.systemctl("restart", AGENT, user="una")
        assert qemu == ps(agent, "una", base)["hers"]["qemu_pid"]
        agent.systemctl("stop", SOCKET, AGENT, user="una")
        assert before < uptime(file.ports[0])
        agent.systemctl("start", AGENT, user="una")
        agent.systemctl("stop", f"user@{uid}")
        log = agent.path("/home/una/log").read_text()
        said = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        agent.shell("loginctl disable-linger una; rm -rf /run/systemd/user/qrapd-agent.service.d", check=True)
        assert powered_down_in_order(said), said


def keep_log(machine: Booted, place: str, command: str, path: str) -> None:
    """Have the agent's log in a file that is there after a boot, too."""
    lines = f"[Service]\nExecStart=\nExecStart=/usr/local/bin/{command} --runtime-dir %t/qrapd --log-format json\n"
    directory = machine.path(place) / f"{AGENT}.d"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.conf").write_text(f"{lines}StandardError=append:{path}\n")
    machine.systemctl("daemon-reload")


def powered_down_in_order(said: Sequence[dict[str, Any]]) -> bool:
    """Whether a log tells that an agent has powered its guest down, and that this was the end of it."""
    ends = [each["how"] for each in said if each["event"] == "agent.stopping"]
    lines = [
        each["event"] + ":" + str(each.get("line") or each.get("reason") or each.get("how")) for each in said
    ]
    expected = ["agent.stopping:power-down", "guest.console:guest: powering down", "vm.exited:request"]
    return "power-down" in ends and is_ordered(expected, lines)
