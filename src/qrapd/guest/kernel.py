# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux kernel for the guest: the host's own, or its distribution's, downloaded but not installed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import Unavailable
from .modules import MissingModuleError, ModuleIndex

__all__ = ["Architecture", "Kernel", "architecture", "find_kernel"]

REQUIRED = ("virtio_pci", "virtio_net")
"""virtio_net's own needs do not lead to the PCI bus that its NIC sits on."""

OPTIONAL = ("af_packet", "ipv6", "e1000", "button", "evdev")
"""DHCP's raw socket, IPv6, the other NIC that people use, and the power button with its device."""

SYSTEM_DIRECTORIES = ":/usr/sbin:/sbin"  # where depmod lives, and which users have not on their PATH


@dataclass(frozen=True)
class Architecture:
    """The names that differ: Debian's for the machine, and the kernel's for QEMU's first serial port."""

    debian: str
    console: str


ARCHITECTURES = {
    "x86_64": Architecture("amd64", "ttyS0"),
    "aarch64": Architecture("arm64", "ttyAMA0"),  # by the documents; not run
}


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the modules to load, in that order."""

    version: str
    image: Path
    modules: tuple[Path, ...]


def architecture() -> Architecture:
    """This host's. Raises Unavailable for one that is not in the table."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Unavailable(
            f"qrapd can build no guest for {machine}, only for {' and '.join(ARCHITECTURES)}",
            hint="`qrapd run` works with a guest of your own",
        )
    return ARCHITECTURES[machine]


def find_kernel(cache: Path, *, say: Callable[[str], None], root: Path = Path("/")) -> Kernel:
    """The host's own under ``root`` if this user can read it, else that in ``cache``, else a new one there.

    Raises Unavailable.
    """
    reasons: list[str] = []
    for candidates in (_host_kernels(root), _cached_kernels(cache)):
        for version, image, directory in candidates:
            try:
                return _usable(version, image, directory)
            except (OSError, MissingModuleError) as error:
                reason = f"it has no module {error}" if isinstance(error, MissingModuleError) else str(error)
                reasons.append(f"{version}: {reason}")
    return _download(cache, architecture(), say, reasons)


def _usable(version: str, image: Path, directory: Path) -> Kernel:
    """Raises OSError for what this user cannot read, MissingModuleError."""
    with image.open("rb"):  # readable, not just there: Ubuntu's are root's alone
        pass
    files = [
        directory / file for file in ModuleIndex.read(directory).load_order(REQUIRED, OPTIONAL)
    ]  # an absolute path in modules.dep stays one
    for file in files:
        with file.open("rb"):
            pass
    return Kernel(version, image, tuple(files))


Candidates = Iterator[tuple[str, Path, Path]]  # version, image, directory with modules.dep


def _host_kernels(root: Path) -> Candidates:
    """The running one first, then the others, newest first."""
    bases = [root / "lib/modules", root / "usr/lib/modules"]
    versions = {path.name for base in bases if base.is_dir() for path in base.iterdir() if path.is_dir()}
    running = platform.release()
    for version in sorted(versions, key=lambda name: (name == running, _age(name)), reverse=True):
        base = next(base for base in bases if (base / version).is_dir())
        images = [root / "boot" / f"vmlinuz-{version}", base / version / "vmlinuz"]
        yield version, next((image for image in images if image.exists()), images[0]), base / version


def _cached_kernels(cache: Path) -> Candidates:
    for directory in sorted(cache.glob("kernel-*"), key=lambda path: _age(path.name), reverse=True):
        yield directory.name.removeprefix("kernel-"), directory / "vmlinuz", directory


def _age(version: str) -> list[int]:
    """For sorting: 6.10 is newer than 6.9."""
    return [int(number) for number in re.findall(r"\d+", version)]


def _download(cache: Path, target: Architecture, say: Callable[[str], None], reasons: list[str]) -> Kernel:
    tried = f" (tried: {'; '.join(reasons)})" if reasons else ""
    tools = {name: _program(name) for name in ("apt-get", "apt-cache", "dpkg-deb", "depmod")}
    missing = [name for name, path in tools.items() if path is None]
    if missing == ["depmod"]:
        raise Unavailable(
            "the guest needs a kernel. The host has none that this user can read"
            f"{tried}, and to prepare a downloaded one there is no `depmod`",
            hint="install the package kmod: apt-get install kmod",
        )
    if missing:
        raise Unavailable(
            "the guest needs a kernel. The host has none that this user can read"
            f"{tried}, and without {', '.join(missing)} none can be downloaded",
            hint="install a kernel with its modules (Debian: linux-image-"
            f"{target.debian}, Fedora: kernel-core, Arch: linux), or let this user read the one in /boot",
        )
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob("download-*"):  # by a killed run: only one at a time gets here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as name:
        scratch = Path(name)
        packages = _packages(target)
        say(f"downloading the guest's kernel, without installing it: {' '.join(packages)}")
        sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []  # _apt may not write here
        _run(["apt-get", *sandbox, "-q", "download", *packages], scratch, "apt-get update, then try again")
        say("unpacking it and resolving its modules with depmod")
        tree = _unpack(scratch)
        version = next((tree / "lib/modules").iterdir()).name
        depmod = tools["depmod"]
        assert depmod is not None
        _run([depmod, "-b", str(tree), version], scratch, "the package kmod may be too old for this kernel")
        return _keep(version, tree, scratch / "kept", cache / f"kernel-{version}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "/usr/bin:/bin") + SYSTEM_DIRECTORIES)


def _run(command: list[str], directory: Path, hint: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise Unavailable(
            f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}", hint=hint
        )
    return done.stdout


def _packages(target: Architecture) -> list[str]:
    """The packages that hold the kernel which the distribution's meta-package depends on now.

    Debian has image and modules in one package; Ubuntu, and Debian after 13, in several.
    """
    metas = (
        f"linux-image-cloud-{target.debian}",  # the smallest: for virtual machines
        f"linux-image-{target.debian}",
        "linux-image-virtual",
        "linux-image-generic",
    )
    for meta in metas:
        images = _depends(meta)
        if images:
            more = [package for image in images for package in _depends(image)]
            return sorted({*images, *more})
    raise Unavailable(
        f"apt knows no kernel package: none of {', '.join(metas)}",
        hint="apt's lists are probably empty: run `apt-get update` as root, then try again",
    )


def _depends(package: str) -> list[str]:
    listed = subprocess.run(
        ["apt-cache", "depends", package],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    return kernel_packages(listed.stdout)


def kernel_packages(depends: str) -> list[str]:
    """Of apt-cache's answer to ``depends``, the packages that hold a kernel of one version.

    >>> kernel_packages("linux-image-amd64\\n  Depends: linux-image-6.1.0-9-amd64\\n  Depends: kmod\\n")
    ['linux-image-6.1.0-9-amd64']
    """
    return re.findall(
        r"^ [ |](?:Pre)?Depends: (linux-(?:image|base|modules|binary)-\d\S*)$", depends, re.MULTILINE
    )


def _unpack(scratch: Path) -> Path:
    """Image and modules of the downloaded packages, as depmod expects them: lib/modules/VERSION/."""
    tree = scratch / "tree"
    tree.mkdir()
    (tree / "usr").symlink_to(".")  # some depmods look in usr/lib/modules
    for package in sorted(scratch.glob("*.deb")):
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacker:
            assert unpacker.stdout is not None
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                for member in archive:
                    _unpack_member(archive, member, tree)
            unpacker.stdout.read()  # tar's padding: dpkg-deb must not die of a closed pipe
    if not (tree / "lib/modules").is_dir():
        raise Unavailable(
            f"the downloaded packages hold no kernel modules: {_names(scratch)}",
            hint="install a kernel package for this host instead",
        )
    return tree


def _names(scratch: Path) -> str:
    return ", ".join(sorted(path.name for path in scratch.glob("*.deb")))


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: Path) -> None:
    parts = [part for part in PurePosixPath(member.name).parts if part not in (".", "/", "usr")]
    file = archive.extractfile(member) if member.isreg() and ".." not in parts else None
    match parts:
        case ["boot", name] if name.startswith("vmlinuz-"):
            target = tree / "lib/modules" / name.removeprefix("vmlinuz-") / "vmlinuz"
        case [
            "lib",
            "modules",
            _,
            "vmlinuz" | "modules.order" | "modules.builtin" | "modules.builtin.modinfo",
        ]:
            target = tree.joinpath(*parts)
        case ["lib", "modules", _, *_, name] if ".ko" in name:
            target = tree.joinpath(*parts)
        case _:
            return
    if file is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            shutil.copyfileobj(file, copy)


def _keep(version: str, tree: Path, kept: Path, place: Path) -> Kernel:
    """Moves to ``place``, all at once, what the guest needs: 15 MB of the 106 of Debian 12's."""
    directory = tree / "lib/modules" / version
    try:
        kernel = _usable(version, directory / "vmlinuz", directory)
    except (OSError, MissingModuleError) as error:
        raise Unavailable(
            f"the downloaded kernel {version} cannot be used: {error!r}",
            hint="install a kernel package for this host instead",
        ) from error
    files = [kernel.image, *kernel.modules, directory / "modules.dep", directory / "modules.builtin"]
    for file in files:
        if file.exists():
            target = kept / file.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    shutil.rmtree(place, ignore_errors=True)  # what is there already was found to be of no use
    kept.rename(place)
    return _usable(version, place / "vmlinuz", place)
