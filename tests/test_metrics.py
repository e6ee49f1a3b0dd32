# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics: what a scrape says of VMs whose story is known, in both formats, by the parsers of the client library."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

import anyio
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from qrapd import __version__, metrics
from qrapd.hosting import Host, HostVitals
from qrapd.status_tracker import LOSS_REASONS, OUTAGE_BOUNDS, Measures, StatusTracker
from qrapd.vm_status import VmStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass
class HostedVm:
    """A VM that is nothing but its tracker."""

    tracker: StatusTracker

    @property
    def status(self) -> VmStatus:
        """As the host has it."""
        return self.tracker.status({0: (4608, 0)})

    @property
    def measures(self) -> Measures:
        """As the host has them."""
        return self.tracker.measures


@dataclass
class FakeHost:
    """What metrics need of a host."""

    vms: Mapping[str, HostedVm] = field(default_factory=dict)
    vitals: HostVitals = field(default_factory=lambda: HostVitals(0.25, 1.5))


def make_vm(name: str, outages: tuple[float, ...] = (), *, ready: bool = True) -> HostedVm:
    """One with two links, whose first has had outages of so many milliseconds."""
    tracker = StatusTracker(name, "agent", [(0, "swap"), (1, "native")], NOW, clock=lambda: 0.0)
    if ready:
        tracker.note("vm.ready", {"qemu_pid": 1}, NOW)
    for number, outage in enumerate(outages, 2):
        tracker.note("link.lost", {"link": 0, "reason": "stalled"}, NOW)
        tracker.note("link.failed", {"link": 0, "retry_in_ms": 50, "error": "x"}, NOW)
        tracker.note("link.restored", {"link": 0, "outage_ms": outage, "generation": number}, NOW)
    return HostedVm(tracker)


def make_host(*vms: HostedVm) -> Host:
    """With these VMs."""
    return cast("Host", FakeHost({vm.tracker.name: vm for vm in vms}))


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(host: Host) -> Samples:
    """Name and labels of each sample, with its value."""
    text, _ = metrics.render(host)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Of one sample; None where there is none."""
    return samples.get((name, frozenset(labels.items())))


def ones(samples: Samples, name: str, **labels: str) -> set[str]:
    """In which states it is, of those that there are."""
    wanted = set(labels.items())
    return {
        dict(found)["state"]
        for (each, found), number in samples.items()
        if each == name and wanted <= found and number == 1
    }


def test_a_vm() -> None:
    """In one state at a time, with what was counted."""
    vm = make_vm("web")
    samples = scraped(make_host(vm))
    assert 1 == value(samples, "qrapd_vm_info", vm="web", origin="agent")
    assert {"ready"} == ones(samples, "qrapd_vm_state", vm="web")
    assert NOW.timestamp() == value(samples, "qrapd_vm_state_since_timestamp_seconds", vm="web")
    assert 0 == value(samples, "qrapd_vm_start_seconds", vm="web")
    vm.tracker.note("vm.exited", {"reason": "failed"}, NOW)
    assert {"failed"} == ones(scraped(make_host(vm)), "qrapd_vm_state", vm="web")
    vm.tracker.note("vm.restarting", {"delay_ms": 5}, NOW)
    samples = scraped(make_host(vm))
    assert {"starting"} == ones(samples, "qrapd_vm_state", vm="web")
    assert 1 == value(samples, "qrapd_vm_restarts_total", vm="web")
    assert 1 == value(samples, "qrapd_vm_failures_total", vm="web")


def test_links() -> None:
    """Each in one state, with its generation, what waits in its stream, and its outages by reason."""
    samples = scraped(make_host(make_vm("web", (34.5, 40))))
    link = {"vm": "web", "link": "0"}
    assert {"up"} == ones(samples, "qrapd_link_state", **link)
    assert {"starting"} == ones(samples, "qrapd_link_state", vm="web", link="1")
    assert 1 == value(samples, "qrapd_link_info", **link, mode="swap")
    assert 3 == value(samples, "qrapd_link_generation", **link)
    assert 4608 == value(samples, "qrapd_link_unread_bytes", **link, by="passt")
    assert 0 == value(samples, "qrapd_link_unread_bytes", **link, by="qemu")
    assert 2 == value(samples, "qrapd_link_failed_attempts_total", **link)
    found = {each: value(samples, "qrapd_link_outages_total", **link, reason=each) for each in LOSS_REASONS}
    assert {"exited": 0, "hangup": 0, "stalled": 2, "requested": 0} == found


def test_the_histogram() -> None:
    """Buckets in seconds, each with those below it; what took longer than the last bound is counted, too."""
    samples = scraped(make_host(make_vm("web", (10, 10.5, 400, 3_600_000))))
    link = {"vm": "web", "link": "0"}
    name = "qrapd_link_outage_seconds"
    buckets = {
        bound: value(samples, f"{name}_bucket", **link, le=f"{bound}") for bound in map(float, OUTAGE_BOUNDS)
    }
    expected = {0.01: 1, 0.025: 2, 0.25: 2, 0.5: 3, 60.0: 3}
    assert expected == {bound: buckets[bound] for bound in expected}
    assert 4 == value(samples, f"{name}_bucket", **link, le="+Inf") == value(samples, f"{name}_count", **link)
    assert 3600.4205 == pytest.approx(value(samples, f"{name}_sum", **link))
    # A link that was never lost has its series from the start: a rate over what begins with its first outage is none.
    assert 0 == value(samples, f"{name}_count", vm="web", link="1")


def test_what_is_not_known_is_not_there() -> None:
    """Rather than 0, which would be a lie."""
    samples = scraped(make_host(make_vm("web", ready=False)))
    assert None is value(samples, "qrapd_vm_start_seconds", vm="web")
    assert None is value(samples, "qrapd_link_unread_bytes", vm="web", link="1", by="qemu")
    samples = scraped(cast("Host", FakeHost(vitals=HostVitals(None))))
    assert None is value(samples, "qrapd_event_loop_lag_seconds")
    assert None is value(samples, "qrapd_adoption_seconds")


def test_a_vm_that_is_gone_disappears() -> None:
    """It has no series any more; one that is there has its own."""
    web, db = make_vm("web", (5,)), make_vm("db", (5,))
    both, rest = scraped(make_host(web, db)), scraped(make_host(db))
    of_web = {key for key in both if ("vm", "web") in key[1]}
    assert len(of_web) > 40
    assert set(both) - of_web == set(rest)


def test_the_process() -> None:
    """Its version, its loop, its adoption, and what every process has under the names that all use."""
    samples = scraped(make_host())
    assert 1 == value(samples, "qrapd_build_info", version=__version__)
    assert 0.25 == value(samples, "qrapd_event_loop_lag_seconds")
    assert 1.5 == value(samples, "qrapd_adoption_seconds")
    start = value(samples, "process_start_time_seconds")
    assert start is not None
    assert 1e9 < start
    fds = value(samples, "process_open_fds")
    assert fds is not None
    assert 3 <= fds <= len(os.listdir("/proc/self/fd")) + 100  # noqa: PTH208 (as the library counts)
    assert {"qrapd", "process"} == {name.partition("_")[0] for name, _ in samples}


def test_formats() -> None:
    """Prometheus' own for those who do not ask; OpenMetrics for those who do, and it says the same."""
    host = make_host(make_vm("web", (34.5,)))
    plain, plain_type = metrics.render(host)
    assert plain_type.startswith("text/plain; version=0.0.4")
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    text, text_type = metrics.render(host, accept=accept)
    assert text_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    families_of_both = (
        parse_text(plain.decode()),
        parse_openmetrics(text.decode()),  # type: ignore[no-untyped-call]
    )
    ours = [
        {
            (sample.name, frozenset(sample.labels.items()), sample.value)
            for family in families
            for sample in family.samples
            if sample.name.startswith("qrapd_")
        }
        for families in families_of_both
    ]
    assert ours[0] == ours[1]


def test_every_metric_has_a_type_and_a_help() -> None:
    """No sample is outside of a family that says what it is, also where there is no VM."""
    for host in (make_host(), make_host(make_vm("web"))):
        for family in parse_text(metrics.render(host)[0].decode()):
            assert family.documentation.endswith(".")
            assert family.type in {"gauge", "counter", "histogram"}


async def test_a_scrape_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is made in a thread, one at a time; what there is, is looked at in the loop's."""
    looked: list[int] = []
    writing: list[int] = []
    go_on = threading.Event()
    take, encode = metrics.take, metrics.encode

    def noted_take(host: Host) -> metrics.Copy:
        looked.append(threading.get_ident())
        return take(host)

    def slow_encode(copy: metrics.Copy, *, accept: str = "") -> tuple[bytes, str]:
        writing.append(threading.get_ident())
        assert go_on.wait(30)
        return encode(copy, accept=accept)

    monkeypatch.setattr(metrics, "take", noted_take)
    monkeypatch.setattr(metrics, "encode", slow_encode)
    host = make_host(make_vm("web"))
    found: list[bytes] = []

    async def scrape() -> None:
        found.append((await metrics.scrape(host))[0])

    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(scrape)
                while not writing:  # noqa: ASYNC110 (a thread sets it)
                    await anyio.sleep(0.01)
                await anyio.wait_all_tasks_blocked()
                assert [threading.get_ident()] == looked
                assert threading.get_ident() not in writing
                go_on.set()
    finally:
        go_on.set()
    assert 3 == len(found) == len(looked)
    assert all(b'qrapd_vm_info{origin="agent",vm="web"} 1.0' in each for each in found)


def test_many_vms() -> None:
    """200 with two links each: all are there."""
    host = make_host(*(make_vm(f"vm-{number}") for number in range(200)))
    samples = scraped(host)
    assert 200 == sum(name == "qrapd_vm_info" for name, _ in samples)
    assert 400 == sum(name == "qrapd_link_generation" for name, _ in samples)
