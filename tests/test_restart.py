# SPDX-License-Identifier: GPL-2.0-or-later
"""[restart]: whether a VM that has ended is started again, and real ones that are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qrapd.guest import GuestImage
from qrapd.lifecycle import Reason
from qrapd.restart import Policy, is_wanted
from support import Run, fetch, write_vm


@pytest.mark.parametrize(
    ("policy", "reason", "failure", "expected"),
    [
        ("never", Reason.FAILED, True, False),
        ("never", Reason.GUEST_SHUTDOWN, False, False),
        ("on-failure", Reason.FAILED, True, True),
        ("on-failure", Reason.KILLED, True, True),
        ("on-failure", Reason.GUEST_PANIC, True, True),
        ("on-failure", Reason.GUEST_SHUTDOWN, False, False),
        ("on-failure", Reason.REQUEST, False, False),
        ("always", Reason.GUEST_SHUTDOWN, False, True),
        ("always", Reason.FAILED, True, True),
        ("always", Reason.REQUEST, False, False),
    ],
)
def test_policies(policy: Policy, reason: Reason, failure: bool, expected: bool) -> None:
    """What was stopped on request stays down."""
    assert expected is is_wanted(policy, reason, failure=failure)


def with_restart(file: Path, lines: str) -> None:
    file.write_text(f"{file.read_text()}\n[restart]\n{lines}\n")


def test_a_qemu_that_is_killed_is_started_again(place: Path) -> None:
    """With a passt of its own each time; a stop ends it all."""
    vm = write_vm(place, "again", qemu="powerdown_timeout = 0")
    with_restart(vm.path, 'policy = "on-failure"')
    with Run(vm.path, place / "run") as run:
        pids = []
        for attempt in (1, 2):
            pids.append(run.wait_for("vm.ready")["qemu_pid"])
            os.kill(pids[-1], signal.SIGKILL)
            run.wait_for("vm.exited", reason="killed", signal=9)
            assert attempt == run.wait_for("vm.restarting")["attempts"]
        pids.append(run.wait_for("vm.ready")["qemu_pid"])
        assert 3 == len(set(pids))
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_too_many_failures(place: Path) -> None:
    """After `limit` of them qrapd ends as the VM did, and says why."""
    vm = write_vm(place, "hopeless", args=["-drive", "file=/nonexistent"])
    with_restart(vm.path, 'policy = "on-failure"\nlimit = 3\nwindow = 600')
    with Run(vm.path, place / "run") as run:
        assert 1 == run.wait()
        assert [1, 2] == [e["attempts"] for e in run.events if e["event"] == "vm.restarting"]
        assert "has ended 3 times within 600 s" in run.last("run.failed")["error"]
        assert "/nonexistent" in run.last("run.failed")["error"]
        run.assert_nothing_left()


def test_a_stop_between_two_starts(place: Path) -> None:
    """There is no VM then, and soon no qrapd: on request."""
    vm = write_vm(place, "between", args=["-drive", "file=/nonexistent"])
    with_restart(vm.path, 'policy = "always"\nlimit = 100')
    with Run(vm.path, place / "run") as run:
        for _ in range(3):  # by now the delay is 4 s
            run.wait_for("vm.restarting")
        assert 0 == run.stop()
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_guest_that_powers_down_is_started_again(guest: GuestImage, place: Path) -> None:
    """With policy always; and a lost link is no reason to restart: that is in test_link_*.py."""
    vm = write_vm(place, "always", guest=guest, append="guest.control=1")
    with_restart(vm.path, 'policy = "always"')
    with Run(vm.path, place / "run") as run:
        run.wait_for_line("guest: ready")
        fetch(vm.ports[0], "/cgi-bin/poweroff")
        run.wait_for("vm.exited", reason="guest-shutdown")
        run.wait_for("vm.restarting")
        run.wait_for_line("guest: ready")
        assert float(fetch(vm.ports[0], "/cgi-bin/state").split("uptime=")[1].split()[0]) < 60
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_a_file_that_is_mended_between_two_starts(place: Path) -> None:
    """The next start goes by it, and then there is a machine."""
    vm = write_vm(place, "mended", args=["-drive", "file=/nonexistent"], qemu="powerdown_timeout = 0")
    with_restart(vm.path, 'policy = "on-failure"\nlimit = 100')
    with Run(vm.path, place / "run") as run:
        for _ in range(3):  # by now the delay is 2 s
            run.wait_for("vm.restarting")
        text = vm.path.read_text()
        vm.path.write_text(
            text.replace('"-drive", "file=/nonexistent", ', "").replace(', "-drive", "file=/nonexistent"', "")
        )
        run.process.send_signal(signal.SIGHUP)
        run.wait_for("vm.ready")
        run.wait_for("vm.reloaded", needs_restart=[])
        assert 0 == run.stop()
        run.assert_nothing_left()
