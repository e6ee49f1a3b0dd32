# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest on each kind of network: qrapd's modes, and what a person would write instead of qrapd, as a shell script.

Every contender has the same guest and a port of its own. Its passt has its defaults, or what qrapd gives it. One
that is there is a process group, and leaves nothing behind.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from common import LOG, RunFailed, free_port, guest_arguments, log_end, open_directory, qrapd_run
from guest_pages import STATIC
from http_client import HttpClient

from qrapd import binaries, plan, vm_files
from qrapd.errors import ConfigurationError
from qrapd.guest import GuestImage
from qrapd.plan import Plan

__all__ = [
    "Contender",
    "DirectAlike",
    "DirectStream",
    "DirectVhostUser",
    "Native",
    "Parts",
    "Slirp",
    "StreamLoop",
    "Swap",
    "VhostUser",
    "VmEnded",
    "find_passts",
]

BOOT_TIMEOUT = 60.0
"""Seconds for the first answer: 2 to 5 on an idle machine without KVM (measured)."""

BOOTS = 5
"""After so many that failed, the run has: QEMU 11.1 with -netdev passt sometimes boots without a network (seen)."""

END_TIMEOUT = 30.0
"""Seconds for qrapd to end its VM."""

LEASE = b"guest: lease"
"""On the guest's console; from then on passt knows the guest. An earlier connection may kill a passt of 2025-05."""

SETTLE_TIMEOUT = 15.0
"""Seconds after an answer within which the network must be steady again."""

STEADY = 3
"""So many answers in a row count as steady."""

RECONNECT_MS = 10
"""Of QEMU's own reconnection: often, so that it is not what the rivals wait for."""

_VM_FILE = """\
name = "outage-{mode}"
[qemu]
args = {args}

[[link]]
mode = "{mode}"
stall_timeout = {stall_timeout}
[link.passt]
tcp_ports = ["127.0.0.1/{port}:80"]
"""


@dataclass(frozen=True)
class Parts:
    """What all contenders are made of."""

    guest: GuestImage
    environment: Mapping[str, str]
    """for qrapd: its modules are compiled once"""
    stall_timeout: float
    """seconds"""

    @cached_property
    def qemu(self) -> str:
        """The program that qrapd would take."""
        return binaries.find_binary(f"qemu-system-{binaries.host_architecture()}")

    @cached_property
    def passt(self) -> str:
        """The program that qrapd would take."""
        return binaries.find_binary("passt")

    @cached_property
    def qemu_name(self) -> str:
        """``QEMU 7.2``, for a person."""
        return "QEMU " + ".".join(str(each) for each in binaries.qemu_version(self.qemu)[:2])

    @cached_property
    def stream_options(self) -> str:
        """What QEMU's help says of ``-netdev stream``."""
        said = binaries.ask(self.qemu, "-help").output
        return "".join(line for line in said.splitlines() if line.startswith("-netdev stream"))

    def vm_file(self, directory: Path, mode: str, port: int) -> Path:
        """A VM's file for qrapd."""
        file = directory / "vm.toml"
        args = json.dumps(
            guest_arguments(self.guest, "guest.control=1")
        )  # a JSON string is a TOML string, too
        file.write_text(_VM_FILE.format(mode=mode, args=args, port=port, stall_timeout=self.stall_timeout))
        return file


class VmEnded(RunFailed):
    """The VM has ended by itself."""


# --- every contender ----------------------------------------------------------------------------------


class Contender(abc.ABC):
    """One way to run the guest. ``with`` starts it, :meth:`restart` does so again if its network is gone for good."""

    key: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.port = 0
        self.restarts = 0
        self.failed_boots = 0
        self._stack = contextlib.ExitStack()

    @abc.abstractmethod
    def lacking(self) -> str | None:
        """Why this host cannot do it; None if it can."""

    @abc.abstractmethod
    def _command(self) -> list[str]:
        """What is run, in ``self.directory``."""

    @abc.abstractmethod
    def _console(self) -> Path:
        """Where the guest's console can be read."""

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """End it; what it leaves is killed with its process group."""
        child.kill()

    def __enter__(self) -> Contender:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Boot the guest and wait until it answers steadily."""
        for boot in range(1, BOOTS + 1):
            with contextlib.ExitStack() as stack:
                self.directory = stack.enter_context(open_directory(self.key))
                self.port = free_port()
                self.child = stack.enter_context(self._running())
                try:
                    self._wait_for_boot()
                except RunFailed as error:
                    if boot == BOOTS:
                        raise
                    print(f"outage: {error}", file=sys.stderr)
                    self.failed_boots += 1
                    continue
                self._stack = stack.pop_all()
                return

    def restart(self) -> None:
        """End it whole and start it anew."""
        self._stack.close()
        self.restarts += 1
        self.start()

    def passt_pid(self) -> int | None:
        """The passt that serves the guest now, if one does that is through with its preparations."""
        found = find_passts(self.port)
        return found[0] if len(found) == 1 and _is_sealed(found[0]) else None

    def router(self) -> str:
        """Where the guest finds the host: both passt and slirp answer for it at the router's address."""
        found = re.search(rb"guest: lease \S+ \S+ router ([0-9.]+)", self._console().read_bytes())
        if found is None:
            raise RunFailed(f"{self.title}: the guest has no router")
        return found[1].decode()

    def settle(self) -> int | None:
        """Wait until the network is steady; returns passt's pid, or None if it does not become so."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while time.monotonic() < deadline:
            self.check_alive()
            pid = self.passt_pid()
            if pid is not None and self._answers_steadily() and self.passt_pid() == pid:
                return pid
            time.sleep(0.01)
        return None

    def check_alive(self) -> None:
        """Whoever waits for the guest wants to know that there is one.

        :raise VmEnded: there is none.
        """
        if self.child.poll() is not None:
            raise VmEnded(f"{self.title} ended with {self.child.returncode}: {log_end(self.directory)}")

    def _answers_steadily(self) -> bool:
        for _ in range(STEADY):
            with contextlib.closing(HttpClient(self.port, 1.0, STATIC)) as client:
                if client.first_answer(time.monotonic(), limit=1.0, interval=1.0) is None:
                    return False
        return True

    def _wait_for_boot(self) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        while time.monotonic() < deadline:
            self.check_alive()
            console = self._console().read_bytes() if self._console().exists() else b""
            if LEASE in console and self._answers_steadily():
                return
            time.sleep(0.05)
        raise RunFailed(f"{self.title}: no answer within {BOOT_TIMEOUT:g} s: {log_end(self.directory)}")

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[bytes]]:
        command = self._command()
        with (self.directory / LOG).open("wb") as output:
            child = subprocess.Popen(
                command,
                cwd=self.directory,
                env=dict(self.parts.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield child
        finally:
            try:
                self._end(child)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                # A passt in the background is in a session of its own; it has nobody else's port.
                for pid in find_passts(self.port):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def find_passts(port: int) -> list[int]:
    """The passts whose command line forwards that port."""
    wanted = f"127.0.0.1/{port}:80".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (directory / "comm").read_text().startswith("passt") and wanted in (
                directory / "cmdline"
            ).read_bytes():
                found.append(int(directory.name))
    return found


def _is_sealed(pid: int) -> bool:
    """Whether it is through with its preparations, of which seccomp is the last (proc_pid_status(5))."""
    with contextlib.suppress(OSError):
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    return False


# --- qrapd --------------------------------------------------------------------------------------------


class Qrapd(Contender):
    """``qrapd run`` with a link in one of its modes."""

    mode: ClassVar[str]

    def lacking(self) -> str | None:
        with open_directory(self.key) as directory:
            try:
                plan.resolve(vm_files.read(self.parts.vm_file(directory, self.mode, 1)))
            except ConfigurationError as error:
                return "; ".join(problem.reason for problem in error.problems)
        return None

    def _command(self) -> list[str]:
        self._read = 0
        self._passt: int | None = None
        file = self.parts.vm_file(self.directory, self.mode, self.port)
        return [*qrapd_run(file), "--log-format", "json"]

    def _console(self) -> Path:
        return self.directory / LOG

    def passt_pid(self) -> int | None:
        """By qrapd's events: None from the loss of a link to its return."""
        with (self.directory / LOG).open("rb") as log:
            log.seek(self._read)
            lines = log.read()
        whole = lines.rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            self._note(line)
        return self._passt

    def _note(self, line: bytes) -> None:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if event["event"] in ("link.connected", "link.restored"):
            self._passt = event["passt_pid"]
        elif event["event"] == "link.lost":
            self._passt = None

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        # The first asks the guest, the second QEMU: nobody waits for the guest's scripts.
        for _ in range(2):
            child.terminate()
            time.sleep(0.1)
        try:
            child.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{self.title} did not end: {log_end(self.directory)}") from None


class Swap(Qrapd):
    """A new stream under the running NIC."""

    key, title, mode = "swap", "qrapd swap", "swap"


class VhostUser(Qrapd):
    """Shared memory."""

    key, title, mode = "vhost-user", "qrapd vhost-user", "vhost-user"


# --- by hand ------------------------------------------------------------------------------------------


class ByHand(Contender):
    """A shell script; its own process becomes QEMU."""

    script: ClassVar[str]
    """with {passt}, {directory}, {qemu} and what :meth:`_network` returns"""

    @abc.abstractmethod
    def _network(self) -> list[str]:
        """QEMU's options for it, the NIC excepted, whose netdev is called ``net``."""

    def _command(self) -> list[str]:
        made = self._plan()
        script = self.directory / "run.sh"
        script.write_text(
            self.script.format(
                passt=shlex.join(self._passt()),
                directory=shlex.quote(str(self.directory)),
                qemu=shlex.join(self._qemu(made)),
            )
        )
        return ["sh", str(script)]

    def _passt(self) -> Sequence[str]:
        """Program and options: passt's defaults, as whoever writes such a script leaves them."""
        return [self.parts.passt, "--tcp-ports", f"127.0.0.1/{self.port}:80"]

    def _plan(self) -> Plan:
        return plan.resolve(vm_files.read(self.parts.vm_file(self.directory, "swap", self.port)))

    def _qemu(self, made: Plan) -> list[str]:
        return [
            *(made.qemu, "-accel", "kvm" if made.kvm else "tcg", "-display", "none"),
            *("-serial", f"file:{self.directory}/console"),
            *self._network(),
            *("-device", f"virtio-net-pci,netdev=net,mac={made.links[0].mac}"),
            *guest_arguments(self.parts.guest, "guest.control=1"),
        ]

    def _console(self) -> Path:
        return self.directory / "console"


class StreamLoop(ByHand):
    """QEMU connects again by itself, and a loop starts passt again."""

    key, title = "stream", "QEMU stream, reconnect-ms; loop"
    script = """\
#!/bin/sh
while :; do
  {passt} --foreground --socket {directory}/passt.sock
done &
exec {qemu}
"""

    def lacking(self) -> str | None:
        return None if "reconnect-ms" in self.parts.stream_options else f"not in {self.parts.qemu_name}"

    def _network(self) -> list[str]:
        where = f"addr.type=unix,addr.path={self.directory}/passt.sock"
        return ["-netdev", f"stream,id=net,server=off,{where},reconnect-ms={RECONNECT_MS}"]


class Native(ByHand):
    """QEMU starts passt, and starts it again."""

    key, title = "native", "QEMU -netdev passt"
    script = "#!/bin/sh\nexec {qemu}\n"

    def lacking(self) -> str | None:
        return None if "passt" in binaries.qemu_netdevs(self.parts.qemu) else f"not in {self.parts.qemu_name}"

    def _network(self) -> list[str]:
        ports = [{"str": f"127.0.0.1/{self.port}:80"}]
        netdev = {"type": "passt", "id": "net", "path": self.parts.passt, "tcp-ports": ports}
        return ["-netdev", json.dumps(netdev)]


class DirectStream(ByHand):
    """QEMU on passt's socket, with nothing in between; once."""

    key, title = "direct", "QEMU stream"
    # passt goes to the background once it listens, and ends with its client.
    script = """\
#!/bin/sh -e
{passt} --one-off --socket {directory}/passt.sock
exec {qemu}
"""

    def lacking(self) -> str | None:
        return None if self.parts.stream_options else f"not in {self.parts.qemu_name}"

    def _network(self) -> list[str]:
        return ["-netdev", f"stream,id=net,server=off,addr.type=unix,addr.path={self.directory}/passt.sock"]


class DirectAlike(DirectStream):
    """The same with those options that qrapd gives to its passt: what is left is the price of the hub."""

    key, title = "direct-alike", "QEMU stream, passt as qrapd's"

    def _passt(self) -> Sequence[str]:
        return self._plan().links[0].passt


class DirectVhostUser(ByHand):
    """QEMU and passt with shared memory; once."""

    key, title = "direct-vhost-user", "QEMU vhost-user"
    script = """\
#!/bin/sh -e
{passt} --one-off --vhost-user --socket {directory}/passt.sock
exec {qemu}
"""

    def lacking(self) -> str | None:
        return None if "--vhost-user" in binaries.passt_help(self.parts.passt) else "not in this passt"

    def _network(self) -> list[str]:
        return [
            *(
                "-object",
                "memory-backend-memfd,id=memory,size=128M,share=on",
                "-machine",
                "memory-backend=memory",
            ),
            *("-chardev", f"socket,id=passt,path={self.directory}/passt.sock"),
            *("-netdev", "vhost-user,id=net,chardev=passt"),
        ]


class Slirp(ByHand):
    """QEMU's user-mode network, without passt."""

    key, title = "slirp", "QEMU slirp"
    script = "#!/bin/sh\nexec {qemu}\n"

    def lacking(self) -> str | None:
        return (
            None
            if "user" in binaries.qemu_netdevs(self.parts.qemu)
            else f"not in this {self.parts.qemu_name}"
        )

    def _network(self) -> list[str]:
        return ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:80"]
