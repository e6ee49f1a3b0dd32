# SPDX-License-Identifier: GPL-2.0-or-later
"""Run by test_nonblocking.py, in a process of its own: a VM's life in which anything that blocks the event loop fails.

Ends with 0 if the link was restored and nothing blocked. What is allowed to, and why, is in ALLOWED.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from blockbuster import blockbuster_ctx

from qrapd import plan, vm_files
from qrapd.foreground import supervise
from qrapd.vm import Vm

# By file and functions in it. All of them are files of the kernel's, or of the runtime directory, which is in memory:
# no disk and no other process can hold them up.
ALLOWED = [
    # the VM's own directory: made and locked before anything runs, removed when all is over
    (
        "runtime_directory.py",
        {"claim", "_make", "_secure", "_take_lock", "_remove", "_is_same_file", "listen"},
    ),
    # written once for each new passt; read once, at the start
    ("record.py", {"write", "read"}),
    # is anybody there, on a socket of the VM's own?
    ("runtime_directory.py", {"is_answered"}),
    # /proc/PID/stat of a child that has just started
    ("process.py", {"start_time"}),
    # /proc/PID/stat and schedstat of each passt, once per second
    ("vital_signs.py", {"_read_file"}),
    # is the program still the same file?
    ("passt.py", {"_identify"}),
    # where the last passt listened for pesto(1), in the VM's own directory: only a passt of 2026-05 or newer does
    ("connection.py", {"_unlink"}),
]


def main(file: str, base: str) -> int:
    """Run the VM; once it is ready kill its passt and read the file again, and stop it when both are done."""
    made = plan.resolve(vm_files.read(Path(file)))
    restored, reloaded = anyio.Event(), anyio.Event()
    passts: list[int] = []

    def emit(event: str, /, **fields: Any) -> None:
        if event == "passt.started":
            passts.append(fields["pid"])
        elif event == "link.restored":
            restored.set()
        elif event == "vm.reloaded":
            reloaded.set()

    async def act(vm: Vm) -> None:
        await vm.ready.wait()
        os.kill(passts[-1], signal.SIGKILL)
        await restored.wait()
        await anyio.sleep(2.5)  # some looks for hung passts
        os.kill(os.getpid(), signal.SIGHUP)
        await reloaded.wait()
        vm.stop()

    with blockbuster_ctx("qrapd") as blockbuster:
        for function in blockbuster.functions.values():
            for place, names in ALLOWED:
                function.can_block_in(place, names)
        anyio.run(
            partial(
                supervise,
                made,
                Path(base),
                emit,
                reread=lambda: plan.resolve(vm_files.read(Path(file))),
                companion=act,
            )
        )
    return 0 if restored.is_set() and reloaded.is_set() else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
