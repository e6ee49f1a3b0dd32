# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of user namespaces and low ports, and that its remedies mend."""

from __future__ import annotations

import errno
import shutil
import socket
import sys
from pathlib import Path

import pytest

from qrapd.doctor import kernel
from qrapd.doctor.trial import try_passt
from test_doctor import isolated, run


@pytest.mark.parametrize(
    ("failure", "settings", "started", "status", "command"),
    [
        (0, {}, False, "ok", None),
        (errno.ENOSPC, {"user.max_user_namespaces": 0}, False, "problem", "user.max_user_namespaces=15000"),
        (
            errno.EPERM,
            {"kernel.unprivileged_userns_clone": 0, "user.max_user_namespaces": 9},
            False,
            "problem",
            "kernel.unprivileged_userns_clone=1",
        ),
        (
            0,
            {"kernel.apparmor_restrict_unprivileged_userns": 1},
            False,
            "problem",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (0, {"kernel.apparmor_restrict_unprivileged_userns": 1}, True, "ok", None),
        (errno.EPERM, {}, False, "problem", None),
        (None, {}, False, "warning", None),
    ],
)
def test_what_mends_user_namespaces(
    failure: int | None, settings: dict[str, int], started: bool, status: str, command: str | None
) -> None:
    """Just the setting that is in the way is changed; what passt may do all the same is no problem."""
    finding = kernel.judge_user_namespaces(failure, settings, passt_started=started)

    assert status == finding.status
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


def test_the_remedy_for_user_namespaces_mends_them() -> None:
    """Really denied, in a user namespace of its own, then really mended by the command printed."""
    if shutil.which("sysctl") is None:
        pytest.skip("sysctl is not installed")
    script = """
import subprocess
from pathlib import Path
from qrapd.doctor import kernel
Path("/proc/sys/user/max_user_namespaces").write_text("0")
finding = kernel.examine_user_namespaces(None)
print(finding.status)
subprocess.run(finding.remedy, shell=True, check=True, stdout=subprocess.DEVNULL)
print(kernel.examine_user_namespaces(None).status)
"""
    done = run(script, *isolated("--user", "--map-root-user"), sys.executable)

    assert done.stdout.split() == ["problem", "ok"], done.stderr


@pytest.mark.parametrize(
    ("first_open", "bound", "status", "remedy"),
    [
        (1024, False, "warning", True),
        (1024, None, "warning", True),
        (1024, True, "ok", False),
        (80, False, "ok", False),
        (443, False, "warning", True),
        (0, None, "ok", False),
    ],
)
def test_what_mends_low_ports(first_open: int, bound: bool | None, status: str, remedy: bool) -> None:
    """What a trial gave counts more than the setting: root's passt binds low ports."""
    finding = kernel.judge_low_ports(first_open, bound)

    assert status == finding.status
    assert remedy == (finding.remedy is not None)


def test_low_ports_are_really_tried() -> None:
    """The finding agrees with what a passt of this user does with a low port of the loopback address."""
    first_open = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    port = kernel.free_low_port(first_open, kernel.taken_ports())
    if port is None:
        pytest.skip("every port is open to all here")
    finding = kernel.examine_low_ports(try_passt())

    bound = try_passt("--tcp-ports", f"127.0.0.1/{port}").status == 0
    assert bound == (finding.status == "ok")


def test_listening_ports_are_read() -> None:
    """From the kernel's table, where a port of ours must be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = kernel.listening_ports(Path("/proc/net/tcp").read_text())
        assert server.getsockname()[1] in ports


def test_a_free_low_port_is_privileged_and_not_taken() -> None:
    """The highest one below both limits; none where all are open or taken."""
    cases = [(1024, {1023, 1022}), (80, set[int]()), (5000, set[int]()), (1, set[int]()), (3, {1, 2})]

    expected = [1021, 79, 1023, None, None]
    assert expected == [kernel.free_low_port(first, frozenset(taken)) for first, taken in cases]
