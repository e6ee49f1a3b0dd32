# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM is, made out of the events that it tells: one tracker for each VM, fed with all of them.

It takes every event as it comes, in any order, and always has a valid answer: what others look at must not be what
ends a VM. What it keeps is bounded: numbers, one error for the VM and for each link, and one hint.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qrapd.vm_status import Origin, VmState, VmStatus

__all__ = ["LOSS_REASONS", "OUTAGE_BOUNDS", "Histogram", "LinkMeasures", "Measures", "StatusTracker"]

Mode = Literal["swap", "vhost-user", "native"]

OUTAGE_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: upper bounds of the buckets. Half of all lost passts are replaced within 42 ms (benchmarks/README.md); the
attempts of a link that gives up take 13 s (:mod:`qrapd.backoff`); what took a minute has waited for somebody."""

LOSS_REASONS = ("exited", "hangup", "stalled", "requested")
"""The field ``reason`` of ``link.lost``."""

LONGEST_ERROR = 500
"""Characters. An error may quote what passt or QEMU wrote; the log has all of it."""

_FAILURES = frozenset({"failed", "killed", "guest-panic"})
"""What of the field ``reason`` of ``vm.exited`` is a failure: as in :func:`qrapd.lifecycle.judge_exit`."""

_NO_UNREAD: Mapping[int, tuple[int | None, int | None]] = {}


class Histogram:
    """How many were how long. ``counts`` has one number for each bound and one for what was beyond the last."""

    __slots__ = ("counts", "total")

    def __init__(self, bounds: int = len(OUTAGE_BOUNDS)) -> None:
        self.counts = [0] * (bounds + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one; a bound itself belongs to its bucket, as in Prometheus."""
        self.counts[bisect.bisect_left(OUTAGE_BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass(frozen=True, slots=True)
class LinkMeasures:
    """What is counted of one link, for as long as this process has had the VM."""

    index: int
    lost: tuple[int, ...]
    """outages that have begun, by :data:`LOSS_REASONS`"""
    failed_attempts: int
    """to replace a passt"""
    outage_counts: tuple[int, ...]
    """outages that are over: as :attr:`Histogram.counts`"""
    outage_total: float
    """seconds of them all"""


@dataclass(frozen=True, slots=True)
class Measures:
    """What is counted of one VM beyond its status: a copy, which does not change any more."""

    start_seconds: float | None
    """of the last start, until the machine ran; None: this process has not started it"""
    failures: int
    """so often it has failed"""
    links: tuple[LinkMeasures, ...]


@dataclass(slots=True)
class _Link:
    mode: Mode
    state: Literal["starting", "up", "down", "failed", "ended"] = "starting"
    passt_pid: int | None = None
    generation: int = 0
    last_outage_ms: float | None = None
    error: str | None = None
    failed_attempts: int = 0
    lost: list[int] = field(default_factory=lambda: [0] * len(LOSS_REASONS))
    outages: Histogram = field(default_factory=Histogram)

    @property
    def is_down(self) -> bool:
        return self.state in {"down", "failed"}


class StatusTracker:
    """One VM's status. Give every event of it to :meth:`note`, and what no event tells to the other methods.

    :param links: each NIC's index and mode.
    :param since: now.
    :param state: ``exited`` for a VM that nobody has started yet.
    :param clock: steady, in seconds: a host's time of day is often put right while its first VMs start.
    """

    def __init__(
        self,
        name: str,
        origin: Origin,
        links: Iterable[tuple[int, Mode]],
        since: datetime,
        *,
        state: Literal["starting", "exited"] = "starting",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.origin = origin
        self.start_seconds: float | None = None
        self._clock = clock
        self._state: VmState = state
        self._since = since
        self._began: float | None = clock() if state == "starting" else None
        self._qemu_pid: int | None = None
        self._restarts = 0
        self._failures = 0
        self._error: str | None = None
        self._hint: str | None = None
        self._is_refused = False
        self._links: dict[int, _Link] = {}
        self.set_links(links)

    # --- what no event tells --------------------------------------------------------------------------

    def begin(self, at: datetime, links: Iterable[tuple[int, Mode]] | None = None) -> None:
        """A start has been asked for, maybe by a file that has other links now."""
        if links is not None:
            self.set_links(links)
        self._error = self._hint = None
        self._is_refused = False
        self._begin_at(at, self._clock())

    def set_links(self, links: Iterable[tuple[int, Mode]]) -> None:
        """What NICs there are; what was counted of those that stay is kept."""
        known, self._links = self._links, {}
        for index, mode in links:
            link = known.get(index)
            self._links[index] = link if link is not None and link.mode == mode else _Link(mode)
        if self._ended:
            self._end_links()

    def note_failure(self, error: str, at: datetime, hint: str | None = None) -> None:
        """It runs no more, and why; after the last event, which need not have been ``vm.exited``."""
        self._end("failed", at)
        self._note_error(error, hint)

    def note_refusal(self, error: str, at: datetime, hint: str | None = None) -> None:
        """Its file is wrong, so that it could not be started. Nothing of it has ended by that."""
        self._is_refused = True
        self._turn("failed", at)
        self._note_error(error, hint)

    def note_acceptance(self, at: datetime) -> None:
        """Its file is right."""
        if self._is_refused and self._state == "failed":
            self._turn("exited", at)
            self._error = self._hint = None
        self._is_refused = False

    def note_end(self, at: datetime) -> None:
        """Nothing of it runs any more, and that is as it was wanted: a stop between two starts tells no event."""
        if not self._ended:
            self._end("exited", at)

    # --- events ---------------------------------------------------------------------------------------

    def note(self, event: str, fields: Mapping[str, object], at: datetime) -> None:
        """An event of this VM; ``at`` is when it was told."""
        if event.startswith("link."):
            self._note_link(event, fields, at)
            return
        match event:
            case "passt.started":
                self._begin_if_ended(at)
            case "vm.started":
                self._begin_if_ended(at)
                self._qemu_pid = _number(fields.get("qemu_pid"))
            case "vm.ready" | "vm.adopted":
                self._note_running(event, fields, at)
            case "vm.stopping" if not self._ended:
                self._turn("stopping", at)
            case "vm.exited":
                self._end("failed" if fields.get("reason") in _FAILURES else "exited", at)
                self._note_error(fields.get("error"), fields.get("hint"))
            case "vm.restarting":
                self._restarts += 1
                self._note_error(fields.get("error"), fields.get("hint"))
                # The delay is no part of the start.
                self._begin_at(at, self._clock() + (_amount(fields.get("delay_ms")) or 0.0) / 1000)
            case "run.failed":
                self._end("failed", at)
                self._note_error(str(fields.get("error")), fields.get("hint"))
            case "passt.exited":
                for link in self._links.values():
                    if link.passt_pid is not None and link.passt_pid == fields.get("pid"):
                        link.passt_pid = None

    def _note_running(self, event: str, fields: Mapping[str, object], at: datetime) -> None:
        if self._ended:
            self._begin_at(at, None)
        self._qemu_pid = _number(fields.get("qemu_pid"))
        self._error = self._hint = None
        if event == "vm.adopted":
            # Those that are to be healed say so next.
            generations, pids = fields.get("generations"), fields.get("passt_pids")
            for position, link in enumerate(self._links.values()):
                link.state = "up"
                link.generation = _number(_item(generations, position)) or 0
                link.passt_pid = _number(_item(pids, position))
        elif self._began is not None:
            self.start_seconds = max(0.0, self._clock() - self._began)
        self._began = None
        self._turn("degraded" if self._lacks_a_link else "ready", at)

    def _note_error(self, error: object, hint: object) -> None:
        text = _cut(error)
        # The same may be told twice, by an event and by whoever ran it: the hint is not lost by that.
        known = self._hint if text == self._error else None
        self._error, self._hint = text, None if text is None else _cut(hint) or known

    def _note_link(self, event: str, fields: Mapping[str, object], at: datetime) -> None:
        index = _number(fields.get("link"))
        link = None if index is None else self._links.get(index)
        if link is None:
            return
        match event:
            case "link.connected":
                self._begin_if_ended(at)
                self._note_up(link, fields)
            case "link.restored" if not self._ended:
                self._note_up(link, fields)
                outage = _amount(fields.get("outage_ms"))
                if outage is not None:
                    link.last_outage_ms = outage
                    link.outages.observe(outage / 1000)
            case "link.lost" if not self._ended:
                link.state, link.passt_pid = "down", None
                # Before there is a machine it is a start that fails, and no outage.
                if self._state != "starting" and (reason := fields.get("reason")) in LOSS_REASONS:
                    link.lost[LOSS_REASONS.index(str(reason))] += 1
            case "link.failed" if not self._ended:
                link.state = "failed" if fields.get("retry_in_ms") is None else "down"
                link.passt_pid = None
                link.failed_attempts += 1
                link.error = _cut(fields.get("error"))
        if self._state in {"ready", "degraded"}:
            self._turn("degraded" if self._lacks_a_link else "ready", at)

    def _note_up(self, link: _Link, fields: Mapping[str, object]) -> None:
        link.state, link.error = "up", None
        link.generation = _number(fields.get("generation")) or 0
        link.passt_pid = _number(fields.get("passt_pid"))

    # --- the state ------------------------------------------------------------------------------------

    @property
    def _ended(self) -> bool:
        return self._state in {"exited", "failed"}

    @property
    def _lacks_a_link(self) -> bool:
        return any(link.is_down for link in self._links.values())

    def _turn(self, state: VmState, at: datetime) -> None:
        if state != self._state:
            self._state, self._since = state, at

    def _begin_if_ended(self, at: datetime) -> None:
        if self._ended:
            self._begin_at(at, self._clock())

    def _begin_at(self, at: datetime, began: float | None) -> None:
        self._began = began
        self._qemu_pid = None
        for link in self._links.values():
            link.state, link.passt_pid, link.generation, link.error = "starting", None, 0, None
        self._turn("starting", at)

    def _end(self, state: Literal["exited", "failed"], at: datetime) -> None:
        if state == "failed" and self._state != "failed":
            self._failures += 1
        self._qemu_pid = self._began = None
        self._end_links()
        self._turn(state, at)

    def _end_links(self) -> None:
        for link in self._links.values():
            link.state, link.passt_pid = "ended", None

    # --- what others see ------------------------------------------------------------------------------

    def status(self, unread: Mapping[int, tuple[int | None, int | None]] = _NO_UNREAD) -> VmStatus:
        """How it is now.

        :param unread: by the links' indices, what waits in their streams: for passt, and for QEMU.
        """
        # Imported for those who ask: `run` starts without pydantic having made these models (2.6 ms).
        from qrapd.vm_status import LinkStatus, VmStatus

        links = []
        for index, link in sorted(self._links.items()):
            by_passt, by_qemu = unread.get(index, (None, None))
            links.append(
                LinkStatus(
                    index=index,
                    mode=link.mode,
                    state=link.state,
                    passt_pid=link.passt_pid,
                    generation=link.generation,
                    outages=sum(link.lost),
                    last_outage_ms=link.last_outage_ms,
                    unread_by_passt=by_passt,
                    unread_by_qemu=by_qemu,
                    error=link.error,
                )
            )
        return VmStatus(
            name=self.name,
            state=self._state,
            origin=self.origin,
            qemu_pid=self._qemu_pid,
            since=self._since,
            restarts=self._restarts,
            links=links,
            error=self._error,
            hint=self._hint,
        )

    @property
    def outages(self) -> Mapping[int, Histogram]:
        """How long the outages of each link took that are over."""
        return {index: link.outages for index, link in self._links.items()}

    @property
    def measures(self) -> Measures:
        """What is counted, for metrics."""
        return Measures(
            start_seconds=self.start_seconds,
            failures=self._failures,
            links=tuple(
                LinkMeasures(
                    index=index,
                    lost=tuple(link.lost),
                    failed_attempts=link.failed_attempts,
                    outage_counts=tuple(link.outages.counts),
                    outage_total=link.outages.total,
                )
                for index, link in sorted(self._links.items())
            ),
        )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _amount(value: object) -> float | None:
    """Not NaN, and not infinite: neither compares as this wants it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value < float("inf") else None


def _item(values: object, position: int) -> object:
    return values[position] if isinstance(values, list | tuple) and position < len(values) else None


def _cut(error: object) -> str | None:
    if error is None:
        return None
    # It may quote a path with bytes that are no UTF-8: these are escaped, as nobody could be sent them.
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"
