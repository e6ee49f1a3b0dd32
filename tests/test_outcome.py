# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM ended, by what was seen of it; how the end of a QEMU is read, test_lifecycle.py has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qrapd.errors import QmpFailed, QrapdError, Unavailable
from qrapd.lifecycle import Reason
from qrapd.outcome import Outcome, Seen, failed_adoption, first_error
from qrapd.process import ExitStatus

OURS = QmpFailed("why we gave it up")
ITS_OWN = Unavailable("what QEMU wrote")
IN_ORDER, BADLY, KILLED = ExitStatus(exit_code=0), ExitStatus(exit_code=1), ExitStatus(signal=9)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (Seen(error=OURS), Outcome(Reason.FAILED, OURS)),
        (Seen(stop_requested=True), Outcome(Reason.REQUEST)),
        (Seen(stop_requested=True, error=OURS), Outcome(Reason.FAILED, OURS)),
        (Seen(status=IN_ORDER, greeted=True), Outcome(Reason.GUEST_SHUTDOWN)),
        (Seen(status=KILLED, greeted=True, stop_requested=True, error=OURS), Outcome(Reason.REQUEST)),
        (Seen(status=KILLED, greeted=True), Outcome(Reason.KILLED, ITS_OWN)),
        (Seen(status=BADLY), Outcome(Reason.FAILED, ITS_OWN)),
        (Seen(status=BADLY, error=OURS), Outcome(Reason.FAILED, ITS_OWN)),
        # SIGTERM of ours is an end in order to QEMU, and tells nobody why it was sent.
        (
            Seen(status=IN_ORDER, greeted=True, shutdown_cause="host-signal", error=OURS),
            Outcome(Reason.FAILED, OURS),
        ),
        (
            Seen(status=IN_ORDER, greeted=True, shutdown_cause="host-signal"),
            Outcome(Reason.KILLED, ITS_OWN),
        ),
        (Seen(status=IN_ORDER, greeted=False), Outcome(Reason.FAILED, ITS_OWN)),
    ],
    ids=[
        "there was no QEMU",
        "stopped before there was one",
        "stopped, and it would have failed",
        "the guest powered down",
        "stopped by force",
        "killed by somebody",
        "QEMU failed by itself",
        "as we gave it up",
        "ended by us",
        "ended by a signal of somebody's",
        "there was no machine",
    ],
)
def test_the_outcome(seen: Seen, expected: Outcome) -> None:
    """Our own reason counts where we ended QEMU, and QEMU's words where it ended badly by itself."""
    asked: list[ExitStatus] = []

    def explain(status: ExitStatus) -> QrapdError:
        asked.append(status)
        return ITS_OWN

    assert expected == seen.judge(explain)
    assert ([seen.status] if expected.error is ITS_OWN else []) == asked


def test_a_failed_adoption() -> None:
    """With what was in the way, and what can be done."""
    failed = failed_adoption(OURS, Path("/run/web/user-qmp.sock"), 30.0)
    assert failed.message.endswith("could not be taken over: why we gave it up")
    assert "/run/web/user-qmp.sock" in str(failed.hint)
    assert "did not answer within 30 s" in failed_adoption(None, Path("x"), 30.0).message


def test_several_errors_at_once() -> None:
    """The first is told, however deep it lies."""
    group: Any = BaseExceptionGroup("", [BaseExceptionGroup("", [OURS, ITS_OWN]), ITS_OWN])
    assert OURS is first_error(group)
