# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's protocols, against a socket that plays its part; a real one is in test_systemd_units.py."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrapd.handover import HandedOver, take_fds
from qrapd.systemd import Notifier, Reporter, take_stored_fds, watchdog_interval


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """What systemd listens on."""
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(Path(place) / "notify"))
        listener.settimeout(5)
        yield listener


def notifier_to(manager: socket.socket) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": manager.getsockname()})


def heard(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_without_a_manager_nothing_happens() -> None:
    """As in a shell."""
    notifier = Notifier.from_environment({})
    assert (False, False, False) == (notifier.active, notifier.tell(READY=1), notifier.store("x", [0]))


def test_the_address_is_not_passed_on(manager: socket.socket) -> None:
    """QEMU and passt could speak in our name."""
    environment = {"NOTIFY_SOCKET": manager.getsockname()}
    Notifier.from_environment(environment)
    assert {} == environment


def test_a_word(manager: socket.socket) -> None:
    """One line for each field."""
    assert notifier_to(manager).tell(READY=1, STATUS="running")
    assert {"READY": "1", "STATUS": "running"} == heard(manager)


def test_an_abstract_address() -> None:
    """Of a container's manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0qrapd-test-{os.getpid()}")
        assert Notifier(f"@qrapd-test-{os.getpid()}").tell(WATCHDOG=1)
        assert b"WATCHDOG=1" == listener.recv(100)


def test_a_manager_that_is_gone_or_busy(manager: socket.socket) -> None:
    """Its silence holds up nobody."""
    notifier = notifier_to(manager)
    told = 0
    while notifier.tell(STATUS="x" * 1000):
        told += 1
    assert told > 0
    Path(manager.getsockname()).unlink()
    assert not notifier.tell(READY=1)


def test_fds_are_stored(manager: socket.socket) -> None:
    """With their name, and to be kept although their other end may have hung up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert notifier_to(manager).store("link0", [ours.fileno()])
        message, fds, _, _ = socket.recv_fds(manager, 4096, 4)
        assert b"FDSTORE=1\nFDNAME=link0\nFDPOLL=0" == message
        assert os.fstat(ours.fileno()).st_ino == os.fstat(fds[0]).st_ino
        os.close(fds[0])
    assert notifier_to(manager).forget("link0")
    assert {"FDSTOREREMOVE": "1", "FDNAME": "link0"} == heard(manager)


def test_stored_fds_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process, with their names; the variables go no further."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr("qrapd.systemd.FIRST_FD", ours.fileno())
        environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "link0", "A": "b"}
        assert [("link0", ours.fileno())] == take_stored_fds(environment, os.getpid())
        assert {"A": "b"} == environment
        assert not os.get_inheritable(ours.fileno())


@pytest.mark.parametrize("environment", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "3"}, {"LISTEN_FDS": "x"}])
def test_fds_that_are_not_for_us(environment: dict[str, str]) -> None:
    """Somebody else's are left alone."""
    assert [] == take_stored_fds(dict(environment), os.getpid())


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Three that are open, and closed in the end if they still are."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    yield opened
    for fd in filter(is_open, opened):
        os.close(fd)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def test_fds_from_the_program_that_was_here_before(fds: list[int]) -> None:
    """By name, or by a link's index, as the first versions write it. What is not ours is not touched."""
    given = f"0={fds[0]},qemu={fds[1]},passt0-output={fds[2]},x={fds[2]},link1=a,2"
    found = take_fds({"QRAPD_STREAMS": given})
    assert {"link0": [fds[0]], "qemu": [fds[1]], "passt0-output": [fds[2]]} == found.fds
    assert not any(os.get_inheritable(fd) for fd in fds)


def test_what_the_manager_gave_the_program_before(fds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade in place $LISTEN_FDS is about numbers that may be anything by now."""
    monkeypatch.setattr("qrapd.systemd.FIRST_FD", fds[0])
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "link0"}
    assert {"link0": [fds[0]]} == take_fds(dict(environment)).fds
    environment["QRAPD_STREAMS"] = f"0={fds[0]}"
    assert {"link0": [fds[0]]} == take_fds(environment).fds
    assert {} == environment
    assert is_open(fds[0])


def test_one_of_two_streams_is_not_taken(fds: list[int]) -> None:
    """Which of them is in use is not known."""
    handed = HandedOver({"link0": fds[:2], "link1": fds[2:]})
    assert (None, fds[2]) == (handed.take("link0"), handed.take("link1"))
    assert [False, False, True] == [is_open(fd) for fd in fds]


def test_one_of_two_processes_is_the_right_one() -> None:
    """A pidfd tells whose it is; what nobody takes is closed."""
    with subprocess.Popen(["sleep", "60"]) as ended:
        gone = os.pidfd_open(ended.pid)
        ended.kill()
    mine, another = os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())
    handed = HandedOver({"qemu": [gone, another, mine], "passt0": [os.dup(mine)]})
    assert mine == handed.take_pidfd("qemu", os.getpid())
    os.close(mine)
    assert not is_open(gone)
    assert handed.take_pidfd("passt0", 1) is None
    handed.close()
    assert {} == handed.fds


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 10.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 10.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdog(environment: dict[str, str], expected: float | None) -> None:
    """Three times as often as it has to be."""
    assert expected == watchdog_interval(dict(environment), os.getpid())


def test_what_status_says(manager: socket.socket) -> None:
    """systemctl status tells machine, links, generations and the last outage."""
    reporter = Reporter(notifier_to(manager), 70)
    reporter.note("link.connected", link=0, generation=1)
    assert {"STATUS": "starting; link 0 up (generation 1)"} == heard(manager)
    reporter.note("vm.ready", status="running")
    assert {"READY": "1", "STATUS": "running; link 0 up (generation 1)"} == heard(manager)
    reporter.note("link.lost", link=0, generation=1, reason="exited")
    assert "running; link 0 down (exited)" == heard(manager)["STATUS"]
    reporter.note("link.failed", link=0, attempts=2, retry_in_ms=None)
    assert "running; link 0 down (2 attempts failed, given up)" == heard(manager)["STATUS"]
    reporter.note("link.restored", link=0, generation=2, outage_ms=31.5)
    assert "running; link 0 up (generation 2, last outage 31.5 ms)" == heard(manager)["STATUS"]
    reporter.note_reload()
    assert {"RELOADING", "MONOTONIC_USEC"} == set(heard(manager))
    reporter.note("vm.reloaded", links=[])
    assert "1" == heard(manager)["READY"]
    reporter.note("vm.stopping", how="power-down")
    told = heard(manager)
    assert ("1", "70000000", "stopping (power-down); link 0 up (generation 2, last outage 31.5 ms)") == (
        told["STOPPING"],
        told["EXTEND_TIMEOUT_USEC"],
        told["STATUS"],
    )
    # Before a restart it has as much time as it takes: to the manager this process does not end.
    again = Reporter(notifier_to(manager), 70, lambda: False)
    again.note("vm.stopping", how="power-down")
    assert {"STATUS": "stopping (power-down)"} == heard(manager)
    again.note_stop()
    assert {"STOPPING", "EXTEND_TIMEOUT_USEC", "STATUS"} == set(heard(manager))
    reporter.note("guest.console", line="nothing to tell")
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1)
