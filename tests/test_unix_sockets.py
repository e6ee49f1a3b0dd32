# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets are looked at without being touched, and the kernel's tables are read right."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd import unix_sockets
from qrapd.unix_sockets import (
    Kind,
    Socket,
    dump_sockets,
    find_holders,
    find_programs,
    is_locked,
    lock_path,
    look_at,
    match,
    parse_diag,
    parse_proc_net_unix,
    peer_credentials,
    read_program,
)
from support import NOBODY, open_directory


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path short enough for a socket's address, where any user may make one."""
    with open_directory() as directory:
        directory.chmod(0o777)
        yield directory


def listen(stack: ExitStack, path: Path, backlog: int = 5) -> socket.socket:
    """A listener that does not accept by itself."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def connect(stack: ExitStack, path: Path) -> socket.socket:
    """A client."""
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(str(path))
    return client


@pytest.fixture(params=["UNIX_DIAG", "/proc/net/unix"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of the kernel's tables."""
    if request.param != "UNIX_DIAG":

        def refuse(names: object) -> None:
            raise PermissionError

        monkeypatch.setattr(unix_sockets, "_dump_by_netlink", refuse)
    return str(request.param)


def test_every_kind_is_told(place: Path, table: str) -> None:
    """What listens, what does not any more, what is no stream, and what is not there."""
    with ExitStack() as stack:
        listener = listen(stack, place / "listens")
        listen(stack, place / "stale").close()
        datagram = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        datagram.bind(str(place / "datagram"))
        (place / "file").touch()
        names = ["listens", "stale", "datagram", "file", "absent", "file/below"]
        seen = look_at([str(place / name) for name in names])
        kinds = [Kind.LISTENING, Kind.STALE, Kind.OTHER, Kind.OTHER, Kind.ABSENT, Kind.ABSENT]
        assert kinds == [each.kind for each in seen]
        assert os.fstat(listener.fileno()).st_ino == seen[0].inode
        assert os.geteuid() == seen[0].owner
        assert (os.geteuid() if table == "UNIX_DIAG" else None) == seen[0].uid
        assert not seen[0].taken


def test_clients_are_seen(place: Path, table: str) -> None:
    """One that waits to be accepted, one that was, and one that has left while nobody noticed."""
    path = place / "socket"
    with ExitStack() as stack:
        listener = listen(stack, path)
        client = connect(stack, path)
        if table == "UNIX_DIAG":  # the other one does not know of the queue
            assert (1, 0) == look_at([str(path)])[0][-3:-1]
        server = stack.enter_context(listener.accept()[0])
        assert (0, 1) == look_at([str(path)])[0][-3:-1]
        client.close()
        assert look_at([str(path)])[0].taken
        server.close()
        assert not look_at([str(path)])[0].taken


def test_looking_does_not_touch(place: Path) -> None:
    """The listener is not connected to, and reads nothing."""
    with ExitStack() as stack:
        listener = listen(stack, place / "socket")
        listener.setblocking(False)
        look_at([str(place / "socket")])
        unix_sockets._ask_by_datagram(str(place / "socket"))
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_listener_of_a_replaced_file_is_another(place: Path) -> None:
    """Who listens on a file that was unlinked does not listen on the next file of that name."""
    path = place / "socket"
    with ExitStack() as stack:
        listen(stack, path)
        path.rename(place / "moved")
        new = listen(stack, path)
        assert os.fstat(new.fileno()).st_ino == look_at([str(path)])[0].inode


def test_another_spelling_of_a_path_is_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that bound a relative path, and one that is reached by a symbolic link of its directory."""
    monkeypatch.chdir(place)
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    with ExitStack() as stack:
        listen(stack, Path("real/socket"))
        assert Kind.LISTENING is look_at([str(place / "link" / "socket")])[0].kind


def test_a_listener_of_another_network_namespace_is_hidden(place: Path) -> None:
    """It is not in the table, but it is there; nobody is disturbed by finding that out."""
    path = place / "socket"
    code = "import socket,sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); input()"
    # Without root a user namespace comes with it.
    options = ["--net"] if os.geteuid() == 0 else ["--user", "--net"]
    command = ["unshare", *options, sys.executable, "-I", "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                pytest.skip("no namespaces here")
            assert Kind.HIDDEN is look_at([str(path)])[0].kind
        finally:
            process.kill()
    assert Kind.STALE is look_at([str(path)])[0].kind


def test_the_same_path_in_another_mount_namespace_is_another(place: Path) -> None:
    """Each has a /tmp of its own, where the first files have the same inodes; only the device tells them apart."""
    path = place / "s"
    with ExitStack() as stack:
        listen(stack, path)
        status = path.stat()
        device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
        inode = status.st_ino & 0xFFFFFFFF
        ours = Socket(os.fsencode(path), 1, True, (device, inode), None, 0, 0)
        theirs = ours._replace(inode=2, file=(device + 1, inode))
        client = theirs._replace(inode=3, listening=False)
        found = match(str(path), status, [theirs, ours, client])
        assert (Kind.LISTENING, 1, False) == (found.kind, found.inode, found.taken)
        # Where no device fits, the name has to do: btrfs.
        found = match(str(path), status, [theirs, client])
        assert (Kind.LISTENING, 2, True) == (found.kind, found.inode, found.taken)


def test_both_tables_tell_the_same(place: Path) -> None:
    """Of 50 listeners, each with a client."""
    paths = [place / f"passt_{n}.socket" for n in range(50)]
    with ExitStack() as stack:
        for path in paths:
            listener = listen(stack, path)
            connect(stack, path)
            stack.enter_context(listener.accept()[0])
        by_diag = dump_sockets([str(path) for path in paths])
        names = {path.name.encode() for path in paths}
        by_proc = list(parse_proc_net_unix(Path("/proc/net/unix").read_bytes(), names))
    # Other tests have sockets of these names in other directories, at the same time.
    ours = [sorted(each[:3] for each in table if bytes(place) in each.name) for table in (by_diag, by_proc)]
    assert 100 == len(ours[0])
    assert ours[0] == ours[1]


def test_a_look_at_all_candidates_is_quick(place: Path) -> None:
    """A look at 99 listeners costs about a millisecond of this process's time; room for a busy host here."""
    paths = [str(place / f"passt_{n}.socket") for n in range(1, 100)]
    with ExitStack() as stack:
        for path in paths:
            listen(stack, Path(path))
        before = time.process_time()
        for _ in range(10):
            look_at(paths)
        assert time.process_time() - before < 10 * 0.02


def attribute(kind: int, payload: bytes) -> bytes:
    """A netlink attribute with its padding."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def message(kind: int, body: bytes) -> bytes:
    """A netlink message with its padding."""
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def test_a_dump_is_parsed() -> None:
    """A listener, a socket without a name, one of another name; then the end."""
    listener = struct.pack("=BBBxI2I", 1, 1, 10, 4711, 0, 0)
    listener += attribute(0, b"/tmp/x\0") + attribute(1, struct.pack("=II", 8, 9))
    listener += attribute(4, struct.pack("=II", 3, 128)) + attribute(7, struct.pack("=I", 1000))
    nameless = struct.pack("=BBBxI2I", 1, 1, 1, 4712, 0, 0)
    other = struct.pack("=BBBxI2I", 1, 1, 10, 4713, 0, 0) + attribute(0, b"/tmp/y\0")
    data = b"".join(message(20, body) for body in (listener, nameless, other))
    expected = unix_sockets.Socket(b"/tmp/x", 4711, True, (9, 8), None, 3, 1000)
    assert ([expected], False) == parse_diag(data, {b"x"})
    assert ([], True) == parse_diag(message(3, bytes(4)), {b"x"})


def test_a_refused_dump_says_so() -> None:
    """The kernel's error comes out as it is."""
    with pytest.raises(PermissionError):
        parse_diag(message(2, struct.pack("=i", -13)), {b"x"})


@given(st.binary(max_size=200), st.binary(max_size=8))
def test_any_dump_is_parsed_or_refused(data: bytes, name: bytes) -> None:
    """No bytes make it hang, and none raise anything but OSError or struct.error."""
    try:
        parse_diag(data, {name})
    except (OSError, struct.error):
        return


def test_names_with_odd_characters_are_parsed() -> None:
    """Blanks in a path, abstract names and lines without a name."""
    text = (
        b"Num       RefCount Protocol Flags    Type St Inode Path\n"
        b"0000000000000000: 00000002 00000000 00010000 0001 01   123 /tmp/a b\n"
        b"0000000000000000: 00000003 00000000 00000000 0001 03 12345 /tmp/a b\n"
        b"0000000000000000: 00000003 00000000 00000000 0001 03 12346\n"
        b"0000000000000000: 00000002 00000000 00010000 0001 01 12347 @/tmp/a b\n"
        b"0000000000000000: 00000002 00000000 00010000 0005 01 12348 /tmp/a b\n"
    )
    found = parse_proc_net_unix(text, {b"a b"})
    assert [(123, True), (12345, False)] == [(each.inode, each.listening) for each in found]


def test_a_lock_is_had_once(place: Path) -> None:
    """By whoever comes first, until the socket is closed."""
    status = place.stat()
    file = (status.st_dev, status.st_ino)
    assert not is_locked(file)
    first = lock_path(file)
    assert first is not None
    assert lock_path(file) is None
    assert is_locked(file)
    first.close()
    assert not is_locked(file)
    second = lock_path(file)
    assert second is not None
    second.close()


def test_processes_are_told_by_name() -> None:
    """This one, with its command line and the time of its start; and none that is not there."""
    ours = read_program(os.getpid())
    assert ours is not None
    assert ours in [program._replace(started=ours.started) for program in find_programs(ours.name)]
    assert ours.arguments == tuple(Path("/proc/self/cmdline").read_text().removesuffix("\0").split("\0"))
    assert ours.started <= time.time() + 0.1
    assert read_program(2**22 + 1) is None  # above the highest that Linux gives: proc_sys_kernel(5), pid_max


def test_holders_are_found(place: Path) -> None:
    """The process that has a listener, by its inode, where its fds may be read."""
    with ExitStack() as stack:
        listener = listen(stack, place / "socket")
        inode = os.fstat(listener.fileno()).st_ino
        found = dict(filter(None, find_holders([inode], "no such name", {os.geteuid(), 0})))
        assert os.getpid() == found[inode].pid
        ours = read_program(os.getpid())
        assert ours is not None
        assert [inode] == [each[0] for each in filter(None, find_holders([inode], ours.name, ()))]
        assert [] == list(filter(None, find_holders([inode], "no such name", ())))
    assert [] == list(filter(None, find_holders([inode], ours.name, {os.geteuid()})))


def test_the_listener_of_a_connection_is_known(place: Path) -> None:
    """By pid and uid."""
    with ExitStack() as stack:
        listen(stack, place / "socket")
        assert (os.getpid(), os.geteuid()) == peer_credentials(connect(stack, place / "socket"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as another user")
def test_the_user_of_a_listener_is_seen(place: Path) -> None:
    """Without connecting to it."""
    path = place / "socket"
    code = "import socket,sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); input()"
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*become, "/usr/bin/python3", "-I", "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            seen = look_at([str(path)])[0]
        finally:
            process.kill()
    assert (Kind.LISTENING, NOBODY, NOBODY) == (seen.kind, seen.owner, seen.uid)
