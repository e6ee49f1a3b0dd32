# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd forward``: forwarded ports of a VM that runs, which hold until it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrapd.commands.options import client_options, json_option, name_argument, places
from qrapd.commands.tables import in_terminal, show_rows
from qrapd.errors import ConfigurationError, Conflict, ExitStatus, QrapdError, UsageError

if TYPE_CHECKING:
    from qrapd.client.http import Client, Status

__all__ = ["forward"]

_link_option = click.option(
    "--link", "index", type=click.IntRange(0), metavar="INDEX", help="Which link.  [default: the only one]"
)
_udp_option = click.option("--udp", is_flag=True, help="Ports of UDP.  [default: of TCP]")
_timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Wait no longer for a new passt; what was begun goes on.  [default: as long as it takes]",
)


@click.group()
def forward() -> None:
    """Ports of the host that lead into the guest: add or remove some, or list them.

    Changes hold until the VM ends, or its file gets other ports and is read again; the file stays as it is. Where passt
    can be told (by pesto(1)) connections stay; else another passt takes the place of the one that runs.
    """


def _change(how: str, help_text: str) -> Callable[..., int]:
    @click.command(how, help=help_text, short_help=f"{how.capitalize()} forwarded ports.")
    @name_argument()
    @click.argument("ports", nargs=-1, required=True, metavar="PORTS...")
    @_udp_option
    @_link_option
    @_timeout_option
    @json_option
    @client_options
    def change(
        name: str,
        ports: tuple[str, ...],
        udp: bool,
        index: int | None,
        timeout: float | None,
        as_json: bool,
        runtime_dir: Path | None,
        socket: Path | None,
        **_: object,
    ) -> int:
        from qrapd.client.waiting import swapped
        from qrapd.commands.asking import Ended, Request, host_of, interruptible, progress, request, run
        from qrapd.commands.control import choose_link

        where = places(runtime_dir, socket)
        _check(ports)
        forwards = [("udp" if udp else "tcp", each) for each in ports]
        answer: dict[str, Any] = {}
        chosen = index or 0

        async def begin(client: Client) -> Status:
            nonlocal chosen
            chosen = choose_link(await client.vm(name), index)
            try:
                answer.update(await client.change_forwards(name, chosen, **{how: forwards}))
            except ConfigurationError as error:
                raise _of_forwards(ports, error) from None
            return await client.vm(name)

        asked = Request(
            "changing forwards",
            begin,
            # By pesto all is done when it is answered.
            lambda history: _done(history[-1]) if answer.get("by") != "swap" else swapped(history, chosen),
        )

        async def job() -> Ended:
            async with host_of(where, name) as client:
                return await request(client, name, asked, timeout=timeout)

        with interruptible(name, asked.doing), progress(f"{name}: {asked.doing}…"):
            ended = run(job)
        return _tell(name, chosen, answer, ended, as_json=as_json)

    return change


def _check(ports: Sequence[str]) -> None:
    """:raise UsageError: these are no ports in passt's words."""
    from qrapd.ports import parse_ports

    for each in ports:
        try:
            parse_ports(each)
        except ValueError as error:
            raise UsageError(f"{each}: {error}") from None
        if each == "none":
            raise UsageError("none: is no port")


def _of_forwards(ports: Sequence[str], error: ConfigurationError) -> QrapdError:
    """What is wrong of other forwards, which their host looks at as at a file's: no file has them."""
    reasons = [
        re.sub(r"\blink\[(\d+)\]\.[\w.]+(\[\d+\])?", r"link \1", each.reason) for each in error.problems
    ]
    hint = next((each.hint for each in error.problems if each.hint), None)
    return Conflict(f"{' '.join(ports)}: {'; '.join(reasons)}", hint=hint)


def _done(_status: Status) -> Any:
    from qrapd.client.waiting import Verdict

    return Verdict(True, "")


def _tell(name: str, link: int, answer: dict[str, Any], ended: Any, *, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"link": link, **answer}, ensure_ascii=False))
    else:
        now = "; ".join(
            f"{protocol} {', '.join(answer[protocol])}" for protocol in ("tcp", "udp") if answer.get(protocol)
        )
        means = {
            "pesto": "passt was told (pesto), nothing was interrupted",
            "nothing": "as before: there was nothing to do",
        }.get(
            str(answer.get("by")),
            "by a swap: another passt has taken its place, connections have to be made anew",
        )
        click.echo(f"{name}: link {link} forwards {now or 'nothing'} ({means})")
    if not ended.verdict.ok:
        click.echo(f"{name}: {ended.verdict.words}", err=True)
        return ExitStatus.FAILED
    return ExitStatus.OK


forward.add_command(
    _change(  # type: ignore[arg-type]
        "add",
        """Forward more ports of the host to the guest.

        PORTS are in passt's words: 8080:80, 127.0.0.1/2222:22, 5000-5010. What is forwarded already stays.
        """,
    )
)
forward.add_command(
    _change(  # type: ignore[arg-type]
        "remove",
        """Forward ports no longer, as `qrapd forward list` shows them.""",
    )
)


@forward.command("list")
@name_argument()
@_link_option
@json_option
@client_options
def list_forwards(
    name: str, index: int | None, as_json: bool, runtime_dir: Path | None, socket: Path | None, **_: object
) -> int:
    """List a VM's forwarded ports."""
    from qrapd.commands.asking import host_of, run

    where = places(runtime_dir, socket)

    async def job() -> list[dict[str, Any]]:
        async with host_of(where, name) as client:
            vm = await client.vm(name)
            if index is not None:
                return [{"link": index, **await client.forwards(name, index)}]
            return await all_forwards(client, vm)

    found = run(job)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return ExitStatus.OK
    rows = [
        (str(each["link"]), protocol, ports)
        for each in found
        for protocol in ("tcp", "udp")
        for ports in each.get(protocol) or ()
    ]
    show_rows(("link", "protocol", "ports"), rows)
    for each in found:
        if "error" in each and in_terminal():
            click.echo(f"link {each['link']}: {each['error']}", err=True)
    return ExitStatus.OK


async def all_forwards(client: Client, vm: Status) -> list[dict[str, Any]]:
    """Those of every link; where the passt is somebody else's, why they are not known."""
    found = []
    for link in vm.get("links") or ():
        try:
            forwards = await client.forwards(vm["name"], link["index"])
            found.append({"link": link["index"], **forwards})
        except Conflict as error:
            found.append({"link": link["index"], "tcp": [], "udp": [], "error": error.message})
    return found
