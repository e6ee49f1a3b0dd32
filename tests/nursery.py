# SPDX-License-Identifier: GPL-2.0-or-later
"""A process below which all stays that a test starts, whoever loses its parent, and that ends it all with the test.

An agent's VMs are to outlive it, so no parent of theirs ends them, and their command lines do not tell whose they
are. A subreaper (prctl(2)) gets every orphan below it: what descends from it is what the test has started, no more
and no less, and that needs no privilege. Its end of a pipe tells it of the end of the test, however that came.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

PATIENCE = 60.0
"""As in support.py, which takes too much along for a small process."""

PR_SET_CHILD_SUBREAPER = 36
"""linux/prctl.h"""


@dataclass(frozen=True, order=True)
class Running:
    """A process that runs; a zombie does not."""

    pid: int
    parent: int
    name: str
    """as the kernel has it: the first 15 bytes of the program's name"""

    @property
    def is_qemu(self) -> bool:
        return self.name.startswith("qemu-system")

    @property
    def is_passt(self) -> bool:
        return self.name.startswith("passt")


class Nursery:
    """Starts one program, as often as wanted, and knows all that has come of it.

    :param log: where stderr goes, of all of them.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = [sys.executable, __file__, str(log), *command]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(PATIENCE)
        process.stdout.close()

    def start(self) -> int:
        """Start the program; returns its pid."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("start\n")
        return int(self._process.stdout.readline())

    def running(self) -> list[Running]:
        """What runs below it now, in the order of the pids."""
        below = {self._process.pid}
        there = sorted(_processes())
        found: set[Running] = set()
        while new := [each for each in there if each.parent in below and each not in found]:
            found.update(new)
            below.update(each.pid for each in new)
        return sorted(found)

    def wait_for_end(self, pid: int) -> None:
        """Wait until this one of its processes is gone."""
        deadline = time.monotonic() + PATIENCE
        # Its first thread may be gone while others still hold its files: only then is it collected.
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"process {pid} has not ended within {PATIENCE:g} s"
            time.sleep(0.01)


def _processes() -> Iterator[Running]:
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name may hold anything, parentheses too: proc(5)
            head, _, tail = (directory / "stat").read_text(errors="replace").rpartition(")")
            state, parent, *_ = tail.split()
            if state not in "ZX":
                yield Running(int(directory.name), int(parent), head.partition("(")[2])


# ---- the process itself


def _main(log: str, *command: str) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: pytest tells it by the pipe
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    # SIGINT is not to stay ignored in what is started: it is one of the signals that the agent obeys.
    for _ in sys.stdin:
        stderr = (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
        pid = os.posix_spawn(
            command[0], command, os.environ, file_actions=[*null, stderr], setsigdef=[signal.SIGINT]
        )
        print(pid, flush=True)  # noqa: T201 (that is what it is for)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Each one's children become ours with its end, until there are none.
    with contextlib.suppress(ChildProcessError):
        while True:
            for each in _processes():
                if each.parent == os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each.pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    _main(*sys.argv[1:])
