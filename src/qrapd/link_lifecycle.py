# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a link as one table: how a lost passt is replaced, whatever comes in between.

As :mod:`qrapd.lifecycle` this module decides and does nothing else; :mod:`qrapd.link` carries out what it says.
``python -m qrapd.link_lifecycle`` prints the table in the form that docs/lifecycle.md shows.

An event that a state has no cell for changes nothing there; :func:`advance` is total.
"""

from __future__ import annotations

import enum

from qrapd.transitions import describe

__all__ = ["TABLE", "Action", "Event", "State", "advance", "describe_table"]


class State(enum.Enum):
    """Where a link is in its life."""

    NEW = "new"
    """nothing has been started"""
    STARTING = "starting"
    """the first passt is coming up; there is no QEMU yet"""
    DOWN = "down"
    """the first passt did not come up, or was lost before the VM was ready: the VM's start has failed"""
    CONNECTED = "connected"
    """the first passt answers; QEMU is on its way"""
    UP = "up"
    """the NIC has its stream, and passt serves it"""
    REAPING = "reaping"
    """the passt was lost, or is to be replaced; it is being seen off, and its ports with it"""
    ACQUIRING = "acquiring"
    """a new passt is coming up, or one is looked for"""
    OUTDATED = "outdated"
    """as acquiring, but with options that have changed meanwhile"""
    SWAPPING = "swapping"
    """the new stream is being put under the NIC"""
    WASTED = "wasted"
    """as swapping, but the new passt is of no use any more"""
    UNDOING = "undoing"
    """QEMU did not take the new stream; its passt is being seen off"""
    WAITING = "waiting"
    """an attempt has failed; the next one comes after a delay"""
    FAILED = "failed"
    """too many attempts have failed; the next one comes when somebody says so"""
    ENDING = "ending"
    """the VM is gone; the passt is being seen off"""
    ENDED = "ended"
    """nothing is left"""


class Event(enum.Enum):
    """What can happen to a link."""

    START = "start"
    ADOPTED = "adopted"
    """a passt that another supervisor has left serves the link"""
    ADOPTED_LOST = "adopted lost"
    """there is a machine with the link's NIC, and no passt that could be taken over"""
    ACQUIRED = "acquired"
    ACQUIRE_FAILED = "acquire failed"
    VM_READY = "vm ready"
    LOST = "lost"
    REAPED = "reaped"
    CRASHED = "crashed"
    """reaped, and it had ended by itself and at once: to start it again at once would only spin"""
    SWAPPED = "swapped"
    SWAP_FAILED = "swap failed"
    DELAY_OVER = "delay over"
    GAVE_UP = "gave up"
    RENEW = "renew"
    """somebody wants a new passt, or another attempt: a changed file, a new listener"""
    RELEASE = "release"
    RELEASED = "released"


class Action(enum.Enum):
    """What the link is to do."""

    ACQUIRE = "acquire"
    REPORT = "report to the vm"
    TELL_CONNECTED = "tell: connected"
    REAP = "reap"
    SWAP = "swap"
    TELL_RESTORED = "tell: restored"
    PLAN_RETRY = "tell: failed, plan the next attempt"
    LET_GO = "let go"


_S, _E, _A = State, Event, Action
Step = tuple[State, tuple[Action, ...]]

_REAP: Step = (_S.REAPING, (_A.REAP,))
_ACQUIRE: Step = (_S.ACQUIRING, (_A.ACQUIRE,))
_WAIT: Step = (_S.WAITING, (_A.PLAN_RETRY,))
_END: Step = (_S.ENDING, (_A.LET_GO,))

TABLE: dict[State, dict[Event, Step]] = {
    _S.NEW: {
        _E.START: (_S.STARTING, (_A.ACQUIRE,)),
        _E.ADOPTED: (_S.CONNECTED, ()),
        _E.ADOPTED_LOST: (_S.DOWN, ()),
        _E.RELEASE: _END,
    },
    _S.STARTING: {
        _E.ACQUIRED: (_S.CONNECTED, (_A.TELL_CONNECTED,)),
        _E.ACQUIRE_FAILED: (_S.DOWN, ()),
        _E.RELEASE: _END,
    },
    _S.DOWN: {
        # The loss and the monitor's answer have crossed, or nobody watched when it was lost: now it is healed.
        _E.VM_READY: _REAP,
        _E.RELEASE: _END,
    },
    _S.CONNECTED: {
        _E.VM_READY: (_S.UP, ()),
        # No guest has booted yet: to begin anew is better than to go on with a doubtful passt.
        _E.LOST: (_S.DOWN, (_A.REPORT,)),
        _E.RELEASE: _END,
    },
    _S.UP: {
        _E.LOST: _REAP,
        _E.RENEW: _REAP,
        _E.RELEASE: _END,
    },
    _S.REAPING: {
        # A passt that is dying still has its ports: the new one must not come before its end.
        _E.REAPED: _ACQUIRE,
        _E.CRASHED: _WAIT,
        _E.RELEASE: _END,
    },
    _S.ACQUIRING: {
        _E.ACQUIRED: (_S.SWAPPING, (_A.SWAP,)),
        _E.ACQUIRE_FAILED: _WAIT,
        _E.RENEW: (_S.OUTDATED, ()),
        _E.RELEASE: _END,
    },
    _S.OUTDATED: {
        _E.ACQUIRED: _REAP,
        _E.ACQUIRE_FAILED: _ACQUIRE,
        _E.RELEASE: _END,
    },
    _S.SWAPPING: {
        _E.SWAPPED: (_S.UP, (_A.TELL_RESTORED,)),
        _E.SWAP_FAILED: (_S.UNDOING, (_A.REAP,)),
        # QEMU is in the middle of it: let it finish, then begin anew.
        _E.LOST: (_S.WASTED, ()),
        _E.RENEW: (_S.WASTED, ()),
        _E.RELEASE: _END,
    },
    _S.WASTED: {
        _E.SWAPPED: _REAP,
        _E.SWAP_FAILED: (_S.UNDOING, (_A.REAP,)),
        _E.RELEASE: _END,
    },
    _S.UNDOING: {
        _E.REAPED: _WAIT,
        _E.CRASHED: _WAIT,
        _E.RENEW: (_S.REAPING, ()),
        _E.RELEASE: _END,
    },
    _S.WAITING: {
        _E.DELAY_OVER: _ACQUIRE,
        _E.RENEW: _ACQUIRE,
        _E.GAVE_UP: (_S.FAILED, ()),
        _E.RELEASE: _END,
    },
    _S.FAILED: {
        _E.RENEW: _ACQUIRE,
        _E.RELEASE: _END,
    },
    _S.ENDING: {
        _E.RELEASED: (_S.ENDED, ()),
    },
    _S.ENDED: {},
}


def advance(state: State, event: Event) -> Step:
    """What ``event`` means in ``state``: the next state, and what to do on the way, in this order."""
    return TABLE[state].get(event, (state, ()))


def describe_table() -> str:
    """The table as Markdown, one line per state and event that it answers."""
    return describe(TABLE)


if __name__ == "__main__":
    print(describe_table())  # noqa: T201 (this is what the command is for)
