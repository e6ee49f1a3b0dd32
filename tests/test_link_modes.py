# SPDX-License-Identifier: GPL-2.0-or-later
"""``mode = "vhost-user"`` and ``mode = "native"`` with real parts, where these are new enough."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qrapd import binaries
from qrapd.guest import GuestImage
from qrapd.passt_options import read_help
from support import Run, VmFile, fetch, free_port, write_vm

pytestmark = pytest.mark.link

KILLS = 5

QEMU = f"qemu-system-{binaries.host_architecture()}"


def _can_vhost_user() -> bool:
    if not (shutil.which(QEMU) and shutil.which("passt")):
        return False
    return binaries.qemu_version(QEMU) >= (10, 0, 0) and "vhost-user" in read_help(
        binaries.passt_help("passt")
    )


def _can_native() -> bool:
    return shutil.which(QEMU) is not None and "passt" in binaries.qemu_netdevs(QEMU)


VHOST_USER = _can_vhost_user()
NATIVE = _can_native()


def open_files(pid: int) -> int:
    """How many a process has."""
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def state(port: int) -> dict[str, str]:
    """What the guest says of itself and of the NIC by which it is asked."""
    lines = fetch(port, "/cgi-bin/state").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_what_the_installed_parts_can_do_is_what_check_says(place: Path) -> None:
    """A mode that they cannot have is refused in words, with their versions, and with status 78."""
    for mode, possible in (("vhost-user", VHOST_USER), ("native", NATIVE)):
        vm = write_vm(place, mode, link_lines=f"mode = '{mode}'")
        argv = [sys.executable, "-m", "qrapd", "check", str(vm.path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        if possible:
            assert 0 == done.returncode, done.stderr
            continue
        assert 78 == done.returncode, done.stderr
        assert f"link[0].mode: needs {'QEMU 10.0' if mode == 'vhost-user' else 'a QEMU'}" in done.stderr
        version = ".".join(map(str, binaries.qemu_version(QEMU)))
        assert f"here are QEMU {version}" in done.stderr
        assert "use mode = 'swap', the default" in done.stderr


# --- vhost-user ---------------------------------------------------------------------------------------


@pytest.mark.guest
@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
def test_vhost_user_outlives_its_passt(guest: GuestImage, place: Path) -> None:
    """Killed again and again, it is replaced; the guest runs on, sees its link go and come, and keeps its MAC."""
    vm = write_vm(place, "shared", guest=guest, link_lines="mode = 'vhost-user'")
    with Run(vm.path, place / "run") as run:
        passt = run.wait_for("link.connected", generation=1)["passt_pid"]
        ready = run.wait_for("vm.ready")
        qemu = ready["qemu_pid"]
        run.wait_for_line("guest: ready")
        first = before = state(vm.ports[0])
        fds = open_files(qemu)
        for generation in range(2, KILLS + 2):
            os.kill(passt, signal.SIGKILL)
            run.wait_for("link.lost", reason="exited", generation=generation - 1)
            passt = run.wait_for("link.restored", generation=generation)["passt_pid"]
            now = state(vm.ports[0])
            assert float(now["uptime"]) > float(before["uptime"])
            assert (first["mac"], first["boot_id"]) == (now["mac"], now["boot_id"])
            before = now
        assert int(before["carrier_changes"]) >= int(first["carrier_changes"]) + 2 * KILLS
        assert fds == open_files(qemu)
        assert not (place / "run" / "shared" / "link0.sock").exists()
        assert 0 == run.stop()
        assert "link.failed" not in run.names()
        run.assert_nothing_left()


@pytest.mark.guest
@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
def test_vhost_user_replaces_a_passt_that_is_stopped(guest: GuestImage, place: Path) -> None:
    """QEMU would wait for its answers for ever, with all of its monitor."""
    vm = write_vm(place, "shared", guest=guest, link_lines="mode = 'vhost-user'\nstall_timeout = 1")
    with Run(vm.path, place / "run") as run:
        passt = run.wait_for("link.connected")["passt_pid"]
        run.wait_for_line("guest: ready")
        os.kill(passt, signal.SIGSTOP)
        run.wait_for("link.lost", reason="stalled")
        run.wait_for("link.restored", generation=2)
        assert "Hello from" in fetch(vm.ports[0])
        assert 0 == run.stop()
        run.assert_nothing_left()


@pytest.mark.guest
@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
def test_vhost_user_comes_back_when_passt_can_run_again(guest: GuestImage, place: Path) -> None:
    """A program that is away for a while is tried again, and QEMU's monitor answers all the time."""
    program = place / "passt"
    shutil.copy(str(shutil.which("passt")), program)
    vm = write_vm(place, "shared", guest=guest, link_lines=f"mode = 'vhost-user'\npasst_binary = '{program}'")
    with Run(vm.path, place / "run") as run:
        passt = run.wait_for("link.connected")["passt_pid"]
        run.wait_for_line("guest: ready")
        program.rename(place / "away")
        os.kill(passt, signal.SIGKILL)
        run.wait_for("link.failed", attempts=1)
        (place / "away").rename(program)
        run.wait_for("link.restored", generation=2)
        assert "Hello from" in fetch(vm.ports[0])
        assert 0 == run.stop()
        run.assert_nothing_left()


@pytest.mark.guest
@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
def test_vhost_user_takes_another_passt_for_a_changed_file(guest: GuestImage, place: Path) -> None:
    """The passt that is there is hung up on, from both ends in turn, and the new one has the new forward."""
    vm = write_vm(place, "shared", guest=guest, link_lines="mode = 'vhost-user'")
    with Run(vm.path, place / "run") as run:
        run.wait_for("link.connected")
        run.wait_for_line("guest: ready")
        port = vm.ports[0]
        for generation in (2, 3):
            new = free_port()
            vm.path.write_text(vm.path.read_text().replace(str(port), str(new)))
            port = new
            run.process.send_signal(signal.SIGHUP)
            run.wait_for("link.lost", reason="requested")
            run.wait_for("link.restored", generation=generation)
            assert "Hello from" in fetch(port)
        assert 0 == run.stop()
        run.assert_nothing_left()


@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
def test_vhost_user_ends_before_there_is_a_qemu_when_a_port_is_taken(place: Path) -> None:
    """The first passt shows it, though QEMU will have another one."""
    vm = write_vm(place, "shared", link_lines="mode = 'vhost-user'")
    with (
        socket.create_server(("127.0.0.1", vm.ports[0])),
        Run(vm.path, place / "run") as run,
    ):
        assert 69 == run.wait()
        assert "vm.started" not in run.names()
        run.assert_nothing_left()


@pytest.mark.skipif(not VHOST_USER, reason="needs QEMU 10.0 and a passt with --vhost-user")
@pytest.mark.may_skip("needs QEMU 10.0 and a passt with --vhost-user, which Debian 12 lacks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_vhost_user_leaves_nothing_when_qemu_ends(place: Path, number: signal.Signals) -> None:
    """Neither a passt nor the socket on which QEMU was waited for."""
    vm = write_vm(place, "shared", link_lines="mode = 'vhost-user'")
    with Run(vm.path, place / "run") as run:
        qemu = run.wait_for("vm.ready")["qemu_pid"]
        os.kill(qemu, number)
        run.wait()
        assert "link.restored" not in run.names()
        run.assert_nothing_left()


# --- native -------------------------------------------------------------------------------------------

STARTS = 6

HANGING = 15.0
"""Seconds after which a start is taken to hang; others take less than two."""

AT_ONCE = "powerdown_timeout = 0"
"""For [qemu], where there is no guest that would power down."""


@contextmanager
def native_run(vm: VmFile, base: Path) -> Iterator[tuple[Run, int]]:
    """A VM with a native link, and the pid of its passt.

    QEMU 11.1 hangs at some of such starts (qrapd.native): then it is started again.
    """
    for _ in range(STARTS):
        with Run(vm.path, base) as run:
            deadline = time.monotonic() + HANGING
            while time.monotonic() < deadline and "link.connected" not in run.names():
                time.sleep(0.05)
            if "link.connected" in run.names():
                yield run, run.last("link.connected")["passt_pid"]
                return
    pytest.skip(f"QEMU hung at {STARTS} starts with -netdev passt")


@pytest.mark.guest
@pytest.mark.skipif(not NATIVE, reason="needs a QEMU with -netdev passt")
@pytest.mark.may_skip("needs a QEMU with -netdev passt, which Debian 12 and 13 lack")
def test_native_is_watched_and_told_of(guest: GuestImage, place: Path) -> None:
    """QEMU restarts its passt; each loss and each return is an event, and generations count."""
    vm = write_vm(place, "native", guest=guest, link_lines="mode = 'native'")
    with native_run(vm, place / "run") as (run, passt):
        run.wait_for_line("guest: ready")
        first = before = state(vm.ports[0])
        for generation in range(2, KILLS + 2):
            os.kill(passt, signal.SIGKILL)
            run.wait_for("link.lost", reason="exited")
            passt = run.wait_for("link.restored", generation=generation)["passt_pid"]
            now = state(vm.ports[0])
            assert float(now["uptime"]) > float(before["uptime"])
            assert (first["mac"], first["boot_id"]) == (now["mac"], now["boot_id"])
            before = now
        assert 0 == run.stop()
        assert KILLS == run.names().count("link.lost")
        run.assert_nothing_left()


@pytest.mark.skipif(not NATIVE, reason="needs a QEMU with -netdev passt")
@pytest.mark.may_skip("needs a QEMU with -netdev passt, which Debian 12 and 13 lack")
def test_native_without_another_passt_is_told_of_once(place: Path) -> None:
    """QEMU tries once; the VM runs on without a network, and that is said."""
    program = place / "passt"
    shutil.copy(str(shutil.which("passt")), program)
    vm = write_vm(place, "native", qemu=AT_ONCE, link_lines=f"mode = 'native'\npasst_binary = '{program}'")
    with native_run(vm, place / "run") as (run, passt):
        program.unlink()
        os.kill(passt, signal.SIGKILL)
        run.wait_for("link.lost")
        failed = run.wait_for("link.failed")
        assert (None, 1) == (failed.get("retry_in_ms"), failed["attempts"])
        assert "restart the VM" in failed["hint"]
        assert run.process.poll() is None
        run.stop()
        run.assert_nothing_left()


@pytest.mark.skipif(not NATIVE, reason="needs a QEMU with -netdev passt")
@pytest.mark.may_skip("needs a QEMU with -netdev passt, which Debian 12 and 13 lack")
def test_native_hands_all_options_to_passt(place: Path) -> None:
    """Those that QEMU has a name for, and those that it has none for."""
    vm = write_vm(
        place,
        "native",
        qemu=AT_ONCE,
        link_lines="mode = 'native'",
        passt_lines="mtu = 1400\nno_map_gw = true",
    )
    with native_run(vm, place / "run") as (run, passt):
        argv = Path(f"/proc/{passt}/cmdline").read_text().split("\0")
        assert {"--mtu", "1400", "--no-map-gw", "--tcp-ports"} <= set(argv)
        run.stop()
        run.assert_nothing_left()


def test_the_plan_names_what_is_left_to_qemu(place: Path) -> None:
    """`qrapd plan` shows the line that will run, in each mode that there is here."""
    for mode in [mode for mode, possible in (("vhost-user", VHOST_USER), ("native", NATIVE)) if possible]:
        vm = write_vm(place, mode, link_lines=f"mode = '{mode}'")
        argv = [sys.executable, "-m", "qrapd", "plan", "--json", str(vm.path)]
        told = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
        netdev = "vhost-user,id=link0-nic" if mode == "vhost-user" else '"type": "passt"'
        assert any(netdev in argument for argument in told["qemu"])
