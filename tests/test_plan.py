# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for the plan: what only the host can tell, asked of real programs, and refusals that say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qrapd import binaries
from qrapd.config import VmConfiguration, parse
from qrapd.errors import ConfigurationError, Problem, Unavailable
from qrapd.plan import LinkPlan, resolve
from qrapd.qemu_arguments import Endpoints
from qrapd.vital_signs import ListenAddress

ALL_OPTIONS = (Path(__file__).parent / "data" / "passt-help-2023.txt").read_text()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that does nothing, for places where it is not run."""
    return script(tmp_path / "program", "exit 0")


@pytest.fixture
def passt(tmp_path: Path) -> Path:
    """A program that helps as passt of 2023 does: on stderr, with status 1."""
    help_file = tmp_path / "help.txt"
    help_file.write_text(ALL_OPTIONS)
    return script(tmp_path / "passt", f"cat '{help_file}' >&2; exit 1")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def configuration(directory: Path, qemu: Path | str, text: str = "", keys: str = "") -> VmConfiguration:
    """A VM called web whose file is in ``directory``; ``keys`` go to [qemu], ``text`` follows."""
    return parse(f"[qemu]\nbinary = '{qemu}'\naccel = 'tcg'\n{keys}\n{text}", directory / "web.toml")


def problems_of(vm: VmConfiguration) -> list[Problem]:
    with pytest.raises(ConfigurationError) as caught:
        resolve(vm)
    assert str(vm.path) == caught.value.path
    return list(caught.value.problems)


# --- what comes out -----------------------------------------------------------------------------------


def test_a_vm_without_links_needs_qemu_only(tmp_path: Path, program: Path) -> None:
    """No passt is looked for."""
    vm = configuration(tmp_path, program)
    plan = resolve(vm)
    assert ("web", str(program), ()) == (plan.name, plan.qemu, plan.links)
    assert (tmp_path, tmp_path) == (plan.directory, plan.passt_directory)
    assert (60, 5, True, False) == (plan.powerdown_timeout, plan.quit_timeout, plan.console, plan.kvm)


def test_each_link_has_a_passt(tmp_path: Path, program: Path, passt: Path) -> None:
    """Each with its own options, its own MAC address, and no fd yet."""
    link = f"[[link]]\npasst_binary = '{passt}'\n[link.passt]\n"
    vm = configuration(
        tmp_path, program, f"{link}tcp_ports = [80, '[::1]/22']\n{link}mtu = 1500\nno_ra = true"
    )
    assert (
        LinkPlan(
            0,
            "managed",
            vm.mac(0),
            0,
            "link0",
            (str(passt), "--mtu", "32750", "--tcp-ports", "80", "--tcp-ports", "::1/22"),
            listen_addresses=(
                ListenAddress("0.0.0.0", 80),
                ListenAddress("::", 80),
                ListenAddress("::1", 22),
            ),
        ),
        LinkPlan(1, "managed", vm.mac(1), 1, "link1", (str(passt), "--no-ra", "--mtu", "1500")),
    ) == resolve(vm).links


def test_a_link_to_a_passt_that_is_there_already(tmp_path: Path, program: Path) -> None:
    """No program is looked for; a path is relative to the file; the users who are trusted come along."""
    text = "[[link]]\nsource = 'probe'\nallow_uids = [7]\n[[link]]\nsource = 'run/p.sock'"
    vm = configuration(tmp_path, program, text)
    assert (
        LinkPlan(0, "probe", vm.mac(0), 0, "link0", allowed_uids=frozenset({7})),
        LinkPlan(1, str(tmp_path / "run/p.sock"), vm.mac(1), 1, "link1"),
    ) == resolve(vm).links


def test_a_socket_with_a_path_that_is_too_long(tmp_path: Path, program: Path) -> None:
    """Told before anything starts, with both numbers."""
    (problem,) = problems_of(configuration(tmp_path, program, f"[[link]]\nsource = '/{'x' * 107}'"))
    assert ("link[0].source", True) == (
        problem.key,
        "108 bytes, and a socket's path may have 107" in problem.reason,
    )


def test_the_plan_makes_qemus_command_line(tmp_path: Path, program: Path) -> None:
    """With the program that was found."""
    argv = resolve(configuration(tmp_path, program)).command_line(Endpoints(3, 4, 5, []))
    assert [str(program), "-name", "guest=web", "-accel", "tcg"] == argv[:5]


def test_a_working_directory_of_its_own(tmp_path: Path, program: Path) -> None:
    """QEMU works there; passt where the file is."""
    (tmp_path / "disks").mkdir()
    plan = resolve(configuration(tmp_path, program, keys="directory = 'disks'"))
    assert (tmp_path / "disks", tmp_path) == (plan.directory, plan.passt_directory)


@pytest.mark.parametrize(
    ("accel", "args", "works", "expected"),
    [
        ("auto", [], True, True),
        ("auto", [], False, False),
        ("auto", ["-accel", "tcg"], True, False),
        ("kvm", [], True, False),
        ("tcg", [], True, False),
        ("args", [], True, False),
    ],
)
def test_kvm_is_looked_for_where_it_is_ours_to_choose(
    accel: str,
    args: list[str],
    works: bool,
    expected: bool,
    tmp_path: Path,
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only `auto`, and only if the arguments say nothing, asks the host."""
    monkeypatch.setattr(binaries, "kvm_works", lambda _architecture: (works, "as the test says"))
    vm = parse(f"[qemu]\nbinary = '{program}'\naccel = '{accel}'\nargs = {args}", tmp_path / "web.toml")
    assert expected is resolve(vm).kvm


@pytest.mark.parametrize(
    ("keys", "status", "expected"),
    [
        ("", 0, True),
        ("", 1, False),
        ("sandbox = false", 0, False),
        ("args = ['-incoming', 'exec:cat x']", 0, False),
    ],
)
def test_the_sandbox_is_for_a_qemu_that_has_one(
    keys: str, status: int, expected: bool, tmp_path: Path
) -> None:
    """And it is asked where the file wants it."""
    qemu = script(tmp_path / "qemu", f"touch {tmp_path}/asked; echo QEMU emulator version 9.0; exit {status}")
    argv = resolve(configuration(tmp_path, qemu, keys=keys)).command_line(Endpoints(3, 4, 5, []))
    assert expected is ("-sandbox" in argv)
    assert ("" == keys) is (tmp_path / "asked").exists()


def test_the_installed_programs_are_found(tmp_path: Path) -> None:
    """The default of every key, on a host with everything."""
    qemu, passt = shutil.which(f"qemu-system-{binaries.host_architecture()}"), shutil.which("passt")
    if qemu is None or passt is None:
        pytest.skip("QEMU or passt is not installed")
    plan = resolve(parse("[[link]]\n[link.passt]\ntcp_ports = '8080:80'", tmp_path / "web.toml"))
    assert (qemu, (passt, "--mtu", "32750", "--tcp-ports", "8080:80")) == (plan.qemu, plan.links[0].passt)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["vhost-user", "native"])
def test_a_mode_that_the_installed_parts_lack_is_refused(mode: str, tmp_path: Path, passt: Path) -> None:
    """With the versions, and for the link that wants it alone."""
    qemu = script(tmp_path / "qemu", 'case $1 in --version) echo "QEMU emulator version 7.2.22" ;; esac')
    binary = f"passt_binary = '{passt}'"
    vm = configuration(tmp_path, qemu, f"[[link]]\n{binary}\n[[link]]\n{binary}\nmode = '{mode}'")
    (problem,) = problems_of(vm)
    assert ("link[1].mode", repr(mode)) == (problem.key, problem.value)
    assert f"here are QEMU 7.2.22 ({qemu})" in problem.reason
    assert problem.hint is not None
    assert problem.hint.endswith("use mode = 'swap', the default")


def test_an_mtu_that_qemu_would_mix_up(tmp_path: Path, program: Path, passt: Path) -> None:
    """Behind a hub no frame may be longer than the kernel takes in one piece."""
    text = f"[[link]]\npasst_binary = '{passt}'\n[link.passt]\nmtu = 65520"
    assert ["link[0].passt.mtu"] == [
        problem.key for problem in problems_of(configuration(tmp_path, program, text))
    ]


@pytest.mark.parametrize("name", ["missing", "web.toml"])
def test_a_working_directory_must_be_one(name: str, tmp_path: Path, program: Path) -> None:
    """The whole path is told, as the file has a relative one."""
    (tmp_path / "web.toml").touch()
    (problem,) = problems_of(configuration(tmp_path, program, keys=f"directory = '{name}'"))
    assert ("qemu.directory", "is not a directory", repr(str(tmp_path / name))) == (
        problem.key,
        problem.reason,
        problem.value,
    )


def test_an_option_that_the_installed_passt_lacks(tmp_path: Path, program: Path, passt: Path) -> None:
    """Option and binary are named, the nearest option is offered, and each link is looked at."""
    link = f"[[link]]\npasst_binary = '{passt}'\n[link.passt]\n"
    vm = configuration(
        tmp_path, program, f"{link}no_tpc = true\n{link}map_host_loopback = '192.0.2.1'\nrunas = true"
    )
    assert [
        Problem("link[0].passt.no_tpc", f"{passt} has no option --no-tpc", hint="did you mean `no_tcp`?"),
        Problem(
            "link[1].passt.map_host_loopback",
            f"{passt} has no option --map-host-loopback",
            hint=f"`{passt} --help` lists those it has",
        ),
        Problem(
            "link[1].passt.runas",
            f"--runas of {passt} takes a value",
            "true",
            "write runas = and the value, in quotes",
        ),
    ] == problems_of(vm)


def test_all_problems_come_at_once(tmp_path: Path, program: Path, passt: Path) -> None:
    """A missing program among them; without it nobody can tell whether it could do what the mode needs."""
    text = f"[[link]]\nmode = 'native'\npasst_binary = '{passt}'\n[link.passt]\nodd = 1"
    vm = configuration(tmp_path, tmp_path / "missing", text, keys="directory = 'missing'")
    assert {"link[0].passt.odd", "qemu.directory", "qemu.binary"} == {
        problem.key for problem in problems_of(vm)
    }


def test_all_missing_programs_come_at_once(tmp_path: Path) -> None:
    """Whoever installs one wants to hear of the others; each message and each hint is told once."""
    text = "[[link]]\npasst_binary = 'no-passt'\n[[link]]\npasst_binary = 'no-passt'"
    with pytest.raises(Unavailable) as caught:
        resolve(configuration(tmp_path, "no-qemu", text))
    assert 1 == caught.value.message.count("no-passt is not installed")
    assert 1 == caught.value.message.count("no-qemu is not installed")


def test_paths_of_programs_are_relative_to_the_file(tmp_path: Path, passt: Path) -> None:
    """As all paths in a file are, wherever qrapd is started and wherever QEMU works."""
    (tmp_path / "work").mkdir()
    (tmp_path / "qemu").write_text("#!/bin/sh\n")
    (tmp_path / "qemu").chmod(0o755)
    made = resolve(configuration(tmp_path, "./qemu", keys="directory = 'work'"))
    assert tmp_path / "qemu" == Path(made.qemu)


# --- what is missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qemu", "text", "name"),
    [
        ("qemu-system-s390x", "", "qemu-system-s390x"),
        (None, "[[link]]", "passt"),
    ],
)
def test_a_missing_program_is_named_with_its_package(
    qemu: str | None, text: str, name: str, tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command that installs it here."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(Unavailable, match=f"^{name} is not installed: looked in ") as caught:
        resolve(configuration(tmp_path, qemu or program, text))
    assert binaries.install_hint(name) == caught.value.hint
    assert str(binaries.package_of(name, "debian")) in binaries.install_hint(name, "debian")


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    """A path is not looked up elsewhere."""
    with pytest.raises(Unavailable, match=r"/missing does not exist$"):
        resolve(configuration(tmp_path, tmp_path / "missing"))


def test_a_passt_that_is_none(tmp_path: Path, program: Path) -> None:
    """What it said is quoted, as it has no help that names options."""
    other = script(tmp_path / "other", "echo I am something else")
    with pytest.raises(Unavailable, match="I am something else") as caught:
        resolve(configuration(tmp_path, program, f"[[link]]\npasst_binary = '{other}'"))
    assert f"is {other} really passt?" in str(caught.value.hint)
