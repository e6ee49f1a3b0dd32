# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for all tests, and the rule that in CI nothing is skipped for want of a part."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from booted import Booted, boot
from qrapd.guest import GuestImage, build_guest, default_cache
from support import NOBODY, open_directory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With QRAPD_CI=1 a skip is a failure: CI has every part, so a skip there hides something."""
    report = yield
    if os.environ.get("QRAPD_CI") and report.skipped and item.get_closest_marker("may_skip") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI that is a failure: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def guest() -> Iterator[GuestImage]:
    """The tiny guest, where an unprivileged user can read it, too."""
    built = build_guest(default_cache())
    with open_directory() as place:
        yield replace(
            built,
            kernel=Path(shutil.copy(built.kernel, place / "vmlinuz")),
            initramfs=Path(shutil.copy(built.initramfs, place / "initramfs")),
        )


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for VM files and runtime directories that any user can reach; its path is short."""
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="session")
def as_nobody(nobodys_python: list[str]) -> list[str]:
    """What to put before ``qrapd`` to run this checkout as an unprivileged user."""
    return [*nobodys_python, "-m"]


@pytest.fixture(scope="session")
def nobodys_python() -> Iterator[list[str]]:
    """A Python with this checkout, run by an unprivileged user.

    Python and its packages may lie below a home directory that nobody else may enter, so they are mounted
    where all can, in a mount namespace that ends with the command.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; this test run is unprivileged already")
    with open_directory() as view:
        parts = {
            "python": Path(sys.base_prefix),
            "site": Path(sysconfig.get_path("purelib")),
            "src": Path(__file__).resolve().parent.parent / "src",
        }
        for name in parts:
            (view / name).mkdir()
        mounts = " && ".join(
            shlex.join(["mount", "--bind", str(source), str(view / name)]) for name, source in parts.items()
        )
        python = view / "python" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        become = f"exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups"
        # The test sends its signals to the pid that it started: every step here replaces the one before.
        # A shared libpython is found by an absolute path, which may be one of those that others may not enter.
        variables = f"PYTHONPATH={view}/src:{view}/site LD_LIBRARY_PATH={view}/python/lib HOME=/"
        script = f'{mounts} && {become} env {variables} {python} -B "$@"'
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        probe = subprocess.run(
            [*command, "-m", "qrapd", "--version"], capture_output=True, text=True, timeout=60
        )
        if probe.returncode != 0:
            pytest.skip(f"cannot run as another user: {probe.stderr.strip()}")
        yield command


@pytest.fixture(scope="session")
def booted() -> Iterator[Booted]:
    """A real systemd with journald; its tests are of one group, so that one worker boots it: xdist_group("systemd")."""
    with boot() as machine:
        yield machine
