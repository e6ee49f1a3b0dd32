# SPDX-License-Identifier: GPL-2.0-or-later
"""When a wait is over: decided by how the VM was and is, not by events, which may be missed.

``history`` begins with the status before the request; its last one is the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = ["Verdict", "killed", "restarted", "started", "stopped", "swapped"]

History = Sequence[dict[str, Any]]

RUNS = ("ready", "degraded")
OVER = ("exited", "failed")

PASSING = 10.0
"""Seconds for which a state may be one between two others: before a second machine its file is read again, and whoever
has taken a VM over goes on with its stop. That takes milliseconds, on a busy host a few seconds."""


@dataclass(frozen=True)
class Verdict:
    """A wait is over: the VM is as was asked for, or will not be."""

    ok: bool
    words: str
    hint: str | None = None


def started(history: History) -> Verdict | None:
    """The machine runs."""
    now = history[-1]
    if now["state"] in RUNS:
        return Verdict(True, _running(now))
    return _over(history) if _is_news(history) else None


def restarted(history: History) -> Verdict | None:
    """The machine runs, and it is another QEMU."""
    before, now = history[0], history[-1]
    if now["state"] in RUNS:
        if _pid(now) not in (None, _pid(before)):
            return Verdict(True, _running(now))
        return _forgotten(history, "restart")
    # Between the two machines it has exited, too: that counts only when the second one was seen, or does not come.
    second = any(_pid(each) not in (None, _pid(before)) for each in history[1:])
    if now["state"] == "exited" and not second:
        if not (_is_news(history) and _lasts(now)):
            return None
        words = "has ended, and was not started again: it may have been stopped meanwhile"
        return Verdict(False, words, f"start it: qrapd start {now['name']}")
    return _over(history) if _is_news(history) else None


def stopped(history: History) -> Verdict | None:
    """It has ended; well, if it ran at all since it was told to."""
    before, now = history[0], history[-1]
    ran = any(each["state"] not in OVER or _pid(each) is not None for each in history)
    if now["state"] == "exited" or not ran:
        return Verdict(True, "has ended" if ran else "does not run")
    if now["state"] == "failed":
        if _pid(now) is not None:
            return _still_there(now)
        return Verdict(False, f"has failed: {_error(now)}", now.get("hint"))
    if now["state"] in RUNS:
        if _is_another(before, now):
            return Verdict(True, f"has ended, and was started anew: QEMU is pid {_pid(now)} now")
        return _forgotten(history, "stop")
    return None


def killed(history: History) -> Verdict | None:
    """That QEMU is no more; there may be another one already, if the VM's file wants that."""
    before, now = history[0], history[-1]
    if now["state"] in OVER:
        if _pid(now) is not None:
            return _still_there(now) if _is_news(history) else None
        ran = any(each["state"] not in OVER or _pid(each) is not None for each in history)
        return Verdict(True, "is dead" if ran else "does not run")
    if _is_another(before, now):
        return Verdict(True, f"is dead, and runs again as its file wants: QEMU is pid {_pid(now)} now")
    return None


def swapped(history: History, index: int) -> Verdict | None:
    """The link has another stream."""
    before, now = find_link(history[0], index), find_link(history[-1], index)
    if history[-1]["state"] in (*OVER, "stopping"):
        return Verdict(False, f"link {index}: the VM has ended meanwhile")
    if _is_another(history[0], history[-1]):
        # Its streams are counted from 1 again.
        return Verdict(
            False, f"link {index}: the VM was started anew meanwhile, and has other passts by that"
        )
    if now is None:
        return Verdict(False, f"link {index} is no more")
    generation = before["generation"] if before else -1
    if now["state"] == "up" and now["generation"] > generation:
        outage, pid = now.get("last_outage_ms"), now.get("passt_pid")
        took = f" after {outage:.0f} ms" if outage is not None else ""
        who = f" (pid {pid})" if pid else ""
        return Verdict(
            True, f"link {index}: back{took} on another passt{who}, generation {now['generation']}"
        )
    # A link that had been given up before says so until it is tried again.
    states = [link["state"] for each in history if (link := find_link(each, index))]
    if states[-1] == "failed" and set(states) != {"failed"}:
        return Verdict(False, f"link {index}: no passt: {_error(history[-1])}")
    return None


def find_link(status: dict[str, Any], index: int) -> dict[str, Any] | None:
    """A VM's link, if it has that."""
    return next((link for link in status.get("links") or () if link["index"] == index), None)


def _is_news(history: History) -> bool:
    """Whether a state is of this attempt, and not of the one before."""
    before, now = history[0], history[-1]
    return (before["state"], before.get("since")) != (now["state"], now.get("since"))


def _is_another(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether it is another QEMU."""
    return _pid(before) is not None and _pid(now) not in (None, _pid(before))


def _lasts(status: dict[str, Any]) -> bool:
    """Whether a state is more than one between two others. The moments are of this host, and of the same clock."""
    try:
        since = datetime.fromisoformat(str(status.get("since")))
        return (datetime.now(UTC) - since).total_seconds() > PASSING
    except (ValueError, TypeError):  # no moment, or one without a time zone
        return False


def _forgotten(history: History, request: str) -> Verdict | None:
    """It runs on though it was on its way down: whoever was at that is gone."""
    now = history[-1]
    if not (any(each["state"] == "stopping" for each in history) and _lasts(now)):
        return None
    words = f"runs on: its supervisor was replaced meanwhile, and that one knows nothing of the {request}"
    return Verdict(False, words, f"ask again: qrapd {request} {now['name']}")


def _still_there(status: dict[str, Any]) -> Verdict:
    hint = f"end it at once, what its guest has not written is lost: qrapd kill {status['name']}"
    return Verdict(False, f"its QEMU (pid {_pid(status)}) still runs: {_error(status)}", hint)


def _over(history: History) -> Verdict | None:
    now = history[-1]
    if now["state"] == "failed":
        return Verdict(False, f"has failed: {_error(now)}", now.get("hint"))
    if now["state"] == "exited":
        return Verdict(True, "has ended again by itself")
    return None


def _running(status: dict[str, Any]) -> str:
    down = [str(link["index"]) for link in status.get("links") or () if link["state"] != "up"]
    words = f"runs, QEMU is pid {_pid(status)}" if _pid(status) else "runs"
    return words + (f"; without a network on link {', '.join(down)}" if down else "")


def _pid(status: dict[str, Any]) -> int | None:
    return status.get("qemu_pid")


def _error(status: dict[str, Any]) -> str:
    return str(status.get("error") or "its log says why")
