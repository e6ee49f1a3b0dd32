# SPDX-License-Identifier: GPL-2.0-or-later
"""Many claims at once get a passt each, and one that ends early leaves nothing behind."""

from __future__ import annotations

import math
import os
import random
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from probe_arena import ANSWER, Arena, assert_usable, open_arena, open_fds
from qrapd.frames import probe_request
from qrapd.probe import Claim, State, attempts, claim, claiming
from qrapd.probe.survey import Survey
from qrapd.unix_sockets import lock_path
from support import NOBODY


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Paths of this test's own, and what listens there."""
    with open_arena() as arena:
        yield arena


@pytest.mark.parametrize("options", [[], ["--one-off"]], ids=["persistent", "one-off"])
async def test_64_claims_at_once_get_64_passts(arena: Arena, options: list[str]) -> None:
    """Each its own, none lost."""
    passts = arena.passt(*range(1, 65), options=options)
    found: list[Claim] = []

    async def claim_one() -> None:
        found.append(await claim(arena.paths))

    async with anyio.create_task_group() as tasks:
        for _ in passts:
            tasks.start_soon(claim_one)
    assert {each.path for each in passts} == {each.path for each in found}
    assert [True] * 64 == [each.alive for each in passts]
    for each in found:
        assert_usable(each)


@pytest.mark.parametrize("options", [[], ["--one-off"]], ids=["persistent", "one-off"])
def test_processes_at_once_get_a_passt_each(arena: Arena, options: list[str]) -> None:
    """Rivals in other processes are no different."""
    arena.passt(*range(1, 9), options=options)
    script = (
        f"import qrapd.probe as p; s = p.claim_blocking({arena.paths!r}); print(s[1], flush=True); input()"
    )
    with ExitStack() as stack:
        rivals = []
        for _ in range(8):
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            rivals.append(process)
        paths = [process.stdout.readline().strip() for process in rivals if process.stdout]
    assert {arena.path(n) for n in range(1, 9)} == set(paths)


def test_the_lowest_that_has_answered_wins(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first answer is seen: lower ones that are silent do not count, and all but the winner are let go."""
    # However busy the host is: nobody is asked twice, or given up, and not all at once.
    monkeypatch.setattr(attempts, "SECOND_QUESTION", 60.0)
    monkeypatch.setattr(attempts, "ANSWER_TIMEOUT", 60.0)
    monkeypatch.setattr(attempts, "_WIDEST", 8)
    listeners = {n: arena.listener(n) for n in range(1, 10)}
    with ExitStack() as stack:
        with claiming.Claiming(arena.paths, None, None) as the_claim:
            while len(the_claim._under_way) < 8:
                assert the_claim.step() is not None
            the_claim._widen_at = math.inf  # no more of them, however busy the host is
            clients = {n: stack.enter_context(listeners[n].accept()[0]) for n in range(1, 9)}
            for n in (7, 6, 8):
                clients[n].sendall(ANSWER)
            assert the_claim.step() is None
            found = the_claim.take()
            stack.enter_context(found.socket)
        assert (arena.path(6), os.getpid()) == (found.path, found.pid)
        assert [probe_request()] * 8 == [client.recv(4096) for client in clients.values()]
        assert [b""] * 5 == [clients[n].recv(4096) for n in range(1, 6)]
    listeners[9].setblocking(False)
    with pytest.raises(BlockingIOError):
        listeners[9].accept()


def lock(path: str) -> socket.socket:
    """A rival's lock on a candidate."""
    status = Path(path).stat()
    held = lock_path((status.st_dev, status.st_ino))
    assert held is not None
    return held


async def test_what_a_rival_asks_is_left_alone(arena: Arena) -> None:
    """The next one is taken."""
    arena.passt(1, 2, options=["--one-off"])
    with lock(arena.path(1)):
        found = await claim(arena.paths)
        assert arena.path(2) == found.path
        assert_usable(found)


async def test_a_lock_is_no_denial(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds one for ever is ignored after a while."""
    monkeypatch.setattr(attempts, "LOCK_PATIENCE", 0.1)
    arena.passt(1)
    with lock(arena.path(1)):
        assert_usable(await claim(arena.paths))


async def test_a_look_tries_again_what_is_locked(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another look is through in a moment; on a busy machine that may take long."""
    monkeypatch.setattr("qrapd.probe.survey._LOCK_PATIENCE", 60.0)
    arena.passt(1)
    with Survey(arena.paths[:1], {os.geteuid(), 0, NOBODY}, ask_all=False) as survey:
        with lock(arena.path(1)):
            while not survey._entries[0].again:
                assert survey.step() is not None
        while (wait := survey.step()) is not None:
            select.select([survey.events], [], [], wait)
        assert [State.ANSWERING] == [each.state for each in survey.result()]


async def test_a_claim_holds_no_lock(arena: Arena) -> None:
    """Once it is through, the connection says enough."""
    arena.passt(1)
    found = await claim(arena.paths)
    lock(arena.path(1)).close()
    assert_usable(found)


async def test_a_cancelled_claim_leaves_no_fd(arena: Arena) -> None:
    """At whatever moment; and the passts are free again."""
    arena.passt(3, 4)
    arena.listener(1)
    arena.listener(2)
    assert_usable(await claim(arena.paths))
    before = open_fds()
    generator = random.Random(1)
    for _ in range(40):
        found = None
        with anyio.move_on_after(generator.random() * 0.02):
            found = await claim(arena.paths)
        if found:
            found.socket.close()
    assert before == open_fds()
    assert_usable(await claim(arena.paths))
