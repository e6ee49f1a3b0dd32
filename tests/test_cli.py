# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands as a person or a script calls them: their output, their errors, their exit status."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrapd.binaries import kvm_works
from qrapd.cli import COMMANDS
from support import NOBODY, processes_with, write_vm


def qrapd(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qrapd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables},
        check=False,
    )


def write(place: Path, text: str) -> Path:
    """A VM file with this text."""
    path = place / "web.toml"
    path.write_text(text)
    return path


BAD_FILES = {
    "not TOML": ("[qemu\n", "line 1, column 6", ""),
    "unknown key": ("[qemu]\narg = []\n", "qemu.arg: is not a known key", "did you mean `args`?"),
    "wrong type": ('[qemu]\nargs = "-m 1G"\n', "qemu.args: must be a list", ""),
    "bad port": ("[[link]]\n[link.passt]\ntcp_ports = [70000]\n", "link[0].passt.tcp_ports[0]", "65535"),
    "clash of ports": (
        '[[link]]\n[link.passt]\ntcp_ports = ["8080:80"]\n[[link]]\n[link.passt]\ntcp_ports = [8080]\n',
        "link[1].passt.tcp_ports[0]",
        "",
    ),
    "a network of its own": ('[qemu]\nargs = ["-netdev", "user"]\n[[link]]\n', "qemu.args[0]", "remove it"),
    "our own business": ("[[link]]\n[link.passt]\nforeground = true\n", "link[0].passt.foreground", ""),
    "an option that passt lacks": (
        "[[link]]\n[link.passt]\nno_such_option = true\n",
        "link[0].passt.no_such_option",
        "",
    ),
    "a mode that cannot be": (
        '[[link]]\nmode = "native"\nsource = "probe"\n',
        "link[0].mode: is for a passt that is started for it",
        "remove `source`",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_bad_file(tmp_path: Path, case: str, command: str) -> None:
    """Each command says file, key, reason and hint, ends with 78, starts nothing and shows no traceback."""
    text, reason, hint = BAD_FILES[case]
    path = write(tmp_path, text)
    ended = qrapd(command, path, "--log-format", "console", "--runtime-dir", tmp_path / "run")
    assert 78 == ended.returncode
    assert str(path) in ended.stderr
    assert reason in ended.stderr
    assert hint in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "" == ended.stdout
    assert not (tmp_path / "run").exists()


def test_all_errors_of_a_file_at_once(tmp_path: Path) -> None:
    """Three mistakes in three tables: three problems from one check."""
    path = write(tmp_path, 'qemux = 1\n[restart]\nlimit = "5"\n[[link]]\nmac = "52:54"\n')
    ended = qrapd("check", path)
    assert 78 == ended.returncode
    assert 3 == sum(line.startswith(f"{path}: ") for line in ended.stderr.splitlines())


def test_bad_files_as_events(tmp_path: Path) -> None:
    """Where the log is JSON, problems are events, too, so that no line breaks its reader."""
    ended = qrapd("run", write(tmp_path, "nmae = 'x'\n"), "--log-format", "json")
    assert 78 == ended.returncode
    event = json.loads(ended.stderr)
    assert ("config.invalid", "error") == (event["event"], event["level"])
    assert "did you mean `name`?" in event["hint"]


@pytest.mark.parametrize("command", ["run", "check", "plan"])
def test_a_missing_file(tmp_path: Path, command: str) -> None:
    """The path is named, and what there is instead."""
    write(tmp_path, "")
    options = ["--log-format", "console"]
    ended = qrapd(command, tmp_path / "wbe.toml", *options)
    assert 78 == ended.returncode
    assert "wbe.toml: there is no such file" in ended.stderr
    assert "web.toml" in ended.stderr


def test_a_name_that_nobody_has(tmp_path: Path) -> None:
    """A name is looked up in the user's directory, which the message names."""
    ended = qrapd("check", "no-such-vm", XDG_CONFIG_HOME=str(tmp_path), HOME=str(tmp_path))
    assert 78 == ended.returncode
    assert "qrapd/vms/no-such-vm.toml: there is no such file" in ended.stderr


def test_missing_binaries(tmp_path: Path) -> None:
    """A program that is not there ends with 69, and the package that has it is named."""
    path = write(tmp_path, '[qemu]\nbinary = "qemu-system-riscv64-nowhere"\n')
    ended = qrapd("run", path, "--log-format", "console")
    assert 69 == ended.returncode
    assert "qemu-system-riscv64-nowhere" in ended.stderr
    ended = qrapd("check", write(tmp_path, "[[link]]\n"), PATH=str(tmp_path))
    assert 69 == ended.returncode
    assert "passt" in ended.stderr
    assert "hint: " in ended.stderr


def test_a_runtime_directory_that_is_too_long(tmp_path: Path) -> None:
    """A socket's path has 107 bytes: said before anything starts, with both numbers."""
    base = tmp_path / ("x" * 100)
    ended = qrapd("run", write_vm(tmp_path, "long").path, "--runtime-dir", base, "--log-format", "console")
    assert 69 == ended.returncode
    assert "107" in ended.stderr
    assert "--runtime-dir" in ended.stderr
    assert not base.exists()


def test_a_runtime_directory_that_cannot_be_written(place: Path, as_nobody: list[str]) -> None:
    """What is wrong with it, and the option that names another one."""
    path = write_vm(place, "mine").path
    command = [*as_nobody, "qrapd", "run", str(path), "--runtime-dir", "/proc/qrapd"]
    ended = subprocess.run(
        [*command, "--log-format", "console"], capture_output=True, text=True, timeout=60, check=False
    )
    assert 69 == ended.returncode
    assert "/proc/qrapd" in ended.stderr
    assert "--runtime-dir" in ended.stderr
    assert "Traceback" not in ended.stderr
    os.chown(place, NOBODY, NOBODY)


def test_a_disk_that_qemu_may_not_read(place: Path, as_nobody: list[str]) -> None:
    """Not the path is wrong but who QEMU is: the user that it runs as is named."""
    disk = place / "web.img"
    disk.touch(0o600)
    path = write(place, f"[qemu]\nargs = ['-drive', 'file={disk},format=raw']\n")
    os.chown(place, NOBODY, NOBODY)
    command = [*as_nobody, "qrapd", "run", str(path), "--runtime-dir", str(place / "run")]
    ended = subprocess.run(
        [*command, "--log-format", "console"], capture_output=True, text=True, timeout=60, check=False
    )
    assert 1 == ended.returncode
    assert f"Could not open '{disk}': Permission denied" in ended.stderr
    assert "hint: QEMU runs as user nobody" in ended.stderr


def test_no_runtime_directory_at_all(place: Path, as_nobody: list[str]) -> None:
    """A user without $XDG_RUNTIME_DIR is told so."""
    command = ["env", "-u", "XDG_RUNTIME_DIR", "-u", "RUNTIME_DIRECTORY", *as_nobody, "qrapd", "run"]
    ended = subprocess.run(
        [*command, str(write_vm(place, "homeless").path), "--log-format", "console"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 69 == ended.returncode
    assert "XDG_RUNTIME_DIR" in ended.stderr


def test_check_of_good_files(tmp_path: Path) -> None:
    """One line each, and 0."""
    files = [write_vm(tmp_path, name, links=n).path for n, name in enumerate(["none", "one", "two"])]
    ended = qrapd("check", *files)
    assert (0, "") == (ended.returncode, ended.stderr)
    assert ["no network", "1 link", "2 links"] == [
        line.rpartition(", ")[2].rstrip(")") for line in ended.stdout.splitlines()
    ]


def test_check_doubts_a_name_that_is_not_the_files(tmp_path: Path) -> None:
    """Such a VM can be run, but neither the agent nor a unit would find it by its name: a warning, and 0."""
    path = write(tmp_path, "name = 'other'\n")
    ended = qrapd("check", path)
    assert (0, f"{path}: fine (other: ") == (ended.returncode, ended.stdout.partition("qemu")[0])
    assert [
        f"{path}: warning: name: is not the file's own, by which the agent and the unit qrapd@ know a VM "
        "(it is 'other')",
        "  hint: for them, name the file other.toml",
    ] == ended.stderr.splitlines()


def test_check_doubts_a_disk_that_is_not_there(tmp_path: Path) -> None:
    """It may be made later: a warning, with the path as it will be looked for; none for one that is there."""
    (tmp_path / "there.img").touch()
    path = write(
        tmp_path, "[qemu]\nargs = ['-drive', 'file=there.img', '-drive', 'file=gone.img,if=virtio']\n"
    )
    ended = qrapd("check", path)
    assert 0 == ended.returncode
    assert [
        f"{path}: warning: qemu.args[3]: names a disk's file that is not there (it is '{tmp_path}/gone.img')",
        f"  hint: make it, or correct the path: relative ones start at {tmp_path}",
    ] == ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accel = 'kvm'", "KVM"),
        ("accel = 'tcg'", "no KVM"),
        ("accel = 'args'", "the accelerator of its args"),
        ("args = ['-machine', 'q35,accel=kvm:tcg']", "the accelerator of its args"),
    ],
)
def test_check_and_plan_agree_on_the_accelerator(tmp_path: Path, text: str, said: str) -> None:
    """What `check` says in words is what `plan` has as an argument."""
    path = write(tmp_path, f"[qemu]\n{text}\n")
    ended = qrapd("check", path)
    assert f", {said}, no network)" in ended.stdout
    accelerator = {"KVM": "-accel kvm", "no KVM": "-accel tcg"}.get(said, "")
    planned = qrapd("plan", path).stdout
    assert accelerator in planned
    assert bool(accelerator) == ("-accel" in planned)
    works, reason = kvm_works()
    assert (said == "KVM" and not works) == (f"qemu.accel: KVM cannot work here: {reason}" in ended.stderr)


def test_check_goes_on_after_a_bad_file(tmp_path: Path) -> None:
    """A bad file does not hide the next one; the status is the first failure's."""
    bad = write(tmp_path, "x = 1\n")
    good = write_vm(tmp_path, "good").path
    ended = qrapd("check", bad, good)
    assert 78 == ended.returncode
    assert f"{good}: fine" in ended.stdout


def test_plan_as_json_and_for_people(tmp_path: Path) -> None:
    """Both forms show the same command lines, with words where run puts fds."""
    vm = write_vm(tmp_path, "web", args=["-smp", "2"])
    plan = json.loads(qrapd("plan", vm.path, "--json").stdout)
    assert ("web", str(tmp_path)) == (plan["name"], plan["directory"])
    assert ["--foreground", "--fd", "LINK0_PASST_FD"] == plan["links"][0]["passt"][-3:]
    assert "socket,id=link0-stream1,fd=LINK0_FD" in plan["qemu"]
    words = qrapd("plan", vm.path).stdout
    assert f"--tcp-ports 127.0.0.1/{vm.ports[0]}:80" in words
    assert "-smp 2" in words


def test_schema_is_json_schema() -> None:
    """Editors get a schema that knows every table."""
    schema = json.loads(qrapd("schema").stdout)
    assert {"name", "autostart", "qemu", "restart", "link"} == set(schema["properties"])


def test_doctor(tmp_path: Path) -> None:
    """Findings for people and for programs; a remedy is a command or nothing."""
    ended = qrapd("doctor", "--json", "--runtime-dir", tmp_path)
    findings = json.loads(ended.stdout)
    assert {"subject", "status", "found", "remedy"} == set(findings[0])
    assert ended.returncode == (69 if any(f["status"] == "problem" for f in findings) else 0)
    assert findings[0]["subject"] in qrapd("doctor", "--runtime-dir", tmp_path).stdout


@pytest.mark.parametrize("arguments", [["rnu"], ["run"], ["run", "--no-such-option", "x"]])
def test_usage_errors(arguments: list[str]) -> None:
    """A wrong command line ends with 2 and shows how it is meant."""
    ended = qrapd(*arguments)
    assert 2 == ended.returncode
    assert "Usage: qrapd" in ended.stderr


def test_help_and_version() -> None:
    """What a newcomer types first works, with and without a command."""
    assert "Run QEMU virtual machines" in qrapd("--help").stdout
    assert 0 == qrapd("run", "-h").returncode
    assert qrapd("--version").stdout.startswith("qrapd ")


def test_the_list_of_commands_fits_a_terminal() -> None:
    """Each command is said whole in its line: none is cut or wrapped in 80 columns."""
    shown = qrapd("--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) < 80
    assert "..." not in shown.partition("\n\n")[2]
    assert len(COMMANDS) == len(shown.partition("Commands:\n")[2].splitlines())
    for group in ("forward", "link"):
        assert "..." not in qrapd(group, "--help", COLUMNS="80").stdout.partition("Commands:\n")[2]


def test_help_is_a_word_too() -> None:
    """`qrapd help` is `qrapd --help`, and `qrapd help run` is `qrapd run --help`."""
    assert qrapd("--help").stdout == qrapd("help").stdout
    assert qrapd("run", "--help").stdout == qrapd("help", "run").stdout


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("stat", "No such command 'stat'. Did you mean 'start'?\n"),
        ("chek", "No such command 'chek'. Did you mean 'check'?\n"),
        ("pss", "No such command 'pss'. Did you mean 'ps'?\n"),
        ("xyzzy", "No such command 'xyzzy'.\n"),
    ],
)
def test_a_command_that_there_is_not(typed: str, told: str) -> None:
    """A slip of the finger is told what was meant."""
    ended = qrapd(typed)
    assert 2 == ended.returncode
    assert ended.stderr.endswith(f"Error: {told}")


def test_what_may_be_left_out_is_shown_so() -> None:
    """In brackets, as everywhere."""
    assert "qrapd events [OPTIONS] [NAME]\n" in qrapd("events", "-h").stdout
    assert "qrapd stop [OPTIONS] [FILE|NAME]\n" in qrapd("stop", "-h").stdout
    assert "qrapd show [OPTIONS] NAME\n" in qrapd("show", "-h").stdout


def test_events_on_a_terminal(place: Path) -> None:
    """With stderr on a terminal, events are sentences, with the VM's name in front."""
    vm = write_vm(place, "shown", args=["-S"])
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qrapd", "run", str(vm.path), "--runtime-dir", str(place / "run")],
        stderr=follower,
        stdin=subprocess.DEVNULL,
    )
    os.close(follower)
    seen = ""
    try:
        while "the machine is prelaunch" not in seen:
            seen += os.read(leader, 65536).decode()
        process.terminate()
        assert 0 == process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert "shown: QEMU started as pid" in seen
    assert "shown: link 0: connected to passt" in seen
    assert [] == processes_with(str(place))


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(place: Path, closed: str) -> None:
    """Whoever starts qrapd may have closed them; a VM runs and stops all the same, on fds of its own."""
    vm = write_vm(place, "shut")
    command = [sys.executable, "-m", "qrapd", "run", str(vm.path), "--runtime-dir", str(place / "run")]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (place / "run/shut/record.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert 0 == process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert [] == processes_with(str(place))


@pytest.mark.parametrize("command", ["plan", "doctor", "schema", "check"])
def test_a_full_disk_behind_stdout(tmp_path: Path, command: str) -> None:
    """The host's reason in one line, not a traceback: it is no bug of ours."""
    arguments = [str(write_vm(tmp_path, "web").path)] if command in {"plan", "check"} else []
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "qrapd", command, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (69, "qrapd: No space left on device\n") == (ended.returncode, ended.stderr)


def test_too_few_open_files(place: Path) -> None:
    """The limit is named with the command that raises it, and nothing is left."""
    vm = write_vm(place, "few")
    for limit in (14, 16, 18):
        command = f"ulimit -n {limit}; exec {sys.executable} -m qrapd run {vm.path} --runtime-dir {place}/run"
        ended = subprocess.run(
            ["sh", "-c", f"{command} --log-format console"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert 69 == ended.returncode, ended.stderr
        assert "ulimit -n" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert [] == list((place / "run").glob("*"))


@pytest.mark.may_skip(reason="only where there is no journal")
def test_a_journal_that_is_not_there(place: Path) -> None:
    """Asked for and not to be had: said on stderr, since nobody would read it anywhere else."""
    if Path("/run/systemd/journal/socket").exists():
        pytest.skip("there is a journal here")
    ended = qrapd("run", write_vm(place, "mute").path, "--log-format", "journal")
    assert 69 == ended.returncode
    assert "no socket /run/systemd/journal/socket" in ended.stderr
