# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts of a VM that have failed in a row, remembered for the next one, which waits before it tries.

For service managers that try again and again after the same short time: systemd before 254, whose RestartSec has to be
short, so that an adoption is quick (the unit says why).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FailedStarts", "count_failures"]

FREE = 3
"""So many starts in a row may fail before one waits: what is just a moment late, such as a port, is there by then."""

LONGEST = 30.0
"""Seconds that a start waits at most, as RestartMaxDelaySec in systemd/systemd-254.conf."""

MEMORY = 120.0
"""Seconds after which a failure does not count any more."""


@dataclass(frozen=True)
class FailedStarts:
    """How often a VM has failed to start in a row, and when it did last.

    :ivar at: seconds since boot, by the clock that goes on while the host sleeps.
    """

    count: int = 0
    at: float = 0.0

    @classmethod
    def read(cls, path: Path, *, since: Path | None = None) -> FailedStarts:
        """What is known; nothing if that is old, or older than the file ``since``, which may be what mends it."""
        try:
            data = json.loads(path.read_text())
            known = cls(int(data["count"]), float(data["at"]))
            if since is not None and since.stat().st_mtime > path.stat().st_mtime:
                return cls()
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
        return known if 0 <= now() - known.at < MEMORY else cls()

    @property
    def delay(self) -> float:
        """Seconds to wait before the next start: 1, 2, 4, ... beyond :data:`FREE`."""
        if self.count <= FREE:
            return 0.0
        return float(min(LONGEST, 2.0 ** min(self.count - FREE - 1, 10)))

    def note_another(self, path: Path) -> None:
        """One more. A full disk forgets it."""
        with contextlib.suppress(OSError):
            path.write_text(json.dumps({"count": self.count + 1, "at": now()}) + "\n")


@contextlib.contextmanager
def count_failures(
    path: Path, *, since: Path, wait: Callable[[FailedStarts], None]
) -> Iterator[Callable[[], None]]:
    """Around a start: what leaves it as an exception counts as a failure, unless the VM had been up.

    :param path: where failures are remembered.
    :param since: the VM's file.
    :param wait: is called before the start if it has to wait.

    Yields what is to be called when the VM is up.
    """
    known = FailedStarts.read(path, since=since)
    if known.delay:
        wait(known)
    up = False

    def note_up() -> None:
        nonlocal up
        up = True

    try:
        yield note_up
    except Exception:
        if up:
            path.unlink(missing_ok=True)
        else:
            known.note_another(path)
        raise
    path.unlink(missing_ok=True)


def now() -> float:
    """Seconds since boot, those of a host that slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
