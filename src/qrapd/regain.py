# SPDX-License-Identifier: GPL-2.0-or-later
"""A socket of another process, copied from it where the kernel allows that: pidfd_getfd(2).

It does for root, and for a process of the same user where nothing (Yama's ptrace_scope, a unit's hardening) forbids it.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

__all__ = ["regain_socket"]

_PIDFD_GETFD = 438
"""The system call's number, which is the same for all architectures: Linux' scripts/syscall.tbl."""


def regain_socket(pid: int, inode: int) -> socket.socket | None:
    """A copy of the socket with this inode that the process ``pid`` has; None if it cannot be had."""
    try:
        number = _find(pid, inode)
        if number is None:
            return None
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        return None
    if os.fstat(fd).st_ino != inode:  # closed and used for something else between the two
        os.close(fd)
        return None
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def _find(pid: int, inode: int) -> int | None:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()) == f"socket:[{inode}]":
                return int(entry.name)
        except FileNotFoundError:
            continue
    return None
