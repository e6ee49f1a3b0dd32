# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the agent listens: in a directory of its own user, for everybody, and once."""

from __future__ import annotations

import os
import pwd
import socket
import stat
from pathlib import Path

import pytest

from qrapd.agent_socket import AgentSocket, claim
from qrapd.errors import AlreadySupervised, Unavailable

STRANGER = 54321
"""Nobody has this number."""


def test_one_agent_for_each_directory(tmp_path: Path) -> None:
    """The second one is told; when the first has gone there may be another."""
    base = tmp_path / "run"
    with claim(base), pytest.raises(AlreadySupervised, match=r"agent\.lock"), claim(base):
        pass
    with claim(base):
        assert f"{os.getpid()}\n" == (base / "agent.lock").read_text()


@pytest.mark.parametrize(
    ("owner", "words", "advice"),
    [
        (STRANGER, f"belongs to user {STRANGER}", f"run as user {STRANGER}"),
        (65534, f"belongs to {pwd.getpwuid(65534).pw_name}", f"run as {pwd.getpwuid(65534).pw_name}"),
    ],
)
def test_a_base_of_somebody_else(owner: int, words: str, advice: str, place: Path) -> None:
    """It is refused, also by root, and nothing is made in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that belongs to someone else")
    os.chown(place, owner, owner)
    try:
        with pytest.raises(Unavailable, match=words) as caught, claim(place):
            pass
    finally:
        os.chown(place, 0, 0)
    assert caught.value.hint
    assert caught.value.hint.startswith(advice)
    assert "--runtime-dir" in caught.value.hint
    assert [] == list(place.iterdir())


def test_the_base_of_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root in the directory of the user qrapd is told of the unit."""
    user = pwd.struct_passwd(("qrapd", "x", os.getuid(), 1, "", "/", "/bin/false"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    tmp_path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(tmp_path, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Unavailable, match="belongs to qrapd") as caught, claim(tmp_path):
        pass
    assert "systemctl start qrapd-agent" in str(caught.value.hint)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_everybody_may_connect(umask: int, tmp_path: Path) -> None:
    """Whatever the umask is, which stays as it was; when the agent ends its socket goes."""
    path = tmp_path / "agent.sock"
    before = os.umask(umask)
    try:
        place = AgentSocket(path, None, None)
    finally:
        after = os.umask(before)
    assert umask == after
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert 0o666 == mode & 0o777
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    place.close()
    assert not path.exists()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    """A path may have been typed wrongly: a file, a directory and a link are nobody's leavings."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for path in tmp_path.iterdir():
        with pytest.raises(Unavailable, match="is no socket") as caught:
            AgentSocket(path, None, None)
        assert "--socket" in str(caught.value.hint)
    assert {"file", "directory", "link"} == {each.name for each in tmp_path.iterdir()}
    assert "precious" == (tmp_path / "file").read_text()


def test_a_socket_of_somebody_else_stays(tmp_path: Path) -> None:
    """Of one who listens, also where the queue is full; what nobody listens on any more is replaced."""
    path = tmp_path / "agent.sock"
    first = AgentSocket(path, None, None)
    with pytest.raises(Unavailable, match="somebody else does"):
        AgentSocket(path, None, None)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    first.listener.listen(0)  # there are already more who wait
    with pytest.raises(Unavailable, match="somebody else does"):
        AgentSocket(path, None, None)
    first.listener.close()  # as by kill -9
    second = AgentSocket(path, None, None)
    first.close()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    second.close()
    assert not path.exists()


def test_one_that_was_handed_on(tmp_path: Path) -> None:
    """The successor removes it at its end, as if it were its own; but not what has taken its place."""
    path = tmp_path / "agent.sock"
    for replaced in (False, True):
        [(name, fd)] = AgentSocket(path, None, None).hand_over().items()
        assert "agent-own" == name
        successor = AgentSocket(path, None, fd)
        if replaced:
            path.rename(tmp_path / "old.sock")
            path.write_text("precious")
        successor.close()
        assert replaced is path.exists()


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the socket's place at once: its target keeps its mode."""
    target, path = tmp_path / "target", tmp_path / "agent.sock"
    target.write_text("precious")
    target.chmod(0o600)

    class Robbed(socket.socket):
        """Whose name is another file's as soon as it has one."""

        def bind(self, address: object) -> None:
            super().bind(str(address))
            path.unlink()
            path.symlink_to(target)

    monkeypatch.setattr(socket, "socket", Robbed)
    AgentSocket(path, None, None).close()
    assert 0o600 == target.stat().st_mode & 0o777
    assert "precious" == target.read_text()


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    """It is said, and the umask is what it was."""
    before = os.umask(0o027)
    try:
        with pytest.raises(Unavailable, match="cannot listen on"):
            AgentSocket(tmp_path / "nowhere" / "agent.sock", None, None)
    finally:
        after = os.umask(before)
    assert 0o027 == after
