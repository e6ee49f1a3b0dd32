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

COMMANDS: Mapping[str, tuple[str, str]] = {
    "agent": ("agent", "Run many VMs in one process, and serve their API."),
    "check": ("files", "Say what is wrong in VM files; start nothing."),
    "completion": ("completion", "Print the completions for a shell."),
    "console": ("console", "Sit down at a guest's serial console."),
    "demo": ("host", "Show it all with a tiny guest; or write a VM's file for it."),
    "doctor": ("host", "Say what this host lacks, and how to get it."),
    "events": ("events", "Show what has happened to VMs, or follow what happens."),
    "forward": ("forward", "Forward other ports to a guest that runs."),
    "kill": ("control", "End a VM's QEMU at once, like a power failure."),
    "link": ("control", "Replace the passt of a link."),
    "logs": ("host", "Show a VM's log from the journal."),
    "plan": ("files", "Print the command lines of passt and QEMU."),
    "probe": ("host", "Say what each passt socket is, and whether it answers."),
    "ps": ("listing", "List the VMs that run here."),
    "reload": ("vm", "Apply what has changed in a running VM's file."),
    "restart": ("control", "Power a VM down, and start it by its file again."),
    "run": ("vm", "Run one VM in the foreground until it ends."),
    "schema": ("files", "Print the JSON Schema of a VM's file, for editors."),
    "show": ("show", "Show all that is known of a VM."),
    "start": ("control", "Have the agent start a VM."),
    "stop": ("stopping", "Power a VM down, and wait for its end."),
    "upgrade": ("vm", "Replace a running VM's supervisor by the installed one."),
    "wrap": ("vm", "Run a command line of qrap's, but supervised."),
}
"""Each command: the module of :mod:`qrapd.commands` that has it under that name, and its line in the list of all."""


class _LazyGroup(click.Group):
    """Finds a command when it is called for, as click's documentation has it, "Lazily Loading Subcommands"."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:  # which people try before they know of --help
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (the same)
        if cmd_name not in COMMANDS:
            return None
        module, in_short = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"qrapd.commands.{module}"), cmd_name)
        assert isinstance(command, click.Command), cmd_name
        command.short_help = in_short  # click would cut the first sentence of the long one
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib  # only where something is wrong: it costs start-up time

            near = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qrapd", message="%(prog)s %(version)s")
def main() -> None:
    """Run QEMU virtual machines networked by passt, and keep that network alive.

    \b
    New here?     qrapd demo
    Your own VM:  qrapd check web.toml, and then  qrapd run web.toml
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
