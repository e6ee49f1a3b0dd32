# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a link is without a passt, and what follows for the old one."""

from __future__ import annotations

import pytest

from qrapd.loss import Loss


@pytest.mark.parametrize(
    ("hidden", "died", "swapping", "whole", "expected"),
    [
        (False, False, False, True, None),
        (True, False, True, False, ("requested", "its passt cannot be told from other processes")),
        (False, True, True, False, ("exited", "while there was no supervisor")),
        (False, False, True, True, ("requested", "its stream could not be taken over")),
        (False, False, False, False, ("requested", "its stream could not be taken over")),
    ],
)
def test_a_link_that_was_left(
    hidden: bool, died: bool, swapping: bool, whole: bool, expected: tuple[str, str] | None
) -> None:
    """It goes on where all is there; else the first thing that is in the way is told."""
    loss = Loss.while_nobody_watched(7.0, hidden=hidden, died=died, swapping=swapping, whole=whole)
    assert expected == (None if loss is None else (loss.reason, loss.detail))
    assert loss is None or (7.0, False) == (loss.at, loss.told)


@pytest.mark.parametrize(
    ("reason", "needs_kill", "afterwards"),
    [
        ("hangup", True, "exited"),
        ("stalled", True, "stalled"),
        ("exited", False, "exited"),
        ("requested", False, "requested"),
    ],
)
def test_how_the_old_passt_is_seen_off(reason: str, needs_kill: bool, afterwards: str) -> None:
    """One that hangs, or has hung up and stays, is not asked to go; one that has ended is told as such."""
    loss = Loss(reason, 0.0)
    assert needs_kill == loss.needs_kill
    loss.note_exit()
    assert afterwards == loss.reason
