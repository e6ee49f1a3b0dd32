# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for the memory that a guest shares with passt: its size, whose it is, and what keeps it from being shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.guest_memory import check_shared_memory, shared_memory, size_in_bytes

MIB = 2**20


def size_of(*args: str) -> int:
    """The size of the backend that is made for these arguments."""
    _, backend, _, _ = shared_memory(args)
    return int(backend.partition("size=")[2].partition(",")[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", 512 * MIB),
        ("512M", 512 * MIB),
        ("1g", 1024 * MIB),
        ("0.0625G", 64 * MIB),
        ("1.5G", 1536 * MIB),
        ("128b", 8192),
        ("100k", 106496),
        ("0", 128 * MIB),
        ("1T", 2**40),
        ("", None),
        ("0x40", None),
        ("1GiB", None),
        ("-1", None),
        ("1e3", None),
        ("\u0661", None),
    ],
)
def test_sizes_are_read_as_qemu_reads_them(text: str, expected: int | None) -> None:
    """The values are those that QEMU 10.0 and 11.1 gave in query-memdev."""
    assert expected == size_in_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_none(text: str) -> None:
    """Whatever stands after -m."""
    size = size_in_bytes(text)
    assert size is None or (size > 0 and size % 8192 == 0)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], 128 * MIB),
        (["-m", "1G"], 1024 * MIB),
        (["--m", "1G"], 1024 * MIB),
        (["-m", "size=1G,slots=2,maxmem=4G"], 1024 * MIB),
        (["-m", "slots=2,size=256M,maxmem=4G"], 256 * MIB),
        (["-m", "1G", "-m", "64M"], 64 * MIB),
        (["-m", "1G", "-m", "slots=1,maxmem=4G"], 1024 * MIB),
        (["-m"], 128 * MIB),
        (["-smp", "2", "-machine", "q35"], 128 * MIB),
    ],
)
def test_the_backend_is_as_large_as_m_wants_the_guest(args: list[str], expected: int) -> None:
    """The last size counts; QEMU refuses a backend of another size."""
    assert expected == size_of(*args)


def test_the_arguments() -> None:
    """The machine's other properties stay the user's: several -machine add up."""
    assert [
        *("-object", "memory-backend-memfd,id=qrapd-memory,size=33554432,share=on"),
        *("-machine", "memory-backend=qrapd-memory"),
    ] == shared_memory(["-m", "32M"])


OWN = "memory-backend-file,id=ram,size=1G,mem-path=/dev/hugepages"


@pytest.mark.parametrize(
    "args",
    [
        ["-object", f"{OWN},share=on", "-machine", "q35,memory-backend=ram"],
        ["-object", f"{OWN},share=yes", "-M", "memory-backend=ram"],
        ["-object", "memory-backend-memfd,id=ram,size=1G", "-machine", "memory-backend=ram", "-m", "0x1"],
        [
            *("-object", '{"qom-type": "memory-backend-memfd", "id": "r0", "size": 1024, "share": true}'),
            *("-numa", "node,memdev=r0"),
        ],
        ["-object", "memory-backend-shm,id=ram,size=1G", "-machine", "memory-backend=ram"],
        ["-object", "memory-backend-ram,id=ram,size=1G,share=on", "-machine", "memory-backend=ram"],
    ],
)
def test_a_shared_backend_of_the_users_is_left_alone(args: list[str]) -> None:
    """And then there is none of ours."""
    assert [] == shared_memory(args)
    assert [] == check_shared_memory(args, "a link")


@pytest.mark.parametrize(
    ("args", "key", "hint"),
    [
        (["-object", OWN, "-machine", "memory-backend=ram"], "qemu.args[1]", "add share=on"),
        (["-m", "1G", "-object", f"{OWN},share=off"], "qemu.args[3]", "add share=on"),
        (
            ["-object", "memory-backend-epc,id=r,size=1G,share=on", "-numa", "node,memdev=r"],
            "qemu.args[1]",
            "write memory-backend-memfd",
        ),
        (
            ["-object", '{"qom-type": "memory-backend-memfd", "id": "r", "share": false}'],
            "qemu.args[1]",
            "add share=on",
        ),
        (["-mem-path", "/dev/hugepages"], "qemu.args[0]", "write -object memory-backend-file"),
        (["-smp", "2", "-m", "0x40000000"], "qemu.args[3]", "write it as -m 512M"),
    ],
)
def test_memory_that_cannot_be_shared_is_refused(args: list[str], key: str, hint: str) -> None:
    """With its place in the file and a way out."""
    (problem,) = check_shared_memory(args, "link[0] with its mode 'vhost-user'")
    assert key == problem.key
    assert "link[0] with its mode 'vhost-user'" in problem.reason
    assert problem.hint is not None
    assert problem.hint.startswith(hint)


def test_other_objects_are_nobodys_business() -> None:
    """Nor is JSON that QEMU will complain of."""
    args = ["-object", "iothread,id=io0", "-object", "{", "-object", '["a"]', "-object"]
    assert [] == check_shared_memory(args, "a link")
