# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about this host: doctor, demo, probe, logs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
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
from qrapd.commands.tables import aligned, show_rows
from qrapd.errors import ExitStatus, QrapdError, Unknown

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
@click.option(
    "--write",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Run nothing: write a VM's file for that guest, to try the other commands with.",
)
@common_options
def demo(
    stay: bool,
    port: int | None,
    file: Path | None,
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
) -> int:
    """Build a tiny guest, run it, fetch a page from it, kill its passt, fetch the page again, and stop it."""
    from qrapd.demo import show, write

    if file is not None:
        write(file, port)
        return ExitStatus.OK
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
@click.argument("words", metavar="NAME [JOURNALCTL_OPTION]...", nargs=-1, type=click.UNPROCESSED)
@common_options
def logs(words: tuple[str, ...], runtime_dir: Path | None, **_: object) -> None:
    """Show a VM's log from the journal: qrapd's, passt's, QEMU's and the guest's lines. -f follows it."""
    from qrapd.binaries import find_binary
    from qrapd.client.places import is_name
    from qrapd.commands.complaints import complain

    name, options = name_among(words)
    if name is None:
        raise click.UsageError("Missing argument 'NAME'.")
    if not is_name(name):
        raise click.BadParameter(
            f"{name!r} is no VM's name: those have a to z, 0 to 9 and -, and 63 at most", param_hint="'NAME'"
        )
    if not _is_known(name, runtime_dir):
        # What the journal has of one that was removed is shown all the same.
        hint = "`qrapd ps` lists those that run"
        complain(Unknown(f"there is no VM {name} here, and no file of one", hint=hint))
    # What systemd says of the unit, too, which has no field of ours: the system's, and this user's own (journalctl(1)).
    unit = f"qrapd@{name}.service"
    wanted = [f"QRAPD_VM={name}", "+", f"UNIT={unit}", "+", f"USER_UNIT={unit}", f"_UID={os.geteuid()}"]
    command = [find_binary("journalctl"), *options, *wanted]
    os.execv(command[0], command)  # noqa: S606 (no shell, as always)


_TAKE_A_VALUE = {
    *"MDScUutpgoF",
    *(
        "machine",
        "directory",
        "file",
        "root",
        "image",
        "namespace",
        "since",
        "until",
        "cursor",
        "after-cursor",
    ),
    *("cursor-file", "unit", "user-unit", "identifier", "priority", "facility", "grep", "output", "field"),
    *("output-fields", "interval", "verify-key", "vacuum-size", "vacuum-files", "vacuum-time"),
}
"""journalctl's options whose value may be the next word (`journalctl --help` of systemd 252)."""

_MAY_TAKE_A_NUMBER = {"n", "lines", "b", "boot"}
"""... if that looks like a number or, for ``-b``, like a boot's id."""


def name_among(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The VM's name, which is the first word that is neither an option nor an option's value; and all other words."""
    option = ""
    for place, word in enumerate(words):
        is_value = option in _TAKE_A_VALUE or (
            option in _MAY_TAKE_A_NUMBER and re.fullmatch(r"[+-]?\d+|[0-9a-f]{32}|all", word)
        )
        if is_value:
            option = ""
        elif word.startswith("--"):
            option = word[2:]
        elif word.startswith("-"):
            # Of letters in one word the first that takes a value takes the rest, or where there is none the next word.
            option = next((each for each in word[1:] if each in _TAKE_A_VALUE | _MAY_TAKE_A_NUMBER), "")
            option = option if word.endswith(option) else ""
        else:
            return word, [*words[:place], *words[place + 1 :]]
    return None, [*words]


def _is_known(name: str, runtime_dir: Path | None) -> bool:
    """Whether there is anything of such a VM: this user's, or the system's."""
    from qrapd import vm_files

    uid = os.geteuid()
    places = [Path("/run/qrapd", name)]
    places += [vm_files.directory(os.environ, each) / f"{name}.toml" for each in {0, uid}]
    with contextlib.suppress(QrapdError):  # a user without a session
        places.append(base_directory(runtime_dir) / name)
    try:
        return any(place.exists() for place in places)
    except OSError:
        return True  # it cannot be told


def _show_findings(findings: list[Finding]) -> None:
    if not sys.stdout.isatty():
        rows = [
            (each.status, each.subject, each.found + (f" → {each.remedy}" if each.remedy else ""))
            for each in findings
        ]
        for line in aligned(rows):
            click.echo(line)
        return
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
    if not found:
        click.echo(f"no sockets {pattern.replace('{n}', '*')}")
        return
    rows = []
    for each in found:
        latency = "-" if each.latency is None else f"{each.latency * 1000:.1f} ms"
        numbers = ("-" if number is None else str(number) for number in (each.pid, each.uid))
        rows.append((each.path, each.state.value, latency, *numbers, each.detail))
    heads = ("socket", "state", "answered in", "pid", "user", "remark")
    show_rows(heads, rows, spare=("answered in", "user", "pid"))
