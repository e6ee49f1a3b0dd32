# SPDX-License-Identifier: GPL-2.0-or-later
"""Probe: finding and claiming a passt, by qrap, inside one process, and by the C program where one is installed.

Those programs have fixed names in /tmp. So all is measured in a mount namespace with an empty /tmp, and in a pid
namespace, with which everything in it ends whatever happens: this program starts itself anew there. The network is
the host's, as passt wants one. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RunFailed, arguments, ended, pidfd, spread, warm_environment

from qrapd.unix_sockets import look_at

HERDS = (1, 8, 32, 64)
PASSTS = {"persistent": [], "one-off": ["--one-off"]}
"""what the passts of a herd are, and the options that make them so"""

SILENT = (0, 8, 63)
C_IS_PATIENT = 63
"""with so many silent ones the C program takes half a minute: one run"""

PLAIN_IN_A_RUN = 5
"""starts of each program with one good socket, in each run: they are short"""

TIMEOUT = 90.0
"""Seconds for whatever is waited for. The longest, the C program's 63 times 0.5 s, takes 32."""

_QRAP, _CLAIM, _C, _BARE = "qrap", "claim", "C program", "python -c pass"
_C_PROGRAM = Path("/usr/bin/qrap")

# Everybody stands behind the gate until all are there: starting 64 processes takes longer than they are to run.
_GATE = 'kill -STOP $$; exec "$@"'
# QEMU's stand-in says that it was started, and keeps the stream as a QEMU would.
_STAND_IN = "echo $$; kill -STOP $$"


@dataclass(frozen=True)
class Sample:
    """One run of one side."""

    part: str
    """herd, silent or plain"""
    side: str
    wall_ms: float | None
    """to the last connection; plain: of the whole process; None if there was no connection"""
    n: int = 1
    """how many claim at once; silent: how many silent ones are below the good socket"""
    passts: str = "persistent"
    started: int = 1
    """how many got a passt to themselves"""
    cpu_ms: float | None = None


# --- the place ----------------------------------------------------------------------------------------


def measure_apart(asked: argparse.Namespace) -> int:
    """Start this program anew in namespaces of its own; returns its exit status."""
    if os.geteuid() != 0:
        raise RunFailed("needs root, for a /tmp of its own (mount namespace): run it as root")
    for needed in (Path(sys.prefix), Path(sys.base_prefix), Path(__file__)):
        if needed.resolve().is_relative_to("/tmp"):
            raise RunFailed(f"{needed} is below /tmp, which is to be hidden: move the repository elsewhere")
    for program in ("passt", "unshare"):
        if not shutil.which(program):
            raise RunFailed(f"{program} is not on PATH: install it")
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words = ["measure", "--runs", str(asked.runs), *(["--json"] if asked.json else [])]
    child = subprocess.Popen([*unshare, sys.executable, str(Path(__file__).resolve()), *words])
    with ended(child):
        return child.wait()


def hide_tmp() -> None:
    """An empty /tmp, where everybody may make a socket: the passt of 2023 does so as nobody."""
    if os.getpid() != 1:
        raise RunFailed("is not in a pid namespace of its own, so this /tmp may be the host's")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/tmp"], capture_output=True, text=True
    )
    if done.returncode:
        raise RunFailed(f"no tmpfs can be mounted on /tmp: {done.stderr}")


def path_of(number: int) -> str:
    """Where the numberth passt listens."""
    return f"/tmp/passt_{number}.socket"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what tells nobody by itself."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RunFailed(f"{what}: not within {TIMEOUT:g} s")
        time.sleep(0.002)


def wait_until_free(numbers: Sequence[int]) -> None:
    """Wait until the last client is forgotten, so that nobody has to wait for that in the next run."""
    paths = [path_of(number) for number in numbers]
    wait_until(lambda: not any(sighting.taken for sighting in look_at(paths)), "sockets without clients")


# --- those who listen ---------------------------------------------------------------------------------


@contextlib.contextmanager
def passts(numbers: Sequence[int], options: Sequence[str] = ()) -> Iterator[None]:
    """Real passts, ready to serve, with no port of the host's."""
    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.callback(Path(path_of(number)).unlink, missing_ok=True)
        started = []
        for number in numbers:
            command = ["passt", "--foreground", "-t", "none", "-u", "none", *options]
            with Path(f"/tmp/passt_{number}.log").open("wb") as log:
                child = subprocess.Popen(
                    [*command, "--socket", path_of(number)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            stack.enter_context(ended(child))
            started.append(child)
        for number, child in zip(numbers, started, strict=True):
            wait_until(functools.partial(_serves, child, number), f"passt {number} serves")
        yield


def _serves(passt: subprocess.Popen[bytes], number: int) -> bool:
    """Whether it is through with its preparations, of which seccomp is the last (proc_pid_status(5))."""
    if passt.poll() is not None:
        raise RunFailed(f"passt ended: {Path(f'/tmp/passt_{number}.log').read_text()}")
    return "Seccomp:\t2" in Path(f"/proc/{passt.pid}/status").read_text()


@contextlib.contextmanager
def silent_listeners(count: int, environment: dict[str, str]) -> Iterator[None]:
    """Listeners on the lowest names that accept, read, and say nothing."""
    command = [sys.executable, str(Path(__file__).resolve()), "listen", str(count)]
    with contextlib.ExitStack() as stack:
        for number in range(1, count + 1):
            stack.callback(Path(path_of(number)).unlink, missing_ok=True)
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        stack.enter_context(ended(child))
        assert child.stdout is not None
        with child.stdout as said:
            if not said.readline():
                raise RunFailed("the silent listeners do not listen")
        yield


def listen(count: int) -> int:
    """Be :func:`silent_listeners`, until killed."""
    poll = select.epoll()
    open_sockets = {}
    listeners = set()
    for number in range(1, count + 1):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path_of(number))
        listener.listen(128)
        listeners.add(listener.fileno())
        open_sockets[listener.fileno()] = listener
        poll.register(listener, select.EPOLLIN)
    print("listening", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd in listeners:
                client, _address = open_sockets[fd].accept()
                open_sockets[client.fileno()] = client
                poll.register(client, select.EPOLLIN)
                continue
            with contextlib.suppress(ConnectionError):
                if open_sockets[fd].recv(4096):
                    continue
            open_sockets.pop(fd).close()


# --- those who claim ----------------------------------------------------------------------------------


def start_processes(
    command: Sequence[str], count: int, environment: dict[str, str]
) -> tuple[list[str], float]:
    """So many ``qrap 5 CMD`` at once: the paths of those that started CMD, and the ms until the last of them did."""
    with contextlib.ExitStack() as stack:
        reports, stdout = os.pipe()
        reader = stack.enter_context(open(reports, "rb", buffering=0))  # noqa: PTH123 - a descriptor
        running = {}
        with open(stdout, "wb") as writer:  # noqa: PTH123 - a descriptor
            for number in range(count):
                with Path(f"/tmp/stderr-{number}").open("wb") as stderr:
                    child = subprocess.Popen(
                        ["sh", "-c", _GATE, "sh", *command, "5", "sh", "-c", _STAND_IN],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=writer,
                        stderr=stderr,
                    )
                stack.enter_context(ended(child))
                running[child.pid] = number
        for pid in running:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        opened = time.monotonic()
        for pid in running:
            os.kill(pid, signal.SIGCONT)
        started, last = _started(reader.fileno(), list(running))
        said = {pid: Path(f"/tmp/stderr-{number}").read_text() for pid, number in running.items()}
    for pid in running.keys() - started:
        if command[0] == sys.executable:
            print(f"probe: qrap started no CMD: {said[pid].strip()}", file=sys.stderr)
    found = [re.search(r"^Connected to (\S+)$", said[pid], re.MULTILINE) for pid in started]
    return [match[1] for match in found if match], 1000 * (last - opened)


def _started(reports: int, pids: Sequence[int]) -> tuple[set[int], float]:
    """Wait until each has started its CMD or ended without; who did, and when the last one did."""
    started: set[int] = set()
    last = 0.0
    deadline = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        fds = {stack.enter_context(pidfd(pid)): pid for pid in pids}
        poll = select.poll()
        for fd in (reports, *fds):
            poll.register(fd, select.POLLIN)
        waited_for = set(pids)
        while waited_for:
            ready = [fd for fd, _ in poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))]
            if not ready:
                raise RunFailed(
                    f"{len(waited_for)} of {len(pids)} neither start CMD nor end in {TIMEOUT:g} s"
                )
            if reports in ready:
                last = time.monotonic()
                # A line is written as a whole; all are far less than a pipe holds.
                started.update(map(int, os.read(reports, 65536).split()))
                waited_for -= started
                continue
            for fd in ready:
                poll.unregister(fd)
                waited_for.discard(fds[fd])
    return started, last


def start_tasks(count: int, environment: dict[str, str]) -> tuple[list[str], float]:
    """As :func:`start_processes`, but by so many tasks of one new process, whose own start does not count."""
    command = [sys.executable, str(Path(__file__).resolve()), "claim", str(count)]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with ended(child):
        try:
            said = child.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{count} claims inside one process do not end in {TIMEOUT:g} s") from None
    if child.returncode:
        raise RunFailed(f"{count} claims inside one process ended with {child.returncode}")
    result: dict[str, Any] = json.loads(said)
    return result["paths"], result["ms"]


def claim_by_tasks(count: int) -> int:
    """Claim by so many tasks at once, all held to the end, and print what came of it."""
    import anyio

    from qrapd.errors import QrapdError
    from qrapd.probe import Claim, claim

    claims: list[Claim] = []
    last = 0.0

    async def claim_one() -> None:
        nonlocal last
        try:
            claims.append(await claim())
            last = time.monotonic()
        except QrapdError as error:
            print(f"probe: claim failed: {error}", file=sys.stderr)

    async def claim_all() -> float:
        started = time.monotonic()
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(claim_one)
        return started

    started = anyio.run(claim_all)
    print(json.dumps({"paths": [each.path for each in claims], "ms": 1000 * (last - started)}))
    return 0


def run_whole(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a program to its end: ms of wall time, and of CPU."""
    started = time.monotonic()
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _pid, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.stderr is not None
    with child.stderr as said:
        if child.returncode:
            raise RunFailed(f"{command} ended with {child.returncode}: {said.read().decode()}")
    return 1000 * wall, 1000 * (usage.ru_utime + usage.ru_stime)


# --- all runs -----------------------------------------------------------------------------------------


class Bench:
    """The sides, and what they were measured to take."""

    def __init__(self, environment: dict[str, str]) -> None:
        script = Path(sys.executable).with_name("qrap")
        if not script.exists():
            raise RunFailed(f"{script} is not installed: run make setup")
        self.environment = environment
        self.programs = {_QRAP: [sys.executable, str(script)]}
        # A qrap that is a script is none of passt's.
        if _C_PROGRAM.is_file() and _C_PROGRAM.read_bytes()[:4] == b"\x7fELF":
            self.programs[_C] = [str(_C_PROGRAM)]
        self.sides = [side for side in (_QRAP, _CLAIM, _C) if side == _CLAIM or side in self.programs]
        self.samples: list[Sample] = []

    def warm(self) -> None:
        """Compile every module; not counted."""
        with passts([1]):
            self._start(_QRAP, 1)
            wait_until_free([1])
            self._start(_CLAIM, 1)

    def _start(self, side: str, count: int) -> tuple[list[str], float]:
        if side == _CLAIM:
            return start_tasks(count, self.environment)
        return start_processes(self.programs[side], count, self.environment)

    def herds(self) -> None:
        """As many at once as there are passts, new ones for each side."""
        for kind, options in PASSTS.items():
            for count in HERDS:
                for side in self.sides:
                    with passts(range(1, count + 1), options):
                        paths, wall = self._start(side, count)
                    self.samples.append(
                        Sample("herd", side, wall if paths else None, count, kind, len(set(paths)))
                    )

    def silent(self, *, is_first: bool) -> None:
        """One good socket above silent ones."""
        for count in SILENT:
            numbers = range(1, count + 2)
            for side in self.sides:
                if side == _C and count == C_IS_PATIENT and not is_first:
                    continue
                with silent_listeners(count, self.environment), passts([count + 1]):
                    paths, wall = self._start(side, 1)
                if paths != [path_of(numbers[-1])]:
                    raise RunFailed(f"{side} connected to {paths} and not to {path_of(numbers[-1])}")
                self.samples.append(Sample("silent", side, wall, count))

    def plain(self) -> None:
        """One good socket and nothing else; programs in turn, so that whatever else happens meets all alike."""
        commands = {_BARE: [sys.executable, "-c", "pass"]}
        commands |= {side: [*program, "5", "true"] for side, program in self.programs.items()}
        with passts([1]):
            for _ in range(PLAIN_IN_A_RUN):
                for side, command in commands.items():
                    wall, cpu = run_whole(command, self.environment)
                    self.samples.append(Sample("plain", side, wall, cpu_ms=cpu))
                    wait_until_free([1])


def measure(runs: int) -> list[Sample]:
    """All parts, ``runs`` times."""
    with tempfile.TemporaryDirectory(prefix="qrapd-probe-") as scratch:
        bench = Bench(warm_environment(Path(scratch)))
        bench.warm()
        for number in range(runs):
            bench.herds()
            bench.silent(is_first=number == 0)
            bench.plain()
    return bench.samples


# --- what is told -------------------------------------------------------------------------------------


def tell(samples: Sequence[Sample], load: float) -> None:
    """Print the tables: the median of each, with the least and the most."""
    sides = [side for side in (_QRAP, _CLAIM, _C) if any(each.side == side for each in samples)]
    titles = {_QRAP: "qrap, N processes", _CLAIM: "claim, N tasks", _C: "C program, N processes"}
    cells: dict[tuple[str, str, int, str], list[Sample]] = collections.defaultdict(list)
    for each in samples:
        cells[each.part, each.passts, each.n, each.side].append(each)
    header = "".join(f"{titles[side]:>34}" for side in sides)
    print(f"{'herd: N of each':20}{header}")
    for kind in PASSTS:
        for n in HERDS:
            row = "".join(f"{_herd_cell(cells['herd', kind, n, side]):>34}" for side in sides)
            print(f"  {n:2}, {kind}".ljust(20) + row)
    print(f"\n{'silent: N = 1':20}{header}")
    for n in SILENT:
        row = "".join(f"{_times(cells['silent', 'persistent', n, side]):>34}" for side in sides)
        print(f"  {n:2} silent ones".ljust(20) + row)
    titles_of_plain = f"{'wall ms':>34}{'CPU ms':>24}{'wall ratio':>12}{'CPU ratio':>12}"
    print(f"\n{'plain':20}{titles_of_plain}")
    bare = cells["plain", "persistent", 1, _BARE]
    for side, name in ((_BARE, _BARE), (_QRAP, "qrap 5 true"), (_C, "C's qrap 5 true")):
        if several := cells["plain", "persistent", 1, side]:
            print(f"  {name:18}{_times(several, 1):>34}" + _ratios(several, bare))
    runs = len(cells["herd", "persistent", 1, _QRAP])
    plural = "" if runs == 1 else "s"
    print(f"ms, p50 (least to most) of {runs} run{plural}; load average before them {load:.1f}")


def _herd_cell(samples: Sequence[Sample]) -> str:
    counts = sorted(each.started for each in samples)
    least, most = counts[0], counts[-1]
    number = str(least) if least == most else f"{least} to {most}"
    return f"{number} of {samples[0].n}; {_times(samples)}"


def _times(samples: Sequence[Sample], digits: int = 0) -> str:
    times = [each.wall_ms for each in samples if each.wall_ms is not None]
    if not times:
        return "-"
    return spread(times, digits) if len(times) > 1 else f"{times[0]:.{digits}f}"


def _ratios(samples: Sequence[Sample], bare: Sequence[Sample]) -> str:
    cpu = f"{spread([each.cpu_ms or 0.0 for each in samples], 1):>24}"
    if samples is bare:
        return cpu
    pairs = list(zip(samples, bare, strict=True))
    walls = statistics.median((each.wall_ms or 0.0) / (base.wall_ms or 1.0) for each, base in pairs)
    cpus = statistics.median((each.cpu_ms or 0.0) / (base.cpu_ms or 1.0) for each, base in pairs)
    return f"{cpu}{walls:>12.2f}{cpus:>12.2f}"


def measure_here() -> int:
    """Measure and tell. No time fails, only a run that does, or one of ours that got no passt."""
    asked = arguments(__doc__, runs=5)
    hide_tmp()
    load = os.getloadavg()[0]  # afterwards it is what the herds have made of it
    samples = measure(asked.runs)
    if asked.json:
        print(json.dumps([asdict(sample) for sample in samples], indent=2))
    else:
        tell(samples, load)
    lost = [each for each in samples if each.part == "herd" and each.side != _C and each.started < each.n]
    for each in lost:
        print(f"probe: {each.side}: {each.started} of {each.n} ({each.passts})", file=sys.stderr)
    return 1 if lost else 0


def main() -> int:
    """Play the part that the first argument names: as which this program is started by itself; or be the first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    parts: dict[str, Callable[[], int]] = {
        "measure": measure_here,
        "listen": lambda: listen(int(sys.argv[1])),
        "claim": lambda: claim_by_tasks(int(sys.argv[1])),
    }
    try:
        if sys.argv[1:2] and sys.argv[1] in parts:
            return parts[sys.argv.pop(1)]()
        return measure_apart(arguments(__doc__, runs=5))
    except RunFailed as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
