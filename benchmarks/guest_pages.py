# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest's web server has for the benchmarks, beside its own pages."""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from collections.abc import Iterator

from common import open_directory

from qrapd.guest import GuestImage
from qrapd.guest.initramfs import Entry, pack

__all__ = ["STATIC", "with_pages"]

STATIC = "/answer"
"""A file: whoever asks for it 200 times a second makes the guest start no shell each time."""

# nc gives its connection to dd, whose pieces are large: with nc's own of 1 KiB the guest's CPU is what is measured.
_BLAST = b"""\
#!/bin/sh
. /lib/reply
IFS=,
set -- $QUERY_STRING
case $1 in
  up) set -- "$2" "$3" if=/dev/zero ;;
  down) set -- "$2" "$3" of=/dev/null ;;
esac
setsid nc "$1" "$2" -e dd bs=64k "$3" </dev/null >/dev/null 2>&1 &
reply "$*"
"""


@contextlib.contextmanager
def with_pages(guest: GuestImage) -> Iterator[GuestImage]:
    """The guest with these pages. The kernel unpacks one archive after the other."""
    pages = pack(
        [
            Entry("www/cgi-bin/blast", stat.S_IFREG | 0o755, _BLAST),
            Entry(f"www{STATIC}", stat.S_IFREG | 0o644, b"here\n"),
        ]
    )
    with open_directory("guest") as directory:
        initramfs = directory / "initramfs.cpio"
        initramfs.write_bytes(guest.initramfs.read_bytes() + pages)
        yield dataclasses.replace(guest, initramfs=initramfs)
