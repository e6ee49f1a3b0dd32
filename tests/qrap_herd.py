# SPDX-License-Identifier: GPL-2.0-or-later
"""Many qraps started at once against as many real passts, in /tmp as they would be, and what comes of it.

A process by itself, in mount and pid namespaces of its own, so that no other passt and no other test is in its way:
``qrap_herd.py COUNT [PASST_OPTION]...`` writes a :class:`Herd` as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from qrap_arena import make_private_tmp
from qrapd.frames import sign_of_life_request
from qrapd.unix_sockets import Kind, look_at

QRAP = [sys.executable, "-P", "-m", "qrapd.qrap"]

LIMIT = 60.0
"""seconds that anything may take: a hundred times what most does"""

# In QEMU's place: says whose stream it has got, and once all have one, whether it still works.
QEMU = r"""
import socket, struct, sys
stream = socket.socket(fileno=5)
stream.settimeout(10)
pid, = struct.unpack_from("i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
print(stream.getpeername(), pid, len(stream.recv(1 << 18, socket.MSG_PEEK)), flush=True)
sys.stdin.read()
stream.recv(1 << 18)
stream.sendall(bytes.fromhex(sys.argv[1]))
print(len(stream.recv(1 << 18)))
"""


@dataclass(frozen=True)
class Herd:
    """What came of it."""

    passts: dict[str, int]
    """pid of each by the path of its socket"""
    streams: list[tuple[str, str, int]]
    """of each qrap that came through: the path that it told, the one of the stream's other end, and that one's pid"""
    working: int
    """streams on which passt answers after all have been connected"""
    failures: list[str]
    """what the others said"""
    alive: int
    """passts that ran when all were connected"""
    seconds: float
    """from the common start to the last connected one"""


def run_herd(count: int, *options: str) -> Herd:
    """Start ``count`` passts with these options, and as many qraps, in new namespaces."""
    unshare = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    done = subprocess.run(
        [*unshare, sys.executable, str(Path(__file__).resolve()), str(count), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
    )
    if done.returncode:
        raise OSError(f"the herd ended with {done.returncode}: {done.stderr}")
    said = json.loads(done.stdout)
    said["streams"] = [tuple(each) for each in said["streams"]]
    return Herd(**said)


# ---- from here on in the namespaces


@contextmanager
def passts(count: int, options: Sequence[str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Real ones, on the first names, that are through with their preparations; by path."""
    with ExitStack() as stack:
        started = {}
        for path in [f"/tmp/passt_{n}.socket" for n in range(1, count + 1)]:
            command = ["passt", "--foreground", "-t", "none", "-u", "none", *options, "--socket", path]
            with Path(path + ".log").open("wb") as log:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started[path] = process
        deadline = time.monotonic() + LIMIT
        while not all(serves(process, path) for path, process in started.items()):
            if time.monotonic() > deadline:
                raise OSError("not all passts listen")
            time.sleep(0.02)
        yield started


def serves(passt: subprocess.Popen[bytes], path: str) -> bool:
    """Whether a passt is through with its preparations, of which seccomp is the last (proc_pid_status(5))."""
    if passt.poll() is not None:
        raise OSError(f"passt ended: {Path(path + '.log').read_text()}")
    if look_at([path])[0].kind is not Kind.LISTENING:
        return False
    return "Seccomp:\t2" in Path(f"/proc/{passt.pid}/status").read_text()


def watch(count: int, options: Sequence[str]) -> Herd:
    """Let the qraps go all at once, and ask each what it has got."""
    with passts(count, options) as servers, ExitStack() as stack:
        start, go, whole = os.pipe(), os.pipe(), sign_of_life_request(b"\x52\x54\x00\x12\x34\x56").hex()
        qemu = [Path(sys.executable).name, "-I", "-S", "-c", QEMU, whole]
        # Both pipes only ever end: the first when all are to start, the second when all are connected.
        script = f'read -r _; exec 0<&{go[0]} {go[0]}<&-; exec "$@"'
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        herd = []
        for _ in range(count):
            process = subprocess.Popen(
                ["sh", "-c", script, "sh", *QRAP, "5", *qemu],
                stdin=start[0],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[go[0]],
                env=environment,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            herd.append(process)
        begun = time.monotonic()
        os.close(start[1])
        said = [read_report(process.stdout) for process in herd if process.stdout]
        seconds = time.monotonic() - begun
        alive = sum(each.poll() is None for each in servers.values())
        os.close(go[1])
        working = sum(int(process.communicate(timeout=LIMIT)[0].strip() or 0) > 0 for process in herd)
    return Herd(
        {path: each.pid for path, each in servers.items()},
        [each for each in said if not isinstance(each, str)],
        working,
        [each for each in said if isinstance(each, str)],
        alive,
        seconds,
    )


def read_report(output: IO[str]) -> tuple[str, str, int] | str:
    """What a qrap and its QEMU said until it was connected, or all that it ever said."""
    told = output.readline()
    if not told.startswith("Connected to "):
        return told + output.read()
    report = output.readline()
    try:
        path, pid, waiting = report.split()
        if int(waiting) > 0:
            return told.removeprefix("Connected to ").strip(), path, int(pid)
    except ValueError:
        pass
    return told + report + output.read()


if __name__ == "__main__":
    make_private_tmp()
    json.dump(asdict(watch(int(sys.argv[1]), sys.argv[2:])), sys.stdout)
