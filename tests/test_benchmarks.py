# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmarks run, so that figures can be had whenever someone wants them. What they measure is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["start_up", "overhead", "probe"])
def test_one_run(name: str) -> None:
    """One run of each ends well and prints its figures."""
    if name == "probe" and os.geteuid() != 0:
        pytest.skip("bench-probe needs root")
    assert run(name, "--runs", "1")


@pytest.mark.timeout(600)
def test_outage() -> None:
    """A few kills, stops and bytes of each kind: every part has its figures, and every network came back."""
    report = run("outage", "--quick")
    swap = [outage for outage in report["outages"] if outage["contender"] == "swap"]
    kinds = {(outage["number"], outage["traffic"]) for outage in swap}
    assert {("SIGKILL", ""), ("SIGKILL", "TCP both"), ("SIGSTOP", ""), ("SIGSTOP", "TCP up")} <= kinds
    assert [] == [outage for outage in swap if outage["ms"] is None]
    assert report["own_starts_ms"]
    assert {"swap", "direct", "slirp"} <= {rate["contender"] for rate in report["rates"]}
    assert report["idle"]


def test_agent() -> None:
    """A few VMs: every part has its figures, every network came back, and an adoption harmed nobody."""
    report = run("agent", "--quick")
    assert ["agent", "run"] == [start["by"] for start in report["starts"]]
    assert [(6, 1)] * 2 == [(start["vms"], start["guests"]) for start in report["starts"]]
    assert [0, 1, 3, 6] == [each["vms"] for each in report["memory"]]
    assert report["idle"]
    quiet, busy = report["loads"]
    assert 0 == quiet["swapped"] < busy["swapped"]
    assert all(load["one_ms"] and load["all_ms"] for load in (quiet, busy))
    assert 3 == len(report["kills"])
    assert [] == [kill for kill in report["kills"] if kill["wall_ms"] is None]
    (adoption,) = report["adoptions"]
    assert (4, 4) == (adoption["adopted"], adoption["unchanged"])
    assert (1, 1) == (adoption["guests"], adoption["unharmed"])


def run(name: str, *words: str) -> Any:
    """What a benchmark prints for programs."""
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *words, "--json"],
        capture_output=True,
        text=True,
        timeout=580,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    return json.loads(ended.stdout)
