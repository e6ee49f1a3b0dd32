# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM ended, judged by all that was seen of it. Decides, and does nothing else.

:func:`qrapd.lifecycle.judge_exit` reads the end of a QEMU process; here is what else counts: that there never was one,
that qrapd had a reason of its own to end it, or that it runs on for another qrapd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qrapd.errors import AlreadySupervised, QrapdError
from qrapd.lifecycle import Reason, judge_exit
from qrapd.process import ExitStatus

__all__ = ["Outcome", "Seen", "failed_adoption", "first_error"]


@dataclass(frozen=True)
class Outcome:
    """How a VM ended; ``error`` says what went wrong, if anything did."""

    reason: Reason
    error: QrapdError | None = None
    stood_back: bool = False
    """the VM runs on, for another qrapd"""
    fds: Mapping[str, int] = field(default_factory=dict)
    """of a VM that runs on: what its next supervisor is given, by the names of the fd store"""


@dataclass
class Seen:
    """What was seen of a VM so far, as far as it tells how the VM ended."""

    stop_requested: bool = False
    """somebody wants it to end"""
    greeted: bool = False
    """QEMU's monitor has said a word: a machine has come to be"""
    shutdown_cause: str | None = None
    """of QMP's last SHUTDOWN event"""
    error: QrapdError | None = None
    """why we gave it up, if we did"""
    status: ExitStatus | None = None
    """how QEMU ended; None: it has not, or never was"""

    def judge(self, explain: Callable[[ExitStatus], QrapdError]) -> Outcome:
        """How the VM ended, now that nothing of it is left.

        :param explain: says why QEMU ended badly, in its own words.
        """
        if self.status is None:
            if self.stop_requested and self.error is None:
                return Outcome(Reason.REQUEST)
            return Outcome(Reason.FAILED, self.error)
        verdict = judge_exit(
            exit_code=self.status.exit_code,
            signal=self.status.signal,
            stop_requested=self.stop_requested,
            shutdown_cause=self.shutdown_cause,
            greeted=self.greeted,
        )
        if not verdict.failure:
            return Outcome(verdict.reason)
        # Where we ended it ourselves, the reason for that is what counts.
        if self.error is not None and self.status.exit_code in (0, None):
            return Outcome(Reason.FAILED, self.error)
        return Outcome(verdict.reason, explain(self.status))


def failed_adoption(error: QrapdError | None, monitor: Path, timeout: float) -> AlreadySupervised:
    """Why a VM that was left could not be taken over.

    :param error: what was in the way; None: nothing but time.
    :param monitor: of its QEMU, for its user.
    """
    why = error.message if error else f"its monitor did not answer within {timeout:g} s"
    return AlreadySupervised(
        "a QEMU of this VM still runs, left by a supervisor that is gone, and it could not be taken over: "
        + why,
        hint=f"it was left as it is. Try again, power it down by its monitor {monitor}, or end it: `qrapd stop`",
    )


def first_error(group: BaseExceptionGroup[QrapdError]) -> QrapdError:
    """The one that is told, of several that came at once."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, QrapdError)
    return error
