# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd stop``: the agent's VMs by its API, others by a signal to their supervisor, orphans by taking them over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.asking import Ended, Request, carry_out, host_of, interruptible, progress, request, run
from qrapd.commands.complaints import complain
from qrapd.commands.lookup import agent_has, own_supervisor, read_file
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
from qrapd.errors import ExitStatus, QemuFailed, QrapdError, Unavailable, UsageError

if TYPE_CHECKING:
    from qrapd.client.http import Client, Status
    from qrapd.client.places import Places
    from qrapd.logs import LogFormat
    from qrapd.plan import Plan
    from qrapd.record import ProcessId

__all__ = ["stop"]


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
            plan = read_file(self._where, file)
            name = plan.name
        status = self._stop_running(name)
        if status is not None:
            return status
        if plan is None:
            plan = self._read_plan(file)
            if plan is None:
                click.echo(f"{name}: does not run; nothing is known of a VM of that name", err=True)
                self._tell(name, "exited")
                return ExitStatus.OK
            if plan.name != name and (status := self._stop_running(plan.name)) is not None:
                return status
        if (self._wait and self._timeout is None) or not self._is_left(plan.name):
            return self._stop_left(plan)
        wait = self._begin_left(file, plan.name)
        with interruptible(name, "stopping"), progress(f"{name}: stopping…"):
            status = wait() if self._wait else ExitStatus.OK
        if not status:
            self._tell(plan.name, "exited" if self._wait else "stopping")
        return status

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

    def _await_process(self, name: str, supervisor: ProcessId) -> int:
        from qrapd import running

        if not running.wait_for_end(supervisor, self._timeout):
            raise self._too_long(name)
        return ExitStatus.OK

    def _too_long(self, name: str) -> Unavailable:
        return Unavailable(
            f"{name}: it still runs after {self._timeout:g} s, and is no longer waited for",
            hint=f"what was begun goes on: qrapd show {name}",
        )

    def _read_plan(self, name: str) -> Plan | None:
        """By the file; where that is wrong, or gone, what was left is known by its record well enough to be stopped.

        None: there is neither.
        """
        from qrapd import vm_files
        from qrapd.plan import unreadable

        file = vm_files.directory(os.environ, os.geteuid()) / f"{name}.toml"
        try:
            return read_plan(name)
        except QrapdError:
            if self._is_left(name):
                return unreadable(file)
            if vm_files.is_missing(file):
                return None
            raise

    def _is_left(self, name: str) -> bool:
        from qrapd.runtime_directory import VmDirectory

        try:
            return VmDirectory(self._where.base, name).record_path.exists()
        except OSError:
            return False  # whoever claims the directory has the words for it

    def _begin_left(self, file: str, name: str) -> Callable[[], int]:
        """Have a process of its own do that: it goes on when nobody waits any more. Returns the wait for its end."""
        from qrapd.logs import choose_format

        log_format = choose_format(os.environ, sys.stderr) if self._log_format == "auto" else self._log_format
        # What it has to say is shown by whoever waits for it, and by nobody else.
        log = tempfile.TemporaryFile()  # noqa: SIM115 (for as long as either of the two has it)
        # -P: no modules from the directory where root happens to be.
        command = [sys.executable, "-P", "-m", "qrapd", "stop", "--runtime-dir", str(self._where.base)]
        command += ["--log-format", log_format, "--log-level", self._log_level, "--", file]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )

        def wait() -> int:
            try:
                status = child.wait(self._timeout)
            except subprocess.TimeoutExpired:
                raise self._too_long(name) from None
            log.seek(0)
            click.echo(log.read(), err=True, nl=False)
            return status

        return wait

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

        found = run(lambda: survey(self._where))
        vms = {vm["name"]: vm for vm in found.vms if self._may_run(vm)}
        problems, waits, worst = list(found.problems), [], 0
        # Root's own first: from the first one of another user on, this is that user.
        for name in sorted(vms, key=lambda name: _owner(self._where.base / name)):
            try:
                waits.append((name, self._begin(vms[name])))
            except QrapdError as error:
                problems.append(error)
        for name, wait in waits if self._wait else ():
            try:
                with interruptible(name, "stopping"), progress(f"{name}: stopping…"):
                    status = wait()
                worst = worst or status
                if status:
                    continue
                self._tell(name, "exited")
                if in_terminal() and not self._as_json:
                    click.echo(f"{name}: has ended")
            except QrapdError as error:
                problems.append(error)
        for problem in problems:
            complain(problem)
        return problems[0].exit_status if problems else worst

    def _may_run(self, vm: Status) -> bool:
        """Whether there is something to be stopped: also a QEMU that its host could not take over."""
        from qrapd.client.places import look
        from qrapd.client.waiting import OVER

        if vm["state"] not in OVER or vm.get("qemu_pid"):
            return True
        if self._where.socket is not None:
            return False
        try:
            left = look(self._where.base, vm["name"])
        except PermissionError:
            return False
        return left is not None and left["qemu_pid"] is not None

    def _begin(self, vm: Status) -> Callable[[], int]:
        """Tell one to stop. Returns the wait for its end."""
        name = vm["name"]
        if self._where.socket is None:
            if (supervisor := own_supervisor(self._where, name)) is not None:
                self._begin_by_signal(name, supervisor)
                return partial(self._await_process, name, supervisor)
            if not agent_has(self._where, name):
                return self._begin_left(name, name)
        self._ask_agent(vm, lambda client: client.act(name, "stop"), wait=False)
        # A second request might be the next, rougher step.
        return partial(self._ask_agent, vm, lambda client: client.vm(name), wait=True)

    def _ask_agent(self, before: Status, begin: Callable[[Client], Awaitable[Status]], *, wait: bool) -> int:
        """``before``: how it was before it was told to stop."""
        from qrapd.client.waiting import stopped

        name = before["name"]
        asked = Request("stopping", begin, lambda history: stopped([before, *history]))

        async def job() -> Ended:
            async with host_of(self._where, name) as client:
                return await request(client, name, asked, wait=wait, timeout=self._timeout)

        ended = run(job)
        if ended.verdict is not None and not ended.verdict.ok:
            raise QemuFailed(f"{name}: {ended.verdict.words}", hint=ended.verdict.hint)
        return ExitStatus.OK


def _owner(directory: Path) -> int:
    try:
        return directory.lstat().st_uid
    except OSError:
        return 0
