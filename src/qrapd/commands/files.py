# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about VM files: check, plan, schema."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.complaints import complain, warn
from qrapd.commands.options import common_options, file_argument, json_option, read_plan
from qrapd.errors import ExitStatus, Problem, QrapdError

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
            for doubt in _doubts(plan):
                warn(file, doubt)
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
    return f"{plan.name}: {Path(plan.qemu).name}, {_accelerator(plan)}, {network}"


def _accelerator(plan: Plan) -> str:
    from qrapd.config import chooses_accelerator

    assert plan.file is not None
    accel = plan.file.qemu.accel
    if accel == "args" or chooses_accelerator(plan.file.qemu.args):
        return "the accelerator of its args"
    return "KVM" if plan.kvm or accel == "kvm" else "no KVM"


def _doubts(plan: Plan) -> Iterator[Problem]:
    """What is likely a mistake, but may be none, or none any more when the VM starts."""
    from qrapd import binaries, vm_files
    from qrapd.passt_options import toml_text
    from qrapd.qemu_arguments import disk_files

    assert plan.file is not None
    assert plan.path is not None
    if plan.path.name != f"{plan.name}.toml":
        yield Problem(
            "name",
            "is not the file's own, by which the agent and the unit qrapd@ know a VM",
            value=toml_text(plan.name),
            hint=f"for them, name the file {plan.name}.toml",
        )
    if plan.file.qemu.accel == "kvm":
        works, reason = binaries.kvm_works(binaries.guest_architecture(plan.qemu))
        if not works:
            yield Problem(
                "qemu.accel",
                f"KVM cannot work here: {reason}",
                hint="accel = 'auto' takes KVM only where it works",
            )
    for index, path in disk_files(plan.file.qemu.args):
        if vm_files.is_missing(plan.directory / path):
            yield Problem(
                f"qemu.args[{index}]",
                "names a disk's file that is not there",
                value=toml_text(str(plan.directory / path)),
                hint=f"make it, or correct the path: relative ones start at {plan.directory}",
            )


def _wrapped(argv: list[str]) -> str:
    """A command line to read and to paste: an option and its value on each line."""
    lines: list[str] = []
    for argument in argv:
        if argument.startswith("-") or len(lines) <= 1:
            lines.append(shlex.quote(argument))
        else:
            lines[-1] += " " + shlex.quote(argument)
    return " \\\n  ".join(lines)
