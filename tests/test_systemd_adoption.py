# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrapd that comes after a crash, in its unit: what went on meanwhile, and what stands in its way.

Whatever it finds, what runs is not killed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from typing import Any

import pytest

from booted import Booted, install
from qrapd.guest import GuestImage
from support import PATIENCE, VmFile, fetch
from systemd_guest import with_pages
from test_systemd_units import drop_in, in_systemd, kill_qrapd, pid_of, started, told, uptime, wait_for_http

pytestmark = in_systemd

SECOND_QEMU = "look_for_left() does not ask whether a QEMU answers where there is no record"

AS_ROOT = "as root `qrapd stop` refuses the directory of the unit's user"

PAGES = {
    # udhcpc(8): SIGUSR1 has it renew its lease. Answers with how many renewals the server has granted since the boot.
    "renew": """#!/bin/sh
. /lib/reply
before=0
[ ! -e /run/renewed ] || read -r before <"/run/renewed"
for path in /proc/[0-9]*; do
  read -r name <"$path/comm" && [ "$name" = udhcpc ] && kill -USR1 "${path##*/}"
done
granted=$before
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do # less than the two seconds after which fetch() asks anew
  [ "$granted" = "$before" ] || break
  sleep 0.1
  [ ! -e /run/renewed ] || read -r granted <"/run/renewed"
done
reply "$granted"
""",
    "renewals": """#!/bin/sh
. /lib/reply
granted=0
[ ! -e /run/renewed ] || read -r granted <"/run/renewed"
reply "$granted"
""",
}


@pytest.fixture(scope="module")
def machine(booted: Booted, guest: GuestImage) -> Booted:
    """With qrapd installed."""
    return install(booted, guest)


@pytest.fixture(scope="module")
def renewer(machine: Booted, guest: GuestImage) -> GuestImage:
    """The guest, with a page that renews its lease."""
    lease = (resources.files("qrapd.guest") / "rootfs/bin/lease").read_text()
    count = """[ "$1" != renew ] || { n=0; read -r n </run/renewed; echo $((n + 1)) >/run/renewed; } 2>/dev/null"""
    head, _, rest = lease.partition("\n")
    return with_pages(machine, guest, PAGES, {"bin/lease": f"{head}\n{count}\n{rest}"})


@contextmanager
def held_back(machine: Booted, name: str, drop_ins: str = "") -> Iterator[Callable[[], None]]:
    """Let no qrapd come after one that is killed, until what this gives is called, or at the end.

    By a command before it, which waits: the unit is otherwise as after any crash.
    """
    gate = machine.path(f"/run/{name}-held-back")
    wait = f"ExecStartPre=sh -c 'while [ -e /run/{name}-held-back ]; do sleep 0.1; done'\n"
    drop_in(machine, "held-back", wait + drop_ins, f"qrapd@{name}")
    try:
        yield lambda: gate.touch()
    finally:
        gate.unlink(missing_ok=True)


def release(machine: Booted, name: str, record: str | None = None) -> None:
    """Let the next qrapd come, which finds this record, if given."""
    if record is not None:
        machine.path(record_path(name)).write_text(record)
    machine.path(f"/run/{name}-held-back").unlink()


def crash(machine: Booted, name: str) -> None:
    """kill -9 of qrapd; the next one is on its way."""
    before = machine.show(f"qrapd@{name}", "NRestarts")
    kill_qrapd(machine, name)
    machine.wait_for(
        "a restart", lambda: machine.show(f"qrapd@{name}", "NRestarts") != before, f"qrapd@{name}"
    )


def adoptions(machine: Booted, name: str) -> int:
    """How often the VM was taken over."""
    return told(machine, name).count("vm.adopted")


def both(machine: Booted, name: str) -> list[int]:
    """The pids of QEMU and passt."""
    return [pid_of(machine, f"qrapd@{name}", program) for program in ("qemu", "passt")]


def record_path(name: str) -> str:
    return f"/run/qrapd/{name}/record.json"


def read_record(machine: Booted, name: str) -> Any:
    """What the VM's record says."""
    return json.loads(machine.path(record_path(name)).read_text())


def alive(machine: Booted, pid: int) -> bool:
    """Whether a process of the machine runs."""
    return machine.path(f"/proc/{pid}").exists()


def quit_by_monitor(machine: Booted, name: str) -> None:
    """End QEMU by the monitor that is the user's own, as the hint says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
        monitor.settimeout(PATIENCE)
        monitor.connect(str(machine.path(f"/run/qrapd/{name}/user-qmp.sock")))
        for command in ("qmp_capabilities", "quit"):
            monitor.sendall(json.dumps({"execute": command}).encode())
        with suppress(ConnectionResetError):
            while monitor.recv(4096):
                pass


def renew(port: int) -> None:
    """Have the guest renew its lease, until the server has granted that."""
    before = int(fetch(port, "/cgi-bin/renewals"))
    deadline = time.monotonic() + PATIENCE
    while int(fetch(port, "/cgi-bin/renew")) == before:
        assert time.monotonic() < deadline


def test_the_lease_is_renewed_while_qrapd_is_down(machine: Booted, renewer: GuestImage) -> None:
    """passt answers the guest without a qrapd as with one, HTTP goes on, and all of it is adopted as it is."""
    with held_back(machine, "lease") as hold, started(machine, "lease", renewer) as file:
        port, before, pids = file.ports[0], uptime(file.ports[0]), both(machine, "lease")
        renew(port)
        hold()
        crash(machine, "lease")
        assert "0" == machine.show("qrapd@lease", "MainPID")
        renew(port)
        assert "0" == machine.show("qrapd@lease", "MainPID")
        assert 0 == adoptions(machine, "lease")
        release(machine, "lease")
        machine.wait_for("adopted", lambda: adoptions(machine, "lease") == 1, "qrapd@lease")
        renew(port)
        assert pids == both(machine, "lease")
        assert before < uptime(port)
        assert "link.lost" not in told(machine, "lease")


@contextmanager
def small_directory(machine: Booted, name: str) -> Iterator[str]:
    """A tmpfs of its own for a VM's runtime directory, and none of it left at the end."""
    place = f"/run/qrapd/{name}"
    machine.shell(f"mkdir -p {place} && mount -t tmpfs -o size=64k,mode=700 tmpfs {place}", check=True)
    try:
        yield place
    finally:
        machine.shell(f"mount -o remount,rw {place}; umount -l {place}; rmdir {place}")


def fill(machine: Booted, place: str) -> None:
    """Leave no room in a file system."""
    machine.shell(f"! cat /dev/zero >{place}/filler 2>/dev/null", check=True)


def test_a_full_run_at_an_adoption(machine: Booted, guest: GuestImage) -> None:
    """The VM is taken over all the same; that its record could not be written is told, and what to do."""
    with (
        small_directory(machine, "full") as place,
        held_back(machine, "full") as hold,
        started(machine, "full", guest) as file,
    ):
        before, pids = uptime(file.ports[0]), both(machine, "full")
        hold()
        crash(machine, "full")
        fill(machine, place)
        release(machine, "full")
        machine.wait_for("adopted", lambda: adoptions(machine, "full") == 1, "qrapd@full")
        (failed,) = machine.journal("QRAPD_VM=full", "QRAPD_EVENT=record.failed")
        assert "No space left on device" in failed["MESSAGE"]
        explained = machine.run("journalctl", "-x", "--no-pager", "QRAPD_EVENT=record.failed").stdout
        assert "Make room" in explained
        assert pids == both(machine, "full")
        assert before < uptime(file.ports[0])
        # And so is the next time, with room or without.
        for number in (2, 3):
            crash_and_wait(machine, "full", number)
            machine.path(f"{place}/filler").unlink(missing_ok=True)
        assert 2 == len(machine.journal("QRAPD_VM=full", "QRAPD_EVENT=record.failed"))
        assert pids == both(machine, "full")
        assert pids[0] == read_record(machine, "full")["qemu"]["pid"]
        assert before < uptime(file.ports[0])


def crash_and_wait(machine: Booted, name: str, number: int) -> None:
    """kill -9 of qrapd, and the next adoption."""
    kill_qrapd(machine, name)
    machine.wait_for("adopted", lambda: adoptions(machine, name) == number, f"qrapd@{name}")


def test_a_read_only_directory_at_an_adoption(machine: Booted, guest: GuestImage) -> None:
    """Nobody can take the VM over then; it runs on, the log says why, and the first try after that adopts it."""
    with (
        small_directory(machine, "fixed") as place,
        held_back(machine, "fixed") as hold,
        started(machine, "fixed", guest) as file,
    ):
        before, pids = uptime(file.ports[0]), both(machine, "fixed")
        hold()
        crash(machine, "fixed")
        machine.run("mount", "-o", "remount,ro", place, check=True)
        release(machine, "fixed")

        failures = partial(machine.journal, "_SYSTEMD_UNIT=qrapd@fixed.service", "QRAPD_EVENT=run.failed")
        machine.wait_for("the reason, more than once", lambda: len(failures()) > 1, "qrapd@fixed")
        assert f"cannot make the runtime directory {place}: Read-only file system" in failures()[0]["MESSAGE"]
        assert 0 == adoptions(machine, "fixed")
        assert pids == both(machine, "fixed")
        assert before < uptime(file.ports[0])
        machine.run("mount", "-o", "remount,rw", place, check=True)
        machine.wait_for("adopted", lambda: adoptions(machine, "fixed") == 1, "qrapd@fixed")
        assert pids == both(machine, "fixed")
        assert before < uptime(file.ports[0])


def test_a_record_that_is_not_understood(machine: Booted, guest: GuestImage) -> None:
    """The unit fails, once, and says how to go on; nothing is killed. With that QEMU gone the VM starts again."""
    with held_back(machine, "damaged") as hold, started(machine, "damaged", guest) as file:
        before, pids = uptime(file.ports[0]), both(machine, "damaged")
        hold()
        crash(machine, "damaged")
        release(machine, "damaged", record='{"version": 99}')
        for number, text in enumerate(("{", "", None), start=1):
            refused(machine, "damaged")
            failed = machine.journal("_SYSTEMD_UNIT=qrapd@damaged.service", "QRAPD_EVENT=run.failed")
            assert number == len(failed)
            assert "user-qmp.sock" in failed[-1]["QRAPD_HINT"]
            assert pids == both(machine, "damaged")
            assert before < uptime(file.ports[0])
            if text is not None:
                machine.path(record_path("damaged")).write_text(text)
                machine.systemctl("start", "qrapd@damaged", check=False)
        goes_on_without_it(machine, "damaged", file)


def refused(machine: Booted, name: str) -> None:
    """Wait until the unit has failed, because a QEMU of the VM runs that cannot be taken over."""
    unit = f"qrapd@{name}"
    machine.wait_for("failed", lambda: machine.show(unit, "ActiveState") == "failed", unit)
    assert "75" == machine.show(unit, "ExecMainStatus")
    assert 0 == adoptions(machine, name)


def goes_on_without_it(machine: Booted, name: str, file: VmFile) -> None:
    """The way out: QEMU is ended by its own monitor, and the unit started."""
    quit_by_monitor(machine, name)
    machine.wait_for("the end", lambda: not machine.processes(f"qrapd@{name}"), f"qrapd@{name}")
    machine.systemctl("start", f"qrapd@{name}")
    wait_for_http(machine, file.ports[0], f"qrapd@{name}")


def test_a_pid_that_was_given_to_another(machine: Booted, guest: GuestImage) -> None:
    """The processes that have QEMU's and passt's pids by now are not touched, though they are the same user's."""
    strangers = []
    for name in ("one", "two"):
        machine.run("systemd-run", f"--unit=stranger-{name}", "--uid=qrapd", "sleep", "infinity", check=True)
        strangers.append(int(machine.show(f"stranger-{name}", "MainPID")))
    with held_back(machine, "recycled") as hold, started(machine, "recycled", guest) as file:
        hold()
        crash(machine, "recycled")
        for pid in both(machine, "recycled"):
            machine.run("kill", "-KILL", str(pid))
        record = read_record(machine, "recycled")
        record["qemu"]["pid"], record["links"][0]["passt"]["pid"] = strangers
        release(machine, "recycled", json.dumps(record))
        machine.wait_for("ready", lambda: told(machine, "recycled").count("vm.ready") == 2, "qrapd@recycled")
        wait_for_http(machine, file.ports[0], "qrapd@recycled")
        assert 0 == adoptions(machine, "recycled")
        assert ["vm.exited"] == [event for event in told(machine, "recycled") if event.startswith("vm.e")]
        assert not set(strangers) & set(both(machine, "recycled"))
    assert all(alive(machine, pid) for pid in strangers)
    machine.systemctl("stop", "stranger-one", "stranger-two")


def test_a_start_time_that_is_not_qemus(machine: Booted, guest: GuestImage) -> None:
    """By the record that QEMU has ended. It runs on, adopted on better evidence or left alone, and is the only one."""
    with held_back(machine, "stale") as hold, started(machine, "stale", guest) as file:
        before, pids = uptime(file.ports[0]), both(machine, "stale")
        hold()
        crash(machine, "stale")
        record = read_record(machine, "stale")
        record["qemu"]["start_time"] += 1
        release(machine, "stale", json.dumps(record))
        machine.wait_for("an answer", lambda: is_settled(machine, "stale"), "qrapd@stale")
        assert pids == both(machine, "stale")
        assert before < uptime(file.ports[0])
        if adoptions(machine, "stale") == 0:
            refused(machine, "stale")
            goes_on_without_it(machine, "stale", file)


def test_a_qemu_without_a_record(machine: Booted, guest: GuestImage) -> None:
    """A full /run can have kept it from being written. No second QEMU is started on the same disks."""
    with held_back(machine, "unknown") as hold, started(machine, "unknown", guest) as file:
        before, pids = uptime(file.ports[0]), both(machine, "unknown")
        hold()
        crash(machine, "unknown")
        machine.path(record_path("unknown")).unlink()
        release(machine, "unknown")
        machine.wait_for("an answer", lambda: is_settled(machine, "unknown"), "qrapd@unknown")
        assert all(alive(machine, pid) for pid in pids)
        refused(machine, "unknown")
        assert before < uptime(file.ports[0])
        goes_on_without_it(machine, "unknown", file)


def is_settled(machine: Booted, name: str) -> bool:
    """Whether the unit has failed or come up."""
    return machine.show(f"qrapd@{name}", "ActiveState") in {"failed", "active"}


@pytest.mark.parametrize(
    "way",
    [
        "qrapd-stop",
        "start-and-stop",
    ],
)
def test_a_stop_before_the_next_qrapd(machine: Booted, guest: GuestImage, way: str) -> None:
    """It finds nobody who could end the VM, which runs on; both ways of the documentation end it then."""
    drop_in(machine, "10", "RestartSec=10min\n", f"qrapd@{way}")
    unit = f"qrapd@{way}"
    with started(machine, way, guest) as file:
        before, pids = uptime(file.ports[0]), both(machine, way)
        kill_qrapd(machine, way)
        machine.wait_for("the delay", lambda: machine.show(unit, "SubState") == "auto-restart", unit)
        machine.systemctl("stop", unit)
        assert "inactive" == machine.show(unit, "ActiveState")
        assert all(alive(machine, pid) for pid in pids)
        assert before < uptime(file.ports[0])
        if way == "qrapd-stop":
            machine.run("qrapd", "stop", f"/etc/qrapd/vms/{way}.toml", check=True, timeout=180)
        else:
            machine.systemctl("start", unit)
            assert pids[0] == pid_of(machine, unit, "qemu")
            machine.systemctl("stop", unit)
        assert [] == [pid for pid in pids if alive(machine, pid)]
        # The directory itself is systemd's, and goes with the next end of the unit.
        assert "" == machine.run("find", f"/run/qrapd/{way}", "-mindepth", "1").stdout
