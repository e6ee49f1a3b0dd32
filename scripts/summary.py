# SPDX-License-Identifier: GPL-2.0-or-later
"""The result of several pytest runs in one line, counted from their JUnit reports.

``summary.py REPORT...`` prints ``N passed, N failed, N skipped`` and ends with 1 unless all is well. A report
that is missing, broken or empty of tests means that a run came to nothing, and counts as one failure: silence
must not pass. A report of tests that do not decide is named by ``--shown NAME=REPORT``: it has a line of its own
before, and counts for nothing.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

RANK = ["passed", "skipped", "failed"]


def outcome(testcase: ET.Element) -> str:
    """What became of one test; an error in a fixture is a failure."""
    tags = {child.tag for child in testcase}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def outcomes(report: Path) -> dict[str, str]:
    """Each test of a report with its outcome.

    A test that fails and whose fixture then fails too stands in the report twice: the worse counts.

    :raises OSError, ET.ParseError: if there is no such report, or it breaks off
    """
    found: dict[str, str] = {}
    for testcase in ET.parse(report).iter("testcase"):  # pytest's own, a moment ago: not hostile
        name = f"{testcase.get('classname')}::{testcase.get('name')}"
        found[name] = max(outcome(testcase), found.get(name, RANK[0]), key=RANK.index)
    return found


def total(reports: Iterable[Path]) -> Counter[str]:
    """Counts the outcomes of all reports, and says on stderr which of them came to nothing."""
    count: Counter[str] = Counter()
    for report in reports:
        try:
            found = outcomes(report)
        except (OSError, ET.ParseError) as error:
            print(f"{report}: {error}: counted as one failure", file=sys.stderr)
            count["failed"] += 1
            continue
        if not found:
            print(f"{report}: no tests in it: counted as one failure", file=sys.stderr)
            count["failed"] += 1
        count.update(found.values())
    return count


def shown(name: str, report: Path) -> str:
    """A line on a report that does not decide."""
    try:
        found = outcomes(report)
    except (OSError, ET.ParseError):
        return f"{name}: no tests ran (shown only)"
    failed = list(found.values()).count("failed")
    return f"{name}: {failed} of {len(found)} failed (shown only)"


def main() -> int:
    """Prints the line; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description="Sums up JUnit reports of pytest in one line.")
    parser.add_argument("report", nargs="+", type=Path)
    parser.add_argument("--shown", metavar="NAME=REPORT", action="append", default=[])
    options = parser.parse_args()
    for each in options.shown:
        name, _, report = each.partition("=")
        print(shown(name, Path(report)))
    count = total(options.report)
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped", flush=True)
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
