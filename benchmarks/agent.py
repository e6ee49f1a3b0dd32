# SPDX-License-Identifier: GPL-2.0-or-later
"""The host agent with many VMs: start, memory, idle, API under load, passts killed at once, the agent itself killed.

README.md says how to read the table. All VMs are real QEMUs with real passts; some have a booted guest.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from agent_table import Adoption, Kill, Load, Memory, Report, Start, render
from api_load import ALL, ONE
from common import RunFailed, open_directory, warm_environment
from fleet import Fleet, Member, Supervision, agent, clean_host, side_by_side, timeout
from idle import Idle, taken

from qrapd import binaries
from qrapd.agent_file import AgentFile
from qrapd.errors import QrapdError
from qrapd.guest import GuestImage, build_guest, default_cache

SECTIONS = ("start", "life")

CLIENTS = 50

SWAP_INTERVAL = 0.1
"""Seconds between two swaps while the API is under load."""

START_INTERVAL = 0.5
"""Seconds between a VM's end and its start, and between two ends, meanwhile."""

NEVER = 60.0
"""Seconds after which a network that has not come back counts as gone."""

REST = 3.0
"""Seconds for what was begun to be through: nothing of it is to be counted in what comes next."""

BOOT_TIMEOUT = 300.0
"""Seconds for all guests to answer: ten at once on two cores without KVM take about 30."""

VM_MIB = {"agent": 55, "run": 85}
"""Memory for a VM with its QEMU, its passt and a supervisor of its own, with some room: of PSS they have 18, 29 and 27
(measured)."""

IN_MEMORY = Path("/dev/shm")
"""For the runtime directory, as /run is in memory, too: on a disk (ext4) a VM's record takes 2 ms more to write."""


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", "--vms", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--guests", type=int, default=10, metavar="N", help="with a guest; default: 10")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="passts at once; default: 50")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="of kills; default: 4")
    parser.add_argument("--adopt", type=int, default=100, metavar="N", help="VMs to be adopted; default: 100")
    parser.add_argument("--agents", type=int, default=5, metavar="N", help="killed in turn; default: 5")
    parser.add_argument("--idle", type=float, default=10.0, metavar="S", help="left alone; default: 10")
    parser.add_argument("--load", type=float, default=20.0, metavar="S", help="of the API; default: 20")
    parser.add_argument("--pause", type=float, default=0.25, metavar="S", help="of a client; default: 0.25")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="just these parts")
    parser.add_argument("--quick", action="store_true", help="a few of each: to see whether it works")
    parser.add_argument("--json", action="store_true", help="print every single one, for programs")
    asked = parser.parse_args()
    if asked.quick:
        asked.vms, asked.guests, asked.kills, asked.rounds = 6, 1, 3, 1
        asked.adopt, asked.agents, asked.idle, asked.load = 4, 1, 1.0, 2.0
    return asked


# --- the API, for ourselves ---------------------------------------------------------------------------


class Api:
    """Asks the agent, each time on a new connection."""

    def __init__(self, fleet: Fleet) -> None:
        self._path = str(fleet.base / "agent.sock")

    def ask(self, method: str, path: str) -> tuple[int, str]:
        """The answer's status and body."""
        with closing(_UnixConnection(self._path)) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def vms(self) -> list[dict[str, Any]]:
        """All VMs."""
        _status, body = self.ask("GET", "/v1/vms")
        return list(json.loads(body))

    def metric(self, name: str) -> float | None:
        """One that has no labels."""
        found = re.search(rf"^{name} (\S+)$", self.ask("GET", "/metrics")[1], re.MULTILINE)
        return None if found is None else float(found[1])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def uptime(member: Member, patience: float) -> float:
    """What the guest says of itself; a connection that it does not answer is tried again."""
    deadline = time.monotonic() + patience
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", member.port, timeout=2)) as connection:
            try:
                connection.request("GET", "/cgi-bin/state")
                found = re.search(
                    r"^uptime=([0-9.]+)", connection.getresponse().read().decode(), re.MULTILINE
                )
                if found is not None:
                    return float(found[1])
            except (OSError, http.client.HTTPException):
                pass
        if time.monotonic() > deadline:
            raise RunFailed(f"the guest of {member.name} does not answer")
        time.sleep(0.1)


# --- the parts ----------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """What is asked for, on this host."""

    asked: argparse.Namespace
    guest: GuestImage
    environment: dict[str, str]
    report: Report

    def run(self) -> None:
        """All parts, one after the other; one that fails does not keep the next from being measured."""
        for section in self.asked.only:
            say(section)
            try:
                {"start": self._start, "life": self._live}[section]()
            except RunFailed as error:
                print(f"agent: {error}", file=sys.stderr)
                self.report.failed.append(f"{section}: {str(error)[:500]}")

    def _start(self) -> None:
        """All at once: by the agent, then by so many `qrapd run`."""
        at_once = AgentFile().starts_at_once
        size = _fitting(self.asked.vms, VM_MIB["run"])
        with _Scene(self, size) as scene:
            scene.fleet.write(scene.members)
            for who, running in (
                ("agent", agent(scene.fleet, self.environment)),
                ("run", side_by_side(scene.fleet, scene.members, self.environment, at_once)),
            ):
                with running as (supervision, began):
                    _wait_for_ready(supervision, size)
                    seconds = max(supervision.ready.values()) - began
                    pss = sum(memory(each.pid)[1] for each in supervision.processes)
                    cpu = sum(cpu_seconds(each.pid) for each in supervision.processes)
                say(f"{who}: {size} VMs ready in {seconds:.1f} s")
                guests = len(scene.fleet.guests)
                self.report.starts.append(Start(who, size, guests, at_once, seconds, cpu, pss / 1024))

    def _live(self) -> None:
        """One agent, from its first VM to its violent end."""
        size = _fitting(self.asked.vms, VM_MIB["agent"])
        with _Scene(self, size) as scene, agent(scene.fleet, self.environment) as (supervision, began):
            scene.supervision, scene.began = supervision, began
            scene.grow()
            scene.rest()
            scene.bear_load()
            scene.lose_passts()
            scene.lose_agents()


class _Scene:
    """A fleet in a directory of its own, and what is done to it."""

    def __init__(self, measurement: Measurement, size: int) -> None:
        self.asked, self.report = measurement.asked, measurement.report
        self._environment = measurement.environment
        self._guest, self._size = measurement.guest, size
        self.supervision: Supervision
        self.began: float

    def __enter__(self) -> Self:
        self._directory = open_directory("agent", IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None)
        booted = min(self.asked.guests, self._size)
        self.fleet = Fleet(self._directory.__enter__(), self._guest, self._size, booted)
        self.members: Sequence[Member] = self.fleet.members
        self.api = Api(self.fleet)
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.__exit__(None, None, None)

    def grow(self) -> None:
        """More and more VMs; what the agent takes with each number of them."""
        self.supervision.wait_for("agent.ready", lambda: bool(self.supervision.first("agent.ready")), 60)
        self.api.metric("qrapd_adoption_seconds")  # what comes with the first question is its base, too
        there = 0
        for size in sorted({0, self._size // 4, self._size // 2, self._size}):
            self.fleet.write(self.members[there:size])
            os.kill(self.supervision.pid, signal.SIGHUP)
            _wait_for_ready(self.supervision, size)
            there = size
            self._wait_for_guests([each for each in self.fleet.guests if each in self.members[:size]])
            time.sleep(REST)
            self.report.memory.append(Memory(size, *memory(self.supervision.pid)))
            say(f"{self.report.memory[-1]}")

    def _wait_for_guests(self, guests: Sequence[Member]) -> None:
        for member in guests:
            uptime(member, BOOT_TIMEOUT)

    def rest(self) -> None:
        """Leave all alone."""
        time.sleep(REST)
        before, begun = taken(self.supervision.pid), time.monotonic()
        time.sleep(self.asked.idle)
        after, passed = taken(self.supervision.pid), time.monotonic() - begun
        self.report.idle = Idle(
            passed, (after[0] - before[0]) / passed, (after[1] - before[1]) / 1e6 / passed
        )
        say(f"{self.report.idle}")

    def bear_load(self) -> None:
        """Many clients, first of an agent that has nothing else to do, then while VMs start and links swap."""
        for busy in (False, True):
            since = len(self.supervision.events)
            command = [sys.executable, str(Path(__file__).with_name("api_load.py"))]
            numbers = [CLIENTS, self.asked.pause, self.asked.load]
            words = [str(self.fleet.base / "agent.sock"), *map(str, numbers)]
            began, before = time.monotonic(), taken(self.supervision.pid)[1]
            with subprocess.Popen(
                [*command, *words, *(member.name for member in self.members)], stdout=subprocess.PIPE
            ) as load:
                if busy:
                    self._stir(began + self.asked.load)
                printed = load.communicate()[0]
            if load.returncode:
                raise RunFailed("the clients have failed")
            used = taken(self.supervision.pid)[1] - before
            took = json.loads(printed)
            names = [each["event"] for each in self.supervision.events[since:]]
            self.report.loads.append(
                Load(
                    clients=CLIENTS,
                    pause=self.asked.pause,
                    seconds=time.monotonic() - began,
                    started=names.count("vm.ready"),
                    swapped=names.count("link.restored"),
                    cpu_ms_per_s=used / 1e6 / (time.monotonic() - began),
                    one_ms=took[ONE],
                    all_ms=took[ALL],
                )
            )
            if busy:
                self._bring_up_all()

    def _stir(self, end: float) -> None:
        """Swap links, and end VMs without a guest and start them again."""
        chance = random.Random(0)  # the same in every run
        plain = [member for member in self.members if not member.booted]
        due, down = time.monotonic() + START_INTERVAL, None
        while time.monotonic() < end:
            name = chance.choice(self.members).name
            self.api.ask("POST", f"/v1/vms/{name}/links/0/swap")  # of one that is down: 409
            if time.monotonic() > due and plain:
                due += START_INTERVAL
                verb, down = ("kill", chance.choice(plain).name) if down is None else ("start", down)
                self.api.ask("POST", f"/v1/vms/{down}/{verb}")
                down = down if verb == "kill" else None
            time.sleep(SWAP_INTERVAL)

    def _bring_up_all(self) -> None:
        deadline = time.monotonic() + timeout(self._size)
        while down := [each["name"] for each in self.api.vms() if each["state"] != "ready"]:
            for name in down:
                self.api.ask("POST", f"/v1/vms/{name}/start")  # of one that is on its way: 409
            if time.monotonic() > deadline:
                raise RunFailed(f"not ready again: {down}")
            time.sleep(0.5)

    def lose_passts(self) -> None:
        """Kill many at once; each round has others, as far as there are enough."""
        count = min(self.asked.kills, self._size)
        for number in range(self.asked.rounds):
            time.sleep(REST)
            chosen = [self.members[(number * count + each) % self._size] for each in range(count)]
            self._kill_passts([member.name for member in chosen])
            self._wait_for_guests([member for member in chosen if member.booted])

    def _kill_passts(self, names: Sequence[str]) -> None:
        pids = {each["name"]: each["links"][0]["passt_pid"] for each in self.api.vms()}
        since = len(self.supervision.events)
        killed = {}
        for name in names:
            killed[name] = time.time()
            os.kill(pids[name], signal.SIGKILL)
        back: dict[str, dict[str, Any]] = {}
        with suppress(RunFailed):
            self.supervision.wait_for("links", lambda: self._restored(since, back) >= set(names), NEVER)
        for name in names:
            if name in back:
                wall = 1000 * (back[name]["at"] - killed[name])
                self.report.kills.append(Kill(len(names), back[name]["outage_ms"], wall))
            else:
                self.report.kills.append(Kill(len(names), None, None))

    def _restored(self, since: int, back: dict[str, dict[str, Any]]) -> set[str]:
        for event in self.supervision.events[since:]:
            if event["event"] == "link.restored":
                back.setdefault(event["vm"], event)
        return set(back)

    def _is_ready(self, since: int) -> bool:
        return self.supervision.first("agent.ready", since) is not None

    def lose_agents(self) -> None:
        """Kill the agent; another one is started at once."""
        kept = min(self.asked.adopt, self._size)
        self._shed(kept)
        guests = [member for member in self.fleet.guests if member in self.members[:kept]]
        for _ in range(self.asked.agents):
            time.sleep(REST)
            before = {each["name"]: _identity(each) for each in self.api.vms()}
            ages = {member.name: uptime(member, NEVER) for member in guests}
            asked_at = time.monotonic()
            self.supervision.processes[-1].kill()
            self.supervision.processes.pop().wait()
            since = len(self.supervision.events)
            began = self.supervision.start(
                self.fleet, self._environment, "agent", "--config-dir", str(self.fleet.directory)
            )
            self.supervision.wait_for("adoption", partial(self._is_ready, since), NEVER)
            ready = self.supervision.first("agent.ready", since)
            assert ready is not None
            after = {each["name"]: _identity(each) for each in self.api.vms()}
            grown = [
                uptime(member, NEVER) - ages[member.name] >= 0.5 * (time.monotonic() - asked_at)
                for member in guests
            ]
            self.report.adoptions.append(
                Adoption(
                    vms=kept,
                    adopted=ready["adopted"],
                    unchanged=sum(after.get(name) == there for name, there in before.items()),
                    guests=len(guests),
                    unharmed=sum(grown),
                    seconds=ready["at"] - began,
                    own_seconds=self._adoption_seconds(),
                )
            )
            say(f"{self.report.adoptions[-1]}")

    def _adoption_seconds(self) -> float | None:
        deadline = time.monotonic() + NEVER
        while (seconds := self.api.metric("qrapd_adoption_seconds")) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return seconds

    def _shed(self, kept: int) -> None:
        """End all VMs but so many, and take their files away."""
        surplus = self.members[kept:]
        self.fleet.remove(surplus)
        for member in surplus:
            self.api.ask("POST", f"/v1/vms/{member.name}/kill")
        self.supervision.wait_for("ends", lambda: len(self.supervision.ready) == kept, timeout(len(surplus)))


def _identity(vm: dict[str, Any]) -> tuple[object, ...]:
    """What an adoption must not change."""
    return vm["state"], vm["qemu_pid"], *((link["generation"], link["passt_pid"]) for link in vm["links"])


def _wait_for_ready(supervision: Supervision, count: int) -> None:
    def is_over() -> bool:
        return len(supervision.ready) >= count or supervision.first("run.failed") is not None

    supervision.wait_for(f"{count} VMs", is_over, timeout(count))
    if failure := supervision.first("run.failed"):
        raise RunFailed(f"{failure['vm']}: {failure['error']}")


def memory(pid: int) -> tuple[int, int]:
    """What a process has resident, and its share of it (PSS), in KiB: proc_pid_smaps(5)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return tuple(int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0]) for name in ("Rss", "Pss"))  # type: ignore[return-value]


def cpu_seconds(pid: int) -> float:
    """What a process has taken, those of its threads included that have ended: proc_pid_stat(5), fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fitting(wanted: int, each: int) -> int:
    """So many VMs have room in this host's memory."""
    text = Path("/proc/meminfo").read_text()
    available = int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) // 1024
    return max(1, min(wanted, int(available * 0.9) // each))


def warm_up(measurement: Measurement) -> None:
    """Compile every module; it is not counted."""
    with _Scene(measurement, 1) as scene:
        scene.fleet.write(scene.members)
        for running in (
            agent(scene.fleet, measurement.environment),
            side_by_side(scene.fleet, scene.members, measurement.environment, 1),
        ):
            with running as (supervision, _began):
                _wait_for_ready(supervision, 1)


def describe() -> dict[str, str]:
    """What was measured on."""
    qemu = binaries.find_binary(f"qemu-system-{binaries.host_architecture()}")
    works, _reason = binaries.kvm_works()
    return {
        "qemu": ".".join(str(each) for each in binaries.qemu_version(qemu)),
        "passt": binaries.passt_version(binaries.find_binary("passt")) or "of unknown version",
        "accelerator": "KVM" if works else "TCG",
        "python": sys.version.split()[0],
        "processors": str(os.cpu_count()),
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


def say(text: str) -> None:
    """How far it has come."""
    print(f"agent: {time.strftime('%H:%M:%S')} load {os.getloadavg()[0]:.1f} {text}", file=sys.stderr)


def main() -> int:
    """Measure and tell. Returns the exit status: no time fails, only a run that does."""
    asked = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    try:
        guest = build_guest(default_cache(), say=lambda line: print(line, file=sys.stderr))
        with clean_host(), tempfile.TemporaryDirectory(prefix="qrapd-bytecode-") as bytecode:
            measurement = Measurement(asked, guest, warm_environment(Path(bytecode)), Report(describe()))
            warm_up(measurement)
            measurement.run()
    except RunFailed as error:
        print(f"agent: {error}", file=sys.stderr)
        return 1
    except QrapdError as error:
        print(f"agent: {error}; {error.hint}" if error.hint else f"agent: {error}", file=sys.stderr)
        return error.exit_status
    report = measurement.report
    print(json.dumps(dataclasses.asdict(report), indent=2) if asked.json else render(report))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
