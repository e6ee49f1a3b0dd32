# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host lacks for VMs networked by passt, and the command that supplies it.

Each subject has a function that looks (``examine_…``) and, where there is anything to decide, a pure one
that judges what was seen (``judge_…``). What can be tried is tried: a user namespace is made, passt is
started and a low port forwarded, since settings and versions only hint at what will happen.
"""

from __future__ import annotations

from pathlib import Path

from .. import binaries
from .apparmor import examine_apparmor
from .devices import examine_kvm, examine_tun
from .finding import Finding, Status, worst
from .kernel import examine_low_ports, examine_user_namespaces
from .places import examine_journal, examine_network, examine_runtime_directory
from .programs import examine_busybox, examine_passt, examine_pesto, examine_qemu, examine_qrap
from .trial import judge_trial, try_passt

__all__ = ["Finding", "Status", "examine", "worst"]


def examine(runtime_dir: Path | None = None, *, qemu: str | None = None) -> list[Finding]:
    """Look at everything that qrapd needs of this host; takes about 0.2 s and leaves nothing behind.

    ``runtime_dir`` is the one to judge, by default the one that would be used; ``qemu`` the emulator, by
    default the one for the host's own architecture. Nothing is raised for what is missing: it is found.
    """
    qemu = qemu or f"qemu-system-{binaries.host_architecture()}"
    passt, options = examine_passt()
    trial = try_passt() if passt.status != "problem" else None
    return [
        passt,
        judge_trial(trial),
        examine_pesto(options),
        examine_qemu(qemu),
        examine_busybox(),
        examine_qrap(),
        examine_kvm(binaries.guest_architecture(qemu)),
        examine_user_namespaces(trial),
        examine_tun(),
        examine_low_ports(trial),
        examine_apparmor(options, runtime_dir),
        examine_runtime_directory(runtime_dir),
        examine_network(trial),
        examine_journal(),
    ]
