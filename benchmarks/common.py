# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benchmarks share: qrapd's command, what does not outlive a run, figures with their spread."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qrapd.guest import GuestImage

__all__ = [
    "LOG",
    "RunFailed",
    "arguments",
    "children",
    "ended",
    "free_port",
    "guest_arguments",
    "log_end",
    "open_directory",
    "peak_rss_mib",
    "pidfd",
    "qrapd_run",
    "spread",
    "warm_environment",
]

LOG = "log"
"""Where a run's output goes, in its directory."""


class RunFailed(Exception):
    """A run did not do what it was started for, so that there is nothing to measure."""


def arguments(description: str | None, runs: int) -> argparse.Namespace:
    """The command line of a benchmark: ``runs``, at least 1, and ``json``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=runs, metavar="N", help=f"default: {runs}")
    parser.add_argument("--json", action="store_true", help="print every single run, for programs")
    parsed = parser.parse_args()
    parsed.runs = max(1, parsed.runs)
    return parsed


def qrapd_run(file: Path) -> list[str]:
    """``qrapd run FILE`` under the interpreter that runs this, with a runtime directory beside the file."""
    script = Path(sys.executable).with_name("qrapd")
    return [sys.executable, str(script), "run", str(file), "--runtime-dir", str(file.parent / "run")]


def guest_arguments(guest: GuestImage, *words: str) -> list[str]:
    """What QEMU gets for the guest, whoever runs it; ``words`` go to the kernel's command line."""
    append = " ".join([guest.command_line, *words])
    return [
        *("-machine", "q35", "-m", "128M", "-no-reboot"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", append),
    ]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def open_directory(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A directory for one run, in which every passt can make its socket.

    :param parent: where it is to be; by default where temporary files go.
    """
    with tempfile.TemporaryDirectory(prefix=f"qrapd-{name}-", dir=parent, ignore_cleanup_errors=True) as path:
        if os.geteuid() == 0:
            # passt becomes nobody, and that of 2023 does so before it binds its socket.
            Path(path).chmod(0o777)
        yield Path(path)


def log_end(directory: Path) -> str:
    """The end of what a run wrote, for an error."""
    return (directory / LOG).read_text(errors="replace")[-2000:].strip() or "it wrote nothing"


def warm_environment(bytecode: Path) -> dict[str, str]:
    """Our environment, but each module is compiled once, as by an installation, and into ``bytecode``."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(bytecode)}


@contextlib.contextmanager
def ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave neither the process nor its children behind, whatever happens; it may even stand still."""
    try:
        yield
    finally:
        if child.poll() is None:
            orphans = children(child.pid)
            child.kill()
            child.wait()
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def pidfd(pid: int) -> Iterator[int]:
    """A pidfd, which becomes readable when the process ends."""
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def children(pid: int) -> list[int]:
    """The children that a process's first thread has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def peak_rss_mib(pid: int) -> float:
    """The most memory that a process has had resident, shared libraries included: proc_pid_status(5), VmHWM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, with the least and the most: ``1.05 (1.01 to 1.12)``."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"
