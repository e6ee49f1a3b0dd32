# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``qrap``: finds a passt in /tmp, connects to it, and becomes a QEMU that has the stream.

It does as passt's C program of that name did, for those who still start QEMU through it; docs/qrap.md says what it
does better. Only the standard library is imported here, and of that little: this is a start of every VM.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

from qrapd.qrap_arguments import Explicit, NoFreeAddress, Patched, qemu_names, read_command_line

# mypy takes this for typing's, which would cost milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

__all__ = ["main"]

_FAILED = 1
"""the C program's EXIT_FAILURE, and qrapd.errors' FAILED, which takes longer to import than all else here"""

_PATH_MAX = 4096
"""linux/limits.h"""


def main() -> NoReturn:
    """Run qrap with sys.argv. Returns never: there is a QEMU in its place, or an exit status."""
    # What is imported is never garbage, and looking for some takes 0.7 of 28 ms (measured).
    gc.disable()
    _leave_interrupts_to_the_kernel()
    try:
        wanted = read_command_line(sys.argv[1:], os.environ.get("PATH"), _is_executable)
    except NoFreeAddress:
        _say("Couldn't find free address for device")
        _end_with_usage()
    stream, path = _claim()
    _say(f"Connected to {path}")
    # Other descriptors of this program close at exec, and those that the caller has passed in do not: PEP 446.
    try:
        _pass_on(stream, wanted.fd)
    except OSError as error:
        _say(f"dup: {error.strerror}")
        sys.exit(_FAILED)
    _restore_signals()
    _restore_environment()
    if isinstance(wanted, Explicit):
        _say_why(_execvp(wanted.argv[0], wanted.argv))
    else:
        _become_some_qemu(wanted)
    sys.exit(_FAILED)


def _claim() -> tuple[socket.socket, str]:
    """A passt's stream, or the end."""
    from qrapd.probe import claim_blocking

    try:
        return claim_blocking(say=_say)
    except OSError as error:  # too many open files, for one
        _say(f"socket: {error.strerror}")
    except Exception as error:
        from qrapd.errors import QrapdError

        if not isinstance(error, QrapdError):
            raise
        _say(f"{error}\n  {error.hint}" if error.hint else f"{error}")
    sys.exit(_FAILED)


def _pass_on(stream: socket.socket, fd: int) -> None:
    """Put the stream where QEMU expects it, in place of what the caller may have there."""
    stream.setblocking(True)
    if stream.fileno() == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(stream.fileno(), fd)


def _become_some_qemu(wanted: Patched) -> None:
    """Execute the first QEMU that there is; returns once that failed and was told."""
    for name in qemu_names(os.uname().machine):
        number = _execvp(name, [name, *wanted.arguments])
        if number != errno.ENOENT:
            _say_why(number)
            _end_with_usage()
    _say("Couldn't find qemu command")
    _say_why(errno.ENOENT)


def _execvp(file: str, argv: list[str]) -> int:
    """What glibc's execvp(3) does; returns the errno of its failure.

    os.execvp goes on after errors at which that one stops, and knows no scripts without ``#!``.
    """
    if "/" in file or not file:
        return _execute(file, argv)
    was_denied = False
    number = errno.ENOENT
    for directory in os.environ.get("PATH", "/bin:/usr/bin").split(":"):
        if len(os.fsencode(directory)) >= _PATH_MAX:
            continue
        number = _execute(f"{directory}/{file}" if directory else file, argv)
        if number not in (
            errno.EACCES,
            errno.ENOENT,
            errno.ESTALE,
            errno.ENOTDIR,
            errno.ENODEV,
            errno.ETIMEDOUT,
        ):
            return number
        was_denied |= number == errno.EACCES
    return errno.EACCES if was_denied else number


def _execute(path: str, argv: list[str]) -> int:
    """Replace this process; returns the errno if that fails."""
    if not path:
        return errno.ENOENT
    try:
        try:
            os.execv(path, argv)  # noqa: S606 - the purpose of this program
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            os.execv("/bin/sh", ["/bin/sh", path, *argv[1:]])  # noqa: S606 - as execvp(3) does
    except OSError as error:
        return error.errno or errno.EINVAL


def _leave_interrupts_to_the_kernel() -> None:
    """Ctrl-C ends qrap as it ends a C program: without a traceback, and as a death by SIGINT."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _restore_signals() -> None:
    """Undo what Python has ignored: pylifecycle.c. Whether the caller had ignored them, too, nobody can know by now."""
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def _restore_environment() -> None:
    """Undo what Python may have done to LC_CTYPE in the C locale: PEP 538. All else it leaves as it was."""
    coerced = os.environb.get(b"LC_CTYPE")
    if coerced is None:
        return
    try:
        with open("/proc/self/environ", "rb") as file:  # noqa: PTH123 - pathlib takes time to import
            given = file.read().split(b"\0")
    except OSError:  # no /proc: better one variable too many than the caller's own lost
        return
    original = next((entry[9:] for entry in given if entry.startswith(b"LC_CTYPE=")), None)
    if original is None:
        del os.environb[b"LC_CTYPE"]
    elif original != coerced:
        os.environb[b"LC_CTYPE"] = original


def _is_executable(path: str) -> bool:
    return os.access(path, os.X_OK)


def _say(text: str) -> None:
    """Tell whoever reads stderr, if there is one: without it, descriptor 2 may be anything by now."""
    if sys.stderr is None:
        return
    try:  # noqa: SIM105 - contextlib takes time to import
        os.write(2, os.fsencode(f"{text}\n"))
    except OSError:
        pass  # nobody reads it, and QEMU is what matters


def _say_why(number: int) -> None:
    _say(f"execvp: {os.strerror(number)}")


def _end_with_usage() -> NoReturn:
    _say(
        f"Usage: {sys.argv[0]} [FDNUM QEMU_CMD] [QEMU_ARG]...\n\n"
        "With a number from 3 on and a program that PATH has, QEMU_CMD finds passt's stream on descriptor FDNUM.\n"
        "Otherwise a QEMU is looked for, and its network made passt's."
    )
    sys.exit(_FAILED)


if __name__ == "__main__":
    main()
