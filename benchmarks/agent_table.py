# SPDX-License-Identifier: GPL-2.0-or-later
"""What bench-agent has measured, as a table of at most 100 columns. Nothing is judged: the aims stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common import spread
from idle import Idle
from outage_table import percentile

__all__ = ["Adoption", "Kill", "Load", "Memory", "Report", "Start", "render"]


@dataclass(frozen=True)
class Start:
    """All VMs started at once."""

    by: str
    """``agent``, or ``run``: as many supervisors"""
    vms: int
    guests: int
    """of these, with a guest"""
    at_once: int
    """on their way up at the same time"""
    seconds: float
    """from the first supervisor's start to the last vm.ready"""
    cpu_s: float
    pss_mib: float
    """both of the supervisors, all together, without QEMUs and passts"""


@dataclass(frozen=True)
class Memory:
    """The agent's, with so many VMs."""

    vms: int
    rss_kib: int
    pss_kib: int


@dataclass(frozen=True)
class Load:
    """Many clients of the API, and what else went on."""

    clients: int
    pause: float
    """seconds of each client between an answer and the next question"""
    seconds: float
    started: int
    swapped: int
    cpu_ms_per_s: float
    """the agent's"""
    one_ms: list[float]
    """each GET /v1/vms/{name}"""
    all_ms: list[float]
    """each GET /v1/vms"""


@dataclass(frozen=True)
class Kill:
    """One of several passts that were killed at once."""

    at_once: int
    outage_ms: float | None
    """what link.restored says; None: it did not come back"""
    wall_ms: float | None
    """from the signal to that event, by the host's clock"""


@dataclass(frozen=True)
class Adoption:
    """The agent was killed, and another one started."""

    vms: int
    adopted: int
    unchanged: int
    """VMs with the same QEMU, the same passt and the same generation"""
    guests: int
    unharmed: int
    """guests that answered, and whose uptime had grown"""
    seconds: float
    """from the new agent's start to agent.ready"""
    own_seconds: float | None
    """what the metric qrapd_adoption_seconds says"""


@dataclass
class Report:
    """Every single measurement, and what it was made on."""

    host: dict[str, str]
    starts: list[Start] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    idle: Idle | None = None
    loads: list[Load] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    adoptions: list[Adoption] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def render(report: Report) -> str:
    """The whole table."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    host = report.host
    yield (
        f"QEMU {host['qemu']}, passt {host['passt']}, {host['accelerator']}, Python {host['python']}, "
        f"{host['processors']} processors"
    )
    for part in (_starts, _memory, _idle, _loads, _kills, _adoptions):
        lines = list(part(report))
        if lines:
            yield ""
            yield from lines
    yield ""
    yield f"load average before {host['load average before']}"
    for each in report.failed:
        yield f"FAILED {each}"


def _starts(report: Report) -> Iterator[str]:
    if not report.starts:
        return
    first = report.starts[0]
    heading = f"{'all ready, s':>14}{'its CPU, s':>12}{'its PSS, MiB':>14}"
    yield f"{'start of all at once':44}{'VMs':>6}{'guests':>8}{heading}"
    for each in report.starts:
        title = "qrapd agent" if each.by == "agent" else f"{each.vms} x qrapd run"
        title += f", {each.at_once} on their way at a time"
        cells = f"{each.seconds:>14.1f}{each.cpu_s:>12.1f}{each.pss_mib:>14.0f}"
        yield f"  {title:42}{each.vms:>6}{each.guests:>8}{cells}"
    for each in report.starts[1:]:
        ratios = (first.seconds / each.seconds, first.cpu_s / each.cpu_s, first.pss_mib / each.pss_mib)
        yield f"  {'ratio agent : run':56}{ratios[0]:>14.2f}{ratios[1]:>12.2f}{ratios[2]:>14.3f}"


def _memory(report: Report) -> Iterator[str]:
    if not report.memory:
        return
    base = report.memory[0]
    yield f"{'memory of the agent':44}{'VMs':>6}{'RSS, MiB':>12}{'PSS, MiB':>12}{'KiB per VM beyond 0':>24}"
    for each in report.memory:
        beyond = f"{(each.rss_kib - base.rss_kib) / each.vms:.0f}" if each.vms else ""
        yield f"{'':44}{each.vms:>6}{each.rss_kib / 1024:>12.1f}{each.pss_kib / 1024:>12.1f}{beyond:>24}".rstrip()
    if len(report.memory) > 2:
        first, last = report.memory[1], report.memory[-1]
        each_kib = (last.rss_kib - first.rss_kib) / (last.vms - first.vms)
        yield f"  {f'each VM from {first.vms} to {last.vms}':42}{'':30}{each_kib:>24.0f}  aim <= 300"


def _idle(report: Report) -> Iterator[str]:
    idle = report.idle
    if idle is not None:
        vms = report.memory[-1].vms
        yield (
            f"idle agent with {vms} VMs, {idle.seconds:.0f} s: {idle.switches_per_s:.1f} wake-ups and "
            f"{idle.cpu_ms_per_s:.1f} ms of CPU per second"
        )
        each = idle.cpu_ms_per_s / vms
        yield f"  for each VM: {idle.switches_per_s / vms:.2f} wake-ups and {each:.3f} ms per second"


def _loads(report: Report) -> Iterator[str]:
    if not report.loads:
        return
    first = report.loads[0]
    title = f"API, ms; {first.clients} clients, each with a pause of {1000 * first.pause:.0f} ms"
    yield f"{title:56}{'answers':>8}{'p50':>8}{'p99':>8}{'worst':>8}"
    for load in report.loads:
        answers = (len(load.one_ms) + len(load.all_ms)) / load.seconds
        busy = f"{load.started} VMs started, {load.swapped} links swapped"
        yield (
            f"{busy if load.swapped else 'nothing else'} in {load.seconds:.0f} s; per second {answers:.0f} answers, "
            f"{load.cpu_ms_per_s:.0f} ms of the agent's CPU"
        )
        for name, took in (("GET /v1/vms/{name}", load.one_ms), ("GET /v1/vms", load.all_ms)):
            yield f"  {name:54}{len(took):>8}{_percentiles(took)}"


def _percentiles(times: Sequence[float]) -> str:
    return "".join(f"{_time(percentile(times, percent)):>8}" for percent in (50, 99, 100)) if times else ""


def _time(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _kills(report: Report) -> Iterator[str]:
    if not report.kills:
        return
    title = f"{report.kills[0].at_once} passts killed at once, to link.restored, ms"
    yield f"{title:56}{'times':>8}{'p50':>8}{'p99':>8}{'worst':>8}{'never':>8}"
    for name, times in (
        ("from the loss being noticed (outage_ms)", [each.outage_ms for each in report.kills]),
        ("from the signal", [each.wall_ms for each in report.kills]),
    ):
        counted = [math.inf if each is None else each for each in times]
        yield f"  {name:54}{len(counted):>8}{_percentiles(counted)}{times.count(None):>8}"


def _adoptions(report: Report) -> Iterator[str]:
    if not report.adoptions:
        return
    some, vms = report.adoptions, report.adoptions[0].vms
    yield f"agent killed with {vms} VMs, {len(some)} times; from the next agent's start to the last adoption"
    yield f"  {'agent.ready, s':42}{spread([each.seconds for each in some], 2):>30}  aim <= 2"
    own = [each.own_seconds for each in some if each.own_seconds is not None]
    if own:
        yield f"  {'qrapd_adoption_seconds':42}{spread(own, 2):>30}"
    fewest = min(some, key=lambda each: (each.adopted, each.unchanged, each.unharmed))
    yield (
        f"  at least {fewest.adopted} of {vms} adopted, {min(each.unchanged for each in some)} with the same QEMU "
        f"and passt, {min(each.unharmed for each in some)} of {fewest.guests} guests unharmed"
    )
