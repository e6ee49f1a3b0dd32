# SPDX-License-Identifier: GPL-2.0-or-later
"""Where ``qrapd`` and ``python -m qrapd`` begin."""

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    # Modules and classes made while importing are never garbage, and looking for some costs 5 % of the start
    # (8 of 153 ms, measured). What lives longer than a moment turns it on again: qrapd.supervisor.
    gc.disable()
    _open_standard_streams()
    # Ctrl-C while modules are being read would end in a traceback; and a reload that comes right after the start
    # of a VM would end it (children get the default back: run handles SIGHUP before it has any).
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] in (["run"], ["wrap"], ["agent"]):
        # What the qrapd before us in this process has left pending for us (qrapd.signals) would be lost by that.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for number in {signal.SIGHUP, signal.SIGUSR2} - held:
            signal.signal(number, signal.SIG_IGN)
    from qrapd.cli import run_command_line

    signal.signal(signal.SIGINT, interrupt)
    sys.exit(run_command_line())


def _open_standard_streams() -> None:
    """Put /dev/null where the caller closed one (``2>&-``): else a socket or a file of ours would be our stderr."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
