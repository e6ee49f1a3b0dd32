# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing in the event loop blocks: what does would hold up every other link, and the guest's way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import processes_with, write_vm

pytestmark = pytest.mark.link


def test_the_life_of_a_vm(place: Path) -> None:
    """Started, healed, looked at, its file read again, stopped: each call that could block is an error there."""
    vm = write_vm(place, "loop", qemu="powerdown_timeout = 0")
    script = Path(__file__).parent / "nonblocking_run.py"
    # In a process of its own: what watches for blocking calls replaces functions of Python's for good.
    command = [sys.executable, str(script), str(vm.path), str(place / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)
    assert [] == processes_with(str(place))
