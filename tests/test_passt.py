# SPDX-License-Identifier: GPL-2.0-or-later
"""One passt, real where it can be: it starts, answers, complains, dies, stays silent, and is seen off."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from scapy.layers.l2 import ARP, Ether

from qrapd import passt as passt_module
from qrapd.errors import Unavailable
from qrapd.frames import parse_mac, sign_of_life_request, split_frames
from qrapd.passt import Passt, command_line, is_noise, suggest
from qrapd.process import ExitStatus, start_time
from support import free_port

MAC = "52:54:00:12:34:56"
PATIENCE = 30.0

# A stand-in that misbehaves at will: its stream is the last argument, as the real one's.
FAKE = """
import os, signal, socket, struct, sys, time
stream = socket.socket(fileno=int(sys.argv[-1]))
def frame(data): return struct.pack("!I", len(data)) + data
"""


@dataclass
class Started:
    """A passt, QEMU's end of its stream, and what it wrote."""

    passt: Passt
    peer: socket.socket
    lines: list[str] = field(default_factory=list)

    async def wait_until_alive(self) -> None:
        """As a link does."""
        await self.passt.wait_until_alive(self.peer, MAC)


@asynccontextmanager
async def started(argv: Sequence[str]) -> AsyncIterator[Started]:
    """A passt that is gone afterwards, whatever happens."""
    peer, theirs = socket.socketpair()
    lines: list[str] = []
    with peer:
        async with anyio.create_task_group() as tasks:
            passt = await Passt.start(argv, theirs, directory=Path("/"), tasks=tasks, tell=lines.append)
            assert -1 == theirs.fileno()  # passt's end is passt's alone: else nobody would see it hang up
            try:
                with anyio.fail_after(PATIENCE):
                    yield Started(passt, peer, lines)
            finally:
                peer.close()
                with anyio.CancelScope(shield=True):
                    await passt.end()
    with pytest.raises(ProcessLookupError):
        start_time(passt.pid)


def fake(program: str) -> list[str]:
    """A program in passt's place."""
    return [sys.executable, "-c", FAKE + program]


async def refusal(found: Started) -> Unavailable:
    """Why this passt will not do."""
    with pytest.raises(Unavailable) as caught:
        await found.wait_until_alive()
    return caught.value


# the real one


async def test_a_real_passt_answers_and_is_seen_off() -> None:
    """It answers within seconds, its port is bound then, and it goes by itself when its stream is closed."""
    port = free_port()
    async with started(["passt", "--tcp-ports", f"127.0.0.1/{port}:80"]) as found:
        await found.wait_until_alive()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        found.peer.close()
        before = time.monotonic()
        assert ExitStatus(exit_code=0) == await found.passt.end()
        assert time.monotonic() - before < passt_module.END_GRACE


async def test_what_is_left_in_the_stream_begins_with_a_whole_frame() -> None:
    """QEMU reads from the stream next: of frames that passt sent, none is taken in part."""
    async with started(["passt"]) as found:
        await found.wait_until_alive()
        found.peer.setblocking(False)
        found.peer.send(sign_of_life_request(parse_mac(MAC)))
        await anyio.wait_readable(found.peer)
        waiting = found.peer.recv(1 << 16)
        whole = list(split_frames(waiting))
        assert len(waiting) == sum(4 + len(frame) for frame in whole)
        assert {0x0806, 0x86DD} >= {int.from_bytes(frame[12:14], "big") for frame in whole}


async def test_a_port_that_is_taken() -> None:
    """passt's own words are quoted, and the hint is about who has the port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with started(["passt", "--tcp-ports", f"127.0.0.1/{port}:80"]) as found:
            error = await refusal(found)
            assert "passt ended at once (exit status 1). It wrote: " in error.message
            assert f"{port}" in error.message
            assert found.lines[-1] in error.message
            assert [] == [line for line in found.lines if is_noise(line)]
            assert "ss -lntup" in str(error.hint)


async def test_an_option_that_passt_refuses() -> None:
    """Whatever it is that passt does not like, it says so, and so do we."""
    async with started(["passt", "--address", "nonsense"]) as found:
        assert "nonsense" in (await refusal(found)).message


async def test_a_real_passt_that_is_killed() -> None:
    """wait() tells how it ended, to several tasks and afterwards."""
    async with started(["passt"]) as found:
        await found.wait_until_alive()
        os.kill(found.passt.pid, signal.SIGKILL)
        assert ExitStatus(signal=signal.SIGKILL) == await found.passt.wait()
        assert ExitStatus(signal=signal.SIGKILL) == await found.passt.end()


async def test_a_passt_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in mid-work it answers neither its stream nor SIGTERM: SIGKILL it is."""
    monkeypatch.setattr(passt_module, "END_GRACE", 0.1)
    async with started(["passt"]) as found:
        await found.wait_until_alive()
        os.kill(found.passt.pid, signal.SIGSTOP)
        found.peer.close()
        assert ExitStatus(signal=signal.SIGKILL) == await found.passt.end()


# stand-ins


async def test_a_program_that_is_missing() -> None:
    """Said with its name; passt's end of the stream is closed all the same."""
    peer, theirs = socket.socketpair()
    with peer:
        async with anyio.create_task_group() as tasks:
            with pytest.raises(
                Unavailable, match=r"^cannot run /nowhere/passt in /: No such file or directory$"
            ):
                await Passt.start(["/nowhere/passt"], theirs, directory=Path("/"), tasks=tasks, tell=print)
        assert -1 == theirs.fileno()
        assert b"" == peer.recv(1)


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        (
            "print('No routable interface', file=sys.stderr); sys.exit(1)",
            "exit status 1",
            "No routable interface",
        ),
        ("stream.recv(1); print('one'); print('two'); sys.exit(3)", "exit status 3", "two"),
        ("stream.recv(1); os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV", "(nothing)"),
        ("sys.exit(0)", "exit status 0", "(nothing)"),
    ],
)
async def test_a_passt_that_ends_while_it_is_waited_for(program: str, status: str, words: str) -> None:
    """How it ended and its last words, also those that it wrote in its last moment."""
    async with started(fake(program)) as found:
        assert f"passt ended at once ({status}). It wrote: {words}" == (await refusal(found)).message


async def test_a_passt_that_hangs_up_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes the stream and lives on does not answer."""
    monkeypatch.setattr(passt_module, "ANSWER_TIMEOUT", 0.5)
    async with started(fake("stream.close()\nsignal.pause()")) as found:
        assert "did not answer within 0.5 s" in (await refusal(found)).message
        os.kill(found.passt.pid, signal.SIGTERM)


async def test_a_silent_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never answers is named with its pid, after the time that it has."""
    monkeypatch.setattr(passt_module, "ANSWER_TIMEOUT", 0.2)
    async with started(fake("signal.pause()")) as found:
        error = await refusal(found)
        expected = f"passt (pid {found.passt.pid}) did not answer within 0.2 s of its start"
        assert expected == error.message
        os.kill(found.passt.pid, signal.SIGTERM)


UNASKED = bytes(Ether(src=MAC) / ARP(op="who-has", psrc="192.0.2.1", pdst="192.0.2.2"))
ANSWER = bytes(Ether(src=MAC) / ARP(op="is-at", psrc="192.0.2.1", pdst="192.0.2.2"))


async def test_a_passt_that_only_asks_has_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 2025-09 passt speaks first: that is no proof that it heard us."""
    monkeypatch.setattr(passt_module, "ANSWER_TIMEOUT", 0.5)
    async with started(fake(f"stream.send(frame({UNASKED!r}))\nsignal.pause()")) as found:
        assert "did not answer" in (await refusal(found)).message
        os.kill(found.passt.pid, signal.SIGTERM)


async def test_an_answer_in_pieces() -> None:
    """Waiting for the rest of a frame costs next to nothing, and what follows the answer stays in the stream."""
    program = f"""
answer = frame({ANSWER!r})
stream.send(frame({UNASKED!r}) + answer[:9])
time.sleep(0.3)
stream.send(answer[9:] + b"\\0\\0\\1")
signal.pause()
"""
    async with started(fake(program)) as found:
        before = time.process_time()
        await found.wait_until_alive()
        assert time.process_time() - before < 0.2
        assert b"\0\0\1" == found.peer.recv(100)
        os.kill(found.passt.pid, signal.SIGTERM)


async def test_lines_are_handed_on_without_noise() -> None:
    """Each line as it comes; what is only about syslog is left out; the last ones are remembered."""
    program = """
print("Failed to send 47 bytes to syslog")
for number in range(30): print("line", number)
"""
    async with started(fake(program)) as found:
        await found.passt.wait()
        assert [f"line {number}" for number in range(30)] == found.lines
        assert [f"line {number}" for number in range(10, 30)] == list(found.passt.words)


# words


def test_the_command_line() -> None:
    """The program and the user's options first, then what is qrapd's business."""
    assert ["passt", "-4", "--foreground", "--fd", "7"] == command_line(["passt", "-4"], 7)
    assert ["passt", "--foreground", "--fd", "LINK0_PASST_FD"] == command_line(["passt"], "LINK0_PASST_FD")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Failed to send 47 bytes to syslog", True),
        ("12.3456: Failed to send 9 bytes to syslog", True),
        ("Failed to bind any port for '-t 80', exiting", False),
        ("", False),
    ],
)
def test_noise(line: str, expected: bool) -> None:
    """Only what is about the copy of a line that went to syslog."""
    assert expected == is_noise(line)


TAKEN = "see who has the port"
TOO_LOW = "ports below 1024 are root's"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Failed to bind any port for '-t 80', exiting", TOO_LOW),
        ("Failed to bind any port for '-t 127.0.0.1/80:8080', exiting", TOO_LOW),
        ("Failed to bind any port for '-u 8000,53', exiting", TOO_LOW),
        ("Failed to bind any port for '-t 1000-1100', exiting", TOO_LOW),
        ("Failed to bind port 80 (Permission denied) for option '-t 80:8080', exiting", TOO_LOW),
        # A low port of the guest's is no matter, nor is a number in an address or in a name.
        ("Failed to bind any port for '-t 8080:80', exiting", TAKEN),
        ("Failed to bind any port for '-t 127.0.0.1/8080:80', exiting", TAKEN),
        ("Failed to bind any port for '-t 2001:db8::1/8080:80', exiting", TAKEN),
        ("Failed to bind any port for '-t 192.0.2.1%eth1/8080', exiting", TAKEN),
        ("Failed to bind any port for '-t 8000-8010:80-90', exiting", TAKEN),
        ("Failed to bind any port for '-t 8000-8010,~80', exiting", TAKEN),
        ("Failed to bind port 8080 (Address already in use) for option '-t 8080:80', exiting", TAKEN),
        ("Failed to bind", TAKEN),
        ("Failed to create user namespace", "user namespaces"),
        ("Failed to sandbox process", "user namespaces"),
        ("Something else", "qrapd plan"),
        ("(nothing)", "qrapd plan"),
    ],
)
def test_suggestions(words: str, expected: str) -> None:
    """What to do depends on what passt complains about, and on which ports of the host."""
    assert expected in str(suggest(words, unprivileged=True, first_free_port=1024))


def test_suggestions_depend_on_who_runs_passt() -> None:
    """root may have any port, and so may all above the host's limit; the remedy names the port that is wanted."""
    words = "Failed to bind any port for '-t 80,443', exiting"
    assert TAKEN in str(suggest(words, unprivileged=False, first_free_port=1024))
    assert TAKEN in str(suggest(words, unprivileged=True, first_free_port=80))
    assert "net.ipv4.ip_unprivileged_port_start=80" in str(
        suggest(words, unprivileged=True, first_free_port=1024)
    )
    assert suggest(words) in {
        suggest(words, unprivileged=os.geteuid() != 0, first_free_port=limit) for limit in (0, 80, 443, 1024)
    }
