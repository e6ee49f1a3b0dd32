# SPDX-License-Identifier: GPL-2.0-or-later
"""A tiny Linux guest, made of what the host has, for `qrapd demo` and for the tests.

It asks for a lease on each NIC, answers HTTP on port 80, heeds the power button, and says so on its console::

    guest: lease eth0 192.0.2.2/24 router 192.0.2.1 dns 192.0.2.53
    guest: address eth0 2001:db8::2/64 router fe80::1     not by DHCP: static, or where there is no IPv4
    guest: ready                      every NIC has its lease, or an address without one
    guest: powering down              or `guest: power button ignored`

Over HTTP: ``/`` is a greeting, ``/cgi-bin/state`` tells ``key=value`` lines: uptime (seconds), nic, mac,
address, address6, carrier, carrier_changes, rx_bytes, tx_bytes, boot_id.

Words for the kernel's command line, after GuestImage.command_line:

``guest.powerdown=ignore``    the power button is told of, and nothing else
``guest.poweroff_after=N``    powers down by itself, N seconds after it was ready
``guest.address=A/LEN,R``     eth0 has this IPv4 address, and R for its router, without DHCP; `,R` may be left out
``guest.ipv6=only``           no DHCP; without this word an IPv6-only network is found out after four seconds
``guest.control=1``           more pages in /cgi-bin/: ``poweroff``, ``panic``, ``ping?ADDRESS``,
                              ``flood?MIB`` (lines to the console, then `guest: flood done`),
                              ``traffic?KIND,ADDRESS,PORT`` and ``traffic?stop``

Traffic goes on until it is stopped, as fast as the guest can, and several kinds at once if asked for one after
the other. A connection that is refused, closed, or without an acknowledgement for 1 to 2 s is made again at once.

========  ========================================================================================================
tcp-up    sends the lines 00001 to 99999 over and over, on each connection from the first on
tcp-down  receives, and sends one byte five times per second: that is how it learns that nobody is there any more
udp       sends datagrams of about 100 bytes
========  ========================================================================================================
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ..errors import Unavailable
from .busybox import check_applets, find_busybox
from .initramfs import APPLETS, contents, pack
from .kernel import Kernel, architecture, find_kernel

__all__ = ["GuestImage", "build_guest", "default_cache"]

MEASURED = "cryptomgr.notests"
"""Without the self-tests of its ciphers the kernel boots 0.3 s faster: 1.9 instead of 2.2 s from QEMU's start
to the first HTTP answer (TCG, Debian's 6.1 cloud kernel). Nothing was gained by tsc=reliable,
mitigations=off, no_timer_check, ipv6.disable=1, i8042.nokbd, audit=0, nosmp, or gzip for the initramfs."""

KEPT_IMAGES = 5
"""of 2.5 MB each"""


@dataclass(frozen=True)
class GuestImage:
    """What QEMU's ``-kernel``, ``-initrd`` and ``-append`` want; ``version`` is the kernel's.

    After a panic the guest reboots at once (``panic=-1``): with QEMU's ``-no-reboot`` QEMU ends.
    """

    kernel: Path
    initramfs: Path
    version: str
    command_line: str


def default_cache() -> Path:
    """``$QRAPD_CACHE``, else ``$XDG_CACHE_HOME/qrapd``, else ``~/.cache/qrapd``."""
    if own := os.environ.get("QRAPD_CACHE"):
        return Path(own)
    # The XDG Base Directory Specification: a relative path is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "qrapd"


def build_guest(cache: Path, *, say: Callable[[str], None] = lambda _: None) -> GuestImage:
    """Builds what is not in ``cache`` yet; ``say`` gets one line for each step that does something.

    Several processes may do so at once: one works, the others wait for it.

    Raises Unavailable if the host lacks something, with the package to install as the hint.
    """
    try:
        with _locked(cache):
            kernel = find_kernel(cache, say=say)
            initramfs = _build_initramfs(cache, kernel, find_busybox(), say)
    except OSError as error:
        raise Unavailable(
            f"the guest could not be built in {cache}: {error}",
            hint="set QRAPD_CACHE to a directory that can be written and has 200 MB free",
        ) from error
    return GuestImage(
        kernel=kernel.image,
        initramfs=initramfs,
        version=kernel.version,
        command_line=f"console={architecture().console} quiet loglevel=3 panic=-1 {MEASURED}",
    )


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_initramfs(cache: Path, kernel: Kernel, busybox: Path, say: Callable[[str], None]) -> Path:
    target = cache / f"initramfs-{kernel.version}-{_fingerprint([busybox, *kernel.modules])}.cpio"
    if target.exists():
        return target
    check_applets(busybox, APPLETS)
    say(f"packing the guest: kernel {kernel.version}, {len(kernel.modules)} modules, {busybox}")
    with tempfile.NamedTemporaryFile(dir=cache, prefix="initramfs-", suffix=".new") as new:
        new.write(pack(contents(busybox, kernel.modules)))
        new.flush()
        Path(new.name).chmod(0o644)
        os.link(new.name, target)
    _forget_all_but_newest(cache)
    return target


def _forget_all_but_newest(cache: Path) -> None:
    """Each change of the guest makes another image. The last ones stay: other checkouts may want theirs."""
    with suppress(OSError):
        images = sorted(cache.glob("initramfs-*.cpio"), key=lambda image: image.stat().st_mtime_ns)
        for image in images[:-KEPT_IMAGES]:
            image.unlink()


def _fingerprint(files: list[Path]) -> str:
    """Changes with what goes into the image and with the code that makes it."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    for path, data in sorted(_package_files(resources.files(__package__), "")):
        digest.update(f"{path} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def _package_files(directory: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for item in directory.iterdir():
        if item.name == "__pycache__":
            continue
        if item.is_dir():
            yield from _package_files(item, f"{prefix}{item.name}/")
        else:
            yield prefix + item.name, item.read_bytes()
