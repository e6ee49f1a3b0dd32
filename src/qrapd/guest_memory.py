# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's memory where a vhost-user device is to share it with passt: whose it is, and how large.

Such memory comes from a backend object, and QEMU wants the size of that and of ``-m`` to be the same. Without ``-m``
the machine is as large as its backend; several ``-machine`` options add up (both measured with QEMU 10.0 and 11.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from qrapd.config import option_name
from qrapd.errors import Problem

__all__ = ["MEMORY_ID", "check_shared_memory", "shared_memory", "size_in_bytes"]

MEMORY_ID = "qrapd-memory"

DEFAULT_SIZE = 128 * 2**20
"""Bytes that most machines have without ``-m`` (QEMU's hw/core/machine.c)."""

_GRANULE = 8192
"""QEMU rounds the size that ``-m`` gives up to a multiple of this (its system/vl.c; measured)."""

_SHARED_BY_DEFAULT = ("memory-backend-memfd", "memory-backend-shm")
_SHARABLE = (*_SHARED_BY_DEFAULT, "memory-backend-file", "memory-backend-ram")
"""All with ``share=on``; memory-backend-ram since QEMU 10.0 (measured)."""

_TRUE = ("on", "yes", "true", "y", "")


def shared_memory(args: Sequence[str]) -> list[str]:
    """QEMU's arguments for memory that another process can map, as large as ``args`` want the guest's to be.

    None where ``args`` have backends of their own; `check_shared_memory` has judged these.
    """
    if _has_own(args):
        return []
    size = DEFAULT_SIZE
    for _, text in _sizes(args):
        size = size_in_bytes(text) or size
    backend = f"memory-backend-memfd,id={MEMORY_ID},size={size},share=on"
    return ["-object", backend, "-machine", f"memory-backend={MEMORY_ID}"]


def check_shared_memory(args: Sequence[str], why: str) -> list[Problem]:
    """What in QEMU's arguments keeps the guest's memory from being shared; ``why`` says who wants that."""
    problems = []
    for index, name, value in _options(args):
        if name == "-mem-path":
            problems.append(
                Problem(
                    f"qemu.args[{index}]",
                    f"makes memory that QEMU keeps to itself, and {why} shares it with passt",
                    hint="write -object memory-backend-file,id=ram,size=...,mem-path=...,share=on "
                    "and -machine memory-backend=ram",
                )
            )
        if name == "-object" and (backend := _memory_backend(value)) is not None:
            kind, properties = backend
            if kind not in _SHARABLE or not _is_shared(kind, properties):
                problems.append(
                    Problem(
                        f"qemu.args[{index + 1}]",
                        f"is memory that QEMU keeps to itself, and {why} shares it with passt",
                        value=repr(value),
                        hint="add share=on"
                        if kind in _SHARABLE
                        else "write memory-backend-memfd,share=on,...",
                    )
                )
    if not _has_own(args):
        problems += [
            Problem(
                f"qemu.args[{index + 1}]",
                f"is no size that qrapd can read, and {why} needs memory of just that size",
                value=repr(text),
                hint="write it as -m 512M or -m size=512M,...",
            )
            for index, text in _sizes(args)
            if size_in_bytes(text) is None
        ]
    return problems


def size_in_bytes(text: str) -> int | None:
    """The size of a guest's memory as ``-m`` has it: MiB, unless there is a suffix. None: it cannot be read."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)([bkmgtpe]?)", text, re.IGNORECASE | re.ASCII)
    if match is None:
        return None
    exponent = "bkmgtpe".index(match[2].lower() or "m")
    size = int(Decimal(match[1]) * 2 ** (10 * exponent))
    return -(-size // _GRANULE) * _GRANULE or DEFAULT_SIZE


def _options(args: Sequence[str]) -> Iterator[tuple[int, str | None, str]]:
    """Index and name of each argument, and the one that follows."""
    for index, argument in enumerate(args):
        yield index, option_name(argument), args[index + 1] if index + 1 < len(args) else ""


def _sizes(args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each ``-m`` that gives a size: its index, and the size as it is written."""
    for index, name, value in _options(args):
        if name == "-m":
            properties = _properties(value, "size")
            if "size" in properties:
                yield index, properties["size"]


def _has_own(args: Sequence[str]) -> bool:
    return any(
        (name in ("-machine", "-M") and "memory-backend" in _properties(value, "type"))
        or (name == "-numa" and "memdev" in _properties(value, "type"))
        for _, name, value in _options(args)
    )


def _memory_backend(value: str) -> tuple[str, dict[str, str]] | None:
    """Type and properties of an ``-object``, where it is guest memory."""
    properties = _properties(value, "qom-type")
    if value.startswith("{"):
        try:
            read = json.loads(value)
        except ValueError:
            return None  # QEMU will say so
        properties = {str(k): str(v).lower() for k, v in read.items()} if isinstance(read, dict) else {}
    kind = properties.get("qom-type", "")
    return (kind, properties) if kind.startswith("memory-backend-") else None


def _is_shared(kind: str, properties: dict[str, str]) -> bool:
    if "share" in properties:
        return properties["share"] in _TRUE
    return kind in _SHARED_BY_DEFAULT


def _properties(text: str, implied: str) -> dict[str, str]:
    """``a,b=c`` as QEMU reads it; ``implied`` is the name of a first value without one. Two commas stand for one."""
    found: dict[str, str] = {}
    for index, part in enumerate(re.split(r"(?<!,),(?!,)", text)):
        name, equals, value = part.partition("=")
        if not equals and index == 0:
            name, value = implied, part
        found[name] = value
    return found
