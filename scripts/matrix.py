# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the link tests on each version of the real parts, and tells in a table what works where.

``matrix.py [--only NAME]... [--write] [PYTEST-ARGUMENT...]`` tests on this host and in the roots of
`make newer-roots`. Reports are left in ``build/matrix/NAME.xml``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from matrix_table import (
    HOST,
    Place,
    as_markdown,
    as_text,
    counts,
    debian_name,
    passt_version,
    qemu_version,
    read_report,
    table,
    with_table,
)

PROJECT = Path(__file__).resolve().parent.parent
REPORTS = PROJECT / "build" / "matrix"
PAGE = PROJECT / "docs" / "versions.md"

ROOTS = ("trixie", "sid")
LIMIT = 600
"""Seconds that pytest may take in a root. Two roots that hang still leave .ci/run time for its last line."""


def output(*command: str) -> str:
    """What a command says on stdout, without the last newline; nothing if it cannot be started or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of the parts, in the place where this runs."""
    from qrapd.guest import build_guest, default_cache  # here, as only .venv's Python has it

    try:
        guest = build_guest(default_cache()).version
    except Exception as error:  # the tests will fail by it, and show more of it
        guest = f"? ({error})"
    package = output("dpkg-query", "-W", "-f", "${Version}", "passt")
    return {
        "Debian": debian_name(text("/etc/os-release"), text("/etc/debian_version"), text("/etc/qrapd-root")),
        "QEMU": qemu_version(output("qemu-system-x86_64", "--version")),
        "passt": passt_version(package, output("passt", "--version")),
        "Linux of the guest": guest,
        "Python": platform.python_version(),
    }


def text(path: str) -> str:
    """A file's, or nothing if there is no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> int:
    """Runs a command in the checkout, and returns its status; what it says goes to where this one's output goes."""
    return subprocess.run(command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL).returncode


PIP_LEVELS = ("global", "user", "site", "install", ":env:")
"""In the order in which pip reads its settings: user guide, "Configuration"."""


def pip_variables(settings: str) -> dict[str, str]:
    """From what ``pip config list`` says on the host, what tells pip in a root to fetch packages from the same place.

    Only what can be reached from there: no directories. The last in PIP_LEVELS wins.

    >>> pip_variables("global.index-url='https://mirror.example/simple'\\nglobal.cert='/etc/x.crt'\\n")
    {'PIP_INDEX_URL': 'https://mirror.example/simple'}
    """
    pattern = rf"^({'|'.join(PIP_LEVELS)})\.(index-url|extra-index-url|trusted-host)='(.*)'$"
    lines = re.findall(pattern, settings, re.MULTILINE)
    found = {}
    for _, name, value in sorted(lines, key=lambda line: PIP_LEVELS.index(line[0])):
        reachable = [
            each for each in value.replace("\\n", " ").split() if not each.startswith(("file:", "/"))
        ]
        if reachable:
            found["PIP_" + name.upper().replace("-", "_")] = " ".join(reachable)
    return found


def run_on_host(arguments: Sequence[str]) -> Place:
    """Runs the tests here."""
    place = Place(HOST, versions())
    report = fresh_report(HOST)
    print(heading(place), flush=True)
    note(place, run(pytest_command(sys.executable, report, arguments)), report)
    return place


def run_in_root(name: str, arguments: Sequence[str]) -> Place:
    """Runs the tests in a root."""
    place = Place(name)
    report = fresh_report(name)
    # A root has every part: a test there that skips for want of one hides something.
    settings = pip_variables(output(sys.executable, "-m", "pip", "config", "list"))
    environment = {**os.environ, **settings, "QRAPD_CI": "1"}
    enter = [str(PROJECT / "scripts" / "in-root"), name]
    told = REPORTS / f"{name}.json"
    tell = f".venv/bin/python scripts/matrix.py --versions > {told.relative_to(PROJECT)}"
    if run([*enter, "bash", "-c", f"make --no-print-directory setup && {tell}"], environment):
        place.trouble = "could not be set up"
    else:
        place.versions = json.loads(told.read_text())
        print(heading(place), flush=True)
        # At the limit pytest gets an interrupt, as from a keyboard, and still writes its report.
        limited = ["timeout", "--foreground", "--signal=INT", "--kill-after=60", str(LIMIT)]
        tests = pytest_command(".venv/bin/python", report.relative_to(PROJECT), arguments)
        note(place, run([*enter, *limited, *tests], environment), report)
    return place


def fresh_report(name: str) -> Path:
    """Where a place's report will be; an old one is not to be taken for it."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    return report


def pytest_command(python: str, report: Path, arguments: Sequence[str]) -> list[str]:
    """Of two options ``-m`` pytest takes the last."""
    options = ["--no-header", "-n", "2", "--dist", "loadgroup", "-m", "link", *arguments]
    return [python, "-m", "pytest", *options, f"--junitxml={report}"]


# pytest's exit statuses, and timeout's: of the first two the report tells.
TROUBLE = {
    0: "",
    1: "",
    2: "interrupted",
    5: "no tests",
    124: f"not done in {LIMIT} s",
    137: "had to be killed",
}


def note(place: Place, status: int, report: Path) -> None:
    """Notes what came of the tests."""
    place.trouble = TROUBLE.get(status, f"pytest ended with {status}")
    try:
        place.results = read_report(report.read_text())
    except (OSError, ET.ParseError) as error:
        place.trouble = place.trouble or f"no report: {error}"


def heading(place: Place) -> str:
    """The line above what pytest says."""
    parts = ", ".join(f"{part} {version}" for part, version in place.versions.items() if part != "Debian")
    return f"== {place.title}: {parts}"


def already_tested(reports: Iterable[Path], others: Iterable[Place]) -> Place:
    """This host, from the reports of all tests: of those just what the others have run."""
    place = Place(HOST, versions())
    wanted = {name for other in others for name in other.results}
    results = {}
    for report in reports:
        try:
            found = read_report(report.read_text())
        except (OSError, ET.ParseError) as error:
            place.trouble = f"no report: {error}"
            continue
        results.update({name: result for name, result in found.items() if name in wanted})
    place.results = results
    return place


def verdict(places: Iterable[Place]) -> Iterator[str]:
    """A line for each place where not all is well."""
    for place in places:
        if not place.is_good:
            shown = "" if place.decides else " (shown only: it does not decide)"
            yield f"{place.title}: {counts(place)}{shown}"


def main() -> int:
    """Tests, shows the table, and writes it if asked to; the status says whether the places that decide are well."""
    parser = argparse.ArgumentParser(
        description="Runs the link tests on this host and in the newer Debian roots.",
        epilog="All other arguments go to pytest: -k EXPRESSION, or -m EXPRESSION in place of -m link.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", action="append", choices=[HOST, *ROOTS], help="only there")
    parser.add_argument("--write", action="store_true", help="write the table into docs/versions.md")
    parser.add_argument(
        "--host-report",
        action="append",
        type=Path,
        default=[],
        help="a report of tests that have run on this host",
    )
    parser.add_argument(
        "--versions", action="store_true", help="only tell the versions of the parts here, as JSON"
    )
    options, arguments = parser.parse_known_args()
    if options.versions:
        print(json.dumps(versions()))
        return 0
    if options.only and options.write:
        parser.error("--write needs the whole table")
    # Whoever interrupts this interrupts what it runs as well, and that has to end in order: subprocess must not
    # kill it. SIG_IGN would be inherited.
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))

    wanted = options.only or [HOST, *ROOTS]
    if roots := [name for name in ROOTS if name in wanted]:
        run(
            [PROJECT / "scripts" / "newer-roots", *roots]
        )  # one that fails shows below: there is no such root
    places = []
    for name in (HOST, *ROOTS):
        if name not in wanted or (name == HOST and options.host_report):
            continue
        places.append(run_on_host(arguments) if name == HOST else run_in_root(name, arguments))
        if interrupts:
            return 130
    if options.host_report:
        places.insert(0, already_tested(options.host_report, places))

    rows = table(places, {path.stem: path.read_text() for path in (PROJECT / "tests").glob("test_*.py")})
    print("== what works where", flush=True)
    print(as_text(rows, [34, *([24] * len(places))]), flush=True)
    if options.write:
        made = f"\nTested on {datetime.now(UTC).date()}.\n\n{as_markdown(rows)}\n"
        PAGE.write_text(with_table(PAGE.read_text(), made))
        print(f"{PAGE.relative_to(PROJECT)}: written", flush=True)
    for line in verdict(places):
        print(line, flush=True)
    return 0 if all(place.is_good for place in places if place.decides) else 1


if __name__ == "__main__":
    sys.exit(main())
