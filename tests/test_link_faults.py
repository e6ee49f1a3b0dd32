# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong while a link heals: no new passt, no port, a QEMU that is stopped, hangs or dies."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor import monitor
from qrapd.guest import GuestImage
from support import Run, VmFile, fetch, open_directory, write_vm
from test_link_traffic import Subject, assert_undisturbed, running

pytestmark = [pytest.mark.link, pytest.mark.xdist_group("link-faults")]


class Gate:
    """Stands before the real passt, and does to it what the test wants. A question for its options goes through."""

    def __init__(self, place: Path) -> None:
        self.program = place / "passt"
        self._hold, self._fail = place / "hold", place / "fail"
        passt = shlex.quote(shutil.which("passt") or "passt")
        hold, fail = shlex.quote(str(self._hold)), shlex.quote(str(self._fail))
        self.program.write_text(
            f"""#!/bin/sh
case " $* " in *" --fd "*) ;; *) exec {passt} "$@" ;; esac
while [ -e {hold} ]; do sleep 0.02; done
if [ -s {fail} ]; then sed -i 1d {fail}; echo "cannot: the test wants so" >&2; exit 1; fi
exec {passt} "$@"
"""
        )
        self.program.chmod(0o755)

    def hold(self) -> None:
        """Let the next ones wait before they start."""
        self._hold.touch()

    def let_go(self) -> None:
        """Let those that wait start."""
        self._hold.unlink()

    def fail(self, times: int) -> None:
        """Let the next ones fail."""
        self._fail.write_text("x\n" * times)


@pytest.fixture(scope="module")
def stage(guest: GuestImage) -> Iterator[tuple[Subject, Gate]]:
    """A VM with one link whose passts pass through a gate; each test leaves it as it was."""
    with open_directory() as place:
        gate = Gate(place)
        vm = write_vm(place, "faults", guest=guest, link_lines=f'passt_binary = "{gate.program}"')
        with running(vm, place / "run") as subject:
            yield subject, gate


@pytest.fixture
def subject(stage: tuple[Subject, Gate]) -> Iterator[Subject]:
    """The VM, of which the guest notices nothing, whatever the test does; and nothing is left behind."""
    subject, _ = stage
    before, fds, qemu = subject.state(), subject.count_fds(), subject.qemu_pid
    yield subject
    assert_undisturbed(before, subject.state())
    assert qemu == subject.qemu_pid
    subject.assert_tidy(fds)


@pytest.fixture
def gate(stage: tuple[Subject, Gate]) -> Gate:
    """What stands before the VM's passts."""
    return stage[1]


def lose(subject: Subject, number: signal.Signals = signal.SIGKILL) -> None:
    """End the passt, and wait until that is told."""
    os.kill(subject.passt_pids[0], number)
    lost = subject.run.wait_for("link.lost", generation=subject.generations[0])
    assert "exited" == lost["reason"]


def restored(subject: Subject) -> None:
    """Wait until the link is back, on the next generation."""
    event = subject.run.wait_for("link.restored")
    subject.generations[0] += 1
    assert subject.generations[0] == event["generation"]
    subject.passt_pids[0] = event["passt_pid"]


@pytest.mark.guest
def test_a_passt_that_ends_with_0(subject: Subject) -> None:
    """That is no success: the network is gone all the same."""
    lose(subject, signal.SIGTERM)
    assert 0 == subject.run.last("passt.exited")["exit_code"]
    restored(subject)


@pytest.mark.guest
def test_three_starts_that_fail(subject: Subject, gate: Gate) -> None:
    """Each is told with passt's last words and the time of the next, which grows; then one works."""
    gate.fail(3)
    lose(subject)
    failures = [subject.run.wait_for("link.failed") for _ in range(3)]
    restored(subject)
    assert [1, 2, 3] == [event["attempts"] for event in failures]
    assert all("cannot: the test wants so" in event["error"] for event in failures)
    delays = [event["retry_in_ms"] for event in failures]
    assert delays == sorted(delays)


@pytest.mark.guest
def test_a_port_that_is_taken_meanwhile(subject: Subject, gate: Gate) -> None:
    """The log says so; when the port is free again, the link is back without anybody's help."""
    gate.hold()
    lose(subject)
    with socket.create_server(("127.0.0.1", subject.vm.ports[0])):
        gate.let_go()
        failed = subject.run.wait_for("link.failed")
        assert "bind" in failed["error"] or "listen" in failed["error"]  # by passt's age
        assert "ss -lntup" in failed["hint"]
    restored(subject)


@pytest.mark.guest
def test_a_machine_that_is_stopped_meanwhile(subject: Subject, gate: Gate) -> None:
    """A person stops it, and only a person lets it go on; then the network is there."""
    gate.hold()
    lose(subject)
    with monitor(subject.run.base / "faults") as qmp:
        qmp.ask("stop")
        gate.let_go()
        restored(subject)
        assert "paused" == qmp.ask("query-status")["status"]
        lose(subject)
        restored(subject)
        assert "paused" == qmp.ask("query-status")["status"]
        qmp.ask("cont")


@pytest.mark.guest
def test_kills_during_a_swap(subject: Subject) -> None:
    """At whatever moment the new passt dies as well: in the end there is one, and the generation counts what worked."""
    seed = random.randrange(1000)
    sys.stdout.write(f"seed {seed}\n")
    moments = random.Random(seed)
    for _ in range(6):
        killed = [subject.passt_pids[0]]
        os.kill(killed[0], signal.SIGKILL)
        for _ in range(2):
            killed.append(subject.run.wait_for("passt.started")["pid"])
            time.sleep(moments.uniform(0, 0.05))
            os.kill(killed[-1], signal.SIGKILL)
        # Some of those killed may have served already.
        while (serving := subject.run.wait_for("link.restored"))["passt_pid"] in killed:
            pass
        subject.passt_pids[0], subject.generations[0] = serving["passt_pid"], serving["generation"]
        fetch(subject.vm.ports[0])
    restorations = [e["generation"] for e in subject.run.events if e["event"] == "link.restored"]
    assert restorations == list(range(2, 2 + len(restorations)))


@pytest.mark.guest
def test_a_qemu_that_hangs_during_a_swap(subject: Subject, gate: Gate) -> None:
    """The deadline of the step passes, the attempt is undone, and the next one works when QEMU does."""
    gate.hold()
    lose(subject)
    os.kill(subject.qemu_pid, signal.SIGSTOP)
    try:
        gate.let_go()
        failed = subject.run.wait_for("link.failed")
        assert "did not answer getfd within 10 s" in failed["error"]
    finally:
        os.kill(subject.qemu_pid, signal.SIGCONT)
    restored(subject)
    with monitor(subject.run.base / "faults") as qmp:
        network = qmp.ask("human-monitor-command", **{"command-line": "info network"})
    # Nothing is left of the attempt.
    assert 1 == network.count("link0-port"), network
    assert 1 == network.count("link0-stream"), network


def quick_vm(place: Path, name: str, lines: str = "") -> VmFile:
    """Without a guest: what has to heal is between QEMU and qrapd."""
    vm = write_vm(place, name, qemu="powerdown_timeout = 0\nquit_timeout = 1", link_lines=lines)
    vm.path.write_text(f"{vm.path.read_text()}\n[restart]\nlimit = 2\n")
    return vm


def in_the_middle_of_a_swap(run: Run) -> int:
    """Lose the passt of a VM whose QEMU stands still, until the new stream waits for it; returns QEMU's pid."""
    qemu = int(run.wait_for("vm.ready")["qemu_pid"])
    os.kill(qemu, signal.SIGSTOP)
    os.kill(run.last("link.connected")["passt_pid"], signal.SIGKILL)
    run.wait_for("passt.started")
    time.sleep(1)  # passt has answered long before; QEMU does not
    assert "link.restored" not in run.names()
    return qemu


def test_a_qemu_that_is_killed_in_the_middle_of_a_swap(place: Path) -> None:
    """That is the VM's end, not the link's trouble; nothing is left."""
    vm = quick_vm(place, "middle")
    with Run(vm.path, place / "run") as run:
        os.kill(in_the_middle_of_a_swap(run), signal.SIGKILL)
        assert 1 == run.wait()
        assert "killed" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


def test_a_stop_in_the_middle_of_a_swap(place: Path) -> None:
    """It ends with SIGKILL, as that QEMU listens to nothing else; and the new passt does not outlive it."""
    vm = quick_vm(place, "midstop")
    with Run(vm.path, place / "run") as run:
        in_the_middle_of_a_swap(run)
        assert 0 == run.stop()
        assert "SIGKILL" == run.last("vm.stopping")["how"]
        run.assert_nothing_left()


@pytest.mark.parametrize("end", ["QEMU is killed", "qrapd is stopped"])
def test_an_end_at_any_moment_of_an_outage(place: Path, end: str) -> None:
    """While the old passt is seen off, the new one comes up, and QEMU takes its stream."""
    moments = random.Random(end)
    for attempt in range(6):
        vm = quick_vm(place, f"moment{attempt}")
        with Run(vm.path, place / "run") as run:
            qemu = run.wait_for("vm.ready")["qemu_pid"]
            os.kill(run.last("link.connected")["passt_pid"], signal.SIGKILL)
            time.sleep(moments.uniform(0, 0.08))
            if end == "QEMU is killed":
                os.kill(qemu, signal.SIGKILL)
                assert 1 == run.wait()
            else:
                assert 0 == run.stop()
            assert "vm.exited" == run.names()[-1 if end != "QEMU is killed" else -2]
            run.assert_nothing_left()


def test_a_link_that_is_given_up(place: Path) -> None:
    """Loudly; the VM runs on, and a word is enough to try again."""
    gate = Gate(place)
    vm = quick_vm(place, "hopeless", f'passt_binary = "{gate.program}"')
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.ready")["qemu_pid"]
        gate.fail(2)
        os.kill(run.last("link.connected")["passt_pid"], signal.SIGKILL)
        assert run.wait_for("link.failed", attempts=1)["retry_in_ms"] > 0
        last = run.wait_for("link.failed", attempts=2)
        assert (None, "error") == (last["retry_in_ms"], last["level"])
        time.sleep(1)
        assert "link.restored" not in run.names()
        run.process.send_signal(signal.SIGHUP)
        run.wait_for("link.restored", generation=2)
        assert qemu == run.last("vm.ready")["qemu_pid"]
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_a_passt_that_crashes_again_and_again(place: Path) -> None:
    """One that ends by itself as soon as it serves is not started in a loop as fast as the machine can."""
    gate = place / "passt"
    gate.write_text(
        f"""#!/bin/sh
case " $* " in *" --fd "*) ;; *) exec passt "$@" ;; esac
[ -e {place}/crash ] || exec passt "$@"
passt "$@" <&0 & sleep 0.3; kill $!; wait; exit 3
"""
    )
    gate.chmod(0o755)
    vm = quick_vm(place, "crash", f'passt_binary = "{gate}"')
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        (place / "crash").touch()
        os.kill(run.last("link.connected")["passt_pid"], signal.SIGKILL)
        assert "exit status 3" in run.wait_for("link.failed", attempts=1)["error"]
        (place / "crash").unlink()
        run.wait_for("link.restored")
        assert 0 == run.stop()
        run.assert_nothing_left()
