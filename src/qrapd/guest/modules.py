# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kernel modules to load, and in what order, by what depmod(8) found out.

Formats: modules.dep(5); modules.builtin is described in the kernel's Documentation/kbuild/kbuild.rst.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from ..errors import Unavailable

__all__ = ["MissingModuleError", "ModuleIndex", "module_name", "read_module"]


class MissingModuleError(Exception):
    """A kernel has a wanted module neither as a file nor built in; the argument is the module's name."""


def module_name(path: str) -> str:
    """The name by which the kernel knows a module's file: without suffixes, and ``_`` for ``-``.

    >>> module_name("kernel/drivers/net/virtio-net.ko.xz")
    'virtio_net'
    """
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


@dataclass(frozen=True)
class ModuleIndex:
    """What one kernel has: files by module name, the files that each file needs, and what is built in."""

    files: Mapping[str, str]
    needs: Mapping[str, tuple[str, ...]]
    builtin: frozenset[str]

    @classmethod
    def parse(cls, modules_dep: str, modules_builtin: str = "") -> Self:
        """Reads the texts of modules.dep (``FILE: NEEDED...``) and modules.builtin (a file a line)."""
        needs = {}
        for line in modules_dep.splitlines():
            file, colon, rest = line.partition(":")
            if colon:
                needs[file.strip()] = tuple(rest.split())
        return cls(
            files={module_name(file): file for file in needs},
            needs=needs,
            builtin=frozenset(module_name(file) for file in modules_builtin.split()),
        )

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads modules.dep, and modules.builtin if it is there, of ``/lib/modules/VERSION``.

        Raises OSError.
        """
        builtin = directory / "modules.builtin"
        return cls.parse(
            (directory / "modules.dep").read_text(), builtin.read_text() if builtin.exists() else ""
        )

    def load_order(self, required: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
        """The files to load for these modules, as modules.dep names them, each after all that it needs.

        What is built in is left out, and what of ``optional`` there is not.

        Raises MissingModuleError for the first of ``required`` that there is not.
        """
        order: dict[str, None] = {}
        for name in required:
            self._add(module_name(name), order)
        for name in optional:
            if module_name(name) in self.files:
                self._add(module_name(name), order)
        return list(order)

    def _add(self, name: str, order: dict[str, None]) -> None:
        if name in self.builtin:
            return
        if name not in self.files:
            raise MissingModuleError(name)
        self._add_file(self.files[name], order, [])

    def _add_file(self, file: str, order: dict[str, None], above: list[str]) -> None:
        if file in order or file in above:  # depmod refuses cycles; a broken file must not hang us
            return
        for needed in reversed(self.needs.get(file, ())):  # depmod puts the one to load first last
            self._add_file(needed, order, [*above, file])
        order[file] = None


def read_module(path: Path) -> bytes:
    """The module's ELF image, whatever its file is compressed with: the guest's insmod takes only that.

    Raises OSError, and Unavailable where zstd(1) is needed and not there.
    """
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            return _read_zstd(path)
    raise Unavailable(
        f"the kernel module {path} is compressed in a way that qrapd does not know",
        hint="use a kernel whose modules end in .ko, .ko.xz, .ko.gz or .ko.zst",
    )


def _read_zstd(path: Path) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise Unavailable(
            f"the kernel module {path} is compressed by zstd, and there is no program `zstd` on PATH",
            hint="install the package zstd: apt-get install zstd",
        )
    done = subprocess.run([program, "-dcq", "--", path], capture_output=True, check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"`{program} -dcq -- {path}` ended with {done.returncode}:"
            f" {done.stderr.decode(errors='replace').strip()}",
            hint="the file is probably damaged: reinstall the kernel's package",
        )
    return done.stdout
