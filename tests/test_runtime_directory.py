# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's runtime directory: one owner at a time, closed to others, gone afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from qrapd import runtime_directory
from qrapd.errors import AlreadySupervised, ExitStatus, Unavailable
from qrapd.runtime_directory import SOCKETS, SUN_PATH_MAX, VmDirectory, clear_up, default_base
from support import NOBODY

# A process that claims and releases as often as it can. Inside it makes a file that must not be there yet:
# two who hold the directory at the same time would find each other's.
CONTENDER = """
import os, sys, time
from pathlib import Path
from qrapd.errors import AlreadySupervised
from qrapd.runtime_directory import VmDirectory

base, until, claims = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < until:
    try:
        with VmDirectory(base, "web").claim() as directory:
            os.close(os.open(base / "held", os.O_CREAT | os.O_EXCL))
            assert directory.path.is_dir()
            directory.record_path.touch()
            os.unlink(base / "held")
            claims += 1
    except AlreadySupervised:
        pass
print(claims)
"""


@pytest.mark.parametrize(
    ("environment", "uid", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/a", "XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/a"),
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b"}, 1000, "/run/a"),
        ({"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/qrapd"),
        ({}, 0, "/run/qrapd"),
        ({"XDG_RUNTIME_DIR": "/run/user/1000"}, 1000, "/run/user/1000/qrapd"),
    ],
)
def test_default_bases(environment: Mapping[str, str], uid: int, expected: str) -> None:
    """systemd's word first, then root's place, then the user's."""
    assert Path(expected) == default_base(environment, uid)


@pytest.mark.parametrize("environment", [{}, {"XDG_RUNTIME_DIR": ""}])
def test_no_base_is_an_error_with_a_way_out(environment: Mapping[str, str]) -> None:
    """A user without a session is told how to name a place."""
    with pytest.raises(Unavailable, match="XDG_RUNTIME_DIR is not set") as caught:
        default_base(environment, 1000)
    assert "--runtime-dir" in str(caught.value.hint)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_claimed_directory_is_closed_to_others(tmp_path: Path, umask: int) -> None:
    """Mode 0700 whatever the umask, also where the directory was there before, wider."""
    (tmp_path / "old").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        for name in ("new", "old"):
            with VmDirectory(tmp_path, name).claim() as directory:
                assert 0o700 == stat.S_IMODE(directory.path.stat().st_mode)
    finally:
        os.umask(before)


def test_nothing_is_left(tmp_path: Path) -> None:
    """Lock, record and sockets go with the directory; the base stays."""
    base = tmp_path / "a" / "b"
    with VmDirectory(base, "web").claim() as directory:
        for name in SOCKETS:
            directory.listen(name).close()
        directory.record_path.touch()
        (directory.path / "record.new").touch()
        assert {"lock", "record.json", "record.new", *SOCKETS} == {
            path.name for path in directory.path.iterdir()
        }
    assert [] == list(base.iterdir())


def test_it_is_removed_after_a_failure_too(tmp_path: Path) -> None:
    """An exception inside goes through and leaves nothing."""
    with pytest.raises(ZeroDivisionError), VmDirectory(tmp_path, "web").claim():
        _ = 1 / 0
    assert [] == list(tmp_path.iterdir())


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    """Files that are not ours are not removed, nor is a directory that has one of our names."""
    with VmDirectory(tmp_path, "web").claim() as directory:
        (directory.path / "notes").touch()
        (directory.path / "control.sock").mkdir()
    assert {"notes", "control.sock"} == {path.name for path in directory.path.iterdir()}
    with VmDirectory(tmp_path, "web").claim():  # and are in nobody's way
        pass


def test_left_as_it_is(tmp_path: Path) -> None:
    """What a QEMU that still runs needs stays; the lock is free for the next."""
    with VmDirectory(tmp_path, "web").claim() as directory:
        directory.record_path.touch()
        directory.leave_as_it_is()
    assert directory.record_path.exists()
    with VmDirectory(tmp_path, "web").claim():
        pass
    assert [] == list(tmp_path.iterdir())


def test_a_second_claim_is_refused(tmp_path: Path) -> None:
    """In one process as from another; the refused one harms nothing, and another name is free."""
    with VmDirectory(tmp_path, "web").claim() as directory:
        directory.record_path.touch()
        with pytest.raises(AlreadySupervised) as caught, VmDirectory(tmp_path, "web").claim():
            pass
        assert 75 == caught.value.exit_status.value
        assert str(directory.path / "lock") in caught.value.message
        assert "0\n" == contend(tmp_path, seconds=0.01, count=1)[0]
        assert directory.record_path.exists()
        with VmDirectory(tmp_path, "db").claim():
            pass
    with VmDirectory(tmp_path, "web").claim():
        pass


def test_a_lock_that_was_left_is_no_obstacle(tmp_path: Path) -> None:
    """A killed supervisor leaves its files; the kernel frees its lock."""
    (tmp_path / "web").mkdir()
    for name in ("lock", "record.json", *SOCKETS):
        (tmp_path / "web" / name).touch()
    with VmDirectory(tmp_path, "web").claim() as directory:
        assert directory.record_path.exists()  # for the new supervisor to read
    assert [] == list(tmp_path.iterdir())


def test_no_two_ever_hold_the_same_directory(tmp_path: Path) -> None:
    """Eight processes that claim and release without a pause get in each other's way only as they should."""
    counts = [int(words) for words in contend(tmp_path, seconds=1.0, count=8)]
    assert sum(counts) > 8
    assert [] == list(tmp_path.iterdir())


def contend(base: Path, *, seconds: float, count: int) -> list[str]:
    """What so many contenders print. One that fails says on stderr why, and fails the test."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(base), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    try:
        answers = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [0] * count == [child.returncode for child in children]
    return answers


# ---- who only looks

# Holds a VM's directory until its stdin ends; before that, says what its pid is to itself.
HOLDER = """
import os, sys
from pathlib import Path
from qrapd.runtime_directory import VmDirectory

with VmDirectory(Path(sys.argv[1]), "web").claim():
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""

LOOKER = """
import sys
from pathlib import Path
from qrapd.runtime_directory import VmDirectory

print(VmDirectory(Path(sys.argv[1]), "web").supervisor_pid())
"""


@contextlib.contextmanager
def holder(base: Path, *before: str) -> Iterator[tuple[int, int]]:
    """A process that holds a directory: its pid for this process, and for itself."""
    with subprocess.Popen(
        [*before, sys.executable, "-c", HOLDER, str(base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            said = int(child.stdout.readline())
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            yield int(children[0]) if before else child.pid, said
        finally:
            child.stdin.close()
            child.wait(30)


@pytest.fixture
def in_pid_namespace() -> list[str]:
    """What runs a command in a PID namespace of its own, as a container does."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("this kernel lets this user make no PID namespace")
    return command


def test_who_supervises(tmp_path: Path) -> None:
    """The pid of another process as of this one; nobody before, after, and where a killed one has left its files."""
    directory = VmDirectory(tmp_path, "web")

    def both() -> tuple[int | None, int | None]:
        return directory.supervisor_pid(), directory.glance()

    assert (None, None) == both()
    with holder(tmp_path) as (pid, _):
        assert (pid, pid) == both()
    assert (None, None) == both()
    with VmDirectory(tmp_path, "web").claim() as claimed:
        assert (os.getpid(), os.getpid()) == both()
        (directory.path / "lock").write_text("")  # as on a full /run
        assert (os.getpid(), 0) == both()
        claimed.leave_as_it_is()
    assert (directory.path / "lock").exists()
    assert (None, None) == both()


def test_a_supervisor_in_a_namespace(tmp_path: Path, in_pid_namespace: list[str]) -> None:
    """It takes itself for another than it is: a signal to the pid that it wrote down would go to a stranger."""
    with holder(tmp_path, *in_pid_namespace) as (pid, said):
        assert pid != said
        assert str(said) == (tmp_path / "web/lock").read_text().strip()
        assert pid == VmDirectory(tmp_path, "web").supervisor_pid()


def test_a_supervisor_outside_of_the_namespace(tmp_path: Path, in_pid_namespace: list[str]) -> None:
    """It is there, and has no pid in here: neither a wrong one nor nobody is the answer."""
    command = [*in_pid_namespace, sys.executable, "-c", LOOKER, str(tmp_path)]
    with VmDirectory(tmp_path, "web").claim():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "PermissionError" in done.stderr
        assert "another PID namespace" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "None\n" == done.stdout


@pytest.mark.parametrize("missing", ["/proc/locks", "/proc/self/mountinfo", "/proc/self/fdinfo/"])
def test_the_kernel_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """As with ProcSubset=pid: what the supervisor wrote down has to do."""
    read = runtime_directory._read

    def refuse(path: str) -> list[str]:
        if path.startswith(missing):
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(runtime_directory, "_read", refuse)
    with VmDirectory(tmp_path, "web").claim() as directory:
        (directory.path / "lock").write_text("4711\n")
        assert 4711 == VmDirectory(tmp_path, "web").supervisor_pid()
        (directory.path / "lock").write_text("")  # not yet written
        assert VmDirectory(tmp_path, "web").supervisor_pid() is None
        directory.leave_as_it_is()
    assert VmDirectory(tmp_path, "web").supervisor_pid() is None


def test_who_looks_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who looks just then is waited for; one who looks for ever is not."""
    directory = VmDirectory(tmp_path, "web")
    directory.path.mkdir()
    looking = os.open(directory.path / "lock", os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(looking, fcntl.LOCK_SH)
    with pytest.raises(AlreadySupervised), directory.claim():
        pass
    monkeypatch.setattr(runtime_directory, "PATIENCE", 30.0)
    done = threading.Timer(0.05, os.close, [looking])
    done.start()
    try:
        with directory.claim():
            pass
    finally:
        done.join()


@pytest.mark.parametrize("how", [VmDirectory.supervisor_pid, VmDirectory.glance])
def test_no_look_hinders_a_claim(tmp_path: Path, how: Callable[[VmDirectory], int | None]) -> None:
    """While others look all the time, every claim succeeds."""
    stop = threading.Event()
    faults: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                assert how(VmDirectory(tmp_path, "web")) in (None, 0, os.getpid())
        except BaseException as error:
            faults.append(error)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for each in lookers:
        each.start()
    try:
        for _ in range(500):
            with VmDirectory(tmp_path, "web").claim():
                pass
    finally:
        stop.set()
        for each in lookers:
            each.join()
    assert [] == faults


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "link", "dangling link"])
def test_what_is_no_lock(place: Path, kind: str) -> None:
    """Root looks into directories of users: nothing that they put there holds it up, or leads it elsewhere."""
    lock = place / "web/lock"
    lock.parent.mkdir()
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            os.mkfifo(lock)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(lock))
        elif kind == "directory":
            lock.mkdir()
        else:
            target = place / "elsewhere"
            lock.symlink_to(target)
            if kind == "link":
                target.write_text("1\n")
                fcntl.flock(stack.enter_context(target.open()), fcntl.LOCK_EX)
        assert VmDirectory(place, "web").supervisor_pid() is None
        if kind == "link":
            with pytest.raises(Unavailable), VmDirectory(place, "web").claim():
                pass
            assert "1\n" == target.read_text()


def test_a_path_that_is_too_long_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Both numbers are named; the longest path that serves is served."""
    longest = max(SOCKETS, key=len)
    room = SUN_PATH_MAX - len(os.fsencode(tmp_path)) - len("/web/" + longest) - 1
    long_enough = tmp_path / ("x" * room)
    with VmDirectory(long_enough, "web").claim() as directory, directory.listen(longest) as listener:
        assert SUN_PATH_MAX == len(listener.getsockname())
    # In bytes, not in letters.
    too_long = tmp_path / ("x" * (room - 1) + "ß")
    with pytest.raises(Unavailable) as caught, VmDirectory(too_long, "web").claim():
        pass
    assert (
        f"has {SUN_PATH_MAX + 1} bytes, and a socket's path may have {SUN_PATH_MAX}" in caught.value.message
    )
    assert "--runtime-dir" in str(caught.value.hint)
    assert not too_long.exists()


def test_a_base_that_is_a_file(tmp_path: Path) -> None:
    """The system's own reason is quoted, and what to do; the file stays as it is."""
    (tmp_path / "file").touch(mode=0o644)
    for base, name in ((tmp_path / "file", "web"), (tmp_path, "file")):
        with (
            pytest.raises(Unavailable, match=r"^cannot .* directory") as caught,
            VmDirectory(base, name).claim(),
        ):
            pass
        assert "--runtime-dir" in str(caught.value.hint)
    assert 0o644 == stat.S_IMODE((tmp_path / "file").stat().st_mode)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Whoever can write in the base must not choose what is closed to others, and emptied, in our name."""
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/web").symlink_to(target)
    with pytest.raises(Unavailable), VmDirectory(tmp_path / "base", "web").claim():
        pass
    assert 0o755 == target.stat().st_mode & 0o777
    assert [] == list(target.iterdir())


def test_a_directory_of_someone_else(place: Path) -> None:
    """It is refused, and stays as it is."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that belongs to someone else")
    (place / "web").mkdir(mode=0o755)
    os.chown(place / "web", 65534, 65534)
    with pytest.raises(Unavailable, match="belongs to user 65534"), VmDirectory(place, "web").claim():
        pass
    assert 0o755 == (place / "web").stat().st_mode & 0o777


def test_a_base_that_one_may_not_write_in(place: Path, as_nobody: list[str]) -> None:
    """An unprivileged user is told where writing failed and what to do; status 69."""
    file = place / "web.toml"
    file.write_text('[qemu]\naccel = "tcg"\n')
    done = subprocess.run(
        [*as_nobody, "qrapd", "run", file, "--runtime-dir", place / "run", "--log-format", "console"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"cannot make the runtime directory {place}/run/web: Permission denied" in done.stderr
    assert "--runtime-dir" in done.stderr
    assert ExitStatus.UNAVAILABLE == done.returncode
    assert not (place / "run").exists()


def test_a_listening_socket_takes_connections_before_anyone_accepts(tmp_path: Path) -> None:
    """QEMU's clients wait for it instead of being refused; a socket that was left is replaced."""
    with VmDirectory(tmp_path, "web").claim() as directory:
        directory.listen("qmp.sock").close()
        with directory.listen("qmp.sock") as listener, socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(listener.getsockname())
            assert directory.socket_path("qmp.sock") == Path(listener.getsockname())


def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    """A directory that is gone: what was tried and what came back."""
    directory = VmDirectory(tmp_path, "web")
    with pytest.raises(Unavailable, match=r"cannot listen on .*qmp\.sock: No such file"):
        directory.listen("qmp.sock")


def test_a_relative_base_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU works in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "run" / "web" == VmDirectory(Path("run"), "web").path


# ---- what starts that were cut short have left


def of_a_start_cut_short(base: Path, name: str) -> Path:
    """A directory as a supervisor leaves it that is killed before there is a QEMU."""
    directory = base / name
    directory.mkdir(mode=0o700)
    (directory / "lock").write_text("4711\n")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(directory / "qmp.sock"))
    return directory


def test_what_is_cleared_up(place: Path) -> None:
    """What a start has left that was cut short, and nothing that is anybody's."""
    of_a_start_cut_short(place, "bare")
    (of_a_start_cut_short(place, "more") / "pesto0.sock").touch()
    (place / "more" / "record.new").touch()
    kept = {name: of_a_start_cut_short(place, name) for name in ("recorded", "guarded", "runs", "being-made")}
    (kept["recorded"] / "record.json").touch()
    (kept["guarded"] / "failed-starts").touch()
    (kept["being-made"] / "lock").write_text("")
    (place / "units").mkdir()
    (place / "link").symlink_to(kept["recorded"])
    (place / "agent.lock").touch()
    if os.geteuid() == 0:
        foreign = of_a_start_cut_short(place, "foreign")
        os.chown(foreign, NOBODY, NOBODY)
    (kept["runs"] / "qmp.sock").unlink()
    with socket.socket(socket.AF_UNIX) as qemu, VmDirectory(place, "supervised").claim():
        qemu.bind(str(kept["runs"] / "qmp.sock"))
        qemu.listen()
        before = {str(path) for path in place.glob("**/*")}
        clear_up(place)
        gone = before - {str(path) for path in place.glob("**/*")}
        assert {"bare", "more"} == {Path(path).relative_to(place).parts[0] for path in gone}
        assert {str(place / "bare"), str(place / "more")} <= gone
    clear_up(place / "nowhere")
