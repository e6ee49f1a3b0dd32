# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets where a passt may be, what each is found to be, and the words for it."""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import NamedTuple

__all__ = ["HIGHEST", "PATTERN", "Candidate", "State", "advise", "default_paths", "describe"]

PATTERN = "/tmp/passt_{n}.socket"  # noqa: S108 - not ours to choose
"""passt's own names (UNIX_SOCK_PATH in its util.h)."""

HIGHEST = 99
"""qrap.c and passt's tap.c go from 1 to 99; passt(1) says 64."""


class State(enum.Enum):
    """What a candidate is found to be."""

    ABSENT = "absent"  # no file, or none that can be a passt's
    REFUSED = "refused"  # a socket's file, and nobody who listens
    DENIED = "denied"  # the file's permissions do not let us
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
    """Where a passt without ``--socket`` listens; ``pattern`` has ``{n}`` for the number."""
    return [pattern.format(n=n) for n in range(1, HIGHEST + 1)]


def describe(candidate: Candidate) -> str:
    """A candidate's state in words, the reason included."""
    words = {State.REFUSED: "nobody listens", State.DENIED: "its permissions do not let this user"}
    text = words.get(candidate.state, candidate.state.value)
    return f"{text} ({candidate.detail})" if candidate.detail else text


def advise(found: Collection[Candidate]) -> str:
    """What a person can do about candidates none of which will do."""
    states = {each.state for each in found}
    if State.FOREIGN in states and not states & {State.BUSY, State.SILENT}:
        uid = next(each.uid for each in found if each.state is State.FOREIGN)
        return f"start a passt of your own, or trust that user: --allow-uid {uid}"
    if State.SILENT in states:
        return "a passt that does not answer is stopped or hangs: end it, and start another one"
    if State.BUSY in states:
        return "each passt serves one guest: start another one, or end the guest that has it"
    if State.VHOST_USER in states:
        return "a passt with --vhost-user serves QEMU's vhost-user netdev only: start one without it"
    return "start one: passt (it says on which socket it listens)"
