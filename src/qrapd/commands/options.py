# SPDX-License-Identifier: GPL-2.0-or-later
"""Options and arguments that several commands take, and what they stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrapd.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qrapd.client.places import Places
    from qrapd.plan import Plan

__all__ = [
    "allow_uid_option",
    "base_directory",
    "client_options",
    "common_options",
    "file_argument",
    "json_option",
    "name_argument",
    "pattern_option",
    "places",
    "read_plan",
    "wait_options",
]

Command = Callable[..., Any]


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in options:
            command = option(command)
        return command

    return decorate


common_options = _all(
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="The least important events to tell.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["auto", "journal", "json", "console"]),
        default="auto",
        help="How events are told on stderr.  [default: what stderr is connected to]",
    ),
    click.option(
        "--runtime-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where running VMs keep their sockets.  "
        "[default: $RUNTIME_DIRECTORY, /run/qrapd, or $XDG_RUNTIME_DIR/qrapd]",
    ),
)
"""The options that every command takes, whether it has a use for them or not."""

client_options = _all(
    common_options,
    click.option(
        "--socket",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="QRAPD_SOCKET",
        help="Ask on this socket alone, such as that of another user's agent.  "
        "[default: $QRAPD_SOCKET, else those in the runtime directory]",
    ),
)
"""Those of commands that speak with an agent, or with a VM's own supervisor."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

wait_options = _all(
    click.option(
        "--timeout",
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="Wait no longer; what was begun goes on.  [default: as long as it takes]",
    ),
    click.option("--no-wait", is_flag=True, help="Do not wait for the end of what is begun."),
)

allow_uid_option = click.option(
    "--allow-uid",
    type=click.IntRange(0, 2**32 - 2),
    multiple=True,
    metavar="UID",
    help="Trust this user's sockets, too, beside those of oneself, root and passt. May be repeated.",
)


def _check_pattern(_context: click.Context, _option: click.Parameter, pattern: str) -> str:
    if not pattern:
        raise click.BadParameter("is empty; write a path, with {n} for the sockets' numbers")
    return pattern


pattern_option = click.option(
    "--pattern",
    callback=_check_pattern,
    default="/tmp/passt_{n}.socket",  # noqa: S108 (passt's own names)
    show_default=True,
    help="The sockets' paths, with {n} for the numbers 1 to 99.",
)


# --- arguments, and what a shell completes -----------------------------------------------------------


def _known_names(context: click.Context) -> Iterable[str]:
    """VMs that run here or have a file, for a shell that completes one: nobody is asked, nothing may fail."""
    from qrapd import vm_files
    from qrapd.client.places import Places

    names = {path.stem for path in vm_files.directory(os.environ, os.geteuid()).glob("*.toml")}
    return sorted(names.union(Places(base_directory(context.params.get("runtime_dir"))).names()))


def _complete_name(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    try:
        return [CompletionItem(name) for name in _known_names(context) if name.startswith(begun)]
    except Exception:
        return []  # a traceback in the middle of a command line helps nobody


def _complete_file(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [*_complete_name(context, parameter, begun), CompletionItem(begun, type="file")]


def _check_name(_context: click.Context, _argument: click.Parameter, name: str | None) -> str | None:
    from qrapd.client.places import is_name

    if name is not None and not is_name(name):
        raise click.BadParameter(f"{name!r} is no VM's name: those have a to z, 0 to 9 and -, and 63 at most")
    return name


def name_argument(*, required: bool = True) -> Callable[[Command], Command]:
    """A VM's name, as `qrapd ps` shows it."""
    metavar = "NAME" if required else "[NAME]"
    return click.argument(
        "name", required=required, metavar=metavar, callback=_check_name, shell_complete=_complete_name
    )


def file_argument(*, required: bool = True) -> Callable[[Command], Command]:
    """A VM's file, or the name of one in the directory of VM files."""
    metavar = "FILE|NAME" if required else "[FILE|NAME]"
    return click.argument("file", required=required, metavar=metavar, shell_complete=_complete_file)


def read_plan(file: str) -> Plan:
    """What a VM's file comes to on this host.

    :raise ConfigurationError: it is wrong, or there is none.
    """
    from qrapd import plan, vm_files

    vms = vm_files.directory(os.environ, os.geteuid())
    return plan.resolve(vm_files.read(vm_files.find(file, vms)))


def base_directory(runtime_dir: Path | None) -> Path:
    """The runtime directory that is meant."""
    from qrapd.runtime_directory import default_base

    return runtime_dir or default_base(os.environ, os.geteuid())


def places(runtime_dir: Path | None, socket: Path | None) -> Places:
    """Where to look for VMs.

    :raise UsageError: the path is too long for a socket's.
    """
    from qrapd.client.places import Places

    # unix(7): sizeof(sun_path) less its NUL. Said here, since it would look like a socket that is not there.
    if socket is not None and len(os.fsencode(socket)) > 107:
        raise UsageError(f"the path {socket} has more than the 107 bytes that a socket's path may have")
    # With a socket named there is no need of a directory, which not every user has.
    return Places(socket.parent if socket and not runtime_dir else base_directory(runtime_dir), socket)
