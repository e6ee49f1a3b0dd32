# SPDX-License-Identifier: GPL-2.0-or-later
"""From a VM's file to the command lines that will run: what only this host can tell is asked and settled here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qrapd import __version__, binaries
from qrapd.config import Link, VmConfiguration, chooses_accelerator
from qrapd.errors import ConfigurationError, Problem, Unavailable
from qrapd.passt_options import check_against_help, command_line, read_help
from qrapd.qemu_arguments import Endpoints
from qrapd.qemu_arguments import command_line as qemu_command_line

__all__ = ["LinkPlan", "Plan", "resolve"]


@dataclass(frozen=True)
class LinkPlan:
    """How one link comes up."""

    index: int
    mac: str
    source: str
    passt: tuple[str, ...]
    """program and options, without ``--foreground --fd N``"""


@dataclass(frozen=True)
class Plan:
    """How one VM comes up on this host."""

    configuration: VmConfiguration
    qemu: str
    kvm: bool
    links: tuple[LinkPlan, ...]

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.configuration.name

    @property
    def directory(self) -> Path:
        """Where QEMU works."""
        return self.configuration.directory

    @property
    def passt_directory(self) -> Path:
        """Where passt works: paths in its options are relative to the file."""
        return self.configuration.path.parent

    def qemu_command_line(self, endpoints: Endpoints) -> list[str]:
        """QEMU's argv with these fds."""
        return qemu_command_line(self.configuration, self.qemu, kvm=self.kvm, endpoints=endpoints)


def resolve(configuration: VmConfiguration) -> Plan:
    """Settle everything that depends on the host; starts nothing but ``passt --help``.

    :raise ConfigurationError: the file asks for what this qrapd or this passt cannot do.
    :raise Unavailable: a program or the working directory is not there.
    """
    problems = [*_unsupported(configuration)]
    problems += _check_directory(configuration.directory)
    missing: dict[str, Unavailable] = {}
    passts: list[str] = []
    for index, link in enumerate(configuration.links):
        try:
            passts.append(_find_binary(link.passt_binary, configuration))
            problems += _lacking_options(index, link, passts[-1])
        except Unavailable as error:
            missing[f"link[{index}].passt_binary"] = error
    try:
        default = f"qemu-system-{binaries.host_architecture()}"
        qemu = _find_binary(configuration.qemu.binary or default, configuration)
    except Unavailable as error:
        missing["qemu.binary"] = error
    if problems:
        problems += [Problem(key, error.message, hint=error.hint) for key, error in missing.items()]
        raise ConfigurationError(str(configuration.path), problems)
    if missing:
        raise _together(missing.values())
    return Plan(
        configuration,
        qemu,
        _wants_kvm(configuration, qemu),
        tuple(
            LinkPlan(index, configuration.mac(index), link.source, (passt, *command_line(link.passt)))
            for index, (link, passt) in enumerate(zip(configuration.links, passts, strict=True))
        ),
    )


def _find_binary(name: str, configuration: VmConfiguration) -> str:
    """A name is looked up on PATH; a path is relative to the file, as all are."""
    return binaries.find_binary(str(configuration.path.parent / name) if "/" in name else name)


def _check_directory(directory: Path) -> Iterator[Problem]:
    if not directory.is_dir():
        yield Problem("qemu.directory", "is not a directory", value=repr(str(directory)))
    elif not os.access(directory, os.X_OK):
        yield Problem(
            "qemu.directory",
            "may not be entered by this user",
            value=repr(str(directory)),
            hint="run as a user who may, or open it: chmod +x",
        )


def _together(errors: Iterable[Unavailable]) -> Unavailable:
    """Several missing things as one error: whoever mends them wants to hear of all."""
    told = {error.message: error.hint for error in errors}
    hints = dict.fromkeys(hint for hint in told.values() if hint)
    return Unavailable("; ".join(told), hint="; ".join(hints) or None)


def _unsupported(configuration: VmConfiguration) -> Iterator[Problem]:
    """What the file may say and this version cannot do yet: refused, never silently left out."""
    for index, link in enumerate(configuration.links):
        for key, value, supported in (("mode", link.mode, "swap"), ("source", link.source, "managed")):
            if value != supported:
                yield Problem(
                    f"link[{index}].{key}",
                    f"is not supported by qrapd {__version__}",
                    value=repr(value),
                    hint=f"use {key} = '{supported}', the default",
                )
    if configuration.restart.policy != "never":
        yield Problem(
            "restart.policy",
            f"is not supported by qrapd {__version__}",
            value=repr(configuration.restart.policy),
            hint="leave it at 'never'; under systemd, Restart= in the unit restarts the VM",
        )


def _lacking_options(index: int, link: Link, binary: str) -> list[Problem]:
    known = read_help(binaries.passt_help(binary))
    return check_against_help(link.passt, known, binary, f"link[{index}].passt")


def _wants_kvm(configuration: VmConfiguration, qemu: str) -> bool:
    if configuration.qemu.accel != "auto" or chooses_accelerator(configuration.qemu.args):
        return False
    works, _reason = binaries.kvm_works(binaries.guest_architecture(qemu))
    return works
