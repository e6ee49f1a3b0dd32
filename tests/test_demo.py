# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd demo``, as a newcomer runs it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from support import PATIENCE, fetch, processes_with

pytestmark = pytest.mark.guest


def test_the_whole_show_in_a_pipe(tmp_path: Path) -> None:
    """Lease, page and orderly end are shown; the status is 0, and nothing is left."""
    ended = subprocess.run(
        [sys.executable, "-m", "qrapd", "demo", "--runtime-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert (0, "") == (ended.returncode, ended.stderr)
    assert re.search(r"lease  eth0 \S+/\d+ router \S+ dns \S+", ended.stdout)
    assert re.search(r"GET http://127.0.0.1:\d+/ says 200", ended.stdout)
    assert "Hello from guest" in ended.stdout
    assert "ended  request, QEMU's exit status 0" in ended.stdout
    assert "demo --write web.toml" in ended.stdout.splitlines()[-1]
    assert [] == processes_with(str(tmp_path))
    assert [] == list((tmp_path / "run").iterdir())


def test_stay_on_a_terminal(tmp_path: Path) -> None:
    """A person sees progress while it boots; with --stay the guest can be visited until Ctrl-C, which ends all."""
    shown = pexpect.spawn(
        sys.executable,
        ["-m", "qrapd", "demo", "--stay", "--runtime-dir", str(tmp_path / "run")],
        timeout=PATIENCE,
        encoding="utf-8",
        dimensions=(40, 160),
    )
    try:
        shown.expect(r"\d+\.\d s  the guest boots")
        shown.expect(r"curl http://127.0.0.1:(\d+)/cgi-bin/state")
        assert shown.match is not None
        assert "nic=eth0" in fetch(int(shown.match[1]), "/cgi-bin/state")
        shown.sendintr()
        shown.expect("no process, socket or file is left")
        shown.expect(pexpect.EOF)
        shown.wait()
        assert 0 == shown.exitstatus
        assert [] == processes_with(str(tmp_path))
    finally:
        shown.close(force=True)


def test_a_guest_that_never_comes_up(tmp_path: Path) -> None:
    """A reset while it boots ends the guest: that is no success, and the last that was seen is told."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qrapd", "demo", "--runtime-dir", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "booting" not in process.stdout.readline():
            assert process.poll() is None
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(tmp_path / "run/demo/user-qmp.sock"))
            monitor.sendall(b'{"execute": "qmp_capabilities"} {"execute": "system_reset"}')
            _, words = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert 1 == process.returncode
    assert "ended before it answered" in words


def test_a_reader_that_leaves_early(tmp_path: Path) -> None:
    """As `head` does: the guest is ended, and nobody is shown a traceback."""
    command = [sys.executable, "-m", "qrapd", "demo", "--runtime-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, words = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert "" == words
    assert 0 == process.returncode
    assert [] == processes_with(str(tmp_path))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """passt's words and the hint reach the person, and the status is 69."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = subprocess.run(
            [sys.executable, "-m", "qrapd", "demo", "--port", str(listener.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    assert 69 == ended.returncode
    assert "passt ended at once" in ended.stderr
    assert "hint: see who has the port" in ended.stderr
    assert "Traceback" not in ended.stderr


def demo_writes(file: Path) -> subprocess.CompletedProcess[str]:
    """What `qrapd demo --write` does."""
    command = [sys.executable, "-m", "qrapd", "demo", "--write", str(file)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, check=False
    )


def test_a_file_for_the_guest(tmp_path: Path) -> None:
    """What was written is fine, and still boots after it was moved, as to /etc/qrapd/vms; what to type is told."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    made.mkdir()
    written = demo_writes(made / "web.toml")
    assert (0, "") == (written.returncode, written.stderr)
    assert f"qrapd run {made}/web.toml" in written.stdout
    made.rename(moved)
    file = moved / "web.toml"
    command = [sys.executable, "-m", "qrapd"]
    checked = subprocess.run(
        [*command, "check", str(file)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (0, "") == (checked.returncode, checked.stderr)
    assert f"{file}: fine (web: " in checked.stdout
    port = re.search(r"curl http://127.0.0.1:(\d+)/", written.stdout)
    assert port is not None
    process = subprocess.Popen(
        [*command, "run", str(file), "--runtime-dir", str(tmp_path / "run")],
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert "Hello from guest" in fetch(int(port[1]))
        process.terminate()
        assert 0 == process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert [] == processes_with(str(tmp_path))


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """Nothing of a person's is written over, and nothing beside it."""
    file = tmp_path / "web.toml"
    file.write_text("mine")
    written = demo_writes(file)
    assert (2, "") == (written.returncode, written.stdout)
    assert f"{file} is there already" in written.stderr
    assert ("mine", [file]) == (file.read_text(), list(tmp_path.iterdir()))


@pytest.mark.parametrize("name", ["Web.toml", "web.tml", "web"])
def test_a_file_that_cannot_be_one_of_a_vm(tmp_path: Path, name: str) -> None:
    """The agent would not take it."""
    written = demo_writes(tmp_path / name)
    assert 2 == written.returncode
    assert "those are NAME.toml" in written.stderr
    assert [] == list(tmp_path.iterdir())
