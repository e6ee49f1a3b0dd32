# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's side of things: readiness, a word on the state, the watchdog, and fds that outlive a crash.

The protocols are sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3) and, for what a unit may store,
systemd.service(5), FileDescriptorStoreMax=. Without a service manager all of it does nothing.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol, cast

__all__ = [
    "QEMU",
    "Keeper",
    "Notifier",
    "PrefixedKeeper",
    "Reporter",
    "is_unit",
    "output_name",
    "passt_name",
    "stored_name",
    "take_stored_fds",
    "watchdog_interval",
]

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


QEMU = "qemu"
"""Under which QEMU's pidfd is kept."""


def stored_name(link: int) -> str:
    """Under which a link's held stream is kept."""
    return f"link{link}"


def passt_name(link: int) -> str:
    """Under which the pidfd of a link's passt is kept."""
    return f"passt{link}"


def output_name(process: str) -> str:
    """Under which the read end of what a process writes is kept, by the name of its pidfd."""
    return f"{process}-output"


class Keeper(Protocol):
    """Keeps fds for a supervisor that comes after this one."""

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Keep copies under a name."""

    def forget(self, name: str) -> bool:
        """Keep what has this name no more."""


class Notifier:
    """Tells the service manager; says nothing where there is none.

    :param address: of its socket, $NOTIFY_SOCKET.
    """

    def __init__(self, address: str | None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """Take the address out of the environment, where QEMU and passt have no business with it."""
        return cls(environment.pop("NOTIFY_SOCKET", None))

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    def tell(self, **fields: object) -> bool:
        """Send ``KEY=value`` lines, such as ``READY=1``; returns whether they were taken.

        A manager that is too busy for one word must not hold up a VM: the word is lost then.
        """
        return self._send(fields, ())

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Have fds kept for the next start, under a name; returns whether they were taken.

        They are kept when their other end has hung up as well: what has become of it is to be judged by us.
        """
        return self._send({"FDSTORE": 1, "FDNAME": name, "FDPOLL": 0}, fds)

    def forget(self, name: str) -> bool:
        """Have all fds of a name closed."""
        return self._send({"FDSTOREREMOVE": 1, "FDNAME": name}, ())

    def _send(self, fields: Mapping[str, object], fds: Iterable[int]) -> bool:
        if not self._address:
            return False
        message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        numbers = array.array("i", fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as caller:
                caller.sendmsg([message], rights, 0, self._address)
        except OSError:
            return False
        return True


class PrefixedKeeper:
    """A :class:`Notifier` as the keeper of one VM's fds among those of many: ``web.link0``.

    FDNAME may have 255 characters and no colon: sd_pid_notify_with_fds(3).
    """

    def __init__(self, notifier: Notifier, vm: str) -> None:
        self._notifier = notifier
        self._vm = vm

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """As :meth:`Notifier.store`."""
        return self._notifier.store(f"{self._vm}.{name}", fds)

    def forget(self, name: str) -> bool:
        """As :meth:`Notifier.forget`."""
        return self._notifier.forget(f"{self._vm}.{name}")


def take_stored_fds(environment: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """What the service manager has kept, or passed in by a socket unit: names with fds, in no order.

    The variables are taken out of the environment, and the fds are not inherited by children.
    """
    wanted, count = environment.pop("LISTEN_PID", None), environment.pop("LISTEN_FDS", "0")
    names = environment.pop("LISTEN_FDNAMES", "")
    if wanted != str(pid) or not count.isdecimal():
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    given = names.split(":") if names else []
    given += ["unknown"] * (len(fds) - len(given))
    return list(zip(given, fds, strict=False))


def is_unit(environment: Mapping[str, str], pid: int) -> bool:
    """Whether systemd has started this very process: systemd.exec(5), $SYSTEMD_EXEC_PID, since 248."""
    return environment.get("SYSTEMD_EXEC_PID") == str(pid)


def watchdog_interval(environment: MutableMapping[str, str], pid: int) -> float | None:
    """Seconds between two signs of life: a third of what the unit allows. None: nobody waits for any."""
    usec, wanted = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", None)
    if not usec.isdecimal() or wanted not in (None, str(pid)):
        return None
    return int(usec) / 3_000_000


class Reporter:
    """Makes what happens to one VM known to the service manager: ready or not, and a line for `systemctl status`.

    :param stop_seconds: how long an orderly end may take.
    :param is_final: whether a VM that is being stopped is not to come up again. To the service manager a process that
        is STOPPING has only its timeout left.
    """

    def __init__(
        self, notifier: Notifier, stop_seconds: float, is_final: Callable[[], bool] = lambda: True
    ) -> None:
        self._notifier = notifier
        self._stop_seconds = stop_seconds
        self._is_final = is_final
        self._machine = "starting"
        self._links: dict[int, str] = {}

    def note(self, event: str, /, **fields: object) -> None:
        """An event of the VM's."""
        if not self._notifier.active:
            return
        match event:
            case "vm.ready" | "vm.adopted":
                # Those that are being healed say so next.
                for link, generation in enumerate(cast("list[int]", fields.get("generations", []))):
                    self._links.setdefault(link, f"up (generation {generation})")
                self._machine = str(fields["status"])
                self._notifier.tell(READY=1, STATUS=self.status)
                return
            case "vm.stopping":
                self._machine = f"stopping ({fields['how']})"
                if self._is_final():
                    self.note_stop()
                    return
            case "vm.reloaded" | "vm.reload_refused":
                self._notifier.tell(READY=1, STATUS=self.status)
                return
            case "vm.restarting":
                self._machine = "to be started again"
                self._links.clear()
            case "vm.exited":
                self._machine = f"ended ({fields['reason']})"
            case "link.connected" | "link.restored" | "link.lost" | "link.failed":
                self._links[int(str(fields["link"]))] = _describe_link(event, fields)
            case _:
                return
        self._notifier.tell(STATUS=self.status)

    def note_stop(self) -> None:
        """The VM is to end for good."""
        usec = round(self._stop_seconds * 1_000_000)
        self._notifier.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=usec, STATUS=self.status)

    def note_reload(self) -> None:
        """The file is about to be read again: sd_notify(3), RELOADING=1, wants the time as well."""
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    @property
    def status(self) -> str:
        """In words: ``running; link 0 up (generation 3, last outage 34 ms)``."""
        return "; ".join([self._machine, *(f"link {n} {words}" for n, words in sorted(self._links.items()))])


def _describe_link(event: str, fields: Mapping[str, object]) -> str:
    match event:
        case "link.connected":
            return f"up (generation {fields['generation']})"
        case "link.restored":
            return f"up (generation {fields['generation']}, last outage {fields['outage_ms']} ms)"
        case "link.lost":
            return f"down ({fields['reason']})"
        case _:
            given_up = fields.get("retry_in_ms") is None
            return f"down ({fields['attempts']} attempts failed{', given up' if given_up else ''})"
