# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd start``, ``restart``, ``kill`` and ``link swap``: one request each, and the wait for its end."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.options import client_options, json_option, name_argument, places, wait_options
from qrapd.errors import Conflict, ExitStatus, QrapdError, Unavailable, Unknown, UsageError

if TYPE_CHECKING:
    from qrapd.client.http import Client, Status
    from qrapd.client.places import Places

__all__ = ["kill", "link", "restart", "start"]


@click.command()
@name_argument()
@wait_options
@json_option
@client_options
def start(
    name: str,
    timeout: float | None,
    no_wait: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> int:
    """Have the agent start a VM, and wait until the machine runs.

    The guest boots after that. A VM that runs already is left as it is, and that is an error.
    """
    from qrapd.client.waiting import started
    from qrapd.commands.asking import NoHost, Request, carry_out

    where = places(runtime_dir, socket)
    asked = Request("starting", lambda client: client.act(name, "start"), started)
    try:
        return carry_out(where, name, asked, wait=not no_wait, timeout=timeout, as_json=as_json)
    except NoHost as error:
        raise Unavailable(
            f"{error.message}, and there is no agent that could start it: nobody listens on {where.agent}",
            hint=f"start the agent: `qrapd agent`; or run the VM without one: `qrapd run {name}`, "
            f"`systemctl start qrapd@{name}`",
        ) from None


@click.command()
@name_argument()
@wait_options
@json_option
@client_options
def restart(
    name: str,
    timeout: float | None,
    no_wait: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> int:
    """Power a VM down and start it again by its file as that is now; wait until the machine runs."""
    from qrapd.client.waiting import restarted
    from qrapd.commands.asking import Request, carry_out

    asked = Request("restarting", lambda client: client.act(name, "restart"), restarted)
    return carry_out(
        places(runtime_dir, socket), name, asked, wait=not no_wait, timeout=timeout, as_json=as_json
    )


@click.command()
@name_argument()
@wait_options
@json_option
@client_options
def kill(
    name: str,
    timeout: float | None,
    no_wait: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> int:
    """End a VM's QEMU at once, by SIGKILL: what the guest has not written to its disks is lost.

    Works without anybody's help, too, where its supervisor is gone or does not answer.
    """
    from qrapd.client.http import Unreachable
    from qrapd.client.waiting import killed
    from qrapd.commands.asking import Request, carry_out

    where = places(runtime_dir, socket)
    asked = Request("killing", lambda client: client.act(name, "kill"), killed)
    try:
        return carry_out(where, name, asked, wait=not no_wait, timeout=timeout, as_json=as_json)
    except (Unreachable, Unavailable, Unknown) as error:
        if where.socket is not None:
            raise
        return _kill_left(where, name, error, wait=not no_wait, timeout=timeout, as_json=as_json)


def _kill_left(
    where: Places, name: str, error: QrapdError, *, wait: bool, timeout: float | None, as_json: bool
) -> int:
    """Kill the QEMU that the VM's record names."""
    from qrapd import record, running
    from qrapd.client.places import look
    from qrapd.commands.owner import become_owner
    from qrapd.runtime_directory import VmDirectory

    become_owner(where.base / name)
    try:
        found = record.read(VmDirectory(where.base, name).record_path)
    except record.Unusable:
        raise error from None
    if found is None or not found.qemu.alive:
        raise error
    try:
        running.tell(found.qemu, signal.SIGKILL)
    except Unavailable:
        raise Unavailable(
            f"cannot kill QEMU (pid {found.qemu.pid}) of {name}: it has ended, or is another user's"
        ) from None
    if wait and not running.wait_for_end(found.qemu, timeout):
        raise Unavailable(
            f"{name}: its QEMU (pid {found.qemu.pid}) was killed, and is still there after {timeout:g} s",
            hint="it waits for the host, such as for a disk that does not answer, and ends after that",
        )
    if as_json:
        click.echo(json.dumps(look(where.base, name), ensure_ascii=False))
    else:
        words = f"nobody answers for it ({error.message}); its QEMU (pid {found.qemu.pid}) was killed"
        click.echo(f"{name}: {words}")
    return ExitStatus.OK


@click.group()
def link() -> None:
    """A VM's way to the host, one of each network interface."""


@link.command(short_help="Replace a link's passt, and wait for the network.")
@name_argument()
@click.argument("index", type=click.IntRange(0), required=False)
@wait_options
@json_option
@client_options
def swap(
    name: str,
    index: int | None,
    timeout: float | None,
    no_wait: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    **_: object,
) -> int:
    """Replace a link's passt by another one, and wait until the guest is back on the network.

    Links count from 0, in the order of the VM's file; INDEX can be left out where there is but one.
    """
    from qrapd.client.waiting import swapped
    from qrapd.commands.asking import Request, carry_out

    chosen = index or 0

    async def begin(client: Client) -> Status:
        nonlocal chosen
        chosen = choose_link(await client.vm(name), index)
        return await client.swap(name, chosen)

    asked = Request("swapping passt", begin, lambda history: swapped(history, chosen))
    return carry_out(
        places(runtime_dir, socket), name, asked, wait=not no_wait, timeout=timeout, as_json=as_json
    )


def choose_link(vm: Status, index: int | None) -> int:
    """The link that is meant.

    :raise UsageError: it has to be said which.
    :raise Conflict: there is none.
    """
    indices = [each["index"] for each in vm.get("links") or ()]
    if index is not None:
        return index  # whether there is such a one, its host says best
    if len(indices) > 1:
        raise UsageError(
            f"{vm['name']} has {len(indices)} links: say which is meant",
            hint=f"one of {', '.join(map(str, indices))}",
        )
    if not indices:
        raise Conflict(f"{vm['name']} has no link now", hint=f"it is {vm['state']}")
    return int(indices[0])
