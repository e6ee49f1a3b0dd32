# SPDX-License-Identifier: GPL-2.0-or-later
"""A free passt on one of the usual sockets: found without harm to the others, and claimed.

A probe has side effects. Who connects to a passt takes the one place that it has; who leaves a ``--one-off`` passt
ends it; who sends Ethernet to a ``--vhost-user`` passt ends that. So:

1. **Look, then touch.** The kernel's tables tell who listens, of which user, and whether a client is there
   (unix_sockets.py). The names and command lines of all passts are read, and by them sockets and passts are brought
   together: by ``--socket``; for those on default names by the time at which the socket was made; and where that is
   not enough, by the fds of those processes whose fds may be read, a few milliseconds at a time. A name and a command
   line can be forged: only programs count that can have made the socket by their user, and those that started too
   late for it leave all in doubt. What is found is one of

   - a listener of a user who is not allowed: refused with a message, never touched;
   - ``--vhost-user``: passed over; possibly that: put off;
   - taken, or with a connection that waits to be accepted: put off;
   - a *stranger*, a program that is no passt, or a passt that persists: leaving it does no harm;
   - a passt with ``--one-off``, or a listener of which no more is known: leaving it may end it.

2. **Touch few.** The lowest candidate is asked first. Every 10 ms without an answer the number under way doubles, so
   that a healthy passt, which answers in about a millisecond, is the only one touched, and 63 silent strangers are all
   under way after 60 ms. But of those that may end, one is under way at a time, and it is left for two reasons only:
   it hung up, or it was silent for 0.5 s. An answer from another one waits until that is clear.

3. **Take.** The lowest that has answered when the first answer is seen wins; one that may end goes before one that
   persists. The answer was only peeked at: it stays in the stream, whole, for QEMU. All else is closed.

4. **Come again.** Who hangs up at once has a client. It is put off like those seen to be taken, and looked at again
   every 50 ms for 2.5 s: libvirt runs its emulator three times in a row, each time before the last has let go. One
   that has accepted nothing by then is no busy passt but a hung one: what waits may be a question of an earlier claim.
   One that hangs up on all though nobody is connected, or stays silent, may be *poisoned*: its client was killed in the
   middle of a frame, and it takes what the next ones say for the rest. It is named, also when another one is claimed.

**Rivals.** When many claim at once, two must not hold what the other one waits for. An attempt therefore holds an
advisory lock on its candidate, by the device and inode of the socket's file: whoever finds it locked goes on to the
next one, touches nothing, and comes again 10 ms later; while rivals are at it, patience grows, up to 10 s, and the
number under way doubles every 100 ms only. Programs that know no lock (the C qrap, QEMU by itself) still only make a
passt busy for a moment. Anybody can hold such a lock, so after 1 s it is ignored: it is no protection, only courtesy.

**The old question and a newer one.** A candidate is asked what qrap always asked. passts since 2024 do not answer the
IPv6 half of that, so a passt without IPv4 stays silent: after 0.1 s it is asked once more, from a link-local address.

The modules, from below: `candidates` and `identity` decide and do no I/O, `trusted_users` says whose listeners are
asked, `looking` is step 1 above and `attempts` step 2, `claiming` has 3 and 4, `survey` tells of all. The state
machines wait for nothing themselves, and so serve three drivers, which are here: :func:`claim` and :func:`look` for
anyio, :func:`claim_blocking` for `qrap`, which starts in a moment: neither anyio (50 ms) nor dataclasses (6 ms) are
imported before they are needed.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Collection, Sequence

from .candidates import Candidate, State, default_paths, describe, fold
from .claiming import Claim, Claiming
from .identity import Command, Identity, Passts, identify, is_passt, read_command, sort_passts
from .survey import Survey
from .trusted_users import default_uids

__all__ = [
    "Candidate",
    "Claim",
    "Command",
    "Identity",
    "Passts",
    "State",
    "claim",
    "claim_blocking",
    "default_paths",
    "default_uids",
    "describe",
    "fold",
    "identify",
    "is_passt",
    "look",
    "read_command",
    "sort_passts",
]


async def look(
    paths: Sequence[str] | None = None,
    *,
    allowed_uids: Collection[int] | None = None,
    ask_all: bool = False,
) -> list[Candidate]:
    """What each of ``paths`` is, in their order; takes up to 0.5 s if some are silent.

    :param allowed_uids: users whose listeners are asked, beside :func:`default_uids`.
    :param ask_all: ask even those that end when their client leaves; 0.5 s for each that is silent.
    """
    allowed = default_uids() | frozenset(allowed_uids or ())
    with Survey(default_paths() if paths is None else paths, allowed, ask_all=ask_all) as survey:
        while (wait := survey.step()) is not None:
            await _wait(survey.events, wait)
        return survey.result()


async def claim(
    paths: Sequence[str] | None = None,
    *,
    allowed_uids: Collection[int] | None = None,
    say: Callable[[str], None] | None = None,
) -> Claim:
    """Find a free passt on one of ``paths`` and connect to it. May be cancelled at any point: nothing stays open.

    :param paths: default: :func:`default_paths`.
    :param allowed_uids: users whose listeners are accepted, beside :func:`default_uids`.
    :param say: is told of each listener that is refused, and of those that should have answered before the claimed one.
    :raise Unavailable: none will do; says of each what it is, and what to do.
    """
    with Claiming(paths, allowed_uids, say) as claiming:
        while (wait := claiming.step()) is not None:
            await _wait(claiming.events, wait)
        return claiming.take()


async def _wait(events: select.epoll, seconds: float) -> None:
    import anyio  # 50 ms, which a program that only claims by claim_blocking need not spend

    with anyio.move_on_after(seconds):
        await anyio.wait_readable(events.fileno())


def claim_blocking(
    candidates: Sequence[str] | None = None,
    *,
    allowed_uids: Collection[int] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[socket.socket, str]:
    """As :func:`claim`, without an event loop; returns the connected socket and its path.

    :raise Unavailable: as :func:`claim`.
    """
    with Claiming(candidates, allowed_uids, say) as claiming:
        # Not epoll_wait(2), which would take the edges that step() is to see.
        poll = select.poll()
        poll.register(claiming.events, select.POLLIN)
        while (wait := claiming.step()) is not None:
            poll.poll(wait * 1000)
        found = claiming.take()
        return found.socket, found.path
