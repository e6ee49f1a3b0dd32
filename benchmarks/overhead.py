# SPDX-License-Identifier: GPL-2.0-or-later
"""Overhead: from the command to the first HTTP answer of the guest, under qrapd and by a shell script, in pairs.

The script does what a person would do by hand: passt on a socket, then QEMU connected to it. Both sides run the
same passt with the same options, the same QEMU and the same guest. README.md says how to read the table.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (
    LOG,
    RunFailed,
    arguments,
    ended,
    free_port,
    guest_arguments,
    log_end,
    open_directory,
    peak_rss_mib,
    pidfd,
    qrapd_run,
    spread,
    warm_environment,
)
from http_client import HttpClient

from qrapd import binaries, plan, vm_files
from qrapd.errors import QrapdError
from qrapd.guest import GuestImage, build_guest, default_cache
from qrapd.plan import Plan

BOOT_TIMEOUT = 180.0
"""Seconds for the first answer: 2 to 5 on an idle machine without KVM (measured); beyond, the run has failed."""

END_TIMEOUT = 60.0
"""Seconds for everything to end after that."""

INTERVAL = 0.01
"""Seconds between two attempts, and so what a time is good for."""

LEASE = b"guest: lease"
"""On the guest's console; from then on passt knows the guest, and there is somebody to ask. Connections that come
earlier hang, passt 2023-03 takes a whole processor while they do (measured), and 2025-05 may die of one."""

PATIENCE = 0.2
"""Seconds for one attempt; an answer takes some ms."""

_VM_FILE = """\
name = "overhead"
[qemu]
args = {args}

[[link]]
[link.passt]
tcp_ports = ["127.0.0.1/{port}:80"]
"""

# passt goes to the background once it listens, and ends with its client; `exec`, so that our child is QEMU.
_SCRIPT = """\
#!/bin/sh -e
{passt} --one-off --socket {directory}/passt.sock --pid {directory}/passt.pid
exec {qemu}
"""


@dataclass(frozen=True)
class Pair:
    """One boot by the script and one under qrapd; what qrapd itself had used when the guest answered."""

    shell_s: float
    qrapd_s: float
    qrapd_rss_mib: float

    @property
    def ratio(self) -> float:
        """How much longer it takes under qrapd."""
        return self.qrapd_s / self.shell_s


# --- the two sides ------------------------------------------------------------------------------------


def boot_by_script(guest: GuestImage) -> float:
    """Boot the guest by the script and end it; returns the seconds until it answered."""
    with open_directory("overhead") as directory:
        made, port = _plan(directory, guest)
        script = directory / "boot.sh"
        script.write_text(
            _SCRIPT.format(
                passt=shlex.join(made.links[0].passt),
                directory=shlex.quote(str(directory)),
                qemu=shlex.join(_qemu_by_hand(made, guest, directory)),
            )
        )
        with (
            _passt_ended(directory / "passt.pid"),
            _started(["sh", str(script)], directory, None) as (child, started),
        ):
            seconds = _wait_for_answer(port, started, child, directory / "console")
            child.terminate()
            child.wait(END_TIMEOUT)
    return seconds


def boot_under_qrapd(guest: GuestImage, environment: dict[str, str]) -> tuple[float, float]:
    """Boot the guest under qrapd and end it in order; returns the seconds until it answered, and qrapd's MiB."""
    with open_directory("overhead") as directory:
        _made, port = _plan(directory, guest)
        with _started(qrapd_run(directory / "vm.toml"), directory, environment) as (child, started):
            seconds = _wait_for_answer(port, started, child, directory / LOG)
            rss = peak_rss_mib(child.pid)
            child.send_signal(signal.SIGTERM)
            if status := child.wait(END_TIMEOUT):
                raise RunFailed(f"qrapd ended with {status}: {log_end(directory)}")
    return seconds, rss


def _plan(directory: Path, guest: GuestImage) -> tuple[Plan, int]:
    """What qrapd would run, from a file that is written here, and the host's port that leads to the guest."""
    port = free_port()
    file = directory / "vm.toml"
    # A JSON string is a TOML string, too.
    file.write_text(_VM_FILE.format(args=json.dumps(guest_arguments(guest)), port=port))
    return plan.resolve(vm_files.read(file)), port


def _qemu_by_hand(made: Plan, guest: GuestImage, directory: Path) -> list[str]:
    if "stream" not in binaries.qemu_netdevs(made.qemu):
        raise RunFailed(
            f"{made.qemu} has no -netdev stream, which the script needs: QEMU 7.2 is the first to have it"
        )
    return [
        *(made.qemu, "-accel", "kvm" if made.kvm else "tcg", "-display", "none"),
        *("-serial", f"file:{directory}/console"),
        *("-netdev", f"stream,id=net,server=off,addr.type=unix,addr.path={directory}/passt.sock"),
        *("-device", f"virtio-net-pci,netdev=net,mac={made.links[0].mac}"),
        *guest_arguments(guest),
    ]


# --- processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(
    command: list[str], directory: Path, environment: dict[str, str] | None
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A running command and when it was started; its output goes to a file, of which errors quote the end."""
    with (directory / LOG).open("wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    with ended(child):
        try:
            yield child, started
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"{error}: {log_end(directory)}") from None


@contextlib.contextmanager
def _passt_ended(pid_file: Path) -> Iterator[None]:
    """Wait for the script's passt to end after its client, and end it where it had none."""
    try:
        yield
    finally:
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            pidfd(int(pid_file.read_text())) as passt,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(passt, selectors.EVENT_READ)
            if not selector.select(1.0):
                signal.pidfd_send_signal(passt, signal.SIGTERM)


# --- the guest ------------------------------------------------------------------------------------------


def _wait_for_answer(port: int, started: float, child: subprocess.Popen[bytes], console: Path) -> float:
    """Wait for the guest's first answer; returns the seconds since the start."""
    with contextlib.closing(HttpClient(port, PATIENCE)) as client:
        for number in itertools.count():
            due = started + number * INTERVAL
            if client.answered(until=due):
                break
            if child.poll() is not None:
                raise RunFailed(f"{child.args!r} ended with {child.returncode}: {log_end(console.parent)}")
            if due > started + BOOT_TIMEOUT:
                raise RunFailed(
                    f"no answer from the guest within {BOOT_TIMEOUT:g} s: {log_end(console.parent)}"
                )
            if client.asking or (console.exists() and LEASE in console.read_bytes()):
                client.ask()
        return time.monotonic() - started


# --- all pairs ----------------------------------------------------------------------------------------


def measure(runs: int) -> list[Pair]:
    """Boot in turn, each side first in every other pair."""
    guest = build_guest(default_cache(), say=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="qrapd-bytecode-") as bytecode:
        environment = warm_environment(Path(bytecode))
        boot_under_qrapd(guest, environment)  # compiles every module, and is not counted
        pairs = []
        for number in range(runs):
            if number % 2:
                seconds, rss = boot_under_qrapd(guest, environment)
                pairs.append(Pair(boot_by_script(guest), seconds, rss))
            else:
                shell = boot_by_script(guest)
                pairs.append(Pair(shell, *boot_under_qrapd(guest, environment)))
    return pairs


def tell(pairs: list[Pair]) -> None:
    """Print the table: the median of each, with the least and the most."""
    print(f"{'boot to HTTP, s':18}{spread([pair.shell_s for pair in pairs], 2):>24}  shell script")
    rss = statistics.median(pair.qrapd_rss_mib for pair in pairs)
    print(
        f"{'':18}{spread([pair.qrapd_s for pair in pairs], 2):>24}  qrapd run, with a peak RSS of {rss:.1f} MiB"
    )
    print(f"{'ratio':18}{spread([pair.ratio for pair in pairs], 2):>24}  of each pair")
    more = [1000 * (pair.qrapd_s - pair.shell_s) for pair in pairs]
    print(f"{'difference, ms':18}{spread(more):>24}  of each pair")
    print(f"p50 (least to most) of {len(pairs)} pairs; load average {os.getloadavg()[0]:.1f}")


def main() -> int:
    """Measure and tell. Returns the exit status: no time fails, only a run that does."""
    asked = arguments(__doc__, runs=10)
    try:
        pairs = measure(asked.runs)
    except RunFailed as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    except QrapdError as error:
        print(f"overhead: {error}; {error.hint}" if error.hint else f"overhead: {error}", file=sys.stderr)
        return error.exit_status
    if asked.json:
        print(json.dumps([asdict(pair) for pair in pairs], indent=2))
    else:
        tell(pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
