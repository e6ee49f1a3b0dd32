# SPDX-License-Identifier: GPL-2.0-or-later
"""A person at QEMU's second monitor."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import PATIENCE


class Monitor:
    """Commands, one after the other; events that come in between are passed over."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        """The result of a command."""
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]


@contextmanager
def monitor(directory: Path) -> Iterator[Monitor]:
    """The one of the VM with this runtime directory."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(directory / "user-qmp.sock"))
        yield Monitor(connection)
