# SPDX-License-Identifier: GPL-2.0-or-later
"""qrapd may go, the VM stays: killed, upgraded, stopped from elsewhere; and what the next one finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qrapd.guest import GuestImage
from support import PATIENCE, Run, VmFile, fetch, write_vm


def read_record(run: Run, name: str) -> Any:
    return json.loads((run.base / name / "record.json").read_text())


def kill(run: Run) -> None:
    """kill -9 of the supervisor alone."""
    run.process.kill()
    run.process.wait()


def left_running(vm: VmFile, base: Path) -> Run:
    """A VM whose supervisor is gone."""
    run = Run(vm.path, base).__enter__()
    run.wait_for("vm.ready")
    kill(run)
    return run


@contextmanager
def ended(run: Run) -> Iterator[Run]:
    """Whatever is left of a killed supervisor's VM ends with the test."""
    try:
        yield run
    finally:
        run.__exit__()


def quick_vm(place: Path, name: str) -> VmFile:
    return write_vm(place, name, qemu="powerdown_timeout = 0")


def qrapd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qrapd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_vm_whose_supervisor_was_killed(place: Path) -> None:
    """The next one takes it over as it is: the same QEMU, passt and generation; a stop leaves nothing."""
    vm = quick_vm(place, "left")
    with ended(left_running(vm, place / "run")) as killed:
        before = read_record(killed, "left")
        with Run(vm.path, place / "run") as run:
            assert before["qemu"]["pid"] == run.wait_for("vm.adopted", links=1, status="running")["qemu_pid"]
            after = read_record(run, "left")
            assert (before["qemu"], before["links"]) == (after["qemu"], after["links"])
            assert run.process.pid == after["supervisor"]["pid"]
            assert ["vm.adopted"] == run.names()
            assert 0 == run.stop()
            assert "request" == run.last("vm.exited")["reason"]
            run.assert_nothing_left()
        killed.assert_nothing_left()


def test_what_is_adopted_is_watched(place: Path) -> None:
    """As what was started: a lost passt is replaced, and QEMU's end is the VM's."""
    vm = quick_vm(place, "watched")
    with ended(left_running(vm, place / "run")) as killed, Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.adopted")["qemu_pid"]
        os.kill(killed.last("link.connected")["passt_pid"], signal.SIGKILL)
        run.wait_for("link.restored", generation=2)
        os.kill(qemu, signal.SIGKILL)
        assert 1 == run.wait()
        assert "killed" == run.last("vm.exited")["reason"]
        run.assert_nothing_left()


def test_a_passt_that_ended_meanwhile(place: Path) -> None:
    """Its link is healed at the adoption."""
    vm = quick_vm(place, "lost")
    with ended(left_running(vm, place / "run")) as killed:
        os.kill(killed.last("link.connected")["passt_pid"], signal.SIGKILL)
        with Run(vm.path, place / "run") as run:
            run.wait_for("link.lost", reason="exited", generation=1)
            run.wait_for("link.restored", generation=2)
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_a_qemu_that_ended_meanwhile(place: Path) -> None:
    """That is told, and the VM is started anew, which is what was asked for."""
    vm = quick_vm(place, "dead")
    with ended(left_running(vm, place / "run")) as killed:
        os.kill(killed.last("vm.started")["qemu_pid"], signal.SIGKILL)
        with Run(vm.path, place / "run") as run:
            assert run.wait_for("vm.exited", reason="killed")["exit_code"] is None
            run.wait_for("vm.ready")
            assert 0 == run.stop()
            run.assert_nothing_left()
        killed.assert_nothing_left()


@pytest.mark.parametrize("text", ['{"version": 99}', "{", ""])
def test_a_record_that_is_not_understood(place: Path, text: str) -> None:
    """Nothing is started and nothing is ended beside a QEMU that runs; once it is gone, the VM starts."""
    vm = quick_vm(place, "damaged")
    with ended(left_running(vm, place / "run")) as killed:
        (place / "run/damaged/record.json").write_text(text)
        with Run(vm.path, place / "run") as refused:
            assert 75 == refused.wait()
            assert "still runs" in refused.last("run.failed")["error"]
            assert "user-qmp.sock" in refused.last("run.failed")["hint"]
        qemu = killed.children[killed.last("vm.started")["qemu_pid"]]
        assert qemu.alive
        os.kill(qemu.pid, signal.SIGKILL)
        with Run(vm.path, place / "run") as run:
            run.wait_for("vm.ready")
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_a_pid_that_was_given_to_another(place: Path) -> None:
    """A process with QEMU's pid and another start time is not QEMU, and is not touched."""
    vm = quick_vm(place, "recycled")
    (place / "run/recycled").mkdir(parents=True)
    (place / "run/recycled").chmod(0o700)
    mine = {"pid": os.getpid(), "start_time": 1}
    record = {"version": 2, "qemu": mine, "links": [], "supervisor": mine}
    (place / "run/recycled/record.json").write_text(json.dumps(record))
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        assert 0 == run.stop()


def test_a_monitor_that_does_not_answer(place: Path) -> None:
    """An adoption that fails kills nothing, and says how to go on."""
    vm = quick_vm(place, "deaf")
    with ended(left_running(vm, place / "run")) as killed:
        (place / "run/deaf/qmp.sock").unlink()
        with Run(vm.path, place / "run") as run:
            assert 75 == run.wait()
            error = run.last("run.failed")
            assert "could not be taken over" in error["error"]
            assert "left as it is" in error["hint"]
        assert all(child.alive for child in killed.children.values())


def test_an_upgrade_in_place(place: Path) -> None:
    """The same process, QEMU, passt and generation; and the children are still its own."""
    vm = quick_vm(place, "upgraded")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        before = read_record(run, "upgraded")
        for _ in range(3):
            done = qrapd("upgrade", "--runtime-dir", str(place / "run"), str(vm.path))
            assert (0, "") == (done.returncode, done.stderr)
            run.wait_for("vm.adopted")
        assert before == read_record(run, "upgraded")
        assert [] == run.stray
        os.kill(before["qemu"]["pid"], signal.SIGKILL)
        assert 1 == run.wait()
        assert 9 == run.last("vm.exited")["signal"]  # known of a child only
        run.assert_nothing_left()


def test_stop_of_a_supervised_vm(place: Path) -> None:
    """`qrapd stop` comes back when all is over."""
    vm = quick_vm(place, "stopped")
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        done = qrapd("stop", "--runtime-dir", str(place / "run"), str(vm.path))
        assert (0, 0) == (done.returncode, run.wait())
        run.assert_nothing_left()
        assert 0 == qrapd("stop", "--runtime-dir", str(place / "run"), str(vm.path)).returncode


def test_stop_of_a_vm_without_a_supervisor(place: Path) -> None:
    """What a crash has left is found and ended."""
    vm = quick_vm(place, "orphan")
    with ended(left_running(vm, place / "run")) as killed:
        done = qrapd("stop", "--runtime-dir", str(place / "run"), "--log-format", "json", str(vm.path))
        assert (0, True) == (done.returncode, "vm.exited" in done.stderr)
        killed.assert_nothing_left()


def test_as_another_user(place: Path, as_nobody: list[str]) -> None:
    """Without root, too, whatever the kernel lets one have of QEMU: a stream that cannot be regained is replaced."""
    home = place / "home"
    home.mkdir()
    home.chmod(0o777)
    vm = quick_vm(home, "unprivileged")
    with Run(vm.path, home / "run", prefix=as_nobody) as first:
        first.wait_for("vm.ready")
        kill(first)
        with Run(vm.path, home / "run", prefix=as_nobody) as run:
            run.wait_for("vm.adopted")
            assert 0 == run.stop()
            run.assert_nothing_left()


@pytest.mark.guest
@pytest.mark.link
@pytest.mark.timeout(300)
def test_twenty_kills_under_traffic(guest: GuestImage, place: Path) -> None:
    """The guest runs on and its web server answers all the while, for no passt is touched; no fd is leaked."""
    vm = write_vm(place, "traffic", guest=guest)
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                fetch(vm.ports[0], patience=0)
            except OSError as error:
                failures.append(repr(error))
            time.sleep(0.02)

    runs = [Run(vm.path, place / "run").__enter__()]
    try:
        runs[0].wait_for_line("guest: ready")
        before, record = fetch(vm.ports[0], "/cgi-bin/state"), read_record(runs[0], "traffic")
        fds = count_fds(record["qemu"]["pid"])
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(20):
                kill(runs[-1])
                runs.append(Run(vm.path, place / "run").__enter__())
                runs[-1].wait_for("vm.adopted")
        finally:
            over.set()
            asking.join()
        assert [] == failures
        after = read_record(runs[-1], "traffic")
        assert (record["qemu"], record["links"]) == (after["qemu"], after["links"])
        assert fds == count_fds(record["qemu"]["pid"])
        for key in ("boot_id", "carrier_changes", "mac"):
            assert value(before, key) == value(fetch(vm.ports[0], "/cgi-bin/state"), key)
        assert 0 == runs[-1].stop()
        runs[-1].assert_nothing_left()
    finally:
        for run in reversed(runs):
            run.__exit__()


def count_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def value(state: str, key: str) -> str:
    return next(line.partition("=")[2] for line in state.splitlines() if line.startswith(f"{key}="))
