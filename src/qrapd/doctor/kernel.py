# SPDX-License-Identifier: GPL-2.0-or-later
"""What passt needs the kernel to allow: user namespaces, and ports below 1024."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .. import binaries
from .files import read_setting, read_text
from .finding import Finding
from .trial import Trial, has_started, try_passt

__all__ = [
    "examine_low_ports",
    "examine_user_namespaces",
    "free_low_port",
    "judge_low_ports",
    "judge_user_namespaces",
    "listening_ports",
    "taken_ports",
    "try_user_namespace",
]

# user(7) "nobody", which passt changes to when it is started as root: passt(1), --runas.
_NOBODY = 65534

_NAMESPACE_SETTINGS = (
    "user.max_user_namespaces",
    "kernel.unprivileged_userns_clone",  # Debian's and Arch's kernels
    "kernel.apparmor_restrict_unprivileged_userns",  # Ubuntu, from 23.10 on
)

# Root becomes nobody first, as passt does: root is let through where nobody is not.
_UNSHARE = f"""
import ctypes, os, sys
if os.geteuid() == 0:
    try:
        os.setgroups([])
        os.setgid({_NOBODY})
        os.setuid({_NOBODY})
    except OSError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(ctypes.get_errno() if libc.unshare(0x10000000) else 0)
"""  # CLONE_NEWUSER of linux/sched.h


def try_user_namespace() -> int | None:
    """Make a user namespace in a process of its own; return 0 or unshare(2)'s error number.

    None if it could not be tried.
    """
    # Not os.unshare(): Python has it from 3.12 on. Not os.fork(): there may be threads. Not sys.executable:
    # the interpreter can lie where its path is closed to this user, as below another's home.
    try:
        return subprocess.run(["/proc/self/exe", "-I", "-S", "-c", _UNSHARE], check=False).returncode
    except OSError:
        return None


def examine_user_namespaces(trial: Trial | None) -> Finding:
    """Try to make a user namespace, which passt's sandbox is made of."""
    settings = {name: value for name in _NAMESPACE_SETTINGS if (value := read_setting(name)) is not None}
    return judge_user_namespaces(try_user_namespace(), settings, passt_started=has_started(trial))


def judge_user_namespaces(
    failure: int | None, settings: Mapping[str, int], *, passt_started: bool
) -> Finding:
    """Tell whether passt may make its sandbox; ``failure`` is what try_user_namespace() returned."""
    restricted = settings.get("kernel.apparmor_restrict_unprivileged_userns") == 1
    if passt_started and (failure or restricted):
        # Ubuntu's profile for passt gives it what other programs are denied.
        return Finding("user namespaces", "ok", "denied to programs in general, but passt may make its own")
    if failure is None:
        return Finding(
            "user namespaces", "ok" if passt_started else "warning", "not tried: no Python to try it"
        )
    if not failure and not restricted:
        return Finding("user namespaces", "ok", "one was made")
    reason = f"unshare(CLONE_NEWUSER): {os.strerror(failure)}" if failure else "AppArmor restricts them"
    words = f"passt cannot make its sandbox: {reason}"
    wanted = {
        "user.max_user_namespaces": (settings.get("user.max_user_namespaces") == 0, 15000),
        "kernel.unprivileged_userns_clone": (settings.get("kernel.unprivileged_userns_clone") == 0, 1),
        "kernel.apparmor_restrict_unprivileged_userns": (restricted, 0),
    }
    commands = [f"sysctl -w {name}={value}" for name, (wrong, value) in wanted.items() if wrong]
    if commands:
        return Finding("user namespaces", "problem", words, binaries.as_root(*commands))
    if failure == errno.EPERM:
        words += " (it is refused in a chroot and in most containers: run qrapd outside of them)"
    return Finding("user namespaces", "problem", words)


def listening_ports(proc_net_tcp: str) -> frozenset[int]:
    """Return the ports that /proc/net/tcp (or tcp6, proc(5)) shows as taken on this side."""
    lines = proc_net_tcp.splitlines()[1:]
    return frozenset(int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.strip())


def free_low_port(first_open: int, taken: frozenset[int]) -> int | None:
    """Return a port below ``first_open`` and 1024 that nobody has, the highest there is."""
    return next((port for port in range(min(first_open, 1024) - 1, 0, -1) if port not in taken), None)


def examine_low_ports(trial: Trial | None) -> Finding:
    """Let passt forward a port that only privileged programs may bind, on the loopback address."""
    first_open = read_setting("net.ipv4.ip_unprivileged_port_start")
    if first_open is None:
        first_open = 1024  # ip(7)'s default
    port = free_low_port(first_open, taken_ports())
    if port is None or not has_started(trial):
        return judge_low_ports(first_open, None)
    return judge_low_ports(first_open, has_started(try_passt("--tcp-ports", f"127.0.0.1/{port}")))


def taken_ports() -> frozenset[int]:
    """Return the TCP ports that somebody on this host has, for IPv4 or IPv6."""
    tables = (read_text(Path("/proc/net", name)) or "" for name in ("tcp", "tcp6"))
    return frozenset().union(*map(listening_ports, tables))


def judge_low_ports(first_open: int, bound: bool | None) -> Finding:
    """Tell whether ports below 1024 can be forwarded; ``bound`` is what a trial gave, None without one."""
    subject = "low ports"
    if first_open <= 1:
        return Finding(subject, "ok", "every port can be forwarded")
    rule = f"net.ipv4.ip_unprivileged_port_start is {first_open}"
    if bound:
        # Seen with passt of 2023 started as root: it binds, though it changes to nobody.
        return Finding(
            subject, "ok", f"every port can be forwarded: {rule}, but passt is privileged to bind lower"
        )
    if first_open <= 80:
        return Finding(subject, "ok", f"ports from {first_open} on can be forwarded")
    unknown = "" if bound is False else " (not tried: passt does not start)"
    # The one way that passt(1) recommends.
    remedy = binaries.as_root("sysctl -w net.ipv4.ip_unprivileged_port_start=80")
    return Finding(
        subject, "warning", f"ports below {first_open} cannot be forwarded: {rule}{unknown}", remedy
    )
