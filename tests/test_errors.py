# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors: each has the exit status that is promised, and says what a person needs."""

from __future__ import annotations

import pytest

from qrapd import errors
from qrapd.errors import ConfigurationError, ExitStatus, Problem, QrapdError

STATUSES = {
    "QrapdError": 1,
    "QemuFailed": 1,
    "QmpFailed": 1,
    "QmpRefused": 1,
    "UsageError": 2,
    "Unavailable": 69,
    "Unknown": 69,
    "AlreadySupervised": 75,
    "Conflict": 75,
    "ConfigurationError": 78,
}


def test_exit_statuses_are_those_that_units_and_scripts_rely_on() -> None:
    """The numbers are an interface."""
    expected = {
        "OK": 0, "FAILED": 1, "USAGE": 2, "UNAVAILABLE": 69,
        "BUG": 70, "ALREADY_SUPERVISED": 75, "CONFIGURATION": 78,
        "INTERRUPTED": 130,
    }  # fmt: skip
    assert expected == {status.name: status.value for status in ExitStatus}


def test_every_error_is_listed_here() -> None:
    """An error that is added gets a status that is thought about."""
    found = {
        name
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, QrapdError)
    }
    assert set(STATUSES) == found


@pytest.mark.parametrize("name", STATUSES)
def test_statuses_of_errors(name: str) -> None:
    """Each error ends the program with its own status, and the tree in the docstring says the same."""
    kind = getattr(errors, name)
    assert STATUSES[name] == kind.exit_status
    (line,) = [line for line in str(errors.__doc__).splitlines() if f" {name} " in line]
    assert str(STATUSES[name]) == line.partition(name)[2].split()[0]


def test_message_and_hint() -> None:
    """The message is the error's text; the hint is apart from it, and may be missing."""
    assert ("it broke", "it broke", "mend it") == (
        str(QrapdError("it broke", hint="mend it")),
        QrapdError("it broke", hint="mend it").message,
        QrapdError("it broke", hint="mend it").hint,
    )
    assert QrapdError("it broke").hint is None


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem("", "is empty"), "is empty"),
        (Problem("link[0].mac", "is no MAC"), "link[0].mac: is no MAC"),
        (Problem("name", "is too long", value="'x'", hint="h"), "name: is too long (it is 'x')"),
        (Problem("", "is odd", value=""), "is odd (it is )"),
    ],
)
def test_problems_in_words(problem: Problem, expected: str) -> None:
    """Where, why, and what was found."""
    assert expected == str(problem)


@pytest.mark.parametrize(("count", "expected"), [(1, "a.toml: 1 problem"), (3, "a.toml: 3 problems")])
def test_all_problems_are_kept_in_order(count: int, expected: str) -> None:
    """A configuration error holds every problem of its file."""
    problems = [Problem(str(number), "wrong") for number in range(count)]
    error = ConfigurationError("a.toml", problems)
    assert (expected, "a.toml", tuple(problems)) == (error.message, error.path, error.problems)
