# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows for people: a table in a terminal, aligned lines in a pipe; and how spans of time are written."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import click

from qrapd.lines import clean

__all__ = ["STATE_STYLES", "aligned", "fitting", "in_terminal", "show_rows", "since", "span"]

STATE_STYLES: Mapping[str, str] = {
    "ready": "green",
    "up": "green",
    "starting": "cyan",
    "stopping": "cyan",
    "degraded": "yellow",
    "down": "yellow",
    "failed": "bold red",
    "exited": "dim",
    "ended": "dim",
}

GAP = "  "

ROOM_TO_WRAP = 20
"""Characters that the last column has at least, if it needs them: fewer tear words apart."""


def in_terminal() -> bool:
    """Whether a person looks on: not if either of stdout and stderr goes elsewhere."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def show_rows(heads: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Print rows below their heads; states are coloured in a terminal, and the last column is wrapped.

    :param spare: heads of columns that a narrow terminal goes without, the first one first. A pipe gets them all.
    """
    safe = [[clean(cell.encode("utf-8", "surrogateescape")) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        # Whoever searches the lines of a pipe wants them whole, and without waiting for a library of colours.
        for line in aligned([heads, *safe]):
            click.echo(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    kept = fitting(heads, safe, console.width, spare)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number in kept:
        # A name, too, may be wider than the terminal; what cannot be wrapped is not cut without a mark.
        wraps = number in (kept[0], kept[-1])
        table.add_column(heads[number], overflow="fold" if wraps else "ellipsis", no_wrap=not wraps)
    for row in safe:
        table.add_row(*(Text(row[number], STATE_STYLES.get(row[number], "")) for number in kept))
    console.print(table)


def fitting(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, spare: Sequence[str]
) -> list[int]:
    """The columns that there is room for, by their numbers."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    widths[-1] = min(widths[-1], ROOM_TO_WRAP)
    kept = list(range(len(heads)))
    for head in spare:
        if sum(widths[number] + len(GAP) for number in kept) - len(GAP) <= width:
            break
        kept.remove(heads.index(head))
    return kept


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def since(moment: str | None, now: datetime | None = None) -> str:
    """How long ago a moment was, in JSON's words for one."""
    try:
        then = datetime.fromisoformat(moment or "")
        return span(((now or datetime.now(UTC)) - then).total_seconds())
    except (ValueError, TypeError):
        return "-"


def span(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = max(0, int(seconds))
    for length, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= length:
            rest = whole % length // smaller
            return f"{whole // length}{unit}" + (f" {rest}{smaller_unit}" if rest else "")
    return f"{whole}s"
