# SPDX-License-Identifier: GPL-2.0-or-later
"""What works where, as a table, and the way into the roots where that is found out."""

from __future__ import annotations

import doctest
import importlib
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from qrapd.guest.busybox import find_busybox

PROJECT = Path(__file__).resolve().parent.parent

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_link_news" name="test_killed"/>
<testcase classname="tests.test_link_news.TestBusy" name="test_killed[udp]"/>
<testcase classname="tests.test_link_modes" name="test_native_ends">
  <skipped type="pytest.skip" message="needs QEMU 10.1">tests/test_link_modes.py:9: needs QEMU 10.1</skipped></testcase>
<testcase classname="tests.test_link_modes" name="test_refused"/>
<testcase classname="tests.test_link_modes" name="test_refused"><error message="in its fixture"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    return importlib.import_module("matrix")


@pytest.fixture
def matrix_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which lies among the scripts."""
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    return importlib.import_module("matrix_table")


def test_examples(matrix_table: ModuleType, matrix: ModuleType) -> None:
    """The examples in the docstrings are right, and there are some."""
    for module, number in ((matrix_table, 8), (matrix, 1)):
        assert (0, number) == doctest.testmod(module)


def test_where_pip_fetches_from(matrix: ModuleType) -> None:
    """A mirror of the host's is used in the roots, too; its directories are not; the environment wins."""
    settings = r"""
:env:.index-url='http://env.example/simple'
global.extra-index-url='file:///opt/simple\nhttp://two.example/simple'
global.find-links='/opt/wheels'
global.index-url='http://one.example/simple'
"""
    expected = {
        "PIP_EXTRA_INDEX_URL": "http://two.example/simple",
        "PIP_INDEX_URL": "http://env.example/simple",
    }
    assert expected == matrix.pip_variables(settings)


def test_report(matrix_table: ModuleType) -> None:
    """Each test is found once, under its feature or module, the worse of two outcomes, and why it was skipped."""
    found = matrix_table.read_report(REPORT)
    assert [
        ("test_link_news", "passed", ""),
        ("test_link_news", "passed", ""),
        ("test_link_modes::test_native", "skipped", "needs QEMU 10.1"),
        ("test_link_modes::", "failed", ""),
    ] == [(each.feature, each.outcome, each.reason) for each in found.values()]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], "not tested"),
        (["passed", "passed"], "yes"),
        (["skipped", "skipped"], "no: too old"),
        (["passed", "skipped"], "yes, but for 1 of 2: too old"),
        (["passed", "skipped", "failed"], "**fails**: 1 of 3"),
    ],
)
def test_cell(matrix_table: ModuleType, outcomes: list[str], expected: str) -> None:
    """A cell says what became of a feature: a failure above all, and a reason once."""
    results = [matrix_table.Result("m", each, "too old" if each == "skipped" else "") for each in outcomes]
    assert expected == matrix_table.cell(results)


def test_table(matrix_table: ModuleType) -> None:
    """Versions come first, then a row for each feature of any place, then the counts and what else went wrong."""
    here = matrix_table.Place(
        "host", {"Debian": "Debian 12", "QEMU": "7.2"}, matrix_table.read_report(REPORT)
    )
    there = matrix_table.Place("sid", {"Debian": "Debian sid", "QEMU": "11"}, {}, "pytest ended with 3")
    rows = matrix_table.table([here, there], {"test_link_news": '"""A killed passt."""'})
    assert [
        ["", "Debian 12", "Debian sid"],
        ["QEMU", "7.2", "11"],
        [matrix_table.FEATURES["test_link_modes::test_native"], "no: needs QEMU 10.1", "not tested"],
        [matrix_table.FEATURES["test_link_modes::"], "**fails**: 1 of 1", "not tested"],
        ["A killed passt", "yes", "not tested"],
        ["Tests", "2 passed, 1 failed, 1 skipped", "pytest ended with 3"],
    ] == rows
    markdown = matrix_table.as_markdown([["", "a|b"], ["c", "d"]])
    assert "|  | a\\|b |\n|---|---|\n| c | d |\n" == markdown
    assert "one    x\nthree  y\n" == matrix_table.as_text([["one three", "x y"]], [5, 1])


def test_silence_is_not_good(matrix_table: ModuleType) -> None:
    """A place is good if tests passed, none failed, and nothing else went wrong; sid does not decide."""
    passed = {"t": matrix_table.Result("m", "passed")}
    failed = {"t": matrix_table.Result("m", "passed"), "u": matrix_table.Result("m", "failed")}
    skipped = {"t": matrix_table.Result("m", "skipped")}
    places = [
        matrix_table.Place("host", {}, passed),
        matrix_table.Place("host", {}, passed, "interrupted"),
        matrix_table.Place("host", {}, failed),
        matrix_table.Place("host", {}, skipped),
        matrix_table.Place("host"),
    ]
    assert [True, False, False, False, False] == [place.is_good for place in places]
    decides = [matrix_table.Place(name).decides for name in ("host", "trixie", "sid")]
    assert [True, True, False] == decides


def test_page(matrix_table: ModuleType) -> None:
    """The page in docs/ has its two markers; what is between them is replaced, all else stays; others are refused."""
    page = (PROJECT / "docs" / "versions.md").read_text()
    before, after = page.split(matrix_table.BEGIN)[0], page.split(matrix_table.END)[1]
    once = matrix_table.with_table(page, "one\n")
    assert f"{before}{matrix_table.BEGIN}\none\n{matrix_table.END}{after}" == once
    assert once == matrix_table.with_table(matrix_table.with_table(page, "two\n"), "one\n")
    for bad in ("", page + page, page.replace(matrix_table.END, "")):
        with pytest.raises(ValueError, match="has to have one line"):
            matrix_table.with_table(bad, "one\n")


# ---- the way in


@pytest.fixture
def cache(place: Path) -> Path:
    """A cache directory with one root, of busybox alone."""
    root = place / "roots" / "tiny"
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var/lib"):
        (root / name).mkdir(parents=True)
    shutil.copy(find_busybox(), root / "bin" / "busybox")
    for applet in ("cat", "ls", "sh", "sleep", "touch", "umount"):
        (root / "bin" / applet).symlink_to("busybox")
    return place


def in_root(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script on the roots in that cache directory."""
    environment = {**os.environ, "QRAPD_CACHE": str(cache)}
    command = [str(PROJECT / "scripts" / "in-root"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can enter a root")


@as_root
def test_checkout_is_visible_and_safe(cache: Path) -> None:
    """In the root there is a copy of this checkout; what is written there stays there, and only .cache is kept."""
    mine = f"written-by-{os.getpid()}"
    script = f"ls; touch {mine} .cache/kept /tmp/lost; exit 7"
    done = in_root(cache, "tiny", "sh", "-c", script)
    assert 7 == done.returncode, done.stderr
    assert {"src", "tests", "README.md"} <= set(done.stdout.split())
    assert not (PROJECT / mine).exists()
    assert not (PROJECT / ".cache" / "kept").exists()
    done = in_root(cache, "tiny", "sh", "-c", "ls . .cache /tmp /root/qrapd/.venv")
    assert "kept" in done.stdout.split(), done.stderr
    assert mine not in done.stdout
    assert "lost" not in done.stdout


@as_root
def test_nothing_outlives_the_command(cache: Path) -> None:
    """What the command leaves in the background is ended, and nothing stays mounted."""
    seconds = f"{os.getpid()}.25"  # found by it below
    done = in_root(cache, "tiny", "sh", "-c", f"sleep {seconds} >/dev/null 2>&1 & cat /proc/1/comm")
    assert (0, "bash\n") == (done.returncode, done.stdout), done.stderr
    listed = subprocess.run(["ps", "-e", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert seconds not in listed
    assert str(cache) not in Path("/proc/self/mounts").read_text()


@as_root
def test_nothing_outlives_the_caller(cache: Path) -> None:
    """Who has called the script is killed: all that runs in the root is ended."""
    seconds = f"{os.getpid()}.75"
    script = PROJECT / "scripts" / "in-root"
    line = f"{script} tiny sh -c 'echo there; sleep {seconds}; true'; true"
    environment = {**os.environ, "QRAPD_CACHE": str(cache)}
    with subprocess.Popen(["sh", "-c", line], env=environment, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert "there\n" == caller.stdout.readline()
        caller.kill()
        assert "" == caller.stdout.read()  # its end has no other holder than those in the root


def test_no_such_root(tmp_path: Path) -> None:
    """Without the root, or without the right to enter it, the script says what to do, and changes nothing."""
    done = in_root(tmp_path, "trixie", "true")
    assert 1 == done.returncode
    expected = "make newer-roots" if os.geteuid() == 0 else "only root can enter a root"
    assert expected in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_titles_have_tests(matrix_table: ModuleType) -> None:
    """What FEATURES names is there: a test that was renamed has not lost its row."""
    for key in matrix_table.FEATURES:
        module, _, prefix = key.partition("::")
        source = (PROJECT / "tests" / f"{module}.py").read_text()
        assert f"def {prefix}" in source, key
