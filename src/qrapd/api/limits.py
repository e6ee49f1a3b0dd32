# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer of the HTTP server may take of it. The agent's socket is open to every user of the host."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Each connection costs a file descriptor and some 20 KiB."""

    connections: int = 256
    """In all. The usual limit of open files is 1,024 (systemd's DefaultLimitNOFILE=, the soft one), and VMs need
    theirs."""
    kept: int = 64
    """Of all these, only for root and the serving user: others cannot lock them out."""
    per_uid: int = 64
    """Of one user, other than root and the serving one: a terminal at each of some tens of VMs, but not all that there
    is."""
    head_bytes: int = 16 * 1024
    """Request line and headers. Ours have some hundred bytes; nginx and Apache take 8 KiB for a line."""
    request_seconds: float = 10
    """For the head of a request, and again for its body: over a UNIX socket each takes a moment."""
    idle_seconds: int = 15
    """Until the next request on the same connection."""
    write_seconds: float = 30
    """That a response may wait for its reader. Until then it is kept in memory."""
    message_write_seconds: float = 90
    """The same for a message of a WebSocket: longer than who serves one may want to wait, who can say why it ends."""
    message_bytes: int = 64 * 1024
    """One message of a WebSocket: what is typed or pasted at a console."""
    grace_seconds: float = 1
    """At the end of the server, for the answers to requests that are under way."""


DEFAULT = Limits()
