# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of this host: where they are, which package has them, and what they can do.

A program is asked, not looked up in a table of versions: `passt --version` says "unknown version" on
Debian 12. Answers are kept per path, modification time and size, so that a program is asked once, and again
after an upgrade. All of this blocks for as long as the program takes to answer (measured: passt 3 ms, QEMU
20 ms), so that an event loop calls it in a thread.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qrapd.errors import Unavailable

__all__ = [
    "Answer",
    "KvmFacts",
    "as_root",
    "ask",
    "decide_kvm",
    "distribution_family",
    "find_binary",
    "guest_architecture",
    "host_architecture",
    "install_command",
    "install_hint",
    "is_static",
    "kvm_works",
    "package_of",
    "passt_help",
    "passt_version",
    "qemu_has_sandbox",
    "qemu_netdevs",
    "qemu_version",
    "read_kvm",
    "without_syslog_noise",
]

# Far above the milliseconds measured, for a cold disk on a busy host.
_ANSWER_TIMEOUT = 10.0  # seconds

# passt of 2023 says this on stderr for each line when there is no /dev/log (measured).
_SYSLOG_NOISE = re.compile(r"Failed to send \d+ bytes to syslog")


# --- Where a program is, and which package has it -------------------------------------------------

_INSTALL_COMMANDS = {
    "debian": "apt install",
    "fedora": "dnf install",
    "rhel": "dnf install",
    "arch": "pacman -S",
    "alpine": "apk add",
    "suse": "zypper install",
}

# os-release(5): ID, and ID_LIKE from the closest relative on.
_FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "fedora": "fedora",
    "rhel": "rhel",
    "centos": "rhel",
    "arch": "arch",
    "alpine": "alpine",
    "opensuse": "suse",
    "opensuse-leap": "suse",
    "opensuse-tumbleweed": "suse",
    "suse": "suse",
    "sles": "suse",
}

_PACKAGES = {
    # passt's source package builds all four; qrap left it in July 2026.
    "passt": {},
    "pasta": {"*": "passt"},
    "pesto": {"*": "passt"},
    "qrap": {"*": "passt"},
    "busybox": {"debian": "busybox-static", "alpine": "busybox-static", "suse": "busybox-static"},
    "dpkg-query": {"*": "dpkg"},
    "unshare": {"*": "util-linux"},
}

# How a distribution groups QEMU's emulators; a target that is not here has a package of its program's name,
# real or virtual (Debian's qemu-system-misc provides qemu-system-riscv64, for one).
_QEMU_GROUPS = {
    "debian": {
        "qemu-system-x86": ("x86_64", "i386"),
        "qemu-system-arm": ("aarch64", "arm"),
        "qemu-system-ppc": ("ppc", "ppc64"),
        "qemu-system-mips": ("mips", "mipsel", "mips64", "mips64el"),
        "qemu-system-sparc": ("sparc", "sparc64"),
    },
    "fedora": {
        "qemu-system-x86": ("x86_64", "i386"),
        "qemu-system-ppc": ("ppc", "ppc64"),
        "qemu-system-mips": ("mips", "mipsel", "mips64", "mips64el"),
        "qemu-system-riscv": ("riscv32", "riscv64"),
        "qemu-system-sparc": ("sparc", "sparc64"),
    },
    "arch": {
        "qemu-system-x86": ("x86_64", "i386"),
        "qemu-system-ppc": ("ppc", "ppc64"),
        "qemu-system-mips": ("mips", "mipsel", "mips64", "mips64el"),
        "qemu-system-riscv": ("riscv32", "riscv64"),
        "qemu-system-sparc": ("sparc", "sparc64"),
    },
    "suse": {
        "qemu-x86": ("x86_64", "i386"),
        "qemu-arm": ("aarch64", "arm"),
        "qemu-ppc": ("ppc", "ppc64"),
        "qemu-s390x": ("s390x",),
    },
}


def find_binary(name: str) -> str:
    """Return the path of program ``name``: a path is taken as it is, a name looked up on PATH.

    Raises Unavailable, with the package and the command that installs it, if there is no such program.
    """
    import shutil  # 9 ms at start-up, which a command that starts nothing need not pay

    if "/" in name:
        return _checked_path(name)
    found = shutil.which(name)
    if found is None:
        searched = os.environ.get("PATH", os.defpath)
        hint = _programs_of_package(name) or install_hint(name)
        raise Unavailable(f"{name} is not installed: looked in {searched}", hint=hint)
    return found


def _programs_of_package(name: str) -> str | None:
    """Which programs are meant, where ``name`` is only that of a package: it may well be installed."""
    for groups in _QEMU_GROUPS.values():
        programs = [f"qemu-system-{target}" for target in groups.get(name, ())]
        if programs and name not in programs:
            return f"that is a package's name; its programs are {', '.join(programs)}"
    return None


def _checked_path(path: str) -> str:
    if not Path(path).exists():
        raise Unavailable(
            f"{path} does not exist", hint=f"correct the path, or give just the name: {Path(path).name}"
        )
    if not Path(path).is_file():
        raise Unavailable(
            f"{path} is not a program: it is no regular file", hint="give the path of the program"
        )
    if not os.access(path, os.X_OK):
        raise Unavailable(
            f"{path} cannot be executed by user {os.geteuid()}",
            hint=f"make it executable: chmod a+x {shlex.quote(path)}",
        )
    return path


def distribution_family(release: Mapping[str, str]) -> str | None:
    """Return which distribution's package names fit, from os-release(5)'s fields; None if unknown."""
    for identity in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if identity in _FAMILIES:
            return _FAMILIES[identity]
    return None


def package_of(name: str, family: str | None) -> str | None:
    """Return the package of distribution ``family`` that has program ``name``; None if it is not known."""
    if name in _PACKAGES:
        names = _PACKAGES[name]
        return names.get(family or "", names.get("*", name))
    if name in {"kvm", "qemu-kvm"}:
        name = f"qemu-system-{host_architecture()}"
    if not name.startswith("qemu-system-"):
        return None
    if family == "rhel":
        return "qemu-kvm"  # the only one there; its program is /usr/libexec/qemu-kvm
    target = name.removeprefix("qemu-system-")
    for package, targets in _QEMU_GROUPS.get(family or "", {}).items():
        if target in targets:
            return package
    return name


def _host_family() -> str | None:
    import platform

    try:
        return distribution_family(platform.freedesktop_os_release())
    except OSError:
        return None


def install_command(name: str, family: str | None = None) -> str | None:
    """Return the command that installs program ``name`` here, or None where that is not known.

    ``family`` is a result of distribution_family(); the host's own by default.
    """
    family = family or _host_family()
    package = package_of(name, family)
    if family is None or package is None:
        return None
    return as_root(f"{_INSTALL_COMMANDS[family]} {package}")


def install_hint(name: str, family: str | None = None) -> str:
    """Say how to get program ``name``: by a command, or by the name of Debian's package."""
    command = install_command(name, family)
    if command is not None:
        return f"install it: {command}"
    package = package_of(name, "debian")
    if package is None:
        return f"install the package that has {name}, or give the program's path"
    return f"install it: Debian's package is {package} (apt install {package})"


def as_root(*commands: str) -> str:
    """Return one command line that runs ``commands``, one after the other, as root on this host."""
    import shutil

    if os.geteuid() == 0:
        return " && ".join(commands)
    for tool in ("sudo", "doas"):
        if shutil.which(tool):
            return " && ".join(f"{tool} {command}" for command in commands)
    return f"su -c {shlex.quote(' && '.join(commands))}"


# --- Asking a program -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a program said, and its exit status (negative: the signal that ended it)."""

    status: int
    output: str
    errors: str


_answers: dict[tuple[str, int, int, tuple[str, ...]], Answer] = {}


def ask(binary: str, *arguments: str, timeout: float = _ANSWER_TIMEOUT) -> Answer:
    """Run ``binary`` with ``arguments`` and nothing on its stdin, or return what it answered before.

    ``timeout`` in seconds. Raises Unavailable if it cannot be run or does not end in time.
    """
    import subprocess

    path = find_binary(binary)
    told = Path(path).stat()
    key = (path, told.st_mtime_ns, told.st_size, arguments)
    if key in _answers:
        return _answers[key]
    command = [path, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{shlex.join(command)} did not end within {timeout:g} s",
            hint="run it in a terminal to see what holds it up",
        ) from error
    except OSError as error:
        raise Unavailable(
            f"{shlex.join(command)} could not be run: {error.strerror}",
            hint=f"is {path} a program for this machine ({host_architecture()})?",
        ) from error
    answer = Answer(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )
    _answers[key] = answer
    return answer


def without_syslog_noise(text: str) -> str:
    """Return ``text`` without passt's complaints that there is no system logger."""
    return "".join(line for line in text.splitlines(keepends=True) if not _SYSLOG_NOISE.match(line))


def passt_help(binary: str) -> str:
    """Return what ``passt --help`` says, wherever it says it.

    The 2023 build writes to stderr and ends with 1, newer ones write to stdout and end with 0 (measured).
    Some end without flushing, so that the last options can be missing: passt_options.read_help() knows.
    Raises Unavailable if there is no such program or what came back is no help text.
    """
    answer = ask(binary, "--help")
    text = without_syslog_noise(answer.output + answer.errors)
    if "--" not in text:
        said = text.strip() or "nothing"
        raise Unavailable(
            f"{binary} --help ended with status {answer.status} and named no options: {said}",
            hint=f"is {binary} really passt? {install_hint('passt')}",
        )
    return text


def passt_version(binary: str) -> str | None:
    """Return passt's version as it gives it itself, else as Debian's package database does; None if unknown.

    Raises Unavailable if there is no such program.
    """
    answer = ask(binary, "--version")
    for line in (answer.output + answer.errors).splitlines():
        match = re.match(r"(?:passt|pasta) (\S.*)", line)
        if match and "unknown version" not in line:
            return match[1].strip()
    if os.path.realpath(find_binary(binary)).startswith("/usr/bin/pass"):
        return _debian_version("passt")
    return None


def _debian_version(package: str) -> str | None:
    try:
        answer = ask("dpkg-query", "-W", "-f", "${Version}", package, timeout=1.0)
    except Unavailable:
        return None
    return answer.output.strip() or None if answer.status == 0 else None


def qemu_version(binary: str) -> tuple[int, int, int]:
    """Return QEMU's version as (major, minor, micro).

    Raises Unavailable if there is no such program or it does not answer as QEMU does.
    """
    answer = ask(binary, "--version")
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", answer.output)
    if match is None:
        said = (answer.output + answer.errors).strip() or "nothing"
        raise Unavailable(
            f"{binary} --version gave no version of QEMU: {said}",
            hint="qemu.binary must name one of QEMU's system emulators, such as qemu-system-x86_64",
        )
    return int(match[1]), int(match[2]), int(match[3] or 0)


def qemu_netdevs(binary: str) -> frozenset[str]:
    """Return the types that QEMU's -netdev knows, such as socket, hubport, vhost-user.

    Raises Unavailable if there is no such program.
    """
    answer = ask(binary, "-netdev", "help")
    return frozenset(line for line in answer.output.splitlines() if re.fullmatch(r"[a-z0-9-]+", line))


def qemu_has_sandbox(binary: str) -> bool:
    """Tell whether QEMU's -sandbox can be used: not every build has it, though the help text of each names it.

    One that is linked with libseccomp has; looking takes 0.3 ms, as the names of a program's libraries are near its
    beginning, and 3 ms where it is not there. Any other is asked, which takes 4 to 30 ms: it may be a script that runs
    another program (Debian's qemu-system-i386, kvm), or be linked statically. (All measured.)
    """
    import mmap

    try:
        path = find_binary(binary)
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\0libseccomp.so.") >= 0:
                return True
        # Options are read in their order, and -version ends it: QEMU makes neither a filter nor a machine.
        answer = ask(binary, "-sandbox", "on", "-version")
    except (Unavailable, OSError, ValueError):  # ValueError: the file is empty
        return False  # what is wrong with the program is told by who runs it
    return answer.status == 0 and "QEMU emulator version" in answer.output


def is_static(path: str | os.PathLike[str]) -> bool:
    """Tell whether the program at ``path`` runs without a dynamic loader: an ELF file without PT_INTERP.

    The layout is elf(5)'s; a file that is no ELF program, or cannot be read, is not static.
    """
    import struct

    try:
        content = Path(path).read_bytes()
        if content[:4] != b"\x7fELF":
            return False
        order = "<" if content[5] == 1 else ">"
        if content[4] == 2:  # 64 bit
            (offset,) = struct.unpack_from(f"{order}Q", content, 32)
            size, count = struct.unpack_from(f"{order}HH", content, 54)
        else:
            (offset,) = struct.unpack_from(f"{order}I", content, 28)
            size, count = struct.unpack_from(f"{order}HH", content, 42)
        kinds = [struct.unpack_from(f"{order}I", content, offset + index * size)[0] for index in range(count)]
    except (OSError, IndexError, OverflowError, struct.error):
        return False
    pt_interp = 3
    return count > 0 and pt_interp not in kinds


# --- KVM ------------------------------------------------------------------------------------------

_ARCHITECTURES = {
    "amd64": "x86_64",
    "i486": "i386",
    "i586": "i386",
    "i686": "i386",
    "arm64": "aarch64",
    "armv7l": "arm",
    "ppc64le": "ppc64",
    "loong64": "loongarch64",
}

# linux/kvm.h: _IO(KVMIO, 0x00). The kernel's KVM documentation: "should refuse to run if it is not 12".
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12


@dataclass(frozen=True)
class KvmFacts:
    """What was seen of KVM; ``decide_kvm`` judges it."""

    guest: str
    host: str
    cpu_flag: str | None
    """vmx or svm, whichever /proc/cpuinfo has."""
    open_errno: int | None
    """Why /dev/kvm could not be opened for reading and writing; None if it could."""
    api_version: int | None
    """What KVM_GET_API_VERSION answered; None if it failed."""

    @property
    def same_architecture(self) -> bool:
        """The host's processor runs the guest's programs as they are."""
        return self.guest == self.host or (self.guest, self.host) == ("i386", "x86_64")


def host_architecture() -> str:
    """Return the host's architecture under QEMU's name for it."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def guest_architecture(binary: str) -> str:
    """Return the architecture that QEMU ``binary`` emulates, from its name; the host's if that tells none."""
    match = re.match(r"qemu-system-([A-Za-z0-9_]+)", Path(binary).name)
    if match is None:
        return host_architecture()
    return _ARCHITECTURES.get(match[1], match[1])


def read_kvm(guest: str, *, proc_cpuinfo: Path, dev_kvm: Path) -> KvmFacts:
    """Look at the processor's flags and open KVM's device as QEMU would."""
    import fcntl

    try:
        flags = set(re.findall(r"\b(?:vmx|svm)\b", proc_cpuinfo.read_text(errors="replace")))
    except OSError:
        flags = set()
    open_errno = api_version = None
    try:
        descriptor = os.open(dev_kvm, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        open_errno = error.errno
    else:
        try:
            api_version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION)
        except OSError:
            api_version = None
        finally:
            os.close(descriptor)
    return KvmFacts(guest, host_architecture(), min(flags, default=None), open_errno, api_version)


def decide_kvm(facts: KvmFacts) -> tuple[bool, str]:
    """Tell whether a guest would really run under KVM, and why or why not."""
    if not facts.same_architecture:
        return False, f"the guest is {facts.guest} and this machine is {facts.host}"
    # /dev/kvm can be there, open and answer, and the guest still never run: seen in virtual machines.
    if facts.host in {"x86_64", "i386"} and facts.cpu_flag is None:
        return False, "the processor offers no virtualization (neither vmx nor svm in /proc/cpuinfo)"
    if facts.open_errno is not None:
        return False, f"/dev/kvm cannot be opened: {os.strerror(facts.open_errno)}"
    if facts.api_version is None:
        return False, "/dev/kvm does not answer as KVM does"
    if facts.api_version != _KVM_API_VERSION:
        return False, f"/dev/kvm speaks version {facts.api_version} of its API, not {_KVM_API_VERSION}"
    flag = f", processor flag {facts.cpu_flag}" if facts.cpu_flag else ""
    return True, f"/dev/kvm answers{flag}"


def kvm_works(
    guest: str | None = None,
    *,
    proc_cpuinfo: Path = Path("/proc/cpuinfo"),
    dev_kvm: Path = Path("/dev/kvm"),
) -> tuple[bool, str]:
    """Tell whether ``guest`` (an architecture, the host's by default) can run under KVM, and why or why not.

    The answer is for a person: "KVM: " or "TCG: " may stand before it.
    """
    return decide_kvm(read_kvm(guest or host_architecture(), proc_cpuinfo=proc_cpuinfo, dev_kvm=dev_kvm))
