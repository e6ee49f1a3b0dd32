# SPDX-License-Identifier: GPL-2.0-or-later
"""The man pages: that they can be read, and say what the code does."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qrapd.probe import default_paths
from qrapd.qrap_arguments import PATCHED_FD, NoFreeAddress, patch

PROJECT = Path(__file__).resolve().parent.parent
PAGES = sorted((PROJECT / "docs/man").glob("*.1"))
# Without roff's requests, fonts and escapes.
QRAP = re.sub(r"\\f.|^\.\w+ ?", "", (PROJECT / "docs/man/qrap.1").read_text(), flags=re.MULTILINE)
QRAP = QRAP.replace(r"\-", "-").replace(r"\(dq", '"')


@pytest.mark.may_skip(reason="groff is no part that qrapd needs")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_well_formed(page: Path) -> None:
    """groff has no complaint about it."""
    if shutil.which("groff") is None or shutil.which("tbl") is None:
        pytest.skip("there is no groff here")
    done = subprocess.run(
        ["groff", "-man", "-t", "-Tutf8", "-ww", "-z", page], capture_output=True, text=True, timeout=30
    )
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_man(page: Path, tmp_path: Path) -> None:
    """`make man` packs it as man(1) looks for it."""
    for name in ("Makefile", "docs"):
        (tmp_path / name).symlink_to(PROJECT / name)
    subprocess.run(["make", "--silent", "man"], cwd=tmp_path, check=True, timeout=30)
    assert page.read_bytes() == gzip.decompress((tmp_path / f"build/man/man1/{page.name}.gz").read_bytes())


def test_the_paths_of_qrap() -> None:
    """The page names the first and the last socket."""
    paths = default_paths()
    assert paths[0] in QRAP
    assert paths[-1] in QRAP


def addresses(machine: str, other: str) -> list[str]:
    """All addresses that a machine's network device can have, in the order in which they are taken."""
    found: list[str] = []
    arguments = ["-machine", machine, "-device", "x"]
    while True:
        try:
            added = patch(arguments)[len(arguments) + 1]
        except NoFreeAddress:
            return found
        device, _, address = added.partition(",netdev=")[0].partition(",")
        assert device in QRAP
        found.append(address)
        arguments += ["-device", f"{other},{address}"]


@pytest.mark.parametrize(
    ("machine", "shown"),
    [
        ("pc-q35", "bus=pci.{first} to bus=pci.{last}"),
        ("pc-", "bus=pci.0,addr=0x{first} to 0x{last}"),
        ("s390-ccw", "devno=fe.0.{first} to fe.0.{last}"),
    ],
)
def test_the_addresses_of_qrap(machine: str, shown: str) -> None:
    """The page's table has each machine's first and last address."""
    pattern = re.compile(re.escape(shown.partition("{")[0]) + r"(\w+)")
    numbers = [match[1] for address in addresses(machine, "x") if (match := pattern.match(address))]
    assert shown.format(first=numbers[0], last=numbers[-1]) in QRAP


@pytest.mark.parametrize("name", ["virtio-net-pci", "virtio-net-ccw", "e1000", "e1000e", "rtl8139"])
def test_the_devices_of_qrap(name: str) -> None:
    """Those that the page says are dropped, are."""
    assert name in QRAP
    assert ["-netdev", f"socket,fd={PATCHED_FD},id=hostnet0"] == patch(["-device", f"{name},x"])
