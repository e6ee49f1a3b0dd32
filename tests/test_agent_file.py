# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's own file: its defaults, its values, and what is said of a wrong one."""

from __future__ import annotations

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qrapd import vm_files
from qrapd.agent_file import AgentFile, parse
from qrapd.errors import ConfigurationError, Unavailable

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


def test_two_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both succeed, one of them is the last, and neither has a part of the other's; meanwhile no survey sees a VM."""
    path = tmp_path / "web.toml"
    texts = [f"# {letter * 5000}\n" for letter in "ab"]
    both = threading.Barrier(len(texts), timeout=60)
    seen: list[list[str]] = []
    replace = Path.replace

    def replace_together(self: Path, target: Path) -> Path:
        both.wait()
        seen.append([*vm_files.survey(tmp_path)])
        both.wait()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_together)
    with ThreadPoolExecutor(len(texts)) as threads:
        written = [threads.submit(vm_files.write, path, text) for text in texts]
        assert [True, True] == [each.result(60) for each in written]
    assert [[], []] == seen
    assert path.read_text() in texts
    assert ["web.toml"] == [each.name for each in tmp_path.iterdir()]


def test_only_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two who write at once one does, and nobody replaces what is there, a link that leads nowhere included."""
    path, other = tmp_path / "web.toml", tmp_path / "other.toml"
    texts = ["# a\n", "# b\n"]
    both = threading.Barrier(len(texts), timeout=60)
    link = os.link

    def link_together(source: Path, target: Path) -> None:
        both.wait()
        link(source, target)

    monkeypatch.setattr(os, "link", link_together)
    with ThreadPoolExecutor(len(texts)) as threads:
        written = [threads.submit(vm_files.write, path, text, only_new=True) for text in texts]
        done = [each.result(60) for each in written]
    assert [False, True] == sorted(done)
    assert path.read_text() == texts[done.index(True)]
    monkeypatch.undo()
    other.symlink_to("nowhere")
    assert not vm_files.write(other, "# c\n", only_new=True)
    assert "nowhere" == str(other.readlink())
    assert {"web.toml", "other.toml"} == {each.name for each in tmp_path.iterdir()}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: said so, and the file that is there stays alone and as it was."""
    path = tmp_path / "web.toml"
    vm_files.write(path, "autostart = true\n")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Unavailable, match="No space left"):
        vm_files.write(path, "")
    assert ["web.toml"] == [each.name for each in tmp_path.iterdir()]
    assert "autostart = true\n" == path.read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_the_mode_of_a_written_file(umask: int, mode: int, tmp_path: Path) -> None:
    """As the umask has it (0077 in the unit), and never for others to write."""
    path = tmp_path / "web.toml"
    before = os.umask(umask)
    try:
        vm_files.write(path, "")
    finally:
        os.umask(before)
    assert mode == path.stat().st_mode & 0o777
