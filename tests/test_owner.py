# SPDX-License-Identifier: GPL-2.0-or-later
"""Root at work in somebody else's directory goes on as that user, be it one that has no name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from qrapd.commands.owner import become_owner
become_owner(Path(sys.argv[1]))
print(*os.getresuid(), *os.getresgid(), os.getgroups())
"""


@pytest.mark.parametrize(
    ("uid", "gid", "expected"),
    [
        (54321, 54322, "54321 54321 54321 54322 54322 54322 []"),
        (54321, 0, "54321 54321 54321 65534 65534 65534 []"),
        (0, 54322, "0 0 0 0 0 0 "),
    ],
)
def test_users_without_a_name(uid: int, gid: int, expected: str, place: Path) -> None:
    """By number: all ids are theirs, and no group is root's. A directory of root's own changes nothing."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    vm = place / "web"
    vm.mkdir()
    os.chown(vm, uid, gid)
    done = subprocess.run([sys.executable, "-c", SCRIPT, vm], capture_output=True, text=True, timeout=60)
    assert "" == done.stderr
    assert done.stdout.startswith(expected)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """That is said elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "web"], capture_output=True, text=True, timeout=60
    )
    assert ("", f"{os.getuid()} ") == (done.stderr, done.stdout[: len(str(os.getuid())) + 1])
