# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd show``: all that is known of one VM."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrapd.commands.options import client_options, json_option, name_argument, places
from qrapd.commands.tables import show_rows, since
from qrapd.errors import ExitStatus, QrapdError, Unavailable

if TYPE_CHECKING:
    from qrapd.client.places import Places
    from qrapd.client.stream import ServerEvent

__all__ = ["show"]

SPARE = ("unread", "last", "generation", "outages", "passt", "mode")
"""Of the links' columns, those that a narrow terminal goes without, the first one first."""


@click.command()
@name_argument()
@click.option(
    "--events",
    "count",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="So many of its last events.",
)
@json_option
@client_options
def show(
    name: str, count: int, as_json: bool, runtime_dir: Path | None, socket: Path | None, **_: object
) -> int:
    """Show all that is known of a VM: its state, its links and what they forward, and its last events."""
    from qrapd.commands.asking import run

    vm, kept = run(lambda: _ask(places(runtime_dir, socket), name))
    kept = kept[-count:] if count else []
    if as_json:
        click.echo(
            json.dumps(
                {**vm, "events": [{"id": event.id, **event.fields} for event in kept]},
                indent=2,
                ensure_ascii=False,
            )
        )
        return ExitStatus.OK
    for key, value in _facts(vm):
        click.echo(f"{key + ':':<10}{value}")
    if vm.get("links"):
        click.echo()
        heads = ("link", "mode", "state", "passt", "generation", "outages", "last", "unread", "forwards")
        show_rows(heads, [_link_row(each) for each in vm["links"]], spare=SPARE)
    if kept:
        from qrapd.commands.events import event_line

        click.echo()
        for event in kept:
            click.echo(event_line(event))
    return ExitStatus.OK


async def _ask(where: Places, name: str) -> tuple[dict[str, Any], list[ServerEvent]]:
    from qrapd.client.places import look
    from qrapd.commands.asking import host_of
    from qrapd.commands.forward import all_forwards

    try:
        async with host_of(where, name) as client:
            vm = await client.vm(name)
            # Whoever may not ask for these, or asks a supervisor that lacks them, sees the rest.
            with contextlib.suppress(QrapdError):
                for link, forwards in zip(vm["links"], await all_forwards(client, vm), strict=True):
                    link["forwards"] = {key: forwards[key] for key in ("tcp", "udp") if key in forwards}
            kept: list[ServerEvent] = []
            with contextlib.suppress(QrapdError):
                kept = [event async for event in client.events(name, follow=False)]
            return vm, kept
    except Unavailable as error:
        # Nobody speaks for it: what its directory tells is better than nothing.
        with contextlib.suppress(PermissionError):
            silent = getattr(error, "cause", None) == "silent"
            if where.socket is None and (vm_left := look(where.base, name, silent=silent)) is not None:
                return vm_left, []
        raise


def _facts(vm: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", vm["name"]
    yield "state", f"{vm['state']} for {since(vm.get('since'))}"
    if vm.get("error"):
        yield "remark", str(vm["error"])
    if vm.get("hint"):
        yield "hint", str(vm["hint"])
    yield "origin", vm.get("origin") or "-"
    yield "qemu", f"pid {vm['qemu_pid']}" if vm.get("qemu_pid") else "-"
    yield "restarts", str(vm.get("restarts", 0))
    known = {"name", "state", "since", "error", "hint", "origin", "qemu_pid", "restarts", "links"}
    for key in vm.keys() - known:  # of a host that is newer than this
        yield key, str(vm[key])


def _link_row(link: dict[str, Any]) -> tuple[str, ...]:
    last = link.get("last_outage_ms")
    unread = [link.get("unread_by_passt"), link.get("unread_by_qemu")]
    forwards = link.get("forwards") or {}
    return (
        str(link["index"]),
        link.get("mode") or "-",
        link["state"],
        str(link.get("passt_pid") or "-"),
        str(link.get("generation", "-")),
        str(link.get("outages", "-")),
        "-" if last is None else f"{last:.0f} ms",
        " + ".join("?" if each is None else str(each) for each in unread) if any(unread) else "-",
        ", ".join(
            ports if protocol == "tcp" else f"{ports}/udp"
            for protocol in ("tcp", "udp")
            for ports in forwards.get(protocol) or ()
        )
        or "-",
    )
