# SPDX-License-Identifier: GPL-2.0-or-later
"""The log: each form as promised, and never in the way of the program that writes it."""

from __future__ import annotations

import array
import fcntl
import io
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from qrapd import logs as logs_module
from qrapd.logs import OUTPUT_QUEUE, LogFormat, Logs, choose_format
from qrapd.messages import EVENTS

PATIENCE = 30.0


@dataclass
class Pipe:
    """A stream to log to, and the end where it comes out."""

    stream: IO[str]
    reader: int

    def read_all(self) -> str:
        """Everything up to the end; the writer must have been closed, or all be written."""
        self.stream.close()
        with os.fdopen(self.reader, encoding="utf-8", closefd=False) as text:
            return text.read()


@contextmanager
def pipe() -> Iterator[Pipe]:
    """A pipe; its reading end is closed last, so that a writer that is stuck gets free."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        try:
            yield Pipe(stream, reader)
        finally:
            with suppress(OSError):
                os.close(reader)


def written(log_format: LogFormat, event: str, level: str = "info", **fields: Any) -> str:
    """What one event looks like."""
    with pipe() as log:
        with Logs(log_format, level, log.stream) as logs:
            logs.emit(event, **fields)
        return log.read_all()


def finish(logs: Logs) -> None:
    """Wait for the log's thread, which has nothing to wait for any more."""
    thread = logs._writer._thread
    assert thread is not None
    thread.join(PATIENCE)
    assert not thread.is_alive()


# JSON


def test_json_is_one_object_a_line_with_its_leading_fields_in_order() -> None:
    """timestamp, level, event, vm, link, and the event's own fields behind; text as UTF-8."""
    line = written("json", "passt.exited", pid=7, signal=9, link=0, vm="web", note="größer\nals")
    assert line.endswith("}\n")
    assert 1 == line.count("\n")
    assert "größer" in line
    found = json.loads(line)
    assert ["timestamp", "level", "event", "vm", "link", "pid", "signal", "note"] == list(found)
    del found["timestamp"]
    expected = {"level": "info", "event": "passt.exited", "vm": "web", "link": 0}
    assert expected | {"pid": 7, "signal": 9, "note": "größer\nals"} == found


def test_timestamps_are_rfc_3339_in_utc() -> None:
    """Z at the end, whatever the host's time zone, and of now."""
    stamp = json.loads(written("json", "vm.started", qemu_pid=1))["timestamp"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", stamp)
    now = time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
    before = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 60))
    assert stamp[:16] in {now, before}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_every_event_can_be_told(event: str, log_format: LogFormat) -> None:
    """Also without its fields: a line is worth more than its completeness."""
    assert 1 == written(log_format, event, level="debug").count("\n")


@pytest.mark.parametrize(("level", "expected"), [("info", 3), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_written(level: str, expected: int) -> None:
    """The level is the least that is told."""
    with pipe() as log:
        with Logs("json", level, log.stream) as logs:
            for event in ("vm.started", "record.failed", "link.lost"):
                logs.emit(event)
        assert expected == log.read_all().count("\n")


def test_values_that_json_and_utf_8_do_not_know() -> None:
    """A path is written as text, a name that is no UTF-8 with escapes; neither loses the line."""
    found = json.loads(written("json", "config.invalid", file=Path("/a"), problem="p"))
    assert "/a" == found["file"]
    assert "\\udcff" in written("json", "config.invalid", file=os.fsdecode(b"/\xff"), problem="p")


# for a terminal


@pytest.mark.parametrize(
    ("event", "fields", "expected"),
    [
        ("vm.started", {"vm": "web", "qemu_pid": 7}, "web: QEMU started as pid 7"),
        ("passt.started", {"vm": "web", "link": 1, "pid": 8}, "web: link 1: passt started as pid 8"),
        ("guest.console", {"vm": "web", "line": "login:"}, "web | login:"),
    ],
)
def test_console_lines(event: str, fields: dict[str, Any], expected: str) -> None:
    """The clock, VM and link in front, a guest's words behind a bar; no colours into a pipe."""
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {re.escape(expected)}\n", written("console", event, **fields))


@contextmanager
def terminal() -> Iterator[Pipe]:
    """A terminal to log to."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        try:
            yield Pipe(stream, master)
        finally:
            os.close(master)


@pytest.mark.parametrize(
    ("event", "no_color", "expected"),
    [
        ("link.lost", None, "\x1b[31m"),
        ("record.failed", None, "\x1b[33m"),
        ("guest.console", None, "\x1b[2m"),
        ("vm.ready", None, ""),
        ("link.lost", "1", ""),
        ("link.lost", "", "\x1b[31m"),  # no-color.org: when not an empty string
    ],
)
def test_colours(event: str, no_color: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wants attention is coloured on a terminal, others' words are dim; NO_COLOR is obeyed."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    with terminal() as log:
        with Logs("console", stream=log.stream) as logs:
            logs.emit(event, line="x")
        line = os.read(log.reader, 1000).decode()
    end = "\x1b[0m" if expected else ""
    assert re.fullmatch(rf"{re.escape(expected)}\d\d:\d\d:\d\d [^\x1b]+{re.escape(end)}\r\n", line)


# which form


def test_the_form_is_chosen_by_what_the_stream_is() -> None:
    """The journal where JOURNAL_STREAM names this very stream, a terminal's form on one, else JSON."""
    with pipe() as plain, terminal() as screen:
        stat = os.fstat(plain.reader)  # both ends of a pipe have the same numbers
        mine = f"{stat.st_dev}:{stat.st_ino}"
        cases: list[tuple[IO[str], str | None, str]] = [
            (plain.stream, None, "json"),
            (plain.stream, mine, "journal"),
            (screen.stream, None, "console"),
            (screen.stream, mine, "console"),  # inherited: stderr went elsewhere
            (plain.stream, f"{stat.st_dev}:{stat.st_ino + 1}", "json"),
            (plain.stream, "", "json"),
            (plain.stream, "nonsense", "json"),
            (plain.stream, "8:", "json"),
            (io.StringIO(), mine, "json"),
        ]
        for stream, value, expected in cases:
            environment: Mapping[str, str] = {} if value is None else {"JOURNAL_STREAM": value}
            assert expected == choose_format(environment, stream), (stream, value)


def test_auto_looks_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen is what is used, and a form that is asked for is not chosen."""
    with pipe() as log:
        stat = os.fstat(log.reader)
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        cases: list[tuple[LogFormat, str]] = [("auto", "journal"), ("json", "json"), ("console", "console")]
        for given, expected in cases:
            with Logs(given, stream=log.stream) as logs:
                assert expected == logs.format


# the journal


@contextmanager
def journald(path: Path) -> Iterator[socket.socket]:
    """A socket that takes entries as journald's does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.settimeout(PATIENCE)
        yield server


def receive(server: socket.socket) -> tuple[dict[str, str], bool]:
    """One entry, and whether it came in a sealed memory file: systemd's "Native Journal Protocol"."""
    data, ancillary, _, _ = server.recvmsg(1 << 20, socket.CMSG_SPACE(4))
    if not ancillary:
        return parse_entry(data), False
    fds = array.array("i", ancillary[0][2])
    with os.fdopen(fds[0], "rb") as file:
        if hasattr(fcntl, "F_GET_SEALS"):  # journald refuses files that could still be changed
            assert fcntl.F_SEAL_WRITE & fcntl.fcntl(file, fcntl.F_GET_SEALS)
        size = os.fstat(file.fileno()).st_size
        return parse_entry(os.pread(file.fileno(), size, 0)), True


def parse_entry(data: bytes) -> dict[str, str]:
    """NAME=value lines, or NAME, a length of 64 bits, and the value."""
    fields = {}
    while data:
        head, _, rest = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length + 1 :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


@contextmanager
def journal_of(tmp_path: Path) -> Iterator[tuple[Logs, socket.socket]]:
    """A log into a journal."""
    path = tmp_path / "journal"
    with journald(path) as server, pipe() as log, Logs("journal", "debug", log.stream, path) as logs:
        yield logs, server
    assert not logs._writer._queue


def test_a_journal_entry(tmp_path: Path) -> None:
    """The trusted names of systemd.journal-fields(7), and every field as QRAPD_NAME; None is left out."""
    with journal_of(tmp_path) as (logs, server):
        logs.emit("passt.exited", vm="web", link=0, pid=7, exit_code=1, note=None)
        fields, by_file = receive(server)
    assert not by_file
    assert {
        "MESSAGE": "web: link 0: passt (pid 7) ended",
        "PRIORITY": "6",
        "MESSAGE_ID": EVENTS["passt.exited"].message_id,
        "SYSLOG_IDENTIFIER": "qrapd",
        "QRAPD_EVENT": "passt.exited",
        "QRAPD_VM": "web",
        "QRAPD_LINK": "0",
        "QRAPD_PID": "7",
        "QRAPD_EXIT_CODE": "1",
    } == fields


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_has_its_priority_and_id_in_the_journal(event: str, tmp_path: Path) -> None:
    """syslog(3)'s numbers, so that `journalctl -p warning` shows what it should."""
    with journal_of(tmp_path) as (logs, server):
        logs.emit(event)
        fields, _ = receive(server)
    priorities = {"debug": "7", "info": "6", "warning": "4", "error": "3"}
    assert priorities[EVENTS[event].level] == fields["PRIORITY"]
    assert (event, EVENTS[event].message_id) == (fields["QRAPD_EVENT"], fields["MESSAGE_ID"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one\ntwo=2\n", "one\ntwo=2\n"),  # cannot forge a field
        ("MESSAGE=x", "MESSAGE=x"),
        ("größer", "größer"),
        (os.fsdecode(b"/\xff.toml"), "/\\udcff.toml"),
        (Path("/a"), "/a"),
        ("", ""),
    ],
)
def test_values_in_the_journal(value: object, expected: str, tmp_path: Path) -> None:
    """Several lines, other scripts, and what is no UTF-8 arrive, and the entry after them does, too."""
    with journal_of(tmp_path) as (logs, server):
        logs.emit("run.failed", error=value)
        logs.emit("vm.started", qemu_pid=1)
        assert expected == receive(server)[0]["QRAPD_ERROR"]
        assert "vm.started" == receive(server)[0]["QRAPD_EVENT"]


def test_an_entry_too_large_for_a_datagram_arrives(tmp_path: Path) -> None:
    """It goes by a sealed memory file, as sd_journal_sendv(3) sends it."""
    words = "x" * 1_000_000
    with journal_of(tmp_path) as (logs, server):
        logs.emit("qemu.output", line=words)
        fields, by_file = receive(server)
    assert by_file
    assert words == fields["QRAPD_LINE"]


def test_a_journal_that_comes_back_is_written_to_again(tmp_path: Path) -> None:
    """Without a journald entries are lost and nothing else; a new one gets what is told from then on."""
    path = tmp_path / "journal"
    with pipe() as log, Logs("journal", "debug", log.stream, path) as logs:
        for number in (1, 2):
            logs.emit("vm.started", qemu_pid=0)  # to nobody
            with journald(path) as server:
                logs.emit("vm.started", qemu_pid=number)
                while str(number) != receive(server)[0]["QRAPD_QEMU_PID"]:
                    pass
            path.unlink()


# a flood


def flood(logs: Logs, number: int, vm: str = "web") -> None:
    """Lines of a guest, as fast as can be."""
    for _ in range(number):
        logs.emit("guest.console", vm=vm, line="x")


class Collected(threading.Thread):
    """Reads entries beside the test: journald is never full."""

    def __init__(self, server: socket.socket, last: str, number: int) -> None:
        super().__init__()
        self._server, self._last, self._number = server, last, number
        self.entries: list[dict[str, str]] = []
        self.start()

    def run(self) -> None:
        """Until the last one."""
        with suppress(TimeoutError):
            while self.names().count(self._last) < self._number:
                self.entries.append(receive(self._server)[0])

    def names(self) -> list[str]:
        """The events."""
        return [entry["QRAPD_EVENT"] for entry in self.entries]

    def result(self) -> list[dict[str, str]]:
        """All of them, once the last has come."""
        self.join(PATIENCE)
        assert self._number == self.names().count(self._last)
        return self.entries


def test_a_flood_is_limited_in_the_journal(tmp_path: Path) -> None:
    """What was left out is counted by VM and kind; qrapd's own events, and others' lines, are all there."""
    with journal_of(tmp_path) as (logs, server):
        collecting = Collected(server, "vm.exited", 1)
        # Slower than the queue's limit could be the cause of a loss.
        for _ in range(50):
            flood(logs, 200)
            logs.emit("qemu.output", vm="web", line="its last words")
            logs.emit("guest.console", vm="other", line="y")
            logs.emit("link.lost", vm="web", link=0)
            while len(logs._writer._queue) > 500:
                time.sleep(0.001)
        logs._tell_limited()
        logs.emit("vm.exited", vm="web", reason="killed")
        entries = collecting.result()
    names = [entry["QRAPD_EVENT"] for entry in entries]
    assert [50, 50, 0] == [names.count(name) for name in ("link.lost", "qemu.output", "log.dropped")]
    assert 50 == len([e for e in entries if e["QRAPD_VM"] == "other"])
    told = [e for e in entries if e["QRAPD_EVENT"] == "log.limited"]
    assert {("web", "guest.console")} == {(e["QRAPD_VM"], e["QRAPD_OF"]) for e in told}
    written = len([e for e in entries if (e["QRAPD_EVENT"], e["QRAPD_VM"]) == ("guest.console", "web")])
    assert 50 * 200 == written + sum(int(e["QRAPD_COUNT"]) for e in told)
    assert written < 50 * 200 / 2


def test_what_was_left_out_is_told_while_all_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood may end without another word of anybody; and the end of the log tells the rest."""
    monkeypatch.setattr(logs_module, "REPORT_SECONDS", 0.01)
    with journal_of(tmp_path) as (logs, server):
        collecting = Collected(server, "log.limited", 1)
        flood(logs, 5000)
        assert int(collecting.result()[-1]["QRAPD_COUNT"]) > 0
    monkeypatch.setattr(logs_module, "REPORT_SECONDS", 1000.0)
    (tmp_path / "journal").unlink()
    with journal_of(tmp_path) as (logs, server):
        collecting = Collected(server, "vm.exited", 1)
        flood(logs, 5000)
        logs.emit("vm.exited", vm="web", reason="killed")
        assert "log.limited" not in [entry["QRAPD_EVENT"] for entry in collecting.result()]
        collecting = Collected(server, "log.limited", 1)
        logs.__exit__(None, None, None)
        assert int(collecting.result()[-1]["QRAPD_COUNT"]) > 0


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_stream_gets_all_that_its_reader_takes(log_format: LogFormat) -> None:
    """It is the user's own: no limit but the queue's."""
    read: list[str] = []
    with pipe() as log, os.fdopen(log.reader, encoding="utf-8", closefd=False) as text:
        reader = threading.Thread(target=lambda: read.extend(text))
        reader.start()
        with Logs(log_format, stream=log.stream) as logs:
            for _ in range(50):
                flood(logs, 200)
                while logs._writer._queue:
                    time.sleep(0.001)
        log.stream.close()
        reader.join(PATIENCE)
    assert 50 * 200 == len(read)


def test_long_lines_that_wait_are_bounded_by_their_length() -> None:
    """The queue's memory is, whatever a guest writes."""
    with pipe() as log:
        logs = Logs("json", stream=log.stream)
        for _ in range(300):
            logs.emit("guest.console", vm="web", line="x" * 128 * 1024)
        assert logs._writer._output_bytes <= logs_module.OUTPUT_QUEUE_BYTES
        assert 100 < len(logs._writer._queue) <= 128
        *kept, last = [json.loads(line) for line in lines_up_to(log.reader, "log.dropped")]
        logs._writer.close()
        finish(logs)
    assert 300 == len(kept) + last["count"]


# never in the way


def test_a_reader_that_does_not_read_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """emit() returns at once and close() within its limit; lines of guests are dropped, qrapd's own are not.

    Once the reader reads, it gets all that was kept, and is told how many lines were not.
    """
    monkeypatch.setattr(logs_module, "FLUSH_SECONDS", 0.1)
    too_many = OUTPUT_QUEUE + 1000
    with pipe() as log:
        logs = Logs("json", stream=log.stream)
        before = time.monotonic()
        for number in range(too_many):
            logs.emit("guest.console", vm="web", line=f"{number} {'x' * 100}")
        for number in range(100):
            logs.emit("vm.started", vm="web", qemu_pid=number)
        logs._writer.close()
        assert time.monotonic() - before < PATIENCE
        # Now somebody reads: the last words of the log are how many lines are missing.
        events = [json.loads(line) for line in lines_up_to(log.reader, "log.dropped")]
        finish(logs)
    kept = [event for event in events if event["event"] == "guest.console"]
    assert list(range(100)) == [event["qemu_pid"] for event in events if event["event"] == "vm.started"]
    assert too_many == len(kept) + events[-1]["count"]
    assert OUTPUT_QUEUE <= len(kept) < too_many
    assert ["0", "1", "2"] == [event["line"].split()[0] for event in kept[:3]]


def lines_up_to(fd: int, event: str) -> Iterator[str]:
    """Lines as they come, the first of this event being the last."""
    with os.fdopen(fd, encoding="utf-8", closefd=False) as text:
        for line in text:
            yield line
            if f'"event": "{event}"' in line:
                return


def test_even_own_lines_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, whatever is told; what was dropped is counted together."""
    monkeypatch.setattr(logs_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(logs_module, "OWN_QUEUE", 50)
    monkeypatch.setattr(logs_module, "OUTPUT_QUEUE", 20)
    with pipe() as log:
        fcntl.fcntl(log.stream, fcntl.F_SETPIPE_SZ, 4096)
        logs = Logs("json", stream=log.stream)
        for _ in range(1000):
            logs.emit("vm.started", vm="web", note="x" * 1000)
        assert 50 == len(logs._writer._queue)
        logs.emit("guest.console", vm="web", line="x")
        assert 50 == len(logs._writer._queue)
        *kept, last = [json.loads(line) for line in lines_up_to(log.reader, "log.dropped")]
        logs._writer.close()
        finish(logs)
    assert 1001 == len(kept) + last["count"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_reader_that_has_gone_does_no_harm(log_format: LogFormat) -> None:
    """EPIPE on every write: the program goes on, and ends."""
    with pipe() as log:
        os.close(log.reader)
        with Logs(log_format, stream=log.stream) as logs:
            for _ in range(100):
                logs.emit("vm.started", qemu_pid=1)
        finish(logs)


def test_a_stream_that_someone_made_non_blocking_is_written_whole() -> None:
    """A terminal's or pipe's mode is shared with all who have it: a full one is waited for, nothing is lost."""
    with pipe() as log:
        fcntl.fcntl(log.stream, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(log.stream.fileno(), False)
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.extend(lines_up_to(log.reader, "vm.exited")))
        with Logs("json", stream=log.stream) as logs:
            for number in range(100):
                logs.emit("qemu.output", line=f"{number} {'x' * 500}")
            logs.emit("vm.exited")
            reader.start()
        reader.join(PATIENCE)
    assert [*range(100)] == [int(json.loads(line)["line"].split()[0]) for line in read[:-1]]


def test_leaving_writes_what_is_queued() -> None:
    """Nothing that was told is lost at an orderly end."""
    with pipe() as log:
        fcntl.fcntl(log.stream, fcntl.F_SETPIPE_SZ, 1 << 20)
        with Logs("json", stream=log.stream) as logs:
            for _ in range(1000):
                logs.emit("guest.console", line="x")
        assert 1000 == log.read_all().count("\n")


def test_a_log_that_nobody_used_needs_no_thread() -> None:
    """Making a log costs a start nothing."""
    before = threading.active_count()
    with pipe() as log, Logs("json", stream=log.stream):
        assert before == threading.active_count()


def test_rich_is_not_imported() -> None:
    """40 ms at every start of a VM; whoever wants it afterwards still gets it."""
    program = "import sys, qrapd.logs; assert 'rich' not in sys.modules; import rich, structlog"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)
