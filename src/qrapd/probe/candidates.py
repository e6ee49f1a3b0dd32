# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets where a passt may be, what each is found to be, and the words for it."""

from __future__ import annotations

import enum
import itertools
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "HIGHEST",
    "PATTERN",
    "Candidate",
    "State",
    "advise",
    "default_paths",
    "describe",
    "fold",
    "name_span",
]

PATTERN = "/tmp/passt_{n}.socket"  # noqa: S108 - not ours to choose
"""passt's own names (UNIX_SOCK_PATH in its util.h)."""

HIGHEST = 99
"""qrap.c and passt's tap.c go from 1 to 99; passt(1) says 64."""


class State(enum.Enum):
    """What a candidate is found to be."""

    ABSENT = "absent"
    UNUSABLE = "unusable"  # something that can be no passt's socket
    REFUSED = "refused"  # a socket's file, and nobody who listens
    DENIED = "denied"  # the permissions of the file, or of a directory above it, do not let us
    FOREIGN = "foreign"  # a user's who is not allowed
    VHOST_USER = "vhost-user"
    BUSY = "busy"
    FREE = "free"  # not asked, as the question might end it
    SILENT = "silent"
    GARBAGE = "garbage"  # speaks, but not Ethernet
    ANSWERING = "answering"


class Candidate(NamedTuple):
    """What is known of a path."""

    path: str
    state: State
    latency: float | None = None
    """Seconds from question to answer."""
    pid: int | None = None
    uid: int | None = None
    one_off: bool | None = None
    """Whether it is a passt with --one-off; None: it cannot be told."""
    detail: str = ""
    """What there is to add for a person."""


def default_paths(pattern: str = PATTERN) -> list[str]:
    """Where a passt without ``--socket`` listens; ``pattern`` has ``{n}`` for the number, or is the only path."""
    return list(dict.fromkeys(pattern.replace("{n}", str(n)) for n in range(1, HIGHEST + 1)))


def describe(candidate: Candidate) -> str:
    """A candidate's state in words, the reason included."""
    words = {State.REFUSED: "nobody listens", State.DENIED: "it may not be connected to"}
    text = words.get(candidate.state, candidate.state.value)
    return f"{text} ({candidate.detail})" if candidate.detail else text


def fold(found: Iterable[Candidate]) -> list[tuple[str, str]]:
    """Paths with their descriptions; those one after the other that are the same but for the path make one of it."""
    groups = [(words, list(group)) for words, group in itertools.groupby(found, describe)]
    return [(name_span([each.path for each in group]), words) for words, group in groups]


def name_span(paths: Sequence[str]) -> str:
    """One path, or the first and the last of several."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}" if paths else "no path at all"


def advise(found: Collection[Candidate], paths: Sequence[str]) -> str:
    """What a person can do when none of those ``found`` at ``paths`` will do."""
    states = {each.state for each in found}
    if State.FOREIGN in states and not states & {State.BUSY, State.SILENT}:
        uid = next(each.uid for each in found if each.state is State.FOREIGN)
        return (
            f"start a passt of your own; whoever trusts user {uid} says so: `qrapd wrap --allow-uid {uid}`, "
            f"or allow_uids = [{uid}] in the VM's file"
        )
    if State.SILENT in states:
        return "a passt that does not answer is stopped or hangs: end it, and start another one"
    if State.BUSY in states:
        return "each passt serves one guest: start another one, or end the guest that has it"
    if State.VHOST_USER in states:
        return "a passt with --vhost-user serves QEMU's vhost-user netdev only: start one without it"
    if State.DENIED in states:
        return "start a passt where this user may connect to it: passt --socket PATH"
    if State.UNUSABLE in states and len(paths) == 1:
        return "give the path of a passt's socket, or start one on another path: passt --socket PATH"
    if len(paths) == 1:
        return f"start one: passt --socket {shlex.quote(paths[0])}"
    if set(paths) <= set(default_paths()):
        return "start one: passt (it says on which socket it listens)"
    return "start one: passt --socket PATH, with one of these paths"
