# SPDX-License-Identifier: GPL-2.0-or-later
"""The static busybox that is all of the guest's user space."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ..errors import Unavailable

__all__ = ["check_applets", "find_busybox", "is_static"]

USUAL = "/bin:/usr/bin:/usr/local/bin:/sbin:/usr/sbin"

PT_INTERP = 3  # elf(5)
HINT = "install the package busybox-static: apt-get install busybox-static"


def find_busybox(path: str | None = None) -> Path:
    """The first static ``busybox`` of ``path`` (default: PATH, then the usual directories).

    Raises Unavailable.
    """
    tried = []
    for directory in (path or f"{os.environ.get('PATH', '')}:{USUAL}").split(":"):
        candidate = Path(directory) / "busybox"
        if not directory or not os.access(candidate, os.X_OK) or not candidate.is_file():
            continue
        if is_static(candidate.read_bytes()):
            return candidate
        tried.append(str(candidate))
    found = f"only ones that need shared libraries: {', '.join(dict.fromkeys(tried))}" if tried else "none"
    raise Unavailable(f"the guest needs a statically linked busybox; found on PATH: {found}", hint=HINT)


def is_static(elf: bytes) -> bool:
    """Whether a 64-bit little-endian ELF program asks for no interpreter (elf(5): no PT_INTERP)."""
    if len(elf) < 64 or not elf.startswith(b"\x7fELF\x02\x01"):
        return False
    (offset,) = struct.unpack_from("<Q", elf, 0x20)  # e_phoff
    size, count = struct.unpack_from("<HH", elf, 0x36)  # e_phentsize, e_phnum
    try:
        kinds = [struct.unpack_from("<I", elf, offset + number * size)[0] for number in range(count)]
    except struct.error:
        return False
    return PT_INTERP not in kinds


def check_applets(busybox: Path, needed: Iterable[str]) -> None:
    """Raises Unavailable if this busybox was built without some of ``needed``."""
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=False)
    missing = sorted(set(needed) - set(listed.stdout.split()))
    if missing:
        raise Unavailable(f"{busybox} lacks what the guest needs: {', '.join(missing)}", hint=HINT)
