# SPDX-License-Identifier: GPL-2.0-or-later
"""What is seen of a VM that somebody else runs, or has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrapd import elsewhere
from qrapd.elsewhere import Elsewhere
from qrapd.record import LinkRecord, ProcessId, Record, write
from qrapd.runtime_directory import VmDirectory
from qrapd.vm_status import VmStatus

ME = ProcessId.of_this()
GONE = ProcessId(os.getpid(), 1)
UP = LinkRecord(0, "swap", 2, 2, passt=ME, passt_pid=ME.pid)
DOWN = LinkRecord(1, "swap", 3, 3, swapping=True)


def seen(sight: Elsewhere) -> VmStatus:
    """It is seen."""
    status = sight.look()
    assert status is not None
    return status


@pytest.fixture
def sight(tmp_path: Path) -> Elsewhere:
    """Of the VM web."""
    return Elsewhere(tmp_path, "web")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[VmDirectory]:
    """The VM's, held by its supervisor: this process plays it."""
    with VmDirectory(tmp_path, "web").claim() as claimed:
        yield claimed


def test_nothing(sight: Elsewhere, tmp_path: Path) -> None:
    """No directory, or one with nothing of a VM in it."""
    assert sight.look() is None
    (tmp_path / "web").mkdir()
    assert sight.look() is None


def test_one_that_lives(sight: Elsewhere, directory: VmDirectory) -> None:
    """Each look tells what is so then: on its way up, running, without a network, between two runs, gone."""
    status = seen(sight)
    assert ("starting", "shell", None, []) == (status.state, status.origin, status.qemu_pid, status.links)
    assert "takes no calls yet" in str(status.error)
    write(directory.record_path, Record(ME, (UP,), ME, "unit"))
    status = seen(sight)
    assert ("starting", "unit", ME.pid) == (status.state, status.origin, status.qemu_pid)
    with directory.listen("control.sock"):
        status = seen(sight)
        assert ("ready", ["up"]) == (status.state, [link.state for link in status.links])
        assert f"tells more: {directory.path}/control.sock" in str(status.error)
        write(directory.record_path, Record(ME, (UP, DOWN), ME, "unit"))
        status = seen(sight)
        assert ("degraded", ["up", "down"]) == (status.state, [link.state for link in status.links])
        write(directory.record_path, Record(GONE, (UP, DOWN), ME, "unit"))
        status = seen(sight)
        assert ("starting", None) == (status.state, status.qemu_pid)
        assert ["ended", "ended"] == [link.state for link in status.links]
        directory.record_path.write_text("{}")
        assert "ready" == seen(sight).state


def test_a_record_that_is_the_same_is_read_once(
    sight: Elsewhere, directory: VmDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds may be looked at once a second."""
    write(directory.record_path, Record(ME, (UP,), ME, "unit"))
    first = seen(sight)
    monkeypatch.setattr(elsewhere, "read_record", None)
    assert first is seen(sight)


@pytest.mark.parametrize(
    ("text", "qemu", "words"),
    [
        (None, ME, "its QEMU runs on: `qrapd start web`"),
        (None, GONE, "its QEMU is gone, too"),
        ("{}", ME, "its record cannot be read"),
    ],
)
def test_one_that_was_left(
    sight: Elsewhere, tmp_path: Path, text: str | None, qemu: ProcessId, words: str
) -> None:
    """By a supervisor that is gone."""
    directory = VmDirectory(tmp_path, "web")
    with directory.claim():
        directory.leave_as_it_is()
        write(directory.record_path, Record(qemu, (UP,), ME, "unit"))
    if text is not None:
        directory.record_path.write_text(text)
    status = seen(sight)
    assert ("failed", True) == (status.state, words in str(status.error)), status
    assert (ME.pid if text is None and qemu is ME else None) == status.qemu_pid


def test_one_that_cannot_be_seen(place: Path) -> None:
    """For want of the right, or of anything else: the caller is to know."""
    (place / "web").mkdir()
    (place / "web" / "lock").symlink_to("lock")
    assert Elsewhere(place, "web").look() is None  # a link to itself is no lock
    with pytest.raises(OSError, match="File name too long"):
        Elsewhere(place, "x" * 300).look()
