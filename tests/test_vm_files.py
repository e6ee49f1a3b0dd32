# SPDX-License-Identifier: GPL-2.0-or-later
"""VM files: which one is meant, and what is said of one that cannot be read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from qrapd import vm_files
from qrapd.errors import ConfigurationError, ExitStatus


def refusal(file_or_name: str, vms: Path) -> tuple[str, str, str | None]:
    """What find() says of a file that is not there: path, reason, hint."""
    with pytest.raises(ConfigurationError) as caught:
        vm_files.find(file_or_name, vms)
    (problem,) = caught.value.problems
    return caught.value.path, problem.reason, problem.hint


@pytest.mark.parametrize(
    ("environment", "uid", "expected"),
    [
        ({"HOME": "/root", "XDG_CONFIG_HOME": "/x"}, 0, "/etc/qrapd/vms"),
        ({"HOME": "/home/a", "XDG_CONFIG_HOME": "/x"}, 1000, "/x/qrapd/vms"),
        ({"HOME": "/home/a", "XDG_CONFIG_HOME": ""}, 1000, "/home/a/.config/qrapd/vms"),
        ({"HOME": "/home/a"}, 1000, "/home/a/.config/qrapd/vms"),
        ({}, 1000, "/.config/qrapd/vms"),
    ],
)
def test_where_names_are_looked_up(environment: Mapping[str, str], uid: int, expected: str) -> None:
    """root's VMs are the host's; those of others follow the XDG base directories, of which an empty one is unset."""
    assert Path(expected) == vm_files.directory(environment, uid)


def test_a_name_is_looked_up_and_a_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`web` is a name, `web.toml` and `./web` are paths; what comes back does not depend on the directory."""
    vms, here = tmp_path / "vms", tmp_path / "here"
    for directory in (vms, here):
        directory.mkdir()
        (directory / "web.toml").touch()
    (here / "plain").touch()
    monkeypatch.chdir(here)
    assert vms / "web.toml" == vm_files.find("web", vms)
    assert here / "web.toml" == vm_files.find("web.toml", vms)
    assert here / "plain" == vm_files.find("./plain", vms)


def test_a_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    """A typing error is seen at once beside what is there."""
    (tmp_path / "web.toml").touch()
    path = str(tmp_path / "wbe.toml")
    assert (path, "there is no such file", "files there: web.toml") == refusal(path, tmp_path)


def test_a_missing_name_says_what_there_is(tmp_path: Path) -> None:
    """Other names if there are some, else how to make one."""
    vms = tmp_path / "vms"
    path = str(vms / "web.toml")
    hint = "put a file there, or name one: ./web.toml"
    assert (path, "there is no such file", hint) == refusal("web", vms)
    vms.mkdir()
    for name in ("db", "app"):
        (vms / f"{name}.toml").touch()
    assert (path, "there is no such file", "VMs there: app, db") == refusal("web", vms)


@pytest.mark.parametrize("below", ["file.toml/x.toml", "nowhere/x.toml"])
def test_a_path_through_nothing_is_missing(tmp_path: Path, below: str) -> None:
    """A path whose directory is none is a file that is not there, too."""
    (tmp_path / "file.toml").touch()
    assert "there is no such file" == refusal(str(tmp_path / below), tmp_path)[1]


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """Its name is its file's stem unless it says another."""
    path = tmp_path / "web.toml"
    path.write_text("")
    assert "web" == vm_files.read(path).name


def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    """A VM has a directory for its disks, perhaps, but its file is a file."""
    with pytest.raises(ConfigurationError) as caught:
        vm_files.read(vm_files.find(f"{tmp_path}/", tmp_path))
    assert ["is a directory"] == [problem.reason for problem in caught.value.problems]


def test_what_might_never_end_is_not_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device without an end, a file that is no VM's: refused at once."""
    os.mkfifo(tmp_path / "pipe.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (vm_files.SIZE_LIMIT + 1))
    reasons = []
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), large):
        with pytest.raises(ConfigurationError) as caught:
            vm_files.read(path)
        reasons.append(caught.value.problems[0].reason)
    regular = "is not a regular file"
    assert [regular, regular, "is larger than 1048576 bytes, as no VM's file is"] == reasons


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    """Editors on other systems put one there."""
    path = tmp_path / "web.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 'other'\n")
    assert "other" == vm_files.read(path).name


def test_what_is_not_utf_8_is_said_so(tmp_path: Path) -> None:
    """TOML is UTF-8; the first byte that is not is named, counted from 1."""
    path = tmp_path / "web.toml"
    path.write_bytes(b"# M\xfcnchen\n")
    with pytest.raises(ConfigurationError) as caught:
        vm_files.read(path)
    assert ["is not UTF-8, as TOML must be (byte 4)"] == [problem.reason for problem in caught.value.problems]


@pytest.mark.parametrize("hidden", ["file", "directory"])
def test_a_file_that_is_not_ours_to_read(hidden: str, place: Path, as_nobody: list[str]) -> None:
    """An unprivileged user is told that permission lacks, not that the file does, and never a traceback."""
    path = place / "closed" / "web.toml"
    path.parent.mkdir()
    path.write_text("")
    (path if hidden == "file" else path.parent).chmod(0o000)
    done = subprocess.run([*as_nobody, "qrapd", "check", path], capture_output=True, text=True, timeout=30)
    assert (
        f"{path}: cannot be read: Permission denied\n  hint: check its mode and owner\n",
        ExitStatus.CONFIGURATION,
    ) == (done.stderr, done.returncode)
