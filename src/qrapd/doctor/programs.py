# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that qrapd runs or replaces, and what the installed ones can do."""

from __future__ import annotations

from pathlib import Path

from .. import binaries
from ..errors import Unavailable
from .finding import Finding

__all__ = [
    "examine_busybox",
    "examine_passt",
    "examine_pesto",
    "examine_qemu",
    "examine_qrap",
    "judge_passt",
    "judge_pesto",
    "judge_qemu",
]

# What differs between the versions of passt that are about, in the order of their arrival.
_TELLING_OPTIONS = (
    "fd",
    "map-host-loopback",
    "map-guest-addr",
    "dns-host",
    "vhost-user",
    "hostname",
    "stats",
    "conf-path",
)


def _missing(program: str, error: Unavailable) -> Finding:
    return Finding(program, "problem", error.message, binaries.install_command(program))


def examine_passt() -> tuple[Finding, frozenset[str]]:
    """Find passt, its version and what it can do; also return the options that it has."""
    try:
        path = binaries.find_binary("passt")
    except Unavailable as error:
        return _missing("passt", error), frozenset()
    from qrapd.passt_options import read_help  # brings pydantic, which the other subjects do without

    try:
        options = frozenset(read_help(binaries.passt_help(path)))
        version = binaries.passt_version(path)
    except Unavailable as error:
        return Finding("passt", "problem", error.message), frozenset()
    return judge_passt(path, version, options), options


def judge_passt(path: str, version: str | None, options: frozenset[str]) -> Finding:
    """Tell what this passt can do; without --fd it cannot be given a stream, and is of no use here."""
    words = f"{path}, {f'version {version}' if version else 'version unknown'}"
    has = [f"--{option}" for option in _TELLING_OPTIONS if option in options]
    lacks = [f"--{option}" for option in _TELLING_OPTIONS if option not in options]
    words += f"; has {', '.join(has) or 'none of the options asked for'}"
    words += f"; lacks {', '.join(lacks)}" if lacks else ""
    if "fd" not in options:
        return Finding("passt", "problem", words, binaries.install_command("passt"))
    return Finding("passt", "ok", words)


def examine_pesto(options: frozenset[str]) -> Finding:
    """Find pesto, which changes the forwarded ports of a running passt."""
    try:
        return judge_pesto(binaries.find_binary("pesto"), options)
    except Unavailable:
        return judge_pesto(None, options)


def judge_pesto(path: str | None, options: frozenset[str]) -> Finding:
    """Tell whether ports can be changed while passt runs: that takes both pesto and a passt to listen."""
    without = "the forwarded ports of a running passt cannot be changed"
    listens = "conf-path" in options
    if path is not None:
        return Finding("pesto", "ok", path if listens else f"{path}, but passt has no --conf-path: {without}")
    if listens:
        return Finding("pesto", "warning", f"not installed: {without}", binaries.install_command("pesto"))
    return Finding(
        "pesto", "ok", f"neither pesto nor a passt that listens to it (both from 2026 on): {without}"
    )


def examine_qemu(binary: str) -> Finding:
    """Find the emulator ``binary``, its version and the network backends that it has."""
    subject = Path(binary).name
    try:
        path = binaries.find_binary(binary)
    except Unavailable as error:
        return _missing(subject, error)
    try:
        return judge_qemu(
            subject,
            path,
            binaries.qemu_version(path),
            binaries.qemu_netdevs(path),
            has_sandbox=binaries.qemu_has_sandbox(path),
        )
    except Unavailable as error:
        return Finding(subject, "problem", error.message)


def judge_qemu(
    subject: str, path: str, version: tuple[int, int, int], netdevs: frozenset[str], *, has_sandbox: bool
) -> Finding:
    """Tell which link modes this QEMU can carry; swapping takes its socket and hubport backends."""
    words = f"{path}, version {'.'.join(map(str, version))}"
    needed = [name for name in ("socket", "hubport") if name not in netdevs]
    if needed:
        words += f"; lacks the network backends {' and '.join(needed)}, which mode swap needs"
        return Finding(subject, "problem", words, binaries.install_command(subject))
    modes = ["swap"]
    if "vhost-user" in netdevs:
        # `reconnect` in whole seconds before 9.2: QEMU's documentation of removed features.
        option = "reconnect-ms" if version >= (9, 2, 0) else "reconnect"
        modes.append(f"vhost-user (by {option})")
    if "passt" in netdevs:
        modes.append("native")
    words += f"; link modes {', '.join(modes)}"
    words += "; has a sandbox" if has_sandbox else "; built without seccomp: VMs run without QEMU's sandbox"
    if version < (7, 2, 0):
        return Finding(subject, "warning", f"{words}; qrapd is tested from 7.2 on")
    return Finding(subject, "ok", words)


def examine_busybox() -> Finding:
    """Find a busybox that runs without libraries: the demo's guest is made of it, and nothing else is."""
    shared = None
    for name in ("busybox", "busybox-static", "busybox.static"):
        try:
            path = binaries.find_binary(name)
        except Unavailable:
            continue
        if binaries.is_static(path):
            return Finding("busybox", "ok", f"{path}, static")
        shared = shared or path
    lack = f"{shared} is not static" if shared else "not installed"
    remedy = binaries.install_command("busybox")
    return Finding("busybox", "warning", f"{lack}: `qrapd demo` cannot build its guest", remedy)


def examine_qrap() -> Finding:
    """Find qrap: passt's own program, or the one that comes with qrapd."""
    try:
        path = Path(binaries.find_binary("qrap"))
        with path.open("rb") as file:
            ours = file.read(2) == b"#!"
    except (Unavailable, OSError):
        return Finding("qrap", "ok", "not on PATH; only command lines written for it need it")
    return Finding(
        "qrap", "ok", f"{path}, {'a script, as qrapd installs it' if ours else 'the one of passt'}"
    )
