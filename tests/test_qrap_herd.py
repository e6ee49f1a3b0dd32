# SPDX-License-Identifier: GPL-2.0-or-later
"""qraps that start at the same moment get a passt each."""

from __future__ import annotations

import pytest

from qrap_herd import run_herd


@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize("options", [[], ["--one-off"]], ids=["persistent", "one-off"])
def test_each_qrap_gets_its_own_passt(count: int, options: list[str]) -> None:
    """All come through (of the C program 1 of 8), no passt ends, and each stream works."""
    herd = run_herd(count, *options)
    assert [] == herd.failures
    assert sorted((path, path, pid) for path, pid in herd.passts.items()) == sorted(herd.streams)
    assert (count, count) == (herd.alive, herd.working)
