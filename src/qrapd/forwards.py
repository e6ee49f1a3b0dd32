# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwarded ports that change while a VM runs: what a passt is told then, and what its file would say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrapd.config import VmFile
from qrapd.errors import ConfigurationError, Conflict, Problem, Unknown
from qrapd.ports import parse_ports

__all__ = ["Changed", "Forward", "Ports", "as_data", "change", "current", "family", "given", "put", "without"]

Forward = tuple[str, str]
"""``tcp`` or ``udp``, and what is forwarded in passt's words: ``127.0.0.1/2222:22``."""

Ports = Mapping[str, tuple[str, ...]]
"""``tcp`` and ``udp``: what is forwarded, in the form that every passt takes."""

_PROTOCOLS = ("tcp", "udp")


@dataclass(frozen=True)
class Changed:
    """What a link forwards since somebody said so at run time. It holds until its file says something else."""

    now: tuple[Forward, ...]
    file: tuple[Forward, ...]
    """what the file said then"""

    @classmethod
    def between(cls, file: Ports, now: Ports) -> Changed | None:
        """None: nothing is changed any more."""
        return None if _as_sets(file) == _as_sets(now) else cls(_pairs(now), _pairs(file))

    @property
    def ports(self) -> Ports:
        """What is forwarded."""
        return {each: tuple(spec for protocol, spec in self.now if protocol == each) for each in _PROTOCOLS}

    def holds(self, file: VmFile | None, link: int) -> bool:
        """Whether the file still says what it said then."""
        try:
            return file is not None and _pairs(current(file, link)) == self.file
        except (Conflict, Unknown):
            return False


def current(file: VmFile, link: int) -> Ports:
    """What a link forwards by this file.

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


def change(link: int, ports: Ports, add: Iterable[Forward], remove: Iterable[Forward]) -> Ports:
    """Other forwards of a link than these; what is there already is not added again.

    :raise Unknown: there is no such forward to remove.
    :raise ConfigurationError: what is not right of the forwards themselves.
    """
    wanted = {protocol: [*ports[protocol]] for protocol in _PROTOCOLS}
    for protocol, text in remove:
        spec = _read(protocol, text)
        if spec not in wanted[protocol]:
            there = ", ".join(wanted[protocol]) or "nothing"
            raise Unknown(f"link {link} does not forward {protocol} {spec}", hint=f"it forwards {there}")
        wanted[protocol].remove(spec)
    for protocol, text in add:
        if (spec := _read(protocol, text)) not in wanted[protocol]:
            wanted[protocol].append(spec)
    return {protocol: tuple(specs) for protocol, specs in wanted.items()}


def as_data(file: VmFile, changed: Mapping[int, Ports]) -> dict[str, Any]:
    """The data of a file like this one, with other forwards: to be checked as a file is, clashes and all."""
    data = file.model_dump(mode="json", exclude_unset=True)
    for link, ports in changed.items():
        passt = data["link"][link].setdefault("passt", {})
        passt.update({f"{protocol}_ports": [*ports[protocol]] for protocol in _PROTOCOLS})
    return data


def _read(protocol: str, text: str) -> str:
    problem = f"is {protocol!r}; write tcp or udp" if protocol not in _PROTOCOLS else None
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


# --- on a command line --------------------------------------------------------------------------------


def given(argv: Sequence[str]) -> Ports:
    """What a passt with this command line forwards."""
    pairs = [(option, spec) for option, spec in _split(argv) if spec is not None and spec != "none"]
    return {each: tuple(spec for option, spec in pairs if option == f"--{each}-ports") for each in _PROTOCOLS}


def without(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line without its forwards."""
    return tuple(argument for argument, spec in _split(argv) if spec is None)


def put(argv: Sequence[str], ports: Ports) -> tuple[str, ...]:
    """The command line with these forwards instead of its own."""
    options = [word for each in _PROTOCOLS for spec in ports[each] for word in (f"--{each}-ports", spec)]
    return (*without(argv), *options)


def family(argv: Sequence[str]) -> int | None:
    """4 or 6 where a passt with this command line has that alone."""
    return 4 if "--ipv4-only" in argv else 6 if "--ipv6-only" in argv else None


def _split(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each argument, and where it is an option for ports, the value that comes next: as passt_options writes them."""
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--tcp-ports", "--udp-ports"):
            yield argument, next(arguments, "none")
        else:
            yield argument, None


def _pairs(ports: Ports) -> tuple[Forward, ...]:
    return tuple((protocol, spec) for protocol in _PROTOCOLS for spec in ports[protocol])


def _as_sets(ports: Ports) -> dict[str, frozenset[str]]:
    return {protocol: frozenset(ports[protocol]) for protocol in _PROTOCOLS}
