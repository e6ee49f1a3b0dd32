# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor finds on this host, how it judges others, and that its remedies mend."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qrapd import binaries, doctor
from qrapd.binaries import KvmFacts
from qrapd.doctor import AppArmorView, Device, Finding, Place, Trial

ALL_OPTIONS = frozenset(["fd", "vhost-user", "conf-path", "map-guest-addr", "hostname", "stats"])
STARTED = Trial(0, "")


def run(script: str, *python: str) -> subprocess.CompletedProcess[str]:
    """Run Python ``script``, by this Python unless another one is given, without what a session's environment adds."""
    return subprocess.run(
        [*(python or (sys.executable,)), "-c", script],
        env={"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def isolated(*options: str) -> list[str]:
    """What to put before a command so that unshare(1) runs it; skips the test where that is denied."""
    command = ["unshare", *options]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(command)} is denied here")
    return command


# --- This host --------------------------------------------------------------------------------------------


def test_this_host_is_examined_whole(tmp_path: Path) -> None:
    """Every subject has one finding; passt and QEMU, which tests need, are found to be right."""
    findings = {finding.subject: finding for finding in doctor.examine(tmp_path)}

    emulator = f"qemu-system-{binaries.host_architecture()}"
    expected = [
        "passt",
        "passt starts",
        "pesto",
        emulator,
        "busybox",
        "qrap",
        "KVM",
        "user namespaces",
        "/dev/net/tun",
        "low ports",
        "AppArmor",
        "runtime directory",
        "host network",
        "journal",
    ]
    assert expected == list(findings)
    assert findings["passt"].status == "ok"
    assert findings["passt starts"].status == "ok", findings["passt starts"]
    assert findings[emulator].status == "ok"
    assert not list(tmp_path.iterdir())


def test_an_unprivileged_user_gets_findings_not_errors(nobodys_python: list[str]) -> None:
    """Nothing that such a user may not read or do stops the examination, and passt starts for them too."""
    script = """
import json
from pathlib import Path
from qrapd import doctor
print(json.dumps(doctor.as_json(doctor.examine(Path("/nonexistent/qrapd")))))
"""
    done = run(script, *nobodys_python)

    assert done.returncode == 0, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["passt starts"]["status"] == "ok", findings["passt starts"]
    assert findings["runtime directory"]["status"] == "problem"
    assert findings["runtime directory"]["remedy"].split()[0] in {"sudo", "doas", "su"}


def test_without_a_session_s_directory_the_user_is_told_of_one(nobodys_python: list[str]) -> None:
    """No XDG_RUNTIME_DIR: a finding with the command that chooses a place, not an exception."""
    script = "from qrapd import doctor; print(doctor.examine_runtime_directory(None))"

    done = run(script, *nobodys_python)

    assert "status='problem'" in done.stdout, done.stderr
    assert "export RUNTIME_DIRECTORY=" in done.stdout


def test_without_programs_each_is_missed_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty PATH: passt and QEMU are problems, nothing raises, passt is not tried."""
    monkeypatch.setenv("PATH", str(tmp_path))

    findings = {finding.subject: finding for finding in doctor.examine(tmp_path, qemu="qemu-system-x86_64")}

    assert "not installed" in findings["passt"].found
    assert "not tried" in findings["passt starts"].found
    assert findings["qemu-system-x86_64"].status == "problem"
    assert findings["busybox"].status == "warning"


def test_findings_become_json() -> None:
    """As plain dictionaries, which json takes, and the gravest status on top."""
    findings = [Finding("a", "ok", "fine"), Finding("b", "warning", "hm", "mend b")]

    expected = [
        {"subject": "a", "status": "ok", "found": "fine", "remedy": None},
        {"subject": "b", "status": "warning", "found": "hm", "remedy": "mend b"},
    ]
    assert expected == json.loads(json.dumps(doctor.as_json(findings)))
    assert doctor.worst(findings) == "warning"
    assert doctor.worst([*findings, Finding("c", "problem", "no")]) == "problem"
    assert doctor.worst([]) == "ok"


# --- Programs ---------------------------------------------------------------------------------------------


def test_passt_needs_fd_and_nothing_else() -> None:
    """--fd decides; whatever else is missing is named."""
    with_fd = doctor.judge_passt("/usr/bin/passt", None, frozenset(["fd"]))
    without = doctor.judge_passt("/usr/bin/passt", "2022_1", frozenset(["socket"]))

    assert (with_fd.status, without.status) == ("ok", "problem")
    assert "lacks --map-host-loopback" in with_fd.found
    assert without.found.startswith("/usr/bin/passt, version 2022_1")


def test_a_passt_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has passt's own words, without what is no cause."""
    script = tmp_path / "passt"
    script.write_text(
        '#!/bin/sh\necho "Don\'t run as root. Changing to nobody..."\necho no luck >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    finding = doctor.judge_trial(doctor.try_passt())

    expected = Finding("passt starts", "problem", "it ended with status 1: no luck")
    assert expected == finding


def test_a_passt_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends, whatever passt does."""
    script = tmp_path / "passt"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    trial = doctor.try_passt(timeout=0.1)

    assert trial.status is None
    assert "killed" in doctor.judge_trial(trial).found


def test_a_taken_port_fails_the_trial() -> None:
    """The trial is a real one: passt cannot have a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        trial = doctor.try_passt("--tcp-ports", f"127.0.0.1/{server.getsockname()[1]}")

    assert trial.status not in {0, None}
    assert trial.last_words


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/usr/bin/pesto", {"conf-path"}, "ok"),
        ("/usr/bin/pesto", set(), "ok"),
        (None, {"conf-path"}, "warning"),
        (None, set(), "ok"),
    ],
)
def test_pesto_is_missed_where_passt_would_listen(path: str | None, options: set[str], status: str) -> None:
    """An old passt has no use for pesto, so that there is nothing to install."""
    assert status == doctor.judge_pesto(path, frozenset(options)).status


@pytest.mark.parametrize(
    ("version", "netdevs", "status", "words"),
    [
        ((7, 2, 22), {"socket", "hubport", "vhost-user"}, "ok", "swap, vhost-user (by reconnect)"),
        ((9, 2, 0), {"socket", "hubport", "vhost-user"}, "ok", "swap, vhost-user (by reconnect-ms)"),
        ((10, 1, 0), {"socket", "hubport", "vhost-user", "passt"}, "ok", "native"),
        ((6, 2, 0), {"socket", "hubport"}, "warning", "tested from 7.2"),
        ((11, 0, 0), {"user", "hubport"}, "problem", "lacks the network backends socket"),
    ],
)
def test_link_modes_of_a_qemu(
    version: tuple[int, int, int], netdevs: set[str], status: str, words: str
) -> None:
    """What a QEMU can carry follows from its backends; only the name of an option from its version."""
    finding = doctor.judge_qemu("qemu-system-x86_64", "/usr/bin/qemu", version, frozenset(netdevs))

    assert status == finding.status
    assert words in finding.found


# --- KVM and devices --------------------------------------------------------------------------------------

KVM_GROUP = Device(0o660, 36, "kvm")
ROOT_ONLY = Device(0o600, 0, "root")


@pytest.mark.parametrize(
    ("facts", "device", "status", "command"),
    [
        (KvmFacts("x86_64", "x86_64", "vmx", None, 12), KVM_GROUP, "ok", None),
        (KvmFacts("x86_64", "x86_64", None, None, 12), ROOT_ONLY, "warning", None),
        (KvmFacts("x86_64", "x86_64", None, errno.EACCES, None), ROOT_ONLY, "warning", None),
        (KvmFacts("aarch64", "x86_64", "vmx", errno.EACCES, None), KVM_GROUP, "warning", None),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.ENOENT, None), Device(), "warning", "modprobe kvm_intel"),
        (KvmFacts("x86_64", "x86_64", "svm", errno.ENOENT, None), Device(), "warning", "modprobe kvm_amd"),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.EACCES, None), KVM_GROUP, "warning", "usermod -aG kvm "),
        (
            KvmFacts("x86_64", "x86_64", "vmx", errno.EACCES, None),
            ROOT_ONLY,
            "warning",
            "chmod 0666 /dev/kvm",
        ),
        (KvmFacts("aarch64", "aarch64", None, errno.EACCES, None), KVM_GROUP, "warning", "usermod -aG kvm "),
    ],
)
def test_what_mends_kvm(facts: KvmFacts, device: Device, status: str, command: str | None) -> None:
    """A remedy where one helps; none where the processor or the guest's architecture is the reason."""
    finding = doctor.judge_kvm(facts, device)

    assert status == finding.status
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


@pytest.mark.parametrize(
    ("failure", "device", "command"),
    [
        (errno.ENOENT, Device(), "modprobe tun"),
        (errno.EACCES, ROOT_ONLY, "chmod 0666 /dev/net/tun"),
        (errno.EPERM, Device(0o666, 0, "root"), None),
    ],
)
def test_what_mends_tun(failure: int, device: Device, command: str | None) -> None:
    """A missing driver, closed permissions, and a container's refusal, which no command mends."""
    finding = doctor.judge_tun(failure, device)

    assert finding.status == "warning"
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


def test_the_permissions_of_a_device_are_read() -> None:
    """From a device that every host has."""
    assert doctor.read_device(Path("/dev/null")).mode == 0o666
    assert doctor.read_device(Path("/dev/absent")) == Device()


# --- What passt needs of the kernel -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "settings", "started", "status", "command"),
    [
        (0, {}, False, "ok", None),
        (errno.ENOSPC, {"user.max_user_namespaces": 0}, False, "problem", "user.max_user_namespaces=15000"),
        (
            errno.EPERM,
            {"kernel.unprivileged_userns_clone": 0, "user.max_user_namespaces": 9},
            False,
            "problem",
            "kernel.unprivileged_userns_clone=1",
        ),
        (
            0,
            {"kernel.apparmor_restrict_unprivileged_userns": 1},
            False,
            "problem",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (0, {"kernel.apparmor_restrict_unprivileged_userns": 1}, True, "ok", None),
        (errno.EPERM, {}, False, "problem", None),
        (None, {}, False, "warning", None),
    ],
)
def test_what_mends_user_namespaces(
    failure: int | None, settings: dict[str, int], started: bool, status: str, command: str | None
) -> None:
    """Just the setting that is in the way is changed; what passt may do all the same is no problem."""
    finding = doctor.judge_user_namespaces(failure, settings, passt_started=started)

    assert status == finding.status
    assert (command is None) == (finding.remedy is None)
    assert command is None or command in str(finding.remedy)


def test_the_remedy_for_user_namespaces_mends_them() -> None:
    """Really denied, in a user namespace of its own, then really mended by the command printed."""
    if shutil.which("sysctl") is None:
        pytest.skip("sysctl is not installed")
    script = """
import subprocess
from pathlib import Path
from qrapd import doctor
Path("/proc/sys/user/max_user_namespaces").write_text("0")
finding = doctor.examine_user_namespaces(None)
print(finding.status)
subprocess.run(finding.remedy, shell=True, check=True, stdout=subprocess.DEVNULL)
print(doctor.examine_user_namespaces(None).status)
"""
    done = run(script, *isolated("--user", "--map-root-user"), sys.executable)

    assert done.stdout.split() == ["problem", "ok"], done.stderr


@pytest.mark.parametrize(
    ("first_open", "bound", "status", "remedy"),
    [
        (1024, False, "warning", True),
        (1024, None, "warning", True),
        (1024, True, "ok", False),
        (80, False, "ok", False),
        (443, False, "warning", True),
        (0, None, "ok", False),
    ],
)
def test_what_mends_low_ports(first_open: int, bound: bool | None, status: str, remedy: bool) -> None:
    """What a trial gave counts more than the setting: root's passt binds low ports."""
    finding = doctor.judge_low_ports(first_open, bound)

    assert status == finding.status
    assert remedy == (finding.remedy is not None)


def test_low_ports_are_really_tried() -> None:
    """The finding agrees with what a passt of this user does with a low port of the loopback address."""
    first_open = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    port = doctor.free_low_port(first_open, doctor._taken_ports())
    if port is None:
        pytest.skip("every port is open to all here")
    finding = doctor.examine_low_ports(doctor.try_passt())

    bound = doctor.try_passt("--tcp-ports", f"127.0.0.1/{port}").status == 0
    assert bound == (finding.status == "ok")


def test_listening_ports_are_read() -> None:
    """From the kernel's table, where a port of ours must be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = doctor.listening_ports(Path("/proc/net/tcp").read_text())
        assert server.getsockname()[1] in ports


def test_a_free_low_port_is_privileged_and_not_taken() -> None:
    """The highest one below both limits; none where all are open or taken."""
    cases = [(1024, {1023, 1022}), (80, set[int]()), (5000, set[int]()), (1, set[int]()), (3, {1, 2})]

    expected = [1021, 79, 1023, None, None]
    assert expected == [doctor.free_low_port(first, frozenset(taken)) for first, taken in cases]


# --- AppArmor ---------------------------------------------------------------------------------------------

ENFORCED = "docker-default (enforce)\npasst (enforce)\npasst//child (enforce)\n"
PROFILE = "profile passt /usr/bin/passt{,.avx2} {\n  include <abstractions/passt>\n}\n"


@pytest.mark.parametrize(
    ("view", "options", "base", "status"),
    [
        (AppArmorView(enabled=False), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, "other (enforce)\n", PROFILE), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, "passt (complain)\n", PROFILE), ALL_OPTIONS, "/run/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), frozenset(["fd"]), "/run/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), ALL_OPTIONS, "/tmp/qrapd", "ok"),
        (AppArmorView(True, ENFORCED, PROFILE), ALL_OPTIONS, "/run/qrapd", "warning"),
        (AppArmorView(True, None, PROFILE), ALL_OPTIONS, "/run/qrapd", "warning"),
        (AppArmorView(True, None, None), ALL_OPTIONS, "/run/qrapd", "ok"),
    ],
)
def test_apparmor_matters_only_where_something_would_be_denied(
    view: AppArmorView, options: frozenset[str], base: str, status: str
) -> None:
    """An enforced profile, a passt with options that take a path, and a directory outside of its rules."""
    finding = doctor.judge_apparmor(view, options, Path(base))

    assert status == finding.status
    assert (status == "warning") == (finding.remedy is not None)


def test_the_remedy_for_apparmor_lets_the_directory_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit adds one rule inside the profile, after which nothing is found any more."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    profile = tmp_path / "usr.bin.passt"
    profile.write_text(PROFILE)
    edit, _, load = doctor.allow_command(Path("/run/qrapd"), profile).partition(" && ")

    subprocess.run(edit, shell=True, check=True)

    expected = PROFILE.removesuffix("}\n") + "  /run/qrapd/** rw,\n}\n"
    assert expected == profile.read_text()
    assert load == f"apparmor_parser -r {profile}"
    view = AppArmorView(True, ENFORCED, profile.read_text())
    assert doctor.judge_apparmor(view, ALL_OPTIONS, Path("/run/qrapd")).status == "ok"


# --- Places and peers -------------------------------------------------------------------------------------


def test_a_directory_to_be_made_is_fine_where_it_can_be(tmp_path: Path) -> None:
    """The nearest directory that is there decides; nothing is made by looking."""
    base = tmp_path / "a" / "b"

    assert doctor.read_place(base) == Place(base)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_a_problem(tmp_path: Path) -> None:
    """A path through a regular file can never be a directory."""
    (tmp_path / "file").touch()

    finding = doctor.examine_runtime_directory(tmp_path / "file" / "qrapd")

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

    finding = doctor.judge_runtime_directory(Place(base), 1000)

    assert status == finding.status
    assert words in finding.found
    assert (status == "ok") == (finding.remedy is None)


def test_the_kernel_agrees_on_the_length(tmp_path: Path) -> None:
    """A socket binds below the longest name that is promised, and not below one that is longer by one."""
    room = doctor.longest_name(tmp_path)
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
    closed = doctor.judge_runtime_directory(Place(Path("/run/qrapd"), writable=False), 1000)
    frozen = doctor.judge_runtime_directory(Place(Path("/run/qrapd"), writable=False, read_only=True), 1000)

    assert (closed.status, frozen.status) == ("problem", "problem")
    assert "install -d -m 0755 -o 1000 /run/qrapd" in str(closed.remedy)
    assert "export RUNTIME_DIRECTORY=" in str(frozen.remedy)


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
    assert doctor.default_routes(ROUTES) == ["eth0"]
    assert doctor.default_routes6(ROUTES6) == ["eth1"]
    assert doctor.default_routes(ROUTES.splitlines()[0] + "\n" + UNREACHABLE) == []
    assert doctor.default_routes("") == doctor.default_routes6("") == []


@pytest.mark.parametrize(
    ("routes", "routes6", "started", "status", "remedy"),
    [
        (["eth0"], ["eth0"], True, "ok", False),
        (["eth0"], [], True, "ok", False),
        ([], ["eth0"], True, "ok", False),
        ([], [], True, "warning", False),
        ([], [], False, "problem", True),
    ],
)
def test_what_mends_the_host_s_network(
    routes: list[str], routes6: list[str], started: bool, status: str, remedy: bool
) -> None:
    """One default route is enough; without any it depends on the passt that is here."""
    finding = doctor.judge_network(routes, routes6, passt_started=started)

    assert status == finding.status
    assert remedy == (finding.remedy is not None)


def test_the_remedy_for_the_network_mends_it() -> None:
    """In an empty network namespace, where the passt of 2023 ends, it starts after the command printed."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    script = """
import subprocess
from qrapd import doctor
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
finding = doctor.examine_network(doctor.try_passt())
print(finding.status)
if finding.remedy:
    subprocess.run(finding.remedy, shell=True, check=True)
trial = doctor.try_passt()
print(doctor.judge_trial(trial).status, doctor.examine_network(trial).status if finding.remedy else "ok")
"""
    done = run(script, *isolated("--net"), sys.executable)

    assert done.stdout.split() in (["problem", "ok", "ok"], ["warning", "ok", "ok"]), done.stderr


@pytest.mark.parametrize(
    ("listening", "booted", "status"),
    [(True, True, "ok"), (False, False, "ok"), (False, True, "warning")],
)
def test_the_journal_is_missed_only_under_systemd(listening: bool, booted: bool, status: str) -> None:
    """Without systemd, logs have another place; with it, its journal can be started."""
    finding = doctor.judge_journal(listening=listening, booted=booted)

    assert status == finding.status
    assert (status == "warning") == (finding.remedy is not None)
