# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd ps``: all VMs of this host, whoever runs them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from qrapd.commands.options import client_options, json_option, places
from qrapd.commands.tables import in_terminal, show_rows, since
from qrapd.errors import ExitStatus

__all__ = ["ps"]


@click.command()
@json_option
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="For a supervisor to answer.",
)
@client_options
def ps(as_json: bool, timeout: float, runtime_dir: Path | None, socket: Path | None, **_: object) -> int:
    """List the VMs that run here: the agent's, those of units and shells, and what others have left behind.

    Ends with 69 if VMs may be missing from the list, because somebody did not answer.
    """
    from qrapd.client.survey import survey
    from qrapd.commands.asking import progress, run
    from qrapd.commands.complaints import complain

    where = places(runtime_dir, socket)
    with progress("asking…", delay=0.5):
        found = run(lambda: survey(where, timeout=timeout))
    if as_json:
        click.echo(json.dumps(found.vms, indent=2, ensure_ascii=False))
    else:
        heads = ("name", "state", "for", "origin", "qemu", "links", "outages", "restarts", "remark")
        show_rows(heads, [row(each) for each in found.vms])
        if not found.vms and not found.problems and in_terminal():
            click.echo(f"no VM runs here, as far as {where.socket or where.base} tells", err=True)
    for problem in found.problems:
        complain(problem)
    return ExitStatus.UNAVAILABLE if found.problems else ExitStatus.OK


def row(vm: dict[str, Any]) -> tuple[str, ...]:
    """A VM's line."""
    links = vm.get("links") or []
    return (
        vm["name"],
        vm["state"],
        since(vm.get("since")),
        vm.get("origin") or "-",
        str(vm.get("qemu_pid") or "-"),
        _links(links),
        _outages(links),
        str(vm.get("restarts", 0)),
        vm.get("error") or "",
    )


def _links(links: list[dict[str, Any]]) -> str:
    count = Counter(link["state"] for link in links)
    return ", ".join(f"{number} {state}" for state, number in count.items()) or "none"


def _outages(links: list[dict[str, Any]]) -> str:
    total = sum(link.get("outages") or 0 for link in links)
    lasting = [link["last_outage_ms"] for link in links if link.get("last_outage_ms") is not None]
    return str(total) + (f" ({max(lasting):.0f} ms)" if total and lasting else "")
