# SPDX-License-Identifier: GPL-2.0-or-later
"""Every event that qrapd tells: its level, its identity in the journal, and a sentence for people.

The names and fields are an interface (docs/reference.md lists them). A ``message_id`` is
made once, by ``systemd-id128 new``, and never changes: journalctl and the catalog find an event by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["EVENTS", "OUTPUT_EVENTS", "EventKind", "Level", "headline", "sentence"]

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class EventKind:
    """One kind of event. ``text`` is a format string over the event's fields."""

    level: Level
    message_id: str
    text: str
    also: tuple[tuple[str, str], ...] = ()
    """what follows ``text`` where that list has something in it: the words before the list, and the field"""


EVENTS: Mapping[str, EventKind] = {
    "vm.started": EventKind("info", "f02d3fb4b78647a791523c3e64d1c478", "QEMU started as pid {qemu_pid}"),
    "vm.ready": EventKind(
        "info",
        "4f101e605c5c4d799d04ee6564921b62",
        "the machine is {status}, {links} of {links} links connected",
    ),
    "vm.adopted": EventKind(
        "info",
        "58b4f8b0174342898d9ea0528667f641",
        "taken over from an earlier supervisor: QEMU (pid {qemu_pid}) is {status}, {links} links",
    ),
    "vm.stopping": EventKind("info", "bdca7c9988f9472f9fa59dbb64d95d9d", "stopping ({how})"),
    "vm.exited": EventKind("info", "8a4b3ad50c194cebafd597a071391d13", "ended: {reason}"),
    "vm.restarting": EventKind(
        "warning",
        "7d58ed766f704eb8a3a0ffc01e83a4eb",
        "starting again in {delay_ms} ms, for the {attempts}. time in a row",
    ),
    "vm.reloaded": EventKind(
        "info",
        "739aeca561dd45e68af93352bd95821f",
        "the file was read again",
        (
            ("applied", "applied"),
            ("another passt for link", "links"),
            ("a restart of the VM is needed for", "needs_restart"),
        ),
    ),
    "vm.reload_refused": EventKind(
        "warning",
        "80d011dd228c4052aa7e4f524af64493",
        "the file was not read again, all stays as it is: {error}",
    ),
    "passt.started": EventKind("info", "edbad456b46641bfab9ea564db6915a6", "passt started as pid {pid}"),
    "passt.exited": EventKind("info", "412b4911d63147229e244bbd6bff21ff", "passt (pid {pid}) ended"),
    "passt.output": EventKind("info", "ab67317f4da44dddb5d4e7d2540a97aa", "passt: {line}"),
    "link.connected": EventKind(
        "info",
        "d06d72db6db547d9b8ae98214838fe0b",
        "connected to passt (pid {passt_pid}), generation {generation}",
    ),
    "link.notice": EventKind("warning", "afe52fee1c72482881feba8a456308eb", "{notice}"),
    "link.lost": EventKind(
        "error",
        "e60a205da3a34172b3710169c93dfde0",
        "lost its passt ({reason}): the guest has no network on this NIC",
    ),
    "link.restored": EventKind(
        "info",
        "e5e4db7b16b84a7a98bcd4a317c1010c",
        "back after {outage_ms} ms on another passt (pid {passt_pid}), generation {generation}",
    ),
    "link.forwards": EventKind(
        "info", "114a47e1d58940cd9b12a62dc6c3223a", "forwards tcp {tcp} and udp {udp} from now on, by {by}"
    ),
    "link.failed": EventKind(
        "error",
        "8dde992c2d3c4d1fa8284503465a1f7d",
        "no new passt ({attempts}. attempt): {error}",
    ),
    "qemu.output": EventKind("warning", "c14d0e9b1bce421f93f0439804498a95", "qemu: {line}"),
    "guest.console": EventKind("info", "dfa19d94e91a4a34b6ebf68d29a16143", "{line}"),
    "record.failed": EventKind(
        "warning", "aed06133c6584bde95c4c2e05afc2d31", "cannot write the VM's record: {error}"
    ),
    "log.dropped": EventKind(
        "warning",
        "741e41494f7e48759c2a2bfc4eb890fc",
        "{count} lines were dropped: nobody read the log fast enough",
    ),
    "log.limited": EventKind(
        "warning",
        "af30f6243a4f42a9827db6b4c7081b3a",
        "{count} lines of {of} were left out: more than the journal is given",
    ),
    "agent.ready": EventKind(
        "info",
        "b7e01aeb759b4fb19b1292ec025b924d",
        "the agent is there: {vms} VMs, {adopted} of them taken over from an earlier one",
    ),
    "agent.reloaded": EventKind(
        "info",
        "6cd556d6ee2749b68fb856c5af963699",
        "the files were read again",
        (("changed", "changed"), ("started", "started")),
    ),
    "agent.stopping": EventKind(
        "info", "bf1dd24d32384799b46980626728fd6a", "the agent stops ({how}), with {vms} VMs running"
    ),
    "bug.found": EventKind(
        "error",
        "eec734ff3d304fea9265dc4c47bf2eac",
        "a bug in qrapd, please report it: {where}: {error}",
    ),
    "config.invalid": EventKind("error", "76e530557d5641199a552b5562107e32", "{file}: {problem}"),
    "run.failed": EventKind("error", "17ef94c04b3049f191f8de8f8f38d9d4", "{error}"),
}

OUTPUT_EVENTS = frozenset({"guest.console", "passt.output", "qemu.output"})
"""What others say through us: the first to be dropped when nobody reads the log."""


class _Fields(dict[str, object]):
    """An event's fields, as a sentence has them: a list without the brackets and quotes of Python's."""

    def __getitem__(self, key: str) -> object:
        value = self.get(key, "?")
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value)) or "nothing"
        return value


def sentence(event: str, fields: Mapping[str, object]) -> str:
    """The event in words. A field that is missing shows as ``?`` rather than losing the line."""
    kind = EVENTS.get(event)
    if kind is None:
        return event
    words = _Fields(fields)
    text = kind.text.format_map(words)
    if kind.also:
        told = [f"{before} {words[field]}" for before, field in kind.also if fields.get(field)]
        text += f": {'; '.join(told) or 'nothing had changed'}"
    return text


def headline(event: str, fields: Mapping[str, object]) -> str:
    """The sentence with the VM and link that it is about in front: ``web: link 0: connected to …``.

    What the guest says stands behind a bar, as in ``web | login:``, so that it cannot pass for qrapd's word.
    """
    words = sentence(event, fields)
    vm, link = fields.get("vm"), fields.get("link")
    if event == "guest.console":
        return f"{vm} | {words}"
    if link is not None:
        words = f"link {link}: {words}"
    return f"{vm}: {words}" if vm is not None else words
