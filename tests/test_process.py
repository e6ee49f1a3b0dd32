# SPDX-License-Identifier: GPL-2.0-or-later
"""Children: started whole or not at all, never blocked by their output, and seen off for certain."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from qrapd.process import (
    ExitStatus,
    Process,
    has_ended,
    open_pidfd,
    pid_of,
    read_lines,
    spawn,
    start_time,
)

PATIENCE = 30.0


@asynccontextmanager
async def running(argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> AsyncIterator[Process]:
    """A child that is gone afterwards, whatever happens."""
    process = await spawn(argv, pass_fds=pass_fds)
    try:
        with anyio.fail_after(PATIENCE):
            yield process
    finally:
        with anyio.CancelScope(shield=True):
            process.send_signal(signal.SIGKILL)
            await process.wait()
        process.close()


def python(program: str) -> list[str]:
    """A command line that runs a program in this interpreter, with little of it."""
    return [sys.executable, "-S", "-c", f"import os, signal, sys\n{program}"]


async def output(process: Process) -> list[str]:
    """All lines of a child."""
    return [line async for line in read_lines(process.output)]


async def first_line(process: Process) -> str:
    """Wait until a child says that it is ready."""
    while True:
        await anyio.wait_readable(process.output)
        if words := os.read(process.output, 1000):
            return words.decode().strip()


def name_of(process: Process) -> bytes:
    """What the kernel calls a process."""
    return Path(f"/proc/{process.pid}/comm").read_bytes().removesuffix(b"\n")


def open_fds() -> set[str]:
    """What this process has open."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}  # noqa: PTH110, PTH208


def children() -> set[int]:
    """The pids of this process's children, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


async def test_stdout_and_stderr_come_as_lines() -> None:
    """Both go into one pipe, in the order in which they were written; the last line needs no end."""
    async with running(["sh", "-c", "echo one; echo two >&2; printf three"]) as process:
        assert ["one", "two", "three"] == await output(process)
        assert ExitStatus(exit_code=0) == await process.wait()


async def test_output_that_nobody_reads_blocks_no_child() -> None:
    """A child that writes 10 MB into a full pipe loses them, and ends when it likes."""
    write = """
lost = 0
for _ in range(160):
    try:
        os.write(1, bytes(65536))
    except BlockingIOError:
        lost += 1
sys.exit(0 if lost > 100 else 1)
"""
    async with running(python(write)) as process:
        assert ExitStatus(exit_code=0) == await process.wait()
        os.close(process.output)


async def test_a_child_has_only_the_fds_that_it_is_given() -> None:
    """stdin, stdout, stderr, and those named: nothing of the VMs beside it."""
    given, other = socket.socketpair()
    with given, other:
        os.set_inheritable(other.fileno(), True)
        show = """
fds = sorted(map(int, os.listdir("/proc/self/fd")))
print(*(fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")))  # but for the one of this listing
"""
        async with running(python(show), pass_fds=[given.fileno()]) as process:
            assert [f"0 1 2 {given.fileno()}"] == await output(process)


async def test_a_childs_surroundings() -> None:
    """A session of its own, stdin at its end, output non-blocking, the directory and environment that were given."""
    show = """
print(os.getsid(0) == os.getpid(), os.readlink("/proc/self/fd/0"))
print(os.get_blocking(1), os.get_blocking(2), os.getcwd(), os.environ.get("COLOUR"))
"""
    process = await spawn(python(show), directory="/proc", environment={"COLOUR": "red"})
    assert ["True /dev/null", "False False /proc red"] == await output(process)
    await process.end(PATIENCE)
    process.close()


async def test_sigpipe_is_ignored_in_a_child() -> None:
    """passt 2023-03 would die of it once nobody reads its stderr."""
    async with running(["grep", "SigIgn", "/proc/self/status"]) as process:
        (line,) = await output(process)
        assert int(line.split()[1], 16) & 1 << (signal.SIGPIPE - 1)


@pytest.mark.parametrize(
    ("program", "expected", "words", "fields"),
    [
        ("exit 0", ExitStatus(exit_code=0), "exit status 0", {"exit_code": 0}),
        ("exit 7", ExitStatus(exit_code=7), "exit status 7", {"exit_code": 7}),
        ("kill -TERM $$", ExitStatus(signal=15), "killed by SIGTERM", {"signal": 15}),
        ("kill -40 $$", ExitStatus(signal=40), "killed by signal 40", {"signal": 40}),
    ],
)
async def test_how_a_child_ended(
    program: str, expected: ExitStatus, words: str, fields: dict[str, int]
) -> None:
    """By its own exit code or by a signal; wait() says so as often as it is asked."""
    async with running(["sh", "-c", program]) as process:
        assert [] == await output(process)
        for _ in range(2):
            assert expected == await process.wait()
        assert not process.alive
    assert (words, fields) == (str(expected), expected.fields)


async def test_several_tasks_may_wait() -> None:
    """All of them are told."""
    ends: list[ExitStatus] = []

    async def wait(process: Process) -> None:
        ends.append(await process.wait())

    async with running(["sleep", "60"]) as process, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(wait, process)
        await anyio.lowlevel.checkpoint()
        assert process.alive
        process.send_signal(signal.SIGINT)
    assert [ExitStatus(signal=signal.SIGINT)] * 3 == ends
    os.close(process.output)


async def test_children_that_end_at_once() -> None:
    """A child may be gone, and collected, before spawn() returns: that is no failure of spawn()."""
    await (await spawn(["true"])).end(PATIENCE)  # what asyncio opens once is open now
    for _ in range(100):
        process = await spawn(["true"])
        assert ExitStatus(exit_code=0) == await process.wait()
        process.send_signal(signal.SIGKILL)
        process.close()
        os.close(process.output)


async def test_end_waits_for_a_child_that_goes_by_itself() -> None:
    """No signal is sent to one that goes within the grace."""
    async with running(["sh", "-c", "exit 3"]) as process:
        assert ExitStatus(exit_code=3) == await process.end(PATIENCE)
    os.close(process.output)


@pytest.mark.parametrize(("handler", "expected"), [("SIG_DFL", signal.SIGTERM), ("SIG_IGN", signal.SIGKILL)])
async def test_end_takes_rougher_steps(handler: str, expected: signal.Signals) -> None:
    """SIGTERM after the grace, and SIGKILL after it once more, for one that ignores SIGTERM."""
    stay = f"signal.signal(signal.SIGTERM, signal.{handler})\nprint('ready', flush=True)\nwhile 1: signal.pause()"
    async with running(python(stay)) as process:
        assert "ready" == await first_line(process)
        assert ExitStatus(signal=expected) == await process.end(0.05)
    os.close(process.output)


async def test_signals_after_the_end_do_no_harm() -> None:
    """To an ended process, to a closed one, and twice closed: nothing happens."""
    async with running(["true"]) as process:
        await process.wait()
        process.send_signal(signal.SIGKILL)
        process.close()
        process.send_signal(signal.SIGKILL)
    os.close(process.output)


async def test_a_cancelled_spawn_leaves_no_child_without_an_owner() -> None:
    """Wherever the cancellation comes, the child is in the hands of the caller afterwards."""
    before, chance = children(), random.Random(2)
    for _ in range(40):
        process = None
        with anyio.move_on_after(chance.uniform(0, 0.004)):
            process = await spawn(["sleep", "60"])
        assert process is not None
        process.send_signal(signal.SIGKILL)
        assert ExitStatus(signal=signal.SIGKILL) == await process.wait()
        process.close()
        os.close(process.output)
    assert before == children()


async def test_a_program_that_is_missing() -> None:
    """OSError, and neither a child nor an open fd is left."""
    await (await spawn(["true"])).end(PATIENCE)  # what asyncio opens once is open now
    before, others = open_fds(), children()
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            await spawn(["/nowhere/program"])
        with pytest.raises(FileNotFoundError):
            await spawn(["true"], directory="/nowhere")
        with pytest.raises(PermissionError):
            await spawn(["/etc/passwd"])
    assert before == open_fds()
    assert others == children()


async def test_all_fds_are_given_back() -> None:
    """A child's whole life leaves as many fds open as there were."""

    async def live() -> set[str]:
        async with running(["echo", "x"]) as process:
            assert ["x"] == await output(process)
        return open_fds()

    assert await live() == await live()


async def test_no_thread_per_child() -> None:
    """Children are watched by pidfd, also under Python 3.11, whose default is a thread for each."""
    before = threading.active_count()
    async with running(["sleep", "60"]) as first, running(["sleep", "60"]) as second:
        assert before == threading.active_count()
    for process in (first, second):
        os.close(process.output)


async def test_a_writer_without_pauses_holds_up_nobody() -> None:
    """Other tasks run, and a cancellation arrives, while there is always something to read."""
    endless = os.open("/dev/zero", os.O_RDONLY)
    with anyio.move_on_after(0.05) as scope:
        async for _ in read_lines(endless):
            pass
    assert scope.cancelled_caught
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(endless)


async def test_reading_ends_with_a_reset() -> None:
    """A console's socket whose peer is gone with bytes unread: that is an end, no error."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    ours.send(b"unread")
    peer.send(b"last words")
    peer.close()
    assert ["last words"] == [line async for line in read_lines(ours.detach())]


@pytest.mark.parametrize("name", [b"plain", b"a) b (c", b") R 1 2", b"\xff\xfe", b"two\nlines"])
async def test_start_times_whatever_the_program_is_called(name: bytes) -> None:
    """The name in /proc/PID/stat may hold anything, and changes nothing."""
    rename = f"open('/proc/self/comm', 'wb').write({name!r})\nprint('ready', flush=True)\nsignal.pause()"
    async with running(python(rename)) as process:
        assert "ready" == await first_line(process)
        assert name == name_of(process)
        assert process.start_time == start_time(process.pid)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_time / os.sysconf("SC_CLK_TCK")
        assert -1 < age < PATIENCE
    os.close(process.output)
    with pytest.raises(ProcessLookupError):
        start_time(process.pid)


def test_start_times_tell_processes_apart() -> None:
    """This process started after the first one."""
    assert start_time(1) < start_time(os.getpid())


# ---- who has a pid


async def test_a_pidfd_tells_whose_it_is() -> None:
    """For as long as there is such a process; an end that nobody has collected yet is one."""
    async with running(python("sys.stdin.read(); print('there', flush=True); signal.pause()")) as process:
        await first_line(process)
        pidfd = os.dup(process.pidfd)
        try:
            assert (process.pid, False) == (pid_of(pidfd), has_ended(pidfd))
            process.send_signal(signal.SIGKILL)
            await process.wait()
            assert (-1, True) == (pid_of(pidfd), has_ended(pidfd))
        finally:
            os.close(pidfd)
    with socket.socket() as other:
        assert 0 == pid_of(other.fileno())


@pytest.mark.parametrize("name", ["open_pidfd", "start_time"])
async def test_no_fd_to_watch_a_child_by(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not left without an owner, and no fd is leaked."""

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with running(["true"]) as process:  # whatever asyncio makes for its first child
        await process.wait()
        os.close(process.output)
    fds, known = open_fds(), children()
    with monkeypatch.context() as patched:
        patched.setattr(f"qrapd.process.{name}", refuse)
        with anyio.fail_after(PATIENCE), pytest.raises(OSError, match="Too many open files"):
            await spawn(["sleep", "1000"])
    assert (fds, known) == (open_fds(), children())


def test_a_threads_id_is_no_process() -> None:
    """A pid that was given to a thread of somebody's."""
    over, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        begun.wait()
        assert thread.native_id is not None
        with pytest.raises(ProcessLookupError):
            open_pidfd(thread.native_id)
    finally:
        over.set()
        thread.join()


HIDE = "mount -t proc -o hidepid=invisible proc /proc"
"""In a mount namespace of one's own: /proc then hides from everyone but root what is not theirs."""


def test_a_process_that_proc_hides(nobodys_python: list[str]) -> None:
    """It is there, and one that has ended is not."""
    program = "from qrapd.process import *\n"
    program += "import os, subprocess\n"
    program += "def look(pid):\n"
    program += " try: start_time(pid)\n"
    program += " except ProcessLookupError as error: return type(error).__name__\n"
    program += "child = subprocess.Popen(['true'])\n"
    program += "child.wait()\n"
    program += f"print(look({os.getpid()}), look(child.pid), look(os.getpid()))"
    hidden = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{HIDE} && exec "$@"', "sh"]
    done = subprocess.run(
        [*hidden, *nobodys_python, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ("Hidden ProcessLookupError None\n", "") == (done.stdout, done.stderr)
