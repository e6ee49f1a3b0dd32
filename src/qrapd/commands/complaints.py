# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors in words on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

import click

from qrapd import __version__
from qrapd.errors import ConfigurationError, ExitStatus, Problem, QrapdError, Unavailable

__all__ = ["complain", "report_bug", "root_cause", "tell_of_host", "warn"]


def complain(error: QrapdError) -> None:
    """Say what is wrong, and what to do about it."""
    if isinstance(error, ConfigurationError):
        for problem in error.problems:
            _say(f"{error.path}: {problem}", problem.hint)
        return
    _say(f"qrapd: {error.message}", error.hint)


def warn(path: str, problem: Problem) -> None:
    """Say what may be wrong with a VM's file, though it can be run."""
    _say(f"{path}: warning: {problem}", problem.hint)


def _say(words: str, hint: str | None) -> None:
    click.echo(words, err=True)
    if hint:
        click.echo(f"  hint: {hint}", err=True)


def root_cause(error: BaseException) -> BaseException:
    """What really happened, where it comes wrapped by the tasks that it passed through."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def tell_of_host(error: OSError) -> int:
    """The host refused something that no caller expects it to: no bug of ours, and none that a traceback explains."""
    with contextlib.suppress(OSError):
        # What could not be written is not tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return ExitStatus.OK  # the reader of our output, such as `head`, has seen enough
    where = f": {error.filename}" if error.filename else ""
    hint = "raise the limit with: ulimit -n 1024" if error.errno == errno.EMFILE else None
    complain(Unavailable(f"{error.strerror or error}{where}", hint=hint))
    return ExitStatus.UNAVAILABLE


def report_bug() -> None:
    """The traceback of the error that is being handled, and a word to go with it."""
    import traceback

    traceback.print_exc()
    click.echo(
        f"qrapd {__version__}: this is a bug in qrapd. Please report it with the lines above.", err=True
    )
