# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus is told of a host's VMs and links, and of the process that has them; docs/metrics.md lists it.

Nothing is counted here. What the VMs' trackers have counted is copied in the event loop (:func:`take`), and made into
text in a thread (:func:`encode`): for 200 VMs with two links each that takes 85 ms, longer than the loop may be held up
(measured; beside the thread it waits for its turn 5 ms at a time). A VM that is gone is in no copy: its series end.

Names are by https://prometheus.io/docs/practices/naming/: base units, ``_total`` for what only grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import anyio
import anyio.to_thread
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from qrapd import __version__
from qrapd.hosting import Host, HostVitals
from qrapd.status_tracker import LOSS_REASONS, OUTAGE_BOUNDS, Measures
from qrapd.vm_status import LinkStatus, VmState, VmStatus

__all__ = ["Copy", "encode", "render", "scrape", "take"]

_VM_STATES: Sequence[str] = get_args(VmState)
_LINK_STATES: Sequence[str] = get_args(LinkStatus.model_fields["state"].annotation)

_BUCKETS = (*map(str, OUTAGE_BOUNDS), "+Inf")

_one_at_a_time = anyio.CapacityLimiter(1)
"""Of many scrapes at once each would only be slower, and together they would keep threads from others."""


@dataclass(frozen=True, slots=True)
class Copy:
    """All that the metrics are made of, as it was at one moment."""

    vms: Sequence[tuple[VmStatus, Measures]]
    vitals: HostVitals


def take(host: Host) -> Copy:
    """What there is now; for the event loop's thread. For 200 VMs with two links each: 3 ms (measured)."""
    return Copy([(vm.status, vm.measures) for vm in host.vms.values()], host.vitals)


def encode(copy: Copy, *, accept: str = "") -> tuple[bytes, str]:
    """The text, and its content type by the header ``Accept``: Prometheus' own format, or OpenMetrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Vms(copy))
    registry.register(ProcessCollector(registry=None))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


def render(host: Host, *, accept: str = "") -> tuple[bytes, str]:
    """Both steps at once, where it does not matter how long it takes."""
    return encode(take(host), accept=accept)


async def scrape(host: Host, *, accept: str = "") -> tuple[bytes, str]:
    """The same for a server: the event loop is held up by the first step only."""
    async with _one_at_a_time:
        copy = take(host)
        # To its end, even if the client has gone: it is short, and the next one is to wait for it.
        return await anyio.to_thread.run_sync(partial(encode, copy, accept=accept))


class _Family(Metric):
    """A metric with its samples; prometheus_client's own classes make a dictionary for each, of names given twice."""

    def add(self, labels: dict[str, str], value: float, suffix: str = "") -> None:
        self.samples.append(Sample(self.name + suffix, labels, value))


def _gauge(name: str, documentation: str) -> _Family:
    return _Family(name, documentation, "gauge")


def _counter(name: str, documentation: str) -> _Family:
    """``_total`` is put behind the name."""
    return _Family(name, documentation, "counter")


class _Vms(Collector):
    """The metrics of one copy."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def collect(self) -> Iterator[Metric]:
        """Each once, whether it has samples or not."""
        yield from _process_metrics(self._copy.vitals)
        yield from _vm_metrics(self._copy.vms)
        yield from _link_metrics(self._copy.vms)


def _process_metrics(vitals: HostVitals) -> Iterable[Metric]:
    build = _Family("qrapd_build", "The version of qrapd that runs; always 1.", "info")
    build.add({"version": __version__}, 1, "_info")
    lag = _gauge(
        "qrapd_event_loop_lag_seconds", "How late the event loop was at worst since this was last asked for."
    )
    if vitals.loop_lag_seconds is not None:
        lag.add({}, vitals.loop_lag_seconds)
    adoption = _gauge(
        "qrapd_adoption_seconds",
        "From this process's start to its last takeover of a VM that another one had left.",
    )
    if vitals.adoption_seconds is not None:
        adoption.add({}, vitals.adoption_seconds)
    return build, lag, adoption


def _vm_metrics(vms: Sequence[tuple[VmStatus, Measures]]) -> Iterable[Metric]:
    info = _Family("qrapd_vm", "A VM, and who runs it: the agent, a unit or a shell; always 1.", "info")
    state = _gauge("qrapd_vm_state", "1 for the state that a VM is in, 0 for the others.")
    since = _gauge("qrapd_vm_state_since_timestamp_seconds", "When a VM came to its state.")
    start = _gauge("qrapd_vm_start_seconds", "How long the last start of a VM took, until its machine ran.")
    restarts = _counter("qrapd_vm_restarts", "Restarts of a VM by its supervisor.")
    failures = _counter("qrapd_vm_failures", "Ends of a VM that were failures.")
    for status, measures in vms:
        vm = {"vm": status.name}
        info.add({**vm, "origin": status.origin}, 1, "_info")
        for each in _VM_STATES:
            state.add({**vm, "state": each}, each == status.state)
        since.add(vm, status.since.timestamp())
        if measures.start_seconds is not None:
            start.add(vm, measures.start_seconds)
        restarts.add(vm, status.restarts, "_total")
        failures.add(vm, measures.failures, "_total")
    return info, state, since, start, restarts, failures


def _link_metrics(vms: Sequence[tuple[VmStatus, Measures]]) -> Iterable[Metric]:
    info = _Family("qrapd_link", "A link of a VM, and its mode; always 1.", "info")
    state = _gauge("qrapd_link_state", "1 for the state that a link is in, 0 for the others.")
    generation = _gauge("qrapd_link_generation", "Grows by one with every new stream of a link.")
    unread = _gauge(
        "qrapd_link_unread_bytes", "What waits in a link's stream to be read by passt, or by QEMU."
    )
    attempts = _counter("qrapd_link_failed_attempts", "Attempts to replace a link's passt that have failed.")
    outages = _counter("qrapd_link_outages", "Outages of a link that have begun, by why its passt was lost.")
    seconds = _Family(
        "qrapd_link_outage_seconds", "Outages of a link that are over, by how long.", "histogram"
    )
    for status, measures in vms:
        for link in status.links:
            labels = {"vm": status.name, "link": str(link.index)}
            info.add({**labels, "mode": link.mode}, 1, "_info")
            for each in _LINK_STATES:
                state.add({**labels, "state": each}, each == link.state)
            generation.add(labels, link.generation)
            for by, count in (("passt", link.unread_by_passt), ("qemu", link.unread_by_qemu)):
                if count is not None:
                    unread.add({**labels, "by": by}, count)
        for measured in measures.links:
            labels = {"vm": status.name, "link": str(measured.index)}
            attempts.add(labels, measured.failed_attempts, "_total")
            for reason, lost in zip(LOSS_REASONS, measured.lost, strict=True):
                outages.add({**labels, "reason": reason}, lost, "_total")
            _add_histogram(seconds, labels, measured.outage_counts, measured.outage_total)
    return info, state, generation, unread, attempts, outages, seconds


def _add_histogram(family: _Family, labels: dict[str, str], counts: Sequence[int], total: float) -> None:
    up_to = 0
    for bound, count in zip(_BUCKETS, counts, strict=True):
        up_to += count
        family.add({**labels, "le": bound}, up_to, "_bucket")
    family.add(labels, up_to, "_count")
    family.add(labels, total, "_sum")
