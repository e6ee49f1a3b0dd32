# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that come while one qrapd becomes the next in the same process: the next one has them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent_runner import patched
from support import PATIENCE, Run, write_vm

PROGRAM = """
import os, sys, time
from pathlib import Path
from signal import SIGHUP, SIGPWR, SIGTERM

import anyio
from qrapd.handover import become_successor
from qrapd.signals import receive_signals

async def first():
    with receive_signals(SIGHUP, SIGTERM, SIGPWR) as signals:
        if {how!r} == "abandoned":
            go_on(signals)
        signals.hold()

def go_on(signals=None):
    if signals is not None:
        signals.hold()
    if {held!r}:
        os.kill(os.getpid(), SIGPWR)
    become_successor({{}}, dict(os.environ))

async def second():
    with receive_signals(SIGHUP, SIGTERM, SIGPWR) as signals:
        os.kill(os.getpid(), SIGTERM)
        seen = set()
        with anyio.move_on_after(30):
            async for number in signals:
                seen.add(number.name)
                if number == SIGHUP:
                    break
                if {{"SIGTERM"}} | ({{"SIGPWR"}} if {held!r} else set()) <= seen:
                    os.kill(os.getpid(), SIGHUP)
        print(*sorted(seen))

if "QRAPD_STREAMS" in os.environ:
    anyio.run(second)
else:
    anyio.run(first)
    go_on()
"""


@pytest.mark.parametrize("how", ["in order", "abandoned"])
@pytest.mark.parametrize("held", [True, False])
def test_what_came_in_between(tmp_path: Path, how: str, held: bool) -> None:
    """It is received by the next program, and so is what comes after it: nothing stays blocked."""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(PROGRAM).format(how=how, held=held)}")
    program.chmod(0o755)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=PATIENCE)
    expected = {"SIGHUP", "SIGTERM"} | ({"SIGPWR"} if held else set())
    assert " ".join(sorted(expected)) == done.stdout.strip(), done.stderr


def test_the_program_that_comes_next_gets_them(place: Path) -> None:
    """A reload that was pending when this process became qrapd is carried out, once the VM is up."""
    vm = write_vm(place, "held", qemu="powerdown_timeout = 0")
    pending = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
os.kill(os.getpid(), signal.SIGHUP)
"""
    with Run(vm.path, place / "run", prefix=patched(pending)) as run:
        run.wait_for("vm.reloaded")
        assert 0 == run.stop()
        run.assert_nothing_left()


def test_ignored_where_there_is_no_next(tmp_path: Path) -> None:
    """After an end in order a late signal must not make it seem a violent one."""
    program = """
        import os, signal, anyio
        from qrapd.signals import receive_signals

        async def main():
            with receive_signals(signal.SIGTERM):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

        anyio.run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, check=False, timeout=PATIENCE, cwd=tmp_path, env=environment)
    assert 0 == done.returncode
