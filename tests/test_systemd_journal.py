# SPDX-License-Identifier: GPL-2.0-or-later
"""What the journal has of a VM in its unit: all of it, in order, once, whole; and qrapd's own words in any flood."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from typing import Any

import pytest

from booted import Booted, install
from qrapd.guest import GuestImage
from qrapd.messages import EVENTS, OUTPUT_EVENTS
from qrapd.rate_limit import BURST, RATE
from support import fetch
from systemd_guest import with_pages
from test_systemd_units import drop_in, in_systemd, is_ordered, pid_of, started, told, wait_for_http

pytestmark = in_systemd

PRIORITIES = {"debug": "7", "info": "6", "warning": "4", "error": "3"}

LONG = 100_000
"""Bytes of a line: more than what a pipe or a buffer of 64 KiB holds."""

PAGES = {
    "long": f"""#!/bin/sh
. /lib/reply
reply 'a long one'
awk 'BEGIN {{ for (i = 0; i < {LONG // 10}; i++) printf "0123456789"; print "" }}' </dev/null >/dev/console 2>&1 &
""",
}


@pytest.fixture(scope="module")
def machine(booted: Booted, guest: GuestImage) -> Booted:
    """With qrapd installed."""
    return install(booted, guest)


@pytest.fixture(scope="module")
def talker(machine: Booted, guest: GuestImage) -> GuestImage:
    """The guest with a page more."""
    return with_pages(machine, guest, PAGES)


def event_of(entry: dict[str, Any]) -> str:
    """Which event an entry is."""
    return str(entry["QRAPD_EVENT"])


def restored(machine: Booted, name: str) -> None:
    """Kill a VM's passt, and wait for the next one."""
    number = told(machine, name).count("link.restored") + 1
    machine.run("kill", "-KILL", str(pid_of(machine, f"qrapd@{name}", "passt")), check=True)
    machine.wait_for(
        "link.restored", lambda: told(machine, name).count("link.restored") == number, f"qrapd@{name}"
    )


def test_from_start_to_stop(machine: Booted, talker: GuestImage) -> None:
    """`journalctl QRAPD_VM=…` has every event in order, each with its fields, and `qrapd logs` shows the same."""
    with started(machine, "told", talker) as file:
        fetch(file.ports[0], "/cgi-bin/long")
        machine.wait_for(
            "the long line",
            lambda: any(len(e["MESSAGE"]) > LONG for e in machine.journal("QRAPD_VM=told")),
            "qrapd@told",
        )
        restored(machine, "told")
        machine.systemctl("stop", "qrapd@told")

    entries = machine.journal("QRAPD_VM=told")
    expected = """passt.started link.connected vm.started vm.ready guest.console passt.exited link.lost passt.started
        link.restored vm.stopping passt.exited vm.exited"""
    names = [event_of(entry) for entry in entries]
    assert is_ordered(expected.split(), names), names
    for entry in entries:
        kind = EVENTS[event_of(entry)]
        assert "qrapd@told.service" == entry["_SYSTEMD_UNIT"]
        assert ("told", kind.message_id) == (entry["QRAPD_VM"], entry["MESSAGE_ID"])
        assert PRIORITIES[kind.level] == entry["PRIORITY"]
        assert isinstance(entry["MESSAGE"], str)  # a blob would be a list of numbers, and is not shown
        assert entry["MESSAGE"].startswith("told")

    # Nothing but these comes from the unit, so that passt's lines are there once.
    assert len(entries) == len(machine.journal("_SYSTEMD_UNIT=qrapd@told.service"))
    passts = [int(e["QRAPD_PID"]) for e in entries if event_of(e) == "passt.started"]
    assert 2 == len(set(passts))
    assert [] == [entry for pid in passts for entry in machine.journal(f"_PID={pid}")]

    # Whole, although it is longer than what fits into a datagram together with its message.
    long = {e["QRAPD_LINE"] for e in entries if len(e["MESSAGE"]) > LONG}
    assert {"0123456789" * (LONG // 10)} == long

    own = [entry["MESSAGE"] for entry in entries]
    shown = machine.run("qrapd", "logs", "told", "-o", "cat", "--no-pager", check=True).stdout.splitlines()
    systemds = [e["MESSAGE"] for e in machine.journal("UNIT=qrapd@told.service")]
    assert systemds
    assert sorted(own + systemds) == sorted(shown)
    assert own == [line for line in shown if line not in systemds]
    last = machine.run("qrapd", "logs", "told", "-n", "3", "-o", "cat", "--no-pager", check=True).stdout
    assert shown[-3:] == last.splitlines()


def count_left_out(machine: Booted, name: str) -> int:
    """How many lines qrapd has left out."""
    return sum(int(e["QRAPD_COUNT"]) for e in machine.journal(f"QRAPD_VM={name}", "QRAPD_EVENT=log.limited"))


def test_a_guest_that_floods_its_console(machine: Booted, guest: GuestImage) -> None:
    """qrapd's own events are all there, and lines say how many of the guest's are not: journald has dropped none."""
    # journald allows more than is configured, by the space that is free: 3 to 4 times as much from 256 MiB to 4 GiB
    # on (burst_modulate() in its journald-rate-limit.c). So this is about the 10,000 that it has where there is little.
    drop_in(machine, "10", "LogRateLimitIntervalSec=30\nLogRateLimitBurst=2700\n", "qrapd@flood")
    with started(machine, "flood", guest, append="guest.control=1") as file:
        since = time.monotonic()
        fetch(file.ports[0], "/cgi-bin/flood?1024")
        # Together with what went on that is more than journald takes, unless this machine is very busy.
        for number in (4_000, 8_000):
            limit = partial(lambda number: count_left_out(machine, "flood") > number, number)
            machine.wait_for("a flood", limit, "qrapd@flood")
        for _ in range(3):
            restored(machine, "flood")
        wait_for_http(machine, file.ports[0], "qrapd@flood")
        machine.systemctl("stop", "qrapd@flood")
        seconds = time.monotonic() - since

    entries = machine.journal("QRAPD_VM=flood")
    own = [event_of(entry) for entry in entries if event_of(entry) not in OUTPUT_EVENTS]
    healing = ["passt.exited", "link.lost", "passt.started", "link.restored"]
    ending = ["vm.stopping", "passt.exited", "vm.exited"]
    assert is_ordered([*healing * 3, *ending], own), own
    assert [3, 3, 1] == [own.count(event) for event in ("link.lost", "link.restored", "vm.exited")]

    # Each line is in the journal, or counted, but for those that were on their way when the guest ended.
    written = [e["QRAPD_LINE"] for e in entries if event_of(e) == "guest.console"]
    begun = [line for line in written if line.startswith("guest: flood ")]
    # The guest's kernel may speak in the middle of a line.
    flood = [int(found[1]) for line in begun if (found := re.match(r"guest: flood (\d{8}) ", line))]
    left_out = count_left_out(machine, "flood")
    assert {"guest.console"} == {e["QRAPD_OF"] for e in entries if event_of(e) == "log.limited"}
    assert BURST + RATE * seconds >= len(flood)
    assert flood == sorted(set(flood))
    assert flood[-1] <= left_out + len(begun)


def test_what_is_in_the_way_of_a_start(machine: Booted) -> None:
    """It is found by the VM's name like everything else."""
    machine.path("/etc/qrapd/vms/mistaken.toml").write_text("[qemu]\nargs = 5\n")
    machine.systemctl("start", "qrapd@mistaken", check=False)
    machine.systemctl("reset-failed", "qrapd@mistaken")
    machine.path("/etc/qrapd/vms/mistaken.toml").unlink()
    found = machine.journal("_SYSTEMD_UNIT=qrapd@mistaken.service")
    assert "config.invalid" in [event_of(entry) for entry in found]
    assert len(found) == len(machine.journal("QRAPD_VM=mistaken"))
    shown = machine.run("qrapd", "logs", "mistaken", "-o", "cat", "--no-pager", check=True).stdout
    assert all(entry["MESSAGE"] in shown for entry in found)


def test_of_a_users_own_unit(machine: Booted) -> None:
    """What the user's systemd says of it is shown to them, and to nobody else."""
    machine.shell(
        "id vera || useradd --create-home vera; loginctl enable-linger vera; mkdir -p ~vera/.config/qrapd/vms"
    )
    machine.path("/home/vera/.config/qrapd/vms/hers.toml").write_text("[qemu]\nargs = 5\n")
    # The journal in here is in /run, and not one for each user.
    machine.shell("chown -R vera: ~vera/.config; usermod --append --groups systemd-journal vera", check=True)
    uid = machine.run("id", "-u", "vera", check=True).stdout.strip()
    machine.wait_for("vera's systemd", machine.path(f"/run/user/{uid}/systemd/private").exists)
    machine.systemctl("start", "qrapd@hers", check=False, user="vera")
    machine.systemctl("stop", "qrapd@hers", user="vera")
    said = [e["MESSAGE"] for e in machine.journal("USER_UNIT=qrapd@hers.service", f"_UID={uid}")]
    command = "qrapd logs hers -o json --all --no-pager"
    hers = machine.shell(command, user="vera", check=True).stdout
    roots = machine.shell(command, check=True).stdout
    machine.shell("loginctl disable-linger vera", check=True)
    shown = [json.loads(line) for line in hers.splitlines()]
    assert said
    assert said == [e["MESSAGE"] for e in shown if "USER_UNIT" in e]
    for each in (hers, roots):
        assert "config.invalid" in [json.loads(line).get("QRAPD_EVENT") for line in each.splitlines()]
    assert '"USER_UNIT"' not in roots
