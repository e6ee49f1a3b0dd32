# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of programs: what passt and QEMU of any version can do, and what is missed."""

from __future__ import annotations

import pytest

from qrapd.doctor import programs


def test_passt_needs_fd_and_nothing_else() -> None:
    """--fd decides; whatever else is missing is named."""
    with_fd = programs.judge_passt("/usr/bin/passt", None, frozenset(["fd"]))
    without = programs.judge_passt("/usr/bin/passt", "2022_1", frozenset(["socket"]))

    assert (with_fd.status, without.status) == ("ok", "problem")
    assert "lacks --map-host-loopback" in with_fd.found
    assert without.found.startswith("/usr/bin/passt, version 2022_1")


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/usr/bin/pesto", {"conf-path"}, "ok"),
        ("/usr/bin/pesto", set(), "ok"),
        (None, {"conf-path"}, "warning"),
        (None, set(), "ok"),
    ],
)
def test_pesto_is_missed_where_passt_would_listen(path: str | None, options: set[str], status: str) -> None:
    """An old passt has no use for pesto, so that there is nothing to install."""
    assert status == programs.judge_pesto(path, frozenset(options)).status


@pytest.mark.parametrize(
    ("version", "netdevs", "status", "words"),
    [
        ((7, 2, 22), {"socket", "hubport", "vhost-user"}, "ok", "swap, vhost-user (by reconnect)"),
        ((9, 2, 0), {"socket", "hubport", "vhost-user"}, "ok", "swap, vhost-user (by reconnect-ms)"),
        ((10, 1, 0), {"socket", "hubport", "vhost-user", "passt"}, "ok", "native"),
        ((6, 2, 0), {"socket", "hubport"}, "warning", "tested from 7.2"),
        ((11, 0, 0), {"user", "hubport"}, "problem", "lacks the network backends socket"),
    ],
)
def test_link_modes_of_a_qemu(
    version: tuple[int, int, int], netdevs: set[str], status: str, words: str
) -> None:
    """What a QEMU can carry follows from its backends; only the name of an option from its version."""
    finding = programs.judge_qemu(
        "qemu-system-x86_64", "/usr/bin/qemu", version, frozenset(netdevs), has_sandbox=True
    )

    assert status == finding.status
    assert words in finding.found


@pytest.mark.parametrize(("has", "words"), [(True, "; has a sandbox"), (False, "built without seccomp")])
def test_the_sandbox_of_a_qemu(has: bool, words: str) -> None:
    """Without it VMs run all the same."""
    netdevs = frozenset({"socket", "hubport"})
    finding = programs.judge_qemu("qemu-system-mips", "/usr/bin/qemu", (7, 2, 0), netdevs, has_sandbox=has)
    assert "ok" == finding.status
    assert words in finding.found
