# SPDX-License-Identifier: GPL-2.0-or-later
"""A passt that somebody else runs: where it may listen, how it is had, and who comes to listen while there is none.

What all this takes is imported where it is used: a supervisor whose passts are all its own starts without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from qrapd.errors import Unavailable
from qrapd.logs import Emit
from qrapd.plan import LinkPlan

if TYPE_CHECKING:
    from qrapd.listeners import ListenerWatch
    from qrapd.probe import Claim

__all__ = ["Newcomers", "claim"]


async def claim(plan: LinkPlan, emit: Emit) -> Claim:
    """Connect to one that is free.

    :raise Unavailable: none is found, or none can be looked for.
    """
    from qrapd import probe

    try:
        return await probe.claim(
            _paths(plan), allowed_uids=plan.allowed_uids, say=lambda text: emit("link.notice", notice=text)
        )
    except OSError as error:  # for want of an fd, say: a running VM must not end by it
        raise Unavailable(f"no passt could be looked for: {error.strerror or error}") from error


class Newcomers:
    """Notices who comes to listen where a link's passt may be; for a link whose passt is qrapd's own, nobody."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._watch: ListenerWatch | None = None
        self._plan: LinkPlan | None = None

    @property
    def watched(self) -> bool:
        """Whether one would be noticed."""
        return self._watch is not None

    def watch(self, plan: LinkPlan) -> None:
        """Watch from now on where this plan says. To be called before an attempt: who comes while it fails counts."""
        if self._plan is plan:
            return
        self.forget()
        if plan.source == "managed":
            return
        from qrapd import probe
        from qrapd.listeners import ListenerWatch

        self._watch = ListenerWatch(
            _paths(plan),
            allowed=probe.default_uids() | plan.allowed_uids,
            say=lambda text: self._emit("link.notice", notice=text),
        ).__enter__()
        self._plan = plan

    async def wait(self) -> None:
        """Wait for the first since :meth:`watch`, or since the last one; for ever where nobody would be noticed."""
        if self._watch is None:
            await anyio.sleep_forever()
        else:
            await self._watch.wait()

    def forget(self) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.__exit__()
        self._watch = self._plan = None


def _paths(plan: LinkPlan) -> list[str]:
    """Where it may listen."""
    from qrapd import probe

    if plan.source != "probe":
        return [plan.source]
    return probe.default_paths(plan.pattern) if plan.pattern is not None else probe.default_paths()
