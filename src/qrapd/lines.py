# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest or a child writes, cut into lines that are safe to show and to keep.

A guest may write anything to its console. Escape sequences would act on the terminal of whoever reads the
log, and journald stores a field with control characters as a blob that ``journalctl`` does not show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["LineSplitter", "clean"]

# ECMA-48: control sequences (CSI), operating system commands (OSC), and two-character escapes.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(raw: bytes) -> str:
    """One line as text: UTF-8 with replacement, without escape sequences and control characters but tab."""
    text = raw.decode("utf-8", errors="replace")
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


class LineSplitter:
    """Bytes in, whole lines out. A line longer than ``limit`` bytes is cut there, so memory stays bounded."""

    def __init__(self, limit: int = 64 * 1024) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that ``chunk`` completes. Lines that hold nothing to show are left out."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._show(line)
        while len(self._rest) > self._limit:
            head, self._rest = self._rest[: self._limit], self._rest[self._limit :]
            yield from self._show(head)

    def finish(self) -> Iterator[str]:
        """What is left without a newline at the end."""
        rest, self._rest = self._rest, b""
        yield from self._show(rest)

    def _show(self, raw: bytes) -> Iterator[str]:
        text = clean(raw.rstrip(b"\r"))
        if text.strip():
            yield text.rstrip()
