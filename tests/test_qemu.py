# SPDX-License-Identifier: GPL-2.0-or-later
"""What qrapd says when QEMU ends badly: each of QEMU's own complaints gets the hint that fits it."""

from __future__ import annotations

import os
import pwd
import signal
from pathlib import Path

import pytest

from qrapd.plan import unreadable
from qrapd.process import ExitStatus
from qrapd.qemu import _suggest

PLAN = unreadable(Path("/vms/web.toml"))
FAILED = ExitStatus(1)


def suggest(words: str, status: ExitStatus = FAILED) -> str:
    """The hint, or nothing."""
    return _suggest(words, status, PLAN) or ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "-drive file=a.img: Could not open 'a.img': No such file or directory",
            "relative ones start at /vms",
        ),
        ('-drive file=a.img: Failed to get "write" lock', "fuser -v"),
        ("Could not access KVM kernel module: No such file or directory", "qrapd doctor"),
        ("Could not access KVM kernel module: Permission denied", "qrapd doctor"),
        ("-accel kvm: failed to initialize kvm: Permission denied", "qrapd doctor"),
        ("-sandbox on: There is no option group 'sandbox'", "sandbox = false"),
    ],
)
def test_a_complaint_of_qemus_gets_the_hint_that_fits(words: str, expected: str) -> None:
    """In the words of QEMU 7.2 and 10.0."""
    assert expected in suggest(words)


@pytest.mark.parametrize(
    "words", ["Could not open '{}': Permission denied", "could not open kernel file '{}': Permission denied"]
)
def test_a_file_that_qemu_may_not_read(words: str) -> None:
    """Nothing is wrong with the path: who QEMU is, and what makes the file his."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    hint = suggest(words.format("/var/lib/qrapd/web.qcow2"))
    assert f"QEMU runs as user {user}" in hint
    assert f"chown {user} FILE" in hint
    assert "correct the path" not in hint


@pytest.mark.parametrize("hidden", [True, False])
def test_a_file_in_a_home_that_a_unit_does_not_see(monkeypatch: pytest.MonkeyPatch, hidden: bool) -> None:
    """With ProtectHome= no owner and no mode would help; without it they do."""
    monkeypatch.setattr(os, "access", lambda path, _mode: not (hidden and path == "/home"))
    hint = suggest("Could not open '/home/ann/web.qcow2': Permission denied")
    assert hidden == ("Images elsewhere" in hint)
    assert hidden != ("QEMU runs as user" in hint)
    text = (Path(__file__).resolve().parent.parent / "docs/systemd.md").read_text()
    assert "**Images elsewhere.**" in text


def test_a_signal_is_the_last_to_be_explained() -> None:
    """What QEMU said itself comes first; nothing said and no signal is no hint."""
    assert "journalctl -k" in suggest("", ExitStatus(signal=signal.SIGKILL))
    assert "sandbox = false" in suggest("", ExitStatus(signal=signal.SIGSYS))
    assert "" == suggest("")
