# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a VM as one table: what happens in every state, whatever comes.

This module decides and does nothing else: it has no clock, no process and no socket. :mod:`qrapd.vm` feeds
it what happened and carries out the actions that it returns. ``python -m qrapd.lifecycle`` prints the table
in the form that docs/lifecycle.md shows.

Reading the table: a row is a state, a column an event, a cell the next state and the actions on the way.
An event that a state has no cell for changes nothing there; :func:`advance` is total.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from qrapd.transitions import describe

__all__ = ["DEADLINES", "TABLE", "Action", "Deadline", "Event", "Reason", "State", "advance", "judge_exit"]


class State(enum.Enum):
    """Where a VM is in its life."""

    NEW = "new"
    """nothing has been started"""
    LINKING = "linking"
    """the links' passts are coming up; QEMU waits for them"""
    LAUNCHING = "launching"
    """QEMU is being spawned, which cannot be interrupted half-way"""
    ABANDONING = "abandoning"
    """as launching, but a stop has come: QEMU will be ended as soon as it has a pid"""
    CONNECTING = "connecting"
    """QEMU has a pid; its QMP monitor has not answered yet"""
    ADOPTING = "adopting"
    """a QEMU that another supervisor has left is being taken over: its monitor has not answered yet"""
    ADOPTING_TO_STOP = "adopting-to-stop"
    """as adopting, but a stop has come"""
    READY = "ready"
    """the machine runs, every link had its stream"""
    POWERING_DOWN = "powering-down"
    """the guest was asked by ACPI to power down"""
    QUITTING = "quitting"
    """QEMU was asked by QMP to quit"""
    TERMINATING = "terminating"
    """QEMU was sent SIGTERM"""
    KILLING = "killing"
    """QEMU was sent SIGKILL"""
    UNLINKING = "unlinking"
    """QEMU is gone or never came; the passts are ending"""
    ENDED = "ended"
    """nothing is left"""


class Event(enum.Enum):
    """What can happen to a VM."""

    START = "start"
    ADOPT = "adopt"
    LINKS_UP = "links up"
    LINKS_FAILED = "links failed"
    QEMU_SPAWNED = "qemu spawned"
    SPAWN_FAILED = "spawn failed"
    QMP_UP = "qmp up"
    QMP_FAILED = "qmp failed"
    QEMU_EXITED = "qemu exited"
    STOP = "stop"
    HURRY = "hurry"
    """asked to stop once more: the next, rougher step at once"""
    KILL = "kill"
    """QEMU is to end at once, whatever that does to the guest"""
    DEADLINE = "deadline"
    LINKS_DOWN = "links down"
    LEAVE = "leave"
    """another qrapd is to take over: this one goes, and the VM stays"""


class Action(enum.Enum):
    """What the supervisor is to do."""

    START_LINKS = "start links"
    SPAWN_QEMU = "spawn qemu"
    CONNECT_QMP = "connect qmp"
    ANNOUNCE_READY = "announce ready"
    ADOPT = "adopt"
    ANNOUNCE_ADOPTED = "announce adopted"
    STAND_BACK = "stand back"
    """leave QEMU and the passts as they are, and end"""
    POWER_DOWN = "power down"
    QUIT = "quit"
    TERMINATE = "terminate"
    KILL = "kill"
    RELEASE_LINKS = "release links"
    FINISH = "finish"


class Deadline(enum.Enum):
    """How long a state may last; the supervisor knows the seconds."""

    QMP = "qmp"
    ADOPTION = "adoption"
    POWERDOWN = "powerdown"
    QUIT = "quit"


_S, _E, _A = State, Event, Action
Step = tuple[State, tuple[Action, ...]]

_RELEASE: Step = (_S.UNLINKING, (_A.RELEASE_LINKS,))
_TERMINATE: Step = (_S.TERMINATING, (_A.TERMINATE,))
_QUIT: Step = (_S.QUITTING, (_A.QUIT,))
_KILL: Step = (_S.KILLING, (_A.KILL,))
_STAND_BACK: Step = (_S.ENDED, (_A.STAND_BACK,))

TABLE: dict[State, dict[Event, Step]] = {
    _S.NEW: {
        _E.START: (_S.LINKING, (_A.START_LINKS,)),
        _E.ADOPT: (_S.ADOPTING, (_A.ADOPT,)),
        _E.STOP: (_S.ENDED, (_A.FINISH,)),
        _E.HURRY: (_S.ENDED, (_A.FINISH,)),
        _E.KILL: (_S.ENDED, (_A.FINISH,)),
    },
    _S.LINKING: {
        _E.LINKS_UP: (_S.LAUNCHING, (_A.SPAWN_QEMU,)),
        _E.LINKS_FAILED: _RELEASE,
        _E.STOP: _RELEASE,
        _E.HURRY: _RELEASE,
        _E.KILL: _RELEASE,
    },
    _S.LAUNCHING: {
        _E.QEMU_SPAWNED: (_S.CONNECTING, (_A.CONNECT_QMP,)),
        _E.SPAWN_FAILED: _RELEASE,
        _E.LINKS_FAILED: (_S.ABANDONING, ()),
        _E.STOP: (_S.ABANDONING, ()),
        _E.HURRY: (_S.ABANDONING, ()),
        _E.KILL: (_S.ABANDONING, ()),
    },
    _S.ABANDONING: {
        _E.QEMU_SPAWNED: _TERMINATE,
        _E.SPAWN_FAILED: _RELEASE,
    },
    _S.CONNECTING: {
        _E.QMP_UP: (_S.READY, (_A.ANNOUNCE_READY,)),
        _E.QMP_FAILED: _TERMINATE,
        # A VM is ready with every link up, or not at all.
        _E.LINKS_FAILED: _TERMINATE,
        _E.DEADLINE: _TERMINATE,
        _E.QEMU_EXITED: _RELEASE,
        # No guest has booted yet that could power down in order.
        _E.STOP: _TERMINATE,
        _E.HURRY: _KILL,
        _E.KILL: _KILL,
    },
    _S.ADOPTING: {
        _E.QMP_UP: (_S.READY, (_A.ANNOUNCE_ADOPTED,)),
        # Ending a guest is the one thing that cannot be undone: what cannot be taken over is left alone.
        _E.QMP_FAILED: _STAND_BACK,
        _E.DEADLINE: _STAND_BACK,
        _E.QEMU_EXITED: _RELEASE,
        _E.STOP: (_S.ADOPTING_TO_STOP, ()),
        _E.HURRY: (_S.ADOPTING_TO_STOP, ()),
        _E.KILL: (_S.ADOPTING_TO_STOP, ()),
    },
    _S.ADOPTING_TO_STOP: {
        _E.QMP_UP: (_S.POWERING_DOWN, (_A.POWER_DOWN,)),
        _E.QMP_FAILED: _TERMINATE,
        _E.DEADLINE: _TERMINATE,
        _E.QEMU_EXITED: _RELEASE,
        _E.HURRY: _TERMINATE,
        _E.KILL: _KILL,
    },
    _S.READY: {
        _E.QEMU_EXITED: _RELEASE,
        _E.LEAVE: _STAND_BACK,
        _E.STOP: (_S.POWERING_DOWN, (_A.POWER_DOWN,)),
        _E.HURRY: _QUIT,
        _E.KILL: _KILL,
    },
    _S.POWERING_DOWN: {
        _E.QEMU_EXITED: _RELEASE,
        _E.DEADLINE: _QUIT,
        _E.HURRY: _QUIT,
        _E.KILL: _KILL,
        _E.QMP_FAILED: _TERMINATE,
    },
    _S.QUITTING: {
        _E.QEMU_EXITED: _RELEASE,
        _E.DEADLINE: _TERMINATE,
        _E.HURRY: _TERMINATE,
        _E.KILL: _KILL,
        _E.QMP_FAILED: _TERMINATE,
    },
    _S.TERMINATING: {
        _E.QEMU_EXITED: _RELEASE,
        _E.DEADLINE: _KILL,
        _E.HURRY: _KILL,
        _E.KILL: _KILL,
    },
    _S.KILLING: {
        _E.QEMU_EXITED: _RELEASE,
    },
    _S.UNLINKING: {
        _E.LINKS_DOWN: (_S.ENDED, (_A.FINISH,)),
    },
    _S.ENDED: {},
}

DEADLINES: dict[State, Deadline] = {
    _S.CONNECTING: Deadline.QMP,
    _S.ADOPTING: Deadline.ADOPTION,
    _S.ADOPTING_TO_STOP: Deadline.ADOPTION,
    _S.POWERING_DOWN: Deadline.POWERDOWN,
    _S.QUITTING: Deadline.QUIT,
    _S.TERMINATING: Deadline.QUIT,
}
"""States that do not wait for ever. SIGKILL needs no deadline: the kernel carries it out."""


def advance(state: State, event: Event) -> Step:
    """What ``event`` means in ``state``: the next state, and what to do on the way, in this order."""
    return TABLE[state].get(event, (state, ()))


class Reason(enum.StrEnum):
    """Why a VM ended: the field ``reason`` of ``vm.exited``."""

    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_PANIC = "guest-panic"
    REQUEST = "request"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class Verdict:
    """How a QEMU's end is to be read: the reason, and whether it counts as a failure (status 1)."""

    reason: Reason
    failure: bool


def judge_exit(
    *,
    exit_code: int | None,
    signal: int | None,
    stop_requested: bool,
    shutdown_cause: str | None,
    greeted: bool = True,
) -> Verdict:
    """Read the end of a QEMU process.

    ``exit_code`` or ``signal`` is set; ``shutdown_cause`` is the field ``reason`` of QMP's last SHUTDOWN
    event (QEMU's qapi/run-state.json, ShutdownCause), or None when there was none; ``greeted`` whether its
    monitor had said a word: without that no machine ever ran, as with ``-version`` among the arguments.
    """
    if stop_requested:
        return Verdict(Reason.REQUEST, failure=False)
    if not greeted and signal is None:
        return Verdict(Reason.FAILED, failure=True)
    # QEMU turns SIGTERM, SIGINT and SIGHUP into an orderly end with exit status 0.
    if signal is not None or shutdown_cause == "host-signal":
        return Verdict(Reason.KILLED, failure=True)
    if shutdown_cause == "guest-panic":
        return Verdict(Reason.GUEST_PANIC, failure=True)
    if exit_code is None and shutdown_cause is None:
        # An adopted QEMU whose end nobody could tell us: one that ends in order says so before.
        return Verdict(Reason.KILLED, failure=True)
    if exit_code not in (0, None) or shutdown_cause == "host-error":
        return Verdict(Reason.FAILED, failure=True)
    # Someone else's `quit`, from the user's own monitor for instance.
    if shutdown_cause in {"host-qmp-quit", "host-ui"}:
        return Verdict(Reason.REQUEST, failure=False)
    return Verdict(Reason.GUEST_SHUTDOWN, failure=False)


def describe_table() -> str:
    """The table as Markdown, one line per state and event that it answers."""
    return describe(TABLE)


if __name__ == "__main__":
    print(describe_table())  # noqa: T201 (this is what the command is for)
