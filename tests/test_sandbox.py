# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for QEMU's sandbox: a real guest below the filter, what the filter refuses, and a QEMU that has none."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from monitor import monitor
from qrapd import binaries
from qrapd.guest import GuestImage
from support import PATIENCE, Run, fetch, write_vm

pytestmark = pytest.mark.link

QEMU = f"qemu-system-{binaries.host_architecture()}"


@pytest.fixture
def sandboxed() -> None:
    """Skip where the installed QEMU was built without seccomp."""
    if not binaries.qemu_has_sandbox(QEMU):
        pytest.skip(f"{QEMU} has no -sandbox")


def filters(pid: int | str = "self") -> list[int]:
    """How many filters of system calls each thread has: a container's are among them (proc_pid_status(5))."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    counts = [
        re.search(r"^Seccomp_filters:\s*(\d+)", (each / "status").read_text(), re.MULTILINE) for each in tasks
    ]
    return [int(count[1]) for count in counts if count]


@pytest.mark.guest
@pytest.mark.usefixtures("sandboxed")
def test_a_guest_below_the_filter(guest: GuestImage, place: Path) -> None:
    """Every thread has it; HTTP, another passt, the monitor's commands, and powering down work as ever."""
    vm = write_vm(place, "sandboxed", guest=guest)
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.ready")["qemu_pid"]
        fetch(vm.ports[0])
        found = filters(qemu)
        assert {filters()[0] + 1} == set(found)
        assert len(found) > 1
        status = Path(f"/proc/{qemu}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status

        os.kill(run.last("passt.started")["pid"], signal.SIGKILL)
        run.wait_for("link.restored", generation=2)
        fetch(vm.ports[0])
        with monitor(place / "run/sandboxed") as qmp:
            for name in ("info network", "announce_self", "stop", "cont", "info cpus"):
                qmp.ask("human-monitor-command", **{"command-line": name})
            assert "running" == qmp.ask("query-status")["status"]
        fetch(vm.ports[0])

        assert 0 == run.stop()
        assert 0 == run.last("vm.exited")["exit_code"]
        run.assert_nothing_left()


def ask_to_migrate(directory: Path, uri: str) -> str:
    """What QEMU says to that; nothing where it dies of it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(directory / "user-qmp.sock"))
        with connection.makefile("rw") as lines:
            for command in (
                {"execute": "qmp_capabilities"},
                {"execute": "migrate", "arguments": {"uri": uri}},
            ):
                lines.readline()  # the greeting, and the answer to the first
                lines.write(json.dumps(command))
                lines.flush()
            try:
                return lines.readline()
            except ConnectionError:
                return ""


@pytest.mark.parametrize("sandbox", [True, False])
@pytest.mark.usefixtures("sandboxed")
def test_qemu_starts_no_programs(place: Path, sandbox: bool) -> None:
    """Asked to by its monitor: QEMU 7.2 is killed for it, 10.0 and later say that they may not. Without it they do."""
    vm = write_vm(place, "spawns", qemu=f"sandbox = {str(sandbox).lower()}")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.ready")["qemu_pid"]
        trace = place / "started"
        answer = ask_to_migrate(place / "run/spawns", f"exec:cat >{trace}")
        if not sandbox:
            assert {"return": {}} == json.loads(answer)
            deadline = time.monotonic() + PATIENCE
            while not trace.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return
        if answer:
            assert "Failed to fork" in answer
            assert {filters()[0] + 1} == set(filters(qemu))
        else:
            assert signal.SIGSYS == run.wait_for("vm.exited")["signal"]
        assert not trace.exists()


def test_a_qemu_without_seccomp_runs_without_it(place: Path) -> None:
    """One that does not know the option, as Debian 12's microvm."""
    real = shutil.which(QEMU)
    program = place / "qemu"
    program.write_text(
        f'#!/bin/sh\nfor each; do test "$each" != -sandbox || exit 1; done\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    vm = write_vm(place, "plain", qemu="binary = './qemu'\npowerdown_timeout = 0")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.ready")["qemu_pid"]
        assert {filters()[0]} == set(filters(qemu))
        assert 0 == run.stop()
        run.assert_nothing_left()
