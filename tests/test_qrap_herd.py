# SPDX-License-Identifier: GPL-2.0-or-later
"""qraps that start at the same moment get a passt each, and so do wraps among them."""

from __future__ import annotations

import pytest

from qrap_herd import Herd, run_herd


def assert_one_each(herd: Herd) -> None:
    """All have come through, each with a passt of its own, and no passt was lost."""
    assert [] == herd.failures
    assert sorted((path, path, pid) for path, pid in herd.passts.items()) == sorted(herd.streams)
    assert len(herd.passts) == herd.alive


@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize("kind", ["persistent", "one-off"])
def test_each_qrap_gets_its_own_passt(count: int, kind: str) -> None:
    """All come through (of the C program 1 of 8), no passt ends, and each stream works."""
    herd = run_herd(count, 0) if kind == "persistent" else run_herd(0, count)
    assert_one_each(herd)
    assert count == herd.working


def test_wraps_in_a_herd_of_qraps_get_their_own_passt() -> None:
    """With a real QEMU each, on passts of both kinds; the machines come up, and SIGTERM ends them in order."""
    herd = run_herd(32, 32, wraps=4)
    assert_one_each(herd)
    assert (60, [0] * 4) == (herd.working, herd.statuses)
