# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor finds on this host as a whole, and what its findings come to."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qrapd import binaries, doctor
from qrapd.doctor import Finding


def run(script: str, *python: str) -> subprocess.CompletedProcess[str]:
    """Run Python ``script``, by this Python unless another one is given, without what a session's environment adds."""
    return subprocess.run(
        [*(python or (sys.executable,)), "-c", script],
        env={"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def isolated(*options: str) -> list[str]:
    """What to put before a command so that unshare(1) runs it; skips the test where that is denied."""
    command = ["unshare", *options]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(command)} is denied here")
    return command


def test_this_host_is_examined_whole(tmp_path: Path) -> None:
    """Every subject has one finding; passt and QEMU, which tests need, are found to be right."""
    findings = {finding.subject: finding for finding in doctor.examine(tmp_path)}

    emulator = f"qemu-system-{binaries.host_architecture()}"
    expected = [
        "passt",
        "passt starts",
        "pesto",
        emulator,
        "busybox",
        "qrap",
        "KVM",
        "user namespaces",
        "/dev/net/tun",
        "low ports",
        "AppArmor",
        "runtime directory",
        "host network",
        "journal",
    ]
    assert expected == list(findings)
    assert findings["passt"].status == "ok"
    assert findings["passt starts"].status == "ok", findings["passt starts"]
    assert findings[emulator].status == "ok"
    assert not list(tmp_path.iterdir())


def test_an_unprivileged_user_gets_findings_not_errors(nobodys_python: list[str]) -> None:
    """Nothing that such a user may not read or do stops the examination, and passt starts for them too."""
    script = """
import dataclasses
import json
from pathlib import Path
from qrapd import doctor
findings = doctor.examine(Path("/nonexistent/qrapd"))
print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
"""
    done = run(script, *nobodys_python)

    assert done.returncode == 0, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["passt starts"]["status"] == "ok", findings["passt starts"]
    assert findings["runtime directory"]["status"] == "problem"
    assert findings["runtime directory"]["remedy"].split()[0] in {"sudo", "doas", "su"}


def test_without_programs_each_is_missed_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty PATH: passt and QEMU are problems, nothing raises, passt is not tried."""
    monkeypatch.setenv("PATH", str(tmp_path))

    findings = {finding.subject: finding for finding in doctor.examine(tmp_path, qemu="qemu-system-x86_64")}

    assert "not installed" in findings["passt"].found
    assert "not tried" in findings["passt starts"].found
    assert findings["qemu-system-x86_64"].status == "problem"
    assert findings["busybox"].status == "warning"


def test_findings_become_json() -> None:
    """As plain dictionaries, which json takes, and the gravest status on top."""
    findings = [Finding("a", "ok", "fine"), Finding("b", "warning", "hm", "mend b")]

    expected = [
        {"subject": "a", "status": "ok", "found": "fine", "remedy": None},
        {"subject": "b", "status": "warning", "found": "hm", "remedy": "mend b"},
    ]
    assert expected == json.loads(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    assert doctor.worst(findings) == "warning"
    assert doctor.worst([*findings, Finding("c", "problem", "no")]) == "problem"
    assert doctor.worst([]) == "ok"
