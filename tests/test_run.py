# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd run`` with real passt, real QEMU and, where one is needed, a real guest."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrapd.guest import GuestImage
from support import NOBODY, PATIENCE, Run, fetch, processes_with, write_vm


@pytest.mark.guest
def test_a_life_from_start_to_sigterm(guest: GuestImage, place: Path) -> None:
    """A guest boots, answers through its forward and powers down on SIGTERM; every step is told in order."""
    vm = write_vm(place, "web", guest=guest)
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        assert re.search(r"lease eth0 \S+/\d+ router \S+", run.wait_for_line("lease"))
        assert "Hello from" in fetch(vm.ports[0])
        assert 0 == run.stop()
        assert [
            "passt.started",
            "link.connected",
            "vm.started",
            "vm.ready",
            "vm.stopping",
            "passt.exited",
            "vm.exited",
        ] == run.names()
        assert "guest: powering down" in [e["line"] for e in run.events if e["event"] == "guest.console"]
        assert {"web"} == {e["vm"] for e in run.events}
        assert ("request", 0) == (run.last("vm.exited")["reason"], run.last("vm.exited")["exit_code"])
        assert [] == run.stray
        run.assert_nothing_left()


@pytest.mark.guest
def test_two_links(guest: GuestImage, place: Path) -> None:
    """Both NICs get a lease, both forwards lead to their own NIC, and SIGTERM ends all within the deadline."""
    vm = write_vm(place, "two", guest=guest, links=2, qemu="powerdown_timeout = 30")
    with Run(vm.path, place / "run") as run:
        run.wait_for_line("guest: ready")
        leases = [e["line"] for e in run.events if e["event"] == "guest.console" and "lease" in e["line"]]
        assert {"eth0", "eth1"} == {line.split()[2] for line in leases}
        assert ["nic=eth0", "nic=eth1"] == [
            next(line for line in fetch(port, "/cgi-bin/state").splitlines() if line.startswith("nic="))
            for port in vm.ports
        ]
        asked = time.monotonic()
        assert 0 == run.stop()
        assert time.monotonic() - asked < 30
        assert "quit" not in [e.get("how") for e in run.events]
        run.assert_nothing_left()


@pytest.mark.guest
def test_as_an_unprivileged_user(guest: GuestImage, place: Path, as_nobody: list[str]) -> None:
    """No step needs root: another user's VM boots, answers, and leaves nothing."""
    os.chown(place, NOBODY, NOBODY)
    vm = write_vm(place, "user", guest=guest)
    with Run(vm.path, place / "run", prefix=as_nobody) as run:
        qemu = run.wait_for("vm.started")["qemu_pid"]
        assert NOBODY == Path(f"/proc/{qemu}").stat().st_uid
        run.wait_for_line("guest: ready")
        assert "Hello from" in fetch(vm.ports[0])
        assert 0 == run.stop()
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_guest_that_powers_off_by_itself(guest: GuestImage, place: Path) -> None:
    """It ends qrapd with 0, and the reason says whose wish it was."""
    vm = write_vm(place, "off", guest=guest, append="guest.poweroff_after=0")
    with Run(vm.path, place / "run") as run:
        assert 0 == run.wait()
        assert "guest-shutdown" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_guest_that_ignores_the_power_button(guest: GuestImage, place: Path) -> None:
    """After its powerdown_timeout QEMU is told to quit: still an orderly end, with 0."""
    vm = write_vm(place, "deaf", guest=guest, append="guest.powerdown=ignore", qemu="powerdown_timeout = 1")
    with Run(vm.path, place / "run") as run:
        run.wait_for_line("guest: ready")
        assert 0 == run.stop()
        assert ["power-down", "quit"] == [e["how"] for e in run.events if e["event"] == "vm.stopping"]
        assert any("power button ignored" in e.get("line", "") for e in run.events)
        run.assert_nothing_left()


def test_a_second_sigint_hurries(place: Path) -> None:
    """A machine without a system never obeys the button; the second Ctrl-C does not wait for its minute."""
    vm = write_vm(place, "hurry", qemu="powerdown_timeout = 3600")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        run.process.send_signal(signal.SIGINT)
        run.wait_for("vm.stopping", how="power-down")
        assert 0 == run.stop(signal.SIGINT)
        assert "quit" == run.last("vm.stopping")["how"]
        run.assert_nothing_left()


def test_a_qemu_that_hangs_is_killed(place: Path) -> None:
    """A QEMU that obeys neither QMP nor SIGTERM is killed after its deadlines, and the end counts as orderly."""
    vm = write_vm(place, "hang", qemu="powerdown_timeout = 0.2\nquit_timeout = 0.2")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.started")["qemu_pid"]
        run.wait_for("vm.ready")
        os.kill(qemu, signal.SIGSTOP)
        assert 0 == run.stop()
        assert "SIGKILL" == run.last("vm.stopping")["how"]
        assert ("request", signal.SIGKILL) == (
            run.last("vm.exited")["reason"],
            run.last("vm.exited")["signal"],
        )
        run.assert_nothing_left()


def test_a_paused_machine_is_not_asked_to_power_down(place: Path) -> None:
    """With -S the VM is ready though nothing runs, and a stop goes straight to quit: nobody is awake to obey."""
    vm = write_vm(place, "paused", args=["-S"], qemu="powerdown_timeout = 3600")
    with Run(vm.path, place / "run") as run:
        assert "prelaunch" == run.wait_for("vm.ready")["status"]
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_a_killed_qemu(place: Path) -> None:
    """Killing QEMU ends qrapd with 1 and says so; passt goes with it."""
    vm = write_vm(place, "killed")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.started")["qemu_pid"]
        run.wait_for("vm.ready")
        os.kill(qemu, signal.SIGKILL)
        assert 1 == run.wait()
        ended = run.last("vm.exited")
        assert ("killed", signal.SIGKILL) == (ended["reason"], ended["signal"])
        assert "SIGKILL" in run.last("run.failed")["error"]
        run.assert_nothing_left()


def test_a_qemu_that_someone_else_terminates(place: Path) -> None:
    """QEMU turns SIGTERM into an exit status of 0; it is a failure all the same, since nobody asked us."""
    vm = write_vm(place, "terminated")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.started")["qemu_pid"]
        run.wait_for("vm.ready")
        os.kill(qemu, signal.SIGTERM)
        assert 1 == run.wait()
        assert "killed" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_lost_passt_is_told_and_the_vm_goes_on(guest: GuestImage, place: Path) -> None:
    """One link's passt dies: that link is lost, the other one's network is untouched, and a stop still works."""
    vm = write_vm(place, "lost", guest=guest, links=2)
    with Run(vm.path, place / "run") as run:
        run.wait_for_line("guest: ready")
        first = next(e for e in run.events if e["event"] == "link.connected" and e["link"] == 0)
        os.kill(first["passt_pid"], signal.SIGKILL)
        assert signal.SIGKILL == run.wait_for("passt.exited")["signal"]
        lost = run.wait_for("link.lost")
        assert (0, "exited") == (lost["link"], lost["reason"])
        assert "nic=eth1" in fetch(vm.ports[1], "/cgi-bin/state")
        assert 0 == run.stop()
        run.assert_nothing_left()


# --- stopping while starting --------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["passt.started", "link.connected", "vm.started", "vm.ready"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_at_each_event_of_a_start(place: Path, moment: str, number: signal.Signals) -> None:
    """Whatever has been reached, a stop ends it with 0, at once, and nothing is left."""
    vm = write_vm(place, "early", links=2, qemu="powerdown_timeout = 0.5")
    with Run(vm.path, place / "run") as run:
        run.wait_for(moment)
        assert 0 == run.stop(number)
        assert "request" == run.last("vm.exited")["reason"]
        assert [] == run.stray
        run.assert_nothing_left()


def test_a_stop_at_any_moment_of_a_start(place: Path) -> None:
    """At moments spread over the whole start, and with a second signal right behind, nothing is ever left."""
    vm = write_vm(place, "any", links=2, qemu="powerdown_timeout = 0.2")
    for step in range(24):
        with Run(vm.path, place / "run") as run:
            time.sleep(0.12 + 0.02 * step)
            run.process.send_signal(signal.SIGTERM)
            if step % 3 == 0:
                run.process.send_signal(signal.SIGINT)
            status = run.wait()
            # Before qrapd listens to signals it has nothing that could be left, and dies of them as any program.
            violent = set() if run.names() else {1, -signal.SIGTERM, -signal.SIGINT}
            assert status in {0} | violent, run.events
            assert not any("Traceback" in line for line in run.stray), run.stray
            run.assert_nothing_left()


def test_signals_that_come_late(place: Path) -> None:
    """Once all is over, further signals must not make the end look violent."""
    vm = write_vm(place, "late", qemu="powerdown_timeout = 0")
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02):
        with Run(vm.path, place / "run") as run:
            run.wait_for("vm.ready")
            run.process.send_signal(signal.SIGTERM)
            run.wait_for("vm.exited")
            time.sleep(pause)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                run.process.send_signal(number)
            assert 0 == run.wait()
            run.assert_nothing_left()


def test_sighup_while_starting(place: Path) -> None:
    """A reload, or a terminal that is closed, must not end a VM, at whatever moment it comes."""
    vm = write_vm(place, "reload", qemu="powerdown_timeout = 0")
    with Run(vm.path, place / "run") as run:
        run.wait_for("passt.started")
        run.process.send_signal(signal.SIGHUP)
        run.wait_for("vm.reloaded", links=[], applied=[], needs_restart=[])
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_the_power_button_is_pressed_again(place: Path) -> None:
    """A guest that still boots has no ear for the first press: QEMU's own events count them."""
    vm = write_vm(place, "deaf", qemu="powerdown_timeout = 6.5")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        monitor = socket.socket(socket.AF_UNIX)
        with monitor, monitor.makefile("rw") as lines:
            monitor.connect(str(place / "run/deaf/user-qmp.sock"))
            lines.write('{"execute": "qmp_capabilities"}\n')
            lines.flush()
            lines.readline()
            assert 0 == run.stop()
            assert 2 == sum('"POWERDOWN"' in line for line in lines)


# --- what must not start ------------------------------------------------------------------------------


def test_a_port_that_is_taken(place: Path) -> None:
    """passt's own words are quoted, QEMU is not started, and the status says that something is not available."""
    vm = write_vm(place, "taken")
    with socket.create_server(("127.0.0.1", vm.ports[0])), Run(vm.path, place / "run") as run:
        assert 69 == run.wait()
        failure = run.last("run.failed")
        assert f"127.0.0.1/{vm.ports[0]}:80" in failure["error"]
        assert "ss -lntup" in failure["hint"]
        assert "vm.started" not in run.names()
        assert "failed" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


def test_a_low_port_without_privilege(place: Path, as_nobody: list[str]) -> None:
    """An unprivileged user is told which setting stands in the way of a port below 1024."""
    os.chown(place, NOBODY, NOBODY)
    vm = write_vm(place, "low", links=0)
    vm.path.write_text(vm.path.read_text() + '[[link]]\n[link.passt]\ntcp_ports = ["127.0.0.1/81:80"]\n')
    with Run(vm.path, place / "run", prefix=as_nobody) as run:
        assert 69 == run.wait()
        assert "net.ipv4.ip_unprivileged_port_start=81" in run.last("run.failed")["hint"]
        run.assert_nothing_left()


def test_a_vm_that_is_already_supervised(place: Path) -> None:
    """The second supervisor ends with 75 and touches nothing of the first."""
    vm = write_vm(place, "once", qemu="powerdown_timeout = 0")
    with Run(vm.path, place / "run") as first:
        first.wait_for("vm.ready")
        with Run(vm.path, place / "run") as second:
            assert 75 == second.wait()
            assert "already supervised" in second.last("run.failed")["error"]
        assert {"lock", "record.json", "qmp.sock", "user-qmp.sock", "serial.sock", "control.sock"} == {
            path.name for path in (place / "run" / "once").iterdir()
        }
        assert 0 == first.stop()
        first.assert_nothing_left()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-version"], "before its monitor said a word"),
        (["-drive", "file=nowhere.qcow2,if=virtio"], "nowhere.qcow2"),
        (["-kernel", "nowhere.img"], "nowhere.img"),
        (["-no-such-option"], "no-such-option"),
    ],
)
def test_what_qemu_refuses(place: Path, args: list[str], words: str) -> None:
    """QEMU's own words are quoted, the status is 1, and passt has not been left behind."""
    vm = write_vm(place, "refused", args=args)
    with Run(vm.path, place / "run") as run:
        assert 1 == run.wait()
        assert words in run.last("run.failed")["error"]
        assert run.last("run.failed")["hint"]
        assert "failed" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


# --- logs ---------------------------------------------------------------------------------------------


@pytest.mark.guest
def test_a_log_that_nobody_reads(guest: GuestImage, place: Path) -> None:
    """A guest that floods its console, a reader that is stopped: guest and supervisor go on all the same."""
    vm = write_vm(place, "flood", guest=guest, append="guest.control=1", qemu="powerdown_timeout = 20")
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "qrapd", "run", str(vm.path), "--runtime-dir", str(place / "run")]
    process = subprocess.Popen([*command, "--log-format", "json"], stderr=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    try:
        fetch(vm.ports[0])
        assert fetch(vm.ports[0], "/cgi-bin/flood?1")
        assert "Hello from" in fetch(vm.ports[0])
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(reader)
    assert [] == processes_with(str(place / "run"))
    assert [] == list((place / "run").iterdir())
