# SPDX-License-Identifier: GPL-2.0-or-later
"""A listener that is new on one of some paths: noticed when it comes, by inotify(7), and not looked for in between.

Watched is each directory on the way to a path for the one name that leads on, so that none of them need be there yet,
and each may be removed, made again, or be a symbolic link to somewhere else. What inotify tells is only the reason to
look (`unix_sockets.look_at`): the kernel's table of sockets says who listens, and whether that is somebody new.

A socket's file appears by bind(2), and who connects before listen(2) is refused. passt 2023-03 listens 0.2 ms later,
passt 2025-05 after 6 to 11 ms (measured), so a path that something has happened to is looked at again for a second.

Not to be noticed in this way: a passt that loses its client, or goes on after SIGSTOP. No file changes then.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Self

import anyio
from inotify_simple import INotify, flags

from qrapd import unix_sockets
from qrapd.unix_sockets import Kind, Sighting

__all__ = ["ListenerWatch", "find_steps"]

_EVENTS = flags.CREATE | flags.MOVED_TO | flags.ATTRIB | flags.ONLYDIR
"""A name that comes to be, or whose rights change. That one goes is no news."""

_SETTLES = 1.0
"""Seconds after an event in which a socket may begin to listen: a hundred times what passt takes."""

_HIDDEN_SETTLES = 0.05
"""Seconds until a socket in another network namespace is taken for a listener: whether it is cannot be seen."""

_LOOK_AGAIN = 0.001
"""Seconds between two looks, at least; one costs 0.3 ms (measured). With its age grows the time between them."""

_MOST_LINKS = 40
"""Symbolic links on the way to a file, at most: path_resolution(7)."""

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR}


class ListenerWatch:
    """Notices what begins to listen on ``paths`` after it was entered: enter it, try to connect, fail, and wait.

    Entering costs 1.5 ms the first time, as ctypes asks ldconfig(8) for the C library, and then 0.2 ms, or 2 for
    99 paths; leaving, 5 ms of waiting for the kernel, so do it when there is no hurry any more (measured). Without
    inotify, whose instances are few (fs.inotify.max_user_instances), it never has news.

    :param allowed: users whose listeners count; None: all. In /tmp anyone can make as many as they like.
    :param say: told why a listener may come unnoticed, once for each reason.
    """

    def __init__(
        self, paths: Sequence[str], *, allowed: Collection[int] | None = None, say: Callable[[str], None]
    ) -> None:
        self._paths = list(paths)
        self._allowed = allowed
        self._say = say
        self._said: set[str] = set()
        self._inotify: INotify | None = None
        self._watched: dict[int, dict[str, set[str]]] = {}  # by watch and name: the paths that go that way
        self._known: dict[str, tuple[object, ...]] = {}  # by path: the listener that was there at last
        self._changed: dict[
            str, float
        ] = {}  # by path: when something happened to it, if it is to be looked at

    def __enter__(self) -> Self:
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            self._tell(_explain(error))
            return self
        self._watch_directories()
        now = time.monotonic()
        for path, sighting in self._look(self._paths):
            self._known[path] = _identity(sighting)
            if sighting.kind is Kind.BOUND:  # no event will tell that it listens
                self._changed[path] = now
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            self._inotify.close()

    async def wait(self) -> str:
        """Wait until somebody listens anew, and return on which path. No news is lost by cancelling it."""
        while True:
            self._read_events()
            now = time.monotonic()
            path = self._find_news(now)
            if path is not None:
                return path
            latest = max(self._changed.values(), default=None)
            pause = math.inf if latest is None else max(_LOOK_AGAIN, (now - latest) / 4)
            with anyio.move_on_after(pause):
                if self._inotify is None:
                    await anyio.sleep_forever()
                else:
                    await anyio.wait_readable(self._inotify)

    def _read_events(self) -> None:
        if self._inotify is None:
            return
        changed: set[str] = set()
        # 1.6 us each (measured), so a directory that many use, such as /tmp, costs little.
        for number, mask, _, name in self._inotify.read(0):
            if mask & flags.Q_OVERFLOW:
                changed.update(self._paths)
            elif mask & flags.IGNORED:  # the directory was removed or unmounted
                changed.update(*self._watched.get(number, {}).values())
            else:
                changed.update(self._watched.get(number, {}).get(name, ()))
        if changed:
            self._watch_directories()
            self._changed.update(dict.fromkeys(changed, time.monotonic()))

    def _find_news(self, now: float) -> str | None:
        for path, sighting in self._look(list(self._changed)):
            age = now - self._changed[path]
            if self._counts(sighting, age) and self._known.get(path) != _identity(sighting):
                self._known[path] = _identity(sighting)
                del self._changed[path]
                return path
            if age > _SETTLES:
                del self._changed[path]
        return None

    def _counts(self, sighting: Sighting, age: float) -> bool:
        uid = sighting.uid if sighting.uid is not None else sighting.owner
        if self._allowed is not None and uid not in self._allowed:
            return False
        return sighting.kind is Kind.LISTENING or (sighting.kind is Kind.HIDDEN and age >= _HIDDEN_SETTLES)

    @staticmethod
    def _look(paths: Sequence[str]) -> list[tuple[str, Sighting]]:
        with suppress(OSError):  # no fd to be had, say: the next look, or the next attempt, will tell
            return list(zip(paths, unix_sockets.look_at(paths), strict=True))
        return []

    def _watch_directories(self) -> None:
        """Watch what leads to the paths now: each directory before it is looked into, so that nothing comes between."""
        assert self._inotify is not None
        found: dict[str, int | OSError] = {}
        watched: dict[int, dict[str, set[str]]] = {}
        for path in self._paths:
            directory = ""
            for directory, name in find_steps(path):
                if directory not in found:
                    found[directory] = self._watch(directory)
                number = found[directory]
                if isinstance(number, int):
                    watched.setdefault(number, {}).setdefault(name, set()).add(path)
            error = found.get(directory)
            if isinstance(error, OSError) and error.errno not in _NOT_THERE:
                # Of those above the last one just its being replaced goes unnoticed: not worth a word.
                self._tell(f"{directory}: {_explain(error)}")
        for number in self._watched.keys() - watched.keys():
            with suppress(OSError):  # removed with its directory
                self._inotify.rm_watch(number)
        self._watched = watched

    def _watch(self, directory: str) -> int | OSError:
        assert self._inotify is not None
        try:
            return int(self._inotify.add_watch(directory, _EVENTS))
        except OSError as error:
            return error

    def _tell(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self._say(f"a new listener will be noticed by the next attempt only: {reason}")


def find_steps(path: str) -> Iterator[tuple[str, str]]:
    """The directories on the way to ``path``, each with the name that leads on, as far as there are any.

    Each comes before that name is looked at. Symbolic links are gone through one at a time: what they lead to can
    change wherever one of them is.
    """
    directory, links = "/", 0
    here = "" if path.startswith("/") else os.getcwd()  # noqa: PTH109 - 9 ms to import
    ahead = f"{here}/{path}".split("/")[::-1]
    while ahead and links <= _MOST_LINKS:
        name = ahead.pop()
        if name == "..":
            directory = directory[: directory.rfind("/")] or "/"  # there are no links in it
        elif name not in {"", "."}:
            yield directory, name
            here = f"{directory.rstrip('/')}/{name}"
            try:
                target = os.readlink(here)  # noqa: PTH115
            except OSError as error:
                if error.errno != errno.EINVAL:  # which says that it is no link
                    return
                directory = here
            else:
                links += 1
                ahead += target.split("/")[::-1]
                directory = "/" if target.startswith("/") else directory


def _identity(sighting: Sighting) -> tuple[object, ...]:
    """What differs when somebody else listens, or when the rights of the file have changed."""
    listens = sighting.kind in {Kind.LISTENING, Kind.HIDDEN}
    return (sighting.inode, sighting.file, sighting.made) if listens else ()


def _explain(error: OSError) -> str:
    limits = {errno.EMFILE: "fs.inotify.max_user_instances", errno.ENOSPC: "fs.inotify.max_user_watches"}
    limit = limits.get(error.errno or 0)
    return f"{error.strerror or error} (inotify(7){f': {limit}' if limit else ''})"
