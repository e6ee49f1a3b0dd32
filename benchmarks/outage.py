# SPDX-License-Identifier: GPL-2.0-or-later
"""Outage: how long a guest is cut off when its passt dies or hangs, under qrapd and without it; throughput; idleness.

README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import idle
import throughput
from common import RunFailed, warm_environment
from contenders import (
    Contender,
    DirectAlike,
    DirectStream,
    DirectVhostUser,
    Native,
    Parts,
    Qrapd,
    Slirp,
    StreamLoop,
    Swap,
    VhostUser,
)
from full_traffic import KINDS, host_end
from guest_pages import with_pages
from outage_table import Report, render
from outages import NEVER_AFTER_KILL, Outage, in_turn, never_after_stop, own_start, under_traffic

from qrapd import binaries
from qrapd.errors import QrapdError
from qrapd.guest import build_guest, default_cache

PROJECT = Path(__file__).resolve().parent.parent

RIVALS: list[type[Contender]] = [Swap, VhostUser, StreamLoop, Native]
NETWORKS: list[type[Contender]] = [Swap, DirectStream, DirectAlike, VhostUser, DirectVhostUser, Slirp]
SECTIONS = ("kills", "traffic", "stops", "throughput", "idle")

SENDING = "TCP up"
"""What the guest does while its passt is stopped, if it is not idle."""

RIVAL_STOPS = 2
"""Nobody but qrapd notices a passt that hangs: there is no spread to see."""

TRAFFIC_SHARE = {"swap": 40, "others": 10}
"""Of the kills of an idle guest, one in so many is repeated under each kind of traffic: 25 and 5. It takes 2 s each."""

OWN_STARTS = 200
"""Starts of a passt by hand between the kills, or twice as many; one after each kill if there are fewer kills."""


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", "--kills", type=int, default=1000, metavar="N", help="of swap; default: 1000")
    parser.add_argument("--rival-kills", type=int, default=50, metavar="N", help="of each other; default: 50")
    parser.add_argument("--stops", type=int, default=5, metavar="N", help="SIGSTOPs of qrapd's; default: 5")
    parser.add_argument("--stall-timeout", type=float, default=5.0, metavar="S", help="of qrapd; default: 5")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of throughput; default: 5")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each round; default: 3")
    parser.add_argument("--idle", type=float, default=30.0, metavar="S", help="left alone; default: 30")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="just these parts")
    parser.add_argument("--quick", action="store_true", help="a few of each: to see whether it works")
    parser.add_argument("--root", metavar="NAME", help="in that root of `make newer-roots`")
    parser.add_argument("--json", action="store_true", help="print every single one, for programs")
    asked = parser.parse_args()
    if asked.quick:
        asked.kills, asked.rival_kills, asked.stops, asked.stall_timeout = 3, 1, 1, 1.0
        asked.rounds, asked.seconds, asked.idle = 1, 0.5, 1.0
    return asked


def in_root(name: str) -> int:
    """Run this program with the same arguments in another root; returns its exit status."""
    words = sys.argv[1:]
    place = next(at for at, word in enumerate(words) if word.startswith("--root"))
    del words[place : place + (1 if "=" in words[place] else 2)]
    return subprocess.run(
        [str(PROJECT / "scripts/in-root"), name, ".venv/bin/python", "benchmarks/outage.py", *words],
        check=False,
    ).returncode


# --- the parts ----------------------------------------------------------------------------------------


class Measurement:
    """What is asked for, on this host."""

    def __init__(self, parts: Parts, asked: argparse.Namespace) -> None:
        self._parts = parts
        self._asked = asked
        self.report = Report(
            host=describe(parts),
            stall_timeout=asked.stall_timeout,
            never_after_kill=NEVER_AFTER_KILL,
            never_after_stop=never_after_stop(asked.stall_timeout),
            titles={kind.key: kind.title for kind in (*RIVALS, *NETWORKS)},
        )
        for kind in (*RIVALS, *NETWORKS):
            if reason := kind(parts).lacking():
                self.report.lacking[kind.key] = reason

    def run(self) -> None:
        """All parts, one after the other; one that fails does not keep the next from being measured."""
        wanted = set(self._asked.only)
        if wanted & {"kills", "traffic", "stops"}:
            with self._noting("outages"):
                self._measure_outages(wanted)
        if "throughput" in wanted:
            with self._noting("throughput"):
                kinds = self._able(NETWORKS)
                self.report.rates += throughput.measure(
                    self._parts, kinds, self._asked.rounds, self._asked.seconds
                )
        if "idle" in wanted:
            with self._noting("idle"), Swap(self._parts) as vm:
                self.report.idle = idle.measure(vm, self._asked.idle)

    def _able(self, kinds: Sequence[type[Contender]]) -> list[type[Contender]]:
        return [kind for kind in kinds if kind.key not in self.report.lacking]

    @contextlib.contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        say(part)
        try:
            yield
        except RunFailed as error:
            print(f"outage: {error}", file=sys.stderr)
            self.report.failed.append(f"{part}: {str(error).partition(chr(10))[0][:300]}")

    def _measure_outages(self, wanted: set[str]) -> None:
        with contextlib.ExitStack() as stack:
            host = stack.enter_context(host_end())
            vms = [stack.enter_context(kind(self._parts)) for kind in self._able(RIVALS)]
            kills = {vm.key: self._asked.kills if vm.key == "swap" else self._asked.rival_kills for vm in vms}
            if "kills" in wanted:
                outages = in_turn(vms, kills, signal.SIGKILL, NEVER_AFTER_KILL)
                self._note(outages, "kill -9", between=self._start_by_hand)
            if "traffic" in wanted:
                shares = {key: TRAFFIC_SHARE.get(key, TRAFFIC_SHARE["others"]) for key in kills}
                some = {key: max(1, kills[key] // shares[key]) for key in kills}
                for kind in KINDS:
                    with self._noting(f"kill -9, {kind}"):
                        self._note(
                            under_traffic(host, vms, some, kind, signal.SIGKILL, NEVER_AFTER_KILL),
                            f"kill -9, {kind}",
                        )
            if "stops" in wanted:
                limit = never_after_stop(self._asked.stall_timeout)
                stops = {
                    vm.key: self._asked.stops
                    if isinstance(vm, Qrapd)
                    else min(self._asked.stops, RIVAL_STOPS)
                    for vm in vms
                }
                self._note(in_turn(vms, stops, signal.SIGSTOP, limit), "SIGSTOP")
                with self._noting(f"SIGSTOP, {SENDING}"):
                    self._note(
                        under_traffic(host, vms, stops, SENDING, signal.SIGSTOP, limit), f"SIGSTOP, {SENDING}"
                    )
            self.report.restarts = {vm.key: vm.restarts for vm in vms}

    def _note(
        self, outages: Iterable[Outage], what: str, between: Callable[[int], None] | None = None
    ) -> None:
        for number, outage in enumerate(outages, start=1):
            self.report.outages.append(outage)
            if between is not None:
                between(number)
            if number % 50 == 0:
                say(f"{what}: {number}")

    def _start_by_hand(self, number: int) -> None:
        if number % max(1, self._asked.kills // OWN_STARTS) == 0:
            self.report.own_starts_ms.append(own_start(self._parts))


def describe(parts: Parts) -> dict[str, str]:
    """What was measured on."""
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    works, _reason = binaries.kvm_works()
    return {
        "system": system,
        "qemu": ".".join(str(each) for each in binaries.qemu_version(parts.qemu)),
        "passt": binaries.passt_version(parts.passt) or "of unknown version",
        "accelerator": "KVM" if works else "TCG",
        "kernel": platform.release(),
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


def say(text: str) -> None:
    """How far it has come."""
    print(f"outage: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


def as_json(report: Report) -> dict[str, Any]:
    """For programs."""
    return dataclasses.asdict(report)


def main() -> int:
    """Measure and tell. Returns the exit status: no time fails, only a run that does."""
    asked = read_arguments()
    if asked.root:
        return in_root(asked.root)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is cleaned up
    try:
        guest = build_guest(default_cache(), say=lambda line: print(line, file=sys.stderr))
        with with_pages(guest) as guest, tempfile.TemporaryDirectory(prefix="qrapd-bytecode-") as bytecode:
            measurement = Measurement(
                Parts(guest, warm_environment(Path(bytecode)), asked.stall_timeout), asked
            )
            measurement.run()
    except QrapdError as error:
        print(f"outage: {error}; {error.hint}" if error.hint else f"outage: {error}", file=sys.stderr)
        return error.exit_status
    report = measurement.report
    print(json.dumps(as_json(report), indent=2) if asked.json else render(report))
    return 1 if report.failed or any(outage.ended for outage in report.outages) else 0


if __name__ == "__main__":
    sys.exit(main())
