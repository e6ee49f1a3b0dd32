# SPDX-License-Identifier: GPL-2.0-or-later
"""VM files on disk: which file a name means, and reading it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qrapd.config import NAME_PATTERN, VmConfiguration, parse
from qrapd.errors import ConfigurationError, Problem, Unavailable

if TYPE_CHECKING:
    from qrapd.agent_file import AgentFile

__all__ = ["Found", "directory", "find", "is_missing", "read", "read_agent_file", "remove", "survey", "write"]

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
    if not is_missing(path):
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
    except FileNotFoundError:
        problem = Problem("", "there is no such file", hint="put it back; what runs of the VM runs on")
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


@dataclass(frozen=True)
class Found:
    """A VM's file in the agent's directory."""

    path: Path
    autostart: bool = False
    error: ConfigurationError | None = None
    """what is wrong with it"""


def survey(vms: Path) -> dict[str, Found]:
    """The VM files of a directory, by their names, in order. What is named otherwise is none: ``.web.toml.swp``."""
    found = {}
    for path in sorted(vms.glob("*.toml")):
        if re.fullmatch(NAME_PATTERN, path.stem):
            try:
                found[path.stem] = Found(path, read(path).autostart)
            except ConfigurationError as error:
                found[path.stem] = Found(path, error=error)
    return found


def write(path: Path, text: str, *, only_new: bool = False) -> bool:
    """Write a VM's file, whole or not at all; returns whether it is a new one.

    :param only_new: leave alone what is there: then nothing was written if this returns False.
    :raise ConfigurationError: it is wrong, or its name is not the file's; nothing was written.
    :raise Unavailable: it cannot be written.
    """
    if (name := parse(text, path).name) != path.stem:
        problem = Problem("name", f"is not {path.stem}, which it is written for", value=repr(name))
        raise ConfigurationError(str(path), [problem])
    # A name of its own: two may write at once, and each has its whole text. By the dot no survey takes it for a VM's.
    new = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.new")
    try:
        is_new = not path.exists()
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The mode is as the umask has it, which tempfile would not let it be.
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "wb") as file:  # noqa: PTH123 (a Path has no fd to open)
            file.write(text.encode())
            file.flush()
            os.fsync(fd)  # the host may lose its power: not the name without the contents
        if only_new:
            return _link(new, path)
        new.replace(path)
    except OSError as error:
        raise _not_changeable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
    return is_new


def _link(new: Path, path: Path) -> bool:
    """Give a file its name if nothing else has it, whoever else tries that at the same time."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove a VM's file.

    :raise Unavailable: that is not allowed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _not_changeable(path, error) from error


def _not_changeable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot change {path}: {error.strerror}",
        hint=f"may the agent's user write in {path.parent}? docs/agent.md says how to let it",
    )


def read_agent_file(configuration: Path) -> AgentFile:
    """Read agent.toml, which may be missing.

    :raise ConfigurationError: it is wrong.
    """
    from qrapd.agent_file import AgentFile, parse

    path = configuration / "agent.toml"
    try:
        return parse(_read_regular(path).decode("utf-8-sig"), path)
    except FileNotFoundError:
        return AgentFile()
    except (OSError, ValueError) as error:
        problem = Problem("", f"cannot be read: {error}", hint="check its mode, owner and contents")
        raise ConfigurationError(str(path), [problem]) from None


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


def is_missing(path: Path) -> bool:
    """Whether there is no such file for certain: one that this user may not look for may be there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _neighbours(folder: Path, what: str) -> str | None:
    names = sorted(path.stem if what.startswith("VM") else path.name for path in folder.glob("*.toml"))
    return f"{what}: {', '.join(names[:10])}" if names else None
