# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines: the same however their bytes come, bounded, and without anything that acts on a terminal."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qrapd.lines import LineSplitter, clean

# Rich in what matters: ends of lines, escapes, parts of UTF-8, and lines of about the limit's length.
noise = st.lists(
    st.one_of(
        st.sampled_from(
            [b"\n", b"\r", b"\r\n", b"\t", b" ", b"\x1b[31m", b"\x1b", b"\x9b", b"\xc3", b"\xa4"]
        ),
        st.binary(max_size=12),
        st.text(max_size=6).map(str.encode),
    )
).map(b"".join)


def split(chunks: list[bytes], limit: int) -> list[str]:
    """All lines of a stream that comes in these chunks."""
    splitter = LineSplitter(limit)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return [*lines, *splitter.finish()]


@given(noise, st.lists(st.integers(0, 200)), st.integers(1, 20))
@example(b"a" * 20 + b"\n", [20], 10)
@example(b"a" * 25 + b"\n", [5, 24], 10)
def test_lines_do_not_depend_on_chunks(data: bytes, cuts: list[int], limit: int) -> None:
    """However a stream is cut into reads, its lines are the same."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert split([data], limit) == split(chunks, limit)


@given(noise, st.integers(1, 20))
def test_no_line_is_longer_than_the_limit(data: bytes, limit: int) -> None:
    """Also when line and newline come in one read. A byte makes at most one character."""
    assert [] == [line for line in split([data], limit) if len(line) > limit]


def test_a_long_line_is_cut_and_nothing_is_lost() -> None:
    """The pieces of a line that is too long are lines, in order."""
    assert ["aaaa", "bbbb", "cc", "d"] == split([b"aaaabb", b"bbcc\nd"], 4)


@given(noise)
def test_no_control_characters_remain(data: bytes) -> None:
    """Whatever a guest writes, a line holds no control character but tab, and has something to show."""
    for line in split([data], 50):
        assert [] == [sign for sign in line if unicodedata.category(sign) == "Cc" and sign != "\t"]
        assert line.strip()
    assert "\n" not in clean(data)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"plain", "plain"),
        (b"tab\tstays", "tab\tstays"),
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b[2J\x1b[H\x1b[?25lcleared", "cleared"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]8;;http://example.com\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1b(Bcharset\x1b=", "charset"),
        (b"\x1b[31", "31"),  # an escape that never ends: its letters do no harm
        ("\u009b31mC1 as UTF-8".encode(), "31mC1 as UTF-8"),
        (b"bell\x07 nul\x00 del\x7f", "bell nul del"),
        ("Größe 🐧".encode(), "Größe 🐧"),
        (b"not \xff UTF-8", "not \N{REPLACEMENT CHARACTER} UTF-8"),
    ],
)
def test_what_acts_on_a_terminal_is_removed(raw: bytes, expected: str) -> None:
    """Escape sequences and control characters go; text stays."""
    assert expected == clean(raw)


def test_a_removed_escape_makes_no_new_one() -> None:
    """Two halves of an escape sequence do not meet when what stood between them is taken out."""
    assert "\x1b" not in clean(b"\x1b\x1b[0m[2Jx")


def test_ends_of_lines_of_all_kinds() -> None:
    """\\r\\n and \\n\\r end a line as \\n does; empty lines are left out; the last needs no end."""
    assert ["one", "two", "three", "  four"] == split([b"one\r\ntwo\n\rthree\n\n \t \n  four  "], 100)


def test_lines_come_as_soon_as_they_are_whole() -> None:
    """A prompt without a newline waits, and does not hold up the lines before it."""
    splitter = LineSplitter()
    assert ["one"] == list(splitter.feed(b"one\nlog"))
    assert ["login: x"] == list(splitter.feed(b"in: x\n"))
    assert [] == list(splitter.finish())
    assert [] == list(splitter.finish())
