# SPDX-License-Identifier: GPL-2.0-or-later
"""What a link tells of itself, whatever its mode: its events and their fields, which docs/reference.md lists."""

from __future__ import annotations

from collections.abc import Sequence

from qrapd import forwards
from qrapd.errors import QrapdError
from qrapd.logs import Emit

__all__ = ["LinkEvents"]


class LinkEvents:
    """Tells of one link. A generation is the number of a passt that has served it, counted from 1."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def connected(self, generation: int, source: str, passt_pid: int | None, socket: str | None) -> None:
        """The first passt is there."""
        self._emit("link.connected", generation=generation, source=source, passt_pid=passt_pid, socket=socket)

    def restored(
        self, generation: int, outage: float, source: str, passt_pid: int | None, socket: str | None
    ) -> None:
        """Another passt serves it, after so many seconds."""
        self._emit(
            "link.restored",
            generation=generation,
            outage_ms=round(outage * 1000, 1),
            source=source,
            passt_pid=passt_pid,
            socket=socket,
        )

    def lost(self, generation: int, reason: str, detail: str | None) -> None:
        """The passt of this generation serves it no more."""
        self._emit("link.lost", generation=generation, reason=reason, detail=detail)

    def failed(self, attempts: int, delay: float | None, error: QrapdError) -> None:
        """The last of so many attempts has failed; the next one comes after some seconds, or None: there is none."""
        retry_in_ms = None if delay is None else round(delay * 1000)
        self._emit(
            "link.failed", attempts=attempts, retry_in_ms=retry_in_ms, error=error.message, hint=error.hint
        )

    def forwards(self, by: str, passt: Sequence[str]) -> None:
        """It forwards the ports of this command line from now on, and did not before."""
        now = forwards.given(passt)
        self._emit("link.forwards", by=by, tcp=now["tcp"], udp=now["udp"])

    def notice(self, text: str) -> None:
        """Something that whoever runs the VM may want to know."""
        self._emit("link.notice", notice=text)
