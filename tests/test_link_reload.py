# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's file that is read again while the VM runs: what can be applied is, and nothing else is touched."""

from __future__ import annotations

import http.client
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrapd.guest import GuestImage
from support import fetch, free_port, open_directory, write_vm
from test_link_traffic import Subject, assert_undisturbed, running

pytestmark = [pytest.mark.link, pytest.mark.guest, pytest.mark.xdist_group("link-reload")]


@pytest.fixture(scope="module")
def stage(guest: GuestImage) -> Iterator[tuple[Subject, str]]:
    """A VM with two links, whose passt is a copy of its own that can be upgraded, and the text of its file."""
    with open_directory() as place:
        shutil.copy(shutil.which("passt") or "passt", place / "passt")
        vm = write_vm(place, "reload", guest=guest, links=2, link_lines=f'passt_binary = "{place}/passt"')
        with running(vm, place / "run") as subject:
            yield subject, vm.path.read_text()


@pytest.fixture
def subject(stage: tuple[Subject, str]) -> Iterator[Subject]:
    """The VM; the file is as it was at first, and so is the guest afterwards."""
    subject, text = stage
    before, qemu = subject.state(1), subject.qemu_pid
    yield subject
    assert_undisturbed(before, subject.state(1))
    assert qemu == subject.qemu_pid
    if subject.vm.path.read_text() != text:
        subject.vm.path.write_text(text)
        reload(subject)


def reload(subject: Subject) -> dict[str, object]:
    """Have the file read again, and wait until all is as it says."""
    subject.run.process.send_signal(signal.SIGHUP)
    told = subject.run.wait_for("vm.reloaded")
    for _ in told["links"]:  # in whatever order
        restored = subject.run.wait_for("link.restored")
        link = restored["link"]
        assert link in told["links"]
        subject.generations[link] += 1
        assert subject.generations[link] == restored["generation"]
        subject.passt_pids[link] = restored["passt_pid"]
    return told


def edit(subject: Subject, old: str, new: str) -> None:
    """Change the first place of the file that has these words."""
    text = subject.vm.path.read_text()
    assert old in text
    subject.vm.path.write_text(text.replace(old, new, 1))


def test_another_port(subject: Subject) -> None:
    """The link concerned gets another passt, and the other link keeps its own."""
    old, new, pids = subject.vm.ports[0], free_port(), list(subject.passt_pids)
    edit(subject, f"127.0.0.1/{old}:80", f"127.0.0.1/{new}:80")
    told = reload(subject)
    assert ([0], ["link[0].passt.tcp_ports"], []) == (told["links"], told["applied"], told["needs_restart"])
    assert "requested" == subject.run.last("link.lost")["reason"]
    assert "boot_id" in fetch(new, "/cgi-bin/state")
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection("127.0.0.1", old, timeout=5).request("GET", "/")
    assert pids[0] != subject.passt_pids[0]
    assert pids[1] == subject.passt_pids[1]


def test_nothing_changed(subject: Subject) -> None:
    """No link is touched."""
    told = reload(subject)
    assert ([], [], []) == (told["links"], told["applied"], told["needs_restart"])


def test_what_needs_a_restart_is_named(subject: Subject) -> None:
    """And the rest is applied all the same."""
    edit(subject, "128M", "129M")
    edit(subject, "[qemu]", "[qemu]\nquit_timeout = 6")
    told = reload(subject)
    assert ([], ["qemu.quit_timeout"], ["qemu.args"]) == (
        told["links"],
        told["applied"],
        told["needs_restart"],
    )
    told = reload(subject)
    assert ([], ["qemu.args"]) == (told["applied"], told["needs_restart"])  # still


def test_a_file_with_errors(subject: Subject) -> None:
    """Each is told, and all stays as it is."""
    edit(subject, "tcp_ports", "tcp_prts")
    subject.run.process.send_signal(signal.SIGHUP)
    assert "tcp_prts" in subject.run.wait_for("config.invalid")["problem"]
    subject.run.wait_for("vm.reload_refused")
    fetch(subject.vm.ports[0])


def test_options_by_which_no_passt_comes_up(subject: Subject) -> None:
    """The old ones are gone back to: a slip of the pen does not cost the guest its network."""
    edit(subject, "[link.passt]", '[link.passt]\ninterface = "nonexistent0"')
    subject.run.process.send_signal(signal.SIGHUP)
    assert "the old ones stay" in subject.run.wait_for("link.notice")["notice"]
    subject.passt_pids[0] = subject.run.wait_for("link.restored", link=0)["passt_pid"]
    subject.generations[0] += 1
    fetch(subject.vm.ports[0])
    assert "link.failed" not in subject.run.names()


def test_two_changes_in_a_row(subject: Subject) -> None:
    """The second comes before the first has served, and does not work: what has served is gone back to."""
    edit(subject, "[link.passt]", "[link.passt]\nno_ra = true")
    subject.run.process.send_signal(signal.SIGHUP)
    subject.run.wait_for("vm.reloaded", links=[0])
    edit(subject, "no_ra = true", 'interface = "nonexistent0"')
    subject.run.process.send_signal(signal.SIGHUP)
    assert "the old ones stay" in subject.run.wait_for("link.notice")["notice"]
    restored = subject.run.wait_for("link.restored", link=0)
    subject.passt_pids[0], subject.generations[0] = restored["passt_pid"], restored["generation"]
    fetch(subject.vm.ports[0])
    assert "link.failed" not in subject.run.names()


def test_another_number_of_links(subject: Subject) -> None:
    """Which table is which card is not guessed: nothing is touched."""
    pids = list(subject.passt_pids)
    rest, _, second = subject.vm.path.read_text().split("[[link]]")
    subject.vm.path.write_text(f"{rest}[[link]]{second}")
    told = reload(subject)
    assert ([], ["link"]) == (told["links"], told["needs_restart"])
    for port in subject.vm.ports:
        fetch(port)
    assert pids == subject.passt_pids


def test_an_upgraded_passt(subject: Subject) -> None:
    """Another file in the program's place, as by a package manager: both links get the new one."""
    program = subject.vm.path.parent / "passt"
    shutil.copy(program, program.with_suffix(".new"))
    program.with_suffix(".new").replace(program)
    told = reload(subject)
    assert ([0, 1], []) == (told["links"], told["applied"])


def test_the_command(subject: Subject) -> None:
    """`qrapd reload` finds the supervisor by the runtime directory, and refuses a file with errors before that."""
    command = [sys.executable, "-m", "qrapd", "reload", "--runtime-dir", str(subject.run.base)]
    done = subprocess.run([*command, str(subject.vm.path)], capture_output=True, text=True, timeout=60)
    assert (0, "") == (done.returncode, done.stderr)
    assert f"pid {subject.run.process.pid}" in done.stdout
    subject.run.wait_for("vm.reloaded")
    edit(subject, "tcp_ports", "tcp_prts")
    done = subprocess.run([*command, str(subject.vm.path)], capture_output=True, text=True, timeout=60)
    assert (78, True) == (done.returncode, "tcp_prts" in done.stderr)


def test_the_command_without_a_vm(place: Path) -> None:
    """What is to be done is said."""
    vm = write_vm(place, "idle")
    command = [sys.executable, "-m", "qrapd", "reload", "--runtime-dir", str(place), str(vm.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (69, True, True) == (
        done.returncode,
        "no VM idle runs" in done.stderr,
        "--runtime-dir" in done.stderr,
    )
