# SPDX-License-Identifier: GPL-2.0-or-later
"""qrapd may go, the VM stays: killed, upgraded, stopped from elsewhere; and what the next one finds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qrapd import binaries
from qrapd.guest import GuestImage
from support import NOBODY, PATIENCE, Run, VmFile, fetch, free_port, write_vm


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


WITHOUT_FDS = """
import errno, sys
from qrapd.__main__ import main
from {module} import {cls}
sys.argv.pop(0)
known, calls = {cls}.{name}, []
def refused(*arguments, **options):
    calls.append(None)
    if len(calls) == {call}:
        raise OSError(errno.EMFILE, "Too many open files")
    return known(*arguments, **options)
{cls}.{name} = refused
main()
"""
"""A qrapd to which the host gives no more fds once, at a certain point."""


@pytest.mark.parametrize(
    ("module", "cls", "name", "call"),
    [
        ("qrapd.left_behind", "Process", "adopt", 1),
        ("qrapd.left_behind", "Left", "take_link", 2),
        ("qrapd.qemu", "Qemu", "listen", 1),
        ("qrapd.link", "Connection", "adopt", 1),
        ("qrapd.link", "Connection", "adopt", 2),
        ("qrapd.link", "Connection", "watch", 2),
        ("qrapd.qmp", "Qmp", "connect", 1),
    ],
)
def test_no_more_fds_in_an_adoption(place: Path, module: str, cls: str, name: str, call: int) -> None:
    """All is left as it is, the record, too, and the next one takes it over."""
    vm = write_vm(place, "short", links=2, qemu="powerdown_timeout = 0")
    with ended(left_running(vm, place / "run")) as killed:
        before = read_record(killed, "short")
        program = WITHOUT_FDS.format(module=module, cls=cls, name=name, call=call)
        with Run(vm.path, place / "run", prefix=[sys.executable, "-c", program]) as run:
            assert 75 == run.wait()
            assert "Too many open files" in run.last("run.failed")["error"]
        assert all(child.alive for child in killed.children.values())
        assert before["links"] == read_record(killed, "short")["links"]
        with Run(vm.path, place / "run") as run:
            run.wait_for("vm.adopted", links=2, generations=[1, 1])
            assert ["vm.adopted"] == run.names()
            assert 0 == run.stop()
            run.assert_nothing_left()
        killed.assert_nothing_left()


def test_a_stop_where_the_monitor_is_gone(place: Path) -> None:
    """What cannot be reached is left alone, and that is told: the one who stops it is not to wait for ever."""
    vm = quick_vm(place, "unreachable")
    with ended(left_running(vm, place / "run")) as killed:
        (place / "run/unreachable/qmp.sock").unlink()
        done = qrapd("stop", "--runtime-dir", str(place / "run"), "--log-format", "json", str(vm.path))
        assert 75 == done.returncode
        assert "could not be taken over" in done.stderr
        assert all(child.alive for child in killed.children.values())


@pytest.mark.timeout(300)
def test_a_low_limit_of_fds(place: Path) -> None:
    """Wherever a supervisor runs out of them while it takes a VM over, that runs on, and the next one has it."""
    vm = write_vm(place, "low", links=2, qemu="powerdown_timeout = 0")
    with ended(left_running(vm, place / "run")) as killed:
        qemu = killed.children[killed.last("vm.started")["qemu_pid"]]
        for limit in range(8, 22):
            prefix = ["prlimit", f"--nofile={limit}", sys.executable, "-m"]
            with ended(Run(vm.path, place / "run", prefix=prefix).__enter__()) as run:
                until = time.monotonic() + PATIENCE
                while run.process.poll() is None and "vm.adopted" not in run.names():
                    assert time.monotonic() < until
                    time.sleep(0.02)
                kill(run)
            assert qemu.alive, (limit, run.events, run.stray)
        with Run(vm.path, place / "run") as run:
            run.wait_for("vm.adopted", links=2, qemu_pid=qemu.pid)
            assert 0 == run.stop()


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


def test_output_after_an_upgrade(place: Path) -> None:
    """What QEMU and passt write goes on being heard."""
    passt = place / "passt"
    passt.write_text(
        f"""#!/bin/sh
case "$*" in *--fd*) while kill -0 $$; do echo "still here"; sleep 0.1; done & esac
exec {shutil.which("passt")} "$@"
"""
    )
    passt.chmod(0o755)
    vm = write_vm(place, "heard", qemu="powerdown_timeout = 0", link_lines=f'passt_binary = "{passt}"')
    with Run(vm.path, place / "run") as run:
        run.wait_for("vm.ready")
        for _ in range(2):
            assert 0 == qrapd("upgrade", "--runtime-dir", str(place / "run"), str(vm.path)).returncode
            qemu = run.wait_for("vm.adopted")["qemu_pid"]
            run.wait_for("passt.output", line="still here")
        os.kill(qemu, signal.SIGTERM)
        assert "terminating on signal" in run.wait_for("qemu.output")["line"]
        run.wait()
        run.assert_nothing_left()


def test_options_that_changed_meanwhile(place: Path) -> None:
    """They come in as at a reload; what has not changed is left alone."""
    vm = write_vm(place, "changed", links=2, qemu="powerdown_timeout = 0")
    with ended(left_running(vm, place / "run")) as killed:
        before = read_record(killed, "changed")["links"]
        port = free_port()
        vm.path.write_text(vm.path.read_text().replace(str(vm.ports[1]), str(port)))
        with Run(vm.path, place / "run") as run:
            assert "has changed" in run.wait_for("link.notice", link=1)["notice"]
            run.wait_for("link.lost", link=1, reason="requested")
            run.wait_for("link.restored", link=1, generation=2)
            after = read_record(run, "changed")["links"]
            assert before[0] == after[0]
            assert f"127.0.0.1/{port}:80" in after[1]["argv"]
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_options_that_changed_and_do_not_work(place: Path) -> None:
    """The guest keeps the network that it had."""
    vm = quick_vm(place, "taken")
    with ended(left_running(vm, place / "run")) as killed, socket.create_server(("127.0.0.1", 0)) as rival:
        before = read_record(killed, "taken")["links"][0]
        port = rival.getsockname()[1]
        vm.path.write_text(vm.path.read_text().replace(str(vm.ports[0]), str(port)))
        with Run(vm.path, place / "run") as run:
            assert "has changed" in run.wait_for("link.notice")["notice"]
            assert "the old ones stay" in run.wait_for("link.notice")["notice"]
            run.wait_for("link.restored", generation=2)
            assert before["argv"] == read_record(run, "taken")["links"][0]["argv"]
            assert 0 == run.stop()
            run.assert_nothing_left()


@pytest.mark.parametrize("links", [1, 3])
def test_nics_that_the_file_no_longer_has(place: Path, links: int) -> None:
    """Or has now: the machine goes on with those that it has, until it is started again."""
    vm = write_vm(place, "other", links=2, qemu="powerdown_timeout = 0")
    with ended(left_running(vm, place / "run")) as killed:
        before, original = read_record(killed, "other"), vm.path.read_text()
        text, _, second = vm.path.read_text().rpartition("[[link]]")
        if links == 3:
            text += f"[[link]]{second}[[link]]{second.replace(str(vm.ports[1]), str(free_port()))}"
        vm.path.write_text(text)
        with Run(vm.path, place / "run") as run:
            assert "restart of the VM" in run.wait_for("link.notice", link=min(links, 2))["notice"]
            run.wait_for("vm.adopted", links=2, generations=[1, 1])
            assert before["links"] == read_record(run, "other")["links"]
            os.kill(killed.last("link.connected")["passt_pid"], signal.SIGKILL)
            run.wait_for("link.restored", generation=2)
            # A reload says what is still so, and no more; which table is which NIC is not for it to guess.
            vm.path.write_text(text.replace(str(vm.ports[0]), str(free_port())).replace("-no-reboot", "-S"))
            run.process.send_signal(signal.SIGHUP)
            run.wait_for("vm.reloaded", links=[], applied=[], needs_restart=["qemu.args", "link"])
            vm.path.write_text(original)
            run.process.send_signal(signal.SIGHUP)
            run.wait_for("vm.reloaded", links=[], applied=[], needs_restart=[])
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_a_mac_that_changed_meanwhile(place: Path) -> None:
    """The guest keeps the one that it has; each reload says that the file has another, until it has not."""
    vm = write_vm(place, "other", links=2, qemu="powerdown_timeout = 0")
    with ended(left_running(vm, place / "run")):
        original = vm.path.read_text()
        vm.path.write_text(original.replace("[[link]]", "[[link]]\nmac = '52:54:00:00:00:77'", 1))
        with Run(vm.path, place / "run") as run:
            assert "restart of the VM" in run.wait_for("link.notice", link=0)["notice"]
            run.wait_for("vm.adopted")
            for _ in range(2):
                run.process.send_signal(signal.SIGHUP)
                run.wait_for("vm.reloaded", links=[], applied=[], needs_restart=["link[0].mac"])
            vm.path.write_text(original.replace(str(vm.ports[1]), str(free_port())))
            run.process.send_signal(signal.SIGHUP)
            run.wait_for("vm.reloaded", links=[1], applied=["link[1].passt.tcp_ports"], needs_restart=[])
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_a_record_without_argv(place: Path) -> None:
    """As an earlier qrapd has written it: it is adopted as it is."""
    vm = quick_vm(place, "earlier")
    with ended(left_running(vm, place / "run")) as killed:
        record = read_record(killed, "earlier")
        for link in record["links"]:
            del link["argv"], link["mac"]
        (place / "run/earlier/record.json").write_text(json.dumps(record))
        with Run(vm.path, place / "run") as run:
            run.wait_for("vm.adopted")
            assert ["vm.adopted"] == run.names()
            assert 0 == run.stop()


def hidden(*then: str) -> list[str]:
    """What to put before Python: a /proc that hides from all but root's group what may not be traced."""
    mount = "mount -t proc -o hidepid=invisible proc /proc"
    script = f'{mount} && exec setpriv --regid {NOBODY} --clear-groups "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *then]


@pytest.fixture
def in_a_user_namespace() -> list[str]:
    """A /proc that hides passt, and a QEMU of another qrapd's, too: each qrapd has a user namespace of its own."""
    command = hidden("unshare", "--user", "--map-root-user")
    if os.geteuid() != 0 or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("mount and user namespaces are refused here")
    return [*command, sys.executable, "-m"]


def test_where_proc_hides_passt(place: Path, as_nobody: list[str]) -> None:
    """A passt that cannot be told from others is not touched; with its stream it is seen off all the same."""
    home = place / "home"
    home.mkdir()
    home.chmod(0o777)
    vm = quick_vm(home, "hidden")
    prefix = [*hidden(), *as_nobody]
    with ended(Run(vm.path, home / "run", prefix=prefix).__enter__()) as killed:
        killed.wait_for("vm.ready")
        kill(killed)
        with Run(vm.path, home / "run", prefix=prefix) as run:
            assert run.wait_for("vm.adopted")["qemu_pid"] == killed.last("vm.started")["qemu_pid"]
            run.wait_for("link.lost", reason="requested")
            run.wait_for("link.restored", generation=2)
            assert 0 == run.stop()
            run.assert_nothing_left()
        killed.assert_nothing_left()


def test_where_proc_hides_qemu(place: Path, in_a_user_namespace: list[str]) -> None:
    """Its monitor's greeting tells who it is: it is taken over, and no second one is started."""
    vm = quick_vm(place, "unseen")
    with ended(Run(vm.path, place / "run", prefix=in_a_user_namespace).__enter__()) as killed:
        killed.wait_for("vm.ready")
        kill(killed)
        with Run(vm.path, place / "run", prefix=in_a_user_namespace) as run:
            assert run.wait_for("vm.adopted")["qemu_pid"] == killed.last("vm.started")["qemu_pid"]
            assert 0 == run.stop()
            assert "vm.started" not in run.names()
            run.assert_nothing_left()
        killed.assert_nothing_left()


def test_a_hidden_qemu_that_cannot_be_told(place: Path, in_a_user_namespace: list[str]) -> None:
    """It may be ours: nothing is started beside it, and nothing is ended."""
    vm = quick_vm(place, "doubtful")
    with ended(Run(vm.path, place / "run", prefix=in_a_user_namespace).__enter__()) as killed:
        killed.wait_for("vm.ready")
        kill(killed)
        (place / "run/doubtful/qmp.sock").unlink()
        with Run(vm.path, place / "run", prefix=in_a_user_namespace) as run:
            assert 75 == run.wait()
            assert "still runs" in run.last("run.failed")["error"]
            assert f"ps -fp {killed.last('vm.started')['qemu_pid']}" in run.last("run.failed")["hint"]
        assert all(child.alive for child in killed.children.values())
        assert (place / "run/doubtful/record.json").exists()


def test_a_hidden_process_that_is_not_qemu(place: Path, in_a_user_namespace: list[str]) -> None:
    """Nobody listens on the monitor's socket that is there: QEMU has ended, and its pid is another's by now."""
    vm = quick_vm(place, "reused")
    with ended(Run(vm.path, place / "run", prefix=in_a_user_namespace).__enter__()) as killed:
        killed.wait_for("vm.ready")
        kill(killed)
        record = read_record(killed, "reused")
        os.kill(record["qemu"]["pid"], signal.SIGKILL)
        record["qemu"]["pid"] = os.getpid()  # hidden, and no QEMU
        (place / "run/reused/record.json").write_text(json.dumps(record))
        with Run(vm.path, place / "run", prefix=in_a_user_namespace) as run:
            run.wait_for("vm.exited", reason="killed")
            run.wait_for("vm.ready")
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_a_qemu_that_the_record_does_not_know(place: Path) -> None:
    """Another one than the record's answers on the monitor: nothing is started beside it."""
    vm = quick_vm(place, "behind")
    with ended(left_running(vm, place / "run")) as killed:
        record = read_record(killed, "behind")
        record["qemu"]["start_time"] += 1
        (place / "run/behind/record.json").write_text(json.dumps(record))
        with Run(vm.path, place / "run") as run:
            assert 75 == run.wait()
            assert "another one" in run.last("run.failed")["error"]
        assert all(child.alive for child in killed.children.values())


def _modes_here() -> set[str]:
    """The modes beside swap that the installed parts can have."""
    name = f"qemu-system-{binaries.host_architecture()}"
    if not (shutil.which(name) and shutil.which("passt")):
        return set()
    modes = {"native"} if "passt" in binaries.qemu_netdevs(name) else set()
    if binaries.qemu_version(name) >= (10, 0, 0) and "vhost-user" in binaries.passt_help("passt"):
        modes.add("vhost-user")
    return modes


@pytest.mark.link
@pytest.mark.guest
@pytest.mark.may_skip("needs newer parts than Debian 12 has")
@pytest.mark.parametrize("mode", ["vhost-user", "native"])
def test_other_modes(guest: GuestImage, place: Path, mode: str) -> None:
    """They are taken over as they are, by another process and by an upgraded one, and a lost passt is noticed."""
    if mode not in _modes_here():
        pytest.skip(f"the installed QEMU and passt cannot have mode {mode!r}")
    vm = write_vm(place, "mode", guest=guest, link_lines=f"mode = '{mode}'", qemu="powerdown_timeout = 5")
    with ended(Run(vm.path, place / "run").__enter__()) as killed, ExitStack() as stack:
        killed.wait_for_line("guest: ready")
        passt = killed.last("link.connected")["passt_pid"]
        kill(killed)
        run = stack.enter_context(Run(vm.path, place / "run"))
        run.wait_for("vm.adopted", generations=[1])
        assert 0 == qrapd("upgrade", "--runtime-dir", str(place / "run"), str(vm.path)).returncode
        run.wait_for("vm.adopted", generations=[1])
        assert passt == read_record(run, "mode")["links"][0]["passt"]["pid"]
        fetch(vm.ports[0])
        os.kill(passt, signal.SIGKILL)
        run.wait_for("link.lost", reason="exited")
        run.wait_for("link.restored", generation=2)
        fetch(vm.ports[0])
        run.stop()
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
