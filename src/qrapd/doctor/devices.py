# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices /dev/kvm and /dev/net/tun: whether they open, and what opens them."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from .. import binaries
from .finding import Finding

__all__ = ["Device", "examine_kvm", "examine_tun", "judge_kvm", "judge_tun", "read_device"]


@dataclass(frozen=True)
class Device:
    """Who may open a device, from stat(2); ``mode`` is None if it is not there."""

    mode: int | None = None
    gid: int = 0
    group: str | None = None


def read_device(path: Path) -> Device:
    """Look at a device's permissions."""
    try:
        told = path.stat()
    except OSError:
        return Device()
    try:
        group = grp.getgrgid(told.st_gid).gr_name
    except KeyError:
        group = None
    return Device(stat.S_IMODE(told.st_mode), told.st_gid, group)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _open_device(path: str, device: Device) -> tuple[str, str]:
    """Return the command that lets this user open a device that is there, and words to go with it."""
    shared = device.mode is not None and device.mode & 0o060 == 0o060
    if shared and device.group is not None and device.gid != 0:
        command = f"usermod -aG {device.group} {_user()}"
        return binaries.as_root(command), "; after the command log in again"
    return binaries.as_root(f"chmod 0666 {path}"), ""


def examine_kvm(guest: str) -> Finding:
    """Find out whether guests of architecture ``guest`` can run under KVM."""
    facts = binaries.read_kvm(guest, proc_cpuinfo=Path("/proc/cpuinfo"), dev_kvm=Path("/dev/kvm"))
    return judge_kvm(facts, read_device(Path("/dev/kvm")))


def judge_kvm(facts: binaries.KvmFacts, device: Device) -> Finding:
    """Tell whether KVM works and what would make it work; without it guests are slow, but they run."""
    works, reason = binaries.decide_kvm(facts)
    if works:
        return Finding("KVM", "ok", reason)
    words = f"{reason}; guests run under TCG, slowly"
    capable = facts.host not in {"x86_64", "i386"} or facts.cpu_flag is not None
    if not facts.same_architecture or not capable or facts.open_errno is None:
        return Finding("KVM", "warning", words)
    if facts.open_errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(facts.cpu_flag or "", "kvm")
        return Finding("KVM", "warning", words, binaries.as_root(f"modprobe {module}"))
    if facts.open_errno == errno.EACCES:
        remedy, afterwards = _open_device("/dev/kvm", device)
        return Finding("KVM", "warning", words + afterwards, remedy)
    return Finding("KVM", "warning", words)


def examine_tun() -> Finding:
    """Find out whether /dev/net/tun opens: of passt's family only pasta uses it."""
    path = Path("/dev/net/tun")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return judge_tun(error.errno, read_device(path))
    return judge_tun(None, Device())


def judge_tun(open_errno: int | None, device: Device) -> Finding:
    """Tell whether pasta could make its interface; links to VMs do not need it."""
    if open_errno is None:
        return Finding("/dev/net/tun", "ok", "opens (only pasta uses it)")
    words = f"cannot be opened: {os.strerror(open_errno)}; pasta needs it, links to VMs do not"
    if open_errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        return Finding("/dev/net/tun", "warning", words, binaries.as_root("modprobe tun"))
    if open_errno in {errno.EACCES, errno.EPERM} and device.mode is not None and device.mode & 0o006 != 0o006:
        remedy = binaries.as_root("chmod 0666 /dev/net/tun")  # what udev's own rules give it
        return Finding("/dev/net/tun", "warning", words, remedy)
    return Finding("/dev/net/tun", "warning", words)
