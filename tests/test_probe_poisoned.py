# SPDX-License-Identifier: GPL-2.0-or-later
"""A passt whose client was killed in the middle of a frame serves nobody from then on: passed over, and named."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest

from probe_arena import Arena, Passt, assert_usable, claim_fails, open_arena, until
from qrapd.frames import probe_request
from qrapd.probe import claim, looking
from qrapd.unix_sockets import look_at
from support import PATIENCE


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Paths of this test's own, and what listens there."""
    with open_arena() as arena:
        yield arena


async def poison(passt: Passt, size: int) -> None:
    """Be a client that ends in the middle of a frame of this size."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(passt.path)
        client.sendall(struct.pack("!I", size) + bytes(10))
        await until(lambda: look_at([passt.path])[0].connected == 1)
    await until(lambda: not look_at([passt.path])[0].taken)


async def can_be_poisoned(passt: Passt) -> bool:
    """Whether this version minds: that of 2023-03 does not."""
    await poison(passt, 84)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(passt.path)
        with suppress(ConnectionError):
            client.sendall(probe_request())
            return client.recv(4096) == b""
    return True


@pytest.mark.may_skip(reason="passt 2023-03, Debian 12's, forgets the half frame")
@pytest.mark.parametrize(
    ("size", "words", "words_alone"),
    [(84, looking.HANGS_UP, looking.HANGS_UP), (60000, "no answer within", "gave no answer within 0.5 s")],
    ids=["hangs up", "silent"],
)
async def test_a_poisoned_passt(arena: Arena, size: int, words: str, words_alone: str) -> None:
    """The real one takes what is said next for the rest of that frame, and hangs up on what comes behind it."""
    poisoned, good, other = arena.passt(1, 2, 3)
    if not await can_be_poisoned(other):
        pytest.skip("the installed passt cannot be poisoned in this way")
    await poison(poisoned, size)
    said: list[str] = []
    found = await claim(arena.paths[:2], say=said.append)
    assert good.path == found.path
    assert_usable(found)
    assert [True] == [each.startswith(f"{poisoned.path}: passed over: {words}") for each in said]
    assert f"{poisoned.path}: silent ({words_alone}" in (await claim_fails([poisoned.path])).message
    assert poisoned.alive


async def test_what_hangs_up_on_everyone(arena: Arena) -> None:
    """As a poisoned passt does: named when another one is claimed, and when there is no other one, with what to do."""

    def hang_up(client: socket.socket) -> None:
        client.recv(4)

    arena.listener(1, hang_up)
    error = await claim_fails(arena.paths)
    assert f"{arena.path(1)}: silent ({looking.HANGS_UP})" in error.message
    assert "end it, and start another one" in str(error.hint)
    arena.passt(2)
    said: list[str] = []
    found = await claim(arena.paths, say=said.append)
    assert arena.path(2) == found.path
    assert_usable(found)
    assert [f"{arena.path(1)}: passed over: {looking.HANGS_UP}"] == said


async def test_a_passt_with_a_client_is_not_named(arena: Arena) -> None:
    """It has every reason to hang up."""
    busy, good = arena.passt(1, 2)
    client = await claim([busy.path])
    said: list[str] = []
    found = await claim(arena.paths, say=said.append)
    assert good.path == found.path
    assert [] == said
    assert_usable(found)
    assert_usable(client)
