# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns: so many at a time, in the order of asking, and nobody who hangs holds up the rest for long."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from qrapd.turns import Turns, turn


class Work:
    """What goes on at the same time, and in which order it began."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.now = 0
        self.most = 0
        self.order: list[int] = []
        self.go_on = anyio.Event()

    async def do(self, number: int, steps: int = 3) -> None:
        async with self.turns.take():
            self.order.append(number)
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(steps):
                await checkpoint()
            self.now -= 1

    async def hang(self, number: int) -> None:
        async with self.turns.take():
            self.order.append(number)
            await self.go_on.wait()


async def test_so_many_at_a_time_in_order() -> None:
    """And all of them come to their turn."""
    work = Work(Turns(3, seconds=60))
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(work.do, number)
    assert [*range(20)] == work.order
    assert 3 == work.most


async def test_who_hangs_does_not_hold_up_the_rest() -> None:
    """His place is another's after a while; and is given back once only."""
    work = Work(Turns(2, seconds=0.01))
    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(work.hang, number)
        with anyio.fail_after(20):
            while len(work.order) < 6:  # noqa: ASYNC110 (each comes by a clock, not by an event)
                await anyio.sleep(0.01)
        work.go_on.set()
    assert [*range(6)] == work.order
    work.turns = Turns(2, seconds=60)
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(work.do, number)
    assert 2 == work.most


@pytest.mark.parametrize("given", [False, True], ids=["waiting", "at the moment of its turn"])
async def test_who_is_cancelled_leaves_no_gap(given: bool) -> None:
    """Neither while waiting, nor just when it would be its turn."""
    turns = Turns(1, seconds=60)
    work = Work(turns)
    async with anyio.create_task_group() as tasks:
        first = turns.take()
        await first.__aenter__()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(work.do, 1)
                await checkpoint()
                await checkpoint()
                if given:
                    await first.__aexit__(None, None, None)
                scope.cancel()
        if not given:
            await first.__aexit__(None, None, None)
        tasks.start_soon(work.do, 2)
        tasks.start_soon(work.do, 3)
    assert [2, 3] == [number for number in work.order if number != 1]
    assert 0 == turns._free - 1


async def test_a_turn_passes_by_who_is_cancelled() -> None:
    """In the same step of the event loop, before it has heard of it."""
    turns = Turns(1, seconds=60)
    work = Work(turns)
    first = turns.take()
    await first.__aenter__()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work.do, 1)
        await checkpoint()
        tasks.cancel_scope.cancel()
        await first.__aexit__(None, None, None)
    assert [] == work.order
    await work.do(2)
    assert [2] == work.order


async def test_one_for_each_event_loop() -> None:
    """Whoever asks gets the same."""
    async with turn(), turn():
        pass
