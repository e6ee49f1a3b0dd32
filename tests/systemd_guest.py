# SPDX-License-Identifier: GPL-2.0-or-later
"""The tiny guest with more in it, for tests in a booted systemd."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from booted import Booted, put
from qrapd.guest import GuestImage
from qrapd.guest.initramfs import Entry, pack

__all__ = ["with_pages"]


def with_pages(
    machine: Booted, guest: GuestImage, pages: Mapping[str, str], files: Mapping[str, str] | None = None
) -> GuestImage:
    """The guest with more pages below /cgi-bin/, and other files in place of its own, ready in the machine's /srv.

    The kernel unpacks one archive after the other, and what comes later replaces what was there:
    Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    added = {f"www/cgi-bin/{name}": text for name, text in pages.items()} | dict(files or {})
    entries = [Entry(path, stat.S_IFREG | 0o755, text.encode()) for path, text in added.items()]
    name = f"{guest.initramfs.stem}-{'-'.join(sorted(pages))}.cpio"
    with tempfile.TemporaryDirectory() as place:
        initramfs = Path(place, name)
        initramfs.write_bytes(guest.initramfs.read_bytes() + pack(entries))
        put(machine, initramfs)
    return replace(guest, initramfs=Path(name))
