# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that run a VM here, or tell its supervisor something: run, wrap, reload, upgrade."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd import __version__
from qrapd.commands.complaints import complain
from qrapd.commands.options import (
    allow_uid_option,
    base_directory,
    client_options,
    common_options,
    file_argument,
    pattern_option,
    places,
    read_plan,
)
from qrapd.commands.owner import become_owner
from qrapd.errors import ConfigurationError, Conflict, ExitStatus, QrapdError, Unavailable
from qrapd.failed_starts import FailedStarts, count_failures
from qrapd.systemd import is_unit

if TYPE_CHECKING:
    from qrapd.client.places import Places
    from qrapd.logs import Emit, LogFormat, Logs
    from qrapd.plan import Plan
    from qrapd.vm import Outcome

__all__ = ["reload", "run", "upgrade", "wrap"]


_READS = "its supervisor (pid {}) reads the file again; its log says what changes"


@click.command()
@file_argument()
@common_options
def run(file: str, runtime_dir: Path | None, log_format: LogFormat, log_level: str) -> int:
    """Supervise one VM in the foreground until it ends.

    SIGTERM, or Ctrl-C, asks the guest to power down; a second one takes the next, rougher step.
    """
    return _run(lambda: read_plan(file), runtime_dir, log_format, log_level, file=file)


@click.command()
@file_argument()
@client_options
def reload(file: str, runtime_dir: Path | None, socket: Path | None, **_: object) -> None:
    """Have a running VM's supervisor read its file again, and apply what it can.

    Changed options of passt, or an upgraded passt, get the link another passt under the running guest. What needs a
    restart of the VM is named in its log. A file with errors in it is refused here, and changes nothing.
    """
    from qrapd import running
    from qrapd.client.places import is_name
    from qrapd.commands.lookup import read_file

    where = places(runtime_dir, socket)
    if is_name(file) and (_agent_reloads(where, file) or _supervisor_reloads(where, file)):
        return
    name = read_file(where, file).name
    if name != file and _agent_reloads(where, name):
        return
    become_owner(where.base / name)
    supervisor = running.find_supervisor(where.base, name)
    running.tell(supervisor, signal.SIGHUP)
    click.echo(f"{name}: {_READS.format(supervisor.pid)}")


def _agent_reloads(where: Places, name: str) -> bool:
    """Ask the agent, if it has this VM."""
    from qrapd.commands.lookup import agent_has, own_supervisor

    if where.socket is None and (own_supervisor(where, name) is not None or not agent_has(where, name)):
        return False
    from qrapd.client.http import Client
    from qrapd.commands.asking import run as run_async

    async def job() -> None:
        async with Client(where.agent) as client:
            await client.act(name, "reload")

    run_async(job)
    click.echo(f"{name}: the agent reads its file again; its log says what changes: qrapd events {name}")
    return True


def _supervisor_reloads(where: Places, name: str) -> bool:
    """Ask a VM's own supervisor, which may have been started by a file that has nothing to do with this name."""
    from qrapd.client.http import Client, Unreachable
    from qrapd.commands.asking import run as run_async
    from qrapd.commands.lookup import own_supervisor

    if where.socket is not None or (supervisor := own_supervisor(where, name)) is None:
        return False

    async def job() -> bool:
        async with Client(where.control(name)) as client:
            try:
                await client.act(name, "reload")
            except Unreachable:
                return False  # it has no socket yet, or hangs: a signal waits for it
        return True

    if not run_async(job):
        return False
    click.echo(f"{name}: {_READS.format(supervisor.pid)}")
    return True


@click.command()
@file_argument()
@common_options
def upgrade(file: str, runtime_dir: Path | None, **_: object) -> None:
    """Have a running VM's supervisor replaced by the installed qrapd, in the same process.

    The VM runs on, and its network, too.
    """
    from qrapd import running
    from qrapd.client.places import is_agent
    from qrapd.commands.lookup import agent_has, has_supervisor, read_file

    where = places(runtime_dir, None)
    name = file if has_supervisor(where, file) else read_file(where, file).name
    become_owner(where.base / name)
    try:
        supervisor = running.find_supervisor(where.base, name)
    except Unavailable:
        if not agent_has(where, name):
            raise
        raise Conflict(
            f"{name} is a VM of the agent, and does not run",
            hint="the agent is upgraded by: systemctl restart qrapd-agent",
        ) from None
    who = "the agent with all of its VMs" if is_agent(supervisor.pid) else "its supervisor"
    running.tell(supervisor, signal.SIGUSR2)
    click.echo(f"{name}: {who} (pid {supervisor.pid}) becomes qrapd {__version__}; its log says vm.adopted")


@click.command(
    context_settings={
        # What is not ours is QEMU's, and QEMU has options such as -hda: no short ones of our own.
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    }
)
@click.option(
    "--powerdown-timeout",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="For the guest to power down when the VM is stopped; then QEMU is told to quit.",
)
@pattern_option
@allow_uid_option
@common_options
@click.argument("arguments", metavar="[FDNUM QEMU_CMD] [QEMU_ARG]...", nargs=-1, type=click.UNPROCESSED)
def wrap(
    arguments: tuple[str, ...],
    powerdown_timeout: float,
    pattern: str,
    allow_uid: tuple[int, ...],
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
) -> int:
    """Run a qrap command line, but supervised: find a passt, hold its stream, stop in order, tell what happens.

    Options of qrapd come first; what follows is as for qrap(1):

    \b
    qrapd wrap 5 qemu-system-x86_64 -m 1G -netdev socket,fd=5,id=n0 -device virtio-net-pci,netdev=n0
    """

    def make_plan() -> Plan:
        from qrapd.wrap import plan_wrap

        return plan_wrap(
            arguments,
            os.environ,
            pattern=pattern,
            allowed_uids=frozenset(allow_uid),
            powerdown_timeout=powerdown_timeout,
            quit_timeout=5,
        )

    return _run(make_plan, runtime_dir, log_format, log_level)


def _run(
    make_plan: Callable[[], Plan],
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
    *,
    file: str | None = None,
) -> int:
    from qrapd.handover import become_successor
    from qrapd.logs import JOURNAL_SOCKET, Logs

    environment = dict(os.environ)  # as it was given to us, for whoever takes our place
    if log_format == "journal" and not JOURNAL_SOCKET.is_socket():
        raise Unavailable(
            f"there is no journal to write to: no socket {JOURNAL_SOCKET}",
            hint="leave --log-format out, or choose json or console",
        )
    with Logs(log_format, log_level) as logs:
        # Where the file cannot be read its name is all that says which VM this is about.
        vm = Path(file).stem if file else None
        try:
            with _patience(environment, vm, file, logs) as note_up:
                plan = make_plan()
                emit = _watch_for_up(logs.emit, note_up)
                outcome = _supervise(plan, base_directory(runtime_dir), emit, make_plan if file else None)
        except QrapdError as error:
            return _tell(error, logs, vm=vm)
    if outcome.stood_back:
        become_successor(outcome.fds, environment)
    return ExitStatus.OK


def _patience(
    environment: Mapping[str, str], vm: str | None, file: str | None, logs: Logs
) -> AbstractContextManager[Callable[[], None]]:
    """Under systemd: a start that has failed again and again waits before the next try."""
    directory = environment.get("RUNTIME_DIRECTORY")
    if not directory or file is None or not is_unit(environment, os.getpid()):
        return nullcontext(lambda: None)
    place = Path(directory)

    def wait(known: FailedStarts) -> None:
        if (place / "record.json").exists():
            return  # something may run, and wait to be taken over
        delay_ms = round(known.delay * 1000)
        logs.emit("vm.restarting", vm=vm, attempts=known.count, delay_ms=delay_ms, error=None)
        time.sleep(known.delay)  # a stop ends it: SIGTERM has its default action still

    return count_failures(place / "failed-starts", since=Path(file), wait=wait)


def _watch_for_up(emit: Emit, note_up: Callable[[], None]) -> Emit:
    def tell(event: str, /, **fields: object) -> None:
        emit(event, **fields)
        if event in {"vm.ready", "vm.adopted"}:
            note_up()

    return tell


def _supervise(plan: Plan, base: Path, emit: Emit, reread: Callable[[], Plan] | None) -> Outcome:
    import anyio

    from qrapd.foreground import supervise
    from qrapd.handover import take_fds
    from qrapd.systemd import Notifier, watchdog_interval

    return anyio.run(
        partial(
            supervise,
            plan,
            base,
            emit,
            origin="unit" if is_unit(os.environ, os.getpid()) else "shell",
            reread=reread,
            # What is for qrapd alone is taken out of the environment: QEMU and passt have no business with it.
            handed=take_fds(os.environ),
            watchdog=watchdog_interval(os.environ, os.getpid()),
            notifier=Notifier.from_environment(os.environ),
        )
    )


def _tell(error: QrapdError, logs: Logs, vm: str | None) -> int:
    """An error of a supervised VM: in words on a terminal, as an event where events go."""
    if logs.format == "console":
        complain(error)
    elif isinstance(error, ConfigurationError):
        for problem in error.problems:
            fields = {"vm": vm, "hint": problem.hint}
            logs.emit("config.invalid", file=error.path, problem=str(problem), **_given(fields))
    else:
        logs.emit("run.failed", error=error.message, **_given({"vm": vm, "hint": error.hint}))
    return error.exit_status


def _given(fields: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}
