# SPDX-License-Identifier: GPL-2.0-or-later
"""The one line that ends .ci/run, from reports that a real pytest wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUMMARY = Path(__file__).resolve().parent.parent / "scripts" / "summary.py"

MIXED = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.fixture
def good_start_bad_end():
    yield
    raise OSError
def test_fails_twice(good_start_bad_end): assert False
@pytest.fixture
def bad_start(): raise OSError
def test_does_not_start(bad_start): pass
"""


def report(directory: Path, name: str, tests: str) -> Path:
    """Runs pytest on a file with these tests, and returns its JUnit report."""
    (directory / f"test_{name}.py").write_text(tests)
    xml = directory / f"{name}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        f"--junitxml={xml}",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    subprocess.run([*command, f"test_{name}.py"], cwd=directory, env=environment, capture_output=True)
    return xml


def summary(*arguments: str | Path) -> tuple[int, str]:
    """Runs the script, and returns its status and what it printed on stdout."""
    done = subprocess.run([sys.executable, SUMMARY, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_counts_all_reports(tmp_path: Path) -> None:
    """The line counts each test of all reports once, errors of fixtures as failures, and the status is 1."""
    mixed = report(tmp_path, "mixed", MIXED)
    good = report(tmp_path, "good", "def test_passes(): pass")
    assert (1, "2 passed, 3 failed, 1 skipped\n") == summary(mixed, good)
    assert (0, "1 passed, 0 failed, 0 skipped\n") == summary(good)


def test_silence_fails(tmp_path: Path) -> None:
    """A report that is missing, broken or without tests is a failure."""
    good = report(tmp_path, "good", "def test_passes(): pass")
    empty = report(tmp_path, "empty", "")
    broken = tmp_path / "broken.xml"
    broken.write_text("<testsuites><testcase")
    assert (1, "1 passed, 3 failed, 0 skipped\n") == summary(good, empty, broken, tmp_path / "missing.xml")


def test_what_does_not_decide_is_shown(tmp_path: Path) -> None:
    """Failures in a report that is only shown have a line before, and count for nothing; nor does its silence."""
    mixed = report(tmp_path, "mixed", MIXED)
    good = report(tmp_path, "good", "def test_passes(): pass")
    expected = "sid: 3 of 5 failed (shown only)\n1 passed, 0 failed, 0 skipped\n"
    assert (0, expected) == summary(good, "--shown", f"sid={mixed}")
    expected = "sid: no tests ran (shown only)\n1 passed, 0 failed, 0 skipped\n"
    assert (0, expected) == summary(good, "--shown", f"sid={tmp_path}/missing.xml")
