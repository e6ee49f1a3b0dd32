# SPDX-License-Identifier: GPL-2.0-or-later
"""Many qraps, and some wraps, started at once against as many real passts in /tmp, and what comes of it.

A process by itself, in mount and pid namespaces of its own, so that no other passt and no other test is in its way:
``qrap_herd.py PERSISTENT ONE_OFF WRAPS`` writes a :class:`Herd` as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from qrap_arena import make_private_tmp
from qrapd.frames import sign_of_life_request
from qrapd.unix_sockets import Kind, look_at

QRAP = [sys.executable, "-P", "-m", "qrapd.qrap"]

# `qrapd wrap` imports for longer than a herd of qraps needs to connect. So that it is among them, not behind them, it
# starts with that done.
WRAP_PROGRAM = """
import sys
import qrapd.__main__, qrapd.cli, qrapd.logs, qrapd.probe, qrapd.supervisor, qrapd.wrap
print("waiting", flush=True)
sys.stdin.read()
qrapd.__main__.main()
"""
WRAP = [sys.executable, "-P", "-c", WRAP_PROGRAM, "wrap", "--runtime-dir", "/tmp/run", "--log-format", "json"]
WRAP += ["--powerdown-timeout", "0", "5", "qemu-system-x86_64"]
WRAP += ["-machine", "q35", "-accel", "tcg", "-m", "32M", "-display", "none", "-S"]
WRAP += ["-netdev", "socket,fd=5,id=n0", "-device", "virtio-net-pci,netdev=n0"]

LIMIT = 60.0
"""seconds that anything may take: a hundred times what most does"""

# In QEMU's place under qrap: says whose stream it has got, and once all have one, whether it still works.
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
    """of each that came through: the path that it told, the one of the stream's other end, and that one's pid"""
    working: int
    """streams of qraps on which passt answers after all have been connected"""
    failures: list[str]
    """what the others said"""
    alive: int
    """passts that ran, and had one client each, when all were connected"""
    statuses: list[int]
    """how the wraps ended on SIGTERM"""
    seconds: float
    """from the common start to the last connected one"""


def run_herd(persistent: int, one_off: int, *, wraps: int = 0) -> Herd:
    """Start that many passts of both kinds, and as many that want one, in new namespaces.

    :param wraps: how many of those are a `qrapd wrap` with a real QEMU; the others are qraps.
    """
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
        [*unshare, sys.executable, str(Path(__file__).resolve()), str(persistent), str(one_off), str(wraps)],
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
def passts(persistent: int, one_off: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Real ones, on the first names, that are through with their preparations; by path."""
    count = persistent + one_off
    with ExitStack() as stack:
        started = {}
        for n in range(1, count + 1):
            path = f"/tmp/passt_{n}.socket"
            command = ["passt", "--foreground", "-t", "none", "-u", "none", "--socket", path]
            if n * one_off // count > (n - 1) * one_off // count:  # spread evenly
                command.append("--one-off")
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


def watch(persistent: int, one_off: int, wraps: int) -> Herd:
    """Let all go at once, and ask each what it has got."""
    with passts(persistent, one_off) as servers, ExitStack() as stack:
        start, go, whole = os.pipe(), os.pipe(), sign_of_life_request(b"\x52\x54\x00\x12\x34\x56").hex()
        qemu = [Path(sys.executable).name, "-I", "-S", "-c", QEMU, whole]
        # Both pipes only ever end: the first when all are to start, the second when all are connected.
        script = f'read -r _; exec 0<&{go[0]} {go[0]}<&-; exec "$@"'
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

        def start_one(*command: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command,
                stdin=start[0],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                env=environment,
                text=True,
            )
            # Not communicate(): who is killed may leave a QEMU that holds the pipe; it ends with the namespace.
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        wrapped = [start_one(*WRAP) for _ in range(wraps)]
        for process in wrapped:
            assert process.stdout
            process.stdout.readline()
        herd = [
            start_one("sh", "-c", script, "sh", *QRAP, "5", *qemu, pass_fds=(go[0],))
            for _ in range(len(servers) - wraps)
        ]
        begun = time.monotonic()
        os.close(start[1])
        said = [read_report(process.stdout) for process in herd if process.stdout]
        paths = {process.pid: path for path, process in servers.items()}
        said += [read_events(process.stdout, paths) for process in wrapped if process.stdout]
        seconds = time.monotonic() - begun
        running = [path for path, process in servers.items() if process.poll() is None]
        alive = sum(seen.connected == 1 and seen.waiting == 0 for seen in look_at(running))
        os.close(go[1])
        working = sum(int(process.communicate(timeout=LIMIT)[0].strip() or 0) > 0 for process in herd)
        for process in wrapped:
            process.terminate()
        failures = [each for each in said if isinstance(each, str)]
        for process in wrapped:
            rest = process.communicate(timeout=LIMIT)[0]
            if process.returncode:
                failures.append(rest)
    return Herd(
        {path: each.pid for path, each in servers.items()},
        [each for each in said if not isinstance(each, str)],
        working,
        failures,
        alive,
        [process.returncode for process in wrapped],
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


def read_events(output: IO[str], paths: Mapping[int, str]) -> tuple[str, str, int] | str:
    """What a wrap told until its machine was ready, or all that it ever said; ``paths`` are the passts' by pid."""
    told, connected = "", None
    for line in output:
        told += line
        try:
            event = json.loads(line)
        except ValueError:
            break  # not an event: a traceback
        if event["event"] == "link.connected":
            connected = event["socket"], paths.get(event["passt_pid"], ""), event["passt_pid"]
        elif event["event"] == "vm.ready" and connected:
            return connected
    return told + output.read()


if __name__ == "__main__":
    make_private_tmp()
    json.dump(asdict(watch(*map(int, sys.argv[1:]))), sys.stdout)
