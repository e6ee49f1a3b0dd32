# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd demo``: a tiny guest, booted under the very supervisor that runs everybody's VMs, visited and stopped."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from rich.console import Console
from rich.text import Text

from qrapd import binaries, plan, vm_files
from qrapd.config import NAME_PATTERN
from qrapd.errors import ExitStatus, QemuFailed, UsageError
from qrapd.foreground import supervise
from qrapd.guest import build_guest, default_cache
from qrapd.lifecycle import Reason
from qrapd.logs import Emit, LogFormat, Logs
from qrapd.plan import Plan
from qrapd.vm import Vm

__all__ = ["show", "write"]

BOOT_TIMEOUT = 180.0
"""Seconds for the guest to boot and answer: 2 to 5 on an idle machine without KVM (measured)."""

_MEMORY = "128M"


def show(*, stay: bool, port: int | None, base: Path | None, log_format: LogFormat, log_level: str) -> int:
    """Run the demonstration and return the exit status.

    :param base: the runtime directory; by default a temporary one.
    :param log_format: anything but ``auto`` writes the events to stderr as well, beside what is shown.
    :raise QrapdError: something that it needs is missing, or the guest did not come up.
    """
    console = _Console(highlight=False)
    say = partial(_line, console)
    guest = build_guest(default_cache(), say=lambda line: say("preparing", line))
    with tempfile.TemporaryDirectory(prefix="qrapd-demo-") as scratch:
        file = Path(scratch) / "demo.toml"
        port = port or _free_port()
        file.write_text(_vm_file(guest.kernel, guest.initramfs, guest.command_line, port))
        made = plan.resolve(vm_files.read(file))
        say("guest", f"Linux {guest.version} and busybox, {_MEMORY}, {_accelerator(made)}")
        with Logs(log_format, log_level) as logs:
            visit = _Visit(console, made, port, stay, None if log_format == "auto" else logs.emit)
            base = base or Path(scratch) / "run"
            outcome = anyio.run(partial(supervise, made, base, visit.note, companion=visit.carry_out))
    if visit.error is not None:
        raise visit.error
    say("done", "no process, socket or file is left")
    say("next", f"{_own_name()} demo --write web.toml   # a VM's file for this guest, to try everything with")
    if visit.completed:
        return ExitStatus.OK
    if outcome.reason is Reason.REQUEST:  # Ctrl-C
        return ExitStatus.FAILED
    raise visit.premature_end()


def write(file: Path, port: int | None) -> None:
    """Write a VM's file for the demonstration's guest, and beside it what it boots, so that it can be kept or moved.

    :raise QrapdError: something that it needs is missing, or the file cannot be one of a VM, or is there already.
    """
    if file.suffix != ".toml" or not re.fullmatch(NAME_PATTERN, file.stem):
        raise UsageError(
            f"{file} cannot be a VM's file: those are NAME.toml, with a to z, 0 to 9 and - in NAME"
        )
    if file.exists():
        raise UsageError(f"{file} is there already", hint="name another file; this one stays as it is")
    say = partial(_line, _Console(highlight=False))
    guest = build_guest(default_cache(), say=lambda line: say("preparing", line))
    port = port or _free_port()
    kernel, initramfs = file.with_suffix(".demo-kernel"), file.with_suffix(".demo-initramfs")
    shutil.copyfile(guest.kernel, kernel)
    shutil.copyfile(guest.initramfs, initramfs)
    with file.open("x") as new:
        new.write(_vm_file(Path(kernel.name), Path(initramfs.name), guest.command_line, port))
    say("written", f"{file}, and what it boots: {kernel.name}, {initramfs.name}")
    say("next", f"{_own_name()} check {shlex.quote(str(file))}")
    say("", f"{_own_name()} run {shlex.quote(str(file))}")
    say("", f"curl http://127.0.0.1:{port}/   # once it says ready, in another terminal")


class _Console(Console):
    """A console whose reader may leave early, as `head` does: rich would exit from within the running VM."""

    def on_broken_pipe(self) -> None:
        """Say no more; the show goes on to its orderly end."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Visit:
    """What the demonstration does beside the running VM, and what it shows of the events."""

    def __init__(self, console: Console, made: Plan, port: int, stay: bool, log: Emit | None) -> None:
        self.error: QemuFailed | None = None
        self.completed = False
        self._console = console
        self._plan = made
        self._port = port
        self._stay = stay
        self._log = log
        self._started = time.monotonic()
        self._guest_ready = anyio.Event()
        self._restored = anyio.Event()
        self._passt_pid = 0
        self._progress = "starting"

    def note(self, event: str, /, **fields: object) -> None:
        """An event of the VM: the demonstration's :class:`~qrapd.logs.Emit`."""
        if self._log is not None:
            self._log(event, **fields)
        say = partial(_line, self._console)
        match event:
            case "passt.started":
                self._passt_pid = int(str(fields["pid"]))
            case "link.connected":
                say(
                    "passt", f"pid {fields['passt_pid']}, 127.0.0.1:{self._port} leads to the guest's port 80"
                )
            case "link.restored":
                say(
                    "restored", f"by another passt, pid {fields['passt_pid']}, after {fields['outage_ms']} ms"
                )
                self._restored.set()
            case "vm.started":
                say("QEMU", f"pid {fields['qemu_pid']}, the NIC behind a hub, the stream held")
            case "vm.ready":
                self._progress = "the guest boots"
                say("booting", f"the machine is {fields['status']}")
            case "guest.console":
                self._note_console(str(fields["line"]), say)
            case "vm.stopping":
                say("stopping", f"by {fields['how']}")
            case "vm.exited":
                say("ended", f"{fields['reason']}, QEMU's exit status {fields.get('exit_code', 'unknown')}")

    def _note_console(self, line: str, say: Callable[[str, str], None]) -> None:
        if not line.startswith("guest: "):
            self._progress = line
            return
        words = line.removeprefix("guest: ")
        if words.startswith("lease "):
            say("lease", f"{words.removeprefix('lease ')}  ({self._elapsed()})")
        elif words == "ready":
            self._guest_ready.set()
        else:
            say("guest", words)

    async def carry_out(self, vm: Vm) -> None:
        """Wait for the guest, fetch its page, kill its passt, fetch it again, and stop the guest or let it stay."""
        with anyio.move_on_after(BOOT_TIMEOUT):
            await self._wait_for_guest()
            say = partial(_line, self._console)
            await self._visit(say)
            say("kill -9", f"of passt, pid {self._passt_pid}")
            os.kill(self._passt_pid, signal.SIGKILL)
            await self._restored.wait()
            await self._visit(say)
            self.completed = True
            if self._stay and not self._console.quiet:
                self._tell_how_to_reach(say)
            else:
                vm.stop()
            return
        self.error = QemuFailed(
            f"the guest did not answer within {BOOT_TIMEOUT:g} s; the last that was seen: {self._progress}",
            hint="see everything with: qrapd demo --log-format console",
        )
        vm.stop()

    async def _visit(self, say: Callable[[str, str], None]) -> None:
        status, page = await self._fetch()
        say("HTTP", f"GET http://127.0.0.1:{self._port}/ says {status}  ({self._elapsed()})")
        for line in page.splitlines():
            say("", line)

    def premature_end(self) -> QemuFailed:
        """Why the show was over before its end."""
        return QemuFailed(
            f"the guest ended before it answered; the last that was seen: {self._progress}",
            hint="see everything with: qrapd demo --log-format console",
        )

    async def _wait_for_guest(self) -> None:
        with self._console.status("") as status:
            while not self._guest_ready.is_set():
                status.update(Text(f"{self._elapsed()}  {self._progress}"))
                with anyio.move_on_after(0.1):
                    await self._guest_ready.wait()

    async def _fetch(self) -> tuple[int, str]:
        while True:
            try:
                return await anyio.to_thread.run_sync(_get, self._port)
            except (OSError, http.client.HTTPException):
                await anyio.sleep(0.2)

    def _tell_how_to_reach(self, say: Callable[[str, str], None]) -> None:
        say("staying", "until Ctrl-C, or until the guest powers off. Meanwhile, in another terminal:")
        say("", f"curl http://127.0.0.1:{self._port}/cgi-bin/state")
        say("", f"cat {self._plan.passt_directory / 'demo.toml'}   # the VM's file")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._started:.1f} s"


def _line(console: Console, label: str, words: str) -> None:
    console.print(Text.assemble((f"{label:>10}", "bold"), "  ", words), soft_wrap=True)


def _accelerator(made: Plan) -> str:
    works, reason = binaries.kvm_works(binaries.guest_architecture(made.qemu))
    return f"{'KVM' if works else 'TCG'}: {reason}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _get(port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def _own_name() -> str:
    """What a person types to call us: the whole path only where the name alone is not found."""
    called = sys.argv[0]
    return called if Path(called).name == "qrapd" and shutil.which("qrapd") is None else "qrapd"


def _vm_file(kernel: Path, initramfs: Path, command_line: str, port: int) -> str:
    """The demonstration's own VM file. A JSON string is a TOML string, too."""
    return f"""\
[qemu]
args = [
  "-machine", "q35", "-m", "{_MEMORY}", "-no-reboot",
  "-kernel", {json.dumps(str(kernel))},
  "-initrd", {json.dumps(str(initramfs))},
  "-append", {json.dumps(command_line)},
]
powerdown_timeout = 20

[[link]]
[link.passt]
tcp_ports = ["127.0.0.1/{port}:80"]
"""
