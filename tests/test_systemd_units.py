# SPDX-License-Identifier: GPL-2.0-or-later
"""The units, tried in a real systemd with the real passt, QEMU and guest; and `make install`, which puts them there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from booted import PROJECT, Booted, install
from qrapd import __version__
from qrapd.guest import GuestImage
from qrapd.messages import EVENTS
from support import PATIENCE, VmFile, fetch, free_port, write_vm

UNITS = PROJECT / "systemd"
SYSTEM_UNIT = UNITS / "qrapd@.service"
USER_UNIT = UNITS / "user/qrapd@.service"
CATALOG = UNITS / "qrapd.catalog"
DOCUMENT = (PROJECT / "docs/systemd.md").read_text()

WITH_KVM, WITHOUT_KVM = 2.1, 1.9
"""What `systemd-analyze security` may say at most; 10 is everything open."""

in_systemd = [
    pytest.mark.guest,
    pytest.mark.xdist_group("systemd"),
    pytest.mark.timeout(420),  # each is the first one for somebody, and then has qrapd installed
]

# The drop-ins of the documentation, under what is written in bold before them.
DROP_INS: dict[str, str] = dict(
    re.findall(r"\*\*([^*]+)\*\*(?:(?!\*\*|```).)*?```ini\n(.*?)```", DOCUMENT, re.DOTALL)
)


def commands(heading: str) -> str:
    """The shell lines below a heading of the documentation."""
    section = DOCUMENT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return "".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))


# ---- as files


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """systemd-analyze; needs no running systemd."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def installed_unit(directory: Path, *drop_ins: str, source: Path = SYSTEM_UNIT) -> Path:
    """A copy of a unit with programs that are there, and with drop-ins."""
    unit = directory / "qrapd@.service"
    unit.write_text(re.sub("=qrapd ", f"={shutil.which('true')} ", source.read_text()))
    for number, text in enumerate(drop_ins):
        place = directory / "qrapd@.service.d" / f"{number}.conf"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    return unit


@pytest.mark.parametrize("source", [SYSTEM_UNIT, USER_UNIT], ids=["system", "user"])
def test_systemd_has_no_complaint(tmp_path: Path, source: Path) -> None:
    """Not one, in any version from 252 on."""
    done = analyze("verify", "--man=no", installed_unit(tmp_path, source=source))
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("name", [*DROP_INS, "without-kvm.conf"])
def test_systemd_has_no_complaint_about_a_drop_in(tmp_path: Path, name: str) -> None:
    """Those that the documentation shows, and the one that comes as a file."""
    text = DROP_INS.get(name) or (UNITS / name).read_text()
    done = analyze("verify", "--man=no", installed_unit(tmp_path, text))
    # The user that is named there is the reader's to make.
    assert (0, "") == (done.returncode, done.stderr)


def test_the_document_has_its_drop_ins() -> None:
    """The pattern that finds them finds what is there."""
    assert DOCUMENT.count("```ini") == len(DROP_INS)
    assert {"Limits.", "Slices.", "Credentials."} <= set(DROP_INS)


@pytest.mark.parametrize(
    ("drop_in", "limit"), [(None, WITH_KVM), ("without-kvm.conf", WITHOUT_KVM)], ids=["KVM", "no KVM"]
)
def test_the_unit_is_locked_in(tmp_path: Path, drop_in: str | None, limit: float) -> None:
    """As far as passt and QEMU let it be."""
    unit = installed_unit(tmp_path, *([(UNITS / drop_in).read_text()] if drop_in else []))
    done = analyze("security", "--offline=true", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert limit >= float(exposure[1]), "\n".join(x for x in done.stdout.splitlines() if x.startswith("✗"))


def test_what_is_open_has_its_reason() -> None:
    """Each setting that `systemd-analyze security` counts and that is left alone is named in the unit."""
    text = SYSTEM_UNIT.read_text()
    for setting in (
        "PrivateNetwork",
        "IPAddressDeny",
        "RootDirectory",
        "ProcSubset",
        "PrivateDevices",
        "DeviceAllow",
        "MemoryDenyWriteExecute",
    ):
        assert setting in text
    assert 5 <= text.count("Left open")


def test_the_catalog_has_every_event() -> None:
    """Each with its own id, once, and none that there is not."""
    ids = re.findall(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), re.MULTILINE)
    assert Counter(kind.message_id for kind in EVENTS.values()) == Counter(ids)


def test_the_catalog_says_what_to_do() -> None:
    """Every entry has a subject, and more than one line below its head."""
    for entry in re.split(r"^-- [0-9a-f]{32}\n", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = entry.partition("\n\n")
        assert re.match(r"Subject: \S", head)
        assert "Defined-By: qrapd" in head
        assert 20 <= len(text)


@pytest.mark.parametrize("heading", ["From here to a VM that starts at boot", "The same without root"])
def test_it_takes_under_ten_lines(heading: str) -> None:
    """From `make install` to a VM that starts at boot."""
    lines = commands(heading).splitlines()
    assert "make install" == lines[0]
    assert len(lines) < 10


# ---- the systemd that the rest is tried in


@pytest.mark.xdist_group("systemd")
def test_nothing_outlives_a_test_run_that_is_killed(booted: Booted) -> None:
    """Its systemd ends with it, and so do its cgroup. (``booted`` says where that is impossible.)"""
    script = "import booted, time\nwith booted.boot() as machine:\n print(machine.pid, flush=True)\n time.sleep(600)"
    run = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT / "tests", stdout=subprocess.PIPE, text=True
    )
    with run:
        assert run.stdout is not None
        process = int(run.stdout.readline())
        group = Path(f"/proc/{process}/cgroup").read_text().rpartition("::")[2].strip()
        (name,) = re.findall(r"/(qrapd-booted-\d+)", group)
        run.kill()
    holder = Path(f"/proc/{name.rpartition('-')[2]}")
    wait_until(lambda: not Path(f"/proc/{process}").exists() and not holder.exists())
    script = f"mount -t cgroup2 cgroup2 /mnt && ! find /mnt -name {name} | grep ."
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True, timeout=PATIENCE)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- in systemd


@pytest.fixture(scope="session")
def machine(booted: Booted, guest: GuestImage) -> Booted:
    """With qrapd installed, as in the documentation."""
    return install(booted, guest)


def drop_in(machine: Booted, name: str, lines: str, unit: str = "qrapd@", *, of: str = "system") -> None:
    """Give a unit, or all of them, more lines, until the next boot."""
    place = machine.path(f"/run/systemd/{of}/{unit}.service.d")
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.conf").write_text(lines if lines.startswith(("[", "#")) else f"[Service]\n{lines}")
    machine.systemctl("daemon-reload")


def write(machine: Booted, name: str, guest: GuestImage, **options: Any) -> VmFile:
    """A VM file where the system's units look for it."""
    there = replace(
        guest, kernel=Path("/srv") / guest.kernel.name, initramfs=Path("/srv") / guest.initramfs.name
    )
    return write_vm(machine.path("/etc/qrapd/vms"), name, guest=there, **options)


@contextmanager
def started(machine: Booted, name: str, guest: GuestImage, **options: Any) -> Iterator[VmFile]:
    """A VM in its unit, whose guest has answered. What is left of it at the end is killed."""
    file = write(machine, name, guest, **options)
    unit = f"qrapd@{name}"
    try:
        machine.systemctl("start", unit)
        wait_for_http(machine, file.ports[0], unit)
        yield file
    finally:
        machine.systemctl("stop", unit, check=False)
        machine.systemctl("kill", "--signal=KILL", "--kill-who=all", unit, check=False)
        machine.systemctl("reset-failed", unit, check=False)
        file.path.unlink()


def wait_for_http(machine: Booted, port: int, unit: str) -> str:
    """What the guest answers; if it does not, the failure shows the unit's journal."""
    try:
        return fetch(port)
    except OSError as error:
        tail = machine.run("journalctl", "--no-pager", "-n", "60", "-u", unit).stdout
        pytest.fail(f"no HTTP from the guest: {error}\n{tail}")


def uptime(port: int) -> float:
    """The guest's, in seconds."""
    return float(dict(line.split("=", 1) for line in fetch(port, "/cgi-bin/state").split())["uptime"])


def pid_of(machine: Booted, unit: str, name: str) -> int:
    """The one process of a unit whose program's name begins so."""
    (pid,) = [pid for pid, comm in machine.processes(unit).items() if comm.startswith(name)]
    return pid


def told(machine: Booted, name: str) -> list[str]:
    """The events of a VM, in order, without what guest and children say."""
    events = [str(entry["QRAPD_EVENT"]) for entry in machine.journal(f"QRAPD_VM={name}")]
    return [event for event in events if not event.endswith((".console", ".output"))]


def all_pids(machine: Booted, name: str) -> list[int]:
    """Of QEMU and passt."""
    return [pid_of(machine, f"qrapd@{name}", program) for program in ("qemu", "passt")]


def last_words(machine: Booted, name: str) -> list[str]:
    """What QEMU says of a SIGTERM."""
    said = [entry["QRAPD_LINE"] for entry in machine.journal(f"QRAPD_VM={name}", "QRAPD_EVENT=qemu.output")]
    return [line for line in said if "terminating on signal" in line]


def kill_qrapd(machine: Booted, name: str) -> None:
    """kill -9 of the unit's main process."""
    machine.run("kill", "-KILL", machine.show(f"qrapd@{name}", "MainPID"), check=True)


def wait_for_adoptions(machine: Booted, name: str, number: int) -> None:
    """Wait until the VM was taken over so many times."""
    machine.wait_for(
        f"adoption {number}", lambda: told(machine, name).count("vm.adopted") == number, f"qrapd@{name}"
    )


def count_fds(machine: Booted, pid: int) -> int:
    """Open files of a process."""
    return len(machine.shell(f"ls /proc/{pid}/fd", check=True).stdout.split())


@contextmanager
def requests(port: int) -> Iterator[list[str]]:
    """Requests to the guest all the while; what fails is in the list."""
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            try:
                fetch(port, patience=0)
            except OSError as error:
                failures.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield failures
    finally:
        over.set()
        asking.join()


def is_ordered(expected: Sequence[str], events: Sequence[str]) -> bool:
    """Whether the expected ones are among the events, in this order."""
    rest = iter(events)
    return all(event in rest for event in expected)


class TestInSystemd:
    """A unit as it is installed, in a systemd as it is on a host."""

    pytestmark = in_systemd

    def test_a_vm_from_start_to_stop(self, machine: Booted, guest: GuestImage) -> None:
        """It starts, answers, gets another passt in the unit's sandbox, and leaves nothing."""
        with started(machine, "whole", guest) as file:
            assert "active" == machine.show("qrapd@whole", "ActiveState")
            before = uptime(file.ports[0])
            qemu = pid_of(machine, "qrapd@whole", "qemu")
            passt = pid_of(machine, "qrapd@whole", "passt")
            machine.run("kill", "-KILL", str(passt), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "whole"), "qrapd@whole")
            assert before < uptime(file.ports[0])
            assert qemu == pid_of(machine, "qrapd@whole", "qemu")
            assert passt != pid_of(machine, "qrapd@whole", "passt")
            machine.systemctl("stop", "qrapd@whole")
            assert {} == machine.processes("qrapd@whole")
            assert ("inactive", "success") == (
                machine.show("qrapd@whole", "ActiveState"),
                machine.show("qrapd@whole", "Result"),
            )
            assert not machine.path("/run/qrapd/whole").exists()
        events = "passt.started link.connected vm.started vm.ready passt.exited link.lost passt.started "
        events += "link.restored vm.stopping passt.exited vm.exited"
        found = told(machine, "whole")
        assert is_ordered(events.split(), found), found

    def test_the_journal(self, machine: Booted, guest: GuestImage) -> None:
        """passt's lines are there once, and `journalctl -x` explains the events."""
        with started(machine, "words", guest):
            pass
        output = [e["QRAPD_LINE"] for e in machine.journal("QRAPD_VM=words", "QRAPD_EVENT=passt.output")]
        assert output
        by_syslog = machine.journal("_SYSTEMD_UNIT=qrapd@words.service", "_TRANSPORT=syslog")
        assert [] == [entry["MESSAGE"] for entry in by_syslog]
        ready = uuid.UUID(EVENTS["vm.ready"].message_id).hex
        explained = machine.run("journalctl", "-x", "--no-pager", "QRAPD_VM=words", f"MESSAGE_ID={ready}")
        assert "Subject: The VM words is ready" in explained.stdout
        assert "QEMU says that the machine is running" in explained.stdout

    def test_the_catalog_is_accepted(self, machine: Booted) -> None:
        """Every entry is in systemd's own after `make install`, and nothing is wrong with the file."""
        done = machine.run("journalctl", "--update-catalog", check=True)
        assert "" == done.stderr
        listed = machine.run("journalctl", "--list-catalog", "--no-pager", check=True).stdout
        assert {kind.message_id for kind in EVENTS.values()} <= set(re.findall(r"^\S+", listed, re.MULTILINE))

    def test_without_kvm(self, machine: Booted, guest: GuestImage) -> None:
        """All of it runs with that drop-in, too, passt's second start included."""
        drop_in(machine, "10", (UNITS / "without-kvm.conf").read_text(), "qrapd@bare")
        with started(machine, "bare", guest) as file:
            machine.run("kill", "-KILL", str(pid_of(machine, "qrapd@bare", "passt")), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "bare"), "qrapd@bare")
            wait_for_http(machine, file.ports[0], "qrapd@bare")

    def test_a_hung_passt_is_found(self, machine: Booted, guest: GuestImage) -> None:
        """Although the unit's /proc hides passt, which is not dumpable."""
        with started(machine, "hung", guest, link_lines="stall_timeout = 1") as file:
            machine.run("kill", "-STOP", str(pid_of(machine, "qrapd@hung", "passt")), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "hung"), "qrapd@hung")
            wait_for_http(machine, file.ports[0], "qrapd@hung")
            (lost,) = machine.journal("QRAPD_VM=hung", "QRAPD_EVENT=link.lost")
            assert "stalled" == lost["QRAPD_REASON"]

    def test_qrapd_is_killed(self, machine: Booted, guest: GuestImage) -> None:
        """QEMU and passt go on, and the record by which they are found stays."""
        drop_in(machine, "10", "Restart=no\n", "qrapd@left")
        with started(machine, "left", guest) as file:
            qemu, passt = (pid_of(machine, "qrapd@left", name) for name in ("qemu", "passt"))
            before = uptime(file.ports[0])
            machine.run("kill", "-KILL", machine.show("qrapd@left", "MainPID"), check=True)
            machine.wait_for("failed", lambda: machine.show("qrapd@left", "ActiveState") == "failed")
            assert before < uptime(file.ports[0])
            assert {qemu, passt} == set(machine.processes("qrapd@left"))
            record = json.loads(machine.path("/run/qrapd/left/record.json").read_text())
            assert qemu == record["qemu"]["pid"]

    def test_twenty_kills_of_qrapd_under_traffic(self, machine: Booted, guest: GuestImage) -> None:
        """Each time another one takes the VM over with the streams from the fd store, and no request fails."""
        with started(machine, "kept", guest) as file, requests(file.ports[0]) as failures:
            before = uptime(file.ports[0])
            pids = [pid_of(machine, "qrapd@kept", name) for name in ("qemu", "passt")]
            fds = count_fds(machine, pids[0])
            for number in range(1, 21):
                kill_qrapd(machine, "kept")
                wait_for_adoptions(machine, "kept", number)
            assert [] == failures
            assert pids == [pid_of(machine, "qrapd@kept", name) for name in ("qemu", "passt")]
            assert fds == count_fds(machine, pids[0])
            assert before < uptime(file.ports[0])
            assert "running; link 0 up (generation 1)" == machine.show("qrapd@kept", "StatusText")
            assert "link.lost" not in told(machine, "kept")
            # QEMU's pidfd and output, the link's stream, and passt's pidfd and output: each once.
            assert "5" == machine.show("qrapd@kept", "NFileDescriptorStore")

    def test_what_is_written_while_qrapd_is_down(self, machine: Booted, guest: GuestImage) -> None:
        """It is in the journal, also if it is the last words of a QEMU that ended; and so is what comes later."""
        drop_in(machine, "10", "RestartSec=2\n", "qrapd@noted")
        with started(machine, "noted", guest):
            qemu = pid_of(machine, "qrapd@noted", "qemu")
            kill_qrapd(machine, "noted")
            machine.run("kill", "-TERM", str(qemu), check=True)
            machine.wait_for("last words", lambda: len(last_words(machine, "noted")) == 1, "qrapd@noted")
            machine.wait_for("started", lambda: told(machine, "noted").count("vm.ready") == 2, "qrapd@noted")
            kill_qrapd(machine, "noted")
            wait_for_adoptions(machine, "noted", 1)
            machine.run("kill", "-TERM", str(pid_of(machine, "qrapd@noted", "qemu")), check=True)
            machine.wait_for("words", lambda: len(last_words(machine, "noted")) == 2, "qrapd@noted")

    def test_options_that_changed_while_qrapd_is_down(self, machine: Booted, guest: GuestImage) -> None:
        """They hold from the adoption on, and the guest does not notice."""
        drop_in(machine, "10", "RestartSec=2\n", "qrapd@moved")
        with started(machine, "moved", guest) as file:
            before, qemu = uptime(file.ports[0]), pid_of(machine, "qrapd@moved", "qemu")
            kill_qrapd(machine, "moved")
            port = free_port()
            file.path.write_text(file.path.read_text().replace(f"/{file.ports[0]}:", f"/{port}:"))
            wait_for_http(machine, port, "qrapd@moved")
            assert before < uptime(port)
            assert qemu == pid_of(machine, "qrapd@moved", "qemu")

    def test_without_the_fd_store(self, machine: Booted, guest: GuestImage) -> None:
        """/proc hides QEMU and passt, no pidfd tells who they are, and they are found all the same."""
        drop_in(machine, "10", "FileDescriptorStoreMax=0\n", "qrapd@bereft")
        with started(machine, "bereft", guest) as file:
            before, qemu = uptime(file.ports[0]), pid_of(machine, "qrapd@bereft", "qemu")
            kill_qrapd(machine, "bereft")
            wait_for_adoptions(machine, "bereft", 1)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "bereft"), "qrapd@bereft")
            wait_for_http(machine, file.ports[0], "qrapd@bereft")
            assert before < uptime(file.ports[0])
            assert qemu == pid_of(machine, "qrapd@bereft", "qemu")
            assert told(machine, "bereft").count("vm.started") == 1

    def test_the_unit_of_before_and_its_successor(self, machine: Booted, guest: GuestImage) -> None:
        """With the stream alone in the fd store, as a qrapd leaves it that keeps nothing else, nothing is lost."""
        drop_in(machine, "10", "FileDescriptorStoreMax=1\n", "qrapd@older")
        with started(machine, "older", guest) as file:
            before, pids = uptime(file.ports[0]), all_pids(machine, "older")
            kill_qrapd(machine, "older")
            wait_for_adoptions(machine, "older", 1)
            assert pids == all_pids(machine, "older")
            assert "link.lost" not in told(machine, "older")
            assert before < uptime(file.ports[0])

    def test_an_adopted_passt_hangs(self, machine: Booted, guest: GuestImage) -> None:
        """/proc tells nothing of it, and its parent is gone: that it does not read is what is left to see."""
        with started(machine, "frozen", guest, link_lines="stall_timeout = 1") as file:
            kill_qrapd(machine, "frozen")
            wait_for_adoptions(machine, "frozen", 1)
            machine.run("kill", "-STOP", str(pid_of(machine, "qrapd@frozen", "passt")), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "frozen"), "qrapd@frozen")
            wait_for_http(machine, file.ports[0], "qrapd@frozen")
            (lost,) = machine.journal("QRAPD_VM=frozen", "QRAPD_EVENT=link.lost")
            assert "stalled" == lost["QRAPD_REASON"]

    def test_a_passt_is_lost_while_qrapd_is_down(self, machine: Booted, guest: GuestImage) -> None:
        """Its link is healed at the adoption."""
        drop_in(machine, "10", "RestartSec=2\n", "qrapd@both")
        with started(machine, "both", guest) as file:
            before = uptime(file.ports[0])
            passt = pid_of(machine, "qrapd@both", "passt")
            kill_qrapd(machine, "both")
            machine.run("kill", "-KILL", str(passt), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "both"), "qrapd@both")
            wait_for_http(machine, file.ports[0], "qrapd@both")
            assert before < uptime(file.ports[0])

    def test_qemu_is_lost_while_qrapd_is_down(self, machine: Booted, guest: GuestImage) -> None:
        """That is told, and the VM is started anew."""
        drop_in(machine, "10", "RestartSec=2\n", "qrapd@gone")
        with started(machine, "gone", guest) as file:
            qemu = pid_of(machine, "qrapd@gone", "qemu")
            kill_qrapd(machine, "gone")
            machine.run("kill", "-KILL", str(qemu), check=True)
            machine.wait_for("started", lambda: told(machine, "gone").count("vm.ready") == 2, "qrapd@gone")
            assert is_ordered(["vm.ready", "vm.exited", "vm.ready"], told(machine, "gone"))
            wait_for_http(machine, file.ports[0], "qrapd@gone")

    def test_the_watchdog(self, machine: Booted, guest: GuestImage) -> None:
        """A qrapd whose loop stands still is replaced, and the guest is unharmed."""
        drop_in(machine, "10", "WatchdogSec=2\nTimeoutAbortSec=1\n", "qrapd@still")
        with started(machine, "still", guest) as file:
            before, qemu = uptime(file.ports[0]), pid_of(machine, "qrapd@still", "qemu")
            machine.run("kill", "-STOP", machine.show("qrapd@still", "MainPID"), check=True)
            wait_for_adoptions(machine, "still", 1)
            assert qemu == pid_of(machine, "qrapd@still", "qemu")
            assert before < uptime(file.ports[0])

    def test_an_upgrade(self, machine: Booted, guest: GuestImage) -> None:
        """`qrapd upgrade`, as root: the same process of systemd's, the same QEMU and passt."""
        with started(machine, "fresh", guest) as file, requests(file.ports[0]) as failures:
            kill_qrapd(machine, "fresh")  # so that some of what is handed on has come from the fd store
            wait_for_adoptions(machine, "fresh", 1)
            pids = machine.processes("qrapd@fresh").keys()
            command = (
                "/usr/local/bin/qrapd",
                "upgrade",
                "/etc/qrapd/vms/fresh.toml",
                "--runtime-dir",
                "/run/qrapd",
            )
            machine.run(*command, check=True)
            wait_for_adoptions(machine, "fresh", 2)
            assert "link.lost" not in told(machine, "fresh")
            assert pids == machine.processes("qrapd@fresh").keys()
            assert [] == failures
            assert "5" == machine.show("qrapd@fresh", "NFileDescriptorStore")
            machine.run("kill", "-KILL", str(pid_of(machine, "qrapd@fresh", "passt")), check=True)
            machine.wait_for("restored", lambda: "link.restored" in told(machine, "fresh"), "qrapd@fresh")

    def test_eight_at_once(self, machine: Booted) -> None:
        """None waits for another."""
        names = [f"many{number}" for number in range(8)]
        units = [f"qrapd@{name}" for name in names]
        for name in names:
            write_vm(machine.path("/etc/qrapd/vms"), name, qemu="powerdown_timeout = 0")
        try:
            machine.systemctl("start", *units)
            assert {"active"} == {machine.show(unit, "ActiveState") for unit in units}
        finally:
            machine.systemctl("stop", *units, check=False)
        assert [{}] * 8 == [machine.processes(unit) for unit in units]
        for name in names:
            machine.path(f"/etc/qrapd/vms/{name}.toml").unlink()

    def test_qrapd_hangs_at_a_stop(self, machine: Booted, guest: GuestImage) -> None:
        """Then systemd kills it, and what is left is ended all the same."""
        drop_in(machine, "10", "TimeoutStopSec=2\nWatchdogSec=0\n", "qrapd@stuck")
        with started(machine, "stuck", guest):
            machine.run("kill", "-STOP", machine.show("qrapd@stuck", "MainPID"), check=True)
            machine.systemctl("stop", "qrapd@stuck", check=False)
            assert {} == machine.processes("qrapd@stuck")
            assert not machine.path("/run/qrapd/stuck").exists()

    def test_reload(self, machine: Booted, guest: GuestImage) -> None:
        """`systemctl reload` brings in a changed port, and the guest notices nothing."""
        with started(machine, "anew", guest) as file:
            before = uptime(file.ports[0])
            port = free_port()
            text = file.path.read_text()
            file.path.write_text(text.replace(f"/{file.ports[0]}:", f"/{port}:"))
            machine.systemctl("reload", "qrapd@anew")
            wait_for_http(machine, port, "qrapd@anew")
            assert before < uptime(port)

    def test_a_restart_is_no_end(self, machine: Booted, guest: GuestImage) -> None:
        """`qrapd restart` starts the guest anew, and to systemd the unit has been active all the time."""
        with started(machine, "twice", guest) as file:
            pid = machine.show("qrapd@twice", "MainPID")
            machine.run("qrapd", "restart", "twice", check=True)
            wait_for_http(machine, file.ports[0], "qrapd@twice")
            assert ("active", "running", "success", pid) == tuple(
                machine.show("qrapd@twice", what) for what in ("ActiveState", "SubState", "Result", "MainPID")
            )

    def test_a_wrong_file_is_not_tried_again(self, machine: Booted) -> None:
        """It would be as wrong the second time."""
        machine.path("/etc/qrapd/vms/wrong.toml").write_text("[qemu]\nargs = 5\n")
        machine.systemctl("start", "qrapd@wrong", check=False)
        machine.wait_for("failed", lambda: machine.show("qrapd@wrong", "ActiveState") == "failed")
        assert ("78", "0") == (
            machine.show("qrapd@wrong", "ExecMainStatus"),
            machine.show("qrapd@wrong", "NRestarts"),
        )

    def test_a_start_that_fails_again_and_again(self, machine: Booted) -> None:
        """Systemd 252 would try every half second for ever; each start waits for longer than the one before."""
        machine.path("/etc/qrapd/vms/hopeless.toml").write_text('[qemu]\nbinary = "/nowhere/qemu"\n')
        machine.systemctl("start", "qrapd@hopeless", check=False)
        try:
            waits = "QRAPD_VM=hopeless", "QRAPD_EVENT=vm.restarting"
            machine.wait_for("patience", lambda: len(machine.journal(*waits)) >= 2, "qrapd@hopeless")
            delays = [int(entry["QRAPD_DELAY_MS"]) for entry in machine.journal(*waits)]
            assert [1000, 2000] == delays[:2]
        finally:
            machine.systemctl("stop", "qrapd@hopeless")
        assert "inactive" == machine.show("qrapd@hopeless", "ActiveState")

    def test_a_credential(self, machine: Booted, guest: GuestImage) -> None:
        """As the documentation has it: QEMU reads it, and nobody else can."""
        machine.path("/etc/qrapd/disk-key").write_text("a secret of some length")
        machine.path("/etc/qrapd/disk-key").chmod(0o600)
        drop_in(machine, "10", DROP_INS["Credentials."], "qrapd@web")
        written = re.search(r'"(secret,id=key0,file=[^"]+)"', DOCUMENT)
        assert written is not None
        with started(machine, "web", guest, args=["-object", written[1]]):
            path = written[1].rpartition("=")[2]
            assert 0 != machine.run("setpriv", "--reuid=nobody", "--clear-groups", "cat", path).status
        machine.path("/run/systemd/system/qrapd@web.service.d/10.conf").unlink()
        machine.systemctl("daemon-reload")

    def test_the_drop_in_for_limits(self, machine: Booted, guest: GuestImage) -> None:
        """A VM runs within them."""
        drop_in(machine, "10", DROP_INS["Limits."], "qrapd@small")
        with started(machine, "small", guest):
            assert str(1500 * 2**20) == machine.show("qrapd@small", "MemoryMax")
            assert "machine-qrapd.slice" == machine.show("qrapd@small", "Slice")

    @pytest.mark.slow
    def test_versions_side_by_side(self, machine: Booted, guest: GuestImage) -> None:
        """What runs keeps the version that it was started from, through two more installations."""
        library = machine.path("/usr/local/lib/qrapd")
        first = f"{__version__}-1"
        with started(machine, "old", guest):
            qrapd = machine.show("qrapd@old", "MainPID")
            for number in (2, 3):
                machine.shell("cd /srv/qrapd && make install", check=True, timeout=300)
                assert f"{__version__}-{number}" == str((library / "current").readlink())
            # The second is what could be gone back to; the first is in use.
            expected = {first, f"{__version__}-2", f"{__version__}-3", "current"}
            assert expected == {each.name for each in library.iterdir()}
            command = machine.path(f"/proc/{qrapd}/cmdline").read_bytes()
            assert command.startswith(f"/usr/local/lib/qrapd/{first}/bin/python".encode())
            refused = machine.shell("cd /srv/qrapd && make uninstall")
            assert 0 != refused.status
            assert "is running" in refused.stderr
        machine.shell("cd /srv/qrapd && make install", check=True, timeout=300)
        assert not (library / first).exists()

    @pytest.mark.slow
    def test_a_package(self, machine: Booted) -> None:
        """DESTDIR: every path in it is that of the host where it will be, and this one is not touched."""
        before = machine.shell("find /usr/local /etc -xdev | sort", check=True).stdout
        script = "cd /srv/qrapd && make install DESTDIR=/tmp/root PREFIX=/usr SYSTEMD_VERSION=254"
        machine.shell(script, check=True, timeout=300)
        assert before == machine.shell("find /usr/local /etc -xdev | sort", check=True).stdout
        assert 1 == machine.shell("grep -rIl --exclude-dir=doc /tmp/root /tmp/root").status
        unit = machine.path("/tmp/root/usr/lib/systemd/system/qrapd@.service")
        assert "\nExecStart=/usr/bin/qrapd run" in unit.read_text()
        assert "notify-reload" in (unit.parent / "qrapd@.service.d/10-systemd-254.conf").read_text()
        # Moved to its place it runs.
        machine.shell("cp -a /tmp/root/usr/lib/qrapd /usr/lib/ && cp -a /tmp/root/usr/bin/qrapd /usr/bin/")
        assert f"qrapd {__version__}\n" == machine.run("/usr/bin/qrapd", "--version", check=True).stdout
        machine.shell("make -C /srv/qrapd uninstall DESTDIR=/tmp/root PREFIX=/usr", check=True)
        assert "" == machine.shell("find /tmp/root ! -type d", check=True).stdout
        machine.shell("rm -rf /usr/lib/qrapd /usr/bin/qrapd /tmp/root")

    @pytest.mark.slow
    def test_as_a_new_user_would(self, machine: Booted, guest: GuestImage) -> None:
        """The documentation's lines as they are written, as root and as a user; then the host is booted again.

        The disk has nothing on it, so the guest's kernel is added to ``web.toml``, and the port is a free one.
        """
        toml = re.search(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
        assert toml is not None
        kernel, initramfs = (f"/srv/{file.name}" for file in (guest.kernel, guest.initramfs))
        boots = json.dumps(
            ["-no-reboot", "-kernel", kernel, "-initrd", initramfs, "-append", guest.command_line]
        )
        ports = {"root": free_port(), "alice": free_port()}
        machine.shell("useradd --create-home --shell /bin/bash alice", check=True)
        for user, port in ports.items():
            text = toml[1].replace("8080:80", f"127.0.0.1/{port}:80").replace('"-m", "1G"', '"-m", "128M"')
            text = text.replace('if=virtio"]', f'if=virtio", {boots[1:]}')
            if user == "alice":
                text = text.replace("/var/lib/qrapd/web.qcow2", "web.qcow2")
            home = "/root" if user == "root" else "/home/alice"
            machine.shell(
                f"cp -r /srv/qrapd {home}/checkout && cd {home}/checkout && truncate -s 1M web.qcow2",
                check=True,
            )
            machine.path(f"{home}/checkout/web.toml").write_text(text)
            machine.shell(f"chown -R {user} {home}/checkout", check=True)
        machine.shell(
            "cd ~/checkout\n" + commands("From here to a VM that starts at boot"), check=True, timeout=300
        )
        wait_for_http(machine, ports["root"], "qrapd@web")

        # Nobody logs in here, so that lingering, which needs polkit where it is not root who asks for it, comes first.
        *lines, linger = commands("The same without root").splitlines()
        assert "loginctl enable-linger" == linger
        machine.run(*linger.split(), "alice", check=True)
        state = partial(machine.systemctl, "is-system-running", user="alice", check=False)
        machine.wait_for("alice's systemd", lambda: state() in {"running", "degraded"})
        machine.shell("cd ~/checkout\n" + "\n".join(lines), user="alice", check=True, timeout=300)
        wait_for_http(machine, ports["alice"], "user@*")

        for place in ("/systemd/system", "/systemd/user"):  # what is in /run is gone after a boot
            machine.shell(f"mkdir -p /etc{place}; cp -r /run{place}/qrapd@.service.d /etc{place}/")
        machine.reboot()
        for user, port in ports.items():
            assert float(fetch(port).split()[-2]) < PATIENCE, user
        machine.systemctl("disable", "--now", "qrapd@web")
        machine.systemctl("disable", "--now", "qrapd@web", user="alice")
        machine.shell("cd ~/checkout && make uninstall", user="alice", check=True)
        assert "" == machine.shell("find ~/.local ! -type d", user="alice", check=True).stdout
        assert "" == machine.shell("find $XDG_RUNTIME_DIR/qrapd -mindepth 1", user="alice").stdout
