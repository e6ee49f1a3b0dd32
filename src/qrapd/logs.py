# SPDX-License-Identifier: GPL-2.0-or-later
"""The log: structlog events as JSON, for a terminal, or in the journal's native protocol.

Writing never holds up the event loop. A terminal that is stopped with Ctrl-S, a pipe that nobody empties and
a busy journald all block a writer for as long as they like, so one thread writes, from a bounded queue. When
the queue is full, lines of guests and children go first, and how many went is said once there is room again.
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
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol

from qrapd.messages import EVENTS, OUTPUT_EVENTS, headline


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
_Rendered = tuple[tuple[Any, bool], dict[str, Any]]


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
        self._writer = _Writer(deliver, self._tell_dropped)
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
        getattr(self._logger, EVENTS[event].level)(event, **fields)

    def _tell_dropped(self, count: int) -> None:
        self.emit("log.dropped", count=count)

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def __init__(self, deliver: Callable[[Any], None], tell_dropped: Callable[[int], None]) -> None:
        self._deliver = deliver
        self._tell_dropped = tell_dropped
        self._queue: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    def msg(self, item: Any, output: bool) -> None:
        with self._changed:
            if len(self._queue) >= (OUTPUT_QUEUE if output else OWN_QUEUE):
                self._dropped += 1
                return
            self._queue.append(item)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()

    debug = info = warning = error = msg

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
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                item = self._queue.popleft()
                emptied = not self._queue
                dropped = self._dropped if emptied else 0
                if emptied:
                    self._dropped = 0
            # A reader that went away must not take the supervisor with it.
            with contextlib.suppress(OSError):
                self._deliver(item)
            if dropped:
                self._tell_dropped(dropped)


def _mark_output(render: Callable[[_Fields], Any]) -> Callable[[Any, str, _Fields], _Rendered]:
    """The last processor: its result becomes the arguments of :meth:`_Writer.msg`."""

    def last(_logger: Any, _method: str, fields: _Fields) -> _Rendered:
        output = fields["event"] in OUTPUT_EVENTS
        return (render(fields), output), {}

    return last


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
