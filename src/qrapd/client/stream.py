# SPDX-License-Identifier: GPL-2.0-or-later
"""Server-sent events, read from the bytes of a response: HTML, "Server-sent events", "Interpreting an event stream"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EventReader", "ServerEvent"]


@dataclass(frozen=True)
class ServerEvent:
    """One event: its place in the stream, its name, and its fields as in the JSON log."""

    id: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


class EventReader:
    """Bytes in, events out, however they come.

    Lines end at LF, CR LF or CR, and nowhere else: what Python calls lines, too, such as U+2028, may stand in the data.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """The events that ``chunk`` completes."""
        self._rest += chunk
        # A CR at the very end may be the first half of CR LF, and waits for what comes next.
        whole = self._rest[:-1] if self._rest.endswith(b"\r") else self._rest
        lines = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + self._rest[len(whole) :]
        for line in lines:
            if (event := self._take(line.decode("utf-8", errors="replace"))) is not None:
                yield event

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None  # a comment, which begins with the colon, is for the connection's sake

    def _dispatch(self) -> ServerEvent | None:
        data, name = "\n".join(self._data), self._name or "message"
        empty, self._data, self._name = not self._data, [], ""
        if empty:
            return None
        try:
            fields = json.loads(data)
        except ValueError:
            fields = None
        return ServerEvent(self._id, name, fields if isinstance(fields, dict) else {"data": data})
