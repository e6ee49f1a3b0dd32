# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd stop``: the agent's VMs by its API, others by a signal to their supervisor, orphans by taking them over."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.asking import Ended, Request, carry_out, host_of, interruptible, progress, request, run
from qrapd.commands.complaints import complain
from qrapd.commands.options import (
    client_options,
    file_argument,
    json_option,
    places,
    read_plan,
    wait_options,
)
from qrapd.commands.owner import become_owner
from qrapd.commands.tables import in_terminal
from qrapd.errors import ExitStatus, QemuFailed, QrapdError, Unavailable, Unknown, UsageError

if TYPE_CHECKING:
    from qrapd.client.http import Client, Status
    from qrapd.client.places import Places
    from qrapd.logs import LogFormat
    from qrapd.plan import Plan
    from qrapd.record import ProcessId

__all__ = ["agent_has", "own_supervisor", "stop"]


@click.command()
@file_argument(required=False)
@click.option("--all", "all_vms", is_flag=True, help="Stop all VMs that `qrapd ps` shows.")
@wait_options
@json_option
@client_options
def stop(
    file: str | None,
    all_vms: bool,
    timeout: float | None,
    no_wait: bool,
    as_json: bool,
    runtime_dir: Path | None,
    socket: Path | None,
    log_format: LogFormat,
    log_level: str,
) -> int:
    """Power a VM down, and wait for its end: also one whose supervisor is gone.

    Ends with 0 if nothing of it runs any more, or never did.
    """
    if all_vms == (file is not None):
        raise UsageError("say which VM is meant, or --all", hint="qrapd ps shows those that there are")
    where = places(runtime_dir, socket)
    stopping = _Stopping(where, timeout, not no_wait, as_json, log_format, log_level)
    return stopping.stop(file) if file is not None else stopping.stop_all()


class _Stopping:
    """One call of the command."""

    def __init__(
        self,
        where: Places,
        timeout: float | None,
        wait: bool,
        as_json: bool,
        log_format: LogFormat,
        log_level: str,
    ) -> None:
        self._where = where
        self._timeout = timeout
        self._wait = wait
        self._as_json = as_json
        self._log_format: LogFormat = log_format
        self._log_level = log_level

    def stop(self, file: str) -> int:
        from qrapd.client.places import is_name

        plan: Plan | None = None
        if self._where.socket is not None:
            return self._by_agent(file if is_name(file) else read_plan(file).name)
        name = file
        if not is_name(file):
            plan = read_plan(file)
            name = plan.name
        status = self._stop_running(name)
        if status is not None:
            return status
        if plan is None:
            plan = self._read_plan(file)
            if plan.name != name and (status := self._stop_running(plan.name)) is not None:
                return status
        return self._stop_left(plan)

    def _stop_running(self, name: str) -> int | None:
        """None: nobody has it."""
        supervisor = own_supervisor(self._where, name)
        if supervisor is not None:
            with interruptible(name, "stopping"), progress(f"{name}: stopping…"):
                self._begin_by_signal(name, supervisor)
                if self._wait:
                    self._await_process(name, supervisor)
            self._tell(name, "exited" if self._wait else "stopping")
            return ExitStatus.OK
        return self._by_agent(name) if agent_has(self._where, name) else None

    def _by_agent(self, name: str) -> int:
        from qrapd.client.waiting import stopped

        asked = Request("stopping", lambda client: client.act(name, "stop"), stopped)
        return carry_out(
            self._where, name, asked, wait=self._wait, timeout=self._timeout, as_json=self._as_json
        )

    def _begin_by_signal(self, name: str, supervisor: ProcessId) -> None:
        from qrapd import running

        # The pid is from a file in that directory.
        become_owner(self._where.base / name)
        try:
            running.tell(supervisor, signal.SIGTERM)
        except Unavailable as error:
            raise Unavailable(f"{name}: {error.message}", hint=error.hint) from None

    def _await_process(self, name: str, supervisor: ProcessId) -> None:
        if not _ends_within(supervisor, self._timeout):
            raise Unavailable(
                f"{name}: it still runs after {self._timeout:g} s, and is no longer waited for",
                hint=f"what was begun goes on: qrapd show {name}",
            )

    def _read_plan(self, name: str) -> Plan:
        """By the file; where that is wrong, or gone, what was left is known by its record well enough to be stopped."""
        from qrapd import vm_files
        from qrapd.plan import unreadable
        from qrapd.runtime_directory import VmDirectory

        try:
            return read_plan(name)
        except QrapdError:
            if not VmDirectory(self._where.base, name).record_path.exists():
                raise
            return unreadable(vm_files.directory(os.environ, os.geteuid()) / f"{name}.toml")

    def _stop_left(self, plan: Plan) -> int:
        """Take over what a supervisor has left, just to stop it."""
        import anyio

        from qrapd.foreground import supervise
        from qrapd.logs import Logs
        from qrapd.vm import Vm

        async def stop_it(vm: Vm) -> None:
            vm.stop()

        become_owner(self._where.base / plan.name)
        with Logs(self._log_format, self._log_level) as logs:
            anyio.run(
                partial(supervise, plan, self._where.base, logs.emit, companion=stop_it, only_left=True)
            )
        self._tell(plan.name, "exited")
        return ExitStatus.OK

    def _tell(self, name: str, state: str) -> None:
        if self._as_json:
            click.echo(json.dumps({"name": name, "state": state}))

    # --- all of them

    def stop_all(self) -> int:
        """All are told first, and then waited for. What goes wrong with one is no reason to leave another."""
        from qrapd.client.survey import survey
        from qrapd.client.waiting import OVER

        found = run(lambda: survey(self._where))
        names = [vm["name"] for vm in found.vms if vm["state"] not in OVER or vm.get("qemu_pid")]
        # Root's own first: from the first one of another user on, this is that user.
        names.sort(key=lambda name: _owner(self._where.base / name))
        problems, waits = list(found.problems), []
        for name in names:
            try:
                waits.append((name, self._begin(name)))
            except QrapdError as error:
                problems.append(error)
        for name, wait in waits if self._wait else ():
            try:
                with interruptible(name, "stopping"), progress(f"{name}: stopping…"):
                    wait()
                self._tell(name, "exited")
                if in_terminal() and not self._as_json:
                    click.echo(f"{name}: has ended")
            except QrapdError as error:
                problems.append(error)
        for problem in problems:
            complain(problem)
        return problems[0].exit_status if problems else ExitStatus.OK

    def _begin(self, name: str) -> Callable[[], object]:
        """Tell one to stop. Returns the wait for its end."""
        if self._where.socket is None:
            if (supervisor := own_supervisor(self._where, name)) is not None:
                self._begin_by_signal(name, supervisor)
                return partial(self._await_process, name, supervisor)
            if not agent_has(self._where, name):
                # Nobody can be told: taking it over is what takes the time, and comes with the waits.
                return partial(self._stop_left, self._read_plan(name))
        self._ask_agent(name, lambda client: client.act(name, "stop"), wait=False)
        # A second request might be the next, rougher step.
        return partial(self._ask_agent, name, lambda client: client.vm(name), wait=True)

    def _ask_agent(self, name: str, begin: Callable[[Client], Awaitable[Status]], *, wait: bool) -> None:
        from qrapd.client.waiting import stopped

        async def job() -> Ended:
            async with host_of(self._where, name) as client:
                return await request(
                    client, name, Request("stopping", begin, stopped), wait=wait, timeout=self._timeout
                )

        ended = run(job)
        if ended.verdict is not None and not ended.verdict.ok:
            raise QemuFailed(f"{name}: {ended.verdict.words}")


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


def _owner(directory: Path) -> int:
    try:
        return directory.lstat().st_uid
    except OSError:
        return 0


def _ends_within(process: ProcessId, timeout: float | None) -> bool:
    """Whether exactly this process ends in so many seconds."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        return not process.alive or bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)
