# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine as its monitor tells of it: paused or not, and its power button."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, cast

import pytest

from qrapd import machine as machines
from qrapd.machine import Machine, has_spoken

if TYPE_CHECKING:
    from qrapd.qmp import Qmp


class Monitor:
    """Answers as QEMU does."""

    def __init__(self, status: str = "running") -> None:
        self.status = status
        self.heard: list[str] = []

    async def execute(self, command: str) -> dict[str, object]:
        self.heard.append(command)
        return {"status": self.status} if command == "query-status" else {}


def make(monitor: Monitor) -> Machine:
    return Machine(cast("Qmp", monitor))


@pytest.mark.parametrize(
    ("status", "paused"),
    [("running", False), ("paused", True), ("prelaunch", True), ("io-error", True), ("shutdown", False)],
)
async def test_a_look(status: str, paused: bool) -> None:
    """Whether the guest runs is for the judgement of its links."""
    machine = make(Monitor(status))
    assert ("unknown", False) == (machine.status, machine.paused)
    await machine.look()
    assert (status, paused) == (machine.status, machine.paused)


def test_events() -> None:
    """They tell from then on; the others say nothing of it."""
    machine, seen = make(Monitor()), []
    for name in ("RTC_CHANGE", "STOP", "RTC_CHANGE", "RESUME", "SUSPEND", "WAKEUP"):
        machine.note_event(name)
        seen.append(machine.paused)
    assert [False, True, True, False, True, False] == seen


async def test_the_power_button(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is pressed as long as that is wanted, as a guest that boots misses the first press."""
    monkeypatch.setattr(machines, "PRESS_AGAIN_SECONDS", 0)
    monitor, wanted = Monitor(), [True, True, True, False]
    assert await make(monitor).press_power_button(lambda: wanted.pop(0))
    assert ["query-status", *["system_powerdown"] * 3] == monitor.heard


async def test_nobody_is_there_to_hear_the_power_button() -> None:
    """A paused guest is not asked; what is known of it stays as it is."""
    monitor = Monitor("paused")
    machine = make(monitor)
    assert not await machine.press_power_button(lambda: True)
    assert (["query-status"], False) == (monitor.heard, machine.paused)


async def test_the_first_word() -> None:
    """Of a QEMU that lives, and of one that ends first; it stays there to be read."""
    ours, qemus = socket.socketpair()
    with ours, qemus:
        ours.setblocking(False)
        qemus.send(b"{")
        assert await has_spoken(ours)
        assert b"{" == ours.recv(10)
        qemus.close()
        assert not await has_spoken(ours)
