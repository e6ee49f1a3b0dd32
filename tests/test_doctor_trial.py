# SPDX-License-Identifier: GPL-2.0-or-later
"""A trial run of passt: a real one, one that fails, and one that hangs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qrapd.doctor import Finding
from qrapd.doctor.trial import judge_trial, try_passt


def test_a_passt_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has passt's own words, without what is no cause."""
    script = tmp_path / "passt"
    script.write_text(
        '#!/bin/sh\necho "Don\'t run as root. Changing to nobody..."\necho no luck >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    finding = judge_trial(try_passt())

    expected = Finding("passt starts", "problem", "it ended with status 1: no luck")
    assert expected == finding


def test_a_passt_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends, whatever passt does."""
    script = tmp_path / "passt"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    trial = try_passt(timeout=0.1)

    assert trial.status is None
    assert "killed" in judge_trial(trial).found


def test_a_taken_port_fails_the_trial() -> None:
    """The trial is a real one: passt cannot have a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        trial = try_passt("--tcp-ports", f"127.0.0.1/{server.getsockname()[1]}")

    assert trial.status not in {0, None}
    assert trial.last_words
