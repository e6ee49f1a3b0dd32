# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever sits on a passt's name without being one does no harm, and is told as what it is."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from probe_arena import (
    ANSWER,
    LISTEN,
    QUESTION,
    Arena,
    assert_usable,
    claim_fails,
    open_arena,
    open_fds,
    stay_silent,
    until,
)
from qrapd.probe import State, claim, claiming, look
from qrapd.unix_sockets import look_at
from support import NOBODY


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Paths of this test's own, and what listens there."""
    with open_arena() as arena:
        yield arena


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for those that are busy for good."""
    monkeypatch.setattr(claiming, "PATIENCE", 0.1)


def send(data: bytes) -> Callable[[socket.socket], None]:
    """A listener that says this and then stays."""

    def serve(client: socket.socket) -> None:
        client.sendall(data)
        stay_silent(client)

    return serve


def send_for_ever(data: bytes) -> Callable[[socket.socket], None]:
    """A listener that says this again and again."""

    def serve(client: socket.socket) -> None:
        while True:
            client.sendall(data)

    return serve


HOSTILE = {
    "silent": (stay_silent, State.SILENT),
    "garbage": (send(b"SSH-2.0-OpenSSH_9.2\r\n"), State.GARBAGE),
    "half a frame": (send(ANSWER[:30]), State.SILENT),
    "one byte": (send(b"\0"), State.SILENT),
    "4 GiB": (send(b"\xff\xff\xff\xff"), State.GARBAGE),
    "questions": (send(QUESTION * 3), State.SILENT),
    "endless zeros": (send_for_ever(bytes(65536)), State.GARBAGE),
    "endless questions": (send_for_ever(QUESTION * 100), State.SILENT),
    "closes": (lambda _: None, State.BUSY),
    "closes behind half a frame": (lambda client: client.sendall(ANSWER[:30]), State.BUSY),
    "answers and closes": (lambda client: client.sendall(ANSWER), State.BUSY),
}  # fmt: skip


@pytest.mark.parametrize(("serve", "state"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_listeners(
    arena: Arena, impatient: None, serve: Callable[[socket.socket], None], state: State
) -> None:
    """Each is told as what it is, is never claimed, and keeps nobody from the passt above it."""
    arena.listener(1, serve)
    assert [state] == [each.state for each in await look(arena.paths[:1])]
    assert f"{arena.path(1)}: {state.value}" in (await claim_fails(arena.paths)).message
    arena.passt(2)
    found = await claim(arena.paths)
    assert arena.path(2) == found.path
    assert_usable(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as another user")
async def test_another_users_listener_is_refused(arena: Arena, impatient: None) -> None:
    """With a message, and without connecting to it."""
    user = NOBODY - 2000
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    arena.program(*become, "/usr/bin/python3", "-I", "-c", LISTEN, n=1)
    said: list[str] = []
    error = await claim_fails(arena.paths, say=said.append)
    assert f"foreign (belongs to user {user})" in error.message
    assert f"--allow-uid {user}" in str(error.hint)
    assert 1 == len(said)
    assert not look_at([arena.path(1)])[0].taken
    assert [(State.FOREIGN, user)] == [(each.state, each.uid) for each in await look(arena.paths[:1])]


async def test_63_silent_listeners_cost_little(arena: Arena) -> None:
    """0.08 s on an idle machine, where one after the other would take 31."""
    for n in range(1, 64):
        arena.listener(n)
    arena.passt(64)
    before = time.monotonic()
    assert_usable(await claim(arena.paths))
    assert time.monotonic() - before < 0.5


async def test_a_failed_claim_leaves_no_fd(arena: Arena, impatient: None) -> None:
    """Nor does a look."""
    arena.listener(1, stay_silent)
    arena.listener(2, send(b"\xff" * 8))
    await claim_fails(arena.paths)
    before = open_fds()
    await claim_fails(arena.paths)
    await look(arena.paths)
    # The threads of the listeners close theirs when they see the end.
    await until(lambda: not open_fds() - before)
