# SPDX-License-Identifier: GPL-2.0-or-later
"""All VMs of this host, by everybody's answer and, where there is none, by what their directories tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from qrapd.client.http import ANSWER_TIMEOUT, Client, Status, Unreachable
from qrapd.client.places import Places, look
from qrapd.errors import QrapdError, Unavailable

__all__ = ["Survey", "survey"]

AT_ONCE = 64
"""Calls under way: far below the 1,024 files that a process may have open by default."""


@dataclass
class Survey:
    """What was found."""

    vms: list[Status] = field(default_factory=list)
    problems: list[QrapdError] = field(default_factory=list)
    """because of which VMs may be missing"""
    hosts: dict[str, Path] = field(default_factory=dict)
    """the socket that answers for a VM, by the VM's name"""


async def survey(places: Places, *, timeout: float = ANSWER_TIMEOUT) -> Survey:
    """Ask all at once; one that hangs delays the answer and hides nothing of the others.

    :raise QrapdError: the one socket that was named does not answer.
    """
    if places.socket is not None:
        async with Client(places.socket, timeout=timeout) as client:
            vms = await client.vms()
        return Survey(vms, hosts={each["name"]: places.socket for each in vms})
    found, answers, silent = Survey(), dict[str, Status](), set[str]()
    try:
        names = await anyio.to_thread.run_sync(places.names)
    except OSError as error:
        raise Unavailable(f"cannot look into {places.base}: {error.strerror}") from None
    limiter = anyio.CapacityLimiter(AT_ONCE)

    async def ask(socket: Path, name: str | None) -> None:
        try:
            async with limiter, Client(socket, timeout=timeout) as client:
                for each in await client.vms():
                    # A VM is at home with its own supervisor, should the agent know of it, too.
                    if name is not None or each["name"] not in answers:
                        answers[each["name"]], found.hosts[each["name"]] = each, socket
        except Unreachable as error:
            if error.cause == "silent" and name is not None:
                silent.add(name)
            elif name is None and error.cause not in ("absent", "refused"):
                found.problems.append(error)
        except QrapdError as error:
            found.problems.append(error)

    async with anyio.create_task_group() as tasks:
        if _exists(places.agent):
            tasks.start_soon(ask, places.agent, None)
        for name in names:
            if _exists(places.control(name)):
                tasks.start_soon(ask, places.control(name), name)
    hung_agent = bool(found.problems)
    closed = []
    for name in names:
        # The agent knows of one with a supervisor of its own what the directory tells, and not that it is silent.
        if name in answers and name not in silent:
            continue
        try:
            status = look(
                places.base, name, silent=name in silent or (hung_agent and not _exists(places.control(name)))
            )
        except PermissionError:
            if name not in answers:
                closed.append(name)
        else:
            if status is not None:
                answers[name] = status
    if closed:
        found.problems.append(_closed(places.base, closed))
    found.vms = [answers[name] for name in sorted(answers)]
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # before Python 3.14 only some errors mean no
        return False


def _closed(base: Path, names: list[str]) -> QrapdError:
    shown = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
    return Unavailable(
        f"VMs in {base} that are closed to this user: {shown}",
        hint="do this as the user who runs them, or as root",
    )
