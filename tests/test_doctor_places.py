# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says of the runtime directory, the host's routes and the journal."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from qrapd.doctor import places
from qrapd.doctor.places import Place
from test_doctor import isolated, run


def test_a_directory_to_be_made_is_fine_where_it_can_be(tmp_path: Path) -> None:
    """The nearest directory that is there decides; nothing is made by looking."""
    base = tmp_path / "a" / "b"

    assert places.read_place(base) == Place(base)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_a_problem(tmp_path: Path) -> None:
    """A path through a regular file can never be a directory."""
    (tmp_path / "file").touch()

    finding = places.examine_runtime_directory(tmp_path / "file" / "qrapd")

    assert finding.status == "problem"
    assert "no directory" in finding.found


@pytest.mark.parametrize(
    ("length", "status", "words"),
    [
        (29, "ok", "all their 63"),
        (30, "warning", "62 characters"),
        (91, "warning", "1 char"),
        (92, "problem", "long"),
    ],
)
def test_how_long_names_may_be(length: int, status: str, words: str) -> None:
    """107 bytes less BASE, two slashes and user-qmp.sock are left to a VM's name."""
    base = Path("/" + "d" * (length - 1))

    finding = places.judge_runtime_directory(Place(base), 1000)

    assert status == finding.status
    assert words in finding.found
    assert (status == "ok") == (finding.remedy is None)


def test_the_kernel_agrees_on_the_length(tmp_path: Path) -> None:
    """A socket binds below the longest name that is promised, and not below one that is longer by one."""
    room = places.longest_name(tmp_path)
    if room < 1:
        pytest.skip("the tests' own directory is too long")

    def bind(name: str) -> None:
        (tmp_path / name).mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / name / "user-qmp.sock"))

    bind("n" * room)
    with pytest.raises(OSError, match="too long"):
        bind("m" * (room + 1))


def test_a_closed_or_read_only_directory_is_a_problem() -> None:
    """Each with the command that helps: making it the user's own, or choosing another."""
    closed = places.judge_runtime_directory(Place(Path("/run/qrapd"), writable=False), 1000)
    frozen = places.judge_runtime_directory(Place(Path("/run/qrapd"), writable=False, read_only=True), 1000)

    assert (closed.status, frozen.status) == ("problem", "problem")
    assert "install -d -m 0755 -o 1000 /run/qrapd" in str(closed.remedy)
    assert "export RUNTIME_DIRECTORY=" in str(frozen.remedy)


def test_without_a_session_s_directory_the_user_is_told_of_one(nobodys_python: list[str]) -> None:
    """No XDG_RUNTIME_DIR: a finding with the command that chooses a place, not an exception."""
    script = "from qrapd.doctor import places; print(places.examine_runtime_directory(None))"

    done = run(script, *nobodys_python)

    assert "status='problem'" in done.stdout, done.stderr
    assert "export RUNTIME_DIRECTORY=" in done.stdout


@pytest.mark.parametrize("uid", [0, 4_000_000_000])
def test_no_directory_that_all_can_write_is_advised(uid: int) -> None:
    """Neither root nor a user without a session's directory is sent to /tmp, where a name may be anybody's."""
    finding = places.judge_runtime_directory(Place(Path("/run/qrapd"), read_only=True), uid)

    chosen = Path(str(finding.remedy).rpartition("RUNTIME_DIRECTORY=")[2])
    assert Path("/run") == chosen.parent
    assert (uid != 0) == (f"install -d -m 0700 -o {uid} {chosen} " in str(finding.remedy))


ROUTES = """\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
UNREACHABLE = "*\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0\n"
ZERO = "0" * 32
ROUTES6 = f"""\
fd{"0" * 30} 40 {ZERO} 00 {ZERO} 00000100 00000001 00000000 00000001     eth0
{ZERO} 00 {ZERO} 00 fd{"0" * 29}1 00000400 00000002 00000000 00000003     eth1
{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200       lo
"""


def test_default_routes_are_told_from_others() -> None:
    """Neither a network's own route, nor one that refuses, is a default route."""
    assert places.default_routes(ROUTES) == ["eth0"]
    assert places.default_routes6(ROUTES6) == ["eth1"]
    assert places.default_routes(ROUTES.splitlines()[0] + "\n" + UNREACHABLE) == []
    assert places.default_routes("") == places.default_routes6("") == []


@pytest.mark.parametrize(
    ("routes", "routes6", "started", "status"),
    [
        (["eth0"], ["eth0"], True, "ok"),
        (["eth0"], [], True, "ok"),
        ([], ["eth0"], True, "ok"),
        ([], [], True, "warning"),
        ([], [], False, "problem"),
    ],
)
def test_how_many_routes_are_enough(
    routes: list[str], routes6: list[str], started: bool, status: str
) -> None:
    """One default route is; without any it depends on the passt that is here. The host gets none from us."""
    finding = places.judge_network(routes, routes6, passt_started=started)

    assert status == finding.status
    assert finding.remedy is None


def test_what_a_link_can_have_in_place_of_a_route_lets_passt_start() -> None:
    """In an empty network namespace, where the passt of 2023 ends, it starts with the options that are named."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    script = """
import subprocess
from qrapd.doctor.places import examine_network
from qrapd.doctor.trial import judge_trial, try_passt
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
finding = examine_network(try_passt())
instead = {"interface": "lo", "gateway": "192.0.2.1", "address": "192.0.2.2", "mac_addr": "02:00:00:00:00:01"}
named = all(option in finding.found for option in instead)
options = [word for name, value in instead.items() for word in ("--" + name.replace("_", "-"), value)]
trial = judge_trial(try_passt(*options) if named else try_passt())
print(finding.status, "named" if named else "unnamed", trial.status)
"""
    done = run(script, *isolated("--net"), sys.executable)

    assert done.stdout.split() in (["problem", "named", "ok"], ["warning", "unnamed", "ok"]), done.stderr


@pytest.mark.parametrize(
    ("listening", "booted", "status"),
    [(True, True, "ok"), (False, False, "ok"), (False, True, "warning")],
)
def test_the_journal_is_missed_only_under_systemd(listening: bool, booted: bool, status: str) -> None:
    """Without systemd, logs have another place; with it, its journal can be started."""
    finding = places.judge_journal(listening=listening, booted=booted)

    assert status == finding.status
    assert (status == "warning") == (finding.remedy is not None)
