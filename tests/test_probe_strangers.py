# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever sits on a passt's name without being one does no harm, and is told as what it is."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
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
from qrapd import unix_sockets
from qrapd.probe import Claim, State, claim, claiming, default_paths, look, looking
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


WAIT = "import sys; print(flush=True); sys.stdin.read()"

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
    assert f"whoever trusts user {user} says so: `qrapd wrap --allow-uid {user}`" in str(error.hint)
    assert 1 == len(said)
    assert not look_at([arena.path(1)])[0].taken
    assert [(State.FOREIGN, user)] == [(each.state, each.uid) for each in await look(arena.paths[:1])]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start programs as another user")
async def test_another_users_program_forges_nothing(arena: Arena, impatient: None) -> None:
    """One that is named passt and has the right options, and does not listen at all."""
    user = NOBODY - 2000
    fake = Path(arena.path(0)).with_name("passt")
    fake.symlink_to("/usr/bin/python3")
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    (passt,) = arena.passt(1, options=["--one-off"])
    arena.program(*become, str(fake), "-c", WAIT, "--vhost-user", "-s", n=1)
    arena.program(*become, str(fake), "-c", WAIT, "-s", n=1)
    (found,) = await look(arena.paths[:1])
    assert (State.FREE, True, passt.pid) == (found.state, found.one_off, found.pid)
    assert passt.alive
    assert_usable(await claim(arena.paths))


async def test_what_may_be_vhost_user_is_looked_at_again(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the one that it may have been taken for has gone, the passt is claimed."""
    monkeypatch.setattr(unix_sockets, "find_holders", lambda *_: iter(()))  # root would know at once
    fake = tmp_path / "passt"
    fake.symlink_to("/usr/bin/python3")
    arena.passt(1)
    # It names the path as seen from a directory that nobody knows.
    process = arena.program(str(fake), "-c", WAIT, "--vhost-user", "-s", "passt_1.socket", n=1)
    (found,) = await look(arena.paths[:1])
    assert (State.VHOST_USER, "may be a passt with --vhost-user") == (found.state, found.detail)
    claimed: list[Claim] = []

    async def claim_one() -> None:
        claimed.append(await claim(arena.paths))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(claim_one)
        await anyio.sleep(2 * claiming.LOOK_AGAIN)  # it has looked, and waits
        assert [] == claimed
        process.kill()
    assert_usable(claimed[0])


async def test_a_holder_is_searched_for_in_slices(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are, the search ends, and other tasks go on meanwhile."""
    monkeypatch.setattr(looking, "_SLICE", 0.0)
    arena.listener(1)
    arena.listener(2)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        found = await look(arena.paths[:2])
        tasks.cancel_scope.cancel()
    # Known to be no passts, both were asked.
    assert [(State.SILENT, os.getpid(), False)] * 2 == [
        (each.state, each.pid, each.one_off) for each in found
    ]
    assert turns > 2


async def test_what_is_no_socket_is_told_as_what_it_is(arena: Arena) -> None:
    """With what to do about it."""
    os.close(os.open(arena.path(1), os.O_CREAT))
    error = await claim_fails(arena.paths)
    assert f"{arena.path(1)}: unusable (a regular file)" in error.message
    long = arena.path(1) + "x" * 100
    error = await claim_fails([long, long])
    assert 1 == error.message.count(long)
    assert f"its name has {len(long)} bytes, and a socket's path may have 107" in error.message
    error = await claim_fails([arena.path(2)])
    assert f"nothing is at {arena.path(2)}" in error.message
    assert f"start one: passt --socket {arena.path(2)}" == error.hint


async def test_a_bound_socket_that_does_not_listen(arena: Arena) -> None:
    """It is nothing that a claim could succeed with."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(arena.path(1))
        (found,) = await look(arena.paths[:1])
        assert (State.REFUSED, "a program has bound it and does not listen") == (found.state, found.detail)


async def test_a_directory_that_may_not_be_searched_is_told_once(arena: Arena) -> None:
    """Not for each of 99 paths."""
    closed = Path(arena.path(1)).parent / "closed"
    closed.mkdir(mode=0o700)
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        error = await claim_fails(default_paths(str(closed / "{n}.s")))
    finally:
        os.seteuid(user)
    assert (
        f"no passt could be claimed. {closed}/1.s to {closed}/99.s: it may not be connected to "
        f"({closed} may not be searched by this user)"
    ) == error.message


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
