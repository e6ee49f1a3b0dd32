# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwarded ports that change while a VM runs: what its file would say then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qrapd.config import VmFile
from qrapd.errors import ConfigurationError, Conflict, Problem, Unknown
from qrapd.ports import parse_ports

__all__ = ["Forward", "change", "current"]

Forward = tuple[str, str]
"""``tcp`` or ``udp``, and what is forwarded in passt's words: ``127.0.0.1/2222:22``."""


def current(file: VmFile, link: int) -> dict[str, tuple[str, ...]]:
    """What a link forwards by this file, in the form that every passt takes: ``tcp`` and ``udp``.

    :raise Unknown: there is no such link.
    :raise Conflict: its passt is somebody else's.
    """
    if not 0 <= link < len(file.link):
        raise Unknown(f"there is no link {link}", hint=f"the VM has {len(file.link)}, counted from 0")
    if file.link[link].source != "managed":
        raise Conflict(
            f"the passt of link {link} is not qrapd's own", hint="change its forwards where it is started"
        )
    options = file.link[link].passt
    return {
        protocol: tuple(str(parse_ports(text)) for text in specs if text != "none")
        for protocol, specs in (("tcp", options.tcp_ports), ("udp", options.udp_ports))
    }


def change(file: VmFile, link: int, add: Iterable[Forward], remove: Iterable[Forward]) -> dict[str, Any]:
    """The data of a file like this one, with other forwards; to be checked as a file is.

    What is there already is not added again.

    :raise Unknown: there is no such link, or no such forward to remove.
    :raise Conflict: its passt is somebody else's.
    :raise ConfigurationError: what is not right of the forwards themselves.
    """
    ports = {protocol: list(specs) for protocol, specs in current(file, link).items()}
    for protocol, text in remove:
        spec = _read(protocol, text)
        if spec not in ports[protocol]:
            there = ", ".join(ports[protocol]) or "nothing"
            raise Unknown(f"link {link} does not forward {protocol} {spec}", hint=f"it forwards {there}")
        ports[protocol].remove(spec)
    for protocol, text in add:
        if (spec := _read(protocol, text)) not in ports[protocol]:
            ports[protocol].append(spec)
    data = file.model_dump(mode="json", exclude_unset=True)
    passt = data["link"][link].setdefault("passt", {})
    passt.update({f"{protocol}_ports": specs for protocol, specs in ports.items()})
    return data


def _read(protocol: str, text: str) -> str:
    problem = f"is {protocol!r}; write tcp or udp" if protocol not in ("tcp", "udp") else None
    try:
        spec = str(parse_ports(text))
    except ValueError as error:
        problem = str(error)
    else:
        if problem is None and spec != "none":
            return spec
    raise ConfigurationError(
        "forward", [Problem(f"{protocol}_ports", problem or "is none", value=repr(text))]
    )
