# SPDX-License-Identifier: GPL-2.0-or-later
"""The fds that outlive a supervisor: stored, forgotten, or copied for the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from qrapd.kept_fds import KeptProcess, copies


class Store:
    """A service manager's."""

    def __init__(self) -> None:
        self.fds: dict[str, list[int]] = {}

    def store(self, name: str, fds: Sequence[int]) -> bool:
        self.fds.setdefault(name, []).extend(fds)
        return True

    def forget(self, name: str) -> bool:
        return self.fds.pop(name, None) is not None


@dataclass
class Subject:
    """What there is of a process."""

    pidfd: int
    output: int


@pytest.fixture
def subject() -> Iterator[Subject]:
    """With fds that are open."""
    there = Subject(*os.pipe())
    yield there
    for fd in (there.pidfd, there.output):
        os.close(fd)


def test_stored_and_forgotten(subject: Subject) -> None:
    """By the names that the next supervisor looks for."""
    store = Store()
    store.store("passt1", [99])
    kept = KeptProcess(store, "passt0")
    kept.keep(subject)
    assert {"passt0": [subject.pidfd], "passt0-output": [subject.output], "passt1": [99]} == store.fds
    kept.forget()
    assert {"passt1": [99]} == store.fds


def test_what_there_is_not(subject: Subject) -> None:
    """Nobody is to be given an fd of -1."""
    store, known = Store(), Subject(subject.pidfd, -1)
    KeptProcess(store, "qemu").keep(known)
    assert {"qemu": [subject.pidfd]} == store.fds


def test_copies(subject: Subject) -> None:
    """They are open when the originals are closed, and lack what could not be copied."""
    made = KeptProcess(Store(), "qemu").copies(subject)
    try:
        assert ["qemu", "qemu-output"] == sorted(made)
        assert not {subject.pidfd, subject.output} & {*made.values()}
        for name, fd in (("qemu", subject.pidfd), ("qemu-output", subject.output)):
            assert os.path.sameopenfile(fd, made[name])
        assert {} == copies({"qemu": 999_999})
    finally:
        for fd in made.values():
            os.close(fd)
