# SPDX-License-Identifier: GPL-2.0-or-later
"""A place for one test of the probe: paths of its own, real passts, and listeners that are none."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import anyio
import pytest

from qrapd.errors import Unavailable
from qrapd.frames import is_answer, split_frames
from qrapd.probe import Claim, claim, default_paths
from qrapd.unix_sockets import Kind, look_at
from support import PATIENCE, open_directory

# An ARP reply of 42 bytes behind its length: what makes a passt of a listener.
ANSWER = struct.pack("!I6s6sH", 42, b"\xff" * 6, b"\x9a\x55" * 3, 0x0806)
ANSWER += struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, b"\x9a\x55" * 3, bytes(4), b"\xff" * 6, bytes(4))

# An ARP request: what passts since 2025-09 say unasked.
QUESTION = ANSWER[:24] + b"\0\1" + ANSWER[26:]

LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[-1])
listener.listen()
print(flush=True)
sys.stdin.read()
"""


class Arena:
    """Sockets of one test, ``path(1)`` to ``path(99)``, and what listens on them."""

    def __init__(self, directory: Path) -> None:
        self.pattern = str(directory / "passt_{n}.socket")
        self.paths = default_paths(self.pattern)
        self._stack = ExitStack()

    def path(self, n: int) -> str:
        """The path of the nth candidate."""
        return self.pattern.format(n=n)

    def passt(self, *numbers: int, options: Sequence[str] = (), prefix: Sequence[str] = ()) -> list[Passt]:
        """Real passts, in the foreground unless ``--pid`` is among the options; ``prefix`` goes before the command."""
        started = [Passt(self.path(n), options, prefix) for n in numbers]
        for each in started:
            self._stack.callback(each.close)
        for each in started:
            each.wait_until_it_listens()
        return started

    def listener(self, n: int, serve: Callable[[socket.socket], None] | None = None) -> socket.socket:
        """A listener of this process: with ``serve``, that is called in a thread for each client."""
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self.path(n))
        listener.listen(128)
        if serve:
            thread = threading.Thread(target=self._accept, args=(listener, serve), daemon=True)
            thread.start()
            self._stack.callback(thread.join, PATIENCE)
            self._stack.callback(suppressing, listener.shutdown, socket.SHUT_RDWR)
        return listener

    def program(self, *command: str, n: int) -> subprocess.Popen[bytes]:
        """A program of which :data:`LISTEN` is the heart; its last argument is the nth path."""
        process = subprocess.Popen(
            [*command, self.path(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._stack.callback(process.communicate)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        assert b"\n" == process.stdout.readline()
        return process

    @staticmethod
    def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                with client, suppress(OSError):
                    client.settimeout(PATIENCE)
                    serve(client)

    def close(self) -> None:
        """End all that was started."""
        self._stack.close()


def suppressing(action: Callable[..., object], *arguments: object) -> None:
    """Do it, and do not mind if it cannot be done."""
    with suppress(OSError):
        action(*arguments)


class Passt:
    """A real passt."""

    def __init__(self, path: str, options: Sequence[str], prefix: Sequence[str]) -> None:
        self.path = path
        self._pid_file = Path(path + ".pid") if "--pid" in options else None
        ways = ["--pid", str(self._pid_file)] if self._pid_file else ["--foreground"]
        rest = [option for option in options if option != "--pid"]
        self.process = subprocess.Popen(
            [*prefix, "passt", "-t", "none", "-u", "none", *ways, *rest, "--socket", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        """Its process, also in the background."""
        return int(self._pid_file.read_text()) if self._pid_file else self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs (stopped or not)."""
        if not self._pid_file:
            return self.process.poll() is None
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def wait_until_it_listens(self) -> None:
        """With a deadline; a passt that cannot start here fails the test with its own words."""
        deadline = time.monotonic() + PATIENCE
        while not self._serves():
            if time.monotonic() > deadline or (self.process.poll() or 0) > 0:
                self.process.kill()
                assert self.process.stderr is not None
                pytest.fail(f"passt does not listen: {self.process.stderr.read().decode()}")
            time.sleep(0.005)

    def _serves(self) -> bool:
        """Whether it is through with its preparations, of which seccomp is the last (proc_pid_status(5))."""
        if look_at([self.path])[0].kind not in {Kind.LISTENING, Kind.HIDDEN}:
            return False
        if self._pid_file and self.process.poll() is None:
            return False  # one passt too many as yet
        with suppress(OSError, ValueError):  # no pid file yet, or nothing in it
            return "Seccomp:\t2" in Path(f"/proc/{self.pid}/status").read_text()
        return False

    def wait_for_the_end(self) -> None:
        """With a deadline."""
        deadline = time.monotonic() + PATIENCE
        while self.alive:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        """End it, stopped or not."""
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        if self.process.stderr and not self.process.stderr.closed:
            self.process.kill()
            self.process.communicate()


@contextmanager
def open_arena() -> Iterator[Arena]:
    """A directory where a passt that has become nobody can make its socket: the one of 2023 changes first."""
    with open_directory() as directory:
        directory.chmod(0o777)
        arena = Arena(directory)
        try:
            yield arena
        finally:
            arena.close()


def assert_usable(found: Claim) -> None:
    """The stream is connected, blocking, not inherited, and the whole answer is in it still."""
    with found.socket as stream:
        assert stream.getblocking()
        assert not stream.get_inheritable()
        frames = list(split_frames(stream.recv(65536, socket.MSG_PEEK)))
        assert [] != [frame for frame in frames if is_answer(frame)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel's tables will show; they tell nobody by themselves."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await anyio.sleep(0.001)


async def claim_fails(paths: Sequence[str], **options: object) -> Unavailable:
    """The error of a claim that cannot succeed."""
    with pytest.raises(Unavailable) as caught:
        await claim(paths, **options)  # type: ignore[arg-type]  # as claim has them
    return caught.value


def stay_silent(client: socket.socket) -> None:
    """Read all and say nothing."""
    while client.recv(4096):
        pass


def open_fds() -> set[str]:
    """This process's descriptors, by number and by what they are."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is closed by now
            found.add(f"{fd.name} {fd.readlink()}")
    return found
