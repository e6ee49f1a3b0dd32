# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the agent listens, and that there is one agent only for each runtime directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from qrapd.errors import AlreadySupervised, Unavailable
from qrapd.handover import AGENT_SOCKET, OWN_AGENT_SOCKET

__all__ = ["AgentSocket", "claim"]

BACKLOG = 1024
"""Callers that may wait to be let in; the kernel takes net.core.somaxconn at most, 4096 by default."""

MODE = 0o666
"""Everybody may connect: who may do what is decided by who it is."""


@contextlib.contextmanager
def claim(base: Path) -> Iterator[None]:
    """Be the agent of this runtime directory, which is made where it is missing.

    :raise AlreadySupervised: there is one.
    :raise Unavailable: the directory cannot be used, or belongs to another user.
    """
    path = base / "agent.lock"
    try:
        base.mkdir(mode=0o755, parents=True, exist_ok=True)
        _refuse_strangers(base)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(
            f"cannot use the runtime directory {base}: {error.strerror}",
            hint="run as a user who may write there, or name another place: --runtime-dir DIR",
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadySupervised(
                f"there is an agent already: another process holds {path}",
                hint=f"see who it is with `fuser -v {path}`; `qrapd ps` shows its VMs",
            ) from None
        with contextlib.suppress(OSError):  # a full /run: it is the lock that counts
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _refuse_strangers(base: Path) -> None:
    """Only in our own directory does nobody else choose what our names mean: a link put there would lead root on.

    /run/qrapd is the user qrapd's once the unit has run.
    """
    owner, we = base.stat().st_uid, os.geteuid()
    if owner != we:
        name = _user(owner)
        if we == 0 and name == "qrapd":
            hint = "`systemctl start qrapd-agent`, or `runuser -u qrapd -- qrapd agent`"
        else:
            hint = f"run as {name}"
        raise Unavailable(
            f"the runtime directory {base} belongs to {name}, and this is {_user(we)}",
            hint=f"{hint}, or name another place: --runtime-dir DIR",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


class AgentSocket:
    """The agent's listening socket.

    :param given: one that came from a socket unit; that is it, then.
    :param inherited: one that an agent before this one has made.
    :raise Unavailable: it cannot be made.
    """

    def __init__(self, path: Path, given: int | None, inherited: int | None) -> None:
        self._path = path if given is None else None
        there = inherited if given is None else given
        self.listener = _listen(path) if there is None else socket.socket(fileno=there)
        self._file = _identify(path)

    def hand_over(self) -> dict[str, int]:
        """The fd, for an agent that comes after this one in the same process, by its name."""
        name = AGENT_SOCKET if self._path is None else OWN_AGENT_SOCKET
        self._path = None
        return {name: self.listener.detach()}

    def close(self) -> None:
        """Listen no more. Where a socket unit listens it goes on."""
        if self._path is not None and _identify(self._path) == self._file:  # not what has taken its place
            self._path.unlink(missing_ok=True)
        self.listener.close()


def _listen(path: Path) -> socket.socket:
    try:
        _make_room(path)
        return _bind(path)
    except OSError as error:
        raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from error


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not by a chmod, which would follow a link that was put in its place. At the start nobody else makes files.
        umask = os.umask(0o777 & ~MODE)
        try:
            listener.bind(str(path))
        finally:
            os.umask(umask)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _make_room(path: Path) -> None:
    """Remove the socket of an agent that is gone, which nobody listens on any more.

    :raise Unavailable: what is there is something else, or another agent's.
    """
    hint = "name another place: --socket PATH"
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Unavailable(f"cannot listen on {path}: it is there, and is no socket", hint=hint)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.setblocking(False)  # where too many wait already: that is somebody, too
            caller.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass
    raise Unavailable(f"cannot listen on {path}: somebody else does", hint=hint)


def _identify(path: Path) -> tuple[int, int, int] | None:
    """Which file has this name now. Its number alone does not tell: ext4 gives it to the next file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
