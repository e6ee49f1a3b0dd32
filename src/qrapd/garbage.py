# SPDX-License-Identifier: GPL-2.0-or-later
"""Python's garbage collector, which is off while qrapd is imported (:mod:`qrapd.__main__`)."""

from __future__ import annotations

import gc

__all__ = ["collect_garbage"]


def collect_garbage() -> None:
    """From here on there is garbage. What was imported is none, and no collection needs to walk it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
