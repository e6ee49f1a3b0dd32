# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs were started by themselves: remembered for the next agent, until the host starts again."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrapd import autostarted
from qrapd.autostarted import Autostarted


def test_the_next_agent_knows(tmp_path: Path) -> None:
    """What was added and not dropped again; of a file that was left half written nothing is taken, nor in the way."""
    path = tmp_path / "autostarted.json"
    (tmp_path / "autostarted.new").write_text("half")
    first = Autostarted(path)
    first.add(["web", "db"])
    first.retain(["web", "mail"])
    assert (True, False, False) == tuple(name in Autostarted(path) for name in ("web", "db", "mail"))
    assert ["autostarted.json"] == [each.name for each in tmp_path.iterdir()]
    first.clear()
    assert "web" not in Autostarted(path)


def test_another_start_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing was started yet."""
    path = tmp_path / "autostarted.json"
    Autostarted(path).add(["web"])
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(autostarted, "BOOT_ID", boot_id)
    assert "web" not in Autostarted(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "x"])
def test_what_cannot_be_read(text: str, tmp_path: Path) -> None:
    """It is forgotten."""
    path = tmp_path / "autostarted.json"
    path.write_text(text)
    assert "web" not in Autostarted(path)


@pytest.mark.parametrize("name", ["autostarted.new", "autostarted.json"])
def test_a_link_is_not_followed(name: str, tmp_path: Path) -> None:
    """What it points to stays as it is, and the names are written."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / name).symlink_to(target)
    path = tmp_path / "autostarted.json"
    Autostarted(path).add(["web"])
    assert "precious" == target.read_text()
    assert not path.is_symlink()
    assert "web" in Autostarted(path)


def test_a_link_that_comes_back_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is there again between two steps: rather nothing is written."""
    target, new = tmp_path / "target", tmp_path / "autostarted.new"
    new.symlink_to(target)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    Autostarted(tmp_path / "autostarted.json").add(["web"])
    assert not target.exists()
