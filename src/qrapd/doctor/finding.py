# SPDX-License-Identifier: GPL-2.0-or-later
"""What was found about one subject of this host, and how grave it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Status", "worst"]

Status = Literal["ok", "warning", "problem"]

_ORDER: tuple[Status, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """What was found about one subject, in words, and the command line that mends it, if one does."""

    subject: str
    status: Status
    found: str
    remedy: str | None = None


def worst(findings: Iterable[Finding]) -> Status:
    """Return the gravest status among ``findings``; "ok" of none."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")
