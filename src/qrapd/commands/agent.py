# SPDX-License-Identifier: GPL-2.0-or-later
"""`qrapd agent`: many VMs in one process, and the API for them."""

from __future__ import annotations

import os
import resource
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from qrapd.commands.options import base_directory, common_options
from qrapd.errors import ExitStatus

if TYPE_CHECKING:
    from qrapd.agent import AgentOutcome
    from qrapd.logs import LogFormat

__all__ = ["agent"]


@click.command()
@click.option(
    "--config-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where vms/ and agent.toml are.  [default: /etc/qrapd, or $XDG_CONFIG_HOME/qrapd]",
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the API listens.  [default: agent.sock in the runtime directory]",
)
@common_options
def agent(
    config_dir: Path | None,
    socket_path: Path | None,
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
) -> int:
    """Run all VMs that have autostart = true, in one process, and serve the API.

    When it ends, its VMs run on, and the next agent takes them over.
    """
    import anyio

    from qrapd import vm_files
    from qrapd.agent import run_agent
    from qrapd.handover import become_successor, take_fds
    from qrapd.logs import Logs
    from qrapd.systemd import Notifier, watchdog_interval

    environment = dict(os.environ)  # as it was given to us, for whoever takes our place
    directory = config_dir or vm_files.directory(os.environ, os.geteuid()).parent
    base = base_directory(runtime_dir)
    file = vm_files.read_agent_file(directory)
    _raise_fd_limit()
    with Logs(log_format, log_level) as logs:

        def abandon(outcome: AgentOutcome) -> NoReturn:
            logs.__exit__(None, None, None)
            if outcome.upgrade:
                become_successor(outcome.fds, environment)
            os._exit(ExitStatus.OK)

        outcome = anyio.run(
            partial(
                run_agent,
                directory.absolute(),
                base.absolute(),
                logs.emit,
                file=file,
                # What is for qrapd alone is taken out of the environment: QEMU and passt have no business with it.
                handed=take_fds(os.environ),
                watchdog=watchdog_interval(os.environ, os.getpid()),
                notifier=Notifier.from_environment(os.environ),
                abandon=abandon,
                socket_path=socket_path,
            )
        )
    if outcome.upgrade:
        become_successor(outcome.fds, environment)
    return ExitStatus.OK


def _raise_fd_limit() -> None:
    """As far as it may be: a VM takes some fifteen, and the default is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
