# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about VM files: check, plan, schema."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.complaints import complain
from qrapd.commands.options import common_options, file_argument, json_option, read_plan
from qrapd.errors import ExitStatus, QrapdError

if TYPE_CHECKING:
    from qrapd.plan import Plan

__all__ = ["check", "plan", "schema"]


@click.command()
@click.argument("files", metavar="FILE|NAME...", nargs=-1, required=True)
@common_options
def check(files: tuple[str, ...], **_: object) -> int:
    """Check VM files and print every error in them; start nothing."""
    worst: int = ExitStatus.OK
    for file in files:
        try:
            plan = read_plan(file)
        except QrapdError as error:
            complain(error)
            worst = worst or error.exit_status
        else:
            click.echo(f"{file}: fine ({_summary(plan)})")
    return worst


@click.command()
@file_argument()
@json_option
@common_options
def plan(file: str, as_json: bool, **_: object) -> None:
    """Print the passt and QEMU command lines that `run` would use.

    Words in capitals, like LINK0_FD, stand for file descriptors that qrapd makes and hands over; LINK0_PESTO_SOCKET for
    a path in the runtime directory.
    """
    from qrapd.passt import command_line
    from qrapd.qemu_arguments import Endpoints

    made = read_plan(file)
    passts = [
        command_line(
            link.passt, f"LINK{link.index}_PASST_FD", f"LINK{link.index}_PESTO_SOCKET" if link.pesto else None
        )
        if link.passt and link.mode != "native"
        else None
        for link in made.links
    ]
    qemu = made.command_line(Endpoints.placeholders(len(made.links)))
    if as_json:
        links = [
            {"index": link.index, "mode": link.mode, "mac": link.mac, "source": link.source, "passt": argv}
            for link, argv in zip(made.links, passts, strict=True)
        ]
        click.echo(
            json.dumps({"name": made.name, "directory": str(made.directory), "links": links, "qemu": qemu})
        )
        return
    for link, argv in zip(made.links, passts, strict=True):
        if link.mode == "native":
            click.echo(f"# link {link.index}: QEMU starts its passt itself\n")
        elif argv is None:
            click.echo(f"# link {link.index}: a passt that is there already ({link.source})\n")
        else:
            click.echo(f"# link {link.index}, in {made.passt_directory}\n{_wrapped(argv)}\n")
    click.echo(f"# QEMU, in {made.directory}\n{_wrapped(qemu)}")


@click.command()
@common_options
def schema(**_: object) -> None:
    """Print the JSON Schema of a VM's file, for editors."""
    from qrapd.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _summary(plan: Plan) -> str:
    links = len(plan.links)
    network = "no network" if links == 0 else "1 link" if links == 1 else f"{links} links"
    return f"{plan.name}: {Path(plan.qemu).name}, {'KVM' if plan.kvm else 'no KVM'}, {network}"


def _wrapped(argv: list[str]) -> str:
    """A command line to read and to paste: an option and its value on each line."""
    lines: list[str] = []
    for argument in argv:
        if argument.startswith("-") or len(lines) <= 1:
            lines.append(shlex.quote(argument))
        else:
            lines[-1] += " " + shlex.quote(argument)
    return " \\\n  ".join(lines)
