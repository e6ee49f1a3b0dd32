# SPDX-License-Identifier: GPL-2.0-or-later
"""The log: structlog events as JSON, for a terminal, or in the journal's native protocol.

Writing never holds up the event loop. A terminal that is stopped with Ctrl-S, a pipe that nobody empties and
a busy journald all block a writer for as long as they like, so one thread writes, from a bounded queue. When
the queue is full, lines of guests and children go first, and how many went is said once there is room again.

Into the journal they are limited beforehand (:mod:`qrapd.rate_limit`), or journald would drop qrapd's own together with
theirs. A terminal or a pipe gets all that its reader takes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol

from qrapd.messages import EVENTS, OUTPUT_EVENTS, headline
from qrapd.rate_limit import RateLimit


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Let an optional import of ``module`` fail, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    modules: MutableMapping[str, Any] = sys.modules
    modules[module] = None  # what the import system takes as "not there"
    try:
        yield
    finally:
        del modules[module]


# structlog.dev imports rich where it is installed: 40 ms at every start, for a renderer that is not used here.
with _without("rich"):
    import structlog

__all__ = ["Emit", "LogFormat", "Logs", "choose_format"]

LogFormat = Literal["auto", "journal", "json", "console"]

OUTPUT_QUEUE = 2_000
"""Lines of guests and children that may wait to be written; beyond, they are dropped and counted."""

OUTPUT_QUEUE_BYTES = 16 * 1024 * 1024
"""The same by their length, as a line may be long (:mod:`qrapd.lines`)."""

REPORT_SECONDS = 5.0
"""So long after the first line that was left out it is said how many were: a flood lasts, and one word on it does."""

OWN_QUEUE = 20_000
"""Lines of any kind that may wait; beyond, even qrapd's own are dropped and counted."""

FLUSH_SECONDS = 2.0
"""How long the end of the program waits for a slow reader of the log."""

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
"""Where journald takes entries: systemd-journald.service(8)."""

_LEADING_FIELDS = ("timestamp", "level", "event", "vm", "link")

# syslog(3)
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}

# ECMA-48 colours: dim for what others say, yellow and red for what wants attention.
_COLOURS = {"warning": "33", "error": "31"}

_Fields = MutableMapping[str, Any]
_Rendered = tuple[tuple[Any, int], dict[str, Any]]


class Emit(Protocol):
    """How the rest of qrapd tells what happens: an event of :data:`qrapd.messages.EVENTS` and its fields."""

    def __call__(self, event: str, /, **fields: object) -> None:
        """Tell it. Returns at once, and a log that cannot be written never raises here."""


class Logs:
    """Where events go. A context manager: leaving it writes what is still queued.

    ``level`` is the least that is written: debug, info, warning or error; ``journal`` is journald's socket.
    """

    def __init__(
        self,
        log_format: LogFormat = "auto",
        level: str = "info",
        stream: IO[str] | None = None,
        journal: Path = JOURNAL_SOCKET,
    ) -> None:
        stream = stream or sys.stderr
        self.format = choose_format(os.environ, stream) if log_format == "auto" else log_format
        render, deliver, self._release = _outlet(self.format, stream, journal)
        self._writer = _Writer(deliver, self._tell_dropped, self._tell_limited)
        self._limit = RateLimit[tuple[str, str]]() if self.format == "journal" else None
        self._limit_lock = threading.Lock()
        self._logger = structlog.wrap_logger(
            self._writer,
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _mark_output(render),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            cache_logger_on_first_use=True,
        )

    def emit(self, event: str, /, **fields: object) -> None:
        """Tell one event; the :class:`Emit` of everything below."""
        if self._limit is not None and event in OUTPUT_EVENTS and not self._admit(event, fields):
            return
        getattr(self._logger, EVENTS[event].level)(event, **fields)

    def _admit(self, event: str, fields: Mapping[str, object]) -> bool:
        """Whether a line of others may go on: decided first, since a flood is to cost little."""
        assert self._limit is not None
        now = time.monotonic()
        with self._limit_lock:
            # By kind: what a guest writes too much of is not to cost the last words of its QEMU.
            admitted = self._limit.admit((str(fields.get("vm")), event), _output_size(fields), now)
        if not admitted:
            self._writer.remind(now + REPORT_SECONDS)
        return admitted

    def _tell_limited(self) -> None:
        if self._limit is None:
            return
        with self._limit_lock:
            left_out = self._limit.take_left_out()
        for (vm, event), count in left_out.items():
            self.emit("log.limited", vm=vm, of=event, count=count)

    def _tell_dropped(self, count: int) -> None:
        self.emit("log.dropped", count=count)

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell_limited()
        if self._writer.close():
            self._release()


def choose_format(environment: Mapping[str, str], stream: IO[str]) -> Literal["journal", "json", "console"]:
    """What ``auto`` means: the journal if the stream leads there, a person's form on a terminal, else JSON.

    systemd.exec(5): JOURNAL_STREAM holds device and inode of the stream that goes to the journal. A child
    inherits the variable even where its stderr went elsewhere, so both must match.
    """
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "json"
    if environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}":
        return "journal"
    return "console" if stream.isatty() else "json"


class _Writer:
    """The logger that structlog ends in, and the thread that empties its queue."""

    def __init__(
        self,
        deliver: Callable[[Any], None],
        tell_dropped: Callable[[int], None],
        tell_limited: Callable[[], None],
    ) -> None:
        self._deliver = deliver
        self._tell_dropped = tell_dropped
        self._tell_limited = tell_limited
        self._queue: collections.deque[tuple[Any, int]] = collections.deque()
        self._changed = threading.Condition()
        self._output_bytes = 0
        self._dropped = 0
        self._remind_at: float | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def msg(self, item: Any, output_size: int) -> None:
        """Queue a rendered event; ``output_size`` is the length of what others say, and 0 for qrapd's own."""
        with self._changed:
            if len(self._queue) >= (OUTPUT_QUEUE if output_size else OWN_QUEUE) or (
                output_size and self._output_bytes + output_size > OUTPUT_QUEUE_BYTES
            ):
                self._dropped += 1
                return
            self._queue.append((item, output_size))
            self._output_bytes += output_size
            self._wake()

    debug = info = warning = error = msg

    def remind(self, at: float) -> None:
        """Have it told at this time, by the monotonic clock, how many lines were left out; the first call counts."""
        if self._remind_at is None:  # in a flood this comes very often
            with self._changed:
                self._remind_at = at
                self._wake()

    def _wake(self) -> None:
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()

    def close(self) -> bool:
        """Whether all is written, and nothing more will be."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(FLUSH_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        # Signals are the main thread's: where it blocks or ignores one, this thread must not take it instead.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                while not self._queue and not self._closing and (wait := self._until_reminder()) != 0:
                    self._changed.wait(wait)
                if remind := self._until_reminder() == 0:
                    self._remind_at = None
                elif not self._queue:
                    return
                item, output_size = self._queue.popleft() if self._queue else (None, 0)
                self._output_bytes -= output_size
                emptied = not self._queue
                dropped = self._dropped if emptied else 0
                if emptied:
                    self._dropped = 0
            # A reader that went away must not take the supervisor with it.
            with contextlib.suppress(OSError):
                if item is not None:
                    self._deliver(item)
            if dropped:
                self._tell_dropped(dropped)
            if remind:
                self._tell_limited()

    def _until_reminder(self) -> float | None:
        return None if self._remind_at is None else max(0.0, self._remind_at - time.monotonic())


def _mark_output(render: Callable[[_Fields], Any]) -> Callable[[Any, str, _Fields], _Rendered]:
    """The last processor: its result becomes the arguments of :meth:`_Writer.msg`."""

    def last(_logger: Any, _method: str, fields: _Fields) -> _Rendered:
        size = _output_size(fields) if fields["event"] in OUTPUT_EVENTS else 0
        return (render(fields), size), {}

    return last


def _output_size(fields: Mapping[str, object]) -> int:
    """How long a line of others is; an empty one counts, too."""
    return max(1, len(str(fields.get("line", ""))))


def _outlet(
    log_format: str, stream: IO[str], journal: Path
) -> tuple[Callable[[_Fields], Any], Callable[[Any], None], Callable[[], None]]:
    """How an event is rendered, how the result is delivered, and what is to be done in the end."""
    if log_format == "journal":
        from logging_journald import JournaldTransport

        # Addressed at each send, as sd_journal_sendv() does: the socket may be replaced when journald restarts.
        transport = JournaldTransport(journal, connected=False)
        return _render_journal, transport.send, transport.socket.close
    fd = stream.fileno()
    if log_format == "console":
        coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        return partial(_render_console, coloured=coloured), partial(_write, fd), _keep_open
    return _render_json, partial(_write, fd), _keep_open


def _keep_open() -> None:
    """The stream belongs to whoever gave it."""


def _write(fd: int, line: str) -> None:
    data = line.encode("utf-8", errors="backslashreplace")
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # someone else who shares this stream made it non-blocking
            select.select([], [fd], [])


def _render_json(fields: _Fields) -> str:
    ordered = {name: fields.pop(name) for name in _LEADING_FIELDS if name in fields}
    return json.dumps(ordered | dict(fields), default=str, ensure_ascii=False) + "\n"


def _render_console(fields: _Fields, *, coloured: bool) -> str:
    clock = str(fields["timestamp"])[11:19]
    text = f"{clock} {headline(str(fields['event']), fields)}"
    colour = "2" if fields["event"] in OUTPUT_EVENTS else _COLOURS.get(str(fields["level"]))
    return f"\x1b[{colour}m{text}\x1b[0m\n" if coloured and colour else f"{text}\n"


def _render_journal(fields: _Fields) -> list[tuple[str, Any]]:
    """The pairs of one entry: systemd.journal-fields(7) for the trusted names, QRAPD_* for ours."""
    event = str(fields["event"])
    level = fields.pop("level")
    del fields["timestamp"]  # journald has its own, of the same moment
    return [
        ("MESSAGE", _utf8(headline(event, fields))),
        ("PRIORITY", _PRIORITIES[level]),
        ("MESSAGE_ID", EVENTS[event].message_id),
        ("SYSLOG_IDENTIFIER", "qrapd"),
        *((f"QRAPD_{name}", _utf8(str(value))) for name, value in fields.items() if value is not None),
    ]


def _utf8(text: str) -> str:
    """``text`` with what UTF-8 cannot hold (bytes of a path that is none) as backslash escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode()
