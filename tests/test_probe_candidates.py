# SPDX-License-Identifier: GPL-2.0-or-later
"""Where passts are looked for, whose are trusted, and the words for what is found."""

from __future__ import annotations

import os

import pytest

from qrapd.probe import Candidate, State, default_paths, default_uids, describe, fold, trusted_users
from support import NOBODY


def test_the_default_paths() -> None:
    """Numbered from 1 to 99, in order."""
    paths = default_paths()
    assert ["/tmp/passt_1.socket", "/tmp/passt_2.socket"] == paths[:2]
    assert "/tmp/passt_99.socket" == paths[-1]
    assert 99 == len(paths)
    assert "/x/{y}99" == default_paths("/x/{y}{n}")[-1]
    assert ["/x"] == default_paths("/x")


def test_trusted_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own, root, nobody and passt; nobody not where that number stands for everyone unknown."""
    files = {"/etc/passwd": ["passt:x:77:77::/:/bin/false"], "/proc/self/uid_map": ["0 0 4294967295"]}
    monkeypatch.setattr(trusted_users, "_read_lines", lambda path: files[path])
    assert {os.geteuid(), 0, 77, NOBODY} == default_uids()
    files["/proc/self/uid_map"] = ["0 1000 1"]
    assert {os.geteuid(), 0, 77} == default_uids() - ({NOBODY} if os.geteuid() == NOBODY else set())


def test_an_error_names_each_candidate() -> None:
    """By what it is and why."""
    assert "busy (has a client)" == describe(Candidate("/x", State.BUSY, detail="has a client"))
    found = [Candidate("/1", State.BUSY), Candidate("/2", State.BUSY), Candidate("/3", State.REFUSED)]
    assert [("/1 to /2", "busy"), ("/3", "nobody listens")] == fold(found)
