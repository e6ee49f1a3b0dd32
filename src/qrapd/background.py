# SPDX-License-Identifier: GPL-2.0-or-later
"""One thing at a time in the background: the latest that was begun, and what was under way is cancelled for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup

__all__ = ["Background"]


class Background:
    """Does the latest thing that it was told to do. Whatever was under way before has ended when that begins."""

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self._idle = anyio.Event()
        self._idle.set()

    def begin(self, tasks: TaskGroup, work: Callable[[], Awaitable[None]]) -> None:
        """Cancel what is under way, and do this in a task of ``tasks``. May be called from within what is under way."""
        before = self._idle
        self._scope.cancel()
        self._scope, self._idle = anyio.CancelScope(), anyio.Event()
        tasks.start_soon(self._do, work, before, self._scope, self._idle)

    async def wait_until_idle(self) -> None:
        """Wait for the end of what is under way."""
        await self._idle.wait()

    async def end(self) -> None:
        """Cancel what is under way, and wait for its end."""
        self._scope.cancel()
        await self._idle.wait()

    async def _do(
        self,
        work: Callable[[], Awaitable[None]],
        before: anyio.Event,
        scope: anyio.CancelScope,
        idle: anyio.Event,
    ) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await before.wait()
            with scope:
                await work()
        finally:
            idle.set()
