# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands show in a narrow terminal and in a pipe, and what they say where there is nothing to show."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_host import FakeHost, link, status
from qrapd.commands import asking, host, listing
from qrapd.commands.tables import GAP, fitting
from qrapd.doctor import Finding
from qrapd.errors import Unavailable
from support import free_port
from test_cli import qrapd
from test_commands_client import Terminal, ask

WHY = "QEMU ended with status 1: Could not open '/var/lib/qrapd/images/web.qcow2': Permission denied"


# --- in a narrow terminal -----------------------------------------------------------------------------


@pytest.fixture
def agent(place: Path) -> Iterator[FakeHost]:
    """An agent with VMs whose rows are long."""
    links = [link(0, outages=2, last_outage_ms=12.3, passt_pid=20181, unread_by_passt=1234567), link(1)]
    vms = [
        status("web", links=links, qemu_pid=20180),
        status("db", "failed", error=WHY, hint="give it to the user"),
        status("x" * 63, "degraded", qemu_pid=20190),
    ]
    with FakeHost(*vms).serve(place / "agent.sock") as serving:
        yield serving


def shown_by(place: Path, *arguments: str, columns: int) -> list[str]:
    """The lines in a terminal of this width, without colours."""
    with Terminal(place, *arguments, columns=columns) as terminal:
        code, shown = terminal.finish()
    assert 0 == code, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_ps_cuts_nothing(place: Path, agent: FakeHost, columns: int) -> None:
    """Less important columns are left out, what is shown is whole, and the reason of a failure always is."""
    lines = shown_by(place, "ps", columns=columns)
    heads = lines[0].split()
    assert ["name", "state"] == heads[:2]
    assert "remark" == heads[-1]
    assert (columns >= 200) == ("restarts" in heads)
    assert max(map(len, lines)) <= columns
    db = next(number for number, line in enumerate(lines) if line.startswith("db "))
    web = next(line for line in lines if line.startswith("web ")).split()
    assert ["failed", "ready"] == [lines[db].split()[1], web[1]]
    remark = lines[0].index("remark")
    told = "".join(line[remark:].replace(" ", "") for line in lines[db:] if line[:1] in ("d", " "))
    assert WHY.replace(" ", "") in told
    assert "x" * 63 == re.sub(r"[^x]", "", "".join(line[: lines[0].index("state")] for line in lines[1:]))
    if "qemu" in heads:
        assert "20180" in web


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_show_cuts_nothing(place: Path, agent: FakeHost, columns: int) -> None:
    """The forwards are there in any case."""
    agent.forwards["tcp"] = [f"127.0.0.{each}/808{each}:80" for each in range(1, 6)]
    lines = shown_by(place, "show", "web", "--events", "0", columns=columns)
    head = next(number for number, line in enumerate(lines) if line.startswith("link "))
    assert max(map(len, lines)) <= columns
    assert ", ".join(agent.forwards["tcp"]).replace(" ", "") in "".join(lines[head + 1 :]).replace(" ", "")
    assert "unread" not in lines[head]


@given(
    st.lists(st.lists(st.text("ab", max_size=30), min_size=4, max_size=4), max_size=4),
    st.integers(min_value=1, max_value=200),
)
def test_columns_that_fit(rows: list[list[str]], width: int) -> None:
    """No column is left out without need, and none that is not to be."""
    heads = ("name", "state", "for", "remark")
    kept = fitting(heads, rows, width, ("for", "state"))
    assert kept in ([0, 1, 2, 3], [0, 1, 3], [0, 3])
    if len(kept) == 4:
        return
    dropped = 2 if len(kept) == 3 else 1
    widths = [max(len(row[number]) for row in [list(heads), *rows]) for number in sorted({*kept, dropped})]
    assert sum(widths) + len(GAP) * (len(widths) - 1) > width


# --- in a pipe ----------------------------------------------------------------------------------------


def test_doctor_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One finding a line, whole, for those who search lines."""
    found = [
        Finding("KVM", "warning", "no " * 60 + "KVM", "sudo modprobe kvm"),
        Finding("passt", "ok", "is there"),
    ]
    host._show_findings(found)
    first, second = capsys.readouterr().out.splitlines()
    assert f"warning  KVM    {'no ' * 60}KVM → sudo modprobe kvm" == first
    assert "ok       passt  is there" == second


def test_probe_in_a_pipe(place: Path) -> None:
    """The same, without blanks at the ends."""
    (place / "passt_1.socket").touch()
    ended = qrapd("probe", "--pattern", place / "passt_{n}.socket")
    lines = ended.stdout.splitlines()
    assert ["socket", "state"] == lines[0].split()[:2]
    assert 2 == len(lines)
    assert lines == [line.rstrip() for line in lines]


# --- nothing to show ----------------------------------------------------------------------------------


def ps(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What `qrapd ps` prints on stdout and on stderr."""
    listing.ps.main([*arguments], standalone_mode=False)
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_user_without_vms_is_told_of_the_hosts_agent(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipe as well; not who says where to look, nor who has VMs, and not where there is no such agent."""
    socket = place / "host/agent.sock"
    monkeypatch.setattr(asking, "HOSTS_AGENT", socket)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(place / "own"))
    assert "" == ps(capsys)[1]
    with FakeHost(status("web")).serve(socket):
        words = f"hint: this host's agent is asked by: --socket {socket}, or QRAPD_SOCKET={socket}\n"
        assert ps(capsys)[1].endswith(words)
        assert ("[]\n", "") == ps(capsys, "--json")
        assert "" == ps(capsys, "--runtime-dir", str(place / "own"))[1]
        assert ("web", "") == (ps(capsys, "--socket", str(socket))[0].split()[9], capsys.readouterr().err)
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(socket.parent))
        assert "" == ps(capsys)[1]
        monkeypatch.delenv("RUNTIME_DIRECTORY")
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setattr("os.geteuid", lambda: 1000)  # by su(1), without a session
        with pytest.raises(Unavailable) as refused:
            ps(capsys)
        assert f"--socket {socket}" in str(refused.value.hint)


def test_a_failed_start_leaves_no_vm_behind(place: Path) -> None:
    """Its directory may stay, as a unit's does: that is none of the VMs that there are."""
    (place / "empty").mkdir()
    (place / "locked").mkdir()
    (place / "locked/lock").write_text("1\n")
    (place / "left").mkdir()
    (place / "left/record.json").write_text("{}")
    ended = ask(place, "show", "empty")
    assert 69 == ended.returncode
    assert "hint: VMs there: left\n" in ended.stderr
    assert ["left"] == [each["name"] for each in json.loads(ask(place, "ps", "--json").stdout)]


def test_show_with_a_hint(place: Path, agent: FakeHost) -> None:
    """What to do comes below what is wrong."""
    lines = ask(place, "show", "db").stdout.splitlines()
    assert [f"remark:   {WHY}", "hint:     give it to the user"] == lines[2:4]


# --- forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ports", ["foo", "none", "8080:99999", "udp/53"])
def test_no_ports(place: Path, agent: FakeHost, ports: str) -> None:
    """The command line is wrong, no file is."""
    for how in ("add", "remove"):
        ended = ask(place, "forward", how, "web", ports, "--link", "0")
        assert (2, True) == (ended.returncode, ended.stderr.startswith(f"qrapd: {ports}: ")), ended.stderr
    assert not [call for call in agent.calls if call.startswith("POST")]


def test_ports_that_clash(place: Path, agent: FakeHost) -> None:
    """With what another link forwards; the file has nothing to do with it."""
    port = free_port()
    agent.clashes = [str(port)]
    ended = ask(place, "forward", "add", "web", f"{port}:81", "--link", "0")
    words = f"qrapd: {port}:81: forwards tcp port {port} of the host, as link 1 does\n  hint: take another\n"
    assert (75, words) == (ended.returncode, ended.stderr)


# --- logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "others"),
    [
        ("web", "web", ""),
        ("web -f -n 5", "web", "-f -n 5"),
        ("-f web", "web", "-f"),
        ("-f web -n 5", "web", "-f -n 5"),
        ("-n 5 web", "web", "-n 5"),
        ("-n web", "web", "-n"),
        ("-n5 web", "web", "-n5"),
        ("-fn 5 web", "web", "-fn 5"),
        ("-ojson web", "web", "-ojson"),
        ("-fo json web", "web", "-fo json"),
        ("--lines 5 -b -1 web", "web", "--lines 5 -b -1"),
        ("--since yesterday --no-pager web", "web", "--since yesterday --no-pager"),
        ("--since=yesterday web _PID=1", "web", "--since=yesterday _PID=1"),
        ("-f", None, "-f"),
        ("", None, ""),
    ],
)
def test_the_name_among_options(line: str, name: str | None, others: str) -> None:
    """It may come anywhere, as with the other commands."""
    assert (name, others.split()) == host.name_among(line.split())


def test_logs(place: Path) -> None:
    """The journal is asked with its own options; of a VM that there is nothing of that is said."""
    bin_directory = place / "bin"
    bin_directory.mkdir()
    program = bin_directory / "journalctl"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:])\n")
    program.chmod(0o755)
    (place / "run/web").mkdir(parents=True)
    variables = {"PATH": str(bin_directory), "XDG_CONFIG_HOME": str(place)}
    common = ("--runtime-dir", str(place / "run"), "--log-level", "debug")
    for arguments in (("-f", "web", *common), ("web", *common, "-f"), (*common, "web", "-f")):
        ended = qrapd("logs", *arguments, **variables)
        assert (0, "") == (ended.returncode, ended.stderr)
        assert ended.stdout.startswith("-f QRAPD_VM=web + UNIT=qrapd@web.service")
    ended = qrapd("logs", "nosuch", *common, **variables)
    assert (0, True) == (ended.returncode, "QRAPD_VM=nosuch" in ended.stdout)
    assert ended.stderr.startswith("qrapd: there is no VM nosuch here, and no file of one\n")
    for wrong, words in ((("web.toml",), "'web.toml' is no VM's name"), (("-f",), "Missing argument 'NAME'")):
        ended = qrapd("logs", *wrong, **variables)
        assert (2, True) == (ended.returncode, words in ended.stderr)
