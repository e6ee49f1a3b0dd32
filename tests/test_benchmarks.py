# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmarks run, so that figures can be had whenever someone wants them. What they measure is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["start_up", "overhead", "probe"])
def test_one_run(name: str) -> None:
    """One run of each ends well and prints its figures."""
    if name == "probe" and os.geteuid() != 0:
        pytest.skip("bench-probe needs root")
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--runs", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    assert json.loads(ended.stdout)
