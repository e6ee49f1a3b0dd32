# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs on passts that are there already: ``qrapd wrap``, and links whose source is a socket."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qrapd.guest import GuestImage
from support import PATIENCE, Run, fetch, free_port


@contextmanager
def running_passt(path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A passt in the foreground that listens on ``path``."""
    passt = subprocess.Popen(
        ["passt", "--foreground", "--socket", str(path), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert passt.poll() is None, "passt ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield passt
    finally:
        passt.kill()
        passt.wait()


@pytest.fixture
def sockets(place: Path) -> Path:
    """A directory where passt can bind its socket also after it has become nobody."""
    (place / "s").mkdir()
    (place / "s").chmod(0o1777)
    return place / "s"


def explicit(*more: str, seconds: str = "0") -> list[str]:
    """A command line for wrap with a NIC that takes the stream from fd 5, and no machine to boot."""
    machine = ["-machine", "q35", "-accel", "tcg", "-m", "32M", "-display", "none"]
    network = ["-netdev", "socket,fd=5,id=n0", "-device", "virtio-net-pci,netdev=n0"]
    return ["--powerdown-timeout", seconds, "5", "qemu-system-x86_64", *machine, *network, *more]


@pytest.mark.guest
def test_a_wrapped_guest(guest: GuestImage, place: Path, sockets: Path) -> None:
    """A qrap command line boots, answers through its passt, powers down on SIGTERM, and passt lives on."""
    port = free_port()
    kernel = ["-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)]
    boot = [*kernel, "-append", guest.command_line, "-m", "128M", "-name", "guest=Old VM"]
    arguments = ["--pattern", f"{sockets}/passt_{{n}}.socket", *explicit(*boot, seconds="30")]
    with (
        running_passt(sockets / "passt_2.socket", "--tcp-ports", f"127.0.0.1/{port}:80") as passt,
        Run(None, place / "run", wrap=arguments) as run,
    ):
        connected = run.wait_for("link.connected")
        assert (passt.pid, str(sockets / "passt_2.socket")) == (connected["passt_pid"], connected["socket"])
        run.wait_for("vm.ready")
        assert "Hello from" in fetch(port)
        assert 0 == run.stop()
        assert ["power-down"] == [e["how"] for e in run.events if e["event"] == "vm.stopping"]
        assert {"old-vm"} == {e["vm"] for e in run.events}
        run.assert_nothing_left()
        assert passt.poll() is None


def test_several_at_once_get_one_each(place: Path, sockets: Path) -> None:
    """Four wraps that start together, four passts, two of them one-off: none is lost, none is shared."""
    pattern = f"{sockets}/passt_{{n}}.socket"
    with (
        running_passt(sockets / "passt_1.socket"),
        running_passt(sockets / "passt_2.socket", "--one-off"),
        running_passt(sockets / "passt_3.socket"),
        running_passt(sockets / "passt_4.socket", "--one-off"),
    ):
        names = ["a", "b", "c", "d"]
        runs = [
            Run(None, place / "run", wrap=["--pattern", pattern, *explicit("-name", name)]) for name in names
        ]
        with runs[0], runs[1], runs[2], runs[3]:
            taken = [run.wait_for("link.connected")["socket"] for run in runs]
            assert [f"{sockets}/passt_{n}.socket" for n in range(1, 5)] == sorted(taken)
            for run in runs:
                run.wait_for("vm.ready")
            assert [0] * 4 == [run.stop() for run in runs]
            runs[0].assert_nothing_left()


def test_what_the_caller_passes_in_reaches_qemu(place: Path, sockets: Path) -> None:
    """Under the number that the command line names, as with qrap; what is not passed in does not."""
    with (
        tempfile.TemporaryFile() as disk,
        tempfile.TemporaryFile() as secret,
        running_passt(sockets / "passt_1.socket"),
    ):
        os.set_inheritable(secret.fileno(), False)
        arguments = ["--pattern", f"{sockets}/passt_{{n}}.socket", *explicit()]
        with Run(None, place / "run", wrap=arguments, pass_fds=[disk.fileno()]) as run:
            qemu = run.wait_for("vm.started")["qemu_pid"]
            run.wait_for("vm.ready")
            seen = {
                (entry.stat().st_dev, entry.stat().st_ino) for entry in Path(f"/proc/{qemu}/fd").iterdir()
            }
            passed = Path(f"/proc/{qemu}/fd/{disk.fileno()}").stat()
            assert os.fstat(disk.fileno()).st_ino == passed.st_ino
            assert (os.fstat(secret.fileno()).st_dev, os.fstat(secret.fileno()).st_ino) not in seen
            assert 0 == run.stop()


def test_wrap_without_a_passt(place: Path, sockets: Path) -> None:
    """The status says that something is not available, QEMU is not started, and a way out is named."""
    arguments = ["--pattern", f"{sockets}/passt_{{n}}.socket", *explicit()]
    with Run(None, place / "run", wrap=arguments) as run:
        assert 69 == run.wait()
        assert run.last("run.failed")["hint"]
        assert "vm.started" not in run.names()
        run.assert_nothing_left()


def test_wrap_of_a_command_line_without_the_stream(place: Path) -> None:
    """Nothing takes fd 5: that is a mistake in the command line, told before any passt is asked."""
    with Run(None, place / "run", wrap=["5", "qemu-system-x86_64", "-M", "q35", "-hda", "x"]) as run:
        assert 2 == run.wait()
        assert run.last("run.failed")["hint"]
        run.assert_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "what is to be run is missing"),
        (["5", "no-such-qemu", "-m", "1G"], "no-such-qemu is no program in a directory of PATH"),
        (["5", "/usr/bin/qemu-system-x86_64", "-m", "1G"], "/usr/bin/qemu-system-x86_64 is no program"),
        (["--pattern", "", "5", "qemu-system-x86_64"], "is empty"),
    ],
)
def test_a_wrong_command_line(place: Path, arguments: list[str], words: str) -> None:
    """The mistakes that a newcomer makes: status 2, and what is meant instead; no passt is asked."""
    with Run(None, place / "run", wrap=arguments, options=["--log-format", "console"]) as run:
        assert 2 == run.wait()
        assert any(words in line for line in run.stray), run.stray
        assert not any("Traceback" in line for line in run.stray)
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_link_on_a_socket(guest: GuestImage, place: Path, sockets: Path) -> None:
    """`source` names a socket: the guest has its network, and a passt that dies is told as a hang-up."""
    port = free_port()
    kernel = f'"-kernel", "{guest.kernel}", "-initrd", "{guest.initramfs}", "-append", "{guest.command_line}"'
    file = place / "there.toml"
    file.write_text(
        f'[qemu]\nargs = ["-machine", "q35", "-m", "128M", {kernel}]\n[[link]]\nsource = "s/passt.socket"\n'
    )
    with (
        running_passt(sockets / "passt.socket", "--tcp-ports", f"127.0.0.1/{port}:80") as passt,
        Run(file, place / "run") as run,
    ):
        run.wait_for_line("guest: ready")
        assert "Hello from" in fetch(port)
        passt.send_signal(signal.SIGKILL)
        assert "hangup" == run.wait_for("link.lost")["reason"]
        assert 0 == run.stop()
        run.assert_nothing_left()
