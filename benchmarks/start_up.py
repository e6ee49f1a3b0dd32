# SPDX-License-Identifier: GPL-2.0-or-later
"""Start-up: what `qrapd run` costs until QEMU is executed, beside the bare interpreter.

In QEMU's place stands a shell script whose first act is to stop its parent, which is qrapd. While qrapd stands
still, its CPU clock, its memory and the time are read from outside. What is counted too much is what qrapd does
between the exec and that stop: the start of a shell, 1.1 ms (measured). README.md says how to read the table.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (
    RunFailed,
    arguments,
    children,
    ended,
    peak_rss_mib,
    pidfd,
    qrapd_run,
    spread,
    warm_environment,
)

TIMEOUT = 60.0
"""Seconds for one run. It takes a fraction of one; beyond, something hangs, and the benchmark fails."""

_BARE = "python -c pass"

_VM_FILE = """\
name = "start-up"
[qemu]
binary = {binary}
accel = "tcg"
"""

_LINK = """\
[[link]]
[link.passt]
tcp_ports = []
"""

# Both pipes are in the VM file's directory, where QEMU works. It stays a moment, as a QEMU would, so that what is
# measured is an ordinary start and not that of a program which ends at once. The last line is never run: by that
# name qrapd sees that this QEMU has -sandbox, and does not have to run it to know.
_STAND_IN = """\
#!/bin/sh
kill -STOP $PPID
echo > executed
read -r _ < resume
kill -CONT $PPID
exec sleep 0.1
\0libseccomp.so.2\0
"""


@dataclass(frozen=True)
class Cost:
    """What one start took: of the process itself, without its children. CPU time is user's and system's together."""

    cpu_ms: float
    wall_ms: float
    rss_mib: float | None = None
    """the highest until then"""
    passt_cpu_ms: float | None = None
    """what its running passt had taken by then"""


# --- one run ------------------------------------------------------------------------------------------


def start_interpreter(environment: dict[str, str]) -> Cost:
    """Start the interpreter that runs this, and let it end at once."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", "pass"], env=environment)
    _pid, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RunFailed(f"{sys.executable} -c pass ended with {child.returncode}")
    return Cost(1000 * (usage.ru_utime + usage.ru_stime), 1000 * wall)


def start_qrapd(file: Path, environment: dict[str, str]) -> Cost:
    """Run ``qrapd run FILE`` until it executes QEMU, measure it there, and see it end in order."""
    command = qrapd_run(file)
    log = file.parent / "log"
    with _pipe(file.parent / "executed") as executed, _pipe(file.parent / "resume") as resume:
        with log.open("wb") as output:
            started = time.monotonic()
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        with ended(child):
            # Either QEMU is executed, or qrapd ends without.
            with pidfd(child.pid) as exited:
                ready = select.select([executed, exited], [], [], TIMEOUT)[0]
            wall = time.monotonic() - started
            if executed not in ready:
                raise RunFailed(f"{shlex.join(command)} executed no QEMU: {log.read_text()}")
            cost = _cost_so_far(child.pid, wall)
            os.write(resume, b"\n")
            try:
                status = child.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{shlex.join(command)} does not end: {log.read_text()}") from None
    # What stands in QEMU's place has no monitor: qrapd says so and ends with 1.
    if status != 1 or "before its monitor said a word" not in log.read_text():
        raise RunFailed(f"{shlex.join(command)} ended with {status}: {log.read_text()}")
    return cost


@contextlib.contextmanager
def _pipe(path: Path) -> Iterator[int]:
    """A named pipe, open for both directions, so that opening it waits for nobody."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
        path.unlink()


def _cost_so_far(pid: int, wall: float) -> Cost:
    # It may have changed into passt.avx2, for one.
    passts = [child for child in children(pid) if Path(f"/proc/{child}/comm").read_text().startswith("passt")]
    return Cost(_cpu_ms(pid), 1000 * wall, peak_rss_mib(pid), sum(_cpu_ms(passt) for passt in passts))


def _cpu_ms(pid: int) -> float:
    """CPU time of a process and all its threads: clock_getcpuclockid(3), in nanoseconds where /proc has ticks."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise RunFailed(f"process {pid} has no CPU clock: {os.strerror(error)}")
    return 1000 * time.clock_gettime(clock.value)


# --- all runs -----------------------------------------------------------------------------------------


def measure(runs: int) -> dict[str, list[Cost]]:
    """Measure in turn, so that whatever else the machine does meets all alike."""
    with tempfile.TemporaryDirectory(prefix="qrapd-start-up-") as scratch:
        environment = warm_environment(Path(scratch) / "bytecode")
        files = {"qrapd run, no link": _vm(Path(scratch), 0), "qrapd run, 1 link": _vm(Path(scratch), 1)}
        measured: dict[str, list[Cost]] = {name: [] for name in (_BARE, *files)}
        for number in range(runs + 1):
            costs = [
                start_interpreter(environment),
                *(start_qrapd(file, environment) for file in files.values()),
            ]
            # The first round compiles every module and is not counted.
            for name, cost in zip(measured, costs, strict=True):
                measured[name] += [cost] if number else []
    return measured


def _vm(scratch: Path, links: int) -> Path:
    directory = scratch / f"links-{links}"
    directory.mkdir()
    stand_in = directory / "stand-in"
    stand_in.write_text(_STAND_IN)
    stand_in.chmod(0o755)
    file = directory / "vm.toml"
    # A JSON string is a TOML string, too.
    file.write_text(_VM_FILE.format(binary=json.dumps(str(stand_in))) + _LINK * links)
    return file


# --- what is told -------------------------------------------------------------------------------------


def tell(measured: dict[str, list[Cost]]) -> None:
    """Print the table: the median of each, with the least and the most."""
    titles = (
        f"{'CPU ms':>22}{'wall ms':>22}{'CPU ratio':>12}{'wall ratio':>12}{'peak RSS':>12}{'passt CPU':>12}"
    )
    print(f"{'':18}{titles}")
    bare = measured[_BARE]
    for name, costs in measured.items():
        line = f"{name:18}{spread([each.cpu_ms for each in costs]):>22}{spread([each.wall_ms for each in costs]):>22}"
        if costs is not bare:
            pairs = list(zip(costs, bare, strict=True))
            cpu = statistics.median(cost.cpu_ms / base.cpu_ms for cost, base in pairs)
            wall = statistics.median(cost.wall_ms / base.wall_ms for cost, base in pairs)
            rss = statistics.median(cost.rss_mib or 0 for cost in costs)
            passt = statistics.median(cost.passt_cpu_ms or 0 for cost in costs)
            line += f"{cpu:>12.1f}{wall:>12.1f}{rss:>8.1f} MiB{passt:>9.1f} ms"
        print(line)
    print(f"p50 (least to most) of {len(bare)} runs; load average {os.getloadavg()[0]:.1f}")


def main() -> int:
    """Measure and tell. Returns the exit status: no time fails, only a run that does."""
    asked = arguments(__doc__, runs=15)
    try:
        measured = measure(asked.runs)
    except RunFailed as error:
        print(f"start_up: {error}", file=sys.stderr)
        return 1
    if asked.json:
        print(
            json.dumps({name: [asdict(cost) for cost in costs] for name, costs in measured.items()}, indent=2)
        )
    else:
        tell(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
