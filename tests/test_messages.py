# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages: every event that the code tells is known, has its fields, and is said in a full sentence."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qrapd.messages import EVENTS, OUTPUT_EVENTS, headline, sentence

SOURCE = Path(__file__).resolve().parent.parent / "src" / "qrapd"

# Bound once, for all that is told below.
BOUND = {
    "supervisor.py": {"vm"},
    "vm.py": {"vm"},
    "link.py": {"vm", "link"},
    "link_events.py": {"vm", "link"},
    "connection.py": {"vm", "link"},
    "foreign_passt.py": {"vm", "link"},
    "vhost_user.py": {"vm", "link"},
}

# What users' queries rely on: these fields at least, wherever the event is told.
PROMISED = {
    "vm.started": {"vm", "qemu_pid"},
    "vm.ready": {"vm"},
    "vm.stopping": {"vm", "reason"},
    "vm.exited": {"vm", "reason", "exit_code or signal"},
    "passt.started": {"vm", "link", "pid"},
    "passt.exited": {"vm", "link", "pid", "exit_code or signal"},
    "passt.output": {"vm", "link", "line"},
    "guest.console": {"vm", "line"},
    "link.connected": {"vm", "link", "generation", "source", "passt_pid"},
    "link.lost": {"vm", "link", "generation", "reason"},
    "link.restored": {"vm", "link", "generation", "outage_ms", "passt_pid"},
    "link.failed": {"vm", "link", "attempts", "retry_in_ms", "error"},
    "log.limited": {"vm", "of", "count"},
}


@dataclass(frozen=True)
class Call:
    """One place where an event is told, and the fields that it gives."""

    where: str
    event: str
    fields: frozenset[str]


def calls_in(file: Path) -> Iterator[Call]:
    """Every ``emit("event", ...)`` and ``_emit(...)`` of a file. ``**status.fields`` is an exit code or a signal."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Call(
                func=ast.Name(id="emit" | "_emit") | ast.Attribute(attr="emit" | "_emit"),
                args=[ast.Constant(value=str(event))],
                keywords=keywords,
            ):
                given = set(BOUND.get(file.name, ()))
                for keyword in keywords:
                    if keyword.arg is not None:
                        given.add(keyword.arg)
                    elif "fields" in ast.unparse(keyword.value):
                        given.add("exit_code or signal")
                yield Call(f"{file.name}:{node.lineno}", event, frozenset(given))


CALLS = [call for file in sorted(SOURCE.rglob("*.py")) for call in calls_in(file)]


def test_the_search_finds_the_calls() -> None:
    """The tests below would pass with nothing found: every event is told somewhere, or has no business here."""
    assert set(EVENTS) == {call.event for call in CALLS}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.where}-{call.event}")
def test_a_call_gives_the_fields_of_its_sentence_and_those_promised(call: Call) -> None:
    """No sentence shows a ?, and no query of a user's finds a field missing."""
    kind = EVENTS[call.event]
    in_text = {name for _, name, _, _ in string.Formatter().parse(kind.text) if name}
    in_text.update(field for _, field in kind.also)
    assert set() == in_text - call.fields
    assert set() == PROMISED.get(call.event, set()) - call.fields


def test_message_ids_are_ids_and_unique() -> None:
    """sd-id128(3): 32 lower-case hexadecimal digits, each of its own."""
    ids = [kind.message_id for kind in EVENTS.values()]
    assert [] == [each for each in ids if len(each) != 32 or set(each) - set("0123456789abcdef")]
    assert len(set(ids)) == len(ids)
    # systemd-id128 makes random UUIDs (version 4, variant 1): one made up by hand would most likely not be.
    assert [] == [each for each in ids if each[12] != "4" or each[16] not in "89ab"]


def test_output_events_exist() -> None:
    """What is dropped first is made of known events."""
    assert OUTPUT_EVENTS - set(EVENTS) == set()


@pytest.mark.parametrize(
    ("event", "fields", "expected"),
    [
        ("vm.started", {"vm": "web", "qemu_pid": 7}, "web: QEMU started as pid 7"),
        ("passt.started", {"vm": "web", "link": 0, "pid": 8}, "web: link 0: passt started as pid 8"),
        ("passt.output", {"vm": "web", "link": 1, "line": "NDP"}, "web: link 1: passt: NDP"),
        ("guest.console", {"vm": "web", "line": "login:"}, "web | login:"),
        ("guest.console", {"vm": "web", "line": "{qemu_pid}"}, "web | {qemu_pid}"),
        ("log.dropped", {"count": 3}, "3 lines were dropped: nobody read the log fast enough"),
        (
            "log.limited",
            {"vm": "web", "of": "guest.console", "count": 3},
            "web: 3 lines of guest.console were left out: more than the journal is given",
        ),
        ("vm.exited", {"vm": "web"}, "web: ended: ?"),
        ("no.such", {"vm": "web"}, "web: no.such"),
        (
            "link.forwards",
            {"vm": "web", "link": 0, "by": "swap", "tcp": ("127.0.0.1/2222:22", "8080:80"), "udp": []},
            "web: link 0: forwards tcp 127.0.0.1/2222:22, 8080:80 and udp nothing from now on, by swap",
        ),
        (
            "vm.reloaded",
            {"vm": "web", "applied": ["link[0].passt.tcp_ports"], "links": [0], "needs_restart": []},
            "web: the file was read again: applied link[0].passt.tcp_ports; another passt for link 0",
        ),
        (
            "vm.reloaded",
            {"vm": "web", "applied": [], "links": [], "needs_restart": ["qemu.args", "qemu.accel"]},
            "web: the file was read again: a restart of the VM is needed for qemu.args, qemu.accel",
        ),
        (
            "vm.reloaded",
            {"vm": "web", "applied": [], "links": [], "needs_restart": []},
            "web: the file was read again: nothing had changed",
        ),
        (
            "agent.reloaded",
            {"vms": 1, "changed": [], "started": ["nothing"]},
            "the files were read again: started nothing",
        ),
    ],
)
def test_headlines(event: str, fields: dict[str, object], expected: str) -> None:
    """VM and link stand in front; a guest's words stay as they are; a missing field loses no line."""
    assert expected == headline(event, fields)


def test_a_guest_cannot_speak_as_qrapd() -> None:
    """Whatever a guest writes stands behind a bar."""
    words = "web: QEMU started as pid 7"
    assert headline("guest.console", {"vm": "web", "line": words}) != headline(
        "vm.started", {"vm": "web", "qemu_pid": 7}
    )
    assert f"web | {words}" == headline("guest.console", {"vm": "web", "line": words})


def test_sentences_need_no_vm() -> None:
    """sentence() is the bare words, without VM and link."""
    assert "passt (pid 8) ended" == sentence("passt.exited", {"vm": "web", "link": 0, "pid": 8})
