# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has the VM that is meant by a name or a file: a supervisor of its own, the agent, or nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.asking import run
from qrapd.commands.options import read_plan
from qrapd.errors import ConfigurationError, Unavailable, Unknown

if TYPE_CHECKING:
    from qrapd.client.places import Places
    from qrapd.plan import Plan
    from qrapd.record import ProcessId

__all__ = ["agent_has", "has_supervisor", "own_supervisor", "read_file"]


def read_file(where: Places, file: str) -> Plan:
    """What a VM's file comes to on this host; or a word on the VM that runs, should the file have gone since.

    :raise ConfigurationError: it is wrong, or there is none.
    """
    from qrapd.client.places import is_name
    from qrapd.runtime_directory import VmDirectory

    try:
        return read_plan(file)
    except ConfigurationError as error:
        name = Path(file).stem
        if Path(error.path).exists() or not is_name(name):
            raise
        directory = VmDirectory(where.base, name)
        try:
            runs = directory.supervisor_pid() is not None or directory.record_path.exists()
        except OSError:
            runs = False
        if not runs:
            raise
        command = click.get_current_context().info_name
        hint = f"a VM {name} runs: qrapd {command} {name}"
        raise ConfigurationError(
            error.path, [replace(problem, hint=hint) for problem in error.problems]
        ) from None


def own_supervisor(where: Places, name: str) -> ProcessId | None:
    """The process that supervises this VM and no other; None: there is none, or it is an agent, with many.

    :raise Unavailable: it is an agent that does not answer.
    """
    from qrapd import running
    from qrapd.client.places import is_agent
    from qrapd.runtime_directory import VmDirectory

    try:
        pid = VmDirectory(where.base, name).supervisor_pid()
    except PermissionError:
        # An agent's VMs are closed to those, too, who may speak with it.
        if agent_has(where, name):
            return None
        return running.find_supervisor(where.base, name)  # has the words for it
    if pid is None:
        return None
    if is_agent(pid):
        if agent_has(where, name):
            return None
        raise Unavailable(
            f"{name} is a VM of the agent (pid {pid}), and that does not answer on {where.agent}",
            hint="see what its log says; if it hangs, kill it and start it again: its VMs run on",
        )
    try:
        return running.find_supervisor(where.base, name)
    except Unavailable:
        return None  # it has just ended


def agent_has(where: Places, name: str) -> bool:
    """Whether the agent, if there is one, answers for this VM."""
    if not where.agent.exists():
        return False
    from qrapd.client.http import Client, Unreachable

    async def job() -> bool:
        async with Client(where.agent) as client:
            try:
                await client.vm(name)
            except (Unknown, Unreachable):
                return False
            return True

    return run(job)


def has_supervisor(where: Places, name: str) -> bool:
    """Whether a VM of this name has one, be it its own or an agent; also where this user may not look."""
    from qrapd.client.places import is_name
    from qrapd.runtime_directory import VmDirectory

    try:
        return is_name(name) and VmDirectory(where.base, name).supervisor_pid() is not None
    except PermissionError:
        return True  # who looks for it then has the words
