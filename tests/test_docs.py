# SPDX-License-Identifier: GPL-2.0-or-later
"""What the documents say, held against what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from qrapd import __version__
from qrapd.cli import COMMANDS
from qrapd.config import parse
from qrapd.errors import ExitStatus
from qrapd.messages import EVENTS
from support import write_vm
from test_cli import qrapd

PROJECT = Path(__file__).resolve().parent.parent
REFERENCE = (PROJECT / "docs/reference.md").read_text()
README = (PROJECT / "README.md").read_text()


def test_the_changelog_is_of_this_version() -> None:
    """The newest entry is that of the package."""
    newest = re.search(r"^## \[(.+?)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert __version__ == newest[1]


def test_the_reference_has_every_command() -> None:
    """And none that there is not."""
    assert set(COMMANDS) == set(re.findall(r"^\| `qrapd (\w+)", REFERENCE, re.MULTILINE))


def test_the_reference_has_every_event() -> None:
    """And none that there is not."""
    events = REFERENCE.partition("## Events")[2]
    assert set(EVENTS) == set(re.findall(r"^\| `([a-z]+\.[a-z_]+)`", events, re.MULTILINE))


def test_the_reference_has_every_exit_status() -> None:
    """And none that there is not."""
    table = REFERENCE.partition("## Exit status")[2].partition("\n## ")[0]
    assert set(ExitStatus) == {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}


def test_the_file_in_the_readme_is_right() -> None:
    """The first file that a reader copies parses, and has the forwards that it shows."""
    text = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert text is not None
    configuration = parse(text[1], PROJECT / "web.toml")
    assert 1 == len(configuration.links)


def test_what_the_readme_shows_of_check(tmp_path: Path) -> None:
    """`qrapd check` prints the line that the README shows, KVM or not."""
    shown = re.search(r"^web\.toml: (fine .*)$", README, re.MULTILINE)
    assert shown is not None
    printed = qrapd("check", write_vm(tmp_path, "web").path).stdout
    assert shown[1].replace("no KVM", "KVM") in printed.replace("no KVM", "KVM")
