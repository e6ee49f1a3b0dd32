# SPDX-License-Identifier: GPL-2.0-or-later
"""One thing at a time: the latest, after the end of what it has cut short."""

from __future__ import annotations

from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint

from qrapd.background import Background


class Work:
    """Notes what begins and what ends, and goes on until it is cancelled."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def forever(self, name: str) -> None:
        self.log.append(f"+{name}")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(5):  # its end takes a while
                    await checkpoint()
            self.log.append(f"-{name}")

    async def once(self, name: str) -> None:
        await checkpoint()
        self.log.append(name)


async def begun(log: list[str], entry: str) -> None:
    """Wait until this has been noted."""
    with anyio.fail_after(10):
        while entry not in log:
            await checkpoint()


async def test_the_latest_begins_after_the_end_of_what_it_cuts_short() -> None:
    """Those in between, which have not begun, never do."""
    work, background = Work(), Background()
    async with anyio.create_task_group() as tasks:
        background.begin(tasks, partial(work.forever, "a"))
        await begun(work.log, "+a")
        for name in ("b", "c"):
            background.begin(tasks, partial(work.once, name))
        await background.wait_until_idle()
        assert ["+a", "-a", "c"] == work.log


async def test_one_thing_begins_the_next() -> None:
    """From within itself: what it does afterwards is cancelled."""
    work, background = Work(), Background()
    async with anyio.create_task_group() as tasks:

        async def first() -> None:
            background.begin(tasks, partial(work.once, "second"))
            work.log.append("first")
            await checkpoint()
            pytest.fail("it went on")

        background.begin(tasks, first)
        await background.wait_until_idle()
    assert ["first", "second"] == work.log


async def test_the_end() -> None:
    """It waits for the end of what is under way, and where nothing is, for nothing."""
    work, background = Work(), Background()
    async with anyio.create_task_group() as tasks:
        await background.wait_until_idle()
        await background.end()
        background.begin(tasks, partial(work.forever, "a"))
        await begun(work.log, "+a")
        await background.end()
        assert ["+a", "-a"] == work.log


async def test_a_failure_leaves_it_idle() -> None:
    """And is the business of whoever has the tasks."""
    background = Background()

    async def fail() -> None:
        raise LookupError

    with pytest.RaisesGroup(LookupError):
        async with anyio.create_task_group() as tasks:
            background.begin(tasks, fail)
            with anyio.CancelScope(shield=True), anyio.fail_after(10):
                await background.wait_until_idle()
