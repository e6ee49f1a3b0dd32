# SPDX-License-Identifier: GPL-2.0-or-later
"""From a VM's file to the command lines that will run: what only this host can tell is asked and settled here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from qrapd import binaries
from qrapd.config import Link, Restart, VmConfiguration, VmFile, chooses_accelerator
from qrapd.errors import ConfigurationError, Problem, Unavailable
from qrapd.forwards import Changed, Ports, family, put
from qrapd.hub_mtu import check_mtu, limit_mtu
from qrapd.link_modes import Installed, check_mode
from qrapd.passt_options import check_against_help, read_help
from qrapd.passt_options import command_line as passt_command_line
from qrapd.qemu_arguments import Endpoints, command_line, nic_id, sandbox
from qrapd.runtime_directory import SUN_PATH_MAX
from qrapd.vital_signs import ListenAddress, listen_addresses

__all__ = ["LinkPlan", "Plan", "forwarding", "resolve"]


@dataclass(frozen=True)
class LinkPlan:
    """How one link comes up."""

    index: int
    source: str
    """``managed``, ``probe``, or the path of a passt's socket"""
    mac: str
    """the guest's, in whose name a managed passt is asked for a sign of life; \"\" where it is not known"""
    hub: int
    """the id of the hub behind which the NIC sits"""
    nic: str | None
    """the id of the NIC's device in QEMU, where it is known"""
    passt: tuple[str, ...] = ()
    """program and options of a managed passt, without ``--foreground --fd N``"""
    allowed_uids: frozenset[int] = frozenset()
    """users whose listeners are trusted beside our own, root's and passt's"""
    pattern: str | None = None
    """for ``probe``: the sockets' paths, with ``{n}`` for their numbers; None: passt's own names"""
    stall_timeout: float = 5.0
    """seconds that passt may leave bytes unread; 0: for ever"""
    listen_addresses: tuple[ListenAddress, ...] = ()
    """where a managed passt listens"""
    guest_addresses: tuple[str, ...] = ()
    """of a guest that does not use its lease"""
    mode: Literal["swap", "vhost-user", "native"] = "swap"
    pesto: str | None = None
    """the program by which a managed passt is told of other forwards, where passt listens to it"""
    changed: Changed | None = None
    """forwards of ``passt`` that are not the file's, but were asked for at run time"""


@dataclass(frozen=True)
class Plan:
    """How one VM comes up on this host."""

    name: str
    qemu: str
    """the program"""
    command_line: Callable[[Endpoints], list[str]]
    """QEMU's argv with these fds"""
    directory: Path
    """where QEMU works"""
    passt_directory: Path
    """where passt works: paths in its options are relative to the VM's file"""
    links: tuple[LinkPlan, ...]
    powerdown_timeout: float
    quit_timeout: float
    """seconds, as in the VM's file"""
    restart: Restart = field(default_factory=Restart)
    """whether a VM that has ended is started again; its limits hold for a lost passt, too"""
    file: VmFile | None = None
    """what it was made from"""
    path: Path | None = None
    """where that is"""
    console: bool = True
    """whether the guest's first serial port is read"""
    kvm: bool = False
    inherited_fds: tuple[int, ...] = ()
    """what QEMU gets beside what it needs"""
    advice: str = "see the line that was run with `qrapd plan`"
    """what to do when QEMU fails for no reason that is known"""

    @property
    def can_start(self) -> bool:
        """False: it is enough to take over what runs, and no more."""
        return bool(self.qemu)


def unreadable(path: Path) -> Plan:
    """For a VM whose file is wrong: enough to take over by its record what runs of it, and no more."""
    configuration = VmConfiguration(path, path.stem, VmFile())
    return Plan(
        name=path.stem,
        qemu="",
        command_line=partial(command_line, configuration, "", kvm=False),
        directory=path.parent,
        passt_directory=path.parent,
        links=(),
        powerdown_timeout=configuration.qemu.powerdown_timeout,
        quit_timeout=configuration.qemu.quit_timeout,
        path=path,
    )


def resolve(configuration: VmConfiguration) -> Plan:
    """Settle everything that depends on the host; starts nothing but programs that tell what they can do.

    :raise ConfigurationError: the file asks for what this qrapd or this passt cannot do.
    :raise Unavailable: a program or the working directory is not there.
    """
    problems = [*_check_sockets(configuration)]
    problems += _check_directory(configuration.directory)
    missing: dict[str, Unavailable] = {}
    passts: list[str | None] = []
    for index, link in enumerate(configuration.links):
        passts.append(None)
        if link.source != "managed":
            continue
        try:
            passt = _find_binary(link.passt_binary, configuration)
            problems += _lacking_options(index, link, passt)
            passts[index] = passt
        except Unavailable as error:
            missing[f"link[{index}].passt_binary"] = error
    try:
        default = f"qemu-system-{binaries.host_architecture()}"
        qemu = _find_binary(configuration.qemu.binary or default, configuration)
        problems += _impossible_modes(configuration, qemu, passts)
    except Unavailable as error:
        missing["qemu.binary"] = error
    if problems:
        problems += [Problem(key, error.message, hint=error.hint) for key, error in missing.items()]
        raise ConfigurationError(str(configuration.path), problems)
    if missing:
        raise _together(missing.values())
    kvm = _wants_kvm(configuration, qemu)
    links = tuple(_plan_link(index, configuration, passt) for index, passt in enumerate(passts))
    return Plan(
        name=configuration.name,
        qemu=qemu,
        command_line=partial(
            command_line,
            configuration,
            qemu,
            kvm=kvm,
            passts=_native_passts(links),
            # Asked only where it matters: that may take a process.
            seccomp=bool(sandbox(configuration)) and binaries.qemu_has_sandbox(qemu),
        ),
        directory=configuration.directory,
        passt_directory=configuration.path.parent,
        links=links,
        powerdown_timeout=configuration.qemu.powerdown_timeout,
        quit_timeout=configuration.qemu.quit_timeout,
        console=configuration.qemu.console != "none",
        kvm=kvm,
        file=configuration.file,
        path=configuration.path,
        restart=configuration.restart,
    )


def _plan_link(index: int, configuration: VmConfiguration, passt: str | None) -> LinkPlan:
    link = configuration.links[index]
    source = link.source
    if "/" in source:
        source = str(configuration.path.parent / source)
    options = limit_mtu(link.passt) if link.mode == "swap" else link.passt
    own_options = ["--vhost-user"] if link.mode == "vhost-user" else []
    return LinkPlan(
        index=index,
        mode=link.mode,
        source=source,
        mac=configuration.mac(index),
        hub=index,
        nic=nic_id(index),
        passt=() if passt is None else (passt, *passt_command_line(options), *own_options),
        allowed_uids=frozenset(link.allow_uids),
        stall_timeout=link.stall_timeout,
        listen_addresses=listen_addresses(link.passt.model_dump()),
        guest_addresses=tuple(link.guest_addresses),
        pesto=_find_pesto(link, passt),
    )


def _find_pesto(link: Link, passt: str | None) -> str | None:
    """Where pesto(1) is, if this passt listens to it: beside passt, as it comes with it, or on PATH."""
    if passt is None or link.mode != "swap":
        return None
    if "conf-path" not in read_help(binaries.passt_help(passt)):
        return None
    for name in (str(Path(passt).with_name("pesto")), "pesto"):
        with suppress(Unavailable):
            return binaries.find_binary(name)
    return None


def forwarding(link: LinkPlan, ports: Ports, changed: Changed | None) -> LinkPlan:
    """The plan of a link with other forwards."""
    only = family(link.passt)
    options = {"tcp_ports": ports["tcp"], "ipv4_only": only == 4, "ipv6_only": only == 6}
    passt, addresses = put(link.passt, ports), listen_addresses(options)
    return replace(link, passt=passt, listen_addresses=addresses, changed=changed)


def _find_binary(name: str, configuration: VmConfiguration) -> str:
    """A name is looked up on PATH; a path is relative to the file, as all are."""
    return binaries.find_binary(str(configuration.path.parent / name) if "/" in name else name)


def _check_sockets(configuration: VmConfiguration) -> Iterator[Problem]:
    for index, link in enumerate(configuration.links):
        path = configuration.path.parent / link.source
        length = len(os.fsencode(path))
        if "/" in link.source and length > SUN_PATH_MAX:
            yield Problem(
                f"link[{index}].source",
                f"is a path of {length} bytes, and a socket's path may have {SUN_PATH_MAX}",
                value=repr(str(path)),
                hint="let passt listen in a place with a shorter name, or link that place from one",
            )


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


def _impossible_modes(
    configuration: VmConfiguration, qemu: str, passts: Sequence[str | None]
) -> Iterator[Problem]:
    """What the file's modes need and is not there.

    :param passts: the programs, where there are any.
    :raise Unavailable: a program is not what its name says.
    """
    for index, (link, passt) in enumerate(zip(configuration.links, passts, strict=True)):
        if link.mode == "swap":
            yield from check_mtu(index, link)
            continue
        if passt is None and link.source == "managed":
            continue  # which is told already
        installed = Installed(
            qemu=qemu,
            qemu_version=binaries.qemu_version(qemu),
            netdevs=binaries.qemu_netdevs(qemu),
            passt=passt,
            passt_version=None if passt is None else binaries.passt_version(passt),
            passt_options={} if passt is None else read_help(binaries.passt_help(passt)),
        )
        yield from check_mode(index, link, installed, configuration.qemu.args)


def _native_passts(links: Sequence[LinkPlan]) -> dict[int, tuple[str, ...]]:
    """Program and options of the passts that QEMU is to run, by their links' indices."""
    return {link.index: link.passt for link in links if link.mode == "native"}


def _lacking_options(index: int, link: Link, binary: str) -> list[Problem]:
    known = read_help(binaries.passt_help(binary))
    return check_against_help(link.passt, known, binary, f"link[{index}].passt")


def _wants_kvm(configuration: VmConfiguration, qemu: str) -> bool:
    if configuration.qemu.accel != "auto" or chooses_accelerator(configuration.qemu.args):
        return False
    works, _reason = binaries.kvm_works(binaries.guest_architecture(qemu))
    return works
