# SPDX-License-Identifier: GPL-2.0-or-later
"""The code as text: its linters, its types, its layers, and what no committed file may say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# From the top. A module imports only from rows below its own. Peers do not import each other, but for those
# of one subpackage, which is named once for all its modules. What the layers are for: docs/architecture.md
LAYERS = [
    ["__main__"],
    # the commands
    ["cli", "qrap"],
    ["commands"],
    ["demo", "doctor"],
    # many VMs, or one in the foreground
    ["agent", "foreground"],
    # what others see, and how they ask for it
    ["api", "client"],
    ["metrics"],
    # one VM as its host has it, through all its runs, one run of it, one link of it
    ["agent_vm"],
    ["hosted_vm"],
    ["supervisor"],
    ["vm"],
    ["native", "vhost_user"],
    ["link"],
    # a link's way out, and its place in QEMU
    ["connection", "hub", "left_behind", "machine"],
    ["foreign_passt", "surroundings"],
    # one peer each
    ["agent_socket", "autostarted", "listeners", "passt", "probe", "qemu", "qmp", "stream"],
    ["elsewhere", "handover", "kept_fds", "running", "wrap"],
    ["hosting"],
    ["console", "event_log", "pesto"],
    ["deadlines", "link_events", "link_plans", "outcome"],
    # what is to be started here, and what was
    ["plan", "record", "vm_files"],
    # the operating system
    [
        "background",
        "binaries",
        "failed_starts",
        "garbage",
        "guest",
        "logs",
        "process",
        "regain",
        "runtime_directory",
        "signals",
        "systemd",
        "turns",
        "unix_sockets",
        "vital_signs",
    ],
    ["sock_diag"],
    # pure from here on: they decide and do no I/O, so that a test of them needs no process
    ["wrap_arguments"],
    ["qemu_arguments"],
    ["link_modes"],
    ["forwards", "guest_memory", "hub_mtu", "reload"],
    ["agent_file", "config", "restart"],
    ["passt_options", "status_tracker"],
    ["lifecycle", "link_lifecycle", "messages", "ports", "retries", "vm_status"],
    # and these with the standard library alone
    [
        "backoff",
        "errors",
        "frames",
        "lines",
        "loss",
        "qrap_arguments",
        "rate_limit",
        "stall",
        "transitions",
    ],
    ["__init__"],
]
HEIGHT = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
HIGHEST_PURE = HEIGHT["wrap_arguments"]
HIGHEST_STDLIB_ONLY = HEIGHT["errors"]

# What does I/O or waits; not whole, but what makes sense in a supervisor.
IMPURE = {
    "anyio", "asyncio", "concurrent", "ctypes", "fcntl", "glob", "http", "mmap", "multiprocessing", "pty",
    "qemu", "select", "selectors", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl",
    "structlog", "subprocess", "syslog", "tempfile", "termios", "threading", "urllib",
}  # fmt: skip
# Of os, pure modules use only what handles names. os.path and pathlib are theirs too, for the same purpose.
PURE_OS_NAMES = {"PathLike", "fsdecode", "fsencode", "fspath", "path", "sep"}

# Where a person's terminal is served. All else logs events.
CLICK_IN = {"cli", "commands"}
RICH_IN = {"cli", "commands", "demo"}
# These start in a moment, as qrap did, and so take nothing beyond the standard library themselves.
STDLIB_ONLY = {"__main__", "qrap"} | {name for name in HEIGHT if HEIGHT[name] <= HIGHEST_STDLIB_ONLY}


# ---- the layers


@dataclass(frozen=True, order=True)
class Import:
    """One imported module: by whom, in which line, and its full name (``qrapd.errors``, ``os``)."""

    importer: str
    line: int
    imported: str


def top(module: str) -> str:
    """What LAYERS calls a module: ``guest`` for ``qrapd.guest.kernel``, ``__init__`` for ``qrapd`` itself."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(file: Path, source: Path) -> str:
    """The dotted name of a file below ``source``, the directory that holds the package."""
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, source: Path) -> Iterator[Import]:
    """All imports of a file, those in functions and for type checkers only included.

    ``from qrapd import errors`` imports qrapd.errors if there is such a module, else a name of qrapd itself.
    """
    module = module_name(file, source)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text("utf-8"), file)):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                path = source.joinpath(*base.split("."), alias.name)
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                yield Import(module, node.lineno, f"{base}.{alias.name}" if is_module else base)


def layer_fault(found: Import) -> str | None:
    """Why an import of one of our modules by another is wrong, if it is."""
    importer, imported = top(found.importer), top(found.imported)
    if importer == imported or imported not in HEIGHT:  # the latter has a complaint of its own
        return None
    if HEIGHT[importer] > HEIGHT[imported]:
        return None
    relation = "a peer" if HEIGHT[importer] == HEIGHT[imported] else "above it"
    return f"imports {found.imported}, {relation} (LAYERS in tests/test_code.py)"


def outside_fault(found: Import) -> str | None:
    """Why an import from outside qrapd is wrong in this module, if it is."""
    importer, root = top(found.importer), found.imported.partition(".")[0]
    if importer in STDLIB_ONLY and root not in sys.stdlib_module_names:
        return f"imports {root}: this module takes the standard library only"
    if HEIGHT[importer] <= HIGHEST_PURE and root in IMPURE:
        return f"imports {root}: a pure module decides, and leaves I/O to others"
    for library, allowed in (("click", CLICK_IN), ("rich", RICH_IN)):
        if root == library and importer not in allowed:
            return f"imports {library}: only {' and '.join(sorted(allowed))} may"
    return None


def os_faults(file: Path) -> Iterator[tuple[int, str]]:
    """Where a pure module takes from os more than names, or opens a file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"), file)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name not in PURE_OS_NAMES:
                yield (
                    node.lineno,
                    f"uses os.{name}: a pure module takes only {', '.join(sorted(PURE_OS_NAMES))}",
                )
            case ast.ImportFrom(module="os", names=names):
                for alias in names:
                    if alias.name not in PURE_OS_NAMES:
                        yield node.lineno, f"imports {alias.name} from os: a pure module does no I/O"
            case ast.Call(func=ast.Name(id="open" | "input" as name)):
                yield node.lineno, f"calls {name}(): a pure module does no I/O"


def faults(source: Path) -> list[str]:
    """All that is wrong with the imports of the package below ``source``, each with file and line."""
    found: list[str] = []
    for file in sorted((source / "qrapd").rglob("*.py")):
        where, module = file.relative_to(source), module_name(file, source)
        if top(module) not in HEIGHT:
            found.append(
                f"{where}: has no layer. Add {top(module)!r} to LAYERS in tests/test_code.py and to the "
                "table in docs/architecture.md: one row above the highest that it imports"
            )
            continue
        for each in imports_of(file, source):
            ours = each.imported.partition(".")[0] == "qrapd"
            if fault := layer_fault(each) if ours else outside_fault(each):
                found.append(f"{where}:{each.line}: {fault}")
        if HEIGHT[top(module)] <= HIGHEST_PURE:
            found += [f"{where}:{line}: {fault}" for line, fault in os_faults(file)]
    return list(dict.fromkeys(found))  # once for each line, however many names it imports


def test_layers() -> None:
    """Modules import from lower layers only, pure ones do no I/O, and few know of terminals."""
    if found := faults(PROJECT / "src"):
        pytest.fail("\n".join(found), pytrace=False)


def test_layers_are_documented() -> None:
    """The table for readers has every module."""
    table = (PROJECT / "docs" / "architecture.md").read_text("utf-8").partition("\n## Layers\n")[2]
    named = set(re.findall(r"`(\w+)`", table.partition("\n## ")[0]))
    assert set() == HEIGHT.keys() - named - {"__init__"}


CASES = {
    "an upward import": (
        "errors",
        "from qrapd.vm import Vm",
        "qrapd/errors.py:1: imports qrapd.vm, above it",
    ),
    "right ones": ("link", "import qrapd.qmp\nimport qrapd.link", None),
    "a peer": ("qmp", "from qrapd import stream", "qrapd/qmp.py:1: imports qrapd.stream, a peer"),
    "a relative one": ("qmp", "from . import stream", "qrapd/qmp.py:1: imports qrapd.stream, a peer"),
    "one in a function": (
        "qmp",
        "def f():\n  import qrapd.stream",
        "qrapd/qmp.py:2: imports qrapd.stream, a peer",
    ),
    "one for types only": (
        "qmp",
        "if TYPE_CHECKING:\n  from .vm import Vm",
        "qrapd/qmp.py:2: imports qrapd.vm, above",
    ),
    "right ones in a subpackage": (
        "guest/kernel",
        "from .image import f\nfrom qrapd.guest import image",
        None,
    ),
    "out of a subpackage": (
        "guest/kernel",
        "from ..logs import f",
        "qrapd/guest/kernel.py:1: imports qrapd.logs, a peer",
    ),
    "I/O in a pure module": (
        "config",
        "import socket",
        "qrapd/config.py:1: imports socket: a pure module",
    ),
    "os in a pure module": (
        "config",
        "import os\nos.fspath(os.getcwd())",
        "qrapd/config.py:2: uses os.getcwd",
    ),
    "open in a pure module": ("config", "open('x')", "qrapd/config.py:1: calls open()"),
    "a library at the bottom": (
        "frames",
        "import pydantic",
        "qrapd/frames.py:1: imports pydantic: this module takes the",
    ),
    "a library in qrap": (
        "qrap",
        "import anyio",
        "qrapd/qrap.py:1: imports anyio: this module takes the standard",
    ),
    "click in the middle": (
        "vm",
        "import click.testing",
        "qrapd/vm.py:1: imports click: only cli and commands may",
    ),
    "rich in the middle": (
        "vm",
        "from rich import print",
        "qrapd/vm.py:1: imports rich: only cli and commands and demo may",
    ),
    "a new module": ("novelty", "", "qrapd/novelty.py: has no layer. Add 'novelty' to LAYERS"),
}


@pytest.mark.parametrize(("module", "text", "expected"), CASES.values(), ids=CASES.keys())
def test_layer_check(tmp_path: Path, module: str, text: str, expected: str | None) -> None:
    """The check finds each kind of wrong import, in the line where it is, and lets right ones pass."""
    for each in ("stream", "vm", "qmp", "guest/image", module):
        file = tmp_path / "qrapd" / f"{each}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if each == module else "")
    found = faults(tmp_path)
    assert (0 if expected is None else 1) == len(found), found
    assert all(fault.startswith(str(expected)) for fault in found), found


# ---- linters


def python_directories() -> list[str]:
    """The directories of the repository that hold Python."""
    return [each for each in ("src", "tests", "benchmarks", "scripts") if any((PROJECT / each).rglob("*.py"))]


def check(*command: str) -> None:
    """Runs a linter of this environment over the repository; what it says is the failure's message."""
    command = (sys.executable, "-m", *command)
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    done = subprocess.run(
        [*command, *python_directories()],
        cwd=PROJECT,
        stdin=null,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}", pytrace=False)


def test_ruff_check() -> None:
    """Ruff finds nothing in any Python file."""
    check("ruff", "check", "--quiet", "--output-format=concise")


def test_ruff_format() -> None:
    """Every Python file is formatted as `make format` would."""
    check("ruff", "format", "--check", "--quiet")


def test_mypy() -> None:
    """All types are right under mypy --strict."""
    check("mypy", "--strict", "--no-error-summary")


# ---- every file


def committed_files() -> list[Path]:
    """What is in the repository, and what the next commit would add to it."""
    # The checkout may belong to another user than the one who tests: git wants to be told that it is meant.
    trusted = ["-c", f"safe.directory={PROJECT}"]
    command = ["git", *trusted, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    # In a hook git names its repository in the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    files = {PROJECT / name for name in done.stdout.split("\0") if name}
    return sorted(file for file in files if file.is_file())


def test_no_registry_is_named() -> None:
    """No file names the host of a package registry: where packages come from is for each host to say."""
    # In pieces, so that this file passes its own test.
    names = """
        pypi org, pythonhosted org, pypi python org, deb debian org, ftp debian org, security debian org,
        snapshot debian org, archive ubuntu com, registry npmjs org, crates io, proxy golang org
    """
    hosts = [".".join(name.split()).encode() for name in names.split(",")]
    found = []
    for file in committed_files():
        content = file.read_bytes()
        found += [f"{file.relative_to(PROJECT)}: {host.decode()}" for host in hosts if host in content]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_licence_line() -> None:
    """Every Python file and script says its licence in its first line, below #! where it has that."""
    missing = []
    for file in committed_files():
        head = file.read_bytes()[:200].splitlines()
        is_script = bool(head) and head[0].startswith(b"#!")
        if file.suffix == ".py" or is_script:
            line = head[is_script] if len(head) > is_script else b""
            if line != b"# SPDX-License-Identifier: GPL-2.0-or-later":
                missing.append(str(file.relative_to(PROJECT)))
    if missing:
        pytest.fail("\n".join(missing), pytrace=False)
