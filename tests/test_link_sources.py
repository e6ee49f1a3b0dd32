# SPDX-License-Identifier: GPL-2.0-or-later
"""Links on passts that somebody else runs: one that ends is replaced as soon as there is another one."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import anyio
import pytest

from qrapd import probe
from qrapd.backoff import Backoff
from qrapd.guest import GuestImage
from qrapd.link import Link
from qrapd.plan import LinkPlan
from qrapd.qmp import Qmp
from qrapd.stream import HangUpWatch
from qrapd.surroundings import Surroundings
from qrapd.systemd import Notifier
from qrapd.unix_sockets import Kind, look_at
from support import PATIENCE, Run, fetch, free_port

pytestmark = pytest.mark.link


class Passts:
    """Passts that are not qrapd's, and a listener that is none."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.directory = place / "s"
        self.directory.mkdir()
        self.directory.chmod(0o1777)  # passt 2023-03 makes its socket after it has become nobody
        self.pattern = str(self.directory / "passt_{n}.socket")
        self.port = free_port()
        self._stack = stack

    def path(self, n: int) -> str:
        """The nth socket."""
        return self.pattern.format(n=n)

    def start(self, n: int, *options: str) -> subprocess.Popen[bytes]:
        """A passt in the foreground, without waiting until it listens."""
        passt = subprocess.Popen(
            ["passt", "--foreground", "--socket", self.path(n), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(end, passt)
        return passt

    def serve(self, n: int, *options: str) -> subprocess.Popen[bytes]:
        """A passt that forwards :attr:`port`: one at a time can."""
        return self.start(n, "--tcp-ports", f"127.0.0.1/{self.port}:80", *options)

    def start_elsewhere(self, n: int) -> subprocess.Popen[bytes]:
        """A passt that takes the nth name in one step, once it serves: it answers then, however busy the host is."""
        passt = self.start(0)
        self.wait_until_it_serves(passt, 0)
        Path(self.path(0)).rename(self.path(n))
        return passt

    def wait_until_it_serves(self, passt: subprocess.Popen[bytes], n: int) -> None:
        """It listens, and is through with its preparations, of which seccomp is the last (proc_pid_status(5))."""
        deadline = time.monotonic() + PATIENCE
        status = Path(f"/proc/{passt.pid}/status")
        while (
            look_at([self.path(n)])[0].kind is not Kind.LISTENING or "Seccomp:\t2" not in status.read_text()
        ):
            assert passt.poll() is None, "passt ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def listen_and_hang_up(self, n: int) -> None:
        """As a poisoned passt does."""
        Path(self.path(n)).unlink(missing_ok=True)
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self.path(n))
        Path(self.path(n)).chmod(0o777)
        listener.listen()

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(listener.shutdown, socket.SHUT_RDWR)

    def guest_state(self) -> dict[str, str]:
        """What the guest says by HTTP, through the passt that runs."""
        return dict(line.split("=", 1) for line in fetch(self.port, "/cgi-bin/state").splitlines())


@pytest.fixture
def passts(place: Path) -> Iterator[Passts]:
    """They and their sockets end with the test."""
    with ExitStack() as stack:
        yield Passts(place, stack)


def end(passt: subprocess.Popen[bytes]) -> None:
    """Kill it, and wait until its port is free again."""
    passt.kill()
    passt.wait()


def assert_undisturbed(before: dict[str, str], after: dict[str, str]) -> None:
    """The guest is the same one, has run on, and has not seen its cable move."""
    for key in ("boot_id", "carrier", "carrier_changes", "mac", "address"):
        assert before[key] == after[key]
    assert float(before["uptime"]) < float(after["uptime"])


@pytest.mark.guest
def test_a_path(guest: GuestImage, place: Path, passts: Passts) -> None:
    """Even a link that was given up is back once a passt listens again: only the new listener can have told it."""
    args = ["-machine", "q35", "-no-reboot", "-m", "128M"]
    args += ["-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", guest.command_line]
    file = place / "path.toml"
    file.write_text(
        f'[qemu]\nargs = {json.dumps(args)}\n[restart]\nlimit = 3\n[[link]]\nsource = "s/passt_1.socket"\n'
    )
    passt = passts.serve(1)
    passts.wait_until_it_serves(passt, 1)
    with Run(file, place / "run") as run:
        run.wait_for_line("guest: ready")
        state = passts.guest_state()
        for generation, options in ((2, []), (3, ["--one-off"]), (4, [])):
            end(passt)
            lost = run.wait_for("link.lost")
            assert (generation - 1, "hangup") == (lost["generation"], lost["reason"])
            failed = run.wait_for("link.failed", attempts=1)
            if generation == 2:
                assert failed["retry_in_ms"] > 0
                assert f"{passts.path(1)}: nobody listens" in failed["error"]
                assert failed["hint"]
            if failed["retry_in_ms"] is not None:
                run.wait_for("link.failed", retry_in_ms=None)
            passt = passts.serve(1, *options)
            restored = run.wait_for("link.restored")
            assert (generation, passt.pid) == (restored["generation"], restored["passt_pid"])
            assert passts.path(1) == restored["socket"]
            assert_undisturbed(state, state := passts.guest_state())
        assert 0 == run.stop()
        assert [] == [name for name in run.names() if name.startswith("passt.")]
        assert passt.poll() is None
        run.assert_nothing_left()


@pytest.mark.guest
def test_a_search(guest: GuestImage, place: Path, passts: Passts) -> None:
    """A wrapped guest finds another passt: not one that has a client, nor one that is poisoned, and both are named."""
    line = ["5", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-display", "none", "-m", "128M"]
    line += ["-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", guest.command_line]
    line += ["-netdev", "socket,fd=5,id=n0", "-device", "virtio-net-pci,netdev=n0"]
    passt, busy = passts.serve(1), passts.start(2)
    passts.wait_until_it_serves(passt, 1)
    passts.wait_until_it_serves(busy, 2)
    with (
        socket.socket(socket.AF_UNIX) as client,
        Run(None, place / "run", wrap=["--pattern", passts.pattern, *line]) as run,
    ):
        client.connect(passts.path(2))
        run.wait_for("vm.ready")
        state = passts.guest_state()

        end(passt)
        assert 1 == run.wait_for("link.lost")["generation"]
        assert f"{passts.path(2)}: busy (has a client)" in run.wait_for("link.failed")["error"]
        passt = passts.serve(3)
        restored = run.wait_for("link.restored")
        assert (2, passts.path(3), passt.pid) == tuple(
            restored[key] for key in ("generation", "socket", "passt_pid")
        )
        assert_undisturbed(state, state := passts.guest_state())

        passts.listen_and_hang_up(1)
        end(passt)
        assert 2 == run.wait_for("link.lost")["generation"]
        assert f"{passts.path(1)}: silent (hangs up at once" in run.wait_for("link.failed")["error"]
        passt = passts.serve(4, "--one-off")
        restored = run.wait_for("link.restored")
        assert (3, passts.path(4), passt.pid) == tuple(
            restored[key] for key in ("generation", "socket", "passt_pid")
        )
        assert_undisturbed(state, passts.guest_state())
        notices = [event["notice"] for event in run.events if event["event"] == "link.notice"]
        assert [] != [each for each in notices if each.startswith(f"{passts.path(1)}: passed over: ")]

        assert 0 == run.stop()
        assert 0 == passt.wait(PATIENCE)
        assert busy.poll() is None
        assert [] == [name for name in run.names() if name.startswith("passt.")]
        run.assert_nothing_left()


class NoQemu(Qmp):
    """A monitor without anybody behind it."""

    def __init__(self) -> None:
        """Nothing is connected to."""


class AnyStream:
    """A NIC that takes every stream."""

    number = 1

    def adopt(self, number: int, *, swapping: bool) -> None:
        """Nothing was there before."""

    async def swap(self, qmp: Qmp, stream: int) -> None:
        """Take it."""

    async def announce(self, qmp: Qmp) -> None:
        """Nobody is there to listen."""


class Seldom(Backoff):
    """An hour between two attempts: who tries earlier was called."""

    def fail(self, now: float) -> float:
        """Count it."""
        super().fail(now)
        return 3600.0


class Told:
    """The events of a link that has no VM."""

    def __init__(self) -> None:
        self._changed = anyio.Event()
        self._events: list[tuple[str, dict[str, object]]] = []

    def emit(self, event: str, /, **fields: object) -> None:
        """Keep it."""
        self._events.append((event, fields))
        self._changed.set()

    async def next(self, event: str) -> dict[str, object]:
        """The next one of this name, with a deadline; what comes before it is passed over."""
        with anyio.fail_after(PATIENCE):
            while True:
                while self._events:
                    name, fields = self._events.pop(0)
                    if name == event:
                        return fields
                self._changed = anyio.Event()
                await self._changed.wait()


@asynccontextmanager
async def link_without_vm(
    place: Path, source: str, pattern: str | None = None
) -> AsyncIterator[tuple[Link, Told]]:
    """A link that is up, and is released at the end."""
    told, hang_ups = Told(), HangUpWatch()
    around = Surroundings(
        directory=place,
        emit=told.emit,
        hang_ups=hang_ups,
        note_change=lambda: None,
        keeper=Notifier(None),
        is_ending=lambda: False,
        note_failed_start=lambda _: None,
    )
    link = Link(LinkPlan(0, source, "", 0, None, pattern=pattern), Seldom(5, 60.0), around)
    link._port = AnyStream()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hang_ups.run)
            await link.start(tasks)
            link.heal_with(NoQemu())
            yield link, told
            await link.release()
            tasks.cancel_scope.cancel()
    finally:
        hang_ups.close()


async def test_a_delay_is_cut_short(place: Path, passts: Passts, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is: what comes to listen is tried at once, again and again, until one will do."""
    monkeypatch.setattr(probe.claiming, "PATIENCE", 0.3)
    monkeypatch.setattr(probe.claiming, "_HANGS_UP_FOR", 0.0)
    passt = passts.start_elsewhere(1)
    async with link_without_vm(place, "probe", passts.pattern) as (link, told):
        for n in (2, 3, 1):
            end(passt)
            assert 3600_000 == (await told.next("link.failed"))["retry_in_ms"]
            passts.listen_and_hang_up(9)
            assert f"{passts.path(9)}: silent (hangs up" in str((await told.next("link.failed"))["error"])
            passt = passts.start_elsewhere(n)
            restored = await told.next("link.restored")
            assert (passt.pid, passts.path(n)) == (restored["passt_pid"], restored["socket"])
        assert 4 == link.generation


async def test_another_source_is_watched_from_then_on(place: Path, passts: Passts) -> None:
    """A file that is read again in the middle of an outage names another path."""
    passt = passts.start_elsewhere(1)
    async with link_without_vm(place, passts.path(1)) as (link, told):
        end(passt)
        await told.next("link.failed")
        assert link.reload(replace(link.plan, source=passts.path(2)))
        assert passts.path(2) in str((await told.next("link.failed"))["error"])
        passts.start_elsewhere(2)
        assert passts.path(2) == (await told.next("link.restored"))["socket"]


async def test_no_fd_for_a_search(place: Path, passts: Passts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a failed attempt like any other."""
    passt = passts.start_elsewhere(1)
    async with link_without_vm(place, passts.path(1)) as (_, told):

        def no_epoll() -> NoReturn:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(select, "epoll", no_epoll)
            end(passt)
            failed = await told.next("link.failed")
        assert "no passt could be looked for: Too many open files" == failed["error"]
        passts.start_elsewhere(1)
        await told.next("link.restored")
