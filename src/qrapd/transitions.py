# SPDX-License-Identifier: GPL-2.0-or-later
"""A table of states and events in the form that the documentation shows."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["describe"]

_State = TypeVar("_State", bound=enum.Enum)
_Event = TypeVar("_Event", bound=enum.Enum)
_Action = TypeVar("_Action", bound=enum.Enum)


def describe(table: Mapping[_State, Mapping[_Event, tuple[_State, tuple[_Action, ...]]]]) -> str:
    """The table as Markdown, one line per state and event that it answers."""
    lines = ["| in state | on | go to | and do |", "|---|---|---|---|"]
    for state, row in table.items():
        for event, (target, actions) in row.items():
            doing = ", ".join(action.value for action in actions) or "nothing"
            lines.append(f"| {state.value} | {event.value} | {target.value} | {doing} |")
    return "\n".join(lines)
