# SPDX-License-Identifier: GPL-2.0-or-later
"""Which passt is behind a socket, by what everyone may see of it: its name, command line and start.

Nothing is looked at here: unix_sockets.py has seen the socket and the processes, and this puts the two together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from qrapd.unix_sockets import Program, Sighting

from .candidates import PATTERN

__all__ = ["UNKNOWN", "Command", "Identity", "Passts", "identify", "is_passt", "read_command", "sort_passts"]

_CLOSE_IN_TIME, _FAR_IN_TIME = 1.0, 0.3
"""Seconds. passt 2023 binds its socket 5 to 15 ms after its start, and forks 20 ms later, if it does (measured)."""


class Command(NamedTuple):
    """What a passt's command line says that matters here."""

    socket: str | None
    one_off: bool
    vhost_user: bool
    listens: bool
    """False with --fd: it has its client already."""


class Identity(NamedTuple):
    """Who listens, as far as it can be told."""

    pid: int | None
    may_end: bool
    """Whether leaving it may end it."""
    may_be_vhost_user: bool
    one_off: bool | None
    """None: it cannot be told."""
    certain: bool
    """Whether a look into the processes' fds can add nothing."""


class Passts(NamedTuple):
    """All running passts that listen, with what their command lines say."""

    named: dict[str, list[tuple[Program, Command]]]
    """By the last component of their ``--socket``."""
    nameless: list[tuple[Program, Command]]
    """Those on default names."""


UNKNOWN = Identity(None, may_end=True, may_be_vhost_user=False, one_off=None, certain=False)
"""Of whom nothing is known: it may be a passt that ends when it is left."""

_WITH_VALUE = frozenset("lsFpPcmanMgioDSHtu")
"""passt's short options with a value, 2023-03 to 2026-10 (passt --help)."""


def is_passt(program: Program) -> bool:
    """Whether a process is a passt, or an interpreter or tracer that runs one."""
    names = [program.name, *(each.rpartition("/")[2] for each in program.arguments[:2])]
    return any(re.fullmatch(r"passt([._-](?!repair).*)?", name) for name in names)


def read_command(arguments: Sequence[str]) -> Command:
    """A passt's command line as getopt_long(3) reads it: abbreviated, with values attached, several letters in one."""
    path, one_off, vhost_user, listens = None, False, False, True
    words = iter(arguments[1:])
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if _means(name, "socket", "socket-path"):
                path = value if equals else next(words, None)
            elif _means(name, "fd"):
                listens = False
            one_off |= _means(name, "one-off")
            vhost_user |= _means(name, "vhost-user")
        elif word.startswith("-"):
            for position, letter in enumerate(word[1:], 2):
                one_off |= letter == "1"
                if letter in _WITH_VALUE:
                    value = word[position:] or next(words, "")
                    path = value if letter == "s" else path
                    listens &= letter != "F"
                    break
    return Command(path, one_off, vhost_user, listens)


def _means(name: str, *options: str) -> bool:
    return len(name) > 1 and any(option.startswith(name) for option in options)


def sort_passts(programs: Iterable[Program]) -> Passts:
    """Those of ``programs`` that are passts which listen."""
    passts = Passts({}, [])
    for program in filter(is_passt, programs):
        # Without a command line it can be any passt, most likely one that is about to end.
        command = read_command(program.arguments) if program.arguments else Command(None, True, False, True)
        if command.listens and command.socket:
            passts.named.setdefault(_last(command.socket), []).append((program, command))
        elif command.listens:
            passts.nameless.append((program, command))
    return passts


def identify(
    sighting: Sighting, passts: Passts, holder: Program | None = None, trusted: Collection[int] = ()
) -> Identity:
    """Which of the running ``passts`` listens at a path, and what follows from that.

    Anyone may name a program as passt and give it any command line. So only those count that can have made the socket
    by their user, and a command line that names the path is worth no more than a guess unless its program had started
    by the time the socket was made.

    :param holder: the process that has the listening socket, where that could be read.
    :param trusted: users whose word is taken for a socket that is root's, or of whose user nothing is known.
    """
    if holder:
        if not is_passt(holder):
            return Identity(holder.pid, may_end=False, may_be_vhost_user=False, one_off=False, certain=True)
        return _sum_up([(holder, read_command(holder.arguments))], certain=True)
    nameless = _nameless(sighting, passts, trusted)
    # Of the same last component: the very path, or relative to a directory that cannot be read, or another spelling.
    similar = [
        pair for pair in passts.named.get(_last(sighting.path), []) if _may_own(pair[0], sighting, trusted)
    ]
    exact = [pair for pair in similar if pair[1].socket == sighting.path]
    # Another one of that name cannot have made the socket if it was not there yet.
    exact = [pair for pair in exact if not _started_late(pair, sighting)] or exact
    if exact:
        similar = exact + [pair for pair in similar if not str(pair[1].socket).startswith("/")]
        doubtful = (
            nameless if _started_late(exact[0], sighting) else _of_the_moment(exact, nameless, sighting)
        )
        if doubtful is not None:
            # Another mount namespace has the same path, or somebody pretends.
            summed = _sum_up(similar + doubtful, certain=False)
            return summed._replace(pid=None, may_end=True, one_off=None)
    if similar:
        summed = _sum_up(similar, certain=len(exact) == len(similar) == 1)
        # The only one of that name may still be somebody else's, in another directory.
        return summed if exact else summed._replace(pid=None)
    return _sum_up(nameless, certain=False)


def _may_own(program: Program, sighting: Sighting, trusted: Collection[int]) -> bool:
    """Whether a program can have made the socket, by its user. A passt that root starts becomes another user.

    That of 2023 does so before it makes its socket, later ones do so after it.
    """
    if program.uid in {None, 0}:
        return True
    if sighting.uid:
        return program.uid == sighting.uid
    return program.uid in trusted or (sighting.uid is None and program.uid == sighting.owner)


def _nameless(sighting: Sighting, passts: Passts, trusted: Collection[int]) -> list[tuple[Program, Command]]:
    """Those on default names that may listen here: the one that fits by its start, or all."""
    if not re.fullmatch(PATTERN.replace(".", r"\.").format(n=r"\d+"), sighting.path):
        return []
    return _started_with(sighting, [pair for pair in passts.nameless if _may_own(pair[0], sighting, trusted)])


def _started_late(pair: tuple[Program, Command], sighting: Sighting) -> bool:
    return sighting.made is not None and pair[0].started > sighting.made + _CLOSE_IN_TIME


def _of_the_moment(
    exact: list[tuple[Program, Command]], nameless: list[tuple[Program, Command]], sighting: Sighting
) -> list[tuple[Program, Command]] | None:
    """Those on default names that fit by their start where those that name the path do not; None: these do, or none.

    A file's time changes with its rights: that those of its name are older says little by itself.
    """
    made = sighting.made
    if made is None or any(abs(program.started - made) < _CLOSE_IN_TIME for program, _ in exact):
        return None
    return [pair for pair in nameless if abs(pair[0].started - made) < _CLOSE_IN_TIME] or None


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _started_with(
    sighting: Sighting, candidates: list[tuple[Program, Command]]
) -> list[tuple[Program, Command]]:
    """The one passt that started when the socket was made; if that is not clear, all."""
    made = sighting.made
    if made is None:
        return candidates
    gaps = sorted((abs(pair[0].started - made), index) for index, pair in enumerate(candidates))
    if gaps and gaps[0][0] < _CLOSE_IN_TIME and (len(gaps) == 1 or gaps[1][0] > gaps[0][0] + _FAR_IN_TIME):
        return [candidates[gaps[0][1]]]
    return candidates


def _sum_up(pairs: Sequence[tuple[Program, Command]], *, certain: bool) -> Identity:
    if not pairs:
        return UNKNOWN
    one_off = {command.one_off for _, command in pairs}
    return Identity(
        pairs[0][0].pid if len(pairs) == 1 else None,
        may_end=True in one_off,
        may_be_vhost_user=any(command.vhost_user for _, command in pairs),
        one_off=one_off.pop() if len(one_off) == 1 else None,
        certain=certain,
    )
