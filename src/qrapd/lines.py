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
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def clean(raw: bytes | bytearray) -> str:
    """One line as text: UTF-8 with replacement, without escape sequences and control characters but tab."""
    text = raw.decode("utf-8", errors="replace")
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


class LineSplitter:
    """Bytes in, whole lines out, however they come. A line longer than ``limit`` bytes is cut there.

    The limit keeps memory bounded, as a guest may never end a line. Whole is what programs write on purpose, such as a
    document of JSON: the journal takes entries of any length.
    """

    def __init__(self, limit: int = 128 * 1024) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that ``chunk`` completes. Lines that hold nothing to show are left out."""
        self._rest += chunk  # a console comes in bits of a few bytes: not copied with each of them
        if b"\n" in chunk:
            *lines, rest = self._rest.split(b"\n")
            self._rest = rest
            for line in lines:
                yield from self._show_pieces(line)
        # The last piece stays, even when it is full: the line may end there.
        if whole := max(0, len(self._rest) - 1) // self._limit * self._limit:
            pieces = self._rest[:whole]
            del self._rest[:whole]
            yield from self._show_pieces(pieces)

    def finish(self) -> Iterator[str]:
        """What is left without a newline at the end."""
        rest, self._rest = self._rest, bytearray()
        yield from self._show(rest)

    def _show_pieces(self, line: bytes | bytearray) -> Iterator[str]:
        for start in range(0, len(line), self._limit):
            yield from self._show(line[start : start + self._limit])

    def _show(self, raw: bytes | bytearray) -> Iterator[str]:
        text = clean(raw.rstrip(b"\r"))
        if text.strip():
            yield text.rstrip()
