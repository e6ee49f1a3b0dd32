# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of AppArmor, and that its remedy lets the directory pass."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qrapd.doctor import apparmor
from qrapd.doctor.apparmor import AppArmorView

ALL_OPTIONS = frozenset(["fd", "vhost-user", "conf-path", "map-guest-addr", "hostname", "stats"])
ENFORCED = "docker-default (enforce)\npasst (enforce)\npasst//child (enforce)\n"
PROFILE = "profile passt /usr/bin/passt{,.avx2} {\n  include <abstractions/passt>\n}\n"


@pytest.mark.parametrize(
    ("view", "options", "base", "status"),
    [
        (AppArmorView(enabled=False), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, "other (enforce)\n", PROFILE), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, "passt (complain)\n", PROFILE), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), frozenset(["fd"]), "/run/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), ALL_OPTIONS, "/tmp/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), ALL_OPTIONS, "/run/qrapd", "warning"),
        (AppArmorView(True, None, PROFILE), ALL_OPTIONS, "/run/qrapd", "warning"),
        (AppArmorView(True, None, None), ALL_OPTIONS, "/run/qrapd", "ok"),
    ],
)
def test_apparmor_matters_only_where_something_would_be_denied(
    view: AppArmorView, options: frozenset[str], base: str, status: str
) -> None:
    """An enforced profile, a passt with options that take a path, and a directory outside of its rules."""
    finding = apparmor.judge_apparmor(view, options, Path(base))

    assert status == finding.status
    assert (status == "warning") == (finding.remedy is not None)


def test_the_remedy_for_apparmor_lets_the_directory_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit adds one rule inside the profile, after which nothing is found any more."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    profile = tmp_path / "usr.bin.passt"
    profile.write_text(PROFILE)
    edit, _, load = apparmor.allow_command(Path("/run/qrapd"), profile).partition(" && ")

    subprocess.run(edit, shell=True, check=True)

    expected = PROFILE.removesuffix("}\n") + "  /run/qrapd/** rw,\n}\n"
    assert expected == profile.read_text()
    assert load == f"apparmor_parser -r {profile}"
    view = AppArmorView(True, ENFORCED, profile.read_text())
    assert apparmor.judge_apparmor(view, ALL_OPTIONS, Path("/run/qrapd")).status == "ok"
