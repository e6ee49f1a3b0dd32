# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is at the other end of a socket, as the kernel has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qrapd.api.access import Peer
from qrapd.api.peers import read_peer
from serving import listen
from support import NOBODY, PATIENCE


def test_this_process() -> None:
    """A pair is connected to its own process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer(os.getpid(), os.getuid(), os.getgid(), tuple(os.getgroups())) == read_peer(ours)


@pytest.mark.parametrize("groups", [[], [7], [4242, 7], list(range(1000, 1256)), list(range(1000, 1257))])
def test_another_user(place: Path, groups: list[int]) -> None:
    """What it was when it connected, with all its groups; more of them than 256 are read in another way."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    script = f"""if True:
        import os, socket
        os.setgroups({groups}); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
        made = socket.socket(socket.AF_UNIX)
        made.connect({str(place / "x.sock")!r})
        print(os.getpid())
        """
    with listen(place / "x.sock") as listener:
        command = [sys.executable, "-S", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert "" == done.stderr
        connected, _ = listener.accept()
        with connected:
            peer = read_peer(connected)
    assert Peer(int(done.stdout), NOBODY, NOBODY, tuple(sorted(groups))) == peer


def test_not_a_unix_socket() -> None:
    """Nobody is taken for root because there is nothing to be read."""
    with socket.socket(socket.AF_INET) as unconnected, pytest.raises(OSError, match="No data available"):
        read_peer(unconnected)
