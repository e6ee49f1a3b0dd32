# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwarded ports come and go while the VM runs: by pesto(1) where there is one, else by a swap."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from qrapd import binaries, connection, pesto
from qrapd.connection import Connection, acquire
from qrapd.errors import Unavailable
from qrapd.forwards import Ports, put
from qrapd.guest import GuestImage
from qrapd.passt import suggest
from qrapd.passt_options import read_help
from qrapd.pesto import Holder
from qrapd.plan import LinkPlan
from support import PATIENCE, Run, VmFile, fetch, free_port, open_directory, write_vm
from test_adoption import ended, kill
from test_link_traffic import Subject, assert_undisturbed, running

pytestmark = pytest.mark.link

PESTO, PASST = shutil.which("pesto"), shutil.which("passt")
LOW_PORT = 81
NONE: Ports = {"tcp": (), "udp": ()}


def has_pesto() -> bool:
    """Whether the passt that is installed listens to the pesto that is."""
    return PESTO is not None and PASST is not None and "conf-path" in read_help(binaries.passt_help(PASST))


HOW = "pesto" if has_pesto() else "swap"


@pytest.fixture
def needs_pesto() -> None:
    if not has_pesto():
        pytest.skip("needs a passt with --conf-path, and pesto(1)")


may_skip = pytest.mark.may_skip("needs a passt with --conf-path, and pesto(1), which Debian 12 and 13 lack")


# --- who has a port -----------------------------------------------------------------------------------


def test_who_has_a_port() -> None:
    """A look tells ports that are free from those that are taken, and leaves them as they were."""
    free = free_port()
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        udp.bind(("127.0.0.1", 0))
        taken, deaf = tcp.getsockname()[1], udp.getsockname()[1]
        ports: Ports = {
            "tcp": (f"127.0.0.1/{taken}:80", f"127.0.0.2/{taken}:80", f"{taken}:22", f"127.0.0.1/{free}:80"),
            "udp": (f"127.0.0.1/{deaf}",),
        }
        expected = {
            f"tcp 127.0.0.1/{taken}": Holder.SOMEBODY,
            f"tcp 127.0.0.2/{taken}": Holder.NOBODY,
            f"tcp {taken}": Holder.SOMEBODY,
            f"tcp 127.0.0.1/{free}": Holder.NOBODY,
            f"udp 127.0.0.1/{deaf}": Holder.SOMEBODY,
        }
        for _ in range(2):
            assert expected == pesto.look(ports)
        assert [name for name, who in expected.items() if who is Holder.SOMEBODY] == pesto.taken(ports, NONE)
        # What the link forwards now is its own passt's.
        now: Ports = {"tcp": (f"{taken}:80",), "udp": (f"{deaf}",)}
        assert [] == pesto.taken(ports, now)


def test_what_cannot_be_looked_at() -> None:
    """Of all ports, and of an address that this host lacks, nothing is known; of a range only so many are looked at."""
    assert {} == pesto.look({"tcp": ("all", "~22"), "udp": ()})
    assert [Holder.UNKNOWN] == [*pesto.look({"tcp": ("192.0.2.77/8080",), "udp": ()}).values()]
    assert pesto.MOST_PORTS == len(pesto.look({"tcp": ("127.0.0.1/20000-29999,~20001",), "udp": ()}))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("false", "ended with exit status 1 and said: nothing"),
        ("no-such-pesto", "cannot be run: No such file"),
    ],
)
async def test_a_pesto_that_fails(program: str, words: str) -> None:
    """It is told in words."""

    async def hear() -> list[str]:
        return []

    with pytest.raises(Unavailable, match=words):
        await pesto.change(program, "/nowhere/pesto0.sock", NONE, NONE, hear)


# --- pesto and passt, without a VM --------------------------------------------------------------------


@dataclass
class Told:
    """A passt that can be told of forwards."""

    connection: Connection
    events: list[tuple[str, dict[str, Any]]]

    async def change(self, ports: Ports, before: Ports) -> None:
        passt, path = self.connection.passt, self.connection.pesto_socket
        assert passt is not None
        count = passt.count
        await pesto.change(str(PESTO), str(path), ports, before, lambda: passt.hear_out(count))


@asynccontextmanager
async def passt_with(ports: Ports, place: Path, path: Path) -> AsyncIterator[Told]:
    events: list[tuple[str, dict[str, Any]]] = []
    plan = LinkPlan(0, "managed", "52:54:00:00:00:01", 0, None, put((str(PASST),), ports), pesto=PESTO)

    def emit(event: str, /, **fields: Any) -> None:
        events.append((event, fields))

    async with anyio.create_task_group() as tasks:
        acquired = await acquire(plan, place, emit, tasks, pesto_socket=path)
        try:
            yield Told(acquired, events)
        finally:
            await acquired.see_off(kill=True)


@may_skip
@pytest.mark.usefixtures("needs_pesto")
async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """pesto ends with 0 all the same; passt's words are found, and what it had is had again, to the last port."""
    first, second, third = free_port(), free_port(), free_port()
    before: Ports = {
        "tcp": (f"127.0.0.1/{first}:80", f"127.0.0.1/{second}:81"),
        "udp": (f"127.0.0.1/{third}",),
    }
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        async with passt_with(before, tmp_path, tmp_path / "p.sock") as told:
            wanted: Ports = {"tcp": (f"127.0.0.1/{first}:80", f"127.0.0.1/{taken}:81"), "udp": ()}
            with pytest.raises(pesto.Refused, match=rf"{taken}.*Address already in use") as caught:
                await told.change(wanted, before)
            assert caught.value.undone
            assert {Holder.SOMEBODY} == {*pesto.look(before).values()}
            # And it can be told again, all of it and nothing at all.
            await told.change(NONE, before)
            assert {Holder.NOBODY} == {*pesto.look(before).values()}
            await told.change(before, NONE)
            assert {Holder.SOMEBODY} == {*pesto.look(before).values()}


@may_skip
@pytest.mark.usefixtures("needs_pesto")
async def test_a_passt_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pesto would wait for ever, and is ended; so does no process stay."""
    monkeypatch.setattr(pesto, "TIMEOUT", 0.3)
    async with passt_with(NONE, tmp_path, tmp_path / "p.sock") as told:
        assert told.connection.pid is not None
        os.kill(told.connection.pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match=r"did not end within 0\.3 s"):
            await told.change({"tcp": (f"127.0.0.1/{free_port()}:80",), "udp": ()}, NONE)


@may_skip
@pytest.mark.usefixtures("needs_pesto")
async def test_a_place_where_passt_may_have_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by AppArmor's profile: it comes up without, once that is known at once, and that is told once."""
    monkeypatch.setattr(connection, "_deaf", set())
    for expected in (["passt.started", "passt.exited", "link.notice", "passt.started"], ["passt.started"]):
        async with passt_with(NONE, tmp_path, tmp_path / "none" / "p.sock") as told:
            assert told.connection.pesto_socket is None
            assert expected == [event for event, _ in told.events if event != "passt.output"]
            notices = [fields["notice"] for event, fields in told.events if event == "link.notice"]
            assert all("may not listen for pesto(1)" in notice for notice in notices)


@may_skip
@pytest.mark.usefixtures("needs_pesto")
async def test_a_socket_that_was_left(tmp_path: Path) -> None:
    """The next passt takes its place, even if the one before still has it."""
    path = tmp_path / "p.sock"
    port = free_port()
    async with passt_with(NONE, tmp_path, path), passt_with(NONE, tmp_path, path) as told:
        assert told.connection.pesto_socket == path
        await told.change({"tcp": (f"127.0.0.1/{port}:80",), "udp": ()}, NONE)
    assert path.is_socket()
    async with passt_with(NONE, tmp_path, path) as told:
        await told.change({"tcp": (f"127.0.0.1/{port}:80",), "udp": ()}, NONE)


# --- a VM ---------------------------------------------------------------------------------------------


def forward(base: Path, how: str, name: str, *ports: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qrapd", "forward", how, name, *ports]
    command += ["--runtime-dir", str(base), *(["--json"] if how == "list" else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def listed(base: Path, name: str) -> list[str]:
    """What the first link forwards, as TCP."""
    done = forward(base, "list", name)
    assert 0 == done.returncode, done.stderr
    return [*json.loads(done.stdout)[0]["tcp"]]


def is_refused(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def stage(guest: GuestImage) -> Iterator[Subject]:
    with open_directory() as place:
        vm = write_vm(place, "ports", guest=guest)
        with running(vm, place / "run") as subject:
            yield subject


@pytest.fixture
def subject(stage: Subject) -> Iterator[Subject]:
    """The VM, undisturbed by whatever a test does."""
    before, qemu = stage.state(), stage.qemu_pid
    yield stage
    assert_undisturbed(before, stage.state())
    assert qemu == stage.qemu_pid


@pytest.mark.guest
@pytest.mark.xdist_group("pesto")
def test_ports_come_and_go(subject: Subject) -> None:
    """What is added leads into the guest, what is removed is refused; and it is said how that was done."""
    base, old, new = subject.run.base, subject.vm.ports[0], free_port()
    spec, first = f"127.0.0.1/{new}:80", f"127.0.0.1/{old}:80"
    done = forward(base, "add", "ports", spec)
    assert 0 == done.returncode, done.stderr
    words = {"pesto": "passt was told (pesto)", "swap": "by a swap"}[HOW]
    assert f"ports: link 0 forwards tcp {first}, {spec} ({words}" in done.stdout
    assert [first, spec] == subject.run.wait_for("link.forwards", by=HOW)["tcp"]
    assert "boot_id" in fetch(new, "/cgi-bin/state")
    assert [first, spec] == listed(base, "ports")
    passt = subject.passt_pids

    done = forward(base, "add", "ports", spec)  # once more
    assert (0, True) == (done.returncode, "there was nothing to do" in done.stdout), done.stderr
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        done = forward(base, "add", "ports", f"127.0.0.1/{taken}:80")
    assert done.returncode
    assert f"somebody has it already: tcp 127.0.0.1/{taken}" in done.stderr
    done = forward(base, "remove", "ports", "1:1")
    assert done.returncode
    assert f"it forwards {first}, {spec}" in done.stderr
    done = forward(base, "add", "ports", f"127.0.0.1/{new}:81")
    assert done.returncode  # two at one port
    assert passt == subject.passt_pids

    done = forward(base, "remove", "ports", spec)
    assert 0 == done.returncode, done.stderr
    subject.run.wait_for("link.forwards", by=HOW, tcp=[first])
    assert is_refused(new)
    assert [first] == listed(base, "ports")


@may_skip
@pytest.mark.usefixtures("needs_pesto")
@pytest.mark.guest
@pytest.mark.xdist_group("pesto")
def test_pesto_interrupts_nothing(subject: Subject) -> None:
    """The same passt serves on, and a connection that is there goes on: half of a request is sent before a change."""
    base, old, new = subject.run.base, subject.vm.ports[0], free_port()
    passt, names = subject.passt_pids, subject.run.names()
    fetch(old)
    with socket.create_connection(("127.0.0.1", old), timeout=PATIENCE) as caller:
        caller.sendall(b"GET /cgi-bin/state HTTP/1.0\r\n")
        for how in ("add", "remove"):
            done = forward(base, how, "ports", f"127.0.0.1/{new}:80")
            assert (0, True) == (done.returncode, "passt was told (pesto)" in done.stdout), done.stderr
            if how == "add":
                assert "boot_id" in fetch(new, "/cgi-bin/state")
        assert is_refused(new)
        caller.sendall(b"\r\n")
        answer = b"".join(iter(lambda: caller.recv(65536), b""))
    assert b"boot_id" in answer
    assert passt == subject.passt_pids
    assert ["link.forwards"] * 2 == subject.run.names()[len(names) :]


@pytest.mark.guest
@pytest.mark.xdist_group("pesto")
def test_the_next_passt_forwards_them_too(subject: Subject) -> None:
    """As well as one after a reload of a file in which other things have changed."""
    base, new = subject.run.base, free_port()
    spec = f"127.0.0.1/{new}:80"
    assert 0 == forward(base, "add", "ports", spec).returncode
    subject.run.wait_for("link.forwards")
    subject.kill(0)
    assert "boot_id" in fetch(new, "/cgi-bin/state")
    text = subject.vm.path.read_text()
    for changed in (text.replace("[link.passt]", "stall_timeout = 6\n[link.passt]"), text):
        subject.vm.path.write_text(changed)
        subject.run.process.send_signal(signal.SIGHUP)
        assert [] == subject.run.wait_for("vm.reloaded")["links"]
    assert "boot_id" in fetch(new, "/cgi-bin/state")
    assert 0 == forward(base, "remove", "ports", spec).returncode
    subject.run.wait_for("link.forwards")


def idle(place: Path, name: str, links: int = 1) -> VmFile:
    """A VM with nothing to boot."""
    return write_vm(place, name, qemu="powerdown_timeout = 0", links=links)


def test_they_outlive_the_supervisor(place: Path) -> None:
    """The next one finds them, and swaps for nothing; they hold until the file has other ports."""
    vm, base, new, other = idle(place, "kept"), place / "run", free_port(), free_port()
    spec, first = f"127.0.0.1/{new}:80", f"127.0.0.1/{vm.ports[0]}:80"
    with ended(Run(vm.path, base).__enter__()) as killed:
        killed.wait_for("vm.ready")
        done = forward(base, "add", "kept", spec)
        assert 0 == done.returncode, done.stderr
        killed.wait_for("link.forwards", by=HOW)
        passt = killed.last("passt.started")["pid"]
        kill(killed)
        with Run(vm.path, base) as run:
            run.wait_for("vm.adopted", passt_pids=[passt])
            assert [first, spec] == listed(base, "kept")
            assert not is_refused(new)
            run.process.send_signal(signal.SIGHUP)
            assert ([], []) == (
                (told := run.wait_for("vm.reloaded"))["links"],
                told["applied"],
            )
            assert ["vm.adopted", "vm.reloaded"] == run.names()
            assert 0 == forward(base, "remove", "kept", first).returncode
            run.wait_for("link.forwards", by=HOW, tcp=[spec])
            assert [spec] == listed(base, "kept")
            assert is_refused(vm.ports[0])

            vm.path.write_text(vm.path.read_text().replace(first, f"127.0.0.1/{other}:80"))
            run.process.send_signal(signal.SIGHUP)
            assert ([0], ["link[0].passt.tcp_ports"]) == (
                (told := run.wait_for("vm.reloaded"))["links"],
                told["applied"],
            )
            run.wait_for("link.forwards", by="swap", tcp=[f"127.0.0.1/{other}:80"])
            assert [f"127.0.0.1/{other}:80"] == listed(base, "kept")
            assert is_refused(new)
            assert 0 == run.stop()
            run.assert_nothing_left()
        killed.assert_nothing_left()


def test_a_file_that_has_changed_meanwhile(place: Path) -> None:
    """While there was no supervisor: its ports hold."""
    vm, base, new, other = idle(place, "meanwhile"), place / "run", free_port(), free_port()
    with ended(Run(vm.path, base).__enter__()) as killed:
        killed.wait_for("vm.ready")
        assert 0 == forward(base, "add", "meanwhile", f"127.0.0.1/{new}:80").returncode
        killed.wait_for("link.forwards")
        kill(killed)
        vm.path.write_text(vm.path.read_text().replace(str(vm.ports[0]), str(other)))
        with Run(vm.path, base) as run:
            run.wait_for("link.forwards", by="swap", tcp=[f"127.0.0.1/{other}:80"])
            assert [f"127.0.0.1/{other}:80"] == listed(base, "meanwhile")
            assert is_refused(new)
            assert 0 == run.stop()
            run.assert_nothing_left()


def test_they_end_with_the_vm(place: Path) -> None:
    """A start anew goes by the file."""
    vm, base, new = idle(place, "ends"), place / "run", free_port()
    with Run(vm.path, base) as run:
        run.wait_for("vm.ready")
        assert 0 == forward(base, "add", "ends", f"127.0.0.1/{new}:80").returncode
        run.wait_for("link.forwards")
        command = [sys.executable, "-m", "qrapd", "restart", "ends", "--runtime-dir", str(base)]
        assert 0 == subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode
        assert [f"127.0.0.1/{vm.ports[0]}:80"] == listed(base, "ends")
        assert is_refused(new)
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_two_links(place: Path) -> None:
    """Only the one that is meant is touched; the other's ports cannot be had, those that were added neither."""
    vm, base, new = idle(place, "two", links=2), place / "run", free_port()
    with Run(vm.path, base) as run:
        run.wait_for("vm.ready")
        assert 0 == forward(base, "add", "two", f"127.0.0.1/{new}:80", "--link", "1").returncode
        assert 1 == run.wait_for("link.forwards", by=HOW)["link"]
        for port in (new, vm.ports[1]):
            assert forward(base, "add", "two", f"127.0.0.1/{port}:80", "--link", "0").returncode
        assert [] == [event for event in run.events if event["event"] == "link.lost" and event["link"] == 0]
        assert 0 == run.stop()
        run.assert_nothing_left()


@may_skip
@pytest.mark.usefixtures("needs_pesto")
def test_the_plan_shows_it(tmp_path: Path) -> None:
    """Where passt is to listen; but not for a link of another mode."""
    shown = []
    for link in ("", "mode = 'vhost-user'"):
        vm = write_vm(tmp_path, "plan", link_lines=link)
        command = [sys.executable, "-m", "qrapd", "plan", "--json", str(vm.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert 0 == done.returncode, done.stderr
        argv = json.loads(done.stdout)["links"][0]["passt"]
        shown.append([argv[at + 1] for at, word in enumerate(argv) if word == "--conf-path"])
    assert [["LINK0_PESTO_SOCKET"], []] == shown


def test_what_to_do_about_a_port_that_is_denied() -> None:
    """The port is found beside its address."""
    words = "Listen failed for HOST TCP port 127.0.0.1/81: Permission denied"
    hint = suggest(words, unprivileged=True, first_free_port=1024)
    assert hint is not None
    assert "ip_unprivileged_port_start=81" in hint


@may_skip
@pytest.mark.usefixtures("needs_pesto")
def test_a_port_that_passt_may_not_have(place: Path) -> None:
    """Root may, and passt of root's not: nothing is changed, and its words are told."""
    if os.geteuid() or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= LOW_PORT:
        pytest.skip("nobody is denied that port here")
    vm, base = idle(place, "low"), place / "run"
    with Run(vm.path, base) as run:
        run.wait_for("vm.ready")
        done = forward(base, "add", "low", f"127.0.0.1/{LOW_PORT}:80")
        assert done.returncode
        assert f"127.0.0.1/{LOW_PORT}: Permission denied" in done.stderr
        assert f"ip_unprivileged_port_start={LOW_PORT}" in done.stderr
        assert [f"127.0.0.1/{vm.ports[0]}:80"] == listed(base, "low")
        assert not is_refused(vm.ports[0])
        assert {"link.lost", "link.forwards"}.isdisjoint(run.names())
        assert 0 == run.stop()
        run.assert_nothing_left()


@may_skip
@pytest.mark.usefixtures("needs_pesto")
def test_a_passt_that_does_not_listen_is_swapped(place: Path) -> None:
    """By pesto if it can be, else by a swap: its socket is gone, or nobody answers there."""
    vm, base = idle(place, "deaf"), place / "run"
    with Run(vm.path, base) as run:
        run.wait_for("vm.ready")
        path = base / "deaf" / "pesto0.sock"
        for notices in (0, 1):
            path.unlink()
            if notices:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
            done = forward(base, "add", "deaf", f"127.0.0.1/{free_port()}:80")
            assert (0, True) == (done.returncode, "by a swap" in done.stdout), done.stderr
            run.wait_for("link.forwards", by="swap")
            assert notices == len([event for event in run.events if event["event"] == "link.notice"])
        done = forward(base, "add", "deaf", f"127.0.0.1/{free_port()}:80")
        assert (0, True) == (done.returncode, "(pesto)" in done.stdout), done.stderr
        assert 0 == run.stop()
        run.assert_nothing_left()
