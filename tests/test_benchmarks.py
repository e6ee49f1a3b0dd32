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
