# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts that fail in a row: how long the next one waits."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from qrapd import failed_starts
from qrapd.failed_starts import FREE, LONGEST, MEMORY, FailedStarts, count_failures


def test_the_delay_grows_to_a_limit() -> None:
    """The first ones come at once; then it doubles."""
    delays = [FailedStarts(count).delay for count in range(FREE + 9)]

    assert [0.0] * (FREE + 1) + [1, 2, 4, 8, 16, LONGEST, LONGEST, LONGEST] == delays
    assert FailedStarts(10**9).delay == LONGEST


def test_failures_are_counted(tmp_path: Path) -> None:
    """From one process to the next."""
    path = tmp_path / "failures"
    for expected in range(3):
        known = FailedStarts.read(path)
        assert expected == known.count
        known.note_another(path)


def test_an_old_failure_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a VM an hour later does not wait."""
    path = tmp_path / "failures"
    FailedStarts(7).note_another(path)
    then = failed_starts.now()
    monkeypatch.setattr(failed_starts, "now", lambda: then + MEMORY + 1)

    assert FailedStarts() == FailedStarts.read(path)


def test_a_changed_file_counts_anew(tmp_path: Path) -> None:
    """Whoever has mended the VM's file does not wait."""
    path, file = tmp_path / "failures", tmp_path / "web.toml"
    file.touch()
    FailedStarts(7).note_another(path)
    os.utime(path, (100, 100))
    os.utime(file, (50, 50))
    assert FailedStarts.read(path, since=file).count == 8
    os.utime(file, (150, 150))
    assert FailedStarts() == FailedStarts.read(path, since=file)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"count": "x", "at": 0}', '{"count": 1}'])
def test_what_is_damaged_is_nothing(tmp_path: Path, text: str) -> None:
    """It is only about patience."""
    path = tmp_path / "failures"
    path.write_text(text)

    assert FailedStarts() == FailedStarts.read(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A full or read-only /run ends nothing."""
    FailedStarts().note_another(tmp_path / "missing" / "failures")


def test_what_counts(tmp_path: Path) -> None:
    """A start that raises; not one that was up, and an end in order forgets all."""
    path, file = tmp_path / "failures", tmp_path / "web.toml"
    file.touch()
    os.utime(file, (50, 50))
    waited: list[int] = []

    def start(*, up: bool, fails: bool) -> int:
        with contextlib.suppress(OSError), count_failures(path, since=file, wait=note) as note_up:
            if up:
                note_up()
            if fails:
                raise OSError
        return FailedStarts.read(path).count

    def note(known: FailedStarts) -> None:
        waited.append(known.count)

    assert [1, 2, 3, 4, 5] == [start(up=False, fails=True) for _ in range(5)]
    assert [FREE + 1] == waited
    assert 0 == start(up=True, fails=True)
    assert 1 == start(up=False, fails=True)
    assert 0 == start(up=False, fails=False)
