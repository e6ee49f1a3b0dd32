# SPDX-License-Identifier: GPL-2.0-or-later
"""What bench-outage has measured, as a table of at most 100 columns. Nothing is judged: the aims stand beside it."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common import spread
from idle import Idle
from outages import Outage
from throughput import DIRECTIONS, Rate

__all__ = ["Report", "percentile", "render"]

_RIVALS = ("swap", "vhost-user", "stream", "native")
_NETWORKS = ("swap", "direct", "direct-alike", "vhost-user", "direct-vhost-user", "slirp")
_RATIOS = (
    ("swap", "direct", ">= 0.95"),
    ("swap", "direct-alike", ""),
    ("vhost-user", "direct-vhost-user", ">= 0.98"),
)


@dataclass
class Report:
    """Every single measurement, and what it was made on."""

    host: dict[str, str]
    stall_timeout: float
    never_after_kill: float
    never_after_stop: float
    """seconds"""
    titles: dict[str, str]
    lacking: dict[str, str] = field(default_factory=dict)
    """contenders that this host cannot do, and why"""
    outages: list[Outage] = field(default_factory=list)
    own_starts_ms: list[float] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    rates: list[Rate] = field(default_factory=list)
    idle: Idle | None = None
    failed: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many of a hundred do not exceed: the nearest rank, never a value in between."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def render(report: Report) -> str:
    """The whole table."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    host = report.host
    yield f"{host['system']}, QEMU {host['qemu']}, passt {host['passt']}, {host['accelerator']}"
    if any(outage.number == "SIGKILL" for outage in report.outages):
        yield ""
        yield from _outages(report, "SIGKILL", "kill -9 of passt to the next answer, ms", 1.0, 0)
    if any(outage.number == "SIGSTOP" for outage in report.outages):
        yield ""
        yield from _outages(report, "SIGSTOP", "SIGSTOP of passt to the next answer, s", 1000.0, 1)
    if report.rates:
        yield ""
        yield from _rates(report)
    if report.idle is not None:
        yield ""
        idle = report.idle
        yield (
            f"qrapd with one idle VM, {idle.seconds:.0f} s: {idle.switches_per_s:.2f} wake-ups and "
            f"{idle.cpu_ms_per_s:.3f} ms of CPU per second"
        )
    yield ""
    yield (
        f"never: no answer within {report.never_after_kill:g} s, after SIGSTOP {report.never_after_stop:g} s; "
        "then started anew whole"
    )
    yield f"load average before {host['load average before']}"
    for each in report.failed:
        yield f"FAILED {each}"


def _outages(report: Report, number: str, heading: str, unit: float, digits: int) -> Iterator[str]:
    yield f"{heading:46}{'times':>6}{'p50':>8}{'p99':>8}{'worst':>8}{'never':>6}  aim"
    of_number = [outage for outage in report.outages if outage.number == number]
    for traffic in dict.fromkeys(outage.traffic for outage in of_number):
        yield f"guest with full traffic, {traffic}" if traffic else "guest idle"
        for key in _RIVALS:
            if key in report.lacking:
                if not traffic:
                    yield f"  {report.titles[key]:46}{textwrap.shorten(report.lacking[key], 50)}"
                continue
            some = [each for each in of_number if each.traffic == traffic and each.contender == key]
            if some:
                yield from _row(report, key, some, unit, digits)


def _row(report: Report, key: str, some: Sequence[Outage], unit: float, digits: int) -> Iterator[str]:
    times = [math.inf if each.ms is None else each.ms / unit for each in some]
    aim = ""
    if key == "swap":
        killed = some[0].number == "SIGKILL"
        aim = "p99 <= 100, never 0" if killed else f"<= {report.stall_timeout + 1:g}"
    cells = "".join(f"{_time(percentile(times, percent), digits):>8}" for percent in (50, 99, 100))
    line = f"  {report.titles[key]:44}{len(some):>6}{cells}{times.count(math.inf):>6}  {aim}"
    yield line.rstrip()
    if key == "swap" and report.own_starts_ms and some[0].number == "SIGKILL":
        own = statistics.median(report.own_starts_ms)
        beyond = percentile(times, 50) - own
        title = f"  beyond passt's own start, {own:.0f} ms"
        yield f"  {title:44}{'':6}{_time(beyond, digits):>8}{'':22}  p50 <= 25"
    for what, count in (
        ("the traffic did not go on", sum(each.stuck for each in some)),
        ("the VM ended", sum(each.ended for each in some)),
    ):
        if count:
            yield f"    {what}: {count}"


def _time(value: float, digits: int) -> str:
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def _rates(report: Report) -> Iterator[str]:
    yield f"{'throughput of TCP, Mbit/s':36}{'guest to host':>24}{'host to guest':>24}  aim"
    middle: dict[tuple[str, str], float] = {}
    for key in _NETWORKS:
        if key in report.lacking:
            yield f"  {report.titles[key]:46}{textwrap.shorten(report.lacking[key], 50)}"
            continue
        cells = ""
        for direction in DIRECTIONS:
            some = [
                each.mbit_s for each in report.rates if (each.contender, each.direction) == (key, direction)
            ]
            if some:
                middle[key, direction] = statistics.median(some)
            cells += f"{spread(some) if some else '-':>24}"
        yield f"  {report.titles[key]:34}{cells}"
    for ours, theirs, aim in _RATIOS:
        if (ours, "up") in middle and (theirs, "up") in middle:
            cells = "".join(f"{middle[ours, each] / middle[theirs, each]:>24.2f}" for each in DIRECTIONS)
            yield f"  {f'ratio {ours} : {theirs}':34}{cells}  {aim}".rstrip()
