# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the network is away: passt is killed or stopped, and an HTTP client from outside waits for the guest."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from common import RunFailed, ended, free_port, log_end, open_directory, pidfd
from contenders import Contender, Parts, VmEnded
from full_traffic import HostEnd
from guest_pages import STATIC
from http_client import HttpClient

from qrapd import frames, plan, vm_files
from qrapd.passt import command_line

__all__ = ["NEVER_AFTER_KILL", "Outage", "in_turn", "never_after_stop", "own_start", "under_traffic"]

INTERVAL = 0.005
"""Seconds between two attempts of the client."""

PATIENCE = 1.0
"""Seconds for one attempt: a guest under full traffic takes a while, and one that hangs is in no other's way."""

NEVER_AFTER_KILL = 10.0
"""Seconds after which it counts as never."""

ANSWER_TIMEOUT = 10.0
"""Seconds for a passt that was started by hand."""

BLOCK = 10
"""Kills in a row of one contender under traffic: to start it takes longer than a kill."""

_PAUSE = (0.02, 0.1)
"""Seconds from the end of one outage to the next kill, at random: no timer's period may be met by it."""


def never_after_stop(stall_timeout: float) -> float:
    """Seconds without an answer after a SIGSTOP that count as never: 3 times what qrapd is to wait, and 5."""
    return 3 * stall_timeout + 5


@dataclass(frozen=True)
class Outage:
    """One interruption and what came after it."""

    contender: str
    number: str
    """the signal's name"""
    traffic: str
    """of full_traffic.KINDS, or "" for a guest that is idle"""
    ms: float | None
    """to the first answer; None: never"""
    stuck: bool = False
    """HTTP was answered, but full traffic did not go on"""
    ended: bool = False
    """never, because the VM ended"""


def interrupt(vm: Contender, number: signal.Signals, limit: float) -> float | None:
    """Send passt a signal; returns the seconds to the next answer, None if there was none in time.

    :raise RunFailed: the network was not up before.
    """
    pid = vm.settle()
    if pid is None:
        raise RunFailed(f"{vm.title}: the network is not steady: {log_end(vm.directory)}")
    time.sleep(random.uniform(*_PAUSE))
    with contextlib.closing(HttpClient(vm.port, PATIENCE, STATIC)) as client, pidfd(pid) as passt:
        since = time.monotonic()
        signal.pidfd_send_signal(passt, number)
        return client.first_answer(since, limit, INTERVAL)


def in_turn(
    vms: Sequence[Contender], times: Mapping[str, int], number: signal.Signals, limit: float
) -> Iterator[Outage]:
    """Interrupt all of them in turn, each as often as ``times`` says, spread over the whole time."""
    rounds = max(times.values(), default=0)
    for step in range(rounds):
        for vm in vms:
            if (step + 1) * times[vm.key] // rounds > step * times[vm.key] // rounds:
                yield _one(vm, number, limit)


def under_traffic(
    host: HostEnd,
    vms: Sequence[Contender],
    times: Mapping[str, int],
    kind: str,
    number: signal.Signals,
    limit: float,
) -> Iterator[Outage]:
    """The same with guests that send or receive as much as they can, just one of them at a time."""
    left = dict(times)
    while any(left.values()):
        for vm in vms:
            block = min(BLOCK, left[vm.key])
            left[vm.key] -= block
            while block:
                restarts = vm.restarts
                with host.traffic(vm, kind):
                    while block and vm.restarts == restarts:
                        yield _one(vm, number, limit, host, kind)
                        block -= 1


def _one(
    vm: Contender, number: signal.Signals, limit: float, host: HostEnd | None = None, kind: str = ""
) -> Outage:
    """One interruption. Where the network does not come back to stay, the VM is started anew for the next."""
    seconds, well, flows, ended = None, False, True, False
    try:
        seconds = interrupt(vm, number, limit)
        well = seconds is not None and vm.settle() is not None
        if well and host is not None:
            well = flows = host.flows(kind)
    except VmEnded as error:
        print(f"outage: {error}", file=sys.stderr)
        ended = True
    if not well:
        vm.restart()
    ms = None if seconds is None else 1000 * seconds
    return Outage(vm.key, number.name, kind, ms, stuck=not flows, ended=ended)


def own_start(parts: Parts) -> float:
    """From the spawn of passt to its first answer on the stream, in milliseconds: what nobody can do without."""
    with open_directory("own-start") as directory:
        made = plan.resolve(vm_files.read(parts.vm_file(directory, "swap", free_port())))
    time.sleep(random.uniform(*_PAUSE))  # as before a kill: the guest is still busy with the last one
    ours, passts = socket.socketpair()
    with ours:
        started = time.monotonic()
        child = subprocess.Popen(
            command_line(made.links[0].passt, passts.fileno()),
            pass_fds=[passts.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with ended(child):
            passts.close()
            ours.settimeout(ANSWER_TIMEOUT)
            ours.sendall(frames.sign_of_life_request(frames.parse_mac(made.links[0].mac)))
            finder = frames.AnswerFinder()
            try:
                while not finder.found:
                    got = ours.recv(65536)
                    if not got:
                        raise ConnectionResetError
                    finder.feed(got)
            except OSError as error:
                raise RunFailed(f"a passt that was started by hand did not answer: {error}") from error
            answered = time.monotonic()
            ours.close()  # and so it ends
            child.wait(ANSWER_TIMEOUT)
    return 1000 * (answered - started)
