# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's own file: its defaults, its values, and what is said of a wrong one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qrapd import vm_files
from qrapd.agent_file import AgentFile, parse
from qrapd.errors import ConfigurationError

PATH = Path("/etc/qrapd/agent.toml")
EXAMPLE = Path(__file__).resolve().parent.parent / "config" / "agent.toml"


def test_a_missing_file(tmp_path: Path) -> None:
    """Then all is as by default."""
    assert AgentFile() == vm_files.read_agent_file(tmp_path)


def test_the_example() -> None:
    """It says nothing; with its values taken in it names every key, and the defaults where there are any."""
    text = EXAMPLE.read_text()
    assert AgentFile() == parse(text, EXAMPLE)
    said = parse(re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE), EXAMPLE)
    assert set(AgentFile.model_fields) == said.model_fields_set
    assert AgentFile().starts_at_once == said.starts_at_once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grup = 'x'", "grup: is no key of this file (it is 'x')"),
        ("starts_at_once = 0", "starts_at_once: input should be greater than or equal to 1 (it is 0)"),
        ("starts_at_once = '4'", "starts_at_once: input should be a valid integer (it is '4')"),
        ("group = ''", "group: string should have at least 1 character (it is '')"),
        ("group =", "is not TOML: "),
    ],
)
def test_what_is_wrong(text: str, expected: str) -> None:
    """Key, reason, value, and what keys there are."""
    with pytest.raises(ConfigurationError) as caught:
        parse(text, PATH)
    (problem,) = caught.value.problems
    assert str(problem).startswith(expected)
    assert problem.hint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A directory, a pipe, or bytes that are no text."""
    path = tmp_path / "agent.toml"
    path.write_bytes(b"group = '\xff'")
    with pytest.raises(ConfigurationError, match="1 problem"):
        vm_files.read_agent_file(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="1 problem"):
        vm_files.read_agent_file(tmp_path)


def test_files_are_surveyed(tmp_path: Path) -> None:
    """What is wrong with one is known of it; what an editor leaves behind is none."""
    (tmp_path / "web.toml").write_text("autostart = true\n")
    (tmp_path / "db.toml").write_text("")
    (tmp_path / "bad.toml").write_text("x")
    (tmp_path / ".web.toml.swp").write_text("x")
    (tmp_path / "Big Name.toml").write_text("x")
    found = vm_files.survey(tmp_path)

    assert ["bad", "db", "web"] == [*found]
    assert [False, False, True] == [each.autostart for each in found.values()]
    assert [True, False, False] == [each.error is not None for each in found.values()]
    assert {} == vm_files.survey(tmp_path / "nowhere")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A wrong one, or one for another VM, leaves the one that is there."""
    path = tmp_path / "vms" / "web.toml"
    assert vm_files.write(path, "autostart = true\n")
    for wrong in ("x", "name = 'db'\n"):
        with pytest.raises(ConfigurationError):
            vm_files.write(path, wrong)
    assert "autostart = true\n" == path.read_text()
    assert not vm_files.write(path, "")
    assert ["web.toml"] == [each.name for each in path.parent.iterdir()]
    vm_files.remove(path)
    vm_files.remove(path)
    assert not path.exists()
