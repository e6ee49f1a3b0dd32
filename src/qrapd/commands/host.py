# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about this host: doctor, demo, probe, logs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrapd.commands.options import (
    allow_uid_option,
    base_directory,
    common_options,
    json_option,
    pattern_option,
)
from qrapd.errors import ExitStatus

if TYPE_CHECKING:
    from qrapd.doctor import Finding
    from qrapd.logs import LogFormat
    from qrapd.probe import Candidate

__all__ = ["demo", "doctor", "logs", "probe"]


@click.command()
@json_option
@common_options
def doctor(as_json: bool, runtime_dir: Path | None, **_: object) -> int:
    """Say what this host lacks, and the command that supplies it."""
    from qrapd.doctor import examine, worst

    findings = examine(base_directory(runtime_dir))
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show_findings(findings)
    return ExitStatus.UNAVAILABLE if worst(findings) == "problem" else ExitStatus.OK


@click.command()
@click.option("--stay", is_flag=True, help="Leave the guest running until Ctrl-C, and tell how to reach it.")
@click.option("--port", type=click.IntRange(1024, 65535), help="Host port to forward.  [default: a free one]")
@common_options
def demo(
    stay: bool, port: int | None, runtime_dir: Path | None, log_format: LogFormat, log_level: str
) -> int:
    """Build a tiny guest, run it, fetch a page from it, kill its passt, fetch the page again, and stop it."""
    from qrapd.demo import show

    return show(stay=stay, port=port, base=runtime_dir, log_format=log_format, log_level=log_level)


@click.command()
@pattern_option
@click.option("--all", "ask_all", is_flag=True, help="Ask those, too, that a question may end (--one-off).")
@allow_uid_option
@json_option
@common_options
def probe(pattern: str, ask_all: bool, allow_uid: tuple[int, ...], as_json: bool, **_: object) -> int:
    """Say what each passt socket is: who listens, and whether it answers.

    A passt that would end once its client leaves is only looked at, and so is one that has a client. Ends with 0 if
    at least one could serve a VM, else with 69.
    """
    import anyio

    from qrapd import probe as probing

    found = anyio.run(
        lambda: probing.look(
            probing.default_paths(pattern), allowed_uids=frozenset(allow_uid), ask_all=ask_all
        )
    )
    usable = {probing.State.ANSWERING, probing.State.FREE}
    if as_json:
        click.echo(json.dumps([_candidate_as_json(each) for each in found], indent=2))
    else:
        _show_candidates([each for each in found if each.state is not probing.State.ABSENT], pattern)
    return ExitStatus.OK if any(each.state in usable for each in found) else ExitStatus.UNAVAILABLE


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("options", metavar="[JOURNALCTL_OPTION]...", nargs=-1, type=click.UNPROCESSED)
def logs(name: str, options: tuple[str, ...]) -> None:
    """Show a VM's log from the journal: qrapd's, passt's, QEMU's and the guest's lines. -f follows it."""
    from qrapd.binaries import find_binary

    # What systemd says of the unit, too, which has no field of ours: the system's, and this user's own (journalctl(1)).
    unit = f"qrapd@{name}.service"
    wanted = [f"QRAPD_VM={name}", "+", f"UNIT={unit}", "+", f"USER_UNIT={unit}", f"_UID={os.geteuid()}"]
    command = [find_binary("journalctl"), *options, *wanted]
    os.execv(command[0], command)  # noqa: S606 (no shell, as always)


def _show_findings(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        words = Text(finding.found)
        if finding.remedy:
            words.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(Text(finding.status, colours[finding.status]), Text(finding.subject), words)
    Console().print(table)


def _candidate_as_json(candidate: Candidate) -> dict[str, object]:
    return {
        "path": candidate.path,
        "state": candidate.state.value,
        "latency_ms": None if candidate.latency is None else round(candidate.latency * 1000, 3),
        "pid": candidate.pid,
        "uid": candidate.uid,
        "one_off": candidate.one_off,
        "detail": candidate.detail,
    }


def _show_candidates(found: list[Candidate], pattern: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if not found:
        click.echo(f"no sockets {pattern.replace('{n}', '*')}")
        return
    table = Table("socket", "state", "answered in", "pid", "user", "remark", box=None, pad_edge=False)
    for each in found:
        latency = "" if each.latency is None else f"{each.latency * 1000:.1f} ms"
        numbers = ("" if number is None else str(number) for number in (each.pid, each.uid))
        table.add_row(each.path, each.state.value, latency, *numbers, each.detail)
    console = Console()
    # Whoever searches the lines of a pipe wants them whole.
    console.print(table, width=None if console.is_terminal else 1000)
