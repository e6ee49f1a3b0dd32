# SPDX-License-Identifier: GPL-2.0-or-later
"""What a supervisor takes while its VM is idle: how often it wakes up, and for how long."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender

__all__ = ["Idle", "measure", "taken"]

REST = 3.0
"""Seconds after the last answer: nothing of the boot is to be counted."""


@dataclass(frozen=True)
class Idle:
    """Per second, over all threads."""

    seconds: float
    switches_per_s: float
    """context switches, voluntary and not: proc_pid_status(5)"""
    cpu_ms_per_s: float


def measure(vm: Contender, seconds: float) -> Idle:
    """Leave it alone for that time."""
    time.sleep(REST)
    before, begun = taken(vm.child.pid), time.monotonic()
    time.sleep(seconds)
    after, ended = taken(vm.child.pid), time.monotonic()
    vm.check_alive()
    passed = ended - begun
    return Idle(passed, (after[0] - before[0]) / passed, (after[1] - before[1]) / 1e6 / passed)


def taken(pid: int) -> tuple[int, int]:
    """Context switches, and nanoseconds on a processor: by /proc/PID/task/*/schedstat, as ticks are 10 ms each."""
    switches = nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        found = re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text())
        switches += sum(int(each) for each in found)
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    return switches, nanoseconds
