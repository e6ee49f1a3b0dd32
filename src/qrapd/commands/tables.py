# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows for people: a table in a terminal, aligned lines in a pipe; and how spans of time are written."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import click

from qrapd.lines import clean

__all__ = ["STATE_STYLES", "aligned", "in_terminal", "show_rows", "since", "span"]

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


def in_terminal() -> bool:
    """Whether a person looks on: not if either of stdout and stderr goes elsewhere."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def show_rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their heads; states are coloured in a terminal."""
    safe = [[clean(cell.encode("utf-8", "surrogateescape")) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        # Whoever searches the lines of a pipe wants them whole, and without waiting for a library of colours.
        for line in aligned([heads, *safe]):
            click.echo(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, head in enumerate(heads):
        last = number == len(heads) - 1
        table.add_column(head, overflow="fold", no_wrap=not last)
    for row in safe:
        table.add_row(*(Text(cell, STATE_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
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
