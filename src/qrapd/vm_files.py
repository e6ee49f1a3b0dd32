# SPDX-License-Identifier: GPL-2.0-or-later
"""VM files on disk: which file a name means, and reading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qrapd.config import VmConfiguration, parse
from qrapd.errors import ConfigurationError, Problem

__all__ = ["directory", "find", "read"]


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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            str(path), [Problem("", f"cannot be read: {error.strerror}", hint="check its mode and owner")]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            str(path), [Problem("", f"is not UTF-8, as TOML must be (byte {error.start + 1})")]
        ) from error
    return parse(text, path)


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
