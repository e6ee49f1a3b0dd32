# SPDX-License-Identifier: GPL-2.0-or-later
"""Which passt is behind a socket is decided by names, command lines and times, without any process."""

from __future__ import annotations

import pytest

from qrapd.probe import Identity, identify, is_passt, read_command, sort_passts
from qrapd.probe.identity import UNKNOWN
from qrapd.unix_sockets import Kind, Program, Sighting
from support import NOBODY


def program(
    *arguments: str, name: str = "passt.avx2", pid: int = 1, started: float = 0.0, uid: int | None = None
) -> Program:
    """A process."""
    return Program(pid, name, arguments, started, uid)


COMMANDS = {
    "passt": (None, False, False, True),
    "passt -1": (None, True, False, True),
    "passt -f1s /a": ("/a", True, False, True),
    "passt -s/a -t 22": ("/a", False, False, True),
    "passt --socket=/a --one": ("/a", True, False, True),
    "passt --socket-path /a --vhost": ("/a", False, True, True),
    "passt -a 10.0.0.1 -t127.0.0.1/1": (None, False, False, True),
    "passt -F 3 -f": (None, False, False, False),
    "passt --fd 3": (None, False, False, False),
    "passt -s": ("", False, False, True),
    "passt --socket": (None, False, False, True),
}


@pytest.mark.parametrize(("line", "expected"), COMMANDS.items())
def test_command_lines_are_read(line: str, expected: tuple[object, ...]) -> None:
    """As getopt_long(3) would: abbreviations, values attached or not, several letters in one word."""
    assert expected == read_command(line.split())


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (program("/usr/bin/passt"), True),
        (program("passt", name="passt"), True),
        (program("python3", "/x/passt", "-1", name="python3"), True),
        (program(name="passt.avx2"), True),
        (program("passt-repair", "/x", name="passt-repair"), False),
        (program("pasta", name="pasta.avx2"), False),
        (program("vim", "a", "passt", name="vim"), False),
    ],
)
def test_passts_are_recognised(process: Program, expected: bool) -> None:
    """By the kernel's name, or as what an interpreter runs."""
    assert expected is is_passt(process)


def seen(path: str, made: float = 100.0) -> Sighting:
    """A listener."""
    return Sighting(path, Kind.LISTENING, file=(1, 2), made=made, inode=3)


def identity(sighting: Sighting, *passts: Program, holder: Program | None = None) -> Identity:
    """What :func:`identify` makes of these."""
    return identify(sighting, sort_passts(passts), holder)


def test_a_listener_is_identified_by_its_path() -> None:
    """The others do not matter."""
    passts = [program("passt", "-s", "/x/a", pid=7), program("passt", "-1", "-s", "/x/b", pid=8)]
    assert Identity(7, False, False, False, True) == identity(seen("/x/a"), *passts)
    assert Identity(8, True, False, True, True) == identity(seen("/x/b"), *passts)


def test_what_nobody_names_may_be_anything() -> None:
    """And so may end, but for one that is held by no passt."""
    assert identity(seen("/x/a"), program("passt", "-s", "/x/b")).may_end
    assert identity(seen("/tmp/passt_1.socket")).may_end
    assert not identity(seen("/x/a"), holder=program("python3", "x", name="python3")).may_end


def test_an_unclear_path_is_the_worst_that_it_can_be() -> None:
    """Two with the same name in different places, as their working directories cannot be read."""
    passts = [program("passt", "-s", "a"), program("passt", "--vhost-user", "-1", "-s", "/y/a")]
    assert Identity(None, True, True, None, False) == identity(seen("/x/a"), *passts)


def test_a_path_elsewhere_does_not_matter_where_one_is_exact() -> None:
    """Every user may have a passt_1.socket somewhere."""
    passts = [program("passt", "-1", "-s", "/y/a"), program("passt", "-s", "/x/a", pid=7)]
    assert Identity(7, False, False, False, True) == identity(seen("/x/a"), *passts)
    assert identity(seen("/link-to-y/a"), *passts).may_end
    assert identity(seen("/link-to-y/a"), passts[0]).pid is None


def test_passts_on_default_names_are_told_by_time() -> None:
    """The one that started when the socket was made; with two of them it could be either."""
    early, late = program("passt", "-1", pid=7, started=50), program("passt", pid=8, started=99.99)
    assert Identity(8, False, False, False, False) == identity(seen("/tmp/passt_2.socket"), early, late)
    both = identity(seen("/tmp/passt_2.socket"), early._replace(started=99.9), late)
    assert Identity(None, True, False, None, False) == both
    never = identity(seen("/tmp/passt_2.socket", made=500), early, late)
    assert Identity(None, True, False, None, False) == never


FORGED = program("passt", "--vhost-user", "-s", "/tmp/passt_2.socket", pid=6, started=99.9, uid=2000)


def test_a_program_of_another_user_is_no_evidence() -> None:
    """Neither beside the real one nor alone, whatever its command line says; root's and the listener's own are."""
    real = program("passt", "-1", pid=7, started=99.9, uid=NOBODY)
    ours = seen("/tmp/passt_2.socket")._replace(uid=NOBODY, owner=NOBODY)
    assert Identity(7, True, False, True, False) == identity(ours, FORGED, real)
    assert UNKNOWN == identity(ours, FORGED)
    assert UNKNOWN == identity(ours, FORGED._replace(arguments=("passt",)))
    for uid in (0, NOBODY):
        assert identity(ours, FORGED._replace(uid=uid)).may_be_vhost_user
    assert identity(ours._replace(uid=2000), FORGED).may_be_vhost_user


def test_a_passt_that_became_another_user_is_known() -> None:
    """Newer ones make root's socket first, and then become nobody; anyone else cannot have made it."""
    passts = sort_passts([program("passt", "-s", "/x/a", pid=7, started=99.9, uid=NOBODY)])
    for of_root in (seen("/x/a")._replace(uid=0, owner=0), seen("/x/a")._replace(owner=0)):
        assert 7 == identify(of_root, passts, trusted={0, NOBODY}).pid
        assert UNKNOWN == identify(of_root, passts, trusted={0})
    assert 7 == identify(seen("/x/a")._replace(owner=NOBODY), passts, trusted={0}).pid


def test_a_program_later_than_the_socket_is_weak_evidence() -> None:
    """It names the path, but was not there when the socket was made: all may be, and nothing is certain."""
    late = program("passt", "-s", "/tmp/passt_2.socket", pid=8, started=103)
    sighting = seen("/tmp/passt_2.socket")
    assert Identity(None, True, False, None, False) == identity(sighting, late)
    real = program("passt", "--vhost-user", pid=7, started=99.9)
    assert Identity(None, True, True, None, False) == identity(sighting, late, real)
    # Where one was there in time, the late one does not matter.
    early = late._replace(pid=9, started=99.9)
    assert Identity(9, False, False, False, True) == identity(sighting, late, early)


def test_a_program_much_earlier_than_the_socket_is_weak_beside_one_of_the_moment() -> None:
    """It may have the same path in another mount namespace; alone, it will be the one: chmod(1) changes the time."""
    old = program("passt", "-s", "/tmp/passt_2.socket", pid=8, started=10)
    sighting = seen("/tmp/passt_2.socket")
    assert Identity(8, False, False, False, True) == identity(sighting, old)
    one_off = program("passt", "-1", pid=7, started=99.9)
    assert Identity(None, True, False, None, False) == identity(sighting, old, one_off)
