# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of KVM and /dev/net/tun, whoever may open them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from qrapd.binaries import KvmFacts
from qrapd.doctor import devices
from qrapd.doctor.devices import Device

KVM_GROUP = Device(0o660, 36, "kvm")
ROOT_ONLY = Device(0o600, 0, "root")


@pytest.mark.parametrize(
    ("facts", "device", "status", "command"),
    [
        (KvmFacts("x86_64", "x86_64", "vmx", None, 12), KVM_GROUP, "ok", None),
        (KvmFacts("x86_64", "x86_64", None, None, 12), ROOT_ONLY, "warning", None),
        (KvmFacts("x86_64", "x86_64", None, errno.EACCES, None), ROOT_ONLY, "warning", None),
        (KvmFacts("aarch64", "x86_64", "vmx", errno.EACCES, None), KVM_GROUP, "warning", None),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.ENOENT, None), Device(), "warning", "modprobe kvm_intel"),
        (KvmFacts("x86_64", "x86_64", "svm", errno.ENOENT, None), Device(), "warning", "modprobe kvm_amd"),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.EACCES, None), KVM_GROUP, "warning", "usermod -aG kvm "),
        (
            KvmFacts("x86_64", "x86_64", "vmx", errno.EACCES, None),
            ROOT_ONLY,
            "warning",
            "chmod 0666 /dev/kvm",
        ),
        (KvmFacts("aarch64", "aarch64", None, errno.EACCES, None), KVM_GROUP, "warning", "usermod -aG kvm "),
    ],
)
def test_what_mends_kvm(facts: KvmFacts, device: Device, status: str, command: str | None) -> None:
    """A remedy where one helps; none where the processor or the guest's architecture is the reason."""
    finding = devices.judge_kvm(facts, device)

    assert status == finding.status
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


@pytest.mark.parametrize(
    ("failure", "device", "command"),
    [
        (errno.ENOENT, Device(), "modprobe tun"),
        (errno.EACCES, ROOT_ONLY, "chmod 0666 /dev/net/tun"),
        (errno.EPERM, Device(0o666, 0, "root"), None),
    ],
)
def test_what_mends_tun(failure: int, device: Device, command: str | None) -> None:
    """A missing driver, closed permissions, and a container's refusal, which no command mends."""
    finding = devices.judge_tun(failure, device)

    assert finding.status == "warning"
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


def test_the_permissions_of_a_device_are_read() -> None:
    """From a device that every host has."""
    assert devices.read_device(Path("/dev/null")).mode == 0o666
    assert devices.read_device(Path("/dev/absent")) == Device()
