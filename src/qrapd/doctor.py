# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host lacks for VMs networked by passt, and the command that supplies it.

Each subject has a function that looks (``examine_…``) and, where there is anything to decide, a pure one
that judges what was seen (``judge_…``). What can be tried is tried: a user namespace is made, passt is
started and a low port forwarded, since settings and versions only hint at what will happen.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrapd import binaries, runtime_directory
from qrapd.errors import Unavailable

__all__ = ["Finding", "Status", "as_json", "examine", "worst"]

Status = Literal["ok", "warning", "problem"]

_ORDER: tuple[Status, ...] = ("ok", "warning", "problem")

# A link with such an option needs a path that passt may use; all else goes by inherited descriptors.
_OPTIONS_WITH_A_PATH = ("vhost-user", "conf-path")

# What differs between the versions of passt that are about, in the order of their arrival.
_TELLING_OPTIONS = (
    "fd",
    "map-host-loopback",
    "map-guest-addr",
    "dns-host",
    "vhost-user",
    "hostname",
    "stats",
    "conf-path",
)

# user(7) "nobody", which passt changes to when it is started as root: passt(1), --runas.
_NOBODY = 65534


@dataclass(frozen=True)
class Finding:
    """What was found about one subject, in words, and the command line that mends it, if one does."""

    subject: str
    status: Status
    found: str
    remedy: str | None = None


def examine(runtime_dir: Path | None = None, *, qemu: str | None = None) -> list[Finding]:
    """Look at everything that qrapd needs of this host; takes about 0.2 s and leaves nothing behind.

    ``runtime_dir`` is the one to judge, by default the one that would be used; ``qemu`` the emulator, by
    default the one for the host's own architecture. Nothing is raised for what is missing: it is found.
    """
    qemu = qemu or f"qemu-system-{binaries.host_architecture()}"
    passt, options = examine_passt()
    trial = try_passt() if passt.status != "problem" else None
    return [
        passt,
        judge_trial(trial),
        examine_pesto(options),
        examine_qemu(qemu),
        examine_busybox(),
        examine_qrap(),
        examine_kvm(binaries.guest_architecture(qemu)),
        examine_user_namespaces(trial),
        examine_tun(),
        examine_low_ports(trial),
        examine_apparmor(options, runtime_dir),
        examine_runtime_directory(runtime_dir),
        examine_network(trial),
        examine_journal(),
    ]


def worst(findings: Iterable[Finding]) -> Status:
    """Return the gravest status among ``findings``; "ok" of none."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")


def as_json(findings: Iterable[Finding]) -> list[dict[str, str | None]]:
    """Return ``findings`` as plain dictionaries, ready for json.dumps()."""
    return [dataclasses.asdict(finding) for finding in findings]


# --- Programs ---------------------------------------------------------------------------------------------


def _missing(program: str, error: Unavailable) -> Finding:
    return Finding(program, "problem", error.message, binaries.install_command(program))


def examine_passt() -> tuple[Finding, frozenset[str]]:
    """Find passt, its version and what it can do; also return the options that it has."""
    try:
        path = binaries.find_binary("passt")
    except Unavailable as error:
        return _missing("passt", error), frozenset()
    from qrapd.passt_options import read_help  # brings pydantic, which the other subjects do without

    try:
        options = frozenset(read_help(binaries.passt_help(path)))
        version = binaries.passt_version(path)
    except Unavailable as error:
        return Finding("passt", "problem", error.message), frozenset()
    return judge_passt(path, version, options), options


def judge_passt(path: str, version: str | None, options: frozenset[str]) -> Finding:
    """Tell what this passt can do; without --fd it cannot be given a stream, and is of no use here."""
    words = f"{path}, {f'version {version}' if version else 'version unknown'}"
    has = [f"--{option}" for option in _TELLING_OPTIONS if option in options]
    lacks = [f"--{option}" for option in _TELLING_OPTIONS if option not in options]
    words += f"; has {', '.join(has) or 'none of the options asked for'}"
    words += f"; lacks {', '.join(lacks)}" if lacks else ""
    if "fd" not in options:
        return Finding("passt", "problem", words, binaries.install_command("passt"))
    return Finding("passt", "ok", words)


@dataclass(frozen=True)
class Trial:
    """How a trial run of passt ended: its exit status, None if it had to be killed, and what it said."""

    status: int | None
    output: str

    @property
    def last_words(self) -> str:
        """The lines that say why it failed, on one line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return "; ".join(line for line in lines if not line.startswith("Don't run as root"))


def try_passt(*arguments: str, timeout: float = 5.0) -> Trial:
    """Start passt on a stream whose other end is closed already, and see it end (measured: 25 ms).

    It comes that far only with everything in place: addresses copied, ports bound, sandbox made. With the
    stream closed it then ends with 0. Raises Unavailable if there is no passt.
    """
    import socket
    import subprocess

    ours, its = socket.socketpair()
    with its:
        ours.close()
        command = [binaries.find_binary("passt"), "--foreground", "--fd", str(its.fileno()), *arguments]
        child = subprocess.Popen(
            command,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    with child:
        try:
            output, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            return Trial(None, binaries.without_syslog_noise(output.decode(errors="replace")))
    return Trial(child.returncode, binaries.without_syslog_noise(output.decode(errors="replace")))


def judge_trial(trial: Trial | None) -> Finding:
    """Tell whether passt starts on this host. Remedies stand with the causes, which are other findings."""
    subject = "passt starts"
    if trial is None:
        return Finding(subject, "problem", "not tried: there is no passt that can be")
    if trial.status == 0:
        return Finding(subject, "ok", "it started, made its sandbox and ended in order")
    ended = "did not end and was killed" if trial.status is None else f"ended with status {trial.status}"
    return Finding(subject, "problem", f"it {ended}: {trial.last_words or 'it said nothing'}")


def examine_pesto(options: frozenset[str]) -> Finding:
    """Find pesto, which changes the forwarded ports of a running passt."""
    try:
        return judge_pesto(binaries.find_binary("pesto"), options)
    except Unavailable:
        return judge_pesto(None, options)


def judge_pesto(path: str | None, options: frozenset[str]) -> Finding:
    """Tell whether ports can be changed while passt runs: that takes both pesto and a passt to listen."""
    without = "the forwarded ports of a running passt cannot be changed"
    listens = "conf-path" in options
    if path is not None:
        return Finding("pesto", "ok", path if listens else f"{path}, but passt has no --conf-path: {without}")
    if listens:
        return Finding("pesto", "warning", f"not installed: {without}", binaries.install_command("pesto"))
    return Finding(
        "pesto", "ok", f"neither pesto nor a passt that listens to it (both from 2026 on): {without}"
    )


def examine_qemu(binary: str) -> Finding:
    """Find the emulator ``binary``, its version and the network backends that it has."""
    subject = Path(binary).name
    try:
        path = binaries.find_binary(binary)
    except Unavailable as error:
        return _missing(subject, error)
    try:
        return judge_qemu(subject, path, binaries.qemu_version(path), binaries.qemu_netdevs(path))
    except Unavailable as error:
        return Finding(subject, "problem", error.message)


def judge_qemu(subject: str, path: str, version: tuple[int, int, int], netdevs: frozenset[str]) -> Finding:
    """Tell which link modes this QEMU can carry; swapping takes its socket and hubport backends."""
    words = f"{path}, version {'.'.join(map(str, version))}"
    needed = [name for name in ("socket", "hubport") if name not in netdevs]
    if needed:
        words += f"; lacks the network backends {' and '.join(needed)}, which mode swap needs"
        return Finding(subject, "problem", words, binaries.install_command(subject))
    modes = ["swap"]
    if "vhost-user" in netdevs:
        # `reconnect` in whole seconds before 9.2: QEMU's documentation of removed features.
        option = "reconnect-ms" if version >= (9, 2, 0) else "reconnect"
        modes.append(f"vhost-user (by {option})")
    if "passt" in netdevs:
        modes.append("native")
    words += f"; link modes {', '.join(modes)}"
    if version < (7, 2, 0):
        return Finding(subject, "warning", f"{words}; qrapd is tested from 7.2 on")
    return Finding(subject, "ok", words)


def examine_busybox() -> Finding:
    """Find a busybox that runs without libraries: the demo's guest is made of it, and nothing else is."""
    shared = None
    for name in ("busybox", "busybox-static", "busybox.static"):
        try:
            path = binaries.find_binary(name)
        except Unavailable:
            continue
        if binaries.is_static(path):
            return Finding("busybox", "ok", f"{path}, static")
        shared = shared or path
    lack = f"{shared} is not static" if shared else "not installed"
    remedy = binaries.install_command("busybox")
    return Finding("busybox", "warning", f"{lack}: `qrapd demo` cannot build its guest", remedy)


def examine_qrap() -> Finding:
    """Find qrap: passt's own program, or the one that comes with qrapd."""
    try:
        path = Path(binaries.find_binary("qrap"))
        with path.open("rb") as file:
            ours = file.read(2) == b"#!"
    except (Unavailable, OSError):
        return Finding("qrap", "ok", "not on PATH; only command lines written for it need it")
    return Finding(
        "qrap", "ok", f"{path}, {'a script, as qrapd installs it' if ours else 'the one of passt'}"
    )


# --- KVM and devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Who may open a device, from stat(2); ``mode`` is None if it is not there."""

    mode: int | None = None
    gid: int = 0
    group: str | None = None


def read_device(path: Path) -> Device:
    """Look at a device's permissions."""
    import grp

    try:
        told = path.stat()
    except OSError:
        return Device()
    try:
        group = grp.getgrgid(told.st_gid).gr_name
    except KeyError:
        group = None
    return Device(stat.S_IMODE(told.st_mode), told.st_gid, group)


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _open_device(path: str, device: Device) -> tuple[str, str]:
    """Return the command that lets this user open a device that is there, and words to go with it."""
    shared = device.mode is not None and device.mode & 0o060 == 0o060
    if shared and device.group is not None and device.gid != 0:
        command = f"usermod -aG {device.group} {_user()}"
        return binaries.as_root(command), "; after the command log in again"
    return binaries.as_root(f"chmod 0666 {path}"), ""


def examine_kvm(guest: str) -> Finding:
    """Find out whether guests of architecture ``guest`` can run under KVM."""
    facts = binaries.read_kvm(guest, proc_cpuinfo=Path("/proc/cpuinfo"), dev_kvm=Path("/dev/kvm"))
    return judge_kvm(facts, read_device(Path("/dev/kvm")))


def judge_kvm(facts: binaries.KvmFacts, device: Device) -> Finding:
    """Tell whether KVM works and what would make it work; without it guests are slow, but they run."""
    works, reason = binaries.decide_kvm(facts)
    if works:
        return Finding("KVM", "ok", reason)
    words = f"{reason}; guests run under TCG, slowly"
    capable = facts.host not in {"x86_64", "i386"} or facts.cpu_flag is not None
    if not facts.same_architecture or not capable or facts.open_errno is None:
        return Finding("KVM", "warning", words)
    if facts.open_errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(facts.cpu_flag or "", "kvm")
        return Finding("KVM", "warning", words, binaries.as_root(f"modprobe {module}"))
    if facts.open_errno == errno.EACCES:
        remedy, afterwards = _open_device("/dev/kvm", device)
        return Finding("KVM", "warning", words + afterwards, remedy)
    return Finding("KVM", "warning", words)


def examine_tun() -> Finding:
    """Find out whether /dev/net/tun opens: of passt's family only pasta uses it."""
    path = Path("/dev/net/tun")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return judge_tun(error.errno, read_device(path))
    return judge_tun(None, Device())


def judge_tun(open_errno: int | None, device: Device) -> Finding:
    """Tell whether pasta could make its interface; links to VMs do not need it."""
    if open_errno is None:
        return Finding("/dev/net/tun", "ok", "opens (only pasta uses it)")
    words = f"cannot be opened: {os.strerror(open_errno)}; pasta needs it, links to VMs do not"
    if open_errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        return Finding("/dev/net/tun", "warning", words, binaries.as_root("modprobe tun"))
    if open_errno in {errno.EACCES, errno.EPERM} and device.mode is not None and device.mode & 0o006 != 0o006:
        remedy = binaries.as_root("chmod 0666 /dev/net/tun")  # what udev's own rules give it
        return Finding("/dev/net/tun", "warning", words, remedy)
    return Finding("/dev/net/tun", "warning", words)


# --- What passt needs of the kernel -----------------------------------------------------------------------

_NAMESPACE_SETTINGS = (
    "user.max_user_namespaces",
    "kernel.unprivileged_userns_clone",  # Debian's and Arch's kernels
    "kernel.apparmor_restrict_unprivileged_userns",  # Ubuntu, from 23.10 on
)

# Root becomes nobody first, as passt does: root is let through where nobody is not.
_UNSHARE = f"""
import ctypes, os, sys
if os.geteuid() == 0:
    try:
        os.setgroups([])
        os.setgid({_NOBODY})
        os.setuid({_NOBODY})
    except OSError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(ctypes.get_errno() if libc.unshare(0x10000000) else 0)
"""  # CLONE_NEWUSER of linux/sched.h


def _setting(name: str) -> int | None:
    try:
        return int(Path("/proc/sys", *name.split(".")).read_text())
    except (OSError, ValueError):
        return None


def try_user_namespace() -> int | None:
    """Make a user namespace in a process of its own; return 0 or unshare(2)'s error number.

    None if it could not be tried.
    """
    import subprocess

    # Not os.unshare(): Python has it from 3.12 on. Not os.fork(): there may be threads. Not sys.executable:
    # the interpreter can lie where its path is closed to this user, as below another's home.
    try:
        return subprocess.run(["/proc/self/exe", "-I", "-S", "-c", _UNSHARE], check=False).returncode
    except OSError:
        return None


def examine_user_namespaces(trial: Trial | None) -> Finding:
    """Try to make a user namespace, which passt's sandbox is made of."""
    settings = {name: value for name in _NAMESPACE_SETTINGS if (value := _setting(name)) is not None}
    return judge_user_namespaces(try_user_namespace(), settings, passt_started=_started(trial))


def judge_user_namespaces(
    failure: int | None, settings: Mapping[str, int], *, passt_started: bool
) -> Finding:
    """Tell whether passt may make its sandbox; ``failure`` is what try_user_namespace() returned."""
    restricted = settings.get("kernel.apparmor_restrict_unprivileged_userns") == 1
    if passt_started and (failure or restricted):
        # Ubuntu's profile for passt gives it what other programs are denied.
        return Finding("user namespaces", "ok", "denied to programs in general, but passt may make its own")
    if failure is None:
        return Finding(
            "user namespaces", "ok" if passt_started else "warning", "not tried: no Python to try it"
        )
    if not failure and not restricted:
        return Finding("user namespaces", "ok", "one was made")
    reason = f"unshare(CLONE_NEWUSER): {os.strerror(failure)}" if failure else "AppArmor restricts them"
    words = f"passt cannot make its sandbox: {reason}"
    wanted = {
        "user.max_user_namespaces": (settings.get("user.max_user_namespaces") == 0, 15000),
        "kernel.unprivileged_userns_clone": (settings.get("kernel.unprivileged_userns_clone") == 0, 1),
        "kernel.apparmor_restrict_unprivileged_userns": (restricted, 0),
    }
    commands = [f"sysctl -w {name}={value}" for name, (wrong, value) in wanted.items() if wrong]
    if commands:
        return Finding("user namespaces", "problem", words, binaries.as_root(*commands))
    if failure == errno.EPERM:
        words += " (it is refused in a chroot and in most containers: run qrapd outside of them)"
    return Finding("user namespaces", "problem", words)


def _started(trial: Trial | None) -> bool:
    return trial is not None and trial.status == 0


def listening_ports(proc_net_tcp: str) -> frozenset[int]:
    """Return the ports that /proc/net/tcp (or tcp6, proc(5)) shows as taken on this side."""
    lines = proc_net_tcp.splitlines()[1:]
    return frozenset(int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.strip())


def free_low_port(first_open: int, taken: frozenset[int]) -> int | None:
    """Return a port below ``first_open`` and 1024 that nobody has, the highest there is."""
    return next((port for port in range(min(first_open, 1024) - 1, 0, -1) if port not in taken), None)


def examine_low_ports(trial: Trial | None) -> Finding:
    """Let passt forward a port that only privileged programs may bind, on the loopback address."""
    first_open = _setting("net.ipv4.ip_unprivileged_port_start")
    if first_open is None:
        first_open = 1024  # ip(7)'s default
    port = free_low_port(first_open, _taken_ports())
    if port is None or not _started(trial):
        return judge_low_ports(first_open, None)
    return judge_low_ports(first_open, _started(try_passt("--tcp-ports", f"127.0.0.1/{port}")))


def _taken_ports() -> frozenset[int]:
    taken: frozenset[int] = frozenset()
    for name in ("tcp", "tcp6"):
        try:
            taken |= listening_ports(Path("/proc/net", name).read_text())
        except OSError:
            continue
    return taken


def judge_low_ports(first_open: int, bound: bool | None) -> Finding:
    """Tell whether ports below 1024 can be forwarded; ``bound`` is what a trial gave, None without one."""
    subject = "low ports"
    if first_open <= 1:
        return Finding(subject, "ok", "every port can be forwarded")
    rule = f"net.ipv4.ip_unprivileged_port_start is {first_open}"
    if bound:
        # Seen with passt of 2023 started as root: it binds, though it changes to nobody.
        return Finding(
            subject, "ok", f"every port can be forwarded: {rule}, but passt is privileged to bind lower"
        )
    if first_open <= 80:
        return Finding(subject, "ok", f"ports from {first_open} on can be forwarded")
    unknown = "" if bound is False else " (not tried: passt does not start)"
    # The one way that passt(1) recommends.
    remedy = binaries.as_root("sysctl -w net.ipv4.ip_unprivileged_port_start=80")
    return Finding(
        subject, "warning", f"ports below {first_open} cannot be forwarded: {rule}{unknown}", remedy
    )


# --- AppArmor ---------------------------------------------------------------------------------------------

_PASST_PROFILE = Path("/etc/apparmor.d/usr.bin.passt")


@dataclass(frozen=True)
class AppArmorView:
    """What was seen of AppArmor."""

    enabled: bool
    loaded: str | None = None
    """The kernel's list of loaded profiles; None if this user may not read it."""
    profile: str | None = None
    """The text of the profile of passt; None if there is no such file."""


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def examine_apparmor(options: frozenset[str], runtime_dir: Path | None) -> Finding:
    """Find out what AppArmor lets passt do with paths below the runtime directory."""
    enabled = _text(Path("/sys/module/apparmor/parameters/enabled"))
    view = AppArmorView(
        enabled is not None and enabled.strip() == "Y",
        _text(Path("/sys/kernel/security/apparmor/profiles")),
        _text(_PASST_PROFILE),
    )
    try:
        base = runtime_dir or runtime_directory.default_base(os.environ, os.geteuid())
    except Unavailable:
        base = Path("/run/qrapd")
    return judge_apparmor(view, options, base.absolute())


def profile_mode(loaded: str, name: str) -> str | None:
    """Return the mode of profile ``name`` in the kernel's list ("NAME (MODE)" a line), or None."""
    for line in loaded.splitlines():
        profile, _, mode = line.rpartition(" ")
        if profile in {name, f"/usr/bin/{name}"}:
            return mode.strip("()")
    return None


def judge_apparmor(view: AppArmorView, options: frozenset[str], base: Path) -> Finding:
    """Tell what of passt's would be denied: paths outside of the homes and /tmp, in its own profile."""
    subject = "AppArmor"
    if not view.enabled:
        return Finding(subject, "ok", "not enabled")
    mode = profile_mode(view.loaded, "passt") if view.loaded is not None else None
    if view.loaded is None and view.profile is not None:
        mode = "enforce"  # the list is root's to read; a profile that is installed is enforced as a rule
    if mode is None:
        return Finding(subject, "ok", "enabled, with no profile for passt")
    if mode not in {"enforce", "kill", "prompt"}:
        return Finding(subject, "ok", f"passt's profile is in {mode} mode: nothing is denied")
    words = f"passt's profile is in {mode} mode"
    needing = [option for option in _OPTIONS_WITH_A_PATH if option in options]
    if not needing:
        return Finding(subject, "ok", f"{words}; links of source managed use no path, so nothing is denied")
    if _profile_allows(base, view.profile or ""):
        return Finding(subject, "ok", f"{words}, and allows paths below {base}")
    words += f"; links of source managed use no path, but sockets for {' and '.join(needing)} below {base}"
    words += " would be denied"
    return Finding(subject, "warning", words, allow_command(base) if view.profile is not None else None)


def _profile_allows(base: Path, profile: str) -> bool:
    # The rules of passt's contrib/apparmor: owner /tmp/** w, owner @{HOME}/** w.
    if f"{base}/**" in profile:
        return True
    return any(base.is_relative_to(place) for place in ("/tmp", "/home", "/root"))  # noqa: S108 - compared only


def allow_command(base: Path, profile: Path = _PASST_PROFILE) -> str:
    """Return the command that adds ``base`` to passt's profile and loads it.

    Into the profile itself: as Debian 12 ships it, it includes no file for local additions.
    """
    edit = shlex.quote(rf"s|^}}|  {base}/** rw,\n}}|")
    return binaries.as_root(f"sed -i {edit} {profile}", f"apparmor_parser -r {profile}")


# --- Places and peers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What was seen of a directory that is to hold the VMs' own."""

    base: Path
    is_directory: bool = True
    """False if something else has the name."""
    writable: bool = True
    """It can be written, or made if it is not there yet."""
    read_only: bool = False
    """It is on a file system mounted read-only."""


def examine_runtime_directory(runtime_dir: Path | None) -> Finding:
    """Find out which directory holds the sockets and records of running VMs, and whether it can."""
    uid = os.geteuid()
    try:
        base = runtime_dir or runtime_directory.default_base(os.environ, uid)
    except Unavailable as error:
        return Finding("runtime directory", "problem", error.message, _other_base(uid))
    return judge_runtime_directory(read_place(base.absolute()), uid)


def read_place(base: Path) -> Place:
    """Look at ``base``, or at the nearest directory above it that is there."""
    nearest = base
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return Place(
        base,
        is_directory=nearest.is_dir(),
        writable=os.access(nearest, os.W_OK | os.X_OK, effective_ids=True),
        read_only=bool(os.statvfs(nearest).f_flag & os.ST_RDONLY),
    )


def longest_name(base: Path) -> int:
    """Return how many characters the name of a VM may have below ``base``, for its sockets' paths."""
    socket = max(len(name) for name in runtime_directory.SOCKETS)
    return runtime_directory.SUN_PATH_MAX - len(os.fsencode(base)) - len("//") - socket


def judge_runtime_directory(place: Place, uid: int) -> Finding:
    """Tell whether VMs can have their directories there, and how long their names may be."""
    subject = "runtime directory"
    base = place.base
    if not place.is_directory:
        return Finding(subject, "problem", f"{base}: part of the path is no directory", _other_base(uid))
    room = longest_name(base)
    if room < 1:
        words = f"{base} is too long: no socket below it keeps to {runtime_directory.SUN_PATH_MAX} bytes"
        return Finding(subject, "problem", words, _other_base(uid))
    if place.read_only:
        words = f"{base} is on a file system that is mounted read-only"
        return Finding(subject, "problem", words, _other_base(uid))
    if not place.writable:
        remedy = binaries.as_root(f"install -d -m 0755 -o {uid} {shlex.quote(str(base))}")
        return Finding(subject, "problem", f"{base} cannot be written by user {uid}", remedy)
    if room < 63:  # the longest name that a VM may have
        words = f"{base} is long: names of VMs may have {room} characters there instead of 63"
        return Finding(subject, "warning", words, _other_base(uid))
    return Finding(subject, "ok", f"{base} can be written, and names of VMs may have all their 63 characters")


def _other_base(uid: int) -> str:
    """Return the command that chooses a short directory that this user can write."""
    if uid == 0:
        return "export RUNTIME_DIRECTORY=/run/qrapd"
    session = f"/run/user/{uid}"
    if os.access(session, os.W_OK):
        return f"export RUNTIME_DIRECTORY={session}/qrapd"
    # No -p: in /tmp the name may be somebody else's, and then this must fail.
    own = f"/tmp/qrapd-{uid}"  # noqa: S108
    return f"mkdir -m 0700 {own} && export RUNTIME_DIRECTORY={own}"


# linux/route.h, linux/ipv6_route.h: columns are hexadecimal.
_RTF_UP = 0x0001
_RTF_REJECT = 0x0200


def default_routes(proc_net_route: str) -> list[str]:
    """Return the interfaces that have a default route for IPv4, from /proc/net/route."""
    rows = [line.split() for line in proc_net_route.splitlines()[1:]]
    return [
        row[0]
        for row in rows
        if len(row) >= 8
        and int(row[1], 16) == int(row[7], 16) == 0
        and int(row[3], 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP
    ]


def default_routes6(proc_net_ipv6_route: str) -> list[str]:
    """Return the interfaces that have a default route for IPv6, from /proc/net/ipv6_route."""
    rows = [line.split() for line in proc_net_ipv6_route.splitlines()]
    return [
        row[9]
        for row in rows
        if len(row) >= 10
        and int(row[0], 16) == int(row[1], 16) == 0
        and int(row[8], 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP
    ]


def examine_network(trial: Trial | None) -> Finding:
    """Find the interfaces whose addresses and routes passt would give to guests."""
    routes = default_routes(_text(Path("/proc/net/route")) or "")
    routes6 = default_routes6(_text(Path("/proc/net/ipv6_route")) or "")
    return judge_network(routes, routes6, passt_started=_started(trial))


def judge_network(routes: list[str], routes6: list[str], *, passt_started: bool) -> Finding:
    """Tell what passt has to copy: the first interface with a default route, for each of IPv4 and IPv6."""
    subject = "host network"
    versions = [f"{name} by {found[0]}" for name, found in (("IPv4", routes), ("IPv6", routes6)) if found]
    if len(versions) == 2:
        return Finding(subject, "ok", f"default routes for {' and '.join(versions)}")
    if versions:
        return Finding(subject, "ok", f"a default route for {versions[0]} only: guests get that one only")
    if passt_started:
        words = "no default route: passt starts all the same, and guests reach this host only"
        return Finding(subject, "warning", words)
    words = "no default route: passt finds no interface to copy addresses from, and older ones then end;"
    words += " the command makes one that leads nowhere, so that guests reach this host"
    return Finding(subject, "problem", words, _route_command())


def _route_command() -> str:
    # Addresses of RFC 5737, which nobody has; the metric lets every real route go first.
    # Tried with passt of 2023 in an empty network namespace: it starts.
    return binaries.as_root(
        "ip link add qrapd0 type bridge",
        "ip address add 203.0.113.2/24 dev qrapd0",
        "ip link set qrapd0 up",
        "ip route add default via 203.0.113.1 dev qrapd0 metric 65535",
    )


def examine_journal() -> Finding:
    """Find the socket that takes structured log entries: systemd's JOURNAL_NATIVE_PROTOCOL."""
    return judge_journal(
        listening=Path("/run/systemd/journal/socket").is_socket(),
        booted=Path("/run/systemd/system").is_dir(),  # sd_booted(3)
    )


def judge_journal(*, listening: bool, booted: bool) -> Finding:
    """Tell where logs can go."""
    if listening:
        return Finding("journal", "ok", "/run/systemd/journal/socket is there")
    if booted:
        remedy = binaries.as_root("systemctl start systemd-journald.socket")
        return Finding("journal", "warning", "systemd runs, but its journal does not listen", remedy)
    return Finding("journal", "ok", "systemd does not run here: logs go to stderr")
