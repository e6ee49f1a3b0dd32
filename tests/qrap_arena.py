# SPDX-License-Identifier: GPL-2.0-or-later
"""A place where a qrap can be run up to the start of its QEMU, and what that QEMU would find is recorded.

qrap has fixed paths in /tmp, so the arena is a process in mount and network namespaces of its own (the kernel
lists who listens on a path by network namespace): nothing touches the host's, and any number of arenas run at once.
It traces the qrap: at the exec of QEMU, before its first instruction, the kernel tells argv, environment, descriptors
and signals as they are, for any program in QEMU's place, and there the process is killed.

A process by itself; requests and records are lines of JSON on its stdin and stdout.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SOCKET = "/tmp/passt_2.socket"
"""where the arena's passt listens; not the first name, so that both programs have one to pass over"""

TREE = Path("/tmp/tree")
"""below it a request's files are made, and there qrap is started"""

# ptrace(2), linux/ptrace.h
PTRACE_TRACEME, PTRACE_CONT, PTRACE_SETOPTIONS = 0, 7, 0x4200
PTRACE_O_TRACEEXEC, PTRACE_O_EXITKILL, PTRACE_EVENT_EXEC = 0x10, 0x100000, 4
PIDFD_GETFD = 438  # the same number on all architectures

# An ARP reply of 42 bytes, behind its length: what makes a passt of the listener.
ANSWER = struct.pack("!I6s6sH", 42, b"\xff" * 6, b"\x9a\x55" * 3, 0x0806)
ANSWER += struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, b"\x9a\x55" * 3, bytes(4), b"\xff" * 6, bytes(4))

LIMIT = 30
"""seconds after which a qrap is ended by SIGALRM"""


@dataclass(frozen=True)
class Request:
    """One run. The paths of files are relative to the directory in which it is started."""

    program: Sequence[str]
    """argv: the first is also the path to execute"""
    environment: Sequence[tuple[str, str]] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """path: ``program``, ``script`` (without #!), ``plain`` (not executable), ``directory`` or ``loop`` (to itself)"""
    inherited: Sequence[int] = ()
    """descriptors that are open besides 0, 1 and 2"""
    closed: Sequence[int] = ()
    """of 0, 1 and 2 those that are not"""
    ignored: Sequence[int] = ()
    blocked: Sequence[int] = ()
    has_passt: bool = True
    files_limit: int = 1024
    """RLIMIT_NOFILE"""


@dataclass(frozen=True)
class Record:
    """What came of it: the state at QEMU's start, or how the program ended without one."""

    status: int | None
    """as of wait(2), negative for a signal; None if a QEMU was started"""
    stderr: str
    argv: Sequence[str] = ()
    executable: str = ""
    environment: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """number: what it is, and its flags; a passt's stream is called that, with its time limits and what can be read"""
    signals: Mapping[str, str] = field(default_factory=dict)
    """the masks of /proc/PID/status"""


class Arena:
    """The test's side: starts the process of its own, asks it, and ends it."""

    def __init__(self) -> None:
        unshare = ["unshare", "--mount", "--propagation", "private", "--net"]
        if os.geteuid() != 0:
            unshare.append("--map-root-user")
        self._process = subprocess.Popen(
            [*unshare, sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, request: Request) -> Record:
        """Run one qrap."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise OSError(f"the arena ended: {self._process.communicate()[1].decode()}")
        return Record(**json.loads(line))

    def close(self) -> None:
        """End it, and all that it has started."""
        self._process.communicate()


# ---- from here on in the namespace

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int = 0, data: int = 0) -> None:
    """ptrace(2) as far as it is needed here."""
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def make_private_tmp() -> None:
    """An empty /tmp, and an empty /usr/libexec; what Python needs of /tmp is still there."""
    needed = {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parent.parent}
    needed = {path for path in needed if path.is_relative_to("/tmp")}
    held = {path: os.open(path, os.O_PATH) for path in needed}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/tmp"], check=True)
    for path, number in held.items():
        path.mkdir(parents=True)
        subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/fd/{number}", path], check=True)
        os.close(number)
    if Path("/usr/libexec").is_dir():
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/usr/libexec"], check=True)


def serve_passt(listener: socket.socket) -> None:
    """Answer the first word of each client, and hang up when it does."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    selector.register(client, selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                try:
                    said = key.fileobj.recv(4096)
                    if said:
                        key.fileobj.send(ANSWER)
                except OSError:
                    said = b""
                if not said:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


@contextmanager
def passt() -> Iterator[None]:
    """A process that listens like a passt, as long as the arena lives."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen(64)
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            serve_passt(listener)
        os._exit(0)
    listener.close()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


_made: Mapping[str, str] | None = None


def make_tree(files: Mapping[str, str]) -> None:
    """The files of a request, in place of those of the one before."""
    global _made
    if files == _made:
        return
    _made = files
    shutil.rmtree(TREE, ignore_errors=True)
    libexec = Path("/usr/libexec")
    if os.path.ismount(libexec):
        for left in libexec.iterdir():
            left.unlink()
    TREE.mkdir()
    for name, kind in files.items():
        path = TREE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match kind:
            case "program":
                path.symlink_to(shutil.which("true") or "/bin/true")
            case "loop":
                path.symlink_to(path.name)
            case "directory":
                path.mkdir()
            case _:
                path.write_text("exit 0\n")
                path.chmod(0o755 if kind == "script" else 0o644)


def become_qrap(request: Request, stderr: int) -> None:
    """In the child: descriptors, signals and environment as the request has them, then the program."""
    os.setsid()
    above = 200
    null = os.open("/dev/null", os.O_RDWR)
    ready = {0: os.dup2(null, above), 1: os.dup2(null, above + 1), 2: os.dup2(stderr, above + 2)}
    for number in request.inherited:
        ready[number] = os.dup2(os.memfd_create(f"caller-{number}"), above + 3 + len(ready))
    os.closerange(0, above)
    for number, source in ready.items():
        if number not in request.closed:
            os.dup2(source, number)
    os.closerange(above, above + 50)
    for each in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # what Python has changed: pylifecycle.c
        signal.signal(each, signal.SIG_DFL)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (request.files_limit, hard))
    os.chdir(TREE)
    signal.alarm(LIMIT)
    ptrace(PTRACE_TRACEME)
    os.kill(os.getpid(), signal.SIGSTOP)
    # Keys may be there twice, which a dictionary could not say.
    words = [os.fsencode(word) for word in request.program]
    pairs = [os.fsencode(f"{name}={value}") for name, value in request.environment]
    argv = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    environment = (ctypes.c_char_p * (len(pairs) + 1))(*pairs, None)
    _libc.execve(words[0], argv, environment)
    os.write(2, os.strerror(ctypes.get_errno()).encode())


def run(request: Request) -> Record:
    """Run a qrap up to the exec of its QEMU, or to its end."""
    make_tree(request.files)
    hidden = SOCKET + ".hidden"
    if not request.has_passt:
        Path(SOCKET).rename(hidden)
    stderr = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        try:
            become_qrap(request, stderr)
        finally:
            os._exit(127)
    try:
        return watch(pid, stderr)
    finally:
        os.close(stderr)
        if not request.has_passt:
            Path(hidden).rename(SOCKET)


def watch(pid: int, stderr: int) -> Record:
    """Follow a process to its second exec, the first being its own."""
    execs = 0
    while True:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return Record(os.waitstatus_to_exitcode(status), read(stderr))
        number, event = os.WSTOPSIG(status), status >> 16
        if execs == 0 and number == signal.SIGSTOP:
            ptrace(PTRACE_SETOPTIONS, pid, PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL)
            number = 0
        elif event == PTRACE_EVENT_EXEC:
            execs += 1
            number = 0
            if execs == 2:
                record = look(pid, read(stderr))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return record
        ptrace(PTRACE_CONT, pid, number)


def read(file: int) -> str:
    """All that was written to a memory file."""
    return os.fsdecode(os.pread(file, 1 << 20, 0))


def look(pid: int, stderr: str) -> Record:
    """What a stopped process has been given."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return Record(
        status=None,
        stderr=stderr,
        argv=os.fsdecode((proc / "cmdline").read_bytes()).split("\0")[:-1],
        executable=str((proc / "exe").readlink()),
        environment=os.fsdecode((proc / "environ").read_bytes()).split("\0")[:-1],
        files={each.name: describe(pid, int(each.name)) for each in (proc / "fd").iterdir()},
        signals={name: status[name].strip() for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")},
    )


def describe(pid: int, number: int) -> str:
    """What an open descriptor of a stopped process is."""
    target = str(Path(f"/proc/{pid}/fd/{number}").readlink())
    info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
    flags = next(line.split()[1] for line in info.splitlines() if line.startswith("flags:"))
    if not target.startswith("socket:"):
        return f"{target} {flags}"
    pidfd = os.pidfd_open(pid)
    copy = _libc.syscall(PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    if copy < 0:
        raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])
    with socket.socket(fileno=copy) as stream:
        peer = stream.getpeername()
        limits = [
            struct.unpack("ll", stream.getsockopt(socket.SOL_SOCKET, each, 16))
            for each in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
        ]
        waiting = len(stream.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return f"stream of {peer} {flags} limits {limits} to be read {waiting}"


def main() -> None:
    """Serve requests until stdin ends."""
    make_private_tmp()
    with passt():
        for line in sys.stdin:
            asked: dict[str, Any] = json.loads(line)
            sys.stdout.write(json.dumps(asdict(run(Request(**asked)))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
