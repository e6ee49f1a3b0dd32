# SPDX-License-Identifier: GPL-2.0-or-later
"""What works where, as a table: made of JUnit reports and version numbers. It does no I/O.

A row is a feature: the tests that FEATURES has a title for, else a test module, whose docstring's first sentence
says what works. A column is a place: this host or a root.
A test that skips says by its reason why that does not work there.
"""

from __future__ import annotations

import ast
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from summary import RANK, outcome

HOST = "host"
SHOWN_ONLY = ("sid",)
"""It moves: what fails there today may be its own fault and gone tomorrow."""

FEATURES = {
    "test_link_traffic::test_fifty_kills": '`mode = "swap"`, the default: passt is killed, and replaced',
    "test_link_traffic::test_kills_under_full_traffic": "the same under full traffic",
    "test_link_traffic::test_both_links": "the same with several links at once",
    "test_link_traffic::test_a_static_address": "the same with an address of the guest's own: `guest_addresses`",
    "test_link_traffic::test_an_ipv6_only_guest": "the same with a guest that has IPv6 alone",
    "test_link_modes::test_vhost_user": '`mode = "vhost-user"`: passt is killed or stopped, and replaced',
    "test_link_modes::test_native": '`mode = "native"`: QEMU starts passt, and qrapd watches',
    "test_link_modes::": "modes that the installed parts cannot do are refused",
    "test_link_sources::": '`source`, a path or `"probe"`: the next passt that listens is taken',
    "test_link_stall::": "`stall_timeout`: a passt that hangs is replaced, one that is busy is not",
}
"""The titles of rows, in the table's order, by how the names of their tests begin: the first that fits counts."""

BEGIN, END = "<!-- begin: written by make versions -->", "<!-- end -->"


@dataclass(frozen=True)
class Result:
    """One test's: ``feature`` is a key of FEATURES or a module's name, ``outcome`` one of summary.RANK, and
    ``reason`` why it was skipped."""

    feature: str
    outcome: str
    reason: str = ""


Results = Mapping[str, Result]
"""By the test's name."""


@dataclass
class Place:
    """This host or a root: its versions by part, what came of each test, and what went wrong beside the tests."""

    name: str
    versions: Mapping[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=dict)
    trouble: str = ""

    @property
    def title(self) -> str:
        """How it stands above its column."""
        return self.versions.get("Debian") or {HOST: "this host"}.get(self.name, self.name)

    def count(self, outcome: str) -> int:
        """How many tests had this outcome."""
        return sum(result.outcome == outcome for result in self.results.values())

    @property
    def is_good(self) -> bool:
        """Silence is not: a place where no test passed has shown nothing."""
        return not self.trouble and not self.count("failed") and self.count("passed") > 0

    @property
    def decides(self) -> bool:
        """Whether what fails here breaks the build."""
        return self.name not in SHOWN_ONLY


def read_report(report: str) -> dict[str, Result]:
    """The tests of one JUnit report. Of a test that stands in it twice the worse counts, as in summary.py.

    :raises ET.ParseError: if it breaks off
    """
    found: dict[str, Result] = {}
    for case in ET.fromstring(report).iter("testcase"):  # pytest's own, a moment ago: not hostile
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        reason = "" if skipped is None else (skipped.get("message") or "")
        new = Result(feature_of(name), outcome(case), reason)
        if name not in found or RANK.index(new.outcome) > RANK.index(found[name].outcome):
            found[name] = new
    return found


def feature_of(name: str) -> str:
    """The key of FEATURES for a test as JUnit names it, else its module.

    >>> feature_of("tests.test_link_modes::test_native_is_watched")
    'test_link_modes::test_native'
    >>> feature_of("tests.test_link_news.TestUnderTraffic::test_kills[udp]")
    'test_link_news'
    """
    path, _, test = name.partition("::")
    module = next((part for part in path.split(".") if part.startswith("test_")), path)
    return next((key for key in FEATURES if f"{module}::{test}".startswith(key)), module)


def title(feature: str, source: str = "") -> str:
    """What a row says: by FEATURES, else the first sentence of the module's docstring.

    >>> title("test_link_news", "'A killed passt is replaced. Within a second.'")
    'A killed passt is replaced'
    """
    text = (ast.get_docstring(ast.parse(source)) or "").strip()
    first = text.partition("\n")[0].partition(". ")[0].rstrip(" .:")
    return FEATURES.get(feature) or first or feature.removeprefix("test_").replace("_", " ")


def cell(results: Sequence[Result]) -> str:
    """What a table's cell says of one feature in one place.

    >>> cell([Result("m", "passed"), Result("m", "skipped", "needs QEMU 10.1")])
    'yes, but for 1 of 2: needs QEMU 10.1'
    """
    if not results:
        return "not tested"
    failed = sum(result.outcome == "failed" for result in results)
    if failed:
        return f"**fails**: {failed} of {len(results)}"
    skipped = [result for result in results if result.outcome == "skipped"]
    if not skipped:
        return "yes"
    reasons = "; ".join(dict.fromkeys(result.reason for result in skipped if result.reason)) or "skipped"
    if len(skipped) == len(results):
        return f"no: {reasons}"
    return f"yes, but for {len(skipped)} of {len(results)}: {reasons}"


def table(places: Sequence[Place], sources: Mapping[str, str]) -> list[list[str]]:
    """The rows, heading first: parts with their versions, then features, then counts.

    ``sources`` has the texts of the test modules, by name.
    """
    rows = [["", *(place.title for place in places)]]
    parts = dict.fromkeys(part for place in places for part in place.versions if part != "Debian")
    rows += [[part, *(place.versions.get(part, "?") for place in places)] for part in parts]
    found = {result.feature for place in places for result in place.results.values()}
    for feature in [*(key for key in FEATURES if key in found), *sorted(found - set(FEATURES))]:
        of_it = [[each for each in place.results.values() if each.feature == feature] for place in places]
        rows.append([title(feature, sources.get(feature, "")), *map(cell, of_it)])
    rows.append(["Tests", *(counts(place) for place in places)])
    return rows


def counts(place: Place) -> str:
    """One place's outcome in words."""
    if not place.results:
        return place.trouble or "no tests"
    said = f"{place.count('passed')} passed"
    for kind in ("failed", "skipped"):
        if number := place.count(kind):
            said += f", {number} {kind}"
    return f"{said}; {place.trouble}" if place.trouble else said


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table for docs/versions.md."""
    lines = ["| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def as_text(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """The rows for a terminal: each column as wide as ``widths`` says, at most, its text folded."""
    lines = []
    for row in rows:
        folded = [
            textwrap.wrap(each.replace("**", ""), width) for each, width in zip(row, widths, strict=True)
        ]
        for number in range(max(len(each) for each in folded)):
            parts = [each[number] if number < len(each) else "" for each in folded]
            lines.append("  ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines) + "\n"


def with_table(page: str, made: str) -> str:
    """The page with what is between the two marker lines replaced.

    :raises ValueError: if they are not there, once each and in order
    """
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"the page has to have one line {BEGIN!r} and one {END!r} below it")
    return f"{before}{begin}{made}{end}{after}"


def debian_name(os_release: str, debian_version: str, made: str = "") -> str:
    """What a Debian is called: by its number, or, as sid has none, by the day when its root was ``made``.

    ``os_release`` is that file's text, see os-release(5).

    >>> debian_name('NAME="Debian GNU/Linux"\\nVERSION_ID="13"\\nID=debian\\n', "13.1\\n")
    'Debian 13.1'
    >>> debian_name('NAME="Debian GNU/Linux"\\nID=debian\\n', "forky/sid\\n", "2026-11-21")
    'Debian sid of 2026-11-21'
    """
    values = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    if values.get("ID") != "debian":
        return values.get("PRETTY_NAME") or values.get("NAME") or "Linux"
    version = debian_version.strip()
    if version.endswith("/sid"):
        return f"Debian sid of {made.strip()}" if made.strip() else "Debian sid"
    return f"Debian {version or values.get('VERSION_ID', '')}".strip()


def passt_version(package: str, said: str) -> str:
    """The day of passt's release, which is its version.

    ``said`` is what ``passt --version`` says, which on Debian 12 is that it does not know; ``package`` is the
    version of Debian's package, if any.

    >>> passt_version("0.0~git20230309.7c7625d-1", "passt unknown version")
    '2023-03-09'
    """
    for text in (package, said):
        if found := re.search(r"(20\d\d)_?(\d\d)_?(\d\d)\.", text):
            return "-".join(found.groups())
    return said.partition("\n")[0] or "?"


def qemu_version(said: str) -> str:
    """The number in what QEMU's ``--version`` says.

    >>> qemu_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\\nCopyright ...")
    '7.2.22'
    """
    found = re.search(r"version (\d[\d.]*)", said)
    return found[1] if found else "?"
