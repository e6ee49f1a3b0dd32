# SPDX-License-Identifier: GPL-2.0-or-later
"""VM files on disk: which file a name means, and reading it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from qrapd.config import VmConfiguration, parse
from qrapd.errors import ConfigurationError, Problem

__all__ = ["directory", "find", "read"]

SIZE_LIMIT = 1024 * 1024
"""Bytes. The largest file that makes sense has a few thousand."""


def directory(environment: Mapping[str, str], uid: int) -> Path:
    """Where ``NAME`` is looked up: /etc/qrapd/vms for root, $XDG_CONFIG_HOME/qrapd/vms for others."""
    if uid == 0:
        return Path("/etc/qrapd/vms")
    home = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "/")) / ".config"
    return Path(home) / "qrapd" / "vms"


def find(file_or_name: str, vms: Path) -> Path:
    """The file that is meant: a path (with a slash or ending in .toml), or a name in ``vms``.

    :raise ConfigurationError: there is no such file.
    """
    is_path = "/" in file_or_name or file_or_name.endswith(".toml")
    path = Path(file_or_name) if is_path else vms / f"{file_or_name}.toml"
    if not _is_missing(path):
        return path.absolute()
    if is_path:
        hint = _neighbours(path.parent, "files there")
    else:
        hint = _neighbours(vms, "VMs there") or f"put a file there, or name one: ./{file_or_name}.toml"
    raise ConfigurationError(str(path), [Problem("", "there is no such file", hint=hint)])


def read(path: Path) -> VmConfiguration:
    """Read and check a VM's file.

    :raise ConfigurationError: with all problems found; also when the file cannot be read.
    """
    try:
        text = _read_regular(path).decode(
            "utf-8-sig"
        )  # a byte order mark is no part of TOML, and does no harm
    except IsADirectoryError:
        problem = Problem("", "is a directory", hint="name the file in it, or put a file in its place")
    except OSError as error:
        problem = Problem("", f"cannot be read: {error.strerror}", hint="check its mode and owner")
    except UnicodeDecodeError as error:
        problem = Problem("", f"is not UTF-8, as TOML must be (byte {error.start + 1})")
    except ValueError as error:
        problem = Problem("", str(error), hint="name a VM's file: see config/example.toml")
    else:
        return parse(text, path)
    raise ConfigurationError(str(path), [problem])


def _read_regular(path: Path) -> bytes:
    """Read a file that is one: a pipe or a device might never end.

    :raise ValueError: it is none, or far too large.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:  # noqa: PTH123 (a Path has no fd to open)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        content = file.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"is larger than {SIZE_LIMIT} bytes, as no VM's file is")
    return content


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # reading it will say what is the matter
    return False


def _neighbours(folder: Path, what: str) -> str | None:
    names = sorted(path.stem if what.startswith("VM") else path.name for path in folder.glob("*.toml"))
    return f"{what}: {', '.join(names[:10])}" if names else None
