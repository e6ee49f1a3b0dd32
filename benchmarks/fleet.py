# SPDX-License-Identifier: GPL-2.0-or-later
"""Many VMs on one host: their files, who supervises them, and their end, of which nothing is left whatever happens.

A few have the booted guest. The others are machines that run and do nothing: QEMU's smallest, with a firmware that
halts the processor, so that it is supervised, and costs its supervisor, as much as a guest that is idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import RunFailed, children, guest_arguments

from qrapd.guest import GuestImage

__all__ = ["Fleet", "Member", "Supervision", "agent", "clean_host", "side_by_side", "timeout"]

SMALLEST = ("-machine", "microvm,rtc=off,pit=off,pic=off", "-m", "2M", "-nodefaults")
"""Starts fastest under TCG, in 25 ms, where pc takes 33 and q35 37. Without its timers a halted one takes no
CPU at all, with them 2 ms per second (QEMU 7.2, measured)."""

SMALLEST_NIC = "virtio-net-device"
"""It has no PCI."""

FIRMWARE_SIZE = 64 * 1024
"""Bytes. QEMU wants a multiple of these, and the processor begins 16 before the end."""

FIRST_PORT = 10_000
"""Of the VMs' ports: below, somebody may want one for a service."""

HALT = b"\xfa\xf4\xeb\xfd"
"""cli; again: hlt; jmp again"""

_PR_SET_CHILD_SUBREAPER = 36
"""Linux' prctl.h, prctl(2)."""

_OUTPUT = (b'"guest.console"', b'"passt.output"', b'"qemu.output"')

_VM_FILE = """\
autostart = true
[qemu]
args = {args}
accel = "{accel}"
powerdown_timeout = {powerdown_timeout}

[[link]]
{device}
[link.passt]
tcp_ports = ["127.0.0.1/{port}:80"]
"""


def timeout(vms: int) -> float:
    """Seconds for so many VMs to do anything: each takes some 0.15 s of CPU to start, a guest some 3 s, a run 0.3."""
    return 60.0 + 2.0 * vms


@dataclass(frozen=True)
class Member:
    """One VM."""

    name: str
    port: int
    """of 127.0.0.1; leads to the guest's HTTP, where there is a guest"""
    booted: bool
    """whether it has one"""


class Fleet:
    """VMs that are not written yet, and the directories for them.

    :param booted: so many of ``size`` have a guest, spread evenly.
    """

    def __init__(self, directory: Path, guest: GuestImage, size: int, booted: int) -> None:
        self.directory = directory
        self.files = directory / "vms"
        self.base = directory / "run"
        self.files.mkdir()
        self._guest = guest
        self._firmware = directory / "halt.bin"
        self._firmware.write_bytes(HALT.ljust(16, b"\0").rjust(FIRMWARE_SIZE, b"\0"))
        chosen = {number * size // booted for number in range(booted)}
        self.members = [
            Member(f"vm{number:03}", port, number in chosen) for number, port in enumerate(_free_ports(size))
        ]

    @property
    def guests(self) -> list[Member]:
        """Those with a guest."""
        return [member for member in self.members if member.booted]

    def file(self, member: Member) -> Path:
        """Where its file is, or would be."""
        return self.files / f"{member.name}.toml"

    def write(self, members: Sequence[Member]) -> None:
        """Make their files."""
        for member in members:
            args = (
                guest_arguments(self._guest) if member.booted else [*SMALLEST, "-bios", str(self._firmware)]
            )
            text = _VM_FILE.format(
                args=json.dumps(args),  # a JSON string is a TOML string, too
                accel="auto" if member.booted else "tcg",  # KVM would like more of a machine
                powerdown_timeout=30 if member.booted else 1,
                device="" if member.booted else f'device = "{SMALLEST_NIC}"',
                port=member.port,
            )
            self.file(member).write_text(text)

    def remove(self, members: Sequence[Member]) -> None:
        """Take their files away."""
        for member in members:
            self.file(member).unlink()


def _free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody has at the moment, all different.

    Not of those that the kernel hands out (ip(7), ip_local_port_range): among so many, some soon have another owner.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = random.sample(range(FIRST_PORT, first), first - FIRST_PORT)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# --- who supervises them ------------------------------------------------------------------------------


class Supervision:
    """One supervisor or several, and what they tell, read as it comes."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.events: list[dict[str, Any]] = []
        """without what guests and children say; ``at`` is the moment of each, by the host's clock"""
        self.ready: dict[str, float] = {}
        """the VMs that run, and since when"""
        self._changed = threading.Condition()
        read_end, self._write_end = os.pipe()
        threading.Thread(target=self._read, args=(read_end,), daemon=True).start()

    def start(self, fleet: Fleet, environment: Mapping[str, str], *words: str) -> float:
        """Run ``qrapd`` with these words; returns when that was."""
        script = Path(sys.executable).with_name("qrapd")
        options = ["--runtime-dir", str(fleet.base), "--log-format", "json"]
        began = time.time()
        self.processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *words, *options],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._write_end,
                start_new_session=True,
            )
        )
        return began

    @property
    def pid(self) -> int:
        """Of the last one that was started."""
        return self.processes[-1].pid

    def close(self) -> None:
        """Read no more, once those that write have ended."""
        os.close(self._write_end)

    def wait_for(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        """Wait until what was told makes ``done`` true.

        :raise RunFailed: it does not within so many seconds, or a supervisor has ended.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while not done():
                self._changed.wait(0.5)
                ended = [each.returncode for each in self.processes if each.poll() is not None]
                if ended or time.monotonic() > deadline:
                    why = f"ended with {ended[0]}" if ended else f"not within {seconds:g} s"
                    wrong = [each for each in self.events if each["level"] in {"error", "warning"}]
                    raise RunFailed(f"{what}: {why}; {len(self.ready)} VMs are ready; {wrong[-3:]}")

    def first(self, event: str, since: int = 0) -> dict[str, Any] | None:
        """The first of these events, from that place in :attr:`events` on."""
        return next((each for each in self.events[since:] if each["event"] == event), None)

    def _read(self, fd: int) -> None:
        # Lines of several processes do not mix: each is written at once, and shorter than PIPE_BUF.
        with os.fdopen(fd, "rb") as lines:
            for line in lines:
                if any(each in line for each in _OUTPUT):
                    continue
                with contextlib.suppress(ValueError):
                    self._note(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        event["at"] = datetime.datetime.fromisoformat(event["timestamp"]).timestamp()
        with self._changed:
            self.events.append(event)
            if event["event"] in {"vm.ready", "vm.adopted"}:
                self.ready[event["vm"]] = event["at"]
            elif event["event"] == "vm.exited":
                self.ready.pop(event["vm"], None)
            self._changed.notify_all()


@contextlib.contextmanager
def agent(fleet: Fleet, environment: Mapping[str, str]) -> Iterator[tuple[Supervision, float]]:
    """A running ``qrapd agent``, and when it was started; at the end all that it has started is gone."""
    supervision = Supervision()
    with _ended(supervision):
        yield (
            supervision,
            supervision.start(fleet, environment, "agent", "--config-dir", str(fleet.directory)),
        )


@contextlib.contextmanager
def side_by_side(
    fleet: Fleet, members: Sequence[Member], environment: Mapping[str, str], at_once: int
) -> Iterator[tuple[Supervision, float]]:
    """A ``qrapd run`` for each, of which ``at_once`` are on their way up at the same time."""
    supervision = Supervision()
    with _ended(supervision):
        began = 0.0
        for number, member in enumerate(members):
            supervision.wait_for(
                "qrapd run", partial(_are_up, supervision, number - at_once), timeout(at_once)
            )
            at = supervision.start(fleet, environment, "run", str(fleet.file(member)))
            began = began or at
        yield supervision, began


def _are_up(supervision: Supervision, count: int) -> bool:
    return len(supervision.ready) > count


@contextlib.contextmanager
def _ended(supervision: Supervision) -> Iterator[None]:
    try:
        yield
    finally:
        end_descendants()
        for process in supervision.processes:
            process.wait()
        supervision.close()


# --- nothing is left ------------------------------------------------------------------------------------


@contextlib.contextmanager
def clean_host() -> Iterator[None]:
    """What is started within does not outlive it. Orphans become children of this process, by which they are found."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise RunFailed("this kernel gives no orphans to their grandparents (PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        end_descendants()


def end_descendants() -> None:
    """Kill all that comes from this process: supervisors first, who would put a new passt in a dead one's place."""
    while generation := children(os.getpid()):
        for pid in generation:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in generation:
            # Its children come to us now; who waits for a Popen finds that it is gone.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
