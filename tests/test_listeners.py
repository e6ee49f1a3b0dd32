# SPDX-License-Identifier: GPL-2.0-or-later
"""A new listener on one of the paths is noticed as it comes, whatever becomes of the directories meanwhile."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import inotify_simple
import pytest

from probe_arena import LISTEN, Arena, open_arena
from qrapd import unix_sockets
from qrapd.listeners import ListenerWatch, find_steps
from qrapd.probe import claim
from qrapd.unix_sockets import Kind, Sighting, look_at
from support import NOBODY, PATIENCE


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Paths of this test's own, and what listens there."""
    with open_arena() as arena:
        yield arena


@pytest.fixture
def listen() -> Iterator[Callable[[Path | str], socket.socket]]:
    """Listens on a path until the end of the test."""
    with ExitStack() as stack:

        def listen(path: Path | str) -> socket.socket:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
            return listener

        yield listen


Listen = Callable[[Path | str], socket.socket]


QUEUE_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")


def expect_silence(words: str) -> None:
    """For ``say``: nothing is to be said."""
    pytest.fail(words)


def watch(*paths: Path | str, allowed: set[int] | None = None) -> ListenerWatch:
    """A watch with which nothing goes wrong."""
    return ListenerWatch([str(path) for path in paths], allowed=allowed, say=expect_silence)


async def news(watching: ListenerWatch) -> str:
    """What it tells, with a deadline."""
    with anyio.fail_after(PATIENCE):
        return await watching.wait()


async def no_news(watching: ListenerWatch) -> bool:
    """Whether it tells nothing within 0.2 s: with what has happened before, it would have at once."""
    with anyio.move_on_after(0.2):
        await watching.wait()
        return False
    return True


async def notices(watching: ListenerWatch, cause: Callable[[], object]) -> str:
    """What it tells if ``cause`` is called while it waits."""
    told: list[str] = []

    async def wait() -> None:
        told.append(await news(watching))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert [] == told
        cause()
    return told[0]


@pytest.mark.parametrize(
    "options", [[], ["--one-off"], ["--pid"]], ids=["persistent", "one-off", "background"]
)
async def test_a_new_passt_is_noticed_and_can_be_claimed(arena: Arena, options: list[str]) -> None:
    """It listens by then, which its file's being there does not mean."""
    with watch(*arena.paths) as watching:
        told = await notices(watching, lambda: arena.passt(7, options=options))
        assert arena.path(7) == told
        found = await claim(arena.paths)
        assert arena.path(7) == found.path
        found.socket.close()
        assert await no_news(watching)


async def test_a_passt_that_is_replaced(arena: Arena) -> None:
    """It never removes its socket's file; the next one does, and makes another one."""
    (first,) = arena.passt(1)
    with watch(arena.path(1)) as watching:
        assert await no_news(watching)
        first.close()
        assert await no_news(watching)
        assert arena.path(1) == await notices(watching, lambda: arena.passt(1))


async def test_what_came_between_entering_and_waiting(place: Path, listen: Listen) -> None:
    """The caller has tried in vain meanwhile."""
    with watch(place / "a", place / "b") as watching:
        listen(place / "b")
        assert str(place / "b") == await news(watching)
        assert await no_news(watching)


async def test_a_socket_that_listens_later(place: Path) -> None:
    """Whether its file came to be before the watch or after it; until it listens, nothing is told."""
    with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
        early.bind(str(place / "early"))
        with watch(place / "early", place / "late") as watching:
            early.listen()
            assert str(place / "early") == await news(watching)
            late.bind(str(place / "late"))
            assert await no_news(watching)
            late.listen()
            assert str(place / "late") == await news(watching)


async def test_no_news_is_lost_by_a_cancellation(place: Path) -> None:
    """The caller waits with a deadline, tries, and waits again."""
    with socket.socket(socket.AF_UNIX) as listener, watch(place / "a") as watching:
        listener.bind(str(place / "a"))
        assert await no_news(watching)
        listener.listen()
        assert str(place / "a") == await news(watching)


async def test_other_files_are_no_news(place: Path, listen: Listen) -> None:
    """Nor is a file, a directory or a socket nobody listens on at the path itself."""
    with watch(place / "a", place / "b", place / "c") as watching:
        listen(place / "d")
        (place / "a").touch()
        (place / "b").mkdir()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(place / "c"))
        assert await no_news(watching)


async def test_directories_that_are_not_there_yet(place: Path, listen: Listen) -> None:
    """Made one after the other, or all with the socket in them before anybody can look."""
    path = place / "run" / "passt" / "a.socket"
    with watch(path) as watching:
        path.parent.parent.mkdir()
        assert await no_news(watching)
        path.parent.mkdir()
        assert str(path) == await notices(watching, lambda: listen(path))
    path = place / "later" / "passt" / "a.socket"
    with watch(path) as watching:
        path.parent.mkdir(parents=True)
        listen(path)
        assert str(path) == await news(watching)


async def test_directories_that_are_removed_and_made_again(place: Path, listen: Listen) -> None:
    """More than once, and also when another one takes its place by renaming."""
    path = place / "run" / "passt" / "a"
    path.parent.mkdir(parents=True)
    with watch(path) as watching:
        for _ in range(3):
            path.parent.rmdir()
            path.parent.parent.rmdir()
            path.parent.mkdir(parents=True)
            assert str(path) == await notices(watching, lambda: listen(path))
            path.unlink()
        other = place / "other" / "passt"
        other.mkdir(parents=True)
        listen(other / "a")
        path.parent.rmdir()
        path.parent.parent.rmdir()
        assert await no_news(watching)
        assert str(path) == await notices(watching, lambda: other.parent.rename(path.parent.parent))


async def test_symbolic_links(place: Path, listen: Listen) -> None:
    """On the way and at its end; also one that comes to point somewhere else."""
    for name in ("one", "two", "three"):
        (place / name).mkdir()
    (place / "link").symlink_to("one")
    path = place / "link" / "a"
    with watch(path) as watching:
        assert str(path) == await notices(watching, lambda: listen(place / "one" / "a"))
        listen(place / "two" / "a")
        (place / "new").symlink_to(place / "two")
        assert str(path) == await notices(watching, lambda: (place / "new").rename(place / "link"))
        (place / "two" / "a").unlink()
        (place / "two" / "a").symlink_to("../three/b")
        assert str(path) == await notices(watching, lambda: listen(place / "three" / "b"))


async def test_rights_that_are_given_later(place: Path, listen: Listen) -> None:
    """Of the file: nobody could have connected before."""
    listen(place / "a")
    (place / "a").chmod(0)
    with watch(place / "a") as watching:
        assert await no_news(watching)
        assert str(place / "a") == await notices(watching, lambda: (place / "a").chmod(0o777))


async def test_a_queue_that_overflows(place: Path, listen: Listen) -> None:
    """What was lost is looked for; who listened before is no news."""
    limit = int(QUEUE_LIMIT.read_text())  # noqa: ASYNC240 - of procfs
    listen(place / "old")
    with watch(place / "new", place / "old") as watching:
        for turn in range(limit // 2 + 1):  # two events in a row that are the same would be one
            (place / f"x{turn % 2}").touch()
            (place / f"x{turn % 2}").unlink()
            (place / f"y{turn % 2}").touch()
            (place / f"y{turn % 2}").unlink()
        listen(place / "new")
        assert str(place / "new") == await news(watching)
        assert await no_news(watching)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as another user")
async def test_users_who_are_not_trusted_wake_nobody(arena: Arena) -> None:
    """However many sockets they make in a directory of all; the others do."""
    user = NOBODY - 2000
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    with watch(*arena.paths, allowed={os.geteuid(), NOBODY}) as watching:
        arena.program(*become, "/usr/bin/python3", "-I", "-c", LISTEN, n=1)
        assert await no_news(watching)
        arena.passt(2)
        assert arena.path(2) == await news(watching)
    with watch(*arena.paths, allowed={user}) as watching:
        arena.program(*become, "/usr/bin/python3", "-I", "-c", LISTEN, n=3)
        assert arena.path(3) == await news(watching)


async def test_a_listener_of_another_network_namespace(
    place: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it listens cannot be seen: it is told of after a moment in which it will have begun to."""

    def look(paths: list[str]) -> list[Sighting]:
        seen = look_at(paths)
        return [each._replace(kind=Kind.HIDDEN) if each.kind is Kind.LISTENING else each for each in seen]

    monkeypatch.setattr(unix_sockets, "look_at", look)
    with watch(place / "a") as watching:
        listen(place / "a")
        assert str(place / "a") == await news(watching)
        assert await no_news(watching)


async def test_sockets_that_cannot_be_looked_at(
    place: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of an fd, say: it is tried again, and nothing fails."""
    failures = 3

    def look(paths: list[str]) -> list[Sighting]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return look_at(paths)

    monkeypatch.setattr(unix_sockets, "look_at", look)
    with watch(place / "a") as watching:
        listen(place / "a")
        assert str(place / "a") == await news(watching)


async def test_no_inotify_to_be_had(place: Path, listen: Listen) -> None:
    """It is told once, with the limit's name, and the caller's own delays have to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said: list[str] = []
    with socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), hard))
        try:
            watching = ListenerWatch([str(place / "a")], say=said.append).__enter__()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    listen(place / "a")
    assert await no_news(watching)
    watching.__exit__()
    assert 1 == len(said)
    assert (
        "by the next attempt only: Too many open files (inotify(7): fs.inotify.max_user_instances)" in said[0]
    )


async def test_no_watch_to_be_had(place: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last directory is what matters; what is missing is told once."""

    def add_watch(_: object, path: str, __: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(inotify_simple.INotify, "add_watch", add_watch)
    said: list[str] = []
    with ListenerWatch([str(place / "a"), str(place / "b")], say=said.append):
        assert 1 == len(said)
        assert f"{place}: No space left on device (inotify(7): fs.inotify.max_user_watches)" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and come back")
async def test_directories_that_may_not_be_read(place: Path, listen: Listen) -> None:
    """One on the way is nothing to tell of; the last one is, and both may be replaced by one that can be read."""
    (place / "closed" / "open").mkdir(parents=True)
    (place / "closed").chmod(0o711)
    (place / "last").mkdir(mode=0o711)
    said: list[str] = []
    os.seteuid(NOBODY)
    try:
        with ListenerWatch(
            [str(place / "closed" / "open" / "a"), str(place / "last" / "b")], say=said.append
        ) as watching:
            assert 1 == len(said)
            assert f"{place / 'last'}: Permission denied (inotify(7))" in said[0]
            os.seteuid(0)
            listen(place / "closed" / "open" / "a").fileno()
            assert str(place / "closed" / "open" / "a") == await news(watching)
            (place / "last").chmod(0o755)
            os.seteuid(NOBODY)
            assert await no_news(watching)
            os.seteuid(0)
            listen(place / "last" / "b")
            os.seteuid(NOBODY)
            assert str(place / "last" / "b") == await news(watching)
    finally:
        os.seteuid(0)


def test_nothing_stays_open(place: Path) -> None:
    """Neither after it was left nor if it never came to be."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with watch(place / "a"):
            pass
    assert before == len(list(Path("/proc/self/fd").iterdir()))


def test_watches_do_not_pile_up(place: Path) -> None:
    """Of directories that nothing leads through any more."""
    (place / "0").mkdir()
    (place / "link").symlink_to("0")
    with watch(place / "link" / "a") as watching:
        assert watching._inotify is not None

        def count() -> int:
            assert watching._inotify is not None
            info = Path(f"/proc/self/fdinfo/{watching._inotify.fileno()}").read_text()
            return info.count("inotify wd:")

        before = count()
        for n in range(1, 4):
            (place / f"{n}").mkdir()
            (place / "new").symlink_to(f"{n}")
            (place / "new").rename(place / "link")
            watching._read_events()
            assert before == count()


def test_the_steps_of_a_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each directory with the name that leads on, through links, up to what is not there."""
    top = list(find_steps(str(place)))
    (place / "real" / "deep").mkdir(parents=True)
    (place / "link").symlink_to(place / "real" / "deep")
    (place / "loop").symlink_to("loop")
    (place / "file").touch()
    here, real = str(place), str(place / "real")
    inside = [(real, "deep"), (f"{real}/deep", "a")]
    assert [*top, (here, "link"), *top, (here, "real"), *inside] == list(find_steps(f"{here}/link/a"))
    assert [*top, (here, "real"), *inside] == list(find_steps(f"{here}//real/./deep/a"))
    assert [*top, (here, "link"), *top, (here, "real"), (real, "deep"), (real, "b")] == list(
        find_steps(f"{here}/link/../b")
    )
    assert [*top, (here, "absent")] == list(find_steps(f"{here}/absent/a/b"))
    assert [*top, (here, "file"), (f"{here}/file", "a")] == list(find_steps(f"{here}/file/a"))
    assert {*top, (here, "loop")} == set(find_steps(f"{here}/loop/a"))
    monkeypatch.chdir(place)
    assert list(find_steps(f"{here}/real/a")) == list(find_steps("real/a"))


def test_a_relative_path_is_told_as_it_was_given(
    place: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own length counts, not that of the directory before it."""
    deep = place / ("d" * 120)
    deep.mkdir()
    monkeypatch.chdir(deep)

    async def main() -> None:
        with watch("a") as watching:
            listen("a")
            assert "a" == await news(watching)

    anyio.run(main)


def test_only_those_who_need_it_import_it() -> None:
    """A supervisor whose passts are all its own does not: it takes 7 ms."""
    script = "import sys, qrapd.supervisor; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    assert {"qrapd.link"} == {"qrapd.link", "qrapd.listeners", "inotify_simple"} & set(modules)
