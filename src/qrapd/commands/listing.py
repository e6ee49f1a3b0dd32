# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd ps``: all VMs of this host, whoever runs them."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrapd.commands.options import client_options, json_option, places
from qrapd.commands.tables import in_terminal, show_rows, since
from qrapd.errors import ExitStatus, Unavailable

if TYPE_CHECKING:
    from qrapd.client.places import Places

__all__ = ["ps"]

SPARE = ("restarts", "outages", "origin", "links", "qemu", "for")
"""Columns that a narrow terminal goes without, the first one first."""


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

    by_default = runtime_dir is None and socket is None
    try:
        where = places(runtime_dir, socket)
    except Unavailable as error:
        # A user without a session has no runtime directory, and may ask the agent all the same.
        raise Unavailable(error.message, hint=_hosts_agent(None) or error.hint) from None
    with progress("asking…", delay=0.5):
        found = run(lambda: survey(where, timeout=timeout))
    if as_json:
        click.echo(json.dumps(found.vms, indent=2, ensure_ascii=False))
    else:
        heads = ("name", "state", "for", "origin", "qemu", "links", "outages", "restarts", "remark")
        show_rows(heads, [row(each) for each in found.vms], spare=SPARE)
        if not found.vms and not found.problems:
            hint = _hosts_agent(where) if by_default else None
            if hint or in_terminal():
                click.echo(f"no VM runs here, as far as {where.socket or where.base} tells", err=True)
            if hint:
                click.echo(f"  hint: {hint}", err=True)
    for problem in found.problems:
        complain(problem)
    return ExitStatus.UNAVAILABLE if found.problems else ExitStatus.OK


def _hosts_agent(where: Places | None) -> str | None:
    """How to ask this host's agent, for who has not. Its VMs are not shown unasked: no other command would find them.

    :param where: what has been asked; None: nobody.
    """
    from qrapd.commands.asking import HOSTS_AGENT

    with contextlib.suppress(OSError):
        if (where is None or where.base != HOSTS_AGENT.parent) and HOSTS_AGENT.exists():
            return f"this host's agent is asked by: --socket {HOSTS_AGENT}, or QRAPD_SOCKET={HOSTS_AGENT}"
    return None


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
