# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a VM that has ended is started again: the table [restart] of its file."""

from __future__ import annotations

from typing import Literal

from qrapd.lifecycle import Reason

__all__ = ["Policy", "is_wanted"]

Policy = Literal["never", "on-failure", "always"]


def is_wanted(policy: Policy, reason: Reason, *, failure: bool) -> bool:
    """Whether a VM that has ended so is to be started again.

    What was stopped on request stays down, whoever asked: a signal, or ``quit`` at the user's own monitor.
    """
    if reason is Reason.REQUEST and not failure:
        return False
    return policy == "always" or (policy == "on-failure" and failure)
