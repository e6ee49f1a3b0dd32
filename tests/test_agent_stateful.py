# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever happens to an agent, its VMs and their files, in whatever order: what it says is what there is.

Hypothesis makes up the steps; the agents, the QEMUs and the passts are real. After each step the API must come to say
what the processes show, `qrapd ps` must print what the API says, and what the step was to bring about must be so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from agent_process import agent_process, eventually, vm_text
from qrapd.cli import main
from support import free_port

pytestmark = pytest.mark.xdist_group("agent")

NAMES = ("a", "b", "c", "d")

PATIENT = "[restart]\nlimit = 1000\nwindow = 1\n"
"""However often something is killed here, that is no reason to give up."""


@dataclass(frozen=True)
class Variant:
    """What a VM's file may say."""

    links: int = 1
    autostart: bool = False
    comes_back: bool = False
    """after a failure"""
    valid: bool = True
    mtu: int | None = None
    forwards: bool = False

    def text(self, port: int) -> str:
        if not self.valid:
            return "[qemu]\nno_such_key = 1\n"
        made = vm_text(
            links=self.links,
            tcp_ports=[f"127.0.0.1/{port}:80"] if self.forwards else [],
            top="autostart = true" if self.autostart else "",
            mtu=self.mtu,
        )
        policy = 'policy = "on-failure"\n' if self.comes_back else ""
        return f"{made}{PATIENT}{policy}"


BROKEN = Variant(valid=False)
VARIANTS = (
    Variant(autostart=True),
    Variant(links=2, autostart=True, comes_back=True),
    Variant(forwards=True),
    Variant(links=0),
    Variant(mtu=1400, comes_back=True),
)

names = st.sampled_from(NAMES)
picks = st.integers(0, len(NAMES) - 1)
"""One of those that run, or do not: what runs is partly chance, and what hypothesis draws must not depend on it."""
variants = st.sampled_from(VARIANTS)
indices = st.integers(0, 2)
meanwhile = st.lists(
    st.tuples(
        st.sampled_from(["kill qemu", "kill passt", "edit", "remove"]),
        names,
        st.sampled_from((*VARIANTS, BROKEN)),
    ),
    max_size=3,
)
hurried = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "stop", "kill", "restart", "links/0/swap", "reload", "kill qemu", "kill passt"]
        ),
        names,
    ),
    min_size=1,
    max_size=6,
)
ends = st.sampled_from([None, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])


@dataclass
class Known:
    """What a VM is to be like."""

    up: bool = False
    fresh: bool = True
    """this agent has not started it, nor been asked to"""
    by: Variant | None = None
    """what it goes by while it runs; None: not known"""


class Agents(RuleBasedStateMachine):
    """The steps, and what is to come of them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.failed = False
        self.disk: dict[str, Variant] = {}
        self.vms: dict[str, Known] = {}
        """those that the agent knows"""
        self.begun: set[str] = set()
        """those that no later agent starts by itself: they have been up, or stopped"""
        self.stack = contextlib.ExitStack()
        self.agent = self.stack.enter_context(agent_process())
        self.ports = {name: free_port() for name in NAMES}
        self.seen = 0

    def teardown(self) -> None:
        with self.stack:
            if not self.failed and self.agent.pid is not None:
                with self.step("the host goes down"):
                    self.hasten()
                    self.agent.end(signal.SIGPWR)
                    self.agent.assert_nothing_left()

    @contextlib.contextmanager
    def step(self, *words: object) -> Iterator[None]:
        """Do something; when it fails, say after what."""
        self.steps.append(" ".join(map(str, words)))
        try:
            yield
            self.look_for_bugs()
        except BaseException as error:
            self.failed = True
            error.add_note("the steps:\n  " + "\n  ".join(self.steps))
            error.add_note(f"the log:\n{self.agent.tail()}")
            raise

    def look_for_bugs(self) -> None:
        """What the agent tells of its own mistakes."""
        assert [] == [each for each in self.agent.events() if each["event"] == "bug.found"]
        assert [] == self.agent.stray()

    # --- what must be so after each step --------------------------------------------------------------

    def settle(self) -> dict[str, dict[str, Any]]:
        """Wait until nothing is under way, and what the API says is what there is."""
        eventually(lambda: not self.differences(), lambda: f"it stays like this: {self.differences()}")
        said = self.agent.vms()
        assert sorted(said) == sorted(self.vms), "the VMs that the agent knows"
        assert self.printed() == [without_counts(said[name]) for name in sorted(said)], (
            "what `qrapd ps` prints"
        )
        assert [] == self.differences(), "it did not last"
        return said

    def settle_as(self, **changed: bool) -> dict[str, dict[str, Any]]:
        """Settle, with all VMs up or down as they are to be."""
        for name, up in changed.items():
            self.vms[name].up = up
        wanted = {name: known.up for name, known in sorted(self.vms.items())}

        def as_wanted() -> bool:
            return wanted == {name: is_up(vm) for name, vm in self.agent.vms().items()}

        eventually(as_wanted, lambda: f"wanted {wanted}, there are {self.agent.vms()}")
        said = self.settle()
        self.note_begun()
        assert wanted == {name: is_up(vm) for name, vm in said.items()}
        return said

    def differences(self) -> list[str]:
        """Between what the API says and what runs."""
        found = []
        there = {each.pid: each for each in self.agent.running()}
        if there.pop(self.agent.pid or 0, None) is None:
            found.append("the agent is gone")
        for name, vm in self.agent.vms().items():
            if vm["state"] not in ("ready", "exited", "failed"):
                found.append(f"{name} is {vm['state']}")
                continue
            links = vm["links"]
            if not is_up(vm):
                if vm["qemu_pid"] is not None or any(link["passt_pid"] is not None for link in links):
                    found.append(f"{name} is down, and has processes: {vm}")
                continue
            qemu = there.pop(vm["qemu_pid"], None)
            words = command_line(vm["qemu_pid"])
            if qemu is None or not qemu.is_qemu or f"guest={name}" not in words:
                found.append(f"{name} is up, and its QEMU is {qemu}")
            if sum("virtio-net-pci" in word for word in words) != len(links):
                found.append(f"{name} has another number of NICs: {vm}")
            for link in links:
                passt = there.pop(link["passt_pid"], None)
                if link["state"] != "up" or passt is None or not passt.is_passt:
                    found.append(f"{name} has a link with the passt {passt}: {link}")
        return found + [f"runs, and nobody says so: {each}" for each in there.values()]

    def printed(self) -> list[dict[str, Any]]:
        """What ``qrapd ps --json`` prints."""
        result = CliRunner().invoke(main, ["ps", "--json", "--runtime-dir", str(self.agent.base)])
        return [without_counts(each) for each in json.loads(result.stdout)]

    def ask(self, name: str, what: str) -> int:
        answer = self.agent.client.post(f"/v1/vms/{name}/{what}").status_code
        if what in ("stop", "kill") and answer == 202:
            self.begun.add(name)
        return answer

    # --- the steps: what the API takes ----------------------------------------------------------------

    @initialize(files=st.tuples(variants, variants, variants))
    def begin(self, files: tuple[Variant, ...]) -> None:
        with self.step("begin", files):
            for name, variant in zip(NAMES, files, strict=False):
                self.write(name, variant)
            self.start_agent()

    @rule(pick=picks)
    def start_what_is_down(self, pick: int) -> None:
        for name in chosen(pick, self.names_down()):
            self.start(name)

    @rule(name=names)
    def start(self, name: str) -> None:
        with self.step("start", name):
            known = self.vms.get(name)
            assert self.ask(name, "start") == (404 if known is None else 409 if known.up else 202)
            if known is not None and not known.up:
                self.expect_start(name)

    @rule(name=names, what=st.sampled_from(["stop", "kill"]))
    def stop(self, name: str, what: str) -> None:
        with self.step(what, name):
            self.hasten()
            assert self.ask(name, what) == (202 if name in self.vms else 404)
            self.settle_as(**{name: False} if name in self.vms else {})

    @rule(pick=picks)
    def restart_what_runs(self, pick: int) -> None:
        for name in chosen(pick, self.names_up()):
            self.restart(name)

    @rule(name=names)
    def restart(self, name: str) -> None:
        with self.step("restart", name):
            known = self.vms.get(name)
            before = self.pid(name)
            self.hasten()
            assert self.ask(name, "restart") == (202 if known else 404)
            if known is None:
                return
            if not known.up:
                self.expect_start(name)
                return
            eventually(lambda: self.pid(name) not in (before, None), f"{name} was not restarted")
            if self.valid(name):
                known.by = self.disk[name]
            self.settle_as()

    @rule(pick=picks, index=indices)
    def swap_of_one(self, pick: int, index: int) -> None:
        for name in chosen(pick, self.names_up()):
            self.swap(name, index)

    def swap(self, name: str, index: int) -> None:
        with self.step("swap", name, index):
            vm = self.agent.vms().get(name)
            answer = self.ask(name, f"links/{index}/swap")
            if vm is None or index >= len(vm["links"]):
                assert answer == 404
            elif not is_up(vm):
                assert answer == 409
            else:
                assert answer == 202
                self.expect_another_passt(name, index, vm)

    @rule(name=names)
    def reload(self, name: str) -> None:
        with self.step("reload", name):
            known = self.vms.get(name)
            answer = self.ask(name, "reload")
            if known is None or not known.up:
                assert answer == (404 if known is None else 409)
                return
            assert answer == (202 if self.valid(name) else 422)
            if answer == 202:
                known.by = self.disk[name]
            self.settle_as()

    @rule(name=names, variant=st.sampled_from((*VARIANTS, BROKEN)))
    def put(self, name: str, variant: Variant) -> None:
        with self.step("put", name, variant):
            text, is_new = variant.text(self.ports[name]), name not in self.disk
            answer = self.agent.client.put(
                f"/v1/vms/{name}", content=text, headers={"Content-Type": "application/toml"}
            )
            assert answer.status_code == (422 if not variant.valid else 201 if is_new else 200)
            if variant.valid:
                self.disk[name] = variant
                self.vms.setdefault(name, Known())
            self.settle_as()

    @rule(name=names)
    def delete(self, name: str) -> None:
        with self.step("delete", name):
            known = self.vms.get(name)
            answer = self.agent.client.delete(f"/v1/vms/{name}").status_code
            assert answer == (404 if known is None else 409 if known.up else 204)
            if answer == 204:
                del self.vms[name]
                self.disk.pop(name, None)
            self.settle_as()

    # --- the steps: what happens to files and processes -----------------------------------------------

    @rule(name=names, variant=st.sampled_from((*VARIANTS, BROKEN)), read=st.booleans())
    def edit(self, name: str, variant: Variant, read: bool) -> None:
        with self.step("edit", name, variant, "and SIGHUP" if read else ""):
            self.write(name, variant)
            if read:
                self.read_again()

    @rule(name=names, read=st.booleans())
    def remove(self, name: str, read: bool) -> None:
        with self.step("remove the file of", name, "and SIGHUP" if read else ""):
            self.erase(name)
            if read:
                self.read_again()

    @rule(pick=picks)
    def kill_qemu_of_one(self, pick: int) -> None:
        for name in chosen(pick, self.names_up()):
            self.kill_qemu(name)

    def kill_qemu(self, name: str) -> None:
        pid = self.pid(name)
        assert pid is not None
        with self.step("kill -9 the QEMU of", name):
            os.kill(pid, signal.SIGKILL)
            known = self.vms[name]
            eventually(lambda: self.pid(name) != pid, f"nobody noticed: {name}")
            if known.by is None:
                self.learn()
            else:
                self.settle_as(**{name: known.by.comes_back})

    @rule(pick=picks, index=indices)
    def kill_passt_of_one(self, pick: int, index: int) -> None:
        for name in chosen(pick, self.names_up()):
            self.kill_passt(name, index)

    def kill_passt(self, name: str, index: int) -> None:
        vm = self.agent.vm(name)
        if index >= len(vm["links"]):
            return
        with self.step("kill -9 a passt of", name, index):
            os.kill(vm["links"][index]["passt_pid"], signal.SIGKILL)
            self.expect_another_passt(name, index, vm)

    # --- the steps: what happens to the agent ---------------------------------------------------------

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGTERM]), between=meanwhile)
    def another_agent(self, number: signal.Signals, between: list[tuple[str, str, Variant]]) -> None:
        with self.step("another agent after", number.name, between):
            before = self.agent.vms()
            self.mend()
            self.agent.end(number)
            killed = set()
            for what, name, variant in between:
                vm = before.get(name)
                runs = vm is not None and is_up(vm)
                if what == "edit":
                    self.write(name, variant)
                elif what == "remove":
                    self.erase(name)
                elif runs and vm is not None and what == "kill qemu":
                    self.end_process(vm["qemu_pid"])
                    killed.add(name)
                elif runs and vm is not None and vm["links"]:
                    self.end_process(vm["links"][0]["passt_pid"])
            self.mend()
            shown = {each["name"]: each["qemu_pid"] for each in self.printed()}
            there = {name: vm["qemu_pid"] for name, vm in before.items() if is_up(vm) and name not in killed}
            assert there == {name: pid for name, pid in shown.items() if pid is not None}
            self.start_agent(killed)
            said = self.agent.vms()
            assert there == {name: said[name]["qemu_pid"] for name in there}, "QEMU was not harmed"

    @rule()
    def upgrade(self) -> None:
        with self.step("SIGUSR2"):
            before = self.agent.vms()
            self.mend()
            by = {name: known.by for name, known in self.vms.items()}
            self.agent.become_newer()
            self.begin_anew()
            said = self.agent.vms()
            for name, vm in before.items():
                if is_up(vm):
                    assert vm["qemu_pid"] == said[name]["qemu_pid"]
                    # A file that has changed meanwhile is applied now, by another passt.
                    if by[name] == self.disk.get(name):
                        assert processes(vm) == processes(said[name]), "neither QEMU nor passt was harmed"

    @rule(actions=hurried, end=ends)
    def hurry(self, actions: list[tuple[str, str]], end: signal.Signals | None) -> None:
        with self.step("at once:", actions, end.name if end else ""):
            self.hasten()
            for name in self.vms if end is not None else ():
                if name not in self.disk:
                    self.write(name, VARIANTS[0])
            for what, name in actions:
                if what.startswith("kill "):
                    self.hit(name, what)
                else:
                    assert self.ask(name, what) in (202, 404, 409, 422)
            if end is signal.SIGUSR2:
                self.agent.become_newer()
            elif end is not None:
                self.agent.end(end)
                self.agent.start()
            if end is not None:
                self.vms = {name: Known() for name in self.expected_names()}
            self.learn({name for what, name in actions if what in ("start", "restart")})

    def hit(self, name: str, what: str) -> None:
        vm = self.agent.vms().get(name, {})
        links = vm.get("links") or [{}]
        pid = vm.get("qemu_pid") if what == "kill qemu" else links[0].get("passt_pid")
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def names_up(self) -> list[str]:
        return sorted(name for name, known in self.vms.items() if known.up)

    def names_down(self) -> list[str]:
        return sorted(name for name, known in self.vms.items() if not known.up)

    # --- what comes of them ---------------------------------------------------------------------------

    def write(self, name: str, variant: Variant) -> None:
        (self.agent.files / f"{name}.toml").write_text(variant.text(self.ports[name]))
        self.disk[name] = variant

    def erase(self, name: str) -> None:
        (self.agent.files / f"{name}.toml").unlink(missing_ok=True)
        self.disk.pop(name, None)

    def end_process(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid not in {each.pid for each in self.agent.running()}, f"{pid} lives on")

    def mend(self) -> None:
        """Give VMs that run a file, if they have none: an agent does not look for those."""
        for name in self.names_up():
            if name not in self.disk:
                self.write(name, VARIANTS[0])

    def hasten(self) -> None:
        """Let nothing wait a minute for a guest to power down, as what runs without a right file does."""
        for name in self.names_up():
            known = self.vms[name]
            if known.by in (None, BROKEN):
                if not self.valid(name):
                    self.write(name, VARIANTS[0])
                known.by = self.disk[name]
                assert self.ask(name, "reload") == 202
                self.settle()

    def valid(self, name: str) -> bool:
        return name in self.disk and self.disk[name].valid

    def pid(self, name: str) -> int | None:
        vm = self.agent.vms().get(name)
        return vm["qemu_pid"] if vm is not None else None

    def expect_start(self, name: str) -> None:
        known = self.vms[name]
        known.fresh, known.by = False, self.disk.get(name)
        self.settle_as(**{name: self.valid(name)})

    def expect_another_passt(self, name: str, index: int, before: dict[str, Any]) -> None:
        old = before["links"][index]

        def is_another() -> bool:
            link = self.agent.vm(name)["links"][index]
            return bool(link["state"] == "up" and link["passt_pid"] != old["passt_pid"])

        eventually(is_another, lambda: f"still the same passt: {self.agent.vm(name)}")
        said = self.settle_as()
        assert said[name]["qemu_pid"] == before["qemu_pid"]
        assert said[name]["links"][index]["generation"] > old["generation"]

    def read_again(self) -> None:
        self.agent.read_again()
        for name in [name for name, known in self.vms.items() if not known.up and name not in self.disk]:
            del self.vms[name]
        for name in self.disk:
            known = self.vms.setdefault(name, Known())
            if known.up and self.valid(name):
                known.by = self.disk[name]
        self.start_wanted()
        self.settle_as()

    def note_begun(self) -> None:
        """What is known of all agents together; of VMs that are gone nothing."""
        self.begun |= {name for name, known in self.vms.items() if known.up}
        self.begun &= {*self.vms}

    def start_wanted(self) -> None:
        """Those that have not been started yet, if their files want it."""
        for name, known in self.vms.items():
            if known.fresh and name not in self.begun and self.valid(name) and self.disk[name].autostart:
                known.up, known.fresh, known.by = True, False, self.disk[name]

    def start_agent(self, killed: set[str] | frozenset[str] = frozenset()) -> None:
        self.agent.start()
        self.begin_anew(killed)

    def expected_names(self) -> set[str]:
        """That an agent which begins knows."""
        return {*self.disk, *(name for name, known in self.vms.items() if known.up)}

    def begin_anew(self, killed: set[str] | frozenset[str] = frozenset()) -> None:
        """An agent has begun: what ran does so, or does so again."""
        ran = self.names_up()
        self.vms = {name: Known() for name in self.expected_names()}
        for name in ran:
            # What runs is taken over whatever its file says; what does not is not started by a wrong one.
            up = name not in killed or (self.valid(name) and self.disk[name].comes_back)
            self.vms[name] = Known(up=up, fresh=False, by=self.disk[name])
        self.start_wanted()
        self.settle_as()

    def learn(self, started: set[str] | frozenset[str] = frozenset()) -> None:
        """Take what has come of it, where that is a matter of chance."""
        said = self.settle()
        for name, vm in said.items():
            known = self.vms[name]
            known.up, known.by = is_up(vm), None
            known.fresh = known.fresh and not known.up and name not in started
        self.note_begun()


def chosen(pick: int, names: list[str]) -> list[str]:
    """One of the names, if there are any."""
    return [names[pick % len(names)]] if names else []


def is_up(vm: dict[str, Any]) -> bool:
    return str(vm["state"]) in ("ready", "degraded")


def processes(vm: dict[str, Any]) -> list[int]:
    return [vm["qemu_pid"], *(link["passt_pid"] for link in vm["links"])]


def without_counts(vm: dict[str, Any]) -> dict[str, Any]:
    """Without bytes that wait in a stream: there may be others in the next moment."""
    return {**vm, "links": [{k: v for k, v in each.items() if "unread" not in k} for each in vm["links"]]}


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def run(examples: int, steps: int) -> None:
    """Reproducibly; and without shrinking, which would take an hour: the steps are few, and are told."""
    run_state_machine_as_test(
        Agents,
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=examples,
            stateful_step_count=steps,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


def test_what_runs_is_taken_over_whatever_its_file_says() -> None:
    """Nobody else would look after it; but nothing is started by such a file."""
    with agent_process() as agent:
        file = agent.files / "web.toml"
        file.write_text(vm_text(links=2, top="autostart = true"))
        agent.start()
        before = agent.wait_for_state("web", "ready")
        agent.end(signal.SIGKILL)
        file.write_text(BROKEN.text(0))
        agent.start()
        assert processes(before) == processes(agent.vm("web"))
        os.kill(before["links"][1]["passt_pid"], signal.SIGKILL)
        eventually(lambda: agent.vm("web")["links"][1]["generation"] == 2, "the link was not healed")
        agent.wait_for_state("web", "ready")
        # What could not come up again does not go down.
        answer = agent.client.post("/v1/vms/web/restart")
        assert (422, True) == (answer.status_code, "no_such_key" in answer.text), answer.text
        assert before["qemu_pid"] == agent.wait_for_state("web", "ready")["qemu_pid"]
        assert agent.client.post("/v1/vms/web/kill").status_code == 202
        agent.wait_for_state("web", "exited")
        assert agent.client.post("/v1/vms/web/start").status_code == 202
        assert "no_such_key" in agent.wait_for_state("web", "failed")["error"]
        agent.end(signal.SIGTERM)
        agent.assert_nothing_left()


def test_a_stop_does_not_come_too_early() -> None:
    """What an earlier agent has left is ended, even if this one has not taken it over yet."""
    with agent_process() as agent:
        passt = agent.files / "slow-passt"
        text = vm_text(links=1, top="autostart = true")
        (agent.files / "web.toml").write_text(
            text.replace("[[link]]", f"[[link]]\npasst_binary = {json.dumps(str(passt))}")
        )
        passt.write_text('#!/bin/sh\nexec passt "$@"\n')
        passt.chmod(0o755)
        agent.start()
        agent.wait_for_state("web", "ready")
        agent.end(signal.SIGKILL)
        # Reading the file takes a while now, as it does when there are a hundred.
        passt.write_text('#!/bin/sh\n[ "$1" != --help ] || sleep 2\nexec passt "$@"\n')
        agent.start(wait=False)
        eventually(lambda: takes_calls(agent.base / "agent.sock"), "it takes no calls")
        stop = "/v1/vms/web/stop"
        eventually(lambda: agent.client.post(stop).status_code == 202, "it does not know the VM")
        agent.wait_for_state("web", "exited")
        eventually(lambda: not [each for each in agent.running() if each.is_qemu], "QEMU runs on")
        agent.end(signal.SIGTERM)
        agent.assert_nothing_left()


def takes_calls(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.mark.timeout(300)
def test_the_agent_says_what_there_is() -> None:
    """After whatever has happened."""
    run(examples=5, steps=12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_agent_says_what_there_is_for_longer() -> None:
    """As above, more often and for longer."""
    run(examples=12, steps=20)
