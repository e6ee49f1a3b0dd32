# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a VM may stay in the states that do not wait for ever: the seconds of :class:`qrapd.lifecycle.Deadline`."""

from __future__ import annotations

from qrapd.lifecycle import Deadline
from qrapd.plan import Plan

__all__ = ["ADOPTION_TIMEOUT", "QMP_TIMEOUT", "seconds"]

QMP_TIMEOUT = 120.0
"""Seconds for a started QEMU to answer on its monitor: it sets up the guest's memory first, huge pages included."""

ADOPTION_TIMEOUT = 30.0
"""Seconds for a QEMU that was left to answer on its monitor; it has run for a while and does so in milliseconds."""


def seconds(deadline: Deadline, plan: Plan) -> float:
    """How long a deadline is, for a VM of this plan."""
    match deadline:
        case Deadline.QMP:
            return QMP_TIMEOUT
        case Deadline.ADOPTION:
            return ADOPTION_TIMEOUT
        case Deadline.POWERDOWN:
            return plan.powerdown_timeout
        case Deadline.QUIT:
            return plan.quit_timeout
