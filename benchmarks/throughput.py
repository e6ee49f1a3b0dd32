# SPDX-License-Identifier: GPL-2.0-or-later
"""How much gets through: TCP from the guest to the host and back, on each kind of network in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common import RunFailed
from contenders import Contender, Parts
from full_traffic import FLOW_TIMEOUT, get, host_end

__all__ = ["DIRECTIONS", "Rate", "measure"]

DIRECTIONS = {"up": "tcp-up", "down": "tcp-down"}

WARM_UP = 0.5
"""Seconds until TCP's windows are open."""


@dataclass(frozen=True)
class Rate:
    """What passed in one direction, in one round."""

    contender: str
    direction: str
    mbit_s: float


def measure(parts: Parts, kinds: Sequence[type[Contender]], rounds: int, seconds: float) -> list[Rate]:
    """All of them in turn, beginning with another one each round; all guests are up all the time, and one sends."""
    rates = []
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(kind(parts)) for kind in kinds]
        for number in range(rounds):
            print(f"throughput: round {number + 1} of {rounds}", file=sys.stderr)
            first = number % len(vms)
            for vm in vms[first:] + vms[:first]:
                rates += [Rate(vm.key, way, _one(vm, way, seconds)) for way in DIRECTIONS]
    return rates


def _one(vm: Contender, direction: str, seconds: float) -> float:
    """Mbit/s, counted at the host. The guest's end stops when the host's does."""
    with host_end() as host:
        port = host.ports[DIRECTIONS[direction]]
        get(vm, f"/cgi-bin/blast?{direction},{vm.router()},{port}")
        started = time.monotonic()
        while not any(dataclasses.astuple(host.count())[:2]):
            if time.monotonic() > started + FLOW_TIMEOUT:
                raise RunFailed(f"{vm.title}: nothing passes {direction}")
            time.sleep(0.01)
        time.sleep(WARM_UP)
        before = host.count()
        time.sleep(seconds)
        after = host.count()
    passed = after.received - before.received + after.sent - before.sent
    return 8e-6 * passed / (after.at - before.at)
