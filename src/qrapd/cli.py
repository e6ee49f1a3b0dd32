# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``qrapd``: which commands there are, and every error in words and as an exit status.

A command's module is imported when it is called: every start of a VM pays for what is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

import click

from qrapd import __version__
from qrapd.commands.complaints import complain, report_bug, root_cause, tell_of_host
from qrapd.errors import ExitStatus, QrapdError

__all__ = ["COMMANDS", "main", "run_command_line"]

COMMANDS: Mapping[str, str] = {
    "agent": "agent",
    "check": "files",
    "completion": "completion",
    "console": "console",
    "demo": "host",
    "doctor": "host",
    "events": "events",
    "forward": "forward",
    "kill": "control",
    "link": "control",
    "logs": "host",
    "plan": "files",
    "probe": "host",
    "ps": "listing",
    "reload": "vm",
    "restart": "control",
    "run": "vm",
    "schema": "files",
    "show": "show",
    "start": "control",
    "stop": "stopping",
    "upgrade": "vm",
    "wrap": "vm",
}
"""Each command, and the module of :mod:`qrapd.commands` that has it under that name."""


class _LazyGroup(click.Group):
    """Finds a command when it is called for, as click's documentation has it, "Lazily Loading Subcommands"."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (the same)
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"qrapd.commands.{COMMANDS[cmd_name]}"), cmd_name)
        assert isinstance(command, click.Command), cmd_name
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qrapd", message="%(prog)s %(version)s")
def main() -> None:
    """Run QEMU virtual machines networked by passt, and keep that network alive.

    \b
    New here?     qrapd demo
    Your own VM:  write web.toml, then  qrapd check web.toml  and  qrapd run web.toml
    """


def run_command_line() -> int:
    """Parse the arguments, run the command, and put every error in words. Returns the exit status."""
    try:
        status = int(main.main(prog_name="qrapd", standalone_mode=False) or ExitStatus.OK)
        sys.stdout.flush()
        return status
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except QrapdError as error:
        complain(error)
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        return ExitStatus.FAILED
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, OSError):
            return tell_of_host(cause)
        report_bug()
        return ExitStatus.BUG
