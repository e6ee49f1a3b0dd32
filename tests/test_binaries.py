# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding programs, naming the package that has them, and asking them what they can do."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qrapd import binaries
from qrapd.binaries import KvmFacts
from qrapd.errors import Unavailable

Program = Callable[[str, str], str]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Make a shell script that stands for a program, in a directory that is PATH's first."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_a_name_is_looked_up_on_path(program: Program) -> None:
    """A name gives the first program on PATH that has it."""
    expected = program("passt", "true")

    assert expected == binaries.find_binary("passt")


def test_a_path_is_taken_as_it_is(program: Program) -> None:
    """A path to a program is not looked up anywhere."""
    expected = program("other", "true")

    assert expected == binaries.find_binary(expected)


def test_a_missing_program_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the program, its hint a package."""
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(Unavailable, match="qemu-system-x86_64 is not installed") as caught:
        binaries.find_binary("qemu-system-x86_64")

    assert caught.value.hint is not None
    assert "x86" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: None, "does not exist"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.touch(mode=0o644), "cannot be executed"),
    ],
    ids=["absent", "directory", "not executable"],
)
def test_a_path_to_no_program_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    """A path with a slash that cannot be run says why."""
    path = tmp_path / "passt"
    make(path)

    with pytest.raises(Unavailable, match=reason):
        binaries.find_binary(str(path))


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian"}, "debian"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "debian"),
        ({"ID": "fedora"}, "fedora"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "rhel"),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, "arch"),
        ({"ID": "alpine"}, "alpine"),
        ({"ID": "opensuse-slowroll", "ID_LIKE": "suse opensuse"}, "suse"),
        ({"ID": "nixos"}, None),
        ({}, None),
    ],
)
def test_the_distribution_is_recognised_by_its_relatives(
    release: dict[str, str], expected: str | None
) -> None:
    """ID decides, then ID_LIKE from the closest relative on."""
    assert expected == binaries.distribution_family(release)


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("passt", "debian", "passt"),
        ("pesto", "fedora", "passt"),
        ("busybox", "debian", "busybox-static"),
        ("busybox", "arch", "busybox"),
        ("qemu-system-x86_64", "debian", "qemu-system-x86"),
        ("qemu-system-aarch64", "debian", "qemu-system-arm"),
        ("qemu-system-riscv64", "debian", "qemu-system-riscv64"),
        ("qemu-system-aarch64", "fedora", "qemu-system-aarch64"),
        ("qemu-system-x86_64", "rhel", "qemu-kvm"),
        ("qemu-system-x86_64", "arch", "qemu-system-x86"),
        ("qemu-system-x86_64", "alpine", "qemu-system-x86_64"),
        ("qemu-system-aarch64", "suse", "qemu-arm"),
        ("something-else", "debian", None),
    ],
)
def test_packages_by_distribution(name: str, family: str, expected: str | None) -> None:
    """Each distribution's own name for the package that has a program."""
    assert expected == binaries.package_of(name, family)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qemu-system-x86", "its programs are qemu-system-x86_64, qemu-system-i386"),
        ("qemu-system-riscv", "its programs are qemu-system-riscv32, qemu-system-riscv64"),
        ("qemu-system-arm", "install it: "),  # a package, and a program in it
        ("qemu-system-s390x", "install it: "),
    ],
)
def test_a_package_is_not_taken_for_a_program(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    """Who writes the package's name has it most likely installed: that would be no help."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable) as caught:
        binaries.find_binary(name)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "tool"),
    [
        ("debian", "apt install"),
        ("fedora", "dnf install"),
        ("arch", "pacman -S"),
        ("alpine", "apk add"),
        ("suse", "zypper install"),
    ],
)
def test_the_command_is_the_distribution_s_own(family: str, tool: str) -> None:
    """The command that installs passt is one that the host has."""
    command = binaries.install_command("passt", family)

    assert command is not None
    assert f"{tool} passt" in command


def test_root_needs_no_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's commands are printed bare."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    expected = "one && two"
    assert expected == binaries.as_root("one", "two")


def test_each_command_of_a_user_gets_sudo(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is sudo, it stands before every command of a line."""
    program("sudo", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    expected = "sudo one && sudo two"
    assert expected == binaries.as_root("one", "two")


def test_without_sudo_it_is_su(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sudo and doas, all goes to one su."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    expected = "su -c 'one && two'"
    assert expected == binaries.as_root("one", "two")


def test_the_installed_passt_lists_its_options() -> None:
    """The real passt's help comes without its complaints about the system logger."""
    text = binaries.passt_help("passt")

    assert "--fd" in text
    assert "bytes to syslog" not in text


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize("status", [0, 1])
def test_help_comes_from_either_stream_with_any_status(program: Program, stream: str, status: int) -> None:
    """Builds of passt differ in where their help goes and how they end."""
    script = f"echo 'Failed to send 9 bytes to syslog' >&2; echo '  --fd FD' >&{stream}; exit {status}"

    expected = "  --fd FD\n"
    assert expected == binaries.passt_help(program("passt", script))


def test_what_is_no_passt_is_quoted(program: Program) -> None:
    """A program that lists no options is refused with its own words."""
    with pytest.raises(Unavailable, match="status 3 and named no options: what\\?"):
        binaries.passt_help(program("passt", "echo what?; exit 3"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("passt 0.0~git20250503.587980c-2", "0.0~git20250503.587980c-2"),
        ("pasta 2026_01_01.abcdef", "2026_01_01.abcdef"),
        ("passt unknown version", None),
        ("", None),
    ],
)
def test_the_version_is_the_first_line_s(program: Program, said: str, expected: str | None) -> None:
    """passt's version as printed; None where it knows none and no package database can."""
    assert expected == binaries.passt_version(program("passt", f"echo '{said}'\necho 'Copyright Red Hat'"))


def test_the_installed_passt_has_a_version() -> None:
    """From passt itself, or from the package database: something that has digits."""
    version = binaries.passt_version("passt")

    assert version is None or any(character.isdigit() for character in version)


def test_the_installed_qemu_tells_its_version_and_backends() -> None:
    """The real QEMU is one that qrapd can work with."""
    qemu = f"qemu-system-{binaries.host_architecture()}"

    assert binaries.qemu_version(qemu) >= (7, 2, 0)
    assert {"socket", "hubport"} <= binaries.qemu_netdevs(qemu)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2, 22)),
        ("QEMU emulator version 10.1.0-rc1", (10, 1, 0)),
        ("QEMU emulator version 11.1", (11, 1, 0)),
    ],
)
def test_versions_of_qemu(program: Program, said: str, expected: tuple[int, int, int]) -> None:
    """Versions with and without a third number or a suffix."""
    assert expected == binaries.qemu_version(program("qemu", f"echo '{said}'"))


def test_what_is_no_qemu_is_quoted(program: Program) -> None:
    """A program that gives no version of QEMU is refused with its own words."""
    with pytest.raises(Unavailable, match="no version of QEMU: not me"):
        binaries.qemu_version(program("qemu", "echo not me"))


SANDBOXED = 'test "$*" = "-sandbox on -version" && echo QEMU emulator version 9.0.0'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (SANDBOXED, True),
        ("echo there is no option group sandbox >&2; exit 1", False),
        ("echo QEMU emulator version 9.0.0; exit 1", False),
        ("exit 0", False),
    ],
)
def test_a_program_that_is_not_linked_with_libseccomp_is_asked_for_a_sandbox(
    program: Program, script: str, expected: bool
) -> None:
    """It may run one that is."""
    assert expected is binaries.qemu_has_sandbox(program("qemu", script))


def test_a_program_that_is_linked_with_libseccomp_is_not_asked(program: Program, tmp_path: Path) -> None:
    """Its list of libraries tells."""
    path = program("qemu", f"touch {tmp_path}/asked; exit 1")
    with Path(path).open("ab") as file:
        file.write(b"\0libpixman-1.so.0\0libseccomp.so.2\0")
    assert binaries.qemu_has_sandbox(path)
    assert not (tmp_path / "asked").exists()


def test_no_program_has_no_sandbox(tmp_path: Path) -> None:
    """What is wrong with it is told by who wants to run it."""
    (tmp_path / "empty").touch(0o755)
    assert not binaries.qemu_has_sandbox(str(tmp_path / "empty"))
    assert not binaries.qemu_has_sandbox(str(tmp_path / "missing"))


def test_the_installed_qemus_have_a_sandbox_if_they_take_the_option() -> None:
    """Looking comes to what asking comes to; Debian 12's microvm is built without."""
    found = {shutil.which(f"qemu-system-{each}") for each in ("x86_64", "x86_64-microvm", "i386", "aarch64")}
    for path in found - {None}:
        assert path is not None
        assert binaries.qemu_has_sandbox(path) is (
            binaries.ask(path, "-sandbox", "on", "-version").status == 0
        )


def test_a_program_is_asked_once_until_it_changes(program: Program, tmp_path: Path) -> None:
    """The same file answers from memory; a changed one is asked again."""
    count = f"echo x >>{tmp_path}/count; echo QEMU emulator version"
    path = program("qemu", f"{count} 9.0.0")
    binaries.qemu_version(path)

    again = binaries.qemu_version(path)

    expected = (9, 0, 0), 1
    assert expected == (again, len((tmp_path / "count").read_text().split()))

    program("qemu", f"{count} 10.10.10")  # longer, so that size differs where time may not

    newer = (10, 10, 10)
    assert newer == binaries.qemu_version(path)


def test_a_program_that_hangs_is_given_up(program: Program) -> None:
    """No answer in time is an error that gives the command line."""
    with pytest.raises(Unavailable, match=r"passt --help did not end within 0\.1 s"):
        binaries.ask(program("passt", "exec sleep 60"), "--help", timeout=0.1)


def test_a_file_that_is_no_program_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """What the kernel refuses to execute is named."""
    path = tmp_path / "passt"
    path.write_bytes(b"\x7fELF but not really")
    path.chmod(0o755)

    with pytest.raises(Unavailable, match="could not be run: Exec format error"):
        binaries.ask(str(path), "--help")


def test_the_installed_busybox_is_static_and_the_shell_is_not() -> None:
    """Told apart by their program headers, on this machine's own files."""
    assert binaries.is_static(binaries.find_binary("busybox"))
    assert not binaries.is_static(binaries.find_binary("env"))


@pytest.mark.parametrize(("kind", "expected"), [(1, True), (3, False)], ids=["PT_LOAD", "PT_INTERP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [32, 64])
def test_static_by_the_program_headers(
    tmp_path: Path, bits: int, order: str, kind: int, expected: bool
) -> None:
    """Both word sizes and byte orders, by elf(5)."""
    header = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2])
    header = header.ljust(64, b"\0")
    table = struct.pack(f"{order}I", kind).ljust(56, b"\0")
    image = bytearray(header + table)
    if bits == 64:
        struct.pack_into(f"{order}Q", image, 32, 64)
        struct.pack_into(f"{order}HH", image, 54, 56, 1)
    else:
        struct.pack_into(f"{order}I", image, 28, 64)
        struct.pack_into(f"{order}HH", image, 42, 56, 1)
    path = tmp_path / "program"
    path.write_bytes(image)

    assert expected == binaries.is_static(path)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 60])
def test_what_is_no_elf_program_is_not_static(tmp_path: Path, content: bytes) -> None:
    """Scripts and broken files are no static programs, and no errors."""
    path = tmp_path / "program"
    path.write_bytes(content)

    assert not binaries.is_static(path)


@pytest.mark.parametrize(
    ("facts", "works", "reason"),
    [
        (KvmFacts("x86_64", "x86_64", "vmx", None, 12), True, "vmx"),
        (KvmFacts("i386", "x86_64", "svm", None, 12), True, "svm"),
        (KvmFacts("aarch64", "aarch64", None, None, 12), True, "answers"),
        (KvmFacts("x86_64", "x86_64", None, None, 12), False, "neither vmx nor svm"),
        (KvmFacts("aarch64", "x86_64", "vmx", None, 12), False, "the guest is aarch64"),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.ENOENT, None), False, "No such file"),
        (KvmFacts("x86_64", "x86_64", "vmx", errno.EACCES, None), False, "Permission denied"),
        (KvmFacts("x86_64", "x86_64", "vmx", None, None), False, "does not answer"),
        (KvmFacts("x86_64", "x86_64", "vmx", None, 11), False, "version 11"),
    ],
)
def test_kvm_is_chosen_only_where_it_works(facts: KvmFacts, works: bool, reason: str) -> None:
    """All of it must hold: architecture, processor, device and its answer."""
    decided, words = binaries.decide_kvm(facts)

    assert works == decided
    assert reason in words


def test_a_device_that_is_not_kvm_s_is_seen(tmp_path: Path) -> None:
    """A file that opens but knows no KVM_GET_API_VERSION is told from KVM."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu vmx sse\n")
    device = tmp_path / "kvm"
    device.touch()

    facts = binaries.read_kvm("x86_64", proc_cpuinfo=cpuinfo, dev_kvm=device)

    assert KvmFacts("x86_64", binaries.host_architecture(), "vmx", None, None) == facts


def test_a_flag_is_a_whole_word(tmp_path: Path) -> None:
    """Flags that merely contain vmx or svm do not count, nor does the kernel's list of bugs."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu svm_lock vmx_like\n")

    facts = binaries.read_kvm("x86_64", proc_cpuinfo=cpuinfo, dev_kvm=tmp_path / "absent")

    expected = (None, errno.ENOENT)
    assert expected == (facts.cpu_flag, facts.open_errno)


def test_this_machine_gives_an_answer_with_a_reason() -> None:
    """The real files, whatever they say here."""
    works, reason = binaries.kvm_works()

    assert isinstance(works, bool)
    assert reason


@pytest.mark.parametrize(
    ("binary", "expected"),
    [
        ("qemu-system-x86_64", "x86_64"),
        ("/opt/bin/qemu-system-aarch64", "aarch64"),
        ("qemu-system-amd64", "x86_64"),
        ("/usr/libexec/qemu-kvm", binaries.host_architecture()),
    ],
)
def test_the_guest_s_architecture_is_in_the_emulator_s_name(binary: str, expected: str) -> None:
    """QEMU's and Debian's names; a name that tells none means the host's."""
    assert expected == binaries.guest_architecture(binary)
